"""A catalog seen through a family: other names and shapes, the same extents."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ckptlab.catalog import Catalog, ParameterGroup, Piece, Tensor
from ckptlab.findings import Finding, Where
from ckptlab.layout import Cut, Layout
from ckptlab.plan import Placement
from ckptlab.sharding.families.placed import dims, layout_of
from ckptlab.sharding.strategies import replicated
from ckptlab.words import number_of, some


@dataclass(frozen=True)
class View:
    """A tensor as it is seen: the pieces of stored ones that it is made of. `text`: the line of notation that says it
    (None: it is one as it is), `lengths`: those in it."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    text: str | None = None
    lengths: Mapping[str, int] = field(default_factory=dict)


def seen_as(base: Catalog, views: Sequence[View], findings: Iterable[Finding], called: Mapping[str, str]) -> Catalog:
    """The catalog of these tensors, each in the order of the first that it is made of. called: what aliases are called.

    A tensor is where its pieces are; where no line of notation that is known says what a rank then has of it, the first
    rank of its stage is said to have all of it. Flat buffers are the base's alone.
    """
    order = {name: i for i, name in enumerate(base.tensors)}
    views = sorted(views, key=lambda view: min(order[piece.name] for piece in view.pieces))
    tensors: dict[str, Tensor] = {}
    unplaced: list[str] = []
    placements: dict[tuple[str, str], tuple[Placement, ...]] = {}
    known: dict[Hashable, Layout | None] = {}
    for view in views:
        tensor, places = _tensor(base, view, known)
        stored = [base.tensors[piece.name] for piece in view.pieces]
        if tensor.cut.is_whole and any(t.layout_known and _is_cut(t) for t in stored):
            unplaced.append(view.name)
        tensors[view.name] = replace(tensor, aliases=tuple(called[alias] for alias in tensor.aliases))
        placements.update(((view.name, state), place) for state, place in places.items())
    seen = {view.name: view.pieces for view in views}
    members: dict[int | None, list[str]] = {}
    for name, tensor in tensors.items():
        members.setdefault(tensor.group, []).append(name)
    groups: tuple[ParameterGroup, ...] = tuple(
        replace(
            group,
            tensors=tuple(members.get(i, ())),
            apart={n: group.apart[s] for n in members.get(i, ()) if (s := seen[n][0].name) in group.apart},
        )
        for i, group in enumerate(base.training.groups)
    )
    return replace(
        base,
        tensors=tensors,
        placements=placements,
        flat_groups=(),
        training=replace(base.training, groups=groups, layer_stages={}),
        private=None,
        findings=(*findings, *_told(unplaced, [n for n, t in tensors.items() if not t.states])),
        base=base,
        seen=seen,
    )


def _tensor(
    base: Catalog, view: View, known: dict[Hashable, Layout | None]
) -> tuple[Tensor, dict[str, tuple[Placement, ...]]]:
    """The tensor, and how each of its states lies. known: layouts of tensors that are made alike, of other layers."""
    stored = [base.tensors[piece.name] for piece in view.pieces]
    first = stored[0]
    if len(stored) == 1 and view.pieces[0].is_all(view.shape, first.shape):
        places = {state: base.placements[first.name, state] for state in base.held(first.name)}
        return replace(first, name=view.name), places
    states = [state for state in first.states if all(state in tensor.states for tensor in stored)]
    held = [state for state in states if all((tensor.name, state) in base.placements for tensor in stored)]
    there = {state: [base.placement(tensor.name, state) for tensor in stored] for state in held}
    alike = all(_alike(places) for places in there.values()) and len({tensor.stages for tensor in stored}) == 1
    layout = None
    if alike:
        key = (view.shape, view.text, tuple((p.key, t.cut.dims) for p, t in zip(view.pieces, stored, strict=True)))
        if key not in known:
            known[key] = layout_of(view.shape, view.pieces, base, view.text, view.lengths)
        layout = known[key]
    whole = layout is None
    if layout is None:
        layout = replicated(len(view.shape)).replace(dims=dims(view.text, len(view.shape)))
    layout = layout.replace(replicas=first.layout.replicas, stages=first.layout.stages)
    cut = Cut.whole(view.shape, base.mesh) if whole else layout.resolve(view.shape, base.mesh)
    tensor = replace(
        first,
        name=view.name,
        shape=view.shape,
        layout=layout,
        cut=cut,
        states={state: np.result_type(*{tensor.states[state] for tensor in stored}) for state in states},
        group=first.group if len({tensor.group for tensor in stored}) == 1 else None,
        stages=first.stages[:1] if whole else first.stages,
        aliases=(),
        layout_known=all(tensor.layout_known for tensor in stored) and not whole,
    )
    mesh = base.mesh
    alone = {axis: 0 for axis in mesh.axes if axis not in (*mesh.leaves("pp"), *mesh.leaves("dp"))}
    found: dict[str, tuple[Placement, ...]] = {}
    for state, (place, *_) in there.items():
        at, stages = (alone, place.stages[:1]) if whole else (place.at, place.stages)
        found[state] = (Placement(cut, stages, None, place.replicas, at),)
    return tensor, found


def _is_cut(tensor: Tensor) -> bool:
    """Whether ranks hold different parts of it."""
    return any(tensor.cut.mesh[axis] > 1 for axis in tensor.cut.axes)


def _told(unplaced: Sequence[str], without: Sequence[str]) -> Iterator[Finding]:
    """What has to be heard of tensors that no rank has parts of, and of those that have no state."""
    if unplaced:
        yield Finding(
            "family-unplaced",
            "warning",
            Where(tensors=tuple(unplaced)),
            "ranks that hold whole parts, as they do of heads",
            f"{number_of(len(unplaced), 'tensor')} of which no line says what a rank has, as the stored ones are cut: "
            f"{some(unplaced, 4)}",
            "see whether the family's notation is right; on a mesh they are said to be with the first rank",
            "headers",
        )
    if without:
        yield Finding(
            "family-stateless",
            "warning",
            Where(tensors=tuple(without)),
            "parts that have a state in common",
            f"{number_of(len(without), 'tensor')} whose parts have none (some are trained, some are frozen): "
            f"{some(without, 4)}",
            "they have no elements here: look at the parts themselves",
            "headers",
        )


def _alike(places: Iterable[Placement]) -> bool:
    return len({(place.stages, place.replicas, tuple(sorted(place.at.items()))) for place in places}) == 1
