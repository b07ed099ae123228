"""Three backends, one behaviour: the same bits, labels that stay, numbers that are right or an error with a way out."""

from __future__ import annotations

import importlib
import math
import pickle
import re
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import xarray as xr
from compare import GPT, ZERO2, ZERO3
from devices import BACKENDS, NAMES, spoken
from helpers.arrays import OPERATIONS

import ckptlab
from ckptlab.arrays import backends
from ckptlab.arrays.backends import Backend, resolve
from ckptlab.arrays.backends.numpy import NumpyBackend
from ckptlab.arrays.dtypes import is_narrow
from ckptlab.arrays.duck import Duck, duck
from ckptlab.arrays.taught import teach
from ckptlab.errors import BackendError

DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]
DTYPES += [np.int64, np.int32, np.uint8, np.bool_]
FLOATS = DTYPES[:5]

teach()  # as what gives arrays to users does


@pytest.fixture(params=BACKENDS, ids=spoken)
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.param
    return found


def on(
    backend: Backend, values: np.ndarray, dims: Sequence[str] = ("layer", "out", "in"), **coords: Any
) -> xr.DataArray:
    return xr.DataArray(duck(backend.from_numpy(values), backend), dims=dims, coords=coords)


# ------------------------------------------------------------------------------------------------ resolving


def test_one_backend_however_it_is_asked_for() -> None:
    assert resolve() is resolve("numpy") is resolve(None, "cpu")
    assert resolve("torch") is resolve("torch", "cpu") is resolve(resolve("torch"))
    assert pickle.loads(pickle.dumps(resolve("torch"))) is resolve("torch")


@pytest.mark.parametrize(
    ("name", "device", "says"),
    [
        ("tensorflow", None, "expected one of numpy, torch, jax"),
        ("numpy", "cuda", "for that take torch or jax"),
        ("torch", "nowhere", "it has cpu"),
        ("jax", "nowhere:7", "it has .*cpu:0"),
    ],
)
def test_what_is_not_there_is_refused_with_what_is(name: str, device: str | None, says: str) -> None:
    with pytest.raises(BackendError, match=says):
        resolve(name, device)


def test_a_library_that_is_missing_is_named_with_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name="torch")

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(backends.BACKENDS, "_own", {"torch": "ckptlab.arrays.backends.torch:TorchBackend"})
    with pytest.raises(BackendError, match=r"needs torch.*pip install torch"):
        resolve("torch", "meta")


def test_an_installed_package_may_add_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(NumpyBackend):
        name = "mine"

    monkeypatch.setattr(sys.modules[__name__], "Mine", Mine, raising=False)
    entries = EntryPoints([EntryPoint("mine", f"{__name__}:Mine", backends.BACKENDS.group)])
    monkeypatch.setattr(backends.BACKENDS, "_installed", entries)
    assert backends.BACKENDS.names() == ("numpy", "torch", "jax", "mine")
    found = ckptlab.open(GPT).full("master", backend="mine")["6.weight"].master
    assert found.values.tobytes() == ckptlab.open(GPT).full("master")["6.weight"].master.values.tobytes()


@pytest.mark.slow
def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, ckptlab\n"
        f"tree = ckptlab.open({str(GPT)!r}).full()\n"
        "tree['6.weight'].master.load()\n"
        "assert not (loaded := {'torch', 'jax', 'einx'} & set(sys.modules)), loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ------------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize(
    "case", [GPT, *(pytest.param(c, marks=pytest.mark.slow) for c in (ZERO2, ZERO3))], ids=lambda c: c.name
)
def test_every_view_has_the_same_bits_on_every_backend(case: Path) -> None:
    ckpt = ckptlab.open(case)
    views: list[Callable[..., xr.DataTree]] = [ckpt.full, ckpt.shards, ckpt.flat]
    views += [ckpt.reshape(ckptlab.Mesh(dp=3)).shards, ckpt.reshape(ckptlab.Mesh(dp=3)).flat]
    compared = Counter[str]()
    for view in views:
        expected = view().load()
        for backend in BACKENDS[1:]:
            found = view(backend=backend.name, device=backend.device)
            assert [n.path for n in found.leaves] == [n.path for n in expected.leaves]
            for a, b in zip(expected.leaves, found.leaves, strict=True):
                for name, variable in b.data_vars.items():
                    if name not in a.data_vars or str(name).endswith("_numel"):
                        continue
                    assert variable.dtype == a[name].dtype  # lazily
                    data = variable.data
                    assert isinstance(data, Duck)
                    assert data.device == backend.device
                    assert (variable.dtype, variable.dims) == (a[name].dtype, a[name].dims)
                    assert variable.values.tobytes() == a[name].values.tobytes(), (view, backend, b.path, name)
                    assert set(variable.coords) == set(a[name].coords)
                    compared[spoken(backend)] += 1
    assert min(compared.values()) > 100


def test_selecting_reads_what_is_selected(backend: Backend) -> None:
    ckpt = ckptlab.open(GPT)
    lazy, known = (
        t["self_attention.query_key_value.weight"].exp_avg for t in (ckpt.shards(backend=backend), ckpt.shards())
    )
    for pick in (
        lambda a: a.sel(tp=1, layer=[5, 2]),
        lambda a: a.transpose("in", "tp", ...).isel(layer=-1, out=slice(None, None, -3)),
        lambda a: a.isel(layer=xr.DataArray([0, 3], dims="p"), out=xr.DataArray([5, 2], dims="p")),
        lambda a: a.isel(out=slice(0, 0)),
    ):
        assert pick(lazy).values.tobytes() == pick(known).values.tobytes()
        assert pick(lazy).dims == pick(known).dims


def test_xarrays_engine_takes_a_backend() -> None:
    tree = xr.open_datatree(GPT, engine="ckptlab", backend="torch")
    assert isinstance(tree["6.weight"].master.data, Duck)
    one = xr.open_dataset(GPT, engine="ckptlab", tensor="6.weight", backend="jax")
    assert one.master.values.tobytes() == tree["6.weight"].master.values.tobytes()


def test_views_travel(backend: Backend) -> None:
    lazy = ckptlab.open(GPT).full(backend=backend)["6.weight"].param
    again = pickle.loads(pickle.dumps(lazy))
    assert again.data.device == backend.device
    assert pickle.loads(pickle.dumps(again.load())).values.tobytes() == lazy.values.tobytes()


# ------------------------------------------------------------------------------------------------ dtypes


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (5,), ()], ids=str)
def test_there_and_back_keeps_dtype_and_bits(dtype: type, shape: tuple[int, ...], backend: Backend) -> None:
    raw = np.random.default_rng(0).integers(
        0, 2 if dtype is np.bool_ else 256, (*shape, np.dtype(dtype).itemsize), np.uint8
    )
    values = np.ascontiguousarray(raw).view(dtype).reshape(shape)
    array = backend.from_numpy(values)
    assert backend.dtype_of(array) == values.dtype
    assert backend.to_numpy(array).tobytes() == values.tobytes()
    assert on(backend, values, [f"d{i}" for i in range(len(shape))]).values.dtype == dtype


def test_64_bits_survive_what_is_computed(backend: Backend) -> None:
    """jax would make 32 of them, and 0 of the sum."""
    numbers = on(backend, np.arange(6, dtype=np.int64).reshape(1, 2, 3) * 2**33)
    reals = on(backend, np.arange(6, dtype=np.float64).reshape(1, 2, 3) / 3)
    assert numbers.sum().item() == 15 * 2**33
    assert numbers.astype(np.float64).sum().item() == 15.0 * 2**33
    assert (numbers * 2).max().item() == 10 * 2**33
    assert (reals.mean() * 3).item() == pytest.approx(2.5, rel=1e-12)
    for kept in (reals.sum(), reals * 2, reals.isel(out=0), abs(reals), reals.where(reals > 1), reals.cumsum("in")):
        assert kept.dtype == np.float64
    assert (numbers.sum().dtype, (numbers + 1).dtype) == (np.int64, np.int64)


MIXED: dict[str, Callable[[Any, Any], Any]] = {
    "times": lambda a, b: a * b,
    "half": lambda a, b: a / 2,
    "squared": lambda a, b: a**2,
    "a numpy scalar": lambda a, b: a * np.float64(2),
    "a numpy array": lambda a, b: a + np.ones((2, 3)),
    "less": lambda a, b: a < b,
    "root": lambda a, b: np.sqrt(abs(a)),
    "mean": lambda a, b: a.mean(),
}


@pytest.mark.slow
@pytest.mark.parametrize("operation", MIXED)
@pytest.mark.parametrize("second", [np.float32, np.int64, np.float64], ids=lambda d: np.dtype(d).name)
@pytest.mark.parametrize("first", [np.int64, np.int32, np.float32], ids=lambda d: np.dtype(d).name)
def test_dtypes_that_meet_become_numpys(operation: str, first: type, second: type, backend: Backend) -> None:
    """torch by itself halves an int64 in float32, and jax multiplies it with a float32 in float32."""
    values = np.array([[1, 2, 3], [4, 5, 2**24 + 1]])
    a, b = (on(backend, values.astype(d), ("x", "y")) for d in (first, second))
    expected = MIXED[operation](*(on(resolve(), values.astype(d), ("x", "y")) for d in (first, second)))
    found = MIXED[operation](a, b)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-6 if found.dtype == np.float32 else 1e-15)


@pytest.mark.slow
@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn], ids=lambda d: np.dtype(d).name
)
def test_narrow_sums_are_right(dtype: type, backend: Backend) -> None:
    ones = on(backend, np.ones((3, 512, 512), dtype))
    many = 3 * 2**18
    for total in (ones.sum(), ones.sum(skipna=False), np.sum(ones), ones.sum(["out", "in"]).sum(), ones.data.sum()):
        assert float(total) == many
    assert float(ones.mean()) == 1
    assert float(ones.std()) == 0
    assert ones.dtype == dtype


# ------------------------------------------------------------------------------------------------ what xarray does

MORE: dict[str, Callable[[xr.DataArray], xr.DataArray]] = {
    **OPERATIONS,
    "sel": lambda a: a.sel(layer=1),
    "a list": lambda a: a.isel(out=[3, 1]),
    "backwards": lambda a: a.isel(out=slice(None, None, -1)),
    "a mask": lambda a: a.isel(layer=np.array([True, False, True])),
    "windows": lambda a: a.coarsen(out=4).construct(out=("a", "b")),
    "where else": lambda a: xr.where(a > 1, a, 0),
    "sqrt": lambda a: np.sqrt(a),
    "diff": lambda a: a.diff("out"),
    "pad": lambda a: a.pad(out=1),
    "roll": lambda a: a.roll(out=2),
    "sortby": lambda a: a.sortby("layer", ascending=False),
    "deep copy": lambda a: a.copy(deep=True),
    "broadcast": lambda a: a.isel(layer=0, drop=True) * a,
    "a numpy operand": lambda a: a + xr.DataArray(np.arange(3, dtype="float32"), dims="layer"),
    "any": lambda a: (a > 1).any("out"),
    "all": lambda a: (a > 0).all(),
    "reciprocal": lambda a: 1 / a,
    "argmin": lambda a: a.argmin("out"),
    "setting": lambda a: _set(a),
    "pointwise": lambda a: a.isel(layer=xr.DataArray([0, 1], dims="p"), out=xr.DataArray([1, 2], dims="p")),
}


def _set(array: xr.DataArray) -> xr.DataArray:
    changed = array.copy()
    changed[{"out": 0}] = 5.0
    return changed


def tried(backend: Backend, dtype: type) -> Any:
    slow = backend.name == "jax" or dtype in (np.float32, np.float64)  # jax compiles each
    name = f"{spoken(backend)}-{np.dtype(dtype).name}"
    return pytest.param(backend, dtype, marks=[pytest.mark.slow] * slow, id=name)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [tried(b, d) for b in BACKENDS for d in FLOATS if (b.name, d) != ("jax", np.float16)],  # there as bfloat16 is
    indirect=["backend"],
)
@pytest.mark.parametrize("operation", MORE)  # dtypes of one by turns: what is compiled in float32 is so once
def test_operations_are_right_or_refused(operation: str, backend: Backend, dtype: type) -> None:
    """Against float64 on the same values. What is not to be had raises; it never gives a wrong number."""
    values = (np.random.default_rng(0).random((3, 8, 6)) + 0.5).astype(dtype)
    values[1, 3, 4] = np.nan
    coords = {"layer": [0, 1, 2], "pp": ("layer", [0, 0, 1])}
    mine, exact = on(backend, values, **coords), on(resolve(), values.astype(np.float64), **coords)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        expected = MORE[operation](exact)
        if (operation, backend.name) in REFUSED or (is_narrow(dtype) and _raises(MORE[operation], mine)):
            assert _raises(MORE[operation], mine)
            return
        found = MORE[operation](mine)
    assert found.dims == expected.dims
    rough = {1: 0.13, 2: 1e-2 if dtype is ml_dtypes.bfloat16 else 1e-3}.get(np.dtype(dtype).itemsize, 2e-6)
    wanted = expected.values.astype(np.float64)
    apart = np.abs(found.values.astype(np.float64) - wanted) / np.maximum(np.abs(wanted), 1)
    assert np.nanmax(apart, initial=0) <= rough
    assert (np.isnan(found.values.astype(np.float64)) == np.isnan(wanted)).all()
    if backend.name != "numpy":
        assert isinstance(found.data, Duck)  # it stays where it is


REFUSED = {
    *(("setting", "jax"), ("rolling", "jax")),
}


def _raises(operation: Callable[[xr.DataArray], xr.DataArray], array: xr.DataArray) -> bool:
    try:
        operation(array)
    except (TypeError, AttributeError):
        return True
    return False


@pytest.mark.parametrize(
    "operation", ["sum of all", "mean of a dim", "std of all", "max of all", "count of all", "isnull"]
)
def test_bfloat16_is_reduced_on_every_backend(operation: str, backend: Backend) -> None:
    """xarray alone refuses to, since numpy.isdtype does not know it."""
    values = (np.random.default_rng(0).random((3, 8, 6)) + 0.5).astype(ml_dtypes.bfloat16)
    found = OPERATIONS[operation](on(backend, values))
    np.testing.assert_allclose(
        found.values.astype(np.float64),
        OPERATIONS[operation](on(resolve(), values.astype(np.float64))).values,
        rtol=1e-6,
    )


def test_medians_are_numpys() -> None:
    """torch's own is the lower of the two in the middle."""
    even = np.array([[1.0, 2, 3, 10]], np.float32)
    for name in NAMES:
        assert on(resolve(name), even, ("a", "b")).median().item() == 2.5


@pytest.mark.parametrize("name", ["torch", "jax"])
class TestErrorsSayWhatToDo:
    def test_dask(self, name: str) -> None:
        pytest.importorskip("dask")
        lazy = ckptlab.open(GPT).full(backend=name)["6.weight"].master
        with pytest.raises(TypeError, match='backend="numpy"'):
            lazy.chunk({"out": 4}).compute()
        with pytest.raises(TypeError, match='backend="numpy"'):
            lazy.load().chunk({"out": 4})

    def test_two_backends_in_one_operation(self, name: str) -> None:
        other = {"torch": "jax", "jax": "torch"}[name]
        a, b = (on(resolve(n), np.ones((2, 2), np.float32), ("a", "b")) for n in (name, other))
        with pytest.raises(TypeError, match="one operation|Mixed array types"):
            a + b

    def test_a_function_that_is_not_there(self, name: str) -> None:
        array = on(resolve(name), np.ones((2, 2), np.float32), ("a", "b"))
        with pytest.raises(TypeError, match="to_numpy"):
            np.busday_count(array.data, array.data)  # type: ignore[call-overload]


def test_jax_arrays_cannot_be_written_to() -> None:
    with pytest.raises(TypeError, match=r"xarray.where"):
        on(resolve("jax"), np.ones((2, 2), np.float32), ("a", "b"))[{"a": 0}] = 3


def test_reprs_show_the_values(backend: Backend) -> None:
    array = on(backend, np.array([[[1.5, 2.5]]], ml_dtypes.bfloat16))
    assert "1.5" in repr(array)
    assert "2.5" in xr.Dataset({"a": array})._repr_html_()


# ------------------------------------------------------------------------------------------------ mapped files


@pytest.fixture
def large(tmp_path: Path) -> Any:
    """A safetensors file with a tensor that is large enough to be mapped, and its bytes."""
    from safetensors.numpy import save_file

    values = np.random.default_rng(0).random((600, 600)).astype(np.float32)
    save_file({"w": values}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", values


@pytest.mark.parametrize("name", ["numpy", "torch"])
def test_a_large_tensor_is_mapped_and_writing_changes_no_file(name: str, large: Any) -> None:
    path, values = large
    before = path.read_bytes()
    whole = ckptlab.open(path).full(stack=False, backend=name)["w"]
    whole = whole[next(iter(whole.data_vars))].load()
    address = whole.data.ctypes.data if name == "numpy" else whole.data.array.data_ptr()
    maps = Path("/proc/self/maps").read_text().splitlines()
    spans = [[int(x, 16) for x in line.split()[0].split("-")] for line in maps if str(path) in line]
    assert any(lo <= address < hi for lo, hi in spans)
    whole[{whole.dims[0]: 0}] = -1.0
    assert (whole.values[0] == -1).all()
    assert path.read_bytes() == before
    again = ckptlab.open(path).full(stack=False, backend=name)["w"]
    assert again[next(iter(again.data_vars))].values.tobytes() == values.tobytes()


def test_rows_of_a_mapped_tensor(large: Any) -> None:
    path, values = large
    whole = ckptlab.open(path).full(stack=False)["w"]
    state = next(iter(whole.data_vars))
    rows, columns = whole.dims
    assert whole[state].isel({rows: slice(7, 580)}).values.tobytes() == values[7:580].tobytes()
    assert whole[state].isel({columns: slice(7, 580)}).values.tobytes() == values[:, 7:580].tobytes()
    assert whole[state].isel({rows: slice(5, 500, 2)}).values.tobytes() == values[5:500:2].tobytes()


class Stream:
    """What stands in for a CUDA stream: it notes what is waited for."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def record_event(self) -> Any:
        number = sum(s.startswith("copied") for s in self.said)
        self.said.append(f"copied {number}")
        event = type("Event", (), {})()
        event.synchronize = lambda: self.said.append(f"waited for {number}")
        return event

    def synchronize(self) -> None:
        self.said.append("finished")


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=lambda d: np.dtype(d).name)
def test_staging_waits_before_a_buffer_is_used_again(dtype: type, monkeypatch: pytest.MonkeyPatch) -> None:
    """The logic of copies to CUDA, on the CPU."""
    found, views, stream, expected = staged(dtype, 1, monkeypatch)
    assert found.tobytes() == expected.tobytes()
    waited = ["waited for 0", "copied 2", "waited for 1", "copied 3"]
    assert stream.said == ["copied 0", "copied 1", *waited, "finished"]
    assert np.shares_memory(views[1], views[3])  # the second buffer again


def test_many_threads_read_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    found, views, stream, expected = staged(np.float32, 3, monkeypatch, rows=200)
    assert found.tobytes() == expected.tobytes()
    assert (len(views), stream.said[-1]) == (50, "finished")
    assert len({view.ctypes.data for view in views}) <= 4


def staged(dtype: type, readers: int, monkeypatch: pytest.MonkeyPatch, rows: int = 14) -> Any:
    """What so many threads bring to a device that is none, what they read into, the stream, and what it should be."""
    import torch

    from ckptlab.arrays.backends import torch as module

    stream, backend = Stream(), resolve("torch")
    monkeypatch.setattr(module, "STAGE", 4 * 6 * np.dtype(dtype).itemsize)  # four rows
    monkeypatch.setattr(module, "READERS", readers)
    monkeypatch.setattr(module, "_pinned", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(backend, "_device", type("Device", (), {"type": "cuda"})())
    monkeypatch.setattr(backend, "empty", lambda shape, dtype: torch.empty(tuple(shape), dtype=module._DTYPES[dtype]))
    values = np.arange(rows * 6).reshape(rows, 6).astype(dtype)
    views = []

    def read(rows: slice, out: np.ndarray | None) -> np.ndarray:
        assert out is not None
        out[...] = values[rows]
        views.append(out)
        return out

    return backend.to_numpy(backend.receive(read, values.shape, values.dtype)), views, stream, values


@pytest.mark.parametrize(
    ("text", "shape", "dtype", "itemsize"),
    [
        ("out (tp in)", (4, 32), np.float16, 16),
        ("out (tp in)", (4, 24), np.float16, 4),  # 6 elements a shard
        ("(tp out) in", (4, 3), np.float16, 2),
        ("out (tp in)", (3, 16), np.float64, 16),
        ("(3 tp out) in", (12, 8), np.uint8, 8),
    ],
)
def test_a_gpu_copies_in_the_largest_units_that_hold(
    text: str, shape: tuple[int, int], dtype: type, itemsize: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptlab.arrays.backends import torch as module

    backend = resolve("torch")
    whole = np.arange(math.prod(shape)).reshape(shape).astype(dtype)
    layout, mesh = ckptlab.Layout(text), ckptlab.Mesh(tp=4)
    seen = set()

    def assign(out: Any, source: Any) -> None:
        units = module._in_large_units(out, source)
        seen.add(units[0].itemsize)
        units[0].copy_(units[1])

    monkeypatch.setattr(backend, "assign", assign)
    array = xr.DataArray(duck(backend.from_numpy(whole), backend), dims=layout.dims)
    shards = ckptlab.split(array, layout, mesh)
    assert ckptlab.merge(shards, layout).values.tobytes() == whole.tobytes()
    assert seen == {itemsize}
    assert (
        shards.values.tobytes() == ckptlab.split(xr.DataArray(whole, dims=layout.dims), layout, mesh).values.tobytes()
    )


@pytest.mark.skipif("not __import__('torch').cuda.is_available()")
def test_staging_to_cuda(large: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptlab.arrays.backends import torch as module

    monkeypatch.setattr(module, "STAGE", 1 << 16)
    path, values = large
    whole = ckptlab.open(path).full(stack=False, backend="torch", device="cuda")["w"]
    assert whole[next(iter(whole.data_vars))].values.tobytes() == values.tobytes()


def test_the_python_of_the_page_on_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[1]
    monkeypatch.chdir(root)
    block = re.findall(r"```python\n(.*?)```", (root / "docs/backends.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(block, names)
    assert (names["shards"].dims, dict(names["again"].sizes)) == (
        ("layer", "tp", "out", "in"),
        {"layer": 4, "tp": 4, "out": 12, "in": 16},
    )
    assert names["whole"].values.tobytes() == names["ckpt"].full("param")[names["name"]].param.values.tobytes()


def test_bfloat16_takes_fillings_that_are_said(backend: Backend) -> None:
    values = on(backend, np.ones((1, 2, 3), ml_dtypes.bfloat16))
    for filled in (
        values.where(values > 2, 0),
        values.shift(out=1, fill_value=0),
        values.pad(out=1, constant_values=0),
    ):
        assert float(filled.sum()) == {2: 0 if filled.max() == 0 else 3, 4: 6}[filled.sizes["out"]]
