"""What xarray is taught of our arrays: what is missing in narrow dtypes, elements at points, and the ways out of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr

import ckptlab

DATA = Path(__file__).parents[1] / "data"

BASE = np.random.default_rng(0).standard_normal((3, 4, 6))
COORDS = {"out": np.arange(4) * 2.0}
IDIOMS: dict[str, Callable[[xr.DataArray], xr.DataArray]] = {
    "where": lambda d: d.where(d > 0),
    "where, drop": lambda d: d.where(d.out > 2, drop=True),
    "shift": lambda d: d.shift({"in": 1}),
    "pad": lambda d: d.pad({"in": 1}),
    "reindex": lambda d: d.reindex(out=[0.0, 2.0, 8.0]),
    "unstack": lambda d: d.stack(z=("layer", "out")).isel(z=[0, 1, 5]).unstack("z"),
    "align": lambda d: xr.align(d, d.isel(out=[0, 1]), join="outer")[1],
    "combine_first": lambda d: d.isel(out=[0, 1]).combine_first(d),
    "corr": lambda d: xr.corr(d, d + 1, dim="in"),
    "cov": lambda d: xr.cov(d, d * 2, dim="in"),
    "idxmax": lambda d: d.idxmax("out"),
    "isel": lambda d: d.isel({"out": xr.DataArray([0, 1], dims="p"), "in": xr.DataArray([2, 3], dims="p")}),
}


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "torch", "jax"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("name", IDIOMS)
def test_what_is_missing_is_nan_and_all_else_as_in_float64(name: str, dtype: str, backend: str) -> None:
    pytest.importorskip(backend)
    held = BASE.astype(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    array = xr.DataArray(held, dims=("layer", "out", "in"), coords=COORDS)
    given, idiom = ckptlab.to(array, backend), IDIOMS[name]
    expected = idiom(array.copy(data=held.astype(np.float64)))
    if dtype.startswith("float8") and backend == "torch":  # of which torch compares and fills nothing
        try:
            found = idiom(given)
        except TypeError as error:
            assert "float32" in str(error)  # noqa: PT017
            return
    else:
        found = idiom(given)
    assert found.dims == expected.dims
    wide = 0.1 if dtype.startswith("float8") else 1e-2
    np.testing.assert_allclose(np.asarray(found.values).astype(np.float64), expected.values, rtol=wide, atol=wide)


def test_a_view_that_is_not_read_yet_takes_them_too() -> None:
    array: Any = ckptlab.open(DATA / "gpt_tp2_pp2_dp2").full()["mlp.dense_h_to_4h.weight"].param
    shown = array.where(array > 0)
    assert int(shown.isnull().sum()) == int((array <= 0).sum()) > 0


BACKENDS = ("numpy", "torch", "jax")
NARROW = ("float16", "bfloat16", "float8_e4m3fn")
NAME = "mlp.dense_h_to_4h.weight"


def ones(backend: str, dtype: str) -> xr.DataArray:
    """So many that they do not add up in their own few bits."""
    pytest.importorskip(backend)
    held = np.ones((300, 300), np.dtype(getattr(ml_dtypes, dtype, dtype)))
    return ckptlab.to(xr.DataArray(held, dims=("out", "in"), name="w"), backend)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_leaves_for_pandas_and_masked_arrays_adds_up(backend: str, dtype: str) -> None:
    array = ones(backend, dtype)
    columns = array.to_dataframe()["w"], array.to_dataset().to_dataframe()["w"], array.to_series()
    assert [float(column.sum()) for column in columns] == [90_000.0] * 3
    assert float(array.to_pandas().to_numpy().sum()) == 90_000
    assert float(array.to_masked_array().sum()) == 90_000


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_of_a_dataset_and_a_tree_leave_no_narrow_variable_out(backend: str, dtype: str) -> None:
    array = ones(backend, dtype)
    held = array.to_dataset().assign(text=("out", ["a"] * 300), whole=("in", np.arange(300)))
    assert {name: float(x) for name, x in held.mean().data_vars.items()} == {"w": 1.0, "whole": 149.5}
    assert set(held.sum("out").data_vars) == {"w", "whole"}
    grouped: Any = held.assign_coords(half=("out", [0, 1] * 150)).groupby("half").sum()
    np.testing.assert_array_equal(np.asarray(grouped.w.sum("in")), [45_000.0] * 2)
    node: Any = xr.DataTree.from_dict({"a": held}).mean()["a"]
    assert float(node.w) == 1.0


@pytest.mark.parametrize("backend", BACKENDS)
def test_files_of_xarrays_take_every_backend_and_refuse_dtypes_that_they_lack(backend: str, tmp_path: Path) -> None:
    pytest.importorskip(backend)
    pytest.importorskip("h5netcdf")
    pytest.importorskip("zarr")
    view: Any = ckptlab.open(DATA / "gpt_tp2_pp2_dp2").full(backend=backend)[NAME]
    for n, array in enumerate((view.master, view.master.isel(layer=[0, 2]).load())):
        array.to_netcdf(tmp_path / f"{n}.nc")
        array.to_zarr(tmp_path / f"{n}.zarr")
        for kept in (
            xr.open_dataarray(tmp_path / f"{n}.nc"),
            xr.open_dataarray(tmp_path / f"{n}.zarr", engine="zarr"),
        ):
            np.testing.assert_array_equal(kept.values, np.asarray(array.values))
            assert kept.attrs == array.attrs
    for n, array in enumerate((view.param, view.param.load())):
        for write in (array.to_netcdf, array.to_zarr):
            with pytest.raises(TypeError, match=r"netCDF and zarr have no bfloat16: ckptlab.save_view\(view, path\)"):
                write(tmp_path / f"{n}{write.__name__}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state", ["master", "param"])
def test_chunks_of_what_dask_would_add_up_wrongly_are_refused_at_once(state: str, backend: str) -> None:
    pytest.importorskip(backend)
    pytest.importorskip("dask")
    tree: Any = ckptlab.open(DATA / "gpt_tp2_pp2_dp2").full(state, backend=backend)
    array = tree[NAME][state]
    right = backend == "numpy" and state == "master"
    for cut in (array.chunk, array.isel(layer=[0, 1]).chunk, array.load().chunk, tree.chunk):
        if right:
            cut()
        else:
            with pytest.raises(TypeError, match=r'dask w.*: open the view with (dtype="float32"|backend="numpy")$'):
                cut()
    if right:
        assert float(array.chunk({"layer": 1}).sum()) == pytest.approx(float(array.sum()), rel=1e-5)


def test_engine_and_chunks_of_bfloat16() -> None:
    pytest.importorskip("dask")
    path = str(DATA / "gpt_tp2_pp2_dp2")
    with pytest.raises(TypeError, match='dask would add up bfloat16 in its own few bits: open the view with dtype="fl'):
        xr.open_dataset(path, engine="ckptlab", group=NAME, chunks={})
    wide = xr.open_dataset(path, engine="ckptlab", group=NAME, chunks={}, dtype="float32")
    assert wide.param.chunks[0] == (1,) * wide.sizes["layer"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_plots_show_narrow_dtypes(backend: str, dtype: str) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    array = ones(backend, dtype)
    mesh: Any = array.plot()
    assert mesh.get_array().dtype == np.float32
    assert float(mesh.get_array().mean()) == 1
    [line] = array.isel(out=0).plot()
    assert float(line.get_ydata().sum()) == 300
    both = xr.Dataset({"a": array, "b": array})
    both.plot.scatter(x="a", y="b")
    pyplot.close("all")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("backend", ["numpy", "torch"])
def test_what_is_added_to_in_place_is_changed_in_place(backend: str, dtype: str) -> None:
    array = ones(backend, dtype)
    same = array.data
    array += 1
    assert array.data is same
    assert array.dtype == dtype
    assert float(array.sum()) == 180_000
    assert array.real.identical(array)
    assert float(array.imag.sum()) == 0
    if backend == "torch" and dtype == "float32":
        with pytest.raises(TypeError, match=r"^divide makes float32 .300, 300., for which uint8 .* no room: write a ="):
            np.divide(array.data, array.data, out=ckptlab.to(array.astype("uint8"), "torch").data)


def test_jax_arrays_are_changed_nowhere_and_rolled_where_they_can_be() -> None:
    array = ones("jax", "bfloat16")
    with pytest.raises(TypeError, match="jax arrays cannot be written to: make a new one"):
        array += 1
    assert float(array.pad({"in": 1}, mode="mean").sum()) == 300 * 302
    for backend in ("numpy", "torch"):
        rolled = ones(backend, "bfloat16").rolling({"in": 2})
        assert float(rolled.max().sum()) == float(rolled.mean().sum()) == 300 * 299


def test_what_has_no_nan_is_refused_and_others_are_as_ever() -> None:
    narrow = ckptlab.to(xr.DataArray(np.zeros(3, ml_dtypes.float4_e2m1fn), dims="x"), "numpy")
    with pytest.raises(TypeError, match="has no NaN for what is missing: say what stands there"):
        narrow.shift(x=1)
    assert xr.DataArray(np.arange(3), dims="x").shift(x=1).dtype == np.float64


def test_what_is_moved_to_numpy_has_right_sums() -> None:
    ones = xr.DataArray(np.ones(1 << 12, ml_dtypes.bfloat16), dims="x")
    assert float(ckptlab.to(ones, "numpy").sum()) == 4096
    assert ckptlab.to(ones, "numpy").identical(ckptlab.to(ones, "numpy"))
