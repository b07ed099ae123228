"""What an optimizer keeps, as each of DeepSpeed's wrappers has it in its files."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Any

from ckptlab.catalog import MASTER, PARAM
from ckptlab.formats.deepspeed import folding, info, muon
from ckptlab.formats.deepspeed.groups import GROUP
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.shards import Part, Shards
from ckptlab.formats.torch.pickles import Foreign, foreign
from ckptlab.formats.torch.torchfile import Pending

FRAGMENT = ("deepspeed.utils.tensor_fragment", "fragment_address")
_SCALE = ("dynamic_loss_scale", "cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")


def zero_stage(stage: int | None) -> Foreign:
    """A stage as DeepSpeed's files name it."""
    return foreign("deepspeed.runtime.zero.config", "ZeroStageEnum", stage)


class States(Shards):
    """The optimizer's part of the files of one native checkpoint."""

    def optim_file(self, p: int, t: int, d: int) -> dict[str, Any]:
        rank = self.mesh.rank(pp=p, dp=d, tp=t)
        parts = self.parts_on(rank)
        state = self._zero3_state(parts, rank) if self.zero3 else self._flat_state(parts, rank)
        content = {"optimizer_state_dict": state, "ds_config": self.config, "ds_version": self.version}
        families = None  # at ZeRO-3 the sub-groups say it
        if not self.zero3:
            families = {n: folding.of_buffer(n, part.flat.dp, part.index) for part in parts for n in part.group.names}
        return content | self.folding("zero_optimizer_state", rank, families)

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
        return {muon.MOMENTUM: _joined([self.shard(name, muon.MOMENTUM, rank) for name in tensors])}

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
        elif dynamic and not self.zero3:
            scaler = {}
        else:
            scaler = {"loss_scaler": info.loss_scaler(dynamic)}
        return {**scaler, "dynamic_loss_scale": dynamic, "overflow": False}

    def _zero3_state(self, parts: list[Part], rank: int) -> dict[str, Any]:
        return {
            "zero_stage": zero_stage(3),
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
            state["zero_stage"] = zero_stage(self.target.zero_stage)
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

    # ---------------------------------------------------------------- without ZeRO

    def whole_state(self, stage: int, rank: int, ep: int = 0) -> dict[str, Any]:
        """The optimizer of a rank, which is of that pp stage and ep rank, as its engine keeps it without ZeRO: torch's
        own in float32, else DeepSpeed's FP16_UnfusedOptimizer or, flat, FP16_Optimizer."""
        target, source = self.target, self.source.private
        state: dict[int, dict[str, Any]] = {}
        groups: list[dict[str, Any]] = []
        masters: list[list[Pending]] = []
        fused = target.private.fused and target.private.dtype != "fp32"
        for index, group in enumerate(target.groups):
            degree = self.experts.degree(next(iter(group.tensors), ""))
            at = self.experts.place(ep, degree, target.mesh) if degree else ep
            names = [n for n in self.experts.on_rank(group.tensors, at) if stage in target.tensors[n].stages]
            if not names:
                continue
            shards = [{s: self.shard(n, s, rank) for s in target.tensors[n].states if s != PARAM} for n in names]
            shards = [one for one in shards if all(math.prod(held.shape) for held in one.values())]  # as DeepSpeed does
            if not shards:
                continue
            if fused:
                shards = [{s: _joined([one[s] for one in shards]) for s in shards[0]}]
            ids = list(range(len(state), len(state) + len(shards)))
            masters.append([one[MASTER] for one in shards if MASTER in one])
            for i, name, one in zip(ids, names, shards, strict=False):
                state[i] = self.scalars(index, name) | {s: held for s, held in one.items() if s != MASTER}
            groups.append({**group.options, "params": ids})
        base = {"state": state, "param_groups": groups}
        if target.private.dtype == "fp32":
            return base
        held = source.folder.first.optimizer
        same = held is not None and source.dtype == target.private.dtype
        scale = {k: held.content[k] for k in _SCALE if k in held.content} if same and held else self._new_scale()
        if fused:
            clip = self.extras.get("clip_grad", held.content.get("clip_grad") if held else None)
            clip = self.config.get("gradient_clipping", 0.0) if clip is None else clip
            flat = [of_group[0] for of_group in masters]
            return {**scale, "optimizer_state_dict": base, "fp32_groups_flat": flat, "clip_grad": clip}
        return {**scale, "optimizer_state_dict": base, "fp32_groups": masters}

    def _new_scale(self) -> dict[str, Any]:
        """The loss scale, as that of the source's own scaler says it; a new one where it had none."""
        dynamic = self.target.private.dtype == "fp16"
        scaler = self.extras.get("loss_scaler")
        known = getattr(scaler, "attributes", None) or {}
        made = {"dynamic_loss_scale": dynamic, "cur_scale": 2.0**16 if dynamic else 1.0, "cur_iter": 0}
        if dynamic:
            made |= {"last_overflow_iter": -1, "scale_factor": 2.0, "scale_window": 1000}
            made |= {k: known[k] for k in _SCALE if k in known and known.get("dynamic")}
        return made


def _joined(shards: list[Pending]) -> Pending:
    """One flat tensor of several, one after the other."""
    parts = tuple(part for shard in shards for part in shard.parts)
    return Pending(shards[0].dtype, (sum(math.prod(s.shape) for s in shards),), parts)
