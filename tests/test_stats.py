"""Every statistic is numpy's or scipy's on the whole tensor, of every dtype; parts add up; one pass, little memory."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import scipy.linalg
import xarray as xr
from compare import DATA, GPT, ZERO2, ZERO3
from helpers.arrays import cut, store
from helpers.command import refused, run
from helpers.files import refuse_reading
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ckptlab
from ckptlab import Layout, Mesh, stats, views
from ckptlab.analysis.accumulate import accumulator, partial
from ckptlab.analysis.partial import Bins, Partial, merged
from ckptlab.analysis.rows import rows_of
from ckptlab.analysis.statistics import partials
from ckptlab.arrays.lazy import LazyArray
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.layout import Cut
from ckptlab.stored import reading

STEPS = DATA / "plain_zero1_dp2_steps"
QKV = "self_attention.query_key_value.weight"
DTYPES = [
    *(np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2),
    *(np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_),
]
WIDE = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


def sample(dtype: Any, size: int, seed: int = 0) -> np.ndarray:
    """Numbers of all sizes that the dtype has, zeros of both signs, and a few that are subnormal or not finite."""
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iub":
        return rng.integers(0, 2 if dtype is np.bool_ else 100, size).astype(dtype)
    x = rng.standard_normal(size) * np.exp2(rng.integers(-20, 4, size))
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
    x[:: max(size // 7, 1)] = 0.0
    x[1 :: max(size // 5, 1)] = -0.0
    x[2 :: max(size // 3, 1)] = -smallest / 2
    x[3 :: max(size // 4, 1)] = math.nan
    x[5 :: max(size // 4, 1)] = math.inf
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def expected(array: np.ndarray) -> dict[str, float]:
    """What numpy says of the whole array, in float64."""
    x = array.astype(np.float64).ravel()
    finite = x[np.isfinite(x)]
    narrow = array.dtype.kind not in "iub"
    smallest = float(ml_dtypes.finfo(array.dtype).smallest_normal) if narrow else 0.0
    return {
        "elements": x.size,
        "nan": np.isnan(x).sum(),
        "inf": np.isinf(x).sum(),
        "zeros": (x == 0).sum(),
        "subnormals": ((x != 0) & (abs(x) < smallest)).sum(),
        "norm": scipy.linalg.norm(finite) if finite.size else 0.0,
        "mean": finite.mean() if finite.size else math.nan,
        "std": finite.std() if finite.size else math.nan,
        "min": finite.min() if finite.size else math.nan,
        "max": finite.max() if finite.size else math.nan,
        "zero_share": (x == 0).mean(),
        "subnormal_share": ((x != 0) & (abs(x) < smallest)).mean(),
    }


def assert_is(found: xr.Dataset, array: np.ndarray) -> None:
    for name, value in expected(array).items():
        slack = 1e-13 * float(np.nan_to_num(found["std"].item())) if name == "mean" else 0.0
        np.testing.assert_allclose(found[name].item(), value, rtol=1e-11, atol=slack, err_msg=name)


# -------------------------------------------------------------------------------- against references


@pytest.mark.parametrize("histogram", [True, False, [-1.0, 0.0, 0.5, 3.0]], ids=["octaves", "none", "edges"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_every_statistic_is_numpys_on_the_whole(dtype: Any, histogram: Any) -> None:
    array = sample(dtype, 300_001)
    with np.errstate(invalid="ignore"):
        found = stats(xr.DataArray(array, dims="x", name="w"), histogram=histogram).sel(tensor="w", state="w")
        assert_is(found, array)
    assert found["dtype"].item() == array.dtype.name


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_octaves_hold_what_lies_between_their_edges(dtype: Any) -> None:
    array = sample(dtype, 5_003)
    found = stats(xr.DataArray(array, dims="x"), window=1000).squeeze()
    x = array.astype(np.float64)
    x = x[np.isfinite(x)]
    assert found["histogram"].sum() == x.size
    for low, high, count in zip(found["bin_low"], found["bin_high"], found["histogram"], strict=True):
        if low == high:
            inside = x == 0
        elif low >= 0:
            inside = (x >= low.item()) & (x < high.item()) & (x != 0)
        else:
            inside = (x > low.item()) & (x <= high.item()) & (x != 0)
        assert count == inside.sum(), (low.item(), high.item())
    middles = found["bin"].values
    assert (np.diff(middles) > 0).all()


def test_octaves_are_those_in_use() -> None:
    found = stats(xr.DataArray(np.array([0.3, 0.4, 5.0, 0.0], np.float32), dims="x")).squeeze()
    assert found["bin_low"].values.tolist() == [0.0, 0.25, 0.5, 1.0, 2.0, 4.0]
    assert found["histogram"].values.tolist() == [1, 2, 0, 0, 0, 1]
    signed = stats(xr.DataArray(np.array([-0.3, 0.6], np.float64), dims="x")).squeeze()
    assert signed["bin_low"].values.tolist() == [-1.0, -0.5, 0.0, 0.25, 0.5]
    assert signed["histogram"].values.tolist() == [0, 1, 0, 0, 1]


@pytest.mark.parametrize("dtype", WIDE, ids=lambda d: np.dtype(d).name)
def test_edges_are_numpys(dtype: Any) -> None:
    array = np.random.default_rng(1).standard_normal(10_000).astype(dtype)
    edges = np.linspace(-2, 2, 21)
    found = stats(xr.DataArray(array, dims="x"), histogram=edges).squeeze()
    np.testing.assert_array_equal(found["histogram"], np.histogram(array.astype(np.float64), edges)[0])
    np.testing.assert_allclose(found["bin"], (edges[1:] + edges[:-1]) / 2, atol=1e-15)


def test_a_sum_of_bfloat16_is_right() -> None:
    ones = xr.DataArray(np.ones(1 << 20, ml_dtypes.bfloat16), dims="x")
    assert stats(ones)["mean"].item() == 1.0
    assert stats(ones)["norm"].item() == 1024.0
    large = xr.DataArray(np.full(4096, 60_000, np.float16), dims="x")
    assert stats(large)["mean"].item() == 60_000 - 60_000 % 32


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_mean_far_larger_than_the_spread(dtype: Any) -> None:
    array = (1e4 + np.random.default_rng(0).standard_normal(300_000) * 1e-2).astype(dtype)
    found = stats(xr.DataArray(array, dims="x"), histogram=False).squeeze()
    np.testing.assert_allclose(found["std"], array.astype(np.float64).std(), rtol=1e-9)


def test_tiny_second_moments_do_not_underflow() -> None:
    array = np.full(10_000, 1e-30, np.float32)
    np.testing.assert_allclose(stats(xr.DataArray(array, dims="x"))["norm"].item(), 1e-28, rtol=1e-6)


@pytest.mark.parametrize("array", [np.zeros((0, 3), np.float32), np.full(5, np.nan, np.float32)], ids=["none", "nan"])
def test_without_a_finite_element_there_are_no_moments(array: np.ndarray) -> None:
    found = stats(xr.DataArray(array, dims=list("ab")[: array.ndim]), spectrum=True).squeeze()
    assert found["elements"] == array.size
    assert all(np.isnan(found[name]) for name in ("mean", "std", "min", "max", "stable_rank"))


def test_what_is_no_number_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="complex64"):
        stats(xr.DataArray(np.zeros(3, np.complex64), dims="x"))


# -------------------------------------------------------------------------------- laws

numbers = st.lists(
    st.one_of(st.floats(-1e3, 1e3, width=32), st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-42])),
    max_size=40,
)


def assert_same(a: Partial, b: Partial, scale: float) -> None:
    counted = ("count", "nan", "inf", "zeros", "subnormals", "low", "high")
    assert [getattr(a, name) for name in counted] == [getattr(b, name) for name in counted]
    np.testing.assert_array_equal(a.histogram, b.histogram)
    assert a.mean == pytest.approx(b.mean, rel=1e-12, abs=1e-13 * scale)
    assert a.m2 == pytest.approx(b.m2, rel=1e-9, abs=1e-12 * scale**2)


@settings(max_examples=60)
@given(
    numbers, st.lists(st.integers(0, 40), max_size=4), st.sampled_from(WIDE), st.sampled_from([None, (-1.0, 0.0, 9.0)])
)
def test_merged_parts_are_the_whole(given_: list[float], ends: list[int], dtype: Any, edges: Any) -> None:
    array = np.array(given_, dtype)
    cuts = sorted({0, *(min(end, len(array)) for end in ends), len(array)})
    bins = Bins(edges)
    parts = [partial(array[a:b], bins) for a, b in itertools.pairwise(cuts)]
    scale = float(np.abs(np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)).sum()) + 1e-30
    assert_same(merged([partial(array[:0], bins), *parts]), partial(array, bins), scale)
    assert_same(merged([partial(array[:0], bins), *reversed(parts)]), partial(array, bins), scale)


@settings(max_examples=40)
@given(numbers, st.randoms(use_true_random=False), st.sampled_from(WIDE))
def test_the_order_of_elements_does_not_matter(given_: list[float], random: Any, dtype: Any) -> None:
    array = np.array(given_, dtype)
    shuffled = array[random.sample(range(len(array)), len(array))]
    a, b = partial(array, Bins()), partial(shuffled, Bins())
    scale = float(np.abs(np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)).sum()) + 1e-30
    assert_same(a, b, scale)
    if np.dtype(dtype).itemsize == 2:
        assert (a.mean, a.m2) == (b.mean, b.m2), "counts by bit pattern know no order at all"


@pytest.mark.parametrize("window", [1, 3, 64])
def test_windows_of_any_size(window: int) -> None:
    tensor = "2.self_attention.dense.weight"
    truth = load_file(GPT / "truth.safetensors")
    found = stats(ckptlab.open(GPT).full(stack=False)[tensor], window=window).sel(tensor=tensor)
    for state in ("master", "exp_avg_sq", "param"):
        assert_is(found.sel(state=state), truth[f"{state}/{tensor}"])


@pytest.mark.parametrize("block", [1, 3, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
def test_blocks_of_any_size(dtype: Any, block: int) -> None:
    array, bins = sample(dtype, 503), Bins()
    taken = accumulator(array.dtype, bins, block)
    with np.errstate(invalid="ignore"):
        taken.add(array)
        scale = float(np.abs(np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0)).sum()) + 1e-30
        assert_same(taken.result(), partial(array, bins), scale)


# -------------------------------------------------------------------------------- checkpoints


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3, STEPS], ids=lambda c: c.name)
def test_real_checkpoints_tensor_by_tensor(case: Path) -> None:
    ckpt = ckptlab.open(case)
    found = stats(ckpt)
    checked = 0
    for key, array in load_file(case / "truth.safetensors").items():
        state, name = key.split("/", 1)
        state = "param" if state in ("frozen", "buffer") else state
        if state in ckpt[name].states:
            assert_is(found.sel(tensor=name, state=state), array)
            checked += 1
    assert checked > 100
    absent = ~found["present"]
    assert (found["elements"].where(absent, 0) == 0).all()
    assert found["nan"].sum() == 0
    masters = [t.numel for t in ckpt.tensors.values() if "master" in t.states]
    assert found["elements"].sel(state="master").sum() == sum(masters)
    assert found["norm"].where(absent, drop=True).isnull().all()
    assert (found["dtype"].where(absent, "") == "").all()


def test_the_model_is_its_parameters_and_its_buffers_apart() -> None:
    found = stats(ZERO2, by="model").sel(state="param")
    buffers = [t for t in ckptlab.open(ZERO2).tensors.values() if t.kind == "buffer"]
    assert found["tensor"].values.tolist() == ["parameters", "buffers"]
    assert found["elements"].sel(tensor="buffers") == sum(t.numel for t in buffers)


def test_frozen_tensors_and_buffers_have_a_state_alone() -> None:
    found = stats(ZERO2)
    buffer = found.sel(tensor="seen")
    assert buffer["kind"] == "buffer"
    assert buffer["elements"].sel(state=["master", "exp_avg", "param"]).values.tolist() == [0, 0, 3]
    assert buffer["present"].sel(state=["master", "exp_avg", "param"]).values.tolist() == [False, False, True]
    frozen = found.isel(tensor=found["kind"].values == "frozen")
    assert frozen.sizes["tensor"] > 0
    assert not frozen["present"].sel(state="exp_avg").any()
    assert frozen["norm"].sel(state="param").notnull().all()


def test_coordinates_tell_where_a_tensor_stands() -> None:
    found = stats(GPT)
    one = found.sel(tensor=f"3.{QKV}")
    told = {name: one[name].item() for name in ("stack", "layer", "kind", "pp", "shape", "numel", "group", "layout")}
    assert told == {
        "stack": QKV,
        "layer": 3,
        "kind": "parameter",
        "pp": 0,
        "shape": "48 × 16",
        "numel": 768,
        "group": "decay",
        "layout": "(tp out) in",
    }
    assert found.sel(tensor="6.weight")["layer"] == -1
    curve = found["norm"].sel(state="master").where(found["stack"] == QKV, drop=True)
    assert curve.sizes == {"tensor": 4}


def test_a_view_a_node_and_a_checkpoint_say_the_same() -> None:
    ckpt = ckptlab.open(GPT)
    whole = stats(ckpt)
    node = ckpt.full()[QKV].to_dataset()
    for view in (ckpt.full(), node, node[["master", "exp_avg"]].chunk({"layer": 1}), node.load()):
        found = stats(view)
        same = whole.sel(tensor=found["tensor"], state=found["state"])
        for name in ("elements", "norm", "mean", "std", "min", "max"):
            np.testing.assert_allclose(found[name], same[name], rtol=1e-12, atol=1e-18)
        assert found["layer"].equals(same["layer"])
    by_name = ckpt.full("exp_avg", stack=False)[f"3.{QKV}"]
    one = stats(by_name)
    assert (one["tensor"].item(), one["state"].item()) == (f"3.{QKV}", "exp_avg")
    assert one["norm"].item() == pytest.approx(whole["norm"].sel(tensor=f"3.{QKV}", state="exp_avg").item())


def test_part_of_a_view() -> None:
    array = ckptlab.open(GPT).full()[QKV].exp_avg
    part = array.sel(layer=4).isel(out=slice(3, 9)).transpose("in", "out")
    found = stats(part).squeeze()
    assert_is(found, part.values)
    assert (found["shape"], found["layer"]) == ("16 × 6", 4)


def test_layers_of_an_array_by_itself_are_a_row_each() -> None:
    array = ckptlab.open(GPT).full()[QKV].exp_avg
    found = stats(array)
    assert list(found.tensor.values) == [f"exp_avg (layer {i})" for i in (2, 3, 4, 5)]
    whole = stats(GPT)["norm"].sel(state="exp_avg", tensor=[f"{i}.{QKV}" for i in (2, 3, 4, 5)])
    np.testing.assert_allclose(found["norm"].sel(state="exp_avg"), whole, rtol=1e-12)
    assert stats(array, by="layer").sizes["layer"] == 4


def test_shards_have_a_dim_more_and_copies_a_row_each() -> None:
    shards = ckptlab.open(GPT).shards()
    found = stats(shards)
    assert found["norm"].dims == ("tensor", "tp", "state")
    for tp in range(2):
        array = np.asarray(shards[QKV].param.sel(layer=5, tp=tp).data)
        assert_is(found.sel(tensor=f"5.{QKV}", state="param", tp=tp), array)
    copies = [name for name in found["tensor"].values if "(pp 1)" in name]
    assert len(copies) == 2


def test_shards_of_unequal_width_are_taken_as_wide_as_they_are(tmp_path: Path) -> None:
    uneven = Layout("(tp out) in", sizes={"out": (3, 2)}).resolve((5, 4), Mesh(tp=2))
    whole = np.arange(1, 21, dtype=np.float32).reshape(5, 4)
    catalog = store(tmp_path, uneven, whole, False, 1)
    node = views.Shards(catalog).tree()["w"].to_dataset()
    for view in (node, node.load(), node[["master"]].isel(out=slice(None, None, -1)).isel(out=slice(None, None, -1))):
        found = stats(view).squeeze()
        assert found["elements"].values.tolist() == [12, 8]
        assert found["max"].values.tolist() == [12, 20]
        assert found["zeros"].values.tolist() == [0, 0]
    assert stats(catalog)["elements"].item() == 20


@pytest.mark.parametrize("by", ["layer", "stack", "kind", "model"])
def test_rows_of_several_tensors_are_all_their_elements_together(by: str) -> None:
    truth = load_file(GPT / "truth.safetensors")
    arrays = [truth[f"exp_avg/{layer}.{QKV}"].ravel() for layer in range(2, 6)]
    found = stats(GPT, by=by).sel(state="exp_avg")
    if by == "layer":
        assert found["norm"].dims == ("tensor", "layer")
        for layer, array in enumerate(arrays, 2):
            assert_is(found.sel(tensor=QKV, layer=layer), array)
        assert not found["present"].sel(tensor=QKV, layer=-1)
    elif by == "stack":
        assert_is(found.sel(tensor=QKV), np.concatenate(arrays))
    else:
        every = [a.ravel() for key, a in truth.items() if key.startswith("exp_avg/")]
        assert_is(found.sel(tensor="parameter" if by == "kind" else "parameters"), np.concatenate(every))


def test_states_are_chosen_and_what_there_is_not_is_named() -> None:
    assert stats(GPT, states=["exp_avg"])["state"].values.tolist() == ["exp_avg"]
    with pytest.raises(CheckpointError, match=r"no state 'fp23'.*exp_avg_sq"):
        stats(GPT, states=["fp23"])
    with pytest.raises(CheckpointError, match="expected one of tensor, layer"):
        stats(GPT, by="row")
    with pytest.raises(CheckpointError, match="ascending"):
        stats(GPT, histogram=[1.0, 0.0])
    with pytest.raises(CheckpointError, match="flat buffers hold many tensors"):
        stats(ckptlab.open(GPT).flat())


def test_a_row_for_every_rank_of_every_axis() -> None:
    """Whatever the axes are called; nothing is taken together that no name says."""
    mesh = ckptlab.Mesh(dp_replicate=1, shard0=2, shard1=3)
    whole = xr.DataArray(np.arange(24.0).reshape(4, 6), dims=("out", "in"), name="w")
    shards = ckptlab.split(whole, ckptlab.Layout("(shard0 out) (shard1 in)", dims=("out", "in")), mesh)
    found = stats(shards)
    assert dict(found.sizes) == {"tensor": 1, "shard0": 2, "shard1": 3, "tp": 1, "state": 1, "bin": found.sizes["bin"]}
    assert found["max"].squeeze().values.tolist() == [[7.0, 9.0, 11.0], [19.0, 21.0, 23.0]]
    assert found["elements"].sum() == 24
    assert found.isel(shard0=1).ckptlab.table is not None
    again = stats({"w": shards.isel(shard1=[1])})
    assert again["shard1"].values.tolist() == [1]
    assert again["max"].squeeze().values.tolist() == [9.0, 21.0]


@settings(max_examples=40)
@given(cut(), st.booleans(), st.integers(0, 9), st.sampled_from([np.float32, ml_dtypes.bfloat16]))
def test_every_element_once_however_the_tensor_is_cut(source: Cut, zero3: bool, before: int, dtype: Any) -> None:
    """Partly replicated, uneven, cyclic, padded: shards are read as they lie only where they make up the whole."""
    logical = (20, *source.shape[1:]) if source.shape[0] > 24 else source.shape
    whole = (np.arange(math.prod(source.shape)) % 113).reshape(source.shape).astype(dtype)
    with tempfile.TemporaryDirectory() as folder:
        catalog = store(Path(folder), replace(source, logical=logical), whole, zero3, before)
        found = stats(catalog).squeeze()
        assert_is(found, whole[: logical[0]])
        rows = rows_of(views.Shards(catalog).tree())
        assert all(isinstance(row.array, LazyArray) for row in rows), "read straight, not through xarray"
        for row, part in zip(rows, partials(rows), strict=True):
            shard = source.take(whole, source.coordinate(row.ranks))
            assert (part.count, part.high) == (shard.size, shard.astype(float).max(initial=-math.inf))


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3], ids=lambda c: c.name)
def test_each_byte_is_read_once(case: Path) -> None:
    ckpt = ckptlab.open(case)
    needed = [sum(d.itemsize for d in t.states.values()) * t.numel for t in ckpt.tensors.values()]
    with ckptlab.reading() as read:
        stats(ckpt)
    assert read.bytes == sum(needed)


def test_memory_stays_near_a_window(tmp_path: Path) -> None:
    import tracemalloc

    save_file({"w": np.zeros((1 << 12, 1 << 12), np.float32)}, tmp_path / "a.safetensors")
    ckpt = ckptlab.open(tmp_path / "a.safetensors")
    stats(xr.DataArray(np.zeros(3), dims="x"))
    tracemalloc.start()
    stats(ckpt)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 << 20, "of 64 MiB"


def test_dask_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    dask = pytest.importorskip("dask")
    node = ckptlab.open(GPT).full(dtype="float32")[QKV].to_dataset()
    called = []
    with dask.config.set(scheduler=lambda graph, keys, **_: called.append(1) or dask.get(graph, keys)):
        found = stats(node.chunk({"layer": 2, "out": 5}))
    assert called
    xr.testing.assert_allclose(found.drop_vars("dtype"), stats(node).drop_vars("dtype"))
    narrow = ckptlab.open(GPT).full("param")[QKV].to_dataset()
    plain = narrow.assign(param=narrow.param.copy(data=narrow.param.values))  # numpy's own, which nobody refuses
    xr.testing.assert_allclose(stats(plain.chunk({"layer": 1}))["mean"], stats(narrow)["mean"], rtol=1e-12)


def test_nothing_is_read_to_find_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = ckptlab.open(GPT)
    refuse_reading(monkeypatch)
    assert len(rows_of(ckpt)) == 4 * 52
    assert len(rows_of(ckpt.full())) == 4 * 52


# -------------------------------------------------------------------------------- spectra


@pytest.mark.parametrize("shape", [(60, 17), (17, 60), (40, 3, 5), (1, 9)])
@pytest.mark.parametrize("window", [7, 1 << 20])
def test_small_spectra_are_scipys(shape: tuple[int, ...], window: int) -> None:
    array = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    found = stats(xr.DataArray(array, dims=list("abc")[: len(shape)]), spectrum=8, window=window).squeeze()
    values = scipy.linalg.svdvals(array.reshape(shape[0], -1).astype(np.float64))
    top = found["singular_values"].values
    np.testing.assert_allclose(top[: len(values)], values[:8], rtol=1e-10)
    assert np.isnan(top[len(values) :]).all()
    assert found["stable_rank"].item() == pytest.approx((values**2).sum() / values[0] ** 2)
    share = values / values.sum()
    assert found["effective_rank"].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert found["spectrum_exact"]


def with_values(values: np.ndarray, rows: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    left = np.linalg.qr(rng.standard_normal((rows, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    return ((left * values) @ right).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    ("values", "first", "top", "rank"),
    [
        (np.arange(1, 601) ** -0.5, 1e-6, 1e-4, 0.01),
        (np.exp(-np.arange(600) / 30), 1e-6, 1e-6, 0.12),
        (None, 0.01, 0.02, 0.01),
    ],
    ids=["slow decay", "fast decay", "noise"],
)
def test_large_spectra_are_as_exact_as_documented(
    values: np.ndarray | None, first: float, top: float, rank: float, turned: bool
) -> None:
    noise = np.random.default_rng(0).standard_normal((900, 600)).astype(np.float32)
    array = noise if values is None else with_values(values, 900)
    true = scipy.linalg.svdvals(array.astype(np.float64))
    array = array.T if turned else array
    found = stats(xr.DataArray(array, dims=("a", "b")), spectrum=True, window=50_000).squeeze()
    assert not found["spectrum_exact"]
    near = found["singular_values"].values / true[:16] - 1
    assert abs(near[0]) < first
    assert np.abs(near).max() < top
    assert (near < 1e-6).all(), "a Ritz value is never larger than the true one"
    share = true / true.sum()
    assert found["effective_rank"].item() == pytest.approx(np.exp(-(share * np.log(share)).sum()), rel=rank)


def test_spectra_of_a_checkpoint() -> None:
    truth = load_file(GPT / "truth.safetensors")
    found = stats(GPT, spectrum=4, histogram=False)
    for state in ("master", "param"):
        array = truth[f"{state}/4.{QKV}"].astype(np.float64)
        top = found["singular_values"].sel(tensor=f"4.{QKV}", state=state)
        np.testing.assert_allclose(top, scipy.linalg.svdvals(array)[:4], rtol=1e-10)
    assert found["stable_rank"].sel(tensor="6.weight").isnull().all()
    assert "histogram" not in found
    with pytest.raises(CheckpointError, match="has no spectrum"):
        stats(GPT, spectrum=True, by="model")
    with reading() as read, pytest.raises(CheckpointError, match="or how many singular values, from 1"):
        stats(GPT, spectrum=-1)
    assert not read.bytes


@pytest.mark.parametrize("shape", [(20, 8), (700, 600)])
def test_a_matrix_of_zeros_has_rank_zero(shape: tuple[int, int]) -> None:
    found = stats(xr.DataArray(np.zeros(shape, np.float32), dims=("a", "b")), spectrum=True).squeeze()
    assert (found["stable_rank"], found["effective_rank"]) == (0, 0)
    assert (found["singular_values"].dropna("rank") == 0).all()


# -------------------------------------------------------------------------------- for people


@pytest.mark.slow
def test_the_table_and_its_html() -> None:
    found = stats(GPT)
    text = repr(found.ckptlab.table)
    assert "6.bias" not in text, "60 rows of 208"
    assert "… and 148 more rows" in text
    html = found.ckptlab.table._repr_html_()
    assert html.count("<svg") == 200
    assert "<script" not in html
    deep = stats(GPT, by="layer").ckptlab.table._repr_html_()
    assert "norm by layer" in deep
    assert "16 stacks, 4 layers" in deep
    assert "<td>-1</td>" not in deep
    assert "1 kind, 2 tp ranks" in stats(ckptlab.open(GPT).shards(), by="kind").ckptlab.table._repr_html_()
    hostile = stats(xr.DataArray(np.ones(3, np.float32), dims="x", name="<b>w</b>"))
    assert "<b>w" not in hostile.ckptlab.table._repr_html_()


@pytest.mark.slow
def test_the_command() -> None:
    shown = run("stats", GPT, "--by", "model", "--states", "master,exp_avg")
    assert (shown.exit_code, shown.stderr) == (0, "")
    assert shown.stdout.splitlines()[0].split()[:4] == ["tensor", "state", "elements", "norm"]
    assert len(shown.stdout.splitlines()) == 3
    told = json.loads(run("stats", GPT, "--shards", "--json").stdout)
    assert told["dims"] == ["tensor", "tp", "state"]
    first = told["rows"][0]
    assert sum(count for _, _, count in first["histogram"]) == first["elements"] == 896
    assert len(run("stats", STEPS, "--steps", "--by", "model").stdout.splitlines()) == 1 + 3 * (
        4 + 1
    )  # buffers have one state
    assert "update/weight" in run("stats", GPT, "--updates").stdout
    assert "  tp  " in run("stats", GPT, "--updates", "--shards").stdout
    assert "no state 'fp23'" in refused("stats", GPT, "--states", "fp23")


def test_accumulators_for_others() -> None:
    """What a health check can build on: one accumulator a tensor, merged as it likes."""
    taken = accumulator(np.dtype(ml_dtypes.bfloat16))
    taken.add(np.array([1, 2, math.nan], ml_dtypes.bfloat16))
    taken.add(np.array([3, math.inf], ml_dtypes.bfloat16))
    found = taken.result().merge(partial(np.array([6.0])))
    assert (found.count, found.nan, found.inf, found.finite, found.mean, found.low, found.high) == (6, 1, 1, 4, 3, 1, 6)
    assert found.std == np.std([1, 2, 3, 6])


def test_the_worst_and_the_plots() -> None:
    found = stats(GPT, states=["master", "exp_avg"])
    worst = found.ckptlab.worst("max", 3)
    sizes = abs(found["max"]).max("state")
    assert worst["tensor"].values.tolist() == sizes.sortby(sizes, ascending=False)["tensor"].values[:3].tolist()
    assert worst["norm"].equals(found["norm"].sel(tensor=worst["tensor"]))
    assert repr(worst.ckptlab.table).splitlines()[1].startswith(str(worst["tensor"].values[0]))
    assert stats(GPT, by="layer").ckptlab.worst("norm", 2).sizes["tensor"] == 2
    updates = ckptlab.updates(GPT)
    first = updates.ckptlab.worst("update_ratio")["update_ratio"]
    assert first[0] == updates["update_ratio"].max()
    with pytest.raises(CheckpointError, match="no figure 'dtype' of each tensor: there are elements"):
        found.ckptlab.worst("dtype")
    with pytest.raises(CheckpointError, match="it holds master"):
        _ = xr.Dataset({"master": ("x", [1.0])}).ckptlab.table
    pytest.importorskip("matplotlib")
    assert found.ckptlab.plot("histograms").axes
    with pytest.raises(CheckpointError, match="no plot is called .histogram.: expected one of histograms, norms"):
        found.ckptlab.plot("histogram")
