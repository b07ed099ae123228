"""What xarray is taught of our arrays: what is missing in narrow dtypes, and elements at points."""

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


def test_what_has_no_nan_is_refused_and_others_are_as_ever() -> None:
    narrow = ckptlab.to(xr.DataArray(np.zeros(3, ml_dtypes.float4_e2m1fn), dims="x"), "numpy")
    with pytest.raises(TypeError, match="has no NaN for what is missing: say what stands there"):
        narrow.shift(x=1)
    assert xr.DataArray(np.arange(3), dims="x").shift(x=1).dtype == np.float64


def test_what_is_moved_to_numpy_has_right_sums() -> None:
    ones = xr.DataArray(np.ones(1 << 12, ml_dtypes.bfloat16), dims="x")
    assert float(ckptlab.to(ones, "numpy").sum()) == 4096
    assert ckptlab.to(ones, "numpy").identical(ckptlab.to(ones, "numpy"))
