"""The native writer: a catalog on another mesh → the files that an ordinary `engine.load_checkpoint` there reads.

Each output file is a `FilePlan`, whose tensors are drawn from the source when it is carried out. What load needs, and
what it ignores, was found by leaving out one key at a time (DeepSpeed 0.19.8).
"""

from __future__ import annotations

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ckptlab.arrays import Drawn, Partition, Tally, reader, shard_reader
from ckptlab.catalog import MASTER, PARAM, Catalog, FlatGroup, Tensor
from ckptlab.formats.deepspeed import autoep, folding, info, muon, names
from ckptlab.formats.deepspeed.experts import layer_of
from ckptlab.formats.deepspeed.groups import GROUP
from ckptlab.formats.deepspeed.headers import Wrapper
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.deepspeed.target import NativeTarget
from ckptlab.formats.deepspeed.whole import whole_state
from ckptlab.formats.fileplan import Elements, FilePlan, Zeros
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import Size, foreign
from ckptlab.formats.torch.torchfile import Pending
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer, Holder
from ckptlab.stored import Stored

FRAGMENT = ("deepspeed.utils.tensor_fragment", "fragment_address")
ZERO_STAGE = ("deepspeed.runtime.zero.config", "ZeroStageEnum")


def files(source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
    """Every file of the native checkpoint for `target` (see `target.reshape`), drawn from `source`."""
    return NativeWriter(source, target, tally).files()


def payload(target: Catalog) -> int:
    """Bytes of tensors in all files of the native checkpoint for `target`: what its plans say, without making them."""
    if target.private.wrapper is not Wrapper.ZERO12:
        return target.nbytes
    flats = [(group, flat) for group in target.flat_groups for flat in group.flats.values() if MASTER in group.dtypes]
    padding = (sum(map(flat.padding, range(flat.dp))) * group.dtypes[MASTER].itemsize for group, flat in flats)
    return target.nbytes - sum(padding)  # the master is stored without it


def _left_out(value: Stored, name: str, source: Catalog) -> bool:
    """Whether that is ZeRO-3's placeholder of a frozen tensor that the run kept out of its checkpoints (DeepSpeed
    forgets the other names of a tied one there, `exclude_frozen_parameters` in `runtime/engine.py`)."""
    if value.numel or source.zero_stage != 3:
        return False
    return not any(name == tensor.name or name in tensor.aliases for tensor in source.tensors.values())


@dataclass(frozen=True)
class Part:
    """What a rank has of a flat group: who has the buffer together with it, and the rank's place among those."""

    group: FlatGroup
    holder: Holder
    index: int

    @property
    def flat(self) -> FlatBuffer:
        return self.group.flats[self.holder]

    @property
    def size(self) -> int:
        """Elements of the rank's partition, padding included."""
        return self.flat.size(self.index)


class NativeWriter:
    """The files of one native checkpoint."""

    def __init__(self, source: Catalog, target: Catalog, tally: Tally | None) -> None:
        self.source, self.target, self.tally = source, target, tally
        self.native: NativeTarget = target.private
        self.mesh = target.mesh
        self.folder = source.private.folder
        self.extras = source.private.extras
        self.config = info.adapt_config(source.private.config, target)
        self.prefix = "bf16" if self.native.dtype == "bf16" else ""
        self.experts = self.native.experts
        self._at: dict[tuple[Mesh, int], Mapping[str, int]] = {}
        self._ranks: dict[tuple[Mesh, Holder], list[int]] = {}

    @property
    def version(self) -> str:
        """Of DeepSpeed, by which it tells how to load a file: the source's; one that has such files where it says
        none."""
        return self.folder.models[0, 0].get("ds_version") or names.VERSION

    def files(self) -> Iterator[FilePlan]:
        mesh = self.mesh
        zero3, inside = (self.native.wrapper is wrapper for wrapper in (Wrapper.ZERO3, Wrapper.WHOLE))
        for p in range(mesh.pp):
            for t in range(mesh.tp):
                mp = p * mesh.tp + t
                for d in range(mesh.dp if zero3 else 1):
                    name = FileName("zero3_model" if zero3 else "model", mp, d)
                    yield torchfile.plan(name.text, self.model_file(p, t, d))
                for d in range(0 if inside else mesh.dp):
                    name = FileName("optim", mp, d, prefix=self.prefix)
                    yield torchfile.plan(name.text, self.optim_file(p, t, d))
        axis = self.folder.layer_axis or mesh.tp > 1
        for layer, prefix in self.source.private.module.layer_keys.items() if self.folder.is_pipeline else ():
            for t in range(mesh.tp):
                yield torchfile.plan(FileName.of_layer(layer, t, axis).text, self.layer_file(layer, prefix, t))
        for p in range(mesh.pp):
            for i, (expert, held) in self.experts_on(p):
                for rank in self.experts.kept_by(held[0], mesh, p):
                    tensors = OrderedDict((n, self.module_weight(n, rank)) for n in held)
                    name = FileName("expert", p * mesh.tp + rank % mesh.tp, layer=i, expert=expert)
                    yield torchfile.plan(name.text, tensors)
        yield from () if zero3 else self.fused_files()
        for ep, p, rank in self.optimizers_of_experts() if inside else ():
            content = {"optimizer": whole_state(self, p, rank, ep), **self.folding("routed_expert", rank)}
            yield torchfile.plan(FileName("expert_optim", p * mesh.tp + rank % mesh.tp, expert=ep).text, content)

    def fused_files(self) -> Iterator[FilePlan]:
        """The files of experts that are a tensor together: each by the first rank that has it, for its tp rank."""
        for fused in self.experts.fused:
            made = set()
            for (ep, t), rank in self.experts.first_ranks(self.mesh, self.experts.sizes[-1]).items():
                for index, expert in enumerate(fused.ranks[ep]):
                    if (expert, t) in made:
                        continue
                    made.add((expert, t))
                    tensors = {fused.name(name, expert): self.expert(name, rank, index) for name in fused.names}
                    content = OrderedDict({**tensors, **self.folding("routed_expert", rank)})
                    yield torchfile.plan(FileName("expert", t, layer=fused.number, expert=expert).text, content)

    def optimizers_of_experts(self) -> Iterator[tuple[int, int, int]]:
        """(ep rank, pp stage, rank) of all who write the optimizer of their experts, and of what is beside these, where
        there is no ZeRO."""
        mesh, degree = self.mesh, max(self.experts.sizes, default=0)
        if self.experts.folded:
            yield from ((ep, 0, rank) for (ep, _), rank in self.experts.first_ranks(mesh, degree).items())
            return
        for ep in range(degree):
            dp = self.experts.writer(ep, mesh) // (mesh.tp if self.experts.over_tp else 1)
            for p, t in itertools.product(range(mesh.pp), self.experts.writers(ep, degree, mesh)):
                yield ep, p, mesh.rank(pp=p, dp=dp, tp=t)

    def folding(self, family: str, rank: int, families: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a rank's file says of AutoEP beside AutoTP; nothing where there is none."""
        if not self.experts.folded:
            return {}
        ep = self.experts.sizes[-1]
        return {autoep.FOLDING: folding.said(self.mesh, ep, rank, family, families)}

    def layers_on(self, stage: int) -> list[str]:
        """The layers of a stage that have experts, in the order in which it numbers them."""
        held = {layer_of(name) for name, tensor in self.target.tensors.items() if stage in tensor.stages}
        return [layer for layer in self.experts.total if layer in held]

    def experts_on(self, stage: int) -> Iterator[tuple[int, tuple[int, list[str]]]]:
        """(number of the layer on its stage, (expert, its tensors)) of all experts of a stage."""
        for i, layer in enumerate(self.layers_on(stage)):
            for one in self.experts.tensors(layer, self.target.tensors):
                yield i, one

    # ---------------------------------------------------------------- tensors

    def coordinate(self, tensor: Tensor, rank: int) -> tuple[int, ...]:
        """The coordinate of the tensor's cut that a rank has."""
        return tensor.cut.coordinate(self.at(tensor.cut.mesh, rank))

    def at(self, mesh: Mesh, rank: int) -> Mapping[str, int]:
        """Where a rank stands on the target's mesh, or on that of its experts."""
        if (mesh, rank) not in self._at:
            self._at[mesh, rank] = mesh.coordinate(rank)
        return self._at[mesh, rank]

    def module_weight(self, name: str, rank: int) -> Pending:
        """A tensor's module weight on a rank: as it was stored, or the master rounded to the target's dtype."""
        return self.shard(name, PARAM, rank, self.target.tensors[name].stages[0] if self.folder.is_pipeline else None)

    def shard(self, name: str, state: str, rank: int, stage: int | None = None) -> Pending:
        """What a rank has of a state that lies outside of flat buffers. stage: the pp stage that stores it (None: the
        rank's own)."""
        tensor = self.target.tensors[name]
        shape = tensor.cut.shard_shape(self.coordinate(tensor, rank))
        return self._elements(tensor, state, rank, stage, shape, 0)

    def expert(self, name: str, rank: int, index: int) -> Pending:
        """The module weight of one of the experts that are a tensor together: the index-th of a rank."""
        tensor = self.target.tensors[name]
        return self._elements(tensor, PARAM, rank, 0, tensor.shape[1:], index)

    def _elements(
        self, tensor: Tensor, state: str, rank: int, stage: int | None, shape: tuple[int, ...], index: int
    ) -> Pending:
        """The part number `index` of that shape of a rank's shard."""
        at, where = self.coordinate(tensor, rank), self.at(tensor.cut.mesh, rank)
        dtype, count = tensor.states[state], math.prod(shape)
        stage = where["pp"] if stage is None else stage
        holder = self.experts.holder(tensor.name, self.mesh, where.get("ep", 0), pp=stage, tp=where["tp"])
        tally = self.tally and self.tally.towards(rank)
        one = shard_reader(self.source, self.target, tensor.name, state, holder, tally)
        return Pending(dtype, shape, (Elements(Drawn(one, tensor.cut, at), dtype, index * count, (index + 1) * count),))

    def parts_on(self, rank: int) -> list[Part]:
        """What a rank has of flat buffers, group by group."""
        found = []
        for group in self.target.flat_groups:
            mesh = self.target.mesh_of(group)
            if group.at.within(at := self.at(mesh, rank)):
                holder = group.holder(at)
                found.append(Part(group, holder, self.ranks(mesh, holder).index(rank)))
        return found

    def partition(self, part: Part, state: str, count: int) -> Pending:
        """The first `count` elements of a partition of a flat buffer; padding is zero."""
        held = Partition(self.source, self.target, part.group, state, part.holder, part.index, self.tally)
        return Pending(held.dtype, (count,), (Elements(held, held.dtype, 0, count),))

    # ---------------------------------------------------------------- model files

    def ranks(self, mesh: Mesh, holder: Holder) -> list[int]:
        """The ranks at a holder's coordinates: those that have a flat buffer together."""
        if (mesh, holder) not in self._ranks:
            self._ranks[mesh, holder] = mesh.ranks(**holder)
        return self._ranks[mesh, holder]

    def model_file(self, p: int, t: int, d: int) -> dict[str, Any]:
        """The model file of a rank (of a pp and tp coordinate only, below ZeRO-3), made from the nearest one of the
        source."""
        mesh, trained = self.mesh, self.folder.mesh
        template = self.folder.models[min(p, trained.pp - 1), t % trained.tp]
        rank = mesh.rank(pp=p, dp=d, tp=t)
        weights: dict[str, Pending] = {}
        module = None if self.folder.is_pipeline else self.module(self.of_stage(p, t), rank, weights, ())
        whole = self.native.wrapper is Wrapper.WHOLE
        aliases = {a: x.name for x in self.target.tensors.values() for a in x.aliases} if rank == 0 else {}
        model = {k: copy.copy(v) for k, v in template.items()}
        model.update(
            module=module,
            optimizer=whole_state(self, p, rank) if whole and not self.experts else None,  # theirs have files
            param_shapes=None if whole else [self._shapes(part.group, rank) for part in self.parts_on(rank)],
            **self._frozen(weights, d, rank),
            shared_params=None if whole else aliases,
            dp_world_size=mesh.dp,
            mp_world_size=mesh.pp * mesh.tp,
            checkpoint_parallel_dimensions={"pp_degree": mesh.pp, "tp_degree": mesh.tp},
            ds_config=self.config,
            ds_version=self.version,
        )
        if self.native.layer_stages:
            here = [x for x in self.target.tensors.values() if x.kind == "buffer" and p in x.stages]
            of_model = [n for x in here for n in (x.name, *x.aliases)]
            model["buffer_names"] = [name for name in of_model if module is None or name in module]
        if self.experts:
            held = [self.experts.total[layer] for layer in self.layers_on(p)]
            model["num_experts"] = held or [fused.total for fused in self.experts.fused]
        model = info.adapt_client(model, self.target.training.layouts_told, self.target, rank)
        return model | self.folding("dense", rank, folding.of_modules(module or {}))

    def _frozen(self, module: Mapping[str, Any], d: int, rank: int) -> dict[str, Any]:
        """Frozen tensors, which stage 2 repeats whole and ZeRO-3 keeps in fragments; stage 1 says None, and so does a
        run that keeps them out of its checkpoints: an engine that has some looks for each of them elsewise."""
        nothing = {"frozen_param_shapes": None, "frozen_param_fragments": None}
        said = self.folder.models[0, 0].get("frozen_param_shapes") is not None or (self.source.zero_stage or 0) < 2
        zero3 = self.native.wrapper is Wrapper.ZERO3
        if (self.target.zero_stage or 0) < 2:
            return nothing
        others = [x for x in self.target.tensors.values() if self.experts.degree(x.name) is None]
        frozen = [x for x in others if (x.kind == "frozen" and (said or zero3)) or self._is_empty(x, rank)]
        if not frozen:
            return nothing
        fragments = ((x.name, self._fragment(x, d, rank) if zero3 else module[x.name]) for x in frozen)
        return {
            "frozen_param_shapes": OrderedDict((x.name, self._shape(x, rank)) for x in frozen),
            "frozen_param_fragments": OrderedDict(fragments),
        }

    def _is_empty(self, tensor: Tensor, rank: int) -> bool:
        """A rank has nothing of a parameter, which to DeepSpeed's optimizer is none there."""
        return tensor.kind == "parameter" and not math.prod(self._shape(tensor, rank))

    def _shape(self, tensor: Tensor, rank: int) -> Size:
        return Size(tensor.cut.shard_shape(self.coordinate(tensor, rank)))

    def _shapes(self, group: FlatGroup, rank: int) -> OrderedDict[str, Size]:
        shapes = ((self.experts.locally(n), self._shape(self.target.tensors[n], rank)) for n in group.names)
        return OrderedDict((name, shape) for name, shape in shapes if math.prod(shape))  # as DeepSpeed does

    def of_stage(self, p: int, t: int) -> Mapping[str, Any]:
        """What is in the module of a stage, by the source's model files: of a pipeline those of all its stages."""
        trained = self.folder.mesh
        if not self.native.layer_stages:
            return self.folder.models[min(p, trained.pp - 1), t % trained.tp].get("module") or {}
        every: dict[str, Any] = {}
        for stage in range(trained.pp):
            every |= self.folder.models[stage, t % trained.tp].get("module") or {}
        stages = {n: x.stages for x in self.target.tensors.values() for n in (x.name, *x.aliases)}
        for name in every.keys() - stages.keys():  # `_extra_state` and the like
            layer = names.layer_number(name)
            stages[name] = (p,) if layer is None else (self.native.layer_stages.get(layer, 0),)
        return {name: value for name, value in every.items() if p in stages[name]}

    def module(
        self, tree: Mapping[str, Any], rank: int, made: dict[str, Pending], at: tuple[str, ...]
    ) -> dict[str, Any]:
        """The model's state dict, a tree of dictionaries where the source's is one, of which `at` leads to this; at
        ZeRO-3 everything but buffers is an empty placeholder. Tensors come by name into `made`."""
        zero3 = self.native.wrapper is Wrapper.ZERO3
        places = self.folder.first.places
        module: dict[str, Any] = OrderedDict()
        for key, value in tree.items():
            if isinstance(value, Mapping) and places:
                module[key] = self.module(value, rank, made, (*at, key))
                continue
            if not isinstance(value, Stored):
                module[key] = value  # `_extra_state` and the like
                continue
            if _left_out(value, name := places.get((*at, key), key), self.source):
                module |= {key: value} if zero3 else {}
                continue
            tensor = self.target[name]
            if layer_of(tensor.name):  # a universal folder has experts here too, which have files of their own
                continue
            if zero3 and tensor.kind != "buffer":
                module[key] = np.empty(0, tensor.states[PARAM])
                continue
            if tensor.name not in made:  # aliases share the leaf, and so the storage
                made[tensor.name] = self.module_weight(tensor.name, rank)
            module[key] = made[tensor.name]
        return module

    def _fragment(self, tensor: Tensor, dp: int, rank: int) -> Pending:
        """A dp rank's part of a frozen tensor at ZeRO-3: cut like a parameter."""
        at = self.coordinate(tensor, rank)
        numel = math.prod(tensor.cut.shard_shape(at))
        part = -(-numel // self.mesh.dp)
        lo, hi = min(dp * part, numel), min((dp + 1) * part, numel)
        dtype = tensor.states[PARAM]
        tally = self.tally and self.tally.towards(rank)
        drawn = Drawn(reader(self.source, tensor.name, PARAM, dtype=dtype, tally=tally), tensor.cut, at)
        padding = Zeros((part - (hi - lo)) * dtype.itemsize)
        return Pending(dtype, (part,), (Elements(drawn, dtype, lo, hi), padding))

    def expert_weights(self, rank: int) -> OrderedDict[str, Any]:
        """The module weights of all experts of a rank's stage, under their global names."""
        held = (name for _, (_, own) in self.experts_on(self.mesh.coordinate(rank)["pp"]) for name in own)
        return OrderedDict((name, self.module_weight(name, rank)) for name in held)

    def layer_file(self, layer: int, prefix: str, tp: int) -> OrderedDict[str, Any]:
        """The tensors of one layer, under their names within it."""
        rank = self.mesh.rank(pp=self.native.layer_stages[layer], dp=0, tp=tp)
        held = [name for name in self.target.tensors if name.startswith(prefix)]
        tensors = OrderedDict((name.removeprefix(prefix), self.module_weight(name, rank)) for name in held)
        others = self.folder.others.get(layer, ({},))
        return OrderedDict({**tensors, **others[tp % len(others)]})

    # ---------------------------------------------------------------- optimizer files

    def optim_file(self, p: int, t: int, d: int) -> dict[str, Any]:
        rank = self.mesh.rank(pp=p, dp=d, tp=t)
        parts, zero3 = self.parts_on(rank), self.native.wrapper is Wrapper.ZERO3
        state = self._zero3_state(parts, rank) if zero3 else self._flat_state(parts, rank)
        content = {"optimizer_state_dict": state, "ds_config": self.config, "ds_version": self.version}
        families = {n: folding.of_buffer(n, part.flat.dp, part.index) for part in parts for n in part.group.names}
        # at ZeRO-3 the sub-groups say it
        return content | self.folding("zero_optimizer_state", rank, None if zero3 else families)

    def _states(self, parts: list[Part], rank: int) -> dict[int, dict[str, Any]]:
        found = {}
        for i, part in enumerate(parts):
            group = part.group
            states = {s: self.partition(part, s, part.size) for s in group.dtypes if s != MASTER}
            found[i] = self.scalars(group.group, group.names[0]) | states | self._momentum(part, rank)
        return found

    def _momentum(self, part: Part, rank: int) -> dict[str, Any]:
        """Muon's, where each rank has that of whole tensors."""
        tensors = [part.flat.names[i] for i in muon.held(part.flat, part.index)]
        flat = muon.MOMENTUM in part.group.dtypes
        if flat or not any(muon.MOMENTUM in self.target.tensors[n].states for n in tensors):
            return {}
        whole = [self.shard(name, muon.MOMENTUM, rank) for name in tensors]
        count = sum(math.prod(one.shape) for one in whole)
        return {muon.MOMENTUM: Pending(whole[0].dtype, (count,), tuple(p for one in whole for p in one.parts))}

    def scalars(self, group: int, tensor: str) -> dict[str, Any]:
        """What the optimizer keeps once, as tensors of their own: torch counts steps in place, in each."""
        kept = self.target.groups[group].scalars_of(tensor)
        return {k: torchfile.Apart(v) if isinstance(v, Stored) else copy.copy(v) for k, v in kept.items()}

    def param_groups(self, parts: list[Part]) -> list[dict[str, Any]]:
        """Hyperparameters, and which buffers belong to each group."""
        members: dict[int, list[int]] = {}
        for i, part in enumerate(parts):
            members.setdefault(part.group.group, []).append(i)
        return [{**self.target.groups[g].options, "params": ids} for g, ids in members.items()]

    def _scaler(self) -> dict[str, Any]:
        """The loss scaler replaces the engine's own: the source's where the dtype stays, else one that fits."""
        dynamic = self.native.dtype == "fp16"
        if self.source.private.dtype == self.native.dtype and "loss_scaler" in self.extras:
            scaler = {"loss_scaler": self.extras["loss_scaler"]}
            dynamic = self.extras.get("dynamic_loss_scale", dynamic)
        elif dynamic and self.native.wrapper is not Wrapper.ZERO3:
            scaler = {}
        else:
            scaler = {"loss_scaler": info.loss_scaler(dynamic)}
        return {**scaler, "dynamic_loss_scale": dynamic, "overflow": False}

    def _zero3_state(self, parts: list[Part], rank: int) -> dict[str, Any]:
        return {
            "zero_stage": foreign(*ZERO_STAGE, 3),
            **self._scaler(),
            "partition_count": self.mesh.dp,
            **({"ds_zero_partition_groups": self._partition_groups(parts)} if self.experts else {}),
            "optimizer_state_dict": {"state": self._states(parts, rank), "param_groups": self.param_groups(parts)},
            "fp32_flat_groups": [self.partition(part, MASTER, part.size) for part in parts],
        }

    def _partition_groups(self, parts: list[Part]) -> list[dict[str, Any]]:
        """Who shares each buffer at ZeRO-3, which DeepSpeed says where experts are shared by others."""
        found = []
        for i, part in enumerate(parts):
            degree = self.experts.degree(part.group.names[0])
            found.append(
                {
                    "sub_group": i,
                    "families": ["autoep_expert" if degree else "replicated"],
                    "group_names": [GROUP.format(degree) if degree else "replicated"],
                    "partition_count": part.flat.dp,
                    "partition_rank": part.index,
                    "partition_ranks": self.ranks(self.target.mesh_of(part.group), part.holder),
                }
            )
        return found

    def _flat_state(self, parts: list[Part], rank: int) -> dict[str, Any]:
        bf16 = self.native.wrapper is Wrapper.BF16
        if bf16:
            paddings = [part.flat.total - part.flat.used if part.index == part.flat.dp - 1 else 0 for part in parts]
        else:
            paddings = [part.flat.padding(part.index) for part in parts]
        # the masters are stored without padding but by BF16_Optimizer
        masters = [part.size - (0 if bf16 else padding) for part, padding in zip(parts, paddings, strict=True)]
        state: dict[str, Any] = {} if bf16 else self._scaler()
        if "clip_grad" in self.extras:
            state["clip_grad"] = self.extras["clip_grad"]
        state["base_optimizer_state"] = {"state": self._states(parts, rank), "param_groups": self.param_groups(parts)}
        state["single_partition_of_fp32_groups"] = [
            self.partition(part, MASTER, n) for part, n in zip(parts, masters, strict=True)
        ]
        if not bf16:
            state["zero_stage"] = foreign(*ZERO_STAGE, self.target.zero_stage)
        state["group_paddings"] = paddings
        state["partition_count"] = [part.flat.dp for part in parts]
        state["ds_version"] = self.version
        state["param_slice_mappings"] = [self._mapping(part) for part in parts]
        return state

    def _mapping(self, part: Part) -> OrderedDict[str, Any]:
        return OrderedDict(
            (
                self.experts.locally(part.flat.names[i]),
                foreign(*FRAGMENT, state={"numel": int(count), "start": int(start)}, new=True),
            )
            for i, _, start, count in part.flat.within(part.index)
        )
