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
from typing import Any

import numpy as np

from ckptlab.arrays import Tally
from ckptlab.catalog import MASTER, PARAM, Catalog, FlatGroup, Tensor
from ckptlab.formats.deepspeed import folding, info, names
from ckptlab.formats.deepspeed.experts import layer_of
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.states import States
from ckptlab.formats.fileplan import FilePlan
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import Size
from ckptlab.formats.torch.torchfile import Pending
from ckptlab.stored import Stored


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


class NativeWriter(States):
    """The files of one native checkpoint."""

    def files(self) -> Iterator[FilePlan]:
        mesh, inside = self.mesh, self.native.wrapper is Wrapper.WHOLE
        for p in range(mesh.pp):
            for t in range(mesh.tp):
                mp = p * mesh.tp + t
                for d in range(mesh.dp if self.zero3 else 1):
                    name = FileName("zero3_model" if self.zero3 else "model", mp, d)
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
        yield from () if self.zero3 else self.fused_files()
        for ep, p, rank in self.optimizers_of_experts() if inside else ():
            content = {"optimizer": self.whole_state(p, rank, ep), **self.folding("routed_expert", rank)}
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
                    tensors = {fused.name(n, expert): self.shard(n, PARAM, rank, 0, index) for n in fused.names}
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

    def layers_on(self, stage: int) -> list[str]:
        """The layers of a stage that have experts, in the order in which it numbers them."""
        held = {layer_of(name) for name, tensor in self.target.tensors.items() if stage in tensor.stages}
        return [layer for layer in self.experts.total if layer in held]

    def experts_on(self, stage: int) -> Iterator[tuple[int, tuple[int, list[str]]]]:
        """(number of the layer on its stage, (expert, its tensors)) of all experts of a stage."""
        for i, layer in enumerate(self.layers_on(stage)):
            for one in self.experts.tensors(layer, self.target.tensors):
                yield i, one

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
            optimizer=self.whole_state(p, rank) if whole and not self.experts else None,  # theirs have files
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
        if (self.target.zero_stage or 0) < 2:
            return nothing
        others = [x for x in self.target.tensors.values() if self.experts.degree(x.name) is None]
        frozen = [x for x in others if (x.kind == "frozen" and (said or self.zero3)) or self._is_empty(x, rank)]
        if not frozen:
            return nothing
        fragments = ((x.name, self.fragment(x, d, rank) if self.zero3 else module[x.name]) for x in frozen)
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
                module |= {key: value} if self.zero3 else {}
                continue
            tensor = self.target[name]
            if layer_of(tensor.name):  # a universal folder has experts here too, which have files of their own
                continue
            if self.zero3 and tensor.kind != "buffer":
                module[key] = np.empty(0, tensor.states[PARAM])
                continue
            if tensor.name not in made:  # aliases share the leaf, and so the storage
                made[tensor.name] = self.module_weight(tensor.name, rank)
            module[key] = made[tensor.name]
        return module

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
