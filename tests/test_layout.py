"""Layouts, cuts and overlaps: the laws, checked against einx and against element-by-element numpy."""

import dataclasses
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptlab.errors import LayoutError
from ckptlab.layout import Cut, Laws, Layout, laws, on_degree, overlap, without
from ckptlab.mesh import Mesh
from ckptlab.testing import strategies


def numbered(cut):
    return np.arange(math.prod(cut.shape), dtype=np.int64).reshape(cut.shape)


def boxes(rows, side):
    """Indices of one dim that rows of an overlap stand for on side 0 or 1, spelled out one by one."""
    found = []
    for row in rows.tolist():
        start, length, count, stride = row[side], row[2], row[3], row[4 + side]
        found += [start + k * stride + i for k in range(count) for i in range(length)]
    return np.array(found, np.int64)


def merged(cut, shards):
    whole = np.full(cut.shape, -1, np.int64)
    for at, shard in shards.items():
        cut.put(shard, at, whole)
    return whole


TABLE = [
    # DESIGN's table, and what real checkpoints need: text, fields, shape, whole → last shard
    ("(tp out) in", {}, (8, 3), lambda w: w[4:]),
    ("out (tp in)", {}, (3, 8), lambda w: w[:, 4:]),
    ("out in", {}, (3, 4), lambda w: w),
    ("(3 tp out) in", {}, (12, 3), lambda w: w[[2, 3, 6, 7, 10, 11]]),
    ("(2 tp ffn) in", {}, (8, 3), lambda w: w[[2, 3, 6, 7]]),
    ("(tp head qkv d) in", {"sizes": {"qkv": 3, "d": 2}}, (24, 3), lambda w: w[12:]),
    (
        "((tp q) + (tp k) + (tp v)) in",
        {"totals": {"q": 8, "k": 4, "v": 4}},
        (16, 3),
        lambda w: w[[4, 5, 6, 7, 10, 11, 14, 15]],
    ),
    ("((tp q) + k + v) in", {"totals": {"k": 2, "v": 2}}, (12, 3), lambda w: w[[4, 5, 6, 7, 8, 9, 10, 11]]),
    ("(ep expert) out in", {}, (4, 2, 3), lambda w: w[2:]),
    ("(tp out) (dp in)", {}, (4, 6), lambda w: w[2:, 3:]),
    ("(out tp)", {}, (8,), lambda w: w[1::2]),
    ("(tp out) in", {"sizes": {"out": (3, 2)}}, (5, 3), lambda w: w[3:]),
    ("(3 tp out)", {"sizes": {"out": (2, 1)}}, (9,), lambda w: w[[2, 5, 8]]),
    ("(tp qkv head d)", {"sizes": {"head": (2, 1), "qkv": 3}}, (18,), lambda w: w[12:]),
    ("(tp (q + k) d)", {"sizes": {"q": (4, 2), "k": 1}}, (16,), lambda w: w[10:]),
    ("(head ((tp q) + k)) in", {"sizes": {"q": 2, "k": 1}}, (10, 2), lambda w: w[[2, 3, 4, 7, 8, 9]]),
    ("(3 2 tp out)", {}, (24,), lambda w: w[[2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23]]),
    ("(head tp d)", {"sizes": {"d": 2}}, (12,), lambda w: w[[2, 3, 6, 7, 10, 11]]),
    ("(a tp b dp c)", {"sizes": {"a": 2, "b": 2, "c": 1}}, (16,), lambda w: w[[5, 7, 13, 15]]),
    ("(tp out) in", {"padded": {0: 8}}, (7, 3), lambda w: w[4:]),
    ("", {}, (), lambda w: w),
]
MESH = Mesh(ep=2, dp=2, tp=2)


@pytest.mark.parametrize(("text", "fields", "shape", "expected"), TABLE)
def test_table(text, fields, shape, expected):
    cut = Layout(text, **fields).resolve(shape, MESH)
    whole = numbered(cut)
    last = list(cut.coordinates())[-1]
    np.testing.assert_array_equal(cut.take(whole, last), expected(whole))
    assert cut.shard_shape(last) == expected(whole).shape
    assert cut.logical == shape


@pytest.mark.parametrize(("text", "fields", "shape", "expected"), TABLE)
def test_einx_agrees(text, fields, shape, expected):
    einx = pytest.importorskip("einx")
    layout = Layout(text, **fields)
    cut = layout.resolve(shape, MESH)
    said = layout.einx(shape, MESH)
    uneven = any(isinstance(n, tuple) for _, n in layout.sizes)
    partly = text in ("((tp q) + k + v) in", "(head ((tp q) + k)) in")
    assert (said is None) == (uneven or partly)
    if said is None or not cut.axes:
        return
    pattern, sizes = said
    whole = numbered(cut)
    stacked = np.stack([cut.take(whole, at) for at in cut.coordinates()])
    stacked = stacked.reshape([MESH[axis] for axis in cut.axes] + list(stacked.shape[1:]))
    np.testing.assert_array_equal(einx.id(pattern, stacked, **sizes), whole)


# ------------------------------------------------------------------------------- random layouts of one shape

ROWS = 48  # what the first dim of every random layout has; the second has 12


@st.composite
def cuts(draw):
    """A cut of a (48, 12) tensor, the first dim perhaps padded, on a small mesh."""
    tp, dp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2]))
    mesh = Mesh(tp=tp, dp=dp)
    widths = st.lists(st.integers(0, 9), min_size=tp, max_size=tp).filter(lambda w: sum(w) <= ROWS)

    def uneven(text, scale, rest):
        drawn = draw(widths)
        drawn[-1] += (ROWS - rest) // scale - sum(drawn)
        return (text, {"sizes": {"out": tuple(drawn)}}) if drawn[-1] >= 0 else ("out", {})

    first = draw(
        st.sampled_from(
            [
                lambda: ("out", {}),
                lambda: ("(tp out)", {}),
                lambda: ("(out tp)", {}),
                lambda: ("(2 tp out)", {}),
                lambda: ("(tp head 2 d)", {"sizes": {"d": 2}}),
                lambda: ("(head tp d)", {"sizes": {"d": 4}}),
                lambda: ("((tp q) + (tp k) + (tp v))", {"totals": {"q": 24, "k": 12}}),
                lambda: ("((tp q) + k + v)", {"totals": {"q": 36, "k": 5}}),
                lambda: ("(4 ((tp q) + k))", {"sizes": {"k": 12 - 6 - 6 % tp if tp != 4 else 8}}),
                lambda: uneven("(tp out)", 1, 0),
                lambda: uneven("(2 tp out)", 2, 0),
                lambda: uneven("(tp 3 out)", 3, 0),
                lambda: uneven("((tp out) + k)", 1, 6),
                lambda: ("(tp out)", {"padded": {0: draw(st.sampled_from([48, 60, 72]))}}),
                lambda: ("(tp a dp b)", {"sizes": {"b": 2}}),
                lambda: ("(a dp tp)", {}),
                lambda: ("((3 tp out) + k)", {"sizes": {"k": 12}}),
                lambda: ("(k + (3 tp out))", {"sizes": {"k": 12}}),
                lambda: ("((tp q) + (dp k) + v)", {"totals": {"q": 24, "k": 12}}),
                lambda: ("((tp dp q) + (tp k))", {"totals": {"k": 24}}),
            ]
        )
    )()
    second = draw(st.sampled_from(["in"] if "dp" in first[0] else ["in", "(dp in)", "(in dp)"]))
    return Layout(f"{first[0]} {second}", **first[1]).resolve((ROWS, 12), mesh)


@settings(deadline=None)
@given(cuts())
def test_split_then_merge_is_the_identity(cut):
    whole = numbered(cut)
    shards = {at: cut.take(whole, at) for at in cut.coordinates()}
    assert all(shards[at].shape == cut.shard_shape(at) for at in shards)
    np.testing.assert_array_equal(merged(cut, shards), whole)  # -1 is left where nobody holds an element


@settings(deadline=None)
@given(cuts())
def test_rows_fill_the_shard_and_ascend(cut):
    for at in cut.coordinates():
        for rows, n in zip(cut.rows(at), cut.shard_shape(at), strict=True):
            assert rows.dtype == np.int64
            held = rows[:, 2] * rows[:, 3]
            assert rows[:, 1].tolist() == (np.cumsum(held) - held).tolist()
            assert held.sum() == n
            assert (rows[rows[:, 3] == 1, 4] == 0).all()
        for dim, part in zip(cut.dims, cut.per_dim(at), strict=True):
            assert (np.diff(dim.positions(part)) > 0).all()


def reshaped(a, b, shards, owned=True):
    """Shards of `b` out of shards of `a` by overlaps alone, and how often each element was given."""
    result, given_ = {}, {}
    for at_b in b.coordinates():
        result[at_b] = np.full(b.shard_shape(at_b), -1, np.int64)
        given_[at_b] = np.zeros(b.shard_shape(at_b), np.int64)
        for at_a in a.coordinates():
            per_dim = overlap(a, at_a, b, at_b, owned=owned)
            source = np.ix_(*(boxes(rows, 0) for rows in per_dim))
            target = np.ix_(*(boxes(rows, 1) for rows in per_dim))
            result[at_b][target] = shards[at_a][source]
            given_[at_b][target] += 1
    return result, given_


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(cuts(), cuts())
def test_overlaps_compose_cuts(a, b):
    """What overlaps gather is what take gives, each element once; padding that only b has stays ungiven."""
    ids = np.arange(72 * 12).reshape(72, 12)  # an element has one id, whatever the padding
    whole_a, whole_b = ids[: a.shape[0]], ids[: b.shape[0]]
    shards = {at: a.take(whole_a, at) for at in a.coordinates()}
    result, times = reshaped(a, b, shards)
    for at in b.coordinates():
        wanted = b.take(whole_b, at)
        known = wanted < a.shape[0] * 12
        np.testing.assert_array_equal(result[at], np.where(known, wanted, -1))
        np.testing.assert_array_equal(times[at], known)
    for at_a, at_b in itertools.product(a.coordinates(), b.coordinates()):
        for rows in overlap(a, at_a, b, at_b):
            assert (np.diff(rows[:, 0]) > 0).all()
            assert (rows[rows[:, 3] == 1, 4:] == 0).all()


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(cuts(), cuts())
def test_without_owned_all_that_both_hold(a, b):
    for at_a, at_b in itertools.product(a.coordinates(), b.coordinates()):
        per_dim = overlap(a, at_a, b, at_b, owned=False)
        for rows, dim_a, part_a, dim_b, part_b in zip(
            per_dim, a.dims, a.per_dim(at_a), b.dims, b.per_dim(at_b), strict=True
        ):
            here, there = dim_a.positions(part_a), dim_b.positions(part_b)
            both = np.intersect1d(here, there)
            np.testing.assert_array_equal(np.sort(here[boxes(rows, 0)]), both)
            np.testing.assert_array_equal(here[boxes(rows, 0)], there[boxes(rows, 1)])


@settings(deadline=None)
@given(cuts(), cuts())
def test_there_and_back_is_the_identity(a, b):
    whole = np.full(a.shape, -1, np.int64)
    whole[:ROWS] = np.arange(ROWS * 12).reshape(ROWS, 12)
    there, _ = reshaped(a, b, {at: a.take(whole, at) for at in a.coordinates()})
    back, _ = reshaped(b, a, there)
    np.testing.assert_array_equal(merged(a, back)[:ROWS], whole[:ROWS])


@settings(deadline=None)
@given(cuts())
def test_cuts_are_values(cut):
    assert pickle.loads(pickle.dumps(cut)) == cut
    assert hash(pickle.loads(pickle.dumps(cut))) == hash(cut)
    explicit = Cut.from_rows(cut.shape, cut.mesh, [(d.axes, d.rows) for d in cut.dims], cut.logical)
    assert explicit == cut
    assert cut != Cut.whole((1, 2))


def test_regular_runs_stay_one_row():
    cyclic2 = Layout("(out tp)").resolve((1_000_000,), Mesh(tp=2))
    cyclic4 = Layout("(out tp)").resolve((1_000_000,), Mesh(tp=4))
    whole = Cut.whole((1_000_000,))
    assert cyclic2.rows((1,))[0].tolist() == [[1, 0, 1, 500_000, 2]]
    assert overlap(cyclic2, (1,), whole, ())[0].tolist() == [[0, 1, 1, 500_000, 1, 2]]
    assert overlap(whole, (), cyclic2, (1,))[0].tolist() == [[1, 0, 1, 500_000, 2, 1]]
    assert overlap(cyclic2, (1,), cyclic4, (3,))[0].tolist() == [[1, 0, 1, 250_000, 2, 1]]
    assert overlap(cyclic2, (1,), cyclic4, (2,))[0].tolist() == []
    fused2, fused4 = (Layout("(3 tp out)").resolve((24,), Mesh(tp=n)) for n in (2, 4))
    assert overlap(fused2, (0,), fused4, (1,))[0].tolist() == [[2, 0, 2, 3, 4, 2]]


def test_runs_of_one_stride_that_are_shifted():
    """q k v behind something, and before it: repetition i of one meets repetition i ± 1 of the other."""
    mesh, sizes = Mesh(tp=2), {"k": 4}
    behind, before = (Layout(text, sizes=sizes).resolve((16,), mesh) for text in ("(k + (3 tp o))", "((3 tp o) + k)"))
    assert overlap(behind, (1,), before, (1,), owned=False)[0].tolist() == [
        [2, 0, 2, 1, 0, 0],
        [4, 2, 2, 2, 2, 2],
        [8, 8, 2, 1, 0, 0],
    ]
    assert overlap(before, (1,), behind, (1,), owned=False)[0].tolist() == [
        [0, 2, 2, 1, 0, 0],
        [2, 4, 2, 2, 2, 2],
        [8, 8, 2, 1, 0, 0],
    ]


def test_replicated_parts_come_from_the_lowest_coordinate():
    layout = Layout("((tp q) + k) in", totals={"k": 2})
    a, b = layout.resolve((10, 1), Mesh(tp=2)), Cut.whole((10, 1))
    assert overlap(a, (0,), b, ())[0].tolist() == [[0, 0, 4, 1, 0, 0], [4, 8, 2, 1, 0, 0]]
    assert overlap(a, (1,), b, ())[0].tolist() == [[0, 4, 4, 1, 0, 0]]
    assert overlap(a, (1,), b, (), owned=False)[0].tolist() == [[0, 4, 6, 1, 0, 0]]


def test_many_rows_against_many_runs():
    """Too many pairs to go through one by one: the same result, spelled out."""
    a = Layout("(600 ((tp q) + k))", sizes={"k": 1, "q": 1}).resolve((1800,), Mesh(tp=2))
    b = Layout("(out tp)").resolve((1800,), Mesh(tp=9))
    for at in range(9):
        held = [(boxes(rows, 0), boxes(rows, 1)) for k in range(2) for rows in overlap(a, (k,), b, (at,))]
        assert np.sort(np.concatenate([there for _, there in held])).tolist() == list(range(200))


def test_no_dims():
    cut = Layout("").resolve((), Mesh(tp=2))
    assert cut.is_whole
    assert list(cut.coordinates()) == [()]
    assert overlap(cut, (), Cut.whole(()), ()) == ()
    whole = np.array(7)
    assert cut.take(whole, ()) == 7
    cut.put(np.array(8), (), whole)
    assert whole == 8


def test_split_axes():
    """tp 4 with two kv heads: q cut over tp, k over its sub-axis kv, the other sub-axis having copies."""
    mesh = Mesh(tp=4).split("tp", kv=2, rep=2)
    cut = Layout("((tp q) + (kv k)) in", totals={"k": 4}).resolve((12, 3), mesh)
    assert cut.axes == ("kv", "rep")
    whole = numbered(cut)
    for t in range(4):
        at = cut.coordinate(mesh.coordinate(mesh.rank(tp=t)))
        q, k = whole[2 * t : 2 * t + 2], whole[8 + t // 2 * 2 :][:2]
        np.testing.assert_array_equal(cut.take(whole, at), np.concatenate([q, k]))
    with pytest.raises(LayoutError, match="kv cuts one term twice"):
        Layout("(tp kv out)").resolve((8,), mesh)
    with pytest.raises(LayoutError, match="mesh axis kv cuts dim 0 and dim 1"):
        Layout("(tp out) (kv in)").resolve((8, 8), mesh)


def test_coordinates():
    cut = Layout("(tp out) (dp in)").resolve((4, 4), Mesh(dp=2, tp=2))
    assert cut.axes == ("dp", "tp")
    assert cut.coordinate({"tp": 1, "pp": 0, "dp": 0}) == (0, 1)
    assert cut.per_dim((0, 1)) == ((1,), (0,))
    assert Layout("(ep expert) in").resolve((4, 2), Mesh(tp=2)).is_whole  # a reserved axis that the mesh lacks


# ------------------------------------------------------------------------------- layouts as values


def test_dims_are_derived():
    assert Layout("(tp out) in").dims == ("out", "in")
    assert Layout("((tp q) + k) (3 in) (3) a").dims == ("dim0", "in", "dim2", "a")
    assert Layout("(tp head d) in", dims=("out", "in")).names == ("out", "in")
    assert Layout("(tp out) in").replace(text="a b c").dims == ("a", "b", "c")
    assert Layout("(3 tp o) in", dims=("out", "in")).replace(replicas="mean").dims == ("out", "in")


def test_layouts_are_values():
    layout = Layout("(tp out) in", sizes={"out": [3, 2]}, padded={0: 6}, stages=[0, 1], replicas="mean")
    assert layout == Layout("(tp out) in", sizes={"out": (3, 2)}, padded={0: 6}, stages=(0, 1), replicas="mean")
    assert len({layout, pickle.loads(pickle.dumps(layout))}) == 1
    assert eval(repr(layout)) == layout
    assert repr(Layout("(tp out) in")) == "Layout('(tp out) in')"
    assert Layout("(tp out) in").resolve((4, 3), MESH) is Layout("(tp out) in").resolve([4, 3], MESH)


@pytest.mark.parametrize(("tp", "q"), [(1, 32), (2, 16), (8, 4)])
def test_totals_do_not_depend_on_the_mesh(tp, q):
    layout = Layout("((tp q) + (tp k) + (tp v)) in", totals={"q": 32, "k": 16, "v": 16})
    cut = layout.resolve((64, 2), Mesh(tp=tp))
    assert cut.rows((0,))[0].tolist()[0][:3] == ([0, 0, q] if tp > 1 else [0, 0, 64])


@pytest.mark.parametrize(
    ("text", "fields", "shape", "tp", "message"),
    [
        (
            "(tp out) in",
            {},
            (10, 4),
            4,
            r"dim 0 '\(tp out\)': no length of out fits, 10 is not a multiple of 4 \(tp 4\)",
        ),
        ("(tp out) in", {"units": {"out": 8}}, (32, 4), 8, "4 units of 8 cannot be divided over tp 8"),
        ("(3 tp out) in", {"units": {"out": 8}}, (96, 4), 8, "4 units of 8 cannot be divided over tp 8"),
        ("(tp out) in", {"units": {"out": 8}}, (36, 4), 2, "36 is not a multiple of its unit 8"),
        (
            "(tp out)",
            {"units": {"out": 2}, "sizes": {"out": (2, 3)}},
            (5,),
            2,
            "width 3 at tp 1 is not a multiple of 2",
        ),
        ("((tp q) + k) in", {}, (10, 4), 2, "lengths of k, q do not follow from the shape"),
        ("(tp out) in", {"sizes": {"out": 3}}, (8, 4), 2, r"dim 0 '\(tp out\)' is 6 long, expected 8"),
        ("(tp out) in", {"sizes": {"out": (3, 3, 2)}}, (8, 4), 2, r"3 widths \(3, 3, 2\) for tp\(2\)"),
        ("(out tp) in", {"sizes": {"out": (3, 5)}}, (8, 4), 2, "no mesh axis stands before it"),
        (
            "(tp out) in",
            {"sizes": {"tp": 2}},
            (8, 4),
            2,
            r"tp is a mesh axis: its length is its degree, tp\(2\)",
        ),
        ("(tp out) in", {"padded": {0: 6}}, (8, 4), 2, "dim 0 is padded to 6, less than its 8"),
        ("(tp out) in", {}, (8,), 2, "the notation has 2 dims, the shape 1"),
        ("((tp q) + 9)", {}, (8,), 2, r"8 - 9 = -1 is not a multiple of 2 \(tp 2\)"),
    ],
)
def test_resolve_errors(text, fields, shape, tp, message):
    with pytest.raises(LayoutError, match=message) as caught:
        Layout(text, **fields).resolve(shape, Mesh(tp=tp))
    assert text in str(caught.value)
    assert f"mesh tp {tp} · pp 1 · dp 1" in str(caught.value)
    assert all(str(n) in str(caught.value) for n in shape)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": {"x": 3}}, "sizes names 'x', which does not stand in"),
        ({"dims": ("a",)}, "has 2 dims"),
        ({"dims": ("a", "a")}, "different names"),
        ({"padded": {2: 3}}, "padded {2: 3} names a dim"),
        ({"replicas": "product"}, "not 'product'"),
        ({"stages": ()}, "at least one"),
        ({"units": {"out": 0}}, "at least 1"),
        ({"sizes": {"out": (3, -1)}}, "lengths are from 0"),
    ],
)
def test_fields_are_checked(fields, message):
    with pytest.raises(LayoutError, match=message):
        Layout("(tp out) in", **fields)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({(0,): [[0, 0, 4]]}, "rows for 1 coordinates, expected exactly the 2"),
        ({(0,): [[0, 0, 4]], (1,): [[5, 0, 3]]}, "1 of 8 elements are held by no coordinate"),
        ({(0,): [[0, 0, 4]], (1,): [[4, 0, 5]]}, "reach from 4 to 9, expected 0 to 8"),
        ({(0,): [[0, 0, 4]], (1,): [[4, 0, 4], [5, 4, 1]]}, "in the whole: rows overlap"),
        ({(0,): [[0, 0, 4]], (1,): [[4, 1, 4]]}, "in the shard: rows reach from 1 to 5, expected 0 to 4"),
        ({(0,): [[0, 0]], (1,): [[4, 0, 4]]}, "rows have 3 or 5 columns"),
    ],
)
def test_explicit_rows_are_checked(rows, message):
    with pytest.raises(LayoutError, match=message):
        Cut.from_rows((8,), Mesh(tp=2), [(("tp",), rows)])


def test_explicit_rows_may_change_the_order():
    cut = Cut.from_rows((6,), Mesh(tp=2), [(("tp",), {(0,): [[4, 0, 2], [0, 2, 1]], (1,): [[1, 0, 3]]})])
    whole = np.arange(6)
    assert cut.take(whole, (0,)).tolist() == [4, 5, 0]
    result, times = reshaped(cut, Cut.whole((6,)), {at: cut.take(whole, at) for at in cut.coordinates()})
    assert result[()].tolist() == whole.tolist()
    assert (times[()] == 1).all()


def test_shapes_are_checked():
    cut = Layout("(tp out) in", padded={0: 8}).resolve((7, 2), Mesh(tp=2))
    with pytest.raises(LayoutError, match=r"the whole has shape \(7, 2\), expected \(8, 2\)"):
        cut.take(np.zeros((7, 2)), (0,))
    with pytest.raises(LayoutError, match="different tensors"):
        overlap(cut, (0,), Cut.whole((8, 2)), ())
    with pytest.raises(LayoutError, match=r"the cut is over \('tp',\): {'dp': 0} has no tp"):
        cut.coordinate({"dp": 0})


@pytest.mark.parametrize(
    ("text", "sizes", "shape", "width"),
    [
        ("(tp out) in", {"out": (10, 5)}, (15, 4), 5),
        ("(3 tp out) in", {"out": (10, 5)}, (45, 4), 15),
        ("(tp head d) in", {"head": (2, 1), "d": 5}, (15, 4), 5),
        ("((tp q) + (2 tp k)) in", {"q": (2, 1), "k": (4, 2)}, (15, 4), 5),
    ],
)
def test_uneven_widths_are_recut_evenly_for_another_degree(text, sizes, shape, width):
    layout = Layout(text, sizes=sizes)
    assert on_degree(layout, "tp", 2) is layout
    assert on_degree(layout, "tp", 1).resolve(shape, Mesh()).shard_shape((0,)) == shape
    recut = on_degree(layout, "tp", 3)
    assert {recut.resolve(shape, Mesh(tp=3)).shard_shape((k,)) for k in range(3)} == {(width, 4)}


@pytest.mark.slow
@settings(deadline=None)
@given(strategies.cuts(), strategies.cuts())
def test_the_laws_that_are_shipped_hold(a, b):
    assert laws(a, b), (a, b)


def test_the_laws_find_a_row_that_is_one_off():
    cut = Layout("(2 tp out)").resolve((8,), Mesh(tp=2))
    assert laws(cut) == Laws((1,), True, True)
    dim = cut.dims[0]
    moved = {at: rows + np.array([1, 0, 0, 0, 0]) * (at == (1,)) for at, rows in dim.rows.items()}
    hole = {at: rows * [1, 1, 1, 0 if at == (1,) else 1, 1] for at, rows in dim.rows.items()}
    for rows, held in ((hole, (0, 1)), ({**dim.rows, (1,): dim.rows[(0,)]}, (0, 2))):
        wrong = Cut((8,), cut.mesh, (dataclasses.replace(dim, rows=rows),))
        assert not (found := laws(wrong))
        assert (found.held, found.merged) == (held, False)
    with pytest.raises(IndexError):
        laws(Cut((8,), cut.mesh, (dataclasses.replace(dim, rows=moved),)))
    assert Layout("out in").check((3, 2), Mesh(tp=2), Layout("(tp out) in"), Mesh(tp=3)).to_dict()["there and back"]


@pytest.mark.parametrize(
    ("text", "sizes", "axes", "expected", "kept"),
    [
        ("(tp dp out) in", {}, ("dp",), "(tp out) in", {}),
        ("(dp out) (tp in)", {"in": (3, 2)}, ("dp",), "out (tp in)", {"in": (3, 2)}),
        ("(dp out) (tp in)", {"in": (3, 2)}, ("tp",), "(dp out) in", {}),
        ("((tp q) + (tp k) + v) in", {"q": 4}, ("tp",), "(q + k + v) in", {"q": 4}),
        ("(3 tp dp out) in", {}, ("dp", "pp"), "(3 tp out) in", {}),
        ("out in", {"out": 3}, ("tp",), "out in", {"out": 3}),
    ],
)
def test_a_layout_without_some_axes(
    text: str, sizes: dict[str, Any], axes: tuple[str, ...], expected: str, kept: dict[str, Any]
) -> None:
    layout = without(Layout(text, sizes=sizes, dims=("out", "in")), axes)
    assert (layout.text, dict(layout.sizes), layout.dims) == (expected, kept, ("out", "in"))
