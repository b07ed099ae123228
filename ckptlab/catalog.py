"""All that is known of a checkpoint from its headers: mesh, tensors, layouts, flat buffers, and where every element
lies.

A reader makes a `Catalog`; the views, plans and writers are given one. Nothing here has read a tensor's data. The
catalog of a *target* (what another mesh would hold) has the same form with nothing stored behind it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ckptlab.errors import CheckpointError
from ckptlab.findings import Finding
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer, Placement
from ckptlab.stored import Stored

MASTER = "fp32"  # the state that holds the master weight
MODULE = "module"  # the state that holds the weight as the model computes with it (16-bit, as a rule)


@dataclass(frozen=True)
class Fragment:
    """Consecutive elements of a flattened shard: `stored` begins at element `start` of it and was stored by `dp`."""

    start: int
    stored: Stored
    dp: int = 0

    @property
    def count(self) -> int:
        return self.stored.numel


@dataclass(frozen=True)
class Tensor:
    """One logical tensor.

    `shape` is the true whole (vocabulary padding cut off); `kind` is "parameter", "frozen" or "buffer"; `group` indexes
    `Catalog.groups` (None where the optimizer does not know it); `stages` are the pp stages that hold it, the first
    being canonical; `aliases` are further names of the same tensor in the model; `states` maps each state to its dtype;
    `layout_known` is False where a checkpoint of tp 1 does not tell how the tensor would be cut.
    """

    name: str
    shape: tuple[int, ...]
    layout: Layout
    cut: Cut
    kind: str
    states: Mapping[str, np.dtype]
    group: int | None = None
    stages: tuple[int, ...] = (0,)
    aliases: tuple[str, ...] = ()
    layout_known: bool = True

    @property
    def numel(self) -> int:
        """Elements of the whole."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def dims(self) -> tuple[str, ...]:
        """Names of the whole's dims."""
        return self.layout.names


def module_source(source: Tensor, target: Tensor) -> str:
    """The state that a target's module weight is drawn from: the stored one if the dtype stays, else the master,
    rounded."""
    keeps = source.states.get(MODULE) == target.states[MODULE]
    return MODULE if keeps or MASTER not in source.states else MASTER


@dataclass(frozen=True)
class ParameterGroup:
    """An optimizer's parameter group: its hyperparameters and its tensors, both in the order of the user's program;
    `scalars` is what the optimizer keeps once for all of them (`step`)."""

    options: Mapping[str, Any]
    tensors: tuple[str, ...]
    scalars: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str | None:
        return self.options.get("name")


@dataclass(frozen=True)
class FlatGroup:
    """The flat buffers of one parameter group (at ZeRO-3: of one of its sub-groups) on one pp stage.

    `flats[tp]` says where the shards lie, `dtypes` which states there are, `partitions[state][tp][dp]` what is stored
    of them (nothing for a target).
    """

    stage: int
    group: int
    flats: tuple[FlatBuffer, ...]
    dtypes: Mapping[str, np.dtype]
    partitions: Mapping[str, tuple[tuple[Stored, ...], ...]] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return self.flats[0].names

    @classmethod
    def laid_out(
        cls, stage: int, group: int, names: Sequence[str], tensors: Mapping[str, Tensor], mesh: Mesh, zero_stage: int
    ) -> FlatGroup:
        """The flat buffers that the named tensors make on a pp stage, in that order; nothing is stored of them."""
        make = FlatBuffer.per_tensor if zero_stage == 3 else FlatBuffer.contiguous
        flats: list[FlatBuffer] = []
        for tp in range(mesh.tp):
            cuts = (tensors[name].cut for name in names)
            counts = tuple(math.prod(cut.shard_shape(cut.coordinate({"tp": tp}))) for cut in cuts)
            same = next((f for f in flats if f.counts == counts), None)
            flats.append(same or make(tuple(names), counts, mesh.dp))
        dtypes = {s: d for s, d in tensors[names[0]].states.items() if s != MODULE}
        return cls(stage, group, tuple(flats), dtypes)


@dataclass(frozen=True)
class Catalog:
    """What the headers of one checkpoint say.

    `pieces[name, state][pp, tp]` are the fragments of states that lie outside the optimizer's flat buffers (module
    weights, frozen tensors, buffers, whole tensors of a universal folder). `client` is what the training program put
    in, `native` what only the format's own writer understands.
    """

    path: str
    format: str
    mesh: Mesh
    zero_stage: int | None
    tensors: Mapping[str, Tensor]
    groups: tuple[ParameterGroup, ...] = ()
    flat_groups: tuple[FlatGroup, ...] = ()
    pieces: Mapping[tuple[str, str], Mapping[tuple[int, int], tuple[Fragment, ...]]] = field(default_factory=dict)
    client: Mapping[str, Any] = field(default_factory=dict)
    native: Any = None
    findings: tuple[Finding, ...] = ()
    files: tuple[str, ...] = ()

    @cached_property
    def _flat_index(self) -> dict[tuple[str, int], tuple[FlatGroup, int]]:
        return {(name, g.stage): (g, i) for g in self.flat_groups for i, name in enumerate(g.names)}

    def flat(self, name: str, stage: int) -> tuple[FlatGroup, int]:
        """The flat buffers that the tensor's optimizer states lie in on a pp stage, and its index there. KeyError if
        none."""
        return self._flat_index[name, stage]

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return {alias: t.name for t in self.tensors.values() for alias in t.aliases}

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name or alias; CheckpointError (with the nearest names) if there is none."""
        found = self.tensors.get(self._aliases.get(name, name))
        if found is None:
            import difflib

            near = difflib.get_close_matches(name, [*self.tensors, *self._aliases], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise CheckpointError(f"{self.path}: no tensor is called {name!r}{hint}")
        return found

    @property
    def states(self) -> tuple[str, ...]:
        """Every state that some tensor has: the master first, the module weight last."""
        seen = dict.fromkeys(s for t in self.tensors.values() for s in t.states)
        rank = {MASTER: 0, MODULE: 2}
        return tuple(sorted(seen, key=lambda s: rank.get(s, 1)))

    def holders(self, name: str, state: str) -> tuple[int, ...]:
        """The pp stages that store `state` of the tensor, the canonical one first."""
        outside = self.pieces.get((name, state))
        if outside is not None:
            return tuple(dict.fromkeys(stage for stage, _ in outside))
        found = ((s, self._flat_index.get((name, s))) for s in self.tensors[name].stages)
        return tuple(s for s, held in found if held is not None and state in held[0].dtypes)

    def fragments(self, name: str, state: str, stage: int, tp: int) -> tuple[Fragment, ...]:
        """Where the shard of one (pp, tp) coordinate lies, in the order of its flattened elements."""
        outside = self.pieces.get((name, state))
        if outside is not None:
            return outside[stage, tp]
        group, index = self._flat_index[name, stage]
        partitions = group.partitions[state][tp]
        return tuple(
            Fragment(int(at), partitions[d].elements(int(start), int(count)), int(d))
            for d, at, start, count in group.flats[tp].fragments(index)
        )

    def placements(self, name: str, state: str) -> tuple[Placement, ...]:
        """How that state of the tensor lies on the mesh, for a plan: once, or for each dp rank that has a copy of its
        own.

        What lies outside flat buffers is dp rank 0's; but ZeRO-3 cuts frozen tensors over dp, and writes buffers dp
        times.
        """
        tensor = self.tensors[name]
        stages = self.holders(name, state)
        replicas = tensor.layout.replicas
        flats = {}
        if (name, state) in self.pieces:
            if self.zero_stage != 3 or self.format != "deepspeed":
                return (Placement(tensor.cut, stages, replicas=replicas),)
            if tensor.kind == "buffer":
                ranks = range(self.mesh.dp)
                return tuple(Placement(tensor.cut, stages, replicas=replicas, at={"dp": d}) for d in ranks)
            for stage, tp in self.pieces[name, state]:
                count = math.prod(tensor.cut.shard_shape(tensor.cut.coordinate({"tp": tp})))
                flats[stage, tp] = FlatBuffer.per_tensor((name,), (count,), self.mesh.dp), 0
            return (Placement(tensor.cut, stages, flats, replicas),)
        for stage in stages:
            group, index = self._flat_index[name, stage]
            flats.update({(stage, tp): (flat, index) for tp, flat in enumerate(group.flats)})
        return (Placement(tensor.cut, stages, flats, replicas),)

    def extents(self) -> Iterator[tuple[str, str, Stored]]:
        """(tensor, state, stored) of everything that is stored outside flat buffers, then the flat partitions."""
        for (name, state), by_rank in self.pieces.items():
            for fragments in by_rank.values():
                yield from ((name, state, f.stored) for f in fragments)
        for group in self.flat_groups:
            for state, by_tp in group.partitions.items():
                yield from ((", ".join(group.names[:1]), state, s) for row in by_tp for s in row)
