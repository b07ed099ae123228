"""What draws the tensors of a target's files from a source: shards, and parts of flat buffers."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptlab.arrays import Drawn, Partition, Tally, reader, shard_reader
from ckptlab.catalog import PARAM, Catalog, FlatGroup, Tensor
from ckptlab.formats.deepspeed import autoep, folding, info, names
from ckptlab.formats.deepspeed.optimfile import Wrapper
from ckptlab.formats.deepspeed.target import NativeTarget
from ckptlab.formats.fileplan import Elements, Zeros
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.torchfile import Pending
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer, Holder
from ckptlab.stored import Stored


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


class Shards:
    """The tensors of one native checkpoint, and what its files have in common."""

    def __init__(self, source: Catalog, target: Catalog, tally: Tally | None) -> None:
        self.source, self.target, self.tally = source, target, tally
        self.native: NativeTarget = target.private
        self.zero3 = self.native.wrapper is Wrapper.ZERO3
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

    def folding(self, family: str, rank: int, families: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a rank's file says of AutoEP beside AutoTP; nothing where there is none."""
        if not self.experts.folded:
            return {}
        ep = self.experts.sizes[-1]
        return {autoep.FOLDING: folding.said(self.mesh, ep, rank, family, families)}

    # ---------------------------------------------------------------- shards

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

    def shard(self, name: str, state: str, rank: int, stage: int | None = None, expert: int | None = None) -> Pending:
        """What a rank has of a state that lies outside of flat buffers. stage: the pp stage that stores it (None: the
        rank's own). expert: of experts that are a tensor together, just that one of the rank's."""
        tensor = self.target.tensors[name]
        at, where = self.coordinate(tensor, rank), self.at(tensor.cut.mesh, rank)
        shape = tensor.cut.shard_shape(at) if expert is None else tensor.shape[1:]
        dtype, count, first = tensor.states[state], math.prod(shape), expert or 0
        stage = where["pp"] if stage is None else stage
        holder = self.experts.holder(name, self.mesh, where.get("ep", 0), pp=stage, tp=where["tp"])
        tally = self.tally and self.tally.towards(rank)
        drawn = Drawn(shard_reader(self.source, self.target, name, state, holder, tally), tensor.cut, at)
        return Pending(dtype, shape, (Elements(drawn, dtype, first * count, (first + 1) * count),))

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

    def ranks(self, mesh: Mesh, holder: Holder) -> list[int]:
        """The ranks at a holder's coordinates: those that have a flat buffer together."""
        if (mesh, holder) not in self._ranks:
            self._ranks[mesh, holder] = mesh.ranks(**holder)
        return self._ranks[mesh, holder]

    def fragment(self, tensor: Tensor, dp: int, rank: int) -> Pending:
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

    def scalars(self, group: int, tensor: str) -> dict[str, Any]:
        """What the optimizer keeps once, as tensors of their own: torch counts steps in place, in each."""
        kept = self.target.groups[group].scalars_of(tensor)
        return {k: torchfile.Apart(v) if isinstance(v, Stored) else copy.copy(v) for k, v in kept.items()}
