"""Merging, splitting and reshaping arrays in memory: the laws, on every backend, against element-by-element numpy."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from compare import GPT, ZERO2, ZERO3
from devices import BACKENDS, spoken
from helpers.small import small
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptlab
from ckptlab import (
    Backend,
    Layout,
    LayoutError,
    Mesh,
    MeshError,
    ReplicaWarning,
    merge,
    merge_flat,
    reshape,
    split,
    split_flat,
    to,
)
from ckptlab.arrays.backends import resolve
from ckptlab.arrays.duck import duck
from ckptlab.arrays.moves import moves
from ckptlab.catalog import Catalog, FlatGroup, Tensor
from ckptlab.layout import Cut
from ckptlab.plan import FlatBuffer, Holder

COMPILED = [pytest.param(b, marks=pytest.mark.slow) if b.name == "jax" else b for b in BACKENDS]
DTYPES = [np.float32, np.float64, np.int64, ml_dtypes.bfloat16, np.float16, ml_dtypes.float8_e4m3fn]


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...], Mesh, Mesh]:
    """A layout, the shape of a whole, and two meshes: one rank, odd sizes, no elements, 0 dims and 1."""
    a, b = draw(st.sampled_from([(1, 2), (2, 1), (2, 4), (3, 6), (4, 4), (4, 1), (6, 2), (1, 1)]))
    n, rest = math.lcm(a, b) * draw(st.integers(0, 3)), draw(st.integers(0, 5))
    one = Layout("(tp a)"), (n,)
    both = [
        (Layout("(tp out) in"), (n, rest)),
        (Layout("out (tp in)"), (rest, n)),
        (Layout("(3 tp out) in"), (3 * n, rest)),
        (Layout("(out tp) in"), (n, rest)),
        (Layout("(2 tp ffn) a b"), (2 * n, rest, 2)),
        (Layout("(head tp d) in", totals={"head": n * 2}, sizes={"head": 2}), (2 * n, rest)),
        (Layout("((tp q) + (tp k) + (tp v)) in", totals={"q": 2 * n, "k": n, "v": n}), (4 * n, rest)),
        (Layout("((tp q) + k) in", totals={"q": n, "k": 3}), (n + 3, rest)),
        (Layout("(head ((tp q) + (tp k))) in", totals={"q": 2 * n, "k": n}), (6 * n, rest)),
        (Layout("out in"), (rest, 3)),
        (Layout(""), ()),
        one,
    ]
    layout, shape = draw(st.sampled_from(both))
    return layout, shape, Mesh(tp=a, dp=2), Mesh(tp=b, pp=3)


@pytest.mark.slow
@settings(max_examples=60)
@given(cases(), st.sampled_from(BACKENDS), st.sampled_from(DTYPES), st.booleans())
def test_laws(case: Any, backend: Backend, dtype: type, stacked: bool) -> None:
    """Split is what `Cut.take` says, merge undoes it, and reshape is one after the other: bit for bit."""
    layout, shape, first, second = case
    try:
        cut, other = layout.resolve(shape, first), layout.resolve(shape, second)
    except LayoutError:
        return  # a length that the mesh does not divide
    batch = (2,) if stacked else ()
    values = np.arange(math.prod((*batch, *shape)), dtype=np.int64).reshape((*batch, *shape)).astype(dtype)
    whole = xr.DataArray(values, dims=(*(["layer"] if stacked else []), *layout.dims), attrs={"kind": "parameter"})
    shards = split(whole, layout, first, backend=backend)
    assert (shards.dtype, shards.attrs) == (dtype, whole.attrs)
    for tp in range(first.tp):
        at = cut.coordinate({"tp": tp})
        for b in range(max(1, len(batch))):
            found = shards.isel({"tp": tp, **({"layer": b} if stacked else {})})
            expected = cut.take(values[b] if stacked else values, at)
            assert found.values.tobytes() == expected.tobytes()
    again = merge(shards, layout, shape=shape)
    assert again.dims == whole.dims
    assert again.values.tobytes() == values.tobytes()
    moved = reshape(shards, layout, second, shape=shape)
    wanted = split(whole, layout, second)
    assert moved.dims == wanted.dims
    assert moved.values.tobytes() == wanted.values.tobytes()
    assert moved.sizes["tp"] == other.mesh.tp


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 7), min_size=2, max_size=4),
    st.sampled_from(BACKENDS),
    st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_uneven_shards_stand_in_the_corner_of_the_widest(widths: list[int], backend: Backend, dtype: type) -> None:
    layout = Layout("(tp out) in", sizes={"out": tuple(widths)})
    values = np.arange(sum(widths) * 3).reshape(-1, 3).astype(dtype)
    shards = split(xr.DataArray(values, dims=("out", "in")), layout, Mesh(tp=len(widths)), backend=backend)
    start = 0
    for tp, width in enumerate(widths):
        mine = shards.isel(tp=tp).values
        assert mine[:width].tobytes() == values[start : start + width].tobytes()
        assert not mine[width:].astype(bool).any()
        start += width
    if len(set(widths)) > 1:
        assert shards.out_extent.values.tolist() == widths
        assert merge(shards, "(tp out) in").values.tobytes() == values.tobytes()  # the coordinates say the widths
        recut = reshape(shards, "(tp out) in", Mesh(tp=1))
        assert recut.isel(tp=0).values.tobytes() == values.tobytes()
    assert merge(shards, layout).values.tobytes() == values.tobytes()


@pytest.mark.parametrize("backend", BACKENDS, ids=spoken)
def test_two_axes(backend: Backend) -> None:
    whole = xr.DataArray(np.arange(48.0).reshape(8, 6), dims=("out", "in"))
    shards = split(whole, "(tp out) (dp in)", Mesh(tp=4, dp=2), backend=backend)
    assert dict(shards.sizes) == {"dp": 2, "tp": 4, "out": 2, "in": 3}
    assert shards.sel(dp=1, tp=2).values.tolist() == [[27, 28, 29], [33, 34, 35]]
    assert merge(shards, "(tp out) (dp in)").values.tolist() == whole.values.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS, ids=spoken)
def test_an_axis_that_is_split(backend: Backend) -> None:
    """Two kv heads on tp 4: each stands on two ranks."""
    layout = Layout("((tp q) + (kv k)) in", totals={"q": 8, "k": 4})
    mesh, narrow = Mesh(tp=4).split("tp", kv=2, rep=2), Mesh(tp=2).split("tp", kv=2, rep=1)
    whole = xr.DataArray(np.arange(36).reshape(12, 3), dims=layout.dims)
    shards = split(whole, layout, mesh, backend=backend)
    assert dict(shards.sizes) == {"kv": 2, "rep": 2, "dim0": 4, "in": 3}
    assert (shards.sel(kv=1, rep=0).values[:, 0] // 3).tolist() == [4, 5, 10, 11]
    assert merge(shards, layout, shape=(12, 3), on=mesh).values.tolist() == whole.values.tolist()
    fewer = reshape(shards, layout, narrow, shape=(12, 3), on=mesh)
    assert fewer.values.tolist() == split(whole, layout, narrow).values.tolist()
    replicated = split(whole, "dim0 in", mesh, backend=backend)
    assert (replicated.sizes["kv"], replicated.sizes["rep"]) == (2, 2)
    assert merge(replicated, "dim0 in", shape=(12, 3), on=mesh).values.tolist() == whole.values.tolist()
    with pytest.raises(LayoutError, match="split.*shape="):
        merge(shards, layout, on=mesh)
    with pytest.raises(LayoutError, match=r"dim rep is 2 long, on .* it has degree 1"):
        merge(shards, layout, shape=(12, 3), on=narrow)


@pytest.mark.parametrize("backend", BACKENDS, ids=spoken)
def test_padding_is_cut_off_where_the_true_shape_is_said(backend: Backend) -> None:
    layout = Layout("(tp out) in", padded={0: 8})
    whole = xr.DataArray(np.arange(1.0, 15).reshape(7, 2), dims=("out", "in"))
    shards = split(whole, layout, Mesh(tp=2), backend=backend)
    assert dict(shards.sizes) == {"tp": 2, "out": 4, "in": 2}
    assert shards.isel(tp=1, out=3).values.tolist() == [0, 0]
    assert merge(shards, layout, shape=(7, 2)).values.tolist() == whole.values.tolist()
    assert merge(shards, layout).sizes["out"] == 8


@pytest.mark.parametrize("backend", BACKENDS, ids=spoken)
class TestReplicas:
    def shards(self, backend: Backend, dtype: type = np.float32) -> xr.DataArray:
        values = np.array([[1, 2, np.nan], [1, 4, np.nan]], dtype)
        return xr.DataArray(duck(backend.from_numpy(values), backend), dims=("tp", "out"), name="norm.weight")

    def test_equal_ones_are_one(self, backend: Backend) -> None:
        same = self.shards(backend).isel(tp=[0, 0])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            np.testing.assert_array_equal(merge(same, "out").values, [1, 2, np.nan])

    def test_a_difference_is_reported(self, backend: Backend) -> None:
        with pytest.warns(ReplicaWarning, match=r"norm\.weight: tp 1 differ from tp 0"):
            assert merge(self.shards(backend), "out").values[1] == 2

    def test_they_are_averaged_where_the_layout_says_so(self, backend: Backend) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = merge(self.shards(backend, ml_dtypes.bfloat16), Layout("out", replicas="mean"))
            assert found.dtype == ml_dtypes.bfloat16
            np.testing.assert_array_equal(found.values.astype(np.float32), [1, 3, np.nan])
            assert merge(self.shards(backend), Layout("out", replicas="first")).values[1] == 2

    def test_parts_of_a_sum_are_made_of_it_again(self, backend: Backend) -> None:
        layout, whole = Layout("out", replicas="sum"), xr.DataArray(np.float32([2, -4, np.nan]), dims="out")
        shards = split(whole, layout, Mesh(tp=4), backend=backend)
        np.testing.assert_array_equal(shards.isel(tp=3).values, [0.5, -1, np.nan])
        np.testing.assert_array_equal(merge(shards, layout).values, whole.values)
        wider = reshape(shards, layout, Mesh(tp=2))
        np.testing.assert_array_equal(wider.isel(tp=1).values, [1, -2, np.nan])
        stages = xr.concat([shards, shards], "pp")
        np.testing.assert_array_equal(merge(stages, layout).values, whole.values)  # stages have copies of each part
        with pytest.raises(LayoutError, match="integers have no 2 equal parts"):
            split(whole.fillna(0).astype(int), layout, Mesh(tp=2), backend=backend)

    def test_copies_of_a_part_are_compared_too(self, backend: Backend) -> None:
        """The k that each rank of multi-query attention has."""
        layout = Layout("((tp q) + k)", dims=("out",), totals={"q": 4}, sizes={"k": 2})
        whole = xr.DataArray(np.arange(6, dtype=np.float32), dims="out", name="qkv")
        shards = split(whole, layout, Mesh(tp=2), backend=backend)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert merge(shards, layout, shape=(6,)).values.tolist() == whole.values.tolist()
        apart = to(shards, "numpy").copy(deep=True)
        apart[1, 3] += 1
        apart = to(apart, backend)
        with pytest.warns(ReplicaWarning, match="qkv: parts that several coordinates of tp hold are not the same"):
            assert merge(apart, layout, shape=(6,)).values.tolist() == whole.values.tolist()
        with pytest.warns(ReplicaWarning):
            reshape(apart, layout, Mesh(tp=1), shape=(6,))
        with pytest.raises(LayoutError, match='replicas="mean" is for tensors that ranks have copies of as a whole'):
            merge(apart, layout.replace(replicas="mean"), shape=(6,))


@pytest.mark.parametrize("backend", [b for b in BACKENDS if b.name != "jax"], ids=spoken)
def test_a_destination_is_written_to(backend: Backend) -> None:
    layout, mesh = Layout("((tp q) + (tp k)) in", totals={"q": 8, "k": 4}), Mesh(tp=4)
    whole = xr.DataArray(np.arange(36, dtype=np.float32).reshape(12, 3), dims=("dim0", "in"))
    shards = split(whole, layout, mesh, backend=backend)
    out = backend.empty((12, 3), np.dtype(np.float32))
    merged = merge(shards, layout, out=out)
    assert backend.to_numpy(out).tobytes() == whole.values.tobytes() == merged.values.tobytes()
    held = merged.data if backend.name == "numpy" else merged.data.array
    assert held.data_ptr() == out.data_ptr() if backend.name == "torch" else np.shares_memory(held, out)
    with pytest.raises(LayoutError, match=r"out has shape \(12, 3\), dtype float64; expected \(12, 3\)"):
        merge(shards, layout, out=backend.empty((12, 3), np.dtype(np.float64)))


@pytest.mark.parametrize("backend", BACKENDS, ids=spoken)
def test_an_array_is_moved_with_its_labels(backend: Backend) -> None:
    here = xr.DataArray(np.arange(3, dtype=np.int64) * 2**40, {"out": [5, 6, 7]}, ["out"], "w", {"kind": "buffer"})
    there = to(here, backend)
    assert (there.name, there.attrs, there.dtype) == ("w", {"kind": "buffer"}, np.int64)
    assert there.sel(out=7) == 2**41
    assert to(there, backend) is there
    assert to(there).data is there.data
    assert to(there, "numpy").identical(here)


def test_jax_has_no_destinations_and_says_so() -> None:
    shards = split(xr.DataArray(np.ones((4, 2)), dims=("out", "in")), "(tp out) in", Mesh(tp=2), backend="jax")
    own = to(xr.DataArray(np.empty((4, 2)), dims=("out", "in")), "jax")
    with pytest.raises(TypeError, match="leave out= away"):
        merge(shards, "(tp out) in", out=own)
    with pytest.raises(LayoutError, match="out is an array of jax"):
        merge(shards, "(tp out) in", out=np.empty((4, 2)))


def test_regular_layouts_are_few_moves() -> None:
    """One a part, however many ranks: what is fast on a device."""
    for text, totals, parts in [
        ("(tp out) in", {}, 1),
        ("out (tp in)", {}, 1),
        ("(3 tp out) in", {}, 1),
        ("(out tp) in", {}, 1),
        ("((tp q) + (tp k) + (tp v)) in", {"q": 96, "k": 48, "v": 48}, 3),
    ]:
        cut = Layout(text, totals=totals).resolve((192, 96), Mesh(tp=16))
        assert len(moves(cut, Cut.whole((192, 96))).steps) == parts
        assert len(moves(Cut.whole((192, 96)), cut).steps) == parts


def test_runs_with_others_between_them() -> None:
    """Rows as an affine map may say them: regular, but no permuted view."""
    rows = {(k,): [[k, 0, 1, 2, 4], [2 + k, 2, 1, 2, 4]] for k in (0, 1)}
    cut = Cut.from_rows((8,), Mesh(tp=2), [(("tp",), rows)])
    whole = np.arange(8)
    shards = resolve().move(moves(Cut.whole((8,)), cut), [whole])
    assert (
        [s.tolist() for s in shards] == [cut.take(whole, (k,)).tolist() for k in (0, 1)] == [[0, 4, 2, 6], [1, 5, 3, 7]]
    )
    assert resolve().move(moves(cut, Cut.whole((8,))), [shards]).tolist() == whole.tolist()


@pytest.mark.parametrize(
    ("dims", "shape", "says"),
    [
        (("tp", "rows", "in"), (2, 4, 3), "no 'out'"),
        (("tp", "out", "in"), (2, 4, 3), r"into \(3, 3\)"),
    ],
)
def test_what_does_not_fit_is_refused(dims: tuple[str, ...], shape: tuple[int, ...], says: str) -> None:
    with pytest.raises(LayoutError, match=says):
        merge(xr.DataArray(np.zeros(shape), dims=dims), "(tp out) in", shape=(6, 3))


# ------------------------------------------------------------------------------------------------ flat buffers


def nodes(catalog: Catalog, tree: xr.DataTree) -> Iterator[tuple[FlatGroup, xr.DataTree]]:
    """Each group of flat buffers with its node of a view."""
    seen: Counter[str] = Counter()
    for group in catalog.flat_groups:
        path = f"pp{group.stage}/group{group.group}"
        node = tree[path]
        yield group, node[f"sub{seen[path]}"] if node.children else node
        seen[path] += 1


LAYOUTS = {".*weight": "out (tp in)", ".*bias": "(tp out)"}
TARGETS: dict[str, dict[str, Any]] = {
    "ZeRO-1 on tp 2": {"tp": 2, "zero_stage": 1, "strategy": LAYOUTS},
    "ZeRO-2": {"zero_stage": 2},
    "ZeRO-3": {"zero_stage": 3},
}


@pytest.mark.parametrize(
    ("backend", "case"),
    [
        pytest.param(b, case, marks=[pytest.mark.slow] * (b.name == "jax"), id=f"{spoken(b)}-{name}")
        for b in BACKENDS
        for name, case in (TARGETS if b.name == "jax" else {c.name: c for c in (GPT, ZERO2, ZERO3)}).items()
    ],
)
def test_from_buffers_to_other_buffers_by_hand(backend: Backend, case: Any, tmp_path: Path) -> None:
    """Merge dp, merge tp, split tp, split dp: step by step in memory it is what the reshape's views show. jax compiles
    each shape: of few tensors."""
    ckpt = ckptlab.open(small(tmp_path / "step", **case) if isinstance(case, dict) else case)
    to = ckpt.reshape(Mesh(tp=1, dp=3) if ckpt.mesh.tp > 1 else Mesh(dp=3))
    whole: dict[str, xr.DataArray] = {}
    for group, node in nodes(ckpt.catalog, ckpt.flat(backend=backend.name, device=backend.device)):
        shards = merge_flat(node.exp_avg, group, ckpt.tensors)
        assert set(shards) == set(group.names)
        known = ckpt.shards("exp_avg", stack=False)
        for tensor, array in shards.items():
            expected = known[tensor].sel(pp=group.stage) if "pp" in known[tensor].dims else known[tensor]
            assert array.dims == expected.dims
            assert array.values.tobytes() == expected.values.tobytes(), tensor
            t = ckpt.tensors[tensor]
            whole.setdefault(tensor, merge(array, t.layout, shape=t.shape))
    for group, node in nodes(to.target, to.flat()):
        shards = {n: split(whole[n], to.target.tensors[n].layout, to.mesh) for n in group.names}
        assert split_flat(shards, group).values.tobytes() == node.exp_avg.values.tobytes()


@pytest.mark.slow
@settings(max_examples=40)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(BACKENDS),
    st.sampled_from(DTYPES),
)
def test_flat_laws(counts: list[int], dp: int, zero3: bool, backend: Backend, dtype: type) -> None:
    names = [f"w{i}" for i in range(len(counts))]
    flat = (FlatBuffer.per_tensor if zero3 else FlatBuffer.contiguous)(names, counts, dp)
    shards = {}
    for i, (tensor, n) in enumerate(zip(names, counts, strict=True)):
        array = backend.from_numpy((np.arange(n) + 10 * i + 1).astype(dtype))
        shards[tensor] = xr.DataArray(duck(array, backend), dims="element")
    buffers = split_flat(shards, flat)
    assert (buffers.dims, buffers.shape, buffers.dtype) == (("dp", "flat"), (dp, flat.size(0)), dtype)
    assert int((buffers.values.astype(np.float64) == 0).sum()) == flat.total - sum(counts)  # padding is 0
    for d in range(dp):
        for index, start, place, count in flat.within(d).tolist():
            mine = shards[names[index]].values[start : start + count]
            assert buffers.values[d, place : place + count].tobytes() == mine.tobytes()
    again = merge_flat(buffers, flat)
    assert all(again[n].values.tobytes() == shards[n].values.tobytes() for n in names)


@st.composite
def spread(draw: st.DrawFn) -> tuple[Mesh, list[Layout], list[tuple[int, ...]]]:
    """A mesh whose dp is split into edp and ep, layouts that ep and tp cut, one of them unevenly, and whole shapes."""
    edp, ep, tp = (draw(st.integers(1, 3)) for _ in range(3))
    mesh = Mesh(dp=edp * ep, tp=tp).split("dp", edp=edp, ep=ep)
    layouts, shapes = [], []
    for _ in range(draw(st.integers(1, 3))):
        widths = tuple(draw(st.integers(1, 4)) for _ in range(tp))
        text = draw(st.sampled_from(["(ep expert) (tp out) in", "(ep tp out) in", "(tp out) (ep in)"]))
        sizes = {"out": widths} if text != "(ep tp out) in" and draw(st.booleans()) else {}
        out = sum(widths) if sizes else tp * draw(st.integers(1, 3)) * (ep if text == "(ep tp out) in" else 1)
        rest = draw(st.integers(1, 3))
        shape = {
            "(ep expert) (tp out) in": (ep * rest, out, 2),
            "(ep tp out) in": (out, rest),
            "(tp out) (ep in)": (out, ep * rest),
        }[text]
        layouts.append(Layout(text, sizes=sizes))
        shapes.append(shape)
    return mesh, layouts, shapes


@pytest.mark.parametrize("backend", COMPILED, ids=spoken)  # compiles each shape
@settings(max_examples=8)
@given(spread(), st.booleans())
def test_flat_laws_where_experts_are_spread(backend: Backend, case: Any, zero3: bool) -> None:
    """Holders differ on ep and tp, edp cuts the buffers: each holds what the cut says, and merging undoes splitting."""
    mesh, layouts, shapes = case
    tensors, wholes, shards = {}, {}, {}
    for i, (layout, shape) in enumerate(zip(layouts, shapes, strict=True)):
        states = {"fp32": np.dtype(np.float32)}
        cut = layout.resolve(shape, mesh)
        tensors[f"w{i}"] = Tensor(f"w{i}", shape, layout, cut, "parameter", states, 0)
        whole = 100 * (i + 1) + np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        wholes[f"w{i}"] = whole
        shards[f"w{i}"] = split(xr.DataArray(whole, dims=layout.dims), layout, mesh, backend=backend)
    group = FlatGroup.laid_out(Holder(pp=0), 0, list(tensors), tensors, mesh, 3 if zero3 else 1)
    assert (group.axes, group.over) == (("ep", "tp"), "edp")
    buffers = split_flat(shards, group)
    assert buffers.dims == ("ep", "tp", "edp", "flat")
    values = buffers.values  # jax compiles each piece that is taken
    for holder, flat in group.flats.items():
        for d in range(flat.dp):
            expected = np.zeros(flat.size(d), np.float32)
            for index, start, place, count in flat.within(d).tolist():
                cut = tensors[flat.names[index]].cut
                mine = cut.take(wholes[flat.names[index]], cut.coordinate(holder)).reshape(-1)
                expected[place : place + count] = mine[start : start + count]
            found = values[holder["ep"], holder["tp"], d, : flat.size(d)]
            assert found.tobytes() == expected.tobytes()
    again = merge_flat(buffers, group, tensors)
    for tensor, array in shards.items():
        assert again[tensor].dims == array.dims
        assert set(again[tensor].coords) == set(array.coords)
        assert again[tensor].values.tobytes() == array.values.tobytes()
        whole = merge(again[tensor], tensors[tensor].layout, shape=tensors[tensor].shape, on=mesh)
        assert whole.values.tobytes() == wholes[tensor].tobytes()


def test_flat_buffers_of_other_degrees_are_refused() -> None:
    mesh = Mesh(dp=8, tp=2).split("dp", edp=2, ep=4)
    layout = Layout("(ep tp out)")
    cut = layout.resolve((16,), mesh)
    tensors = {"w": Tensor("w", (16,), layout, cut, "parameter", {"fp32": np.dtype(np.float32)}, 0)}
    group = FlatGroup.laid_out(Holder(pp=0), 0, ["w"], tensors, mesh, 1)
    shards = split(xr.DataArray(np.arange(16), dims=layout.dims), layout, mesh)
    turned = shards.rename(ep="tp", tp="ep")
    with pytest.raises(LayoutError, match=r"w: shards of .*the flat buffers have room"):
        split_flat({"w": turned}, group)
    with pytest.raises(LayoutError, match=r"\(ep, tp, edp, flat\) \(2, 4, 2, 2\).*\(4, 2, 2, 2\)"):
        merge_flat(split_flat({"w": shards}, group).rename(ep="tp", tp="ep"), group, tensors)
    with pytest.raises(LayoutError, match=r"\(1, 2, 2, 2\)"):
        merge_flat(split_flat({"w": shards}, group).isel(ep=0), group, tensors)


def test_flat_buffers_that_do_not_fit_are_refused() -> None:
    flat = FlatBuffer.contiguous(["a", "b"], [4, 6], 2)
    with pytest.raises(LayoutError, match=r"\(1, 2, 6\)"):
        merge_flat(xr.DataArray(np.zeros((3, 6)), dims=("dp", "flat")), flat)
    a, b = (xr.DataArray(np.zeros(n), dims="element") for n in (4, 5))
    with pytest.raises(LayoutError, match="missing: b"):
        split_flat({"a": a}, flat)
    with pytest.raises(LayoutError, match=r"b: shards of \(5,\), the flat buffers have room for \[6\]"):
        split_flat({"a": a, "b": b}, flat)


# ------------------------------------------------------------------------------------------------ on the array itself


def test_the_accessor_does_what_the_functions_do() -> None:
    ckpt = ckptlab.open(GPT)
    shards = ckpt.shards("master")["mlp.dense_h_to_4h.weight"].master
    assert shards.ckptlab.layout == Layout("(tp out) in")
    whole = shards.ckptlab.merge()
    assert whole.identical(merge(shards, "(tp out) in"))
    assert whole.equals(ckpt.full("master")["mlp.dense_h_to_4h.weight"].master)
    again = whole.ckptlab.split(Mesh(tp=4))
    assert again.identical(split(whole, "(tp out) in", Mesh(tp=4)))
    assert whole.ckptlab.split("out (tp in)", Mesh(tp=2)).sizes["in"] == whole.sizes["in"] // 2
    moved = whole.ckptlab.to("torch")
    assert moved.data.backend.name == "torch"
    assert moved.identical(ckptlab.to(whole, "torch"))


@pytest.mark.parametrize("replicas", ["sum", "mean"])
def test_the_accessor_knows_what_replicas_are(replicas: str) -> None:
    rule = {"layout": "out", "replicas": replicas}
    ckpt = ckptlab.open(GPT, strategy={r"2\.input_layernorm\.weight": rule, r"\d.*layernorm\.bias": "out"})
    whole, shards = (view(stack=False)["2.input_layernorm.weight"] for view in (ckpt.full, ckpt.shards))
    assert shards.master.ckptlab.layout == Layout("out", replicas=replicas)
    for state in shards.data_vars:
        assert shards[state].ckptlab.merge().equals(whole[state]), state
    assert whole.ckptlab.split(Mesh(tp=2)).master.ckptlab.merge().equals(whole.master)
    assert not whole.master.equals(shards.master.isel(tp=0)) or replicas == "mean"


def test_the_accessor_of_datasets_and_trees_does_it_for_all_variables() -> None:
    ckpt = ckptlab.open(GPT)
    tree, whole = ckpt.shards(), ckpt.full()
    name = "mlp.dense_h_to_4h.weight"
    node = tree[name].to_dataset()
    assert node.ckptlab.layout == Layout("(tp out) in")
    assert node.ckptlab.merge().equals(whole[name].to_dataset())
    assert node.ckptlab.merge().attrs == node.attrs
    assert node.ckptlab.merge().ckptlab.split(Mesh(tp=2)).equals(node)
    assert tree[name].ckptlab.to("torch").exp_avg.data.backend.name == "torch"
    columns = whole.filter(lambda n: not n.data_vars or (n.attrs["layout"] == "(tp out) in" and "embed" not in n.path))
    assert len(columns.children) == 2
    recut = columns.ckptlab.split(Mesh(tp=4))
    reshaped = ckpt.reshape(tp=4).shards()
    assert all(recut[n].identical(reshaped[n]) for n in columns.children)
    assert recut.ckptlab.merge().identical(columns)
    plain = node.assign(other=("out", np.zeros(node.sizes["out"])))
    with pytest.raises(LayoutError, match="other: attrs tell no layout"):
        _ = plain.ckptlab.layout
    plain["other"].attrs["layout"] = "(tp out)"
    with pytest.raises(LayoutError, match="its variables have 2 layouts"):
        _ = plain.ckptlab.layout


def test_the_accessor_says_what_it_lacks() -> None:
    plain = xr.DataArray(np.zeros((4, 2)), dims=("a", "b"))
    with pytest.raises(LayoutError, match="attrs tell no layout"):
        plain.ckptlab.merge()
    told = plain.assign_attrs(layout="(tp out) in")
    with pytest.raises(LayoutError, match=r"has dims \('out', 'in'\), the array \('a', 'b'\)"):
        _ = told.ckptlab.layout
    with pytest.raises(MeshError, match="needs a mesh"):
        told.ckptlab.split("(tp a) b")
