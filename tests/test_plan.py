"""Flat buffers and plans, against ownership spelled out element by element."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptlab.errors import CheckpointError, LayoutError, ReshapeError
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer, Holder, Placement, between, compose, plan_tensor

# ------------------------------------------------------------------------------- flat buffers

counts_ = st.lists(st.integers(0, 12), min_size=1, max_size=5)
dps = st.integers(1, 5)


def spelled(flat):
    """Each dp rank's buffer, element by element: (tensor, element) or None for padding."""
    if flat.partition is None:
        buffers = [[] for _ in range(flat.dp)]
        for i, n in enumerate(flat.counts):
            part = -(-n // flat.dp)
            for d, buffer in enumerate(buffers):
                buffer += [(i, e) if e < n else None for e in range(d * part, (d + 1) * part)]
        return buffers
    whole = [None] * (flat.partition * flat.dp)
    for i, (start, n) in enumerate(zip(flat.starts, flat.counts, strict=True)):
        whole[start : start + n] = [(i, e) for e in range(n)]
    return [whole[d * flat.partition : (d + 1) * flat.partition] for d in range(flat.dp)]


@st.composite
def flat_buffers(draw):
    counts, dp = draw(counts_), draw(dps)
    names = [f"t{i}" for i in range(len(counts))]
    kind = draw(st.sampled_from(["zero12", "aligned", "partition", "zero3"]))
    if kind == "zero3":
        return FlatBuffer.per_tensor(names, counts, dp)
    paddings = draw(st.lists(st.integers(0, 3), min_size=len(counts), max_size=len(counts)))
    partition = sum(counts) // dp + draw(st.integers(1, 6)) if kind == "partition" else None
    return FlatBuffer.contiguous(names, counts, dp, paddings if kind == "aligned" else None, partition)


@settings(deadline=None)
@given(flat_buffers())
def test_fragments_are_what_the_buffers_hold(flat):
    buffers = spelled(flat)
    for i in range(len(flat.names)):
        expected = [
            (d, e, place)
            for d, buffer in enumerate(buffers)
            for place, held in enumerate(buffer)
            if held is not None and held[0] == i
            for e in [held[1]]
        ]
        fragments = flat.fragments(i)
        assert fragments.dtype == np.int64
        assert (fragments[:, 3] > 0).all()
        assert (np.diff(fragments[:, 0]) > 0).all()
        found = [(d, e + k, place + k) for d, e, place, n in fragments.tolist() for k in range(n)]
        assert found == expected
        edges, first = flat.edges(i)
        assert edges[:-1].tolist() == fragments[:, 1].tolist()
        assert edges[-1] == flat.counts[i]
        assert not len(fragments) or first == fragments[0, 0]


@settings(deadline=None)
@given(flat_buffers())
def test_within_is_the_other_way(flat):
    for d, buffer in enumerate(spelled(flat)):
        assert flat.size(d) == len(buffer)
        found = [None] * len(buffer)
        within = flat.within(d)
        assert (np.diff(within[:, 2]) > 0).all()
        for i, e, place, n in within.tolist():
            found[place : place + n] = [(i, e + k) for k in range(n)]
        assert found == buffer
        if flat.partition is None:
            assert flat.padding(d) == buffer.count(None)
        else:
            filled = max((p + 1 for p, held in enumerate(buffer) if held is not None), default=0)
            later = any(held is not None for b in spelled(flat)[d + 1 :] for held in b)
            assert flat.padding(d) == (0 if later else len(buffer) - filled)


def test_deepspeeds_figures():
    flat = FlatBuffer.contiguous(["a", "b"], [7, 6], 4)
    assert (flat.total, flat.partition, flat.used) == (16, 4, 13)  # 13 padded to a multiple of 2 * dp
    assert flat.starts == (0, 7)
    assert [flat.padding(d) for d in range(4)] == [0, 0, 0, 3]
    tiny = FlatBuffer.contiguous(["a"], [1], 4)
    assert [tiny.padding(d) for d in range(4)] == [1, 2, 2, 2]
    aligned = FlatBuffer.contiguous(["a", "b"], [7, 6], 2, [1, 0])
    assert (aligned.starts, aligned.total) == ((0, 8), 16)
    each = FlatBuffer.per_tensor(["a", "b"], [7, 6], 4)
    assert (each.starts, each.size(0), each.total, each.used) == ((0, 2), 4, 16, 4)
    assert each.fragments(1).tolist() == [[0, 0, 2, 2], [1, 2, 2, 2], [2, 4, 2, 2]]
    assert (each.index("b"), each == FlatBuffer.per_tensor(("a", "b"), (7, 6), 4)) == (1, True)


def test_flat_buffer_errors():
    with pytest.raises(CheckpointError, match=r"dp\(2\) \* partition\(4\) = 8 elements cannot hold its 1 tensors"):
        FlatBuffer.contiguous(["a"], [9], 2, partition=4)
    with pytest.raises(CheckpointError, match="tensor 'b' is not in this flat buffer of 1 tensors"):
        FlatBuffer.per_tensor(["a"], [9], 2).index("b")
    with pytest.raises(CheckpointError, match="2 alignment paddings for 1 tensors"):
        FlatBuffer.contiguous(["a"], [9], 2, [0, 0])


# ------------------------------------------------------------------------------- plans

SHAPE = (12, 4)
LINES = [
    ("out in", {}),
    ("(tp out) in", {}),
    ("(tp out) in", {"sizes": "uneven"}),
    ("out (tp in)", {}),
    ("(out tp) in", {}),
    ("(3 tp out) in", {}),
    ("((tp q) + k) in", {"totals": {"k": 4}}),
    ("(head ((tp q) + k)) in", {"sizes": {"head": 2, "k": 2}}),
    ("(tp out) in", {"padded": {0: 16}}),
    ("out in", {"replicas": "mean"}),
    ("((tp q) + k) in", {"totals": {"k": 4}, "replicas": "mean"}),
]
UNEVEN = {1: (12,), 2: (3, 9), 4: (1, 0, 7, 4)}  # by tp


@st.composite
def placements(draw):
    """The same two tensors (and a third between them that only fills the buffers) on a random mesh."""
    mesh = Mesh(pp=draw(st.integers(1, 2)), dp=draw(st.integers(1, 4)), tp=draw(st.sampled_from([1, 2, 4])))
    lines = draw(st.lists(st.sampled_from(LINES), min_size=2, max_size=2))
    widths = {"sizes": {"out": UNEVEN[mesh.tp]}}
    layouts = [Layout(text, **(widths if fields.get("sizes") == "uneven" else fields)) for text, fields in lines]
    cuts = [layout.resolve(SHAPE, mesh) for layout in layouts]
    stages = draw(st.permutations(range(mesh.pp)).flatmap(lambda p: st.sampled_from([p[:1], p])))
    kind = draw(st.sampled_from(["none", "zero12", "aligned", "zero3"]))
    flats = [{}, {}]
    for stage in stages if kind != "none" else ():
        for tp in range(mesh.tp):
            shards = [math.prod(cut.shard_shape(cut.coordinate({"tp": tp}))) for cut in cuts]
            counts = [shards[0], 5 + stage, shards[1]]
            if kind == "zero3":
                flat = FlatBuffer.per_tensor("abc", counts, mesh.dp)
            else:
                flat = FlatBuffer.contiguous("abc", counts, mesh.dp, [3, 1, 0] if kind == "aligned" else None)
            holder = Holder(pp=stage, tp=tp)
            flats[0][holder], flats[1][holder] = (flat, 0), (flat, 2)
    return [
        Placement(cut, tuple(stages), flat, layout.replicas)
        for cut, flat, layout in zip(cuts, flats, layouts, strict=True)
    ]


def stored(placement, stage, tp):
    """element id → rank of one (stage, tp): taken from the whole, flattened, dealt to dp one by one."""
    cut, mesh = placement.cut, placement.mesh
    ids = np.arange(math.prod(cut.shape)).reshape(cut.shape)  # second dim is never padded: ids agree across paddings
    shard = cut.take(ids, cut.coordinate({"tp": tp})).ravel().tolist()
    dealt = {}
    if not placement.flats:
        return dict.fromkeys(shard, mesh.rank(pp=stage, dp=0, tp=tp))
    flat, index = placement.flats[Holder(pp=stage, tp=tp)]
    for d, buffer in enumerate(spelled(flat)):
        dealt.update({shard[held[1]]: mesh.rank(pp=stage, dp=d, tp=tp) for held in buffer if held and held[0] == index})
    assert len(dealt) == len(shard)
    return dealt


def brute(a, b):
    """(rows as a Counter, elements read, elements written), from every element of every target."""
    sources = {}
    for tp in range(a.mesh.tp):
        for element, rank in stored(a, a.stages[0], tp).items():
            sources.setdefault(element, []).append(rank)
    if a.replicas != "mean":
        sources = {element: ranks[:1] for element, ranks in sources.items()}
    rows, read, written = Counter(), set(), 0
    for stage in b.stages:
        for tp in range(b.mesh.tp):
            for element, rank in stored(b, stage, tp).items():
                for source in sources.get(element, []):
                    rows[source, rank] += 1
                    read.add((source, element))
                written += element in sources
    return rows, len(read), written


def check(a, b):
    source, target, count = plan_tensor(a, b)
    found = list(zip(source.tolist(), target.tolist(), strict=True))
    assert len(set(found)) == len(found)
    rows, read, written = brute(a, b)
    assert dict(zip(found, count.tolist(), strict=True)) == rows
    return rows, read, written


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(placements(), placements())
def test_plans_are_what_every_element_does(a, b):
    plan = compose([("x", 12, 2, a[0], b[0]), ("y", 4, 4, a[1], b[1])])
    expected = [check(*pair) for pair in zip(a, b, strict=True)]
    assert plan.rows == sum(len(rows) for rows, _, _ in expected)
    assert plan.elements_read.tolist() == [read for _, read, _ in expected]
    assert plan.elements_written.tolist() == [written for _, _, written in expected]
    sizes = (12, 4)
    assert plan.read == sum(read * size for (_, read, _), size in zip(expected, sizes, strict=True))
    assert plan.written == expected[0][2] * 2 + expected[1][2] * 4
    matrix = np.zeros((a[0].mesh.size, b[0].mesh.size), np.int64)
    for (rows, _, _), size in zip(expected, sizes, strict=True):
        for (source, target), n in rows.items():
            matrix[source, target] += n * size
    np.testing.assert_array_equal(plan.matrix(), matrix)
    assert plan.sent == matrix.sum()
    assert plan.moved == sum(n for (s, t), n in np.ndenumerate(matrix) if s != t)


def test_a_plan_as_a_story():
    """One column-parallel weight of 16 elements, ZeRO-1 on tp 2 · dp 2, goes to tp 1 · dp 4."""
    before, after = Mesh(tp=2, dp=2), Mesh(dp=4)
    layout = Layout("(tp out) in")
    half, whole = FlatBuffer.contiguous(["w"], [8], 2), FlatBuffer.contiguous(["w"], [16], 4)
    a = Placement(layout.resolve((8, 2), before), (0,), {Holder(pp=0, tp=tp): (half, 0) for tp in range(2)})
    b = Placement(layout.resolve((8, 2), after), (0,), {Holder(pp=0, tp=0): (whole, 0)})
    source, target, count = plan_tensor(a, b)
    # ranks before: (dp 0, tp 0) = 0, (dp 0, tp 1) = 1, (dp 1, tp 0) = 2, (dp 1, tp 1) = 3
    assert sorted(zip(source.tolist(), target.tolist(), count.tolist(), strict=True)) == [
        (0, 0, 4),
        (1, 2, 4),
        (2, 1, 4),
        (3, 3, 4),
    ]
    plan = compose([("w", 12, 12, a, b)])
    assert (plan.read, plan.written, plan.moved, plan.rows) == (192, 192, 96, 4)
    assert repr(plan) == "<Plan of 1 tensors, 4 → 4 ranks, 4 rows: reads 192, writes 192, moves 96 bytes>"


def test_rows_in_another_order():
    """Cuts that do not ascend (from explicit rows) still come out right, pairs of ranks merged."""
    mesh = Mesh(tp=2, dp=2)
    rows = {(0,): [[6, 0, 2], [0, 2, 2], [4, 4, 2]], (1,): [[2, 0, 2], [10, 2, 2], [8, 4, 2]]}
    cut = Cut.from_rows(SHAPE, mesh, [(("tp",), rows), ((), {(): [[0, 0, 4]]})])
    flat = FlatBuffer.contiguous(["w"], [24], 2)
    a = Placement(cut, (0,), {Holder(pp=0, tp=tp): (flat, 0) for tp in range(2)})
    b = Placement(Layout("(tp out) in").resolve(SHAPE, mesh), (0,), {Holder(pp=0, tp=tp): (flat, 0) for tp in range(2)})
    check(a, b)
    check(b, a)


def test_states_that_lie_differently_in_one_plan():
    """Master weights cut as ZeRO-3 does beside module weights that are not: what is remembered is not mixed up."""
    mesh = Mesh(dp=4)
    cut = Cut.whole(SHAPE, mesh)
    each = Placement(cut, (0,), {Holder(pp=0, tp=0): (FlatBuffer.per_tensor(["w"], [48], 4), 0)})
    whole = Placement(cut)
    pairs = [(each, each), (each, whole), (whole, each), (whole, whole)]
    plan = compose((f"{i}", 4, 4, a, b) for i, (a, b) in enumerate(pairs))
    for i, (a, b) in enumerate(pairs):
        rows = plan.tensor == i
        found = zip(plan.source[rows].tolist(), plan.target[rows].tolist(), strict=True)
        assert dict(zip(found, plan.count[rows].tolist(), strict=True)) == brute(a, b)[0]


@pytest.mark.parametrize("dp", [3, 5, 7])
def test_three_dims_cut_on_each(dp):
    mesh = Mesh(ep=2, cp=2, tp=2)
    flat = FlatBuffer.per_tensor(["w"], [64], dp)
    a = Placement(Cut.whole((4, 4, 4), Mesh(dp=dp)), (0,), {Holder(pp=0, tp=0): (flat, 0)})
    b = Placement(Layout("(ep a) (cp b) (tp c)").resolve((4, 4, 4), mesh))
    ids = np.arange(64).reshape(4, 4, 4)
    expected = Counter(
        (element // -(-64 // dp), int(b.ranks(holder)[0]))
        for holder in b.holders
        for element in b.cut.take(ids, b.coordinate(holder)).ravel().tolist()
    )
    source, target, count = plan_tensor(a, b)
    assert dict(zip(zip(source.tolist(), target.tolist(), strict=True), count.tolist(), strict=True)) == expected


def test_no_dims_and_no_elements():
    mesh = Mesh(tp=2, dp=2)
    scalar = Placement(
        Cut.whole((), mesh), (0,), {Holder(pp=0, tp=t): (FlatBuffer.per_tensor(["s"], [1], 2), 0) for t in (0, 1)}
    )
    source, target, count = plan_tensor(scalar, Placement(Cut.whole((), Mesh())))
    assert (source.tolist(), target.tolist(), count.tolist()) == ([0], [0], [1])
    empty = Placement(Cut.whole((0, 3), mesh))
    assert len(plan_tensor(empty, empty)[2]) == 0
    plan = compose([("e", 4, 4, empty, empty)])
    assert (plan.rows, plan.read, plan.written) == (0, 0, 0)
    assert compose([]).matrix().shape == (0, 0)


def test_shards_of_unequal_length_without_flat_buffers_are_whole_on_the_first_data_rank():
    uneven = Layout("(tp out) in", sizes={"out": (1, 11)}).resolve(SHAPE, Mesh(tp=2, dp=2))
    plan = between(uneven, Layout("out in").resolve(SHAPE, Mesh()))
    np.testing.assert_array_equal(plan.matrix(), [[16], [176], [0], [0]])
    back = between(Layout("out in").resolve(SHAPE, Mesh()), uneven)
    np.testing.assert_array_equal(back.matrix(), [[16, 176, 0, 0]])


def test_experts():
    """dp 4 split into edp 2 · ep 2: an expert lies on one ep coordinate, its buffer is cut over edp."""
    mesh = Mesh(dp=4, tp=2).split("dp", edp=2, ep=2)
    flat = FlatBuffer.contiguous(["e"], [4], 2)
    cut = Layout("(tp out) in").resolve((4, 2), mesh)
    fixed = Placement(cut, (0,), {Holder(pp=0, ep=1, tp=t): (flat, 0) for t in range(2)}, at={"ep": 1})
    assert (fixed.axes, fixed.data) == (("tp",), ("edp",))
    assert fixed.ranks(fixed.holders[1]).tolist() == [3, 7]  # tp 1, ep 1, edp 0 and 1
    assert plan_tensor(fixed, Placement(Cut.whole((4, 2)))) is not None
    source, _, count = plan_tensor(fixed, Placement(Cut.whole((4, 2))))
    assert dict(zip(source.tolist(), count.tolist(), strict=True)) == {2: 2, 6: 2, 3: 2, 7: 2}

    stacked = Layout("(ep expert) out").resolve((4, 2), mesh)
    spread = Placement(stacked, (0,), dict.fromkeys(Placement(stacked).holders, (flat, 0)))
    assert [spread.coordinate(holder) for holder in spread.holders] == [(0,), (0,), (1,), (1,)]
    assert list(map(str, spread.holders)) == [f"pp 0 · ep {e} · tp {t}" for e in range(2) for t in range(2)]
    assert spread.ranks(spread.holders[3]).tolist() == [3, 7]
    source, _, count = plan_tensor(spread, Placement(Cut.whole((4, 2))))
    assert dict(zip(source.tolist(), count.tolist(), strict=True)) == {0: 2, 4: 2, 2: 2, 6: 2}

    two_dims = Placement(Layout("(tp out) (dp in)").resolve((4, 8), mesh))
    assert len(two_dims.holders) == 8
    assert plan_tensor(two_dims, two_dims)[2].tolist() == [4] * 8


def test_placement_errors():
    mesh = Mesh(pp=2, dp=2, tp=2)
    cut = Layout("(tp out) in").resolve((4, 2), mesh)
    whole = Placement(Cut.whole((4, 2)))
    with pytest.raises(LayoutError, match=r"stages \(2,\) are not all among the stages of pp\(2\)"):
        Placement(cut, (2,))
    with pytest.raises(LayoutError, match="no flat buffer is given for pp 0 · tp 1 of"):
        plan_tensor(Placement(cut, (0,), {Holder(pp=0, tp=0): (FlatBuffer.per_tensor(["w"], [4], 2), 0)}), whole)
    wrong = {Holder(pp=0, tp=t): (FlatBuffer.per_tensor(["w"], [5], 2), 0) for t in range(2)}
    with pytest.raises(ReshapeError, match=r"tensor 'w': 5 elements in the flat buffer of .*, 4 in shard \(2, 2\)"):
        compose([("w", 4, 4, Placement(cut, (0,), wrong), whole)])
    other = {Holder(pp=0, tp=t): (FlatBuffer.per_tensor(["w"], [4], 3), 0) for t in range(2)}
    with pytest.raises(LayoutError, match=r"a flat buffer for dp\(3\) at .*, where 2 ranks share a shard"):
        plan_tensor(Placement(cut, (0,), other), whole)
    with pytest.raises(LayoutError, match="fixed"):
        Placement(cut, (0,), at={"tp": 1})
    with pytest.raises(LayoutError, match="does not exist on"):
        plan_tensor(Placement(cut, (0,), at={"dp": 2}), whole)
    with pytest.raises(ReshapeError, match="target meshes differ in size: 1, 8 ranks"):
        compose([("a", 4, 4, whole, whole), ("b", 4, 4, whole, Placement(cut))])
    with pytest.raises(ReshapeError, match="tensor 'w': the cuts are of different tensors"):
        compose([("w", 4, 4, whole, Placement(Cut.whole((4, 3))))])


def test_between_two_layouts_of_one_tensor():
    """Column to row parallel on two ranks: each keeps a quarter and sends a quarter."""
    column, row = (Layout(text).resolve((4, 6), Mesh(tp=2)) for text in ("(tp out) in", "out (tp in)"))
    plan = between(column, row, itemsize=2, name="w")
    assert plan.names == ("w",)
    assert list(zip(plan.source.tolist(), plan.target.tolist(), plan.count.tolist(), strict=True)) == [
        (0, 0, 6),
        (0, 1, 6),
        (1, 0, 6),
        (1, 1, 6),
    ]
    assert (plan.read, plan.written, plan.moved) == (48, 48, 24)
    assert between(Placement(column), Placement(row), 2).moved == 24
    with pytest.raises(ReshapeError, match="different tensors"):
        between(column, Cut.whole((6, 4), Mesh(tp=2)))
