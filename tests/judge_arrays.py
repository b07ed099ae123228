"""Functions of the array API, and numpy's besides, on our arrays of every library and dtype, with float64 as judge.

`python tests/judge_arrays.py [numpy|torch|jax …]` prints how many calls were right, refused and wrong, function by
function. The array API's own suite (data-apis/array-api-tests) is on no package index; this goes through the same
functions, on dtypes that it does not know too. An answer is right if it is that of numpy on numbers wide enough,
rounded to the dtype of the answer; an error that says what to do instead is a refusal.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.dtypes import is_narrow
from ckptlab.arrays.duck import Duck, duck

DTYPES: dict[str, np.dtype] = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float32", "float64"),
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    )
}
SHAPES = ((), (3,), (2, 3), (2, 1, 4), (0, 3))
WAYS = (
    ".to_numpy()",
    ".astype(",
    "1 / array",
    "write a = a + b",
    "backend=",
    "open the view with",
    "must be non-empty",
)

Call = Callable[..., Any]

UNARY = """
abs acos acosh asin asinh atan atanh ceil conj cos cosh exp expm1 floor isfinite isinf isnan log log1p log2
log10 logical_not negative positive real reciprocal round sign signbit sin sinh sqrt square tan tanh trunc
invert nan_to_num exp2 cbrt rint fabs deg2rad
"""
BINARY = """
add atan2 bitwise_and bitwise_or bitwise_xor left_shift right_shift copysign divide equal floor_divide greater
greater_equal hypot less less_equal logaddexp logical_and logical_or logical_xor maximum minimum multiply
nextafter not_equal pow remainder subtract fmax fmin fmod divmod float_power heaviside
"""
REDUCING = """
sum prod max min mean std var all any argmax argmin count_nonzero nansum nanmean nanmax nanmin nanstd nanvar
nanprod median nanmedian nanargmax nanargmin ptp
"""
ALONG = """
cumsum cumprod cumulative_sum cumulative_prod sort diff flip nancumsum nancumprod gradient
"""
OTHERS: dict[str, Call] = {
    "astype float32": lambda x: x.astype(np.float32),
    "astype float64": lambda x: x.astype(np.float64),
    "argsort": lambda x: np.argsort(x, stable=True) if x.ndim else x,
    "broadcast_to": lambda x: np.broadcast_to(x, (2, *x.shape)),
    "broadcast_arrays": lambda x: np.broadcast_arrays(x, x[None])[0],
    "clip": lambda x: np.clip(x, 0, 2),
    "concat": lambda x: np.concat([x[None], x[None]]),
    "expand_dims": lambda x: np.expand_dims(x, 0),
    "flip": np.flip,
    "full_like": lambda x: np.full_like(x, 1),
    "isin": lambda x: np.isin(x, [1, 2]),
    "matmul": lambda x: np.matmul(x[..., None, :], x[..., :, None]) if x.ndim else x,
    "matrix_transpose": lambda x: np.matrix_transpose(x) if x.ndim > 1 else x,
    "moveaxis": lambda x: np.moveaxis(x, 0, -1) if x.ndim else x,
    "nonzero": lambda x: np.nonzero(x) if x.ndim else x,
    "ones_like": np.ones_like,
    "outer": lambda x: np.linalg.outer(x, x) if x.ndim == 1 else x,
    "pad": lambda x: np.pad(x, 1),
    "permute_dims": lambda x: np.permute_dims(x, tuple(reversed(range(x.ndim)))),
    "quantile": lambda x: np.quantile(x, 0.3) if x.size else x,
    "repeat": lambda x: np.repeat(x, 2),
    "reshape": lambda x: np.reshape(x, (-1,)) if x.size else x,
    "roll": lambda x: np.roll(x, 1),
    "searchsorted": lambda x: np.searchsorted(np.sort(x), x) if x.ndim == 1 else x,
    "squeeze": np.squeeze,
    "stack": lambda x: np.stack([x, x]),
    "take": lambda x: np.take(x, np.array([0, -1])) if x.size else x,
    "take_along_axis": lambda x: np.take_along_axis(x, np.argsort(x, axis=-1), axis=-1) if x.ndim else x,
    "tensordot": lambda x: np.tensordot(x, x, axes=x.ndim),
    "tile": lambda x: np.tile(x, 2),
    "trace": lambda x: np.trace(x) if x.ndim == 2 else x,
    "tril": lambda x: np.tril(x) if x.ndim > 1 else x,
    "triu": lambda x: np.triu(x) if x.ndim > 1 else x,
    "unique_values": lambda x: np.sort(np.unique_values(x)),
    "unstack": lambda x: np.unstack(x) if x.ndim else x,
    "vecdot": lambda x: np.vecdot(x, x) if x.ndim else x,
    "vector_norm": np.linalg.vector_norm,
    "where": lambda x: np.where(x > 0, x, x),
    "zeros_like": np.zeros_like,
    "[…]": lambda x: x[..., ::-1] if x.ndim else x,
    "[mask]": lambda x: x[x > 0],
    "[places]": lambda x: x[[0, -1]] if x.ndim and x.size else x,
    "-x + 2 * x ** 2": lambda x: -x + 2 * x**2,
    "x == x": lambda x: x == x,
    "x.sum()": lambda x: x.sum(),
    "x.mean()": lambda x: x.mean(),
}


@dataclass
class Verdicts:
    """Function → how many calls were right and refused, and what was wrong."""

    right: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    reasons: dict[str, set[str]] = field(default_factory=dict)
    wrong: dict[str, list[str]] = field(default_factory=dict)


def along(function: Call, **options: Any) -> Call:
    """A function along an axis, where there is one: the array API leaves open what it makes of 0 dims."""
    return lambda x: function(x, **options) if x.ndim else x


def calls() -> Iterator[tuple[str, Call, int]]:
    """(name, function, arguments) of everything that is tried."""
    for names, count in ((UNARY, 1), (BINARY, 2), (REDUCING, 1)):
        yield from ((name, getattr(np, name), count) for name in names.split())
    for name in REDUCING.split():
        yield f"{name} axis=0", along(getattr(np, name), axis=0), 1
        yield f"{name} axis=-1, keepdims", along(getattr(np, name), axis=-1, keepdims=True), 1
    for name in ALONG.split():
        yield f"{name} along the last", along(getattr(np, name), axis=-1), 1
        yield f"{name} along the first", along(getattr(np, name), axis=0), 1
    yield from ((name, function, 1) for name, function in OTHERS.items())


def values(dtype: np.dtype, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Numbers of a dtype: small ones, and with fractions also 0, NaN and infinities, where it has them."""
    rng = np.random.default_rng(seed)
    if dtype.kind == "b":
        return rng.random(shape) > 0.5
    if dtype.kind in "iu" and not is_narrow(dtype):
        low = 0 if dtype.kind == "u" else -5
        return rng.integers(low, 7, shape).astype(dtype)
    found = np.asarray(rng.normal(size=shape) * 2)
    if seed % 2 and found.size > 1:
        flat = found.reshape(-1)
        flat[rng.integers(found.size)] = np.nan
        flat[rng.integers(found.size)] = 0.0
        if seed % 3 == 0:
            flat[rng.integers(found.size)] = np.inf
    return found.astype(dtype)


def judge(
    backend: Backend,
    dtypes: dict[str, np.dtype] = DTYPES,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    seeds: range = range(4),
) -> Verdicts:
    """All calls on a backend."""
    told = Verdicts()
    for kind, dtype in dtypes.items():
        for name, function, count in calls():
            for shape in shapes:
                for seed in seeds:
                    given = [values(dtype, shape, 10 * seed + k) for k in range(count)]
                    _try(told, backend, f"{name}({kind}{list(shape)})", name, function, given)
    return told


def _try(told: Verdicts, backend: Backend, label: str, name: str, function: Call, given: list[np.ndarray]) -> None:
    wide = [x.astype(np.float64) if is_narrow(x.dtype) else x for x in given]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        try:
            expected = function(*wide)
        except Exception:
            return  # numpy has no answer either
        try:
            held = [duck(backend.from_numpy(x.copy()), backend) for x in given]
            found = function(*held)
        except Exception as error:
            if any(way in str(error) for way in WAYS):
                told.refused[name] += 1
                told.reasons.setdefault(name, set()).add(str(error).splitlines()[0][:110])
            else:
                told.wrong.setdefault(name, []).append(f"{label}: {type(error).__name__}: {str(error)[:120]}")
            return
        problem = _differs(found, expected, given)
    if problem is None:
        told.right[name] += 1
    else:
        told.wrong.setdefault(name, []).append(f"{label}: {problem}")


def _differs(found: Any, expected: Any, given: list[np.ndarray]) -> str | None:
    """What is wrong with an answer; None if it is right."""
    if isinstance(expected, tuple | list):
        if len(found) != len(expected):
            return f"{len(found)} results, expected {len(expected)}"
        return next((p for f, e in zip(found, expected, strict=True) if (p := _differs(f, e, given))), None)
    mine = found.to_numpy() if isinstance(found, Duck) else np.asarray(found)
    theirs = np.asarray(expected)
    if mine.shape != theirs.shape:
        return f"shape {mine.shape}, expected {theirs.shape}"
    if not is_narrow(mine.dtype) and mine.dtype.kind != theirs.dtype.kind and mine.size:
        return f"dtype {mine.dtype}, expected {theirs.dtype}"
    if theirs.dtype.kind in "iub":
        return (
            None
            if np.array_equal(mine.astype(theirs.dtype), theirs)
            else f"{mine.tolist()}, expected {theirs.tolist()}"
        )
    told = mine.astype(np.float64)
    narrow = is_narrow(mine.dtype)
    wanted = theirs.astype(mine.dtype).astype(np.float64) if narrow else theirs.astype(np.float64)
    inputs = min((np.dtype(np.float32).itemsize if is_narrow(x.dtype) else x.dtype.itemsize) for x in given)
    close = float(ml_dtypes.finfo(mine.dtype).eps) * 2 if narrow else 3e-5 if inputs <= 4 else 1e-9
    with np.errstate(all="ignore"):
        scale = max(float(np.nanmax(np.abs(wanted), initial=0.0, where=np.isfinite(wanted))), 1.0)
        same = np.isclose(told, wanted, rtol=close, atol=close * (1.0 if narrow else scale), equal_nan=True)
    return None if same.all() else f"{told.tolist()}, expected {wanted.tolist()}"


def main(names: list[str]) -> int:
    """Print what was found; 1 if anything is wrong."""
    bad = 0
    for backend_name in names or ["numpy", "torch", "jax"]:
        told = judge(resolve(backend_name))
        wrong = sum(map(len, told.wrong.values()))
        bad += wrong
        print(f"{backend_name}: {told.right.total():,} right, {told.refused.total():,} refused, {wrong:,} wrong")
        for name, reasons in sorted(told.reasons.items()):
            print(f"  refused  {name} ({told.refused[name]}): {'; '.join(sorted(reasons)[:2])}")
        for name, problems in told.wrong.items():
            print(f"  WRONG    {name} ({len(problems)}): {problems[0]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
