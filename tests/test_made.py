"""Plans of tensors that are put together from stored ones, against owners counted element by element."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptlab
from ckptlab import Layout, Mesh
from ckptlab.catalog.seen import Piece
from ckptlab.layout import Cut
from ckptlab.plan import FlatBuffer, Made, Placement, compose
from ckptlab.sharding import families
from ckptlab.sharding.families import FAMILIES, Family
from ckptlab.sharding.families.family import _assembled
from ckptlab.sharding.families.seen import View
from ckptlab.testing.families import example

DATA = Path(__file__).parents[1] / "data"
LINES = [line for name in FAMILIES.names() for line in FAMILIES.get(name).lines if line.text is not None]


def owners(placement: Placement) -> np.ndarray:
    """The rank that each element is taken from: the first that has it."""
    held = np.full(placement.cut.shape, -1)
    for at, (shard, *_) in reversed(placement.shards(placement.stages[:1]).items()):
        placement.cut.put(flat(shard, placement.cut.shard_shape(at)), at, held)
    return held[tuple(slice(n) for n in placement.cut.logical)]


def flat(shard: Any, shape: tuple[int, ...]) -> np.ndarray:
    """The rank of each element of a shard."""
    ranks = np.full(int(np.prod(shape)), -1)
    for j, (lo, hi) in enumerate(zip(shard.edges[:-1], shard.edges[1:], strict=True)):
        ranks[lo:hi] = shard.ranks[shard.first + j]
    return ranks.reshape(shape)


def counted(owner: np.ndarray, target: Placement) -> Counter[tuple[int, int]]:
    """(source rank, target rank) → elements."""
    found: Counter[tuple[int, int]] = Counter()
    whole = np.full(target.cut.shape, -1)
    whole[tuple(slice(n) for n in owner.shape)] = owner
    for at, shards in target.shards(target.stages).items():
        shape = target.cut.shard_shape(at)
        for shard in shards:
            pairs = zip(target.cut.take(whole, at).ravel().tolist(), flat(shard, shape).ravel().tolist(), strict=True)
            found.update(pair for pair in pairs if min(pair) >= 0)
    return found


def assembled(pieces: tuple[Piece, ...], shape: tuple[int, ...], held: dict[str, np.ndarray]) -> np.ndarray:
    return _assembled(View("seen", shape, pieces), held)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_who_sends_what_of_any_line_is_what_elements_say(data: st.DataObject) -> None:
    line = data.draw(st.sampled_from(LINES))
    parts, known = example(line, {name: data.draw(st.integers(1, 4), label=name) for name in sorted(line.known)})
    family = Family("line", "", (line,))
    numbers = {**known, "first": 2, "embed": 1, "final": 9, "head": 10}
    towards = data.draw(st.sampled_from(["left", "right"]))
    whole = family.arrays(parts, line.joined, **numbers)
    stored = parts if towards == line.joined else whole
    views, _ = family.views({n: np.shape(a) for n, a in stored.items()}, towards, numbers)
    mesh = Mesh(tp=data.draw(st.integers(1, 2), label="tp"), dp=data.draw(st.integers(1, 3), label="dp"))
    places = {name: placed(data, np.shape(array), mesh, name) for name, array in sorted(stored.items())}
    ranks = {name: owners(place) for name, place in places.items()}
    for view in views[:3]:
        made = Made(view.shape, tuple((piece, places[piece.name]) for piece in view.pieces))
        target = placed(data, view.shape, Mesh(tp=data.draw(st.integers(1, 3)), dp=2), "seen")
        plan = compose([("seen", 4, 2, made, target)])
        rows = zip(plan.source.tolist(), plan.target.tolist(), plan.count.tolist(), strict=True)
        expected = counted(assembled(view.pieces, view.shape, ranks), target)
        assert {(a, b): n for a, b, n in rows} == expected
        assert plan.read == 4 * int(np.prod(view.shape))
        assert plan.sent == 4 * sum(expected.values())


def placed(data: st.DataObject, shape: tuple[int, ...], mesh: Mesh, name: str) -> Placement:
    """A tensor cut over tp on some dim, or overlapping, and over dp in a flat buffer, or not."""
    dims = [f"d{i}" for i in range(len(shape))]
    cut = Cut.whole(shape, mesh)
    if shape and data.draw(st.booleans(), label="cut"):
        dim = data.draw(st.integers(0, len(shape) - 1))
        if shape[dim] % mesh.tp == 0:
            dims[dim] = f"(tp {dims[dim]})"
            cut = Layout(" ".join(dims)).resolve(shape, mesh)
        elif shape[dim] > 1:  # both have the first row
            rows = {(k,): [[0, 0, shape[dim]]] if k else [[0, 0, 1]] for k in range(mesh.tp)}
            own = [(("tp",), rows) if d == dim else ((), {(): [[0, 0, n]]}) for d, n in enumerate(shape)]
            cut = Cut.from_rows(shape, mesh, own)
    if not data.draw(st.booleans(), label="flat"):
        return Placement(cut)
    before, partition = data.draw(st.integers(0, 7), label="before"), data.draw(st.booleans(), label="partition")
    flats = {}
    for holder in Placement(cut).holders:
        count = int(np.prod(cut.shard_shape(cut.coordinate(holder))))
        if partition:
            buffer = FlatBuffer(
                ("x", name), (before, count), (0, before), mesh.dp, -(-max(before + count, 1) // mesh.dp)
            )
        else:
            buffer = FlatBuffer(("x", name), (before, count), (0, -(-before // mesh.dp)), mesh.dp, None)
        flats[holder] = (buffer, 1)
    return Placement(cut, flats=flats)


def test_a_run_seen_through_a_family_costs_what_it_costs_itself() -> None:
    """Bytes that change rank, counted where they are stored; and its flat buffers are the run's."""
    ckpt = ckptlab.open(DATA / "gpt_tp2_pp2_dp2")
    seen = families.resolve("gpt2", ckpt).onto(ckpt)
    mesh = Mesh(tp=4, dp=2)
    assert seen.reshape(mesh, format="deepspeed").cost() == ckpt.reshape(mesh, format="deepspeed").cost()
    assert seen.catalog.nbytes == ckpt.catalog.nbytes
    assert (ckptlab.viz.memory_by_rank(seen) == ckptlab.viz.memory_by_rank(ckpt)).all()
    assert seen.flat().identical(ckpt.flat())
    assert [*seen.flat().leaves]
    again = families.resolve("wrappers").onto(seen, "left")
    assert again.reshape(mesh, format="deepspeed").plan.moved == seen.reshape(mesh, format="deepspeed").plan.moved


def test_what_is_averaged_is_drawn_from_all() -> None:
    mesh = Mesh(tp=2)
    both = (Piece("a", ((0, np.array([[0, 0, 3, 1, 0, 0]])),)), Piece("b", ((0, np.array([[3, 0, 2, 1, 0, 0]])),)))
    parts = (Placement(Cut.whole((3,), mesh), replicas="mean"), Placement(Cut.whole((2,), mesh)))
    plan = compose([("both", 4, 4, Made((5,), tuple(zip(both, parts, strict=True))), Placement(Cut.whole((5,))))])
    assert (plan.source.tolist(), plan.count.tolist(), plan.read) == ([0, 1], [5, 3], 4 * 8)
