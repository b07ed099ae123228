"""No number that a view gives is silently wrong: narrow dtypes against float64 on the same values."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from compare import GPT
from helpers.arrays import OPERATIONS

from ckptlab import views
from ckptlab.arrays.dtypes import is_narrow
from ckptlab.arrays.duck import Duck
from ckptlab.catalog import ALONE, Catalog, Extents, Fragment, Tensor, whole_placements
from ckptlab.formats import read
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored, row_major_strides

NARROW = [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def node(folder: Path, values: np.ndarray, dtype: str | None = "float32") -> xr.DataArray:
    """Three layers "0.w" … "2.w" as a view shows them in a dtype (None: the stored one): (layer, out, in)."""
    layout, tensors, pieces = Layout("out in"), {}, {}
    for i, layer in enumerate(values):
        file = folder / f"{i}.bin"
        file.write_bytes(np.ascontiguousarray(layer).tobytes())
        stored = Stored(str(file), 0, layer.dtype, layer.shape, row_major_strides(layer.shape))
        states = {"param": layer.dtype}
        tensors[f"{i}.w"] = Tensor(f"{i}.w", layer.shape, layout, layout.resolve(layer.shape, Mesh()), "frozen", states)
        pieces[f"{i}.w", "param"] = {ALONE: (Fragment(0, stored),)}
    catalog = Catalog("", "test", Mesh(), tensors, whole_placements(tensors, pieces), Extents(pieces))
    return views.Full(catalog, dtype=dtype).tree()["w"].param


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


@pytest.mark.parametrize("dtype", NARROW, ids=lambda d: np.dtype(d).name)
def test_every_value_and_the_dtype_are_kept(dtype: type, tmp_path: Path) -> None:
    unsigned = np.uint8 if np.dtype(dtype).itemsize == 1 else np.uint16
    every = np.arange(np.iinfo(unsigned).max + 1, dtype=unsigned).view(dtype)
    numbers = np.stack([every.reshape(2, -1)] * 3)
    lazy = node(tmp_path, numbers, dtype=None)
    assert lazy.dtype == lazy.values.dtype == dtype
    assert lazy.isel({"in": slice(None, None, -1)}).values.tobytes() == numbers[..., ::-1].tobytes()
    np.testing.assert_array_equal(node(tmp_path, numbers).values, numbers.astype(np.float32))


class TestInTheStoredDtype:
    """Right, or an error: never 256 for the sum of a million ones."""

    @pytest.fixture
    def ones(self, tmp_path: Path) -> xr.DataArray:
        return node(tmp_path, np.ones((3, 1024, 1024), ml_dtypes.bfloat16), dtype=None)

    def test_sums_are_right(self, ones: xr.DataArray) -> None:
        assert ones.sum(skipna=False).item() == 3 * 2**20
        assert ones.mean(skipna=False).item() == 1
        assert ones.std(["out", "in"], skipna=False).values.tolist() == [0, 0, 0]
        assert (ones * ones).sum("in", skipna=False).values.tolist() == [[1024] * 1024] * 3
        assert ones.cumsum("in", skipna=False).values[0, 0, -1] == 1024
        assert np.linalg.norm(ones.isel(layer=0)) == 1024
        assert ones.astype("float32").sum().item() == 3 * 2**20

    def test_what_keeps_the_elements_keeps_the_dtype(self, ones: xr.DataArray) -> None:
        loaded = ones.copy().load()
        joined = xr.concat([loaded, loaded], "layer")
        for same in (ones + ones, abs(ones), ones.transpose("in", "layer", "out"), joined):
            assert same.dtype == ml_dtypes.bfloat16
            assert isinstance(same.data, Duck)
        assert pickle.loads(pickle.dumps(ones)).dtype == ml_dtypes.bfloat16
        assert "bfloat16" in repr(ones)
        assert "bfloat16" in ones._repr_html_()

    def test_default_reductions_are_right_too(self, ones: xr.DataArray) -> None:
        assert ones.sum().item() == 3 * 2**20
        assert ones.mean().item() == 1
        assert np.sum(ones) == 3 * 2**20
        assert not ones.isnull().any()

    def test_what_is_missing_is_nan(self, ones: xr.DataArray) -> None:
        for operation in (lambda: ones.where(ones > 1), lambda: ones.shift(out=1), lambda: ones.pad(out=1)):
            assert operation().isnull().any()
        assert ones.where(ones > 1, 0).sum() == 0

    def test_dask_is_refused_with_the_way_out(self, ones: xr.DataArray) -> None:
        pytest.importorskip("dask")
        with pytest.raises(TypeError, match='dtype="float32"'):
            ones.chunk({"layer": 1}).sum(skipna=False).compute()

    def test_float16_does_not_overflow(self, tmp_path: Path) -> None:
        lazy = node(tmp_path, np.full((3, 10, 10), 60000, np.float16), dtype=None)
        assert (lazy.sum().item(), lazy.sum(skipna=False).item(), lazy.mean().item()) == (1.8e7, 1.8e7, 60000)

    def test_a_tree_has_them_in_its_statistics(self) -> None:
        found, wide = (views.Full(read(GPT), dtype=d).tree().std(["out", "in"]) for d in (None, "float32"))
        curves = [tree["mlp.dense_h_to_4h.weight"].param.values for tree in (found, wide)]
        np.testing.assert_allclose(*curves, rtol=1e-6)


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


@pytest.mark.slow
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
    assert "float32" in lazy._repr_html_()
    assert lazy.to_series().sum() == pytest.approx(float(lazy.sum()), rel=1e-5)
