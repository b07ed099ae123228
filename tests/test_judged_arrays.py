"""No answer of our arrays is wrong: see judge_arrays.py, which tries all dtypes and more numbers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from judge_arrays import DTYPES, judge

from ckptlab.arrays.backends import resolve
from ckptlab.arrays.duck import duck

SOME = ("bfloat16", "float8_e4m3fn", "float32", "bool", "int8", "int64", "uint8", "uint64")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_answers_are_right_or_refused(name: str) -> None:
    told = judge(resolve(name), {kind: DTYPES[kind] for kind in SOME}, ((), (3,), (2, 3)), range(2))
    assert told.wrong == {}
    assert told.right.total() > 4_000
    assert name == "torch" or not told.refused


def test_the_judge_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 computed in its own few bits."""
    monkeypatch.setattr("ckptlab.arrays.duck.is_narrow", lambda dtype: False)
    assert "gradient along the last" in judge(resolve(), {"bfloat16": DTYPES["bfloat16"]}, ((3,),), range(1)).wrong


def test_numbers_of_torch_are_lines_where_numpys_are() -> None:
    torch = resolve("torch")
    one = duck(torch.from_numpy(np.float32(2)), torch)
    assert np.cumsum(one).shape == np.argsort(one).shape == (1,)
    many = duck(torch.from_numpy(np.array([[1, 2], [3, 250]], np.uint8)), torch)
    assert many.sum().dtype == np.uint64
    assert np.take(many, np.array([0, -1])).tolist() == [1, 250]
    assert np.count_nonzero(many, axis=0, keepdims=True).shape == (1, 2)
    assert np.isin(many, [1, 250]).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize("kind", ["float8_e5m2", "bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", ["exp2", "log2", "log10"])
def test_what_jax_multiplies_by_constants_is_rounded_once(name: str, kind: str) -> None:
    jax = resolve("jax", "cpu")
    values = np.array([3, 1.5, 5, 0.75, 7]).astype(DTYPES[kind])
    found = getattr(np, name)(duck(jax.from_numpy(values), jax))
    wanted = getattr(np, name)(values.astype(np.float64))
    assert found.dtype == values.dtype
    eps = float(ml_dtypes.finfo(values.dtype).eps)
    assert np.allclose(found.to_numpy().astype(np.float64), wanted, rtol=eps / 2 + 1e-6, atol=0)
