"""No number that a view gives is silently wrong: narrow dtypes against float64 on the same values."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xarray as xr

from ckptlab import views
from ckptlab.arrays.narrow import is_narrow, shown
from ckptlab.catalog import Catalog, Fragment, Tensor
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored, row_major_strides

NARROW = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def node(folder: Path, values: np.ndarray) -> xr.DataArray:
    """Three layers "0.w" … "2.w" as a view shows them: (layer, out, in)."""
    layout, tensors, pieces = Layout("out in"), {}, {}
    for i, layer in enumerate(values):
        file = folder / f"{i}.bin"
        file.write_bytes(np.ascontiguousarray(layer).tobytes())
        stored = Stored(str(file), 0, layer.dtype, layer.shape, row_major_strides(layer.shape))
        states = {"module": layer.dtype}
        tensors[f"{i}.w"] = Tensor(f"{i}.w", layer.shape, layout, layout.resolve(layer.shape, Mesh()), "frozen", states)
        pieces[f"{i}.w", "module"] = {(0, 0): (Fragment(0, stored),)}
    catalog = Catalog("", "deepspeed", Mesh(), 1, tensors, pieces=pieces)
    return views.full(catalog)["w"].module


@pytest.fixture(params=NARROW, ids=lambda d: np.dtype(d).name)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[xr.DataArray, xr.DataArray]:
    """What a view shows, and the same values in float64."""
    values = (np.random.default_rng(0).random((3, 40, 50)) + 0.5).astype(request.param)
    values[1, 3, 4] = np.nan
    lazy = node(tmp_path, values)
    return lazy, lazy.copy(data=values.astype(np.float64))


def test_which_dtypes_are_narrow() -> None:
    assert all(is_narrow(d) for d in NARROW)
    assert not any(is_narrow(d) for d in (np.float32, np.float64, np.int8, np.uint16, bool, np.int64, "V2", "S1"))
    assert (shown(ml_dtypes.bfloat16), shown(np.int16)) == (np.float32, np.int16)


@pytest.mark.parametrize("dtype", NARROW, ids=lambda d: np.dtype(d).name)
def test_every_value_is_kept_and_given_back(dtype: type, tmp_path: Path) -> None:
    unsigned = np.uint8 if np.dtype(dtype).itemsize == 1 else np.uint16
    every = np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned).view(dtype)
    numbers = every[~np.isnan(every.astype(np.float32))]
    numbers = np.stack([numbers.reshape(2, -1)] * 3)
    lazy = node(tmp_path, numbers)
    assert lazy.dtype == np.float32
    back = lazy.isel({"in": slice(None, None, -1)}).astype(lazy.stored_dtype)
    assert back.values.tobytes() == numbers[..., ::-1].tobytes()


def test_the_sum_of_a_million_ones(tmp_path: Path) -> None:
    ones = np.ones((3, 1024, 1024), ml_dtypes.bfloat16)
    assert ones[0].sum() == 256  # why this test exists
    lazy = node(tmp_path, ones)
    assert lazy.sum().item() == 3 * 2**20
    assert lazy.mean(skipna=False).item() == 1
    assert np.linalg.norm(lazy.isel(layer=0)) == 1024
    assert (lazy.dot(lazy, dim=["out", "in"]) == 2**20).all()


def test_float16_sums_do_not_overflow(tmp_path: Path) -> None:
    lazy = node(tmp_path, np.full((3, 10, 10), 60000, np.float16))
    assert (lazy.sum().item(), lazy.mean().item()) == (1.8e7, 60000)


REDUCTIONS = ["sum", "mean", "std", "var", "min", "max", "median", "prod", "cumsum", "count"]
OPERATIONS: dict[str, Callable[[xr.DataArray], xr.DataArray]] = {
    **{f"{r} of all": lambda a, r=r: getattr(a, r)() for r in REDUCTIONS},
    **{f"{r} of a dim": lambda a, r=r: getattr(a, r)("out") for r in REDUCTIONS},
    **{f"{r} with NaN": lambda a, r=r: getattr(a, r)("in", skipna=False) for r in REDUCTIONS[:-1]},
    "argmax": lambda a: a.argmax("in"),
    "quantile": lambda a: a.quantile([0.1, 0.5], "in"),
    "isnull": lambda a: a.isnull(),
    "where": lambda a: a.where(a > 1),
    "fillna": lambda a: a.fillna(7),
    "groupby": lambda a: a.groupby("pp").mean(),
    "weighted": lambda a: a.weighted(xr.DataArray([1.0, 2, 3], dims="layer")).mean("layer"),
    "coarsen": lambda a: a.coarsen(out=4).mean(),
    "rolling": lambda a: a.rolling(out=3).mean(),
    "transpose": lambda a: a.transpose("in", "layer", "out"),
    "stack": lambda a: a.stack(place=("out", "in")).unstack("place"),
    "concat": lambda a: xr.concat([a, a], "layer"),
    "reindex": lambda a: a.reindex(layer=[1, 5]),
    "shift": lambda a: a.shift(out=1),
    "arithmetic": lambda a: (a * 2 - a.mean()) / 3 + abs(a) ** 2,
    "einsum": lambda a: xr.dot(a.fillna(0), a.fillna(0), dim="in"),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_those_of_float64(operation: str, pair: tuple[xr.DataArray, xr.DataArray]) -> None:
    compute = OPERATIONS[operation]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a prod may overflow
        found, expected = (compute(a.isel(out=slice(0, 20))) for a in pair)
    assert found.dims == expected.dims
    np.testing.assert_allclose(found.values, expected.values.astype(found.dtype), rtol=2e-5, atol=1e-5)


def test_equal_data_is_equal(pair: tuple[xr.DataArray, xr.DataArray]) -> None:
    lazy, wide = pair
    assert lazy.equals(lazy.copy(deep=True))
    assert lazy.identical(pickle.loads(pickle.dumps(lazy)))
    assert lazy.equals(wide)
    assert not lazy.equals(lazy + 1)


def test_dask_adds_up_in_float32(tmp_path: Path) -> None:
    pytest.importorskip("dask")
    chunked = node(tmp_path, np.ones((3, 1024, 1024), ml_dtypes.bfloat16)).chunk({"layer": 1})
    total = chunked.sum()
    assert (total.dtype, total.compute().item()) == (np.float32, 3 * 2**20)
    assert chunked.std().compute().item() == 0


def test_it_can_be_drawn_and_written(pair: tuple[xr.DataArray, xr.DataArray]) -> None:
    lazy, _ = pair
    assert "stored_dtype" in repr(lazy)
    assert "float32" in lazy._repr_html_()
    assert lazy.to_series().sum() == pytest.approx(float(lazy.sum()), rel=1e-5)
