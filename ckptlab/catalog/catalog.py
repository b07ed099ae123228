"""All that is known of a checkpoint from its headers: mesh, tensors, layouts, where every element lies, the run.

A reader makes a `Catalog`; the views, plans and writers are given one. Nothing here has read a tensor's data. The
catalog of a *target* (what another mesh would hold), or of a model on paper, has the same form with nothing stored
behind it: its `extents` are None.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ckptlab.arguments import explained, kind_of
from ckptlab.catalog.extents import Extents, FlatGroup, Fragment, Placements
from ckptlab.catalog.seen import LowRank, Piece
from ckptlab.catalog.stacks import kind_and_layer
from ckptlab.catalog.tensor import MASTER, PARAM, ParameterGroup, Tensor
from ckptlab.catalog.training import Training
from ckptlab.errors import CheckpointError, UnknownNameError
from ckptlab.findings import Finding
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder, Made, Placement
from ckptlab.stored import Stored


@explained
@dataclass(frozen=True)
class Catalog:
    """What the headers of one checkpoint say.

    `mesh`: whose ranks the files are of. `placements[name, state]`: how that state lies on the mesh: once, or once for
    each of several copies. `flat_groups`: the flat buffers that placements refer to. `extents`: in which bytes elements
    lie; None where nothing is stored. `findings`: what the user must hear. `client`: what the training program put in.
    `private`: what the format's own writer must know; nobody else looks into it.

    A catalog may be another, `base`, seen otherwise: `seen` then says of which pieces of the base's tensors each of its
    own is made, `added` what is added to some, and extents are the base's. Where `filled` is given, weights are those
    of that catalog's tensors of the same names, and what an optimizer keeps of them is 0.
    """

    path: str
    format: str
    mesh: Mesh
    tensors: Mapping[str, Tensor]
    placements: Placements
    extents: Extents | None = None
    flat_groups: tuple[FlatGroup, ...] = ()
    training: Training = field(default_factory=Training)
    client: Mapping[str, Any] = field(default_factory=dict)
    private: Any = None
    findings: tuple[Finding, ...] = ()
    files: tuple[str, ...] = ()
    base: Catalog | None = None
    seen: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    added: Mapping[str, LowRank] = field(default_factory=dict)
    filled: Catalog | None = None

    @property
    def groups(self) -> tuple[ParameterGroup, ...]:
        """The run's parameter groups."""
        return self.training.groups

    @property
    def zero_stage(self) -> int | None:
        """The run's ZeRO stage."""
        return self.training.zero_stage

    @property
    def stored(self) -> Extents:
        """The extents. CheckpointError where nothing is stored: of a model on paper, and of a target."""
        if self.extents is None:
            raise CheckpointError(f"{self.path}: nothing is stored of it: look at its layouts and plans")
        return self.extents

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __getitem__(self, name: str) -> Tensor:
        """The tensor of that name or alias; CheckpointError (with the nearest names) if there is none."""
        if not isinstance(name, str):
            raise CheckpointError(f"{self.path}: tensors have names, not a {type(name).__name__}")
        found = self.tensors.get(self._aliases.get(name, name))
        if found is None:
            if layers := [known for known in self.tensors if kind_and_layer(known)[0] == name]:
                of = f"{name!r} is in {len(layers)} layers, {layers[0]}, …"
                raise CheckpointError(f"{self.path}: {of}: full() stacks them under that name")
            near = difflib.get_close_matches(name, [*self.tensors, *self._aliases], n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise CheckpointError(f"{self.path}: no tensor is called {name!r}{hint}")
        return found

    @cached_property
    def _aliases(self) -> dict[str, str]:
        return {alias: t.name for t in self.tensors.values() for alias in t.aliases}

    @property
    def states(self) -> tuple[str, ...]:
        """Every state that some tensor has: `master` first, `param` last."""
        seen = dict.fromkeys(s for t in self.tensors.values() for s in t.states)
        rank = {MASTER: 0, PARAM: 2}
        return tuple(sorted(seen, key=lambda s: rank.get(s, 1)))

    def held(self, name: str) -> tuple[str, ...]:
        """The states of a tensor that ranks hold, in the order of its states."""
        return tuple(s for s in self[name].states if (name, s) in self.placements)

    def weight(self, name: str) -> str | None:
        """The state in which ranks hold a tensor's weight: the master, or the module's."""
        return next((state for state in (MASTER, PARAM) if (name, state) in self.placements), None)

    def placement(self, name: str, state: str) -> Placement:
        """How the first (as a rule the only) copy of that state lies. UnknownNameError where no rank holds it."""
        if (name, state) not in self.placements:
            raise UnknownNameError(f"{self.path}: no rank holds {state} of {name}")
        return self.placements[name, state][0]

    def lies(self, name: str, state: str) -> Placement | Made:
        """Where the elements of that state are: its placement, or, of a tensor that is put together from pieces of
        others, where those are stored. UnknownNameError where no rank holds it."""
        placement = self.placement(name, state)
        if self.base is None:
            return placement
        pieces, shape = self.seen[name], self.tensors[name].shape
        parts = tuple((piece, self.base.lies(piece.name, state)) for piece in pieces)
        if len(pieces) == 1 and pieces[0].is_all(shape, self.base.tensors[pieces[0].name].shape):
            return parts[0][1]
        return Made(shape, parts)

    def flat(self, name: str, holder: Holder) -> tuple[FlatGroup, int]:
        """The flat group that a holder's shard lies in, and its index there. KeyError if in none."""
        for group, index in self._flat_index.get(name, ()):
            if holder in group.flats:
                return group, index
        raise KeyError(f"{name} of {holder}")

    @cached_property
    def _flat_index(self) -> dict[str, list[tuple[FlatGroup, int]]]:
        found: dict[str, list[tuple[FlatGroup, int]]] = {}
        for group in self.flat_groups:
            for i, name in enumerate(group.names):
                found.setdefault(name, []).append((group, i))
        return found

    def mesh_of(self, group: FlatGroup) -> Mesh:
        """The mesh that the holders of a flat group are on: the run's, or another of the same ranks (see Placement)."""
        return next((self.tensors[name].cut.mesh for name in group.names if name in self.tensors), self.mesh)

    def is_flat(self, name: str, state: str) -> bool:
        """Whether that state of a tensor lies in the flat buffers of a group, with others."""
        return (name, state) in self._in_flats

    @cached_property
    def _in_flats(self) -> frozenset[tuple[str, str]]:
        return frozenset((name, state) for g in self.flat_groups for state in g.dtypes for name in g.names)

    @cached_property
    def outside(self) -> Placements:
        """How the states lie that are in no flat buffer."""
        return {held: copies for held, copies in self.placements.items() if held not in self._in_flats}

    @property
    def nbytes(self) -> int:
        """Bytes of all states, each as often as it is held, flat buffers with their padding; as they are stored."""
        if self.base is not None:
            return self.base.nbytes
        flats = ((flat, d) for g in self.flat_groups for flat in g.flats.values() for d in g.dtypes.values())
        total = sum(flat.total * dtype.itemsize for flat, dtype in flats)
        for (name, state), copies in self.outside.items():
            total += sum(p.numel for p in copies) * self.tensors[name].states[state].itemsize
        return total

    @property
    def as_stored(self) -> Catalog:
        """The catalog of what is stored, which this one may be another view of."""
        return self if self.base is None else self.base.as_stored

    def is_made(self, name: str) -> bool:
        """Whether a tensor is put together from others, or otherwise not as it is stored."""
        if self.base is None:
            return False
        piece, *others = self.seen[name]
        whole = piece.is_all(self.tensors[name].shape, self.base.tensors[piece.name].shape)
        return bool(others) or not whole or name in self.added or self.base.is_made(piece.name)

    def fragments(self, name: str, state: str, holder: Holder) -> tuple[Fragment, ...]:
        """Where the shard of a holder lies, in the order of its flattened elements. CheckpointError of a tensor that is
        seen otherwise than it is stored."""
        if self.base is not None:
            if self.is_made(name):
                raise CheckpointError(f"{self.path}: {name} is not stored as it is seen: look at what is stored")
            return self.base.fragments(self.seen[name][0].name, state, holder)
        pieces = self.stored.pieces.get((name, state))
        if pieces is not None:
            return pieces[holder]
        group, index = self.flat(name, holder)
        partitions = self.stored.partitions[group.key, state][holder]
        return tuple(
            Fragment(at, partitions[d].elements(start, count), d)
            for d, at, start, count in group.flats[holder].fragments(index).tolist()
        )

    def parts(
        self, placement: Placement, name: str, state: str, holder: Holder
    ) -> Iterator[tuple[int | None, int, int, Stored | None]]:
        """(data rank, or None where each has it; start in the shard, elements; where they are stored, if anywhere) of
        the pieces of a holder's shard, in its order."""
        told = self.extents is not None and not self.is_made(name)
        stored = self.fragments(name, state, holder) if told else ()
        if placement.flats:
            flat, index = placement.flats[holder]
            own = {(f.dp, f.start): f.stored for f in stored}
            for dp, start, _, count in flat.fragments(index).tolist():
                yield dp, start, count, own.get((dp, start))
        elif stored:
            yield from ((None, f.start, f.count, f.stored) for f in stored)
        else:
            yield None, 0, math.prod(placement.shape(holder)), None

    def lying_in(self, path: str, lo: int, hi: int) -> Iterator[str]:
        """The tensors of which elements lie in bytes lo … hi-1 of a file, for people; as often as they do."""

        if not isinstance(path, str):
            raise CheckpointError(f"a file is named by its path, not by {kind_of(path)}")

        def inside(stored: Stored) -> bool:
            return stored.path == path and stored.offset < hi and lo < stored.offset + max(stored.nbytes, 1)

        for (name, _), by_holder in self.stored.pieces.items():
            if any(inside(fragment.stored) for fragments in by_holder.values() for fragment in fragments):
                yield name
        for group in self.flat_groups:
            for state in group.dtypes:
                for holder, partitions in self.stored.partitions.get((group.key, state), {}).items():
                    for d in (d for d, stored in enumerate(partitions) if inside(stored)):
                        yield from (group.names[i] for i in group.flats[holder].within(d)[:, 0].tolist())
