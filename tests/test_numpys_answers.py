"""What other suites found wrong, kind by kind: an answer is numpy's, or there is none and the error says what to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from compare import GPT
from test_backends import backend, on  # noqa: F401  (the fixture)

import ckptlab
from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.duck import Duck, duck, namespace

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
X = np.arange(24, dtype=np.float32).reshape(2, 3, 4)


def held(backend: Backend, values: Any) -> Any:  # noqa: F811
    return duck(backend.from_numpy(np.array(values)), backend)


def answer(compute: Callable[..., Any], backend: Backend, *values: Any) -> Any:  # noqa: F811
    """The result as numpy's arrays; None where it is refused with a way out."""
    try:
        found = compute(*(held(backend, v) for v in values))
    except TypeError as e:
        if any(way in str(e) for way in ("to_numpy", "astype", "1 / array")):
            return None
        raise
    return [np.asarray(part) for part in (found if isinstance(found, tuple) else (found,))]


UNSIGNED = np.array([[2**63, 5], [3, 7]], np.uint64)
WHOLE = np.array([7, -7, 5]), np.array([2, 2, 0])
BOOLS = np.array([True, True, False, False]), np.array([True, False, True, False])
EXACT: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    **{f"{f.__name__}.reduce": (f.reduce, (X,)) for f in (np.maximum, np.minimum, np.add, np.multiply)},
    "logical_or.reduce": (np.logical_or.reduce, (X > 9,)),
    "add.accumulate": (np.add.accumulate, (X,)),
    "reduce of the last": (lambda x: np.maximum.reduce(x, axis=-1), (X,)),
    "reduce of all": (lambda x: np.maximum.reduce(x, axis=None), (X,)),
    "reduce of none": (np.maximum.reduce, (np.float32(3),)),
    "uint8 places": (lambda x, i: x[i], (X, np.array([1, 0], np.uint8))),
    "int16 places": (lambda x, i: x[:, i], (X, np.array([2, 0], np.int16))),
    "a mask": (lambda x, m: x[m], (X, X > 9)),
    "backwards in two dims": (lambda x: x[::-1, ::-2, 1], (X,)),
    "backwards beside places": (lambda x: x[::-1, :, [0, 2]], (X,)),
    "backwards behind a mask": (lambda x, m: x[m, ::-1], (X, X[..., 0] > 9)),
    "backwards behind an ellipsis": (lambda x: x[..., None, 5:0:-1], (X,)),
    "nothing backwards": (lambda x: x[0:2:-1], (X,)),
    "places apart": (lambda x: x[0, :, [1, 2]], (X,)),
    "places side by side": (lambda x: x[:, 0, [1, 2]], (X,)),
    "places and a new dim": (lambda x: x[1, None, :, [3, 0]], (X,)),
    "a place in an array": (lambda x, i: x[i, :, [1, 2]], (X, np.int64(1))),
    **{
        f"{f.__name__} of uint64": (lambda x, f=f: f(x, axis=0), (UNSIGNED,))
        for f in (np.sum, np.prod, np.cumsum, np.cumprod, np.nansum, np.nanprod, np.nancumsum, np.nancumprod)
    },
    "nancumsum": (np.nancumsum, (np.array([2**24, 1, 1]),)),
    "nancumprod": (np.nancumprod, (np.array([2**24 + 1, 3, 1]),)),
    "reciprocal": (np.reciprocal, (np.array([2, 1, -1]),)),
    "floor_divide": (np.floor_divide, WHOLE),
    "floor_divide of bool": (np.floor_divide, BOOLS),
    "divmod": (np.divmod, WHOLE),
    "remainder": (np.remainder, WHOLE),
    "mod of unequal dtypes": (np.mod, (np.array([7, -7, 5], np.int8), np.array([2, -2, 0], np.int64))),
    "floor_divide by a number": (lambda x: x // 0, (WHOLE[0],)),
    "floor_divide of a narrow number": (lambda x: x // 2, (np.array(7, np.int16),)),
    "signs of no sign": (lambda x: 1 / np.sign(x), (np.array([-0.0, 0.0, -3.0]),)),
    "signs of no quotient": (lambda x, y: 1 / (x // y), (np.array([-0.0, -0.0, 1.0]), np.array([2.0, -2.0, 2.0]))),
    "signs of no rest": (lambda x, y: 1 / (x % y), (np.array([-0.0, 0.0, 4.0]), np.array([2.0, -2.0, -2.0]))),
    **{
        f"{f.__name__} of int8": (f, (np.array([100, 100], np.int8),))
        for f in (np.cumsum, np.cumprod, np.nancumsum, np.nancumprod, np.cumulative_prod, np.cumulative_sum)
    },
    "shifts": (lambda x, y: (x << y, x >> y), (np.array([1, -3, 5], np.int8), np.array([2, 1, 7], np.int8))),
    "floor_divide of a number": (lambda x: 7 // x, (WHOLE[1],)),
    "floor_divide of floats": (np.floor_divide, (np.array([7.0, -7.0, 5.0, 0.0]), np.array([2.0, 2.0, 0.0, 0.0]))),
    "remainder of floats": (np.remainder, (np.array([7.0, -7.0, 5.0, 0.0]), np.array([2.0, 2.0, 0.0, 0.0]))),
    "divmod of bool": (np.divmod, BOOLS),
    "vector_norm": (np.linalg.vector_norm, (np.array([2**62, 2**62]).astype(np.float64),)),
    "searchsorted": (np.searchsorted, (np.array([1, 2, 3, np.nan]), np.array([3, np.nan, 1, 2.5]))),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", EXACT)
def test_the_answer_is_numpys_or_refused(kind: str, backend: Backend) -> None:  # noqa: F811
    compute, values = EXACT[kind]
    with np.errstate(all="ignore"):
        expected = compute(*values)
        found = answer(compute, backend, *values)
    if found is None:
        assert backend.name != "numpy" or kind == "reciprocal"
        return
    for mine, numpys in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        assert mine.shape == np.shape(numpys)
        assert mine.dtype == np.asarray(numpys).dtype
        np.testing.assert_array_equal(mine, numpys)


REFUSED = {"reciprocal": ("torch", "jax")}


@pytest.mark.slow
def test_what_is_refused_is_what_is_known(backend: Backend) -> None:  # noqa: F811
    for kind, (compute, values) in EXACT.items():
        with np.errstate(all="ignore"):
            assert (answer(compute, backend, *values) is None) == (backend.name in REFUSED.get(kind.split()[0], ())), (
                kind
            )


def test_norms_of_large_whole_numbers(backend: Backend) -> None:  # noqa: F811
    """Their squares overflow int64: jax's norm was 0."""
    for norm in (np.linalg.vector_norm, np.linalg.norm):
        found = answer(norm, backend, np.array([2**62, 2**62]))
        assert found is None or found[0] == pytest.approx(2**62 * 2**0.5)


@pytest.mark.parametrize("dtype", [BF16, FP8, np.dtype(np.float16)], ids=str)
def test_narrow_dtypes_with_nan(dtype: np.dtype, backend: Backend) -> None:  # noqa: F811
    """numpy compares ml_dtypes' numbers one by one, as if NaN had a place among them."""
    wide = np.array([[3, np.nan, 1], [0.5, 2, np.nan]])
    values, line = wide.astype(dtype), np.array([0.5, 1, 3, np.nan]).astype(dtype)
    computed: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (np.sort, (values,)),
        (lambda x: np.sort(x, axis=0), (values,)),
        (np.nan_to_num, (values,)),
        (lambda x: np.nan_to_num(x, nan=2.0), (values,)),
        (np.searchsorted, (line, values[0])),
    ]
    for compute, given in computed:
        expected = compute(*(v.astype(np.float64) for v in given))
        found = answer(compute, backend, *given)
        if found is None:
            assert compute in (np.sort, computed[1][0]), "torch has no sort of numpy's name"
            assert backend.name == "torch"
            continue
        assert found[0].dtype == dtype or expected.dtype == np.int64
        np.testing.assert_array_equal(found[0].astype(np.float64), expected)


def test_infinity_becomes_the_largest_number_of_its_own_dtype(backend: Backend) -> None:  # noqa: F811
    infinite = np.array([np.inf, -np.inf, 1]).astype(BF16)
    largest = float(ml_dtypes.finfo(BF16).max)
    [found] = answer(np.nan_to_num, backend, infinite)
    assert found.astype(np.float64).tolist() == [largest, -largest, 1]
    [found] = answer(lambda x: np.nan_to_num(x, posinf=7.0), backend, infinite)
    assert found.astype(np.float64).tolist() == [7, -largest, 1]


IDIOMS: dict[str, Callable[[xr.DataArray], Any]] = {
    "idxmax": lambda a: a.max(["out", "in"]).idxmax("layer"),
    "idxmin": lambda a: a.min(["out", "in"], skipna=False).idxmin("layer", skipna=False),
    "idxmax of many": lambda a: a.max("in").idxmax("layer"),
    "the layer that argmax names": lambda a: a.isel(layer=a.max(["out", "in"]).argmax("layer")),
    "argmax over several dims": lambda a: a.argmax(["out", "in"])["in"],
    "polyfit": lambda a: a.polyfit("layer", 1).polyfit_coefficients,
    "corr": lambda a: xr.corr(a, a**2, "in"),
    "cov": lambda a: xr.cov(a, a**2, ["in", "out"]),
    "conj": lambda a: a.conj(),
    "singular values": lambda a: xr.apply_ufunc(
        np.linalg.svd,
        a,
        input_core_dims=[["out", "in"]],
        output_core_dims=[["k"]],
        kwargs={"compute_uv": False},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("idiom", IDIOMS)
def test_what_one_asks_of_layers(idiom: str, backend: Backend) -> None:  # noqa: F811
    values = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    expected = IDIOMS[idiom](xr.DataArray(values, dims=("layer", "out", "in"), coords={"layer": [2, 5, 7]}))
    found = IDIOMS[idiom](on(backend, values, layer=[2, 5, 7]))
    assert found.dims == expected.dims
    np.testing.assert_allclose(found.values, expected.values, rtol=2e-5, atol=2e-6)


# ------------------------------------------------------------------------------------------------ to other libraries


@pytest.mark.parametrize("state", ["param", "master"])
def test_other_libraries_take_our_arrays(state: str, backend: Backend) -> None:  # noqa: F811
    import jax.numpy as jnp
    import torch

    name = "mlp.dense_h_to_4h.weight"
    array = ckptlab.open(GPT).full(state, backend=backend)[name][state].load()
    expected = array.values.tobytes()
    for take in (torch.from_dlpack, torch.as_tensor):
        found = take(array.data)
        assert (tuple(found.shape), found.dtype) == (
            array.shape,
            torch.bfloat16 if state == "param" else torch.float32,
        )
        assert found.cpu().view(torch.uint8).numpy().tobytes() == expected
    for take in (jnp.from_dlpack, jnp.asarray):
        assert np.asarray(take(array.data)).tobytes() == expected
    if backend.name == "torch":
        assert torch.from_dlpack(array.data).data_ptr() == array.data.array.data_ptr()  # not copied
    if state == "master" and backend.device.startswith("cpu"):
        assert np.from_dlpack(array.data).tobytes() == expected


# ------------------------------------------------------------------------------------------------ messages


def test_what_is_lazy_cannot_be_written_to(backend: Backend) -> None:  # noqa: F811
    lazy = ckptlab.open(GPT).full("master", backend=backend)["6.weight"].master
    with pytest.raises(TypeError, match=r"\.load\(\) it first"):
        lazy[0] = 5


def test_dask_is_refused_with_the_one_thing_to_change() -> None:
    pytest.importorskip("dask")
    ckpt = ckptlab.open(GPT)
    with pytest.raises(TypeError, match='not torch.s: open the view with backend="numpy"$'):
        ckpt.full("master", backend="torch")["6.weight"].master.load().chunk({"out": 4})
    with pytest.raises(TypeError, match='bfloat16 in its own few bits: open the view with dtype="float32"$'):
        ckpt.full("param")["mlp.dense_h_to_4h.weight"].param.load().chunk({"layer": 1})


def test_what_has_named_parts_is_ours_in_each(backend: Backend) -> None:  # noqa: F811
    """The parts were the library's own: torch's are tuples of a kind of its own, numpy's and jax's have names."""
    square = held(backend, X[0, :3, :3] + 9 * np.eye(3, dtype=np.float32))
    for found in (np.linalg.svd(square), np.linalg.eigh(square), np.linalg.qr(square), np.linalg.slogdet(square)):
        assert all(type(part) is type(square) or isinstance(part, np.generic) for part in found)
    q, r = np.linalg.qr(square)
    np.testing.assert_allclose(np.asarray(q @ r), np.asarray(square), rtol=1e-5)
    assert int(np.linalg.matrix_rank(square)) == 3
    assert np.unique_counts(square).counts.sum() == 9


@pytest.mark.parametrize("dtype", [BF16, np.dtype(np.float32)], ids=str)
def test_another_dtype_is_another_array(dtype: np.dtype, backend: Backend) -> None:  # noqa: F811
    """astype in the dtype that it has was the same memory: torch's .to()."""
    array = held(backend, X.astype(dtype))
    for copied in (array.astype(dtype), array.__array_namespace__().asarray(array, copy=True)):
        if backend.name != "jax":
            copied[0] = 7
        assert float(array[0, 0, 0]) == 0
    if isinstance(array, Duck):
        assert array.astype(dtype, copy=False) is array


def test_the_namespace_makes_arrays(backend: Backend) -> None:  # noqa: F811
    xp = namespace(backend)
    assert np.asarray(xp.arange(3)).tolist() == [0, 1, 2]
    assert xp.zeros((2, 3)).dtype == xp.eye(2).dtype == np.float64
    assert xp.full(2, 7, dtype=BF16).dtype == BF16
    assert xp.isdtype(xp.ones(1, dtype=BF16).dtype, (xp.int8, "real floating"))
    assert not xp.isdtype(np.dtype(np.int16), np.dtype(np.int8))
    assert xp.pi == np.pi
    assert xp.finfo(BF16).bits == xp.iinfo(xp.int16).bits == 16
    assert not xp.can_cast(xp.ones(1), np.dtype(np.float32))
    with pytest.raises(TypeError, match="moves an array to elsewhere"):
        xp.ones(1, device="elsewhere")
    with pytest.raises(AttributeError, match="has no function 'no_such'"):
        xp.no_such  # noqa: B018


def test_labelled_and_foreign_places(backend: Backend) -> None:  # noqa: F811
    """A Variable in a key, and places that the other byte order holds."""
    array = held(backend, X.astype(BF16))
    for places in (xr.Variable("points", [1, 0]), np.array([1, 0], ">i4")):
        assert np.asarray(array[places]).astype(np.float32).tolist() == X[[1, 0]].tolist()


def test_places_without_a_kernel_are_refused() -> None:
    array = held(resolve("torch"), np.arange(4, dtype=np.uint32))
    with pytest.raises(TypeError, match=r"uint32 on torch: .* not implemented .*; .to_numpy\(\) first"):
        array[array.to_numpy() > 1] = 0


def test_fp8_steps_backwards(backend: Backend) -> None:  # noqa: F811
    array = held(backend, X.astype(FP8))
    assert np.asarray(array[::-1, ::-2]).tobytes() == X.astype(FP8)[::-1, ::-2].tobytes()


def test_numbers_that_python_takes(backend: Backend) -> None:  # noqa: F811
    assert [10, 20, 30][held(backend, np.int64(1))] == 20
    assert complex(held(backend, np.float32(2))) == 2
    assert held(backend, X.astype(BF16)).mT.shape == (2, 4, 3)
