"""torch: tensors on the CPU or on a CUDA device."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ckptlab import pool
from ckptlab.arrays.backends import torch_functions
from ckptlab.arrays.backends.base import Backend, Coordinate, Read
from ckptlab.arrays.dtypes import TORCHS
from ckptlab.arrays.moves import View
from ckptlab.errors import BackendError

if TYPE_CHECKING:
    from ckptlab.arrays.sharding import Sharding

_DTYPES: dict[np.dtype, torch.dtype] = {
    dtype: getattr(torch, name)
    for name, dtype in TORCHS.items()
    if hasattr(torch, name)  # fp8 came little by little
}
STAGE = 1 << 24  # bytes of each pinned buffer
READERS = min(4, os.cpu_count() or 1)  # threads that read into them
_NUMPY_DTYPES = {mine: theirs for theirs, mine in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.uint16}  # numpy and torch share no dtype of these sizes for floats of theirs


class TorchBackend(Backend):
    """torch's tensors on one device. Copies from files to a CUDA device are pinned and overlap with reading."""

    name = "torch"

    def __init__(self, device: Any = None) -> None:
        try:
            self._device = torch.device("cpu" if device is None else device)
            if self._device.type == "cuda" and self._device.index is None:
                self._device = torch.device("cuda", torch.cuda.current_device())
            torch.empty(0, device=self._device)
        except (RuntimeError, AssertionError) as e:
            have = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
            raise BackendError(
                f"torch has no device {device!r} here: it has {', '.join(have)} ({str(e).splitlines()[0]})"
            ) from None

    @property
    def device(self) -> str:
        return str(self._device)

    @staticmethod
    def device_of(array: torch.Tensor) -> str:
        return str(array.device)

    def is_array(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor)

    def dtype_of(self, array: torch.Tensor) -> np.dtype:
        return _NUMPY_DTYPES[array.dtype]

    def library_dtype(self, dtype: np.dtype) -> torch.dtype:
        found = _DTYPES.get(np.dtype(dtype))
        if found is None:
            raise self.refuse_dtype(np.dtype(dtype))
        return found

    def from_numpy(self, array: np.ndarray, *, owned: bool = False) -> torch.Tensor:
        dtype = self.library_dtype(array.dtype)
        if not (owned and array.flags.writeable):  # torch would write through a tensor of a read-only array
            array = np.array(array)
        return _same_bits(array, dtype).to(self._device)

    def to_numpy(self, array: torch.Tensor) -> np.ndarray:
        array = array.full_tensor() if hasattr(array, "full_tensor") else array  # a DTensor: all ranks must ask
        here, dtype = array.detach().cpu(), self.dtype_of(array)
        if dtype.isbuiltin == 1:
            return here.numpy()
        return here.contiguous().view(_BITS[dtype.itemsize]).numpy().view(dtype)

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> torch.Tensor:
        return torch.empty(tuple(shape), dtype=self.library_dtype(dtype), device=self._device)

    def cast(self, array: torch.Tensor, dtype: np.dtype) -> torch.Tensor:
        return array.to(self.library_dtype(dtype))

    def function(self, name: str) -> Callable[..., Any] | None:
        return torch_functions.find(name)

    def take(self, array: torch.Tensor, key: tuple[Any, ...]) -> torch.Tensor:
        array, key = _turned(array, _filled(array, key))
        return array[self._key(key)]

    def put(self, array: torch.Tensor, key: tuple[Any, ...], value: Any) -> None:
        if any(_is_backward(k) for k in key):
            raise TypeError("torch writes along no steps backwards: turn the value round, or .to_numpy() first")
        array[self._key(_filled(array, key))] = value

    def _key(self, key: tuple[Any, ...]) -> tuple[Any, ...]:
        """The key without what torch lacks, numpy's integers and arrays, and without what it takes otherwise: uint8 for
        a mask, an integer beside arrays for none of them."""
        found = []
        for k in key:
            if isinstance(k, np.ndarray | np.generic | list):
                k = torch.as_tensor(np.asarray(k), device=self._device)
            if isinstance(k, torch.Tensor) and k.dtype not in (torch.bool, torch.int64):
                k = k.to(torch.int64)
            found.append(k)
        if any(isinstance(k, torch.Tensor) and k.ndim for k in found):
            found = [torch.as_tensor(k, device=self._device).reshape(1) if _is_place(k) else k for k in found]
        return tuple(found)

    def view(self, array: torch.Tensor, view: View) -> torch.Tensor:
        array = array[view.key] if view.key else array
        array = array if view.shape is None else array.view(view.shape)
        return array if view.order is None else array.permute(view.order)

    def assign(self, out: torch.Tensor, source: torch.Tensor) -> None:
        if self._device.type == "cuda" and out.dtype == source.dtype:
            out, source = _in_large_units(out, source)
        out.copy_(source)

    def receive(self, read: Read, shape: Sequence[int], dtype: np.dtype) -> torch.Tensor:
        if self._device.type != "cuda" or not shape:
            return self.from_numpy(read(slice(None), None), owned=True)
        out = self.empty(shape, dtype)
        staging = Staging(self._device, READERS + 1)
        rows = max(1, STAGE // max(1, math.prod(shape[1:]) * dtype.itemsize))
        parts = (slice(first, min(first + rows, shape[0])) for first in range(0, shape[0], rows))
        for _ in pool.run(lambda part: staging.send(read, part, out[part]), parts, on=READERS, ordered=False):
            pass
        staging.finish()
        return out

    def degrees(self, mesh: Any) -> Mapping[str, int]:
        names, shape = getattr(mesh, "mesh_dim_names", None), getattr(mesh, "shape", ())
        if not names:
            raise BackendError("torch wants a DeviceMesh with mesh_dim_names, init_device_mesh(…, mesh_dim_names=(…))")
        return dict(zip(names, shape, strict=True))

    def place(
        self, mesh: Any, stage: int, sharding: Sharding, dtype: np.dtype, read: Callable[[Coordinate], np.ndarray]
    ) -> torch.Tensor:
        from torch.distributed.tensor import DTensor, Replicate, Shard

        at = dict(zip(mesh.mesh_dim_names, mesh.get_coordinate(), strict=True))
        if at.pop("pp", stage) != stage:
            raise BackendError(f"this process is not on pp stage {stage}: read the tensors of its own")
        local = self.from_numpy(read(at), owned=True)
        cut = {axis: Shard(dim) for dim, axis in enumerate(sharding.axes) if axis is not None}
        strides = tuple(math.prod(sharding.shape[i + 1 :]) for i in range(len(sharding.shape)))
        return DTensor.from_local(
            local,
            mesh[tuple(at)],
            [cut.get(axis, Replicate()) for axis in at],
            run_check=False,
            shape=torch.Size(sharding.shape),
            stride=strides,
        )


def _filled(array: torch.Tensor, key: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key with whole dims in the place of an ellipsis."""
    whole = (slice(None),) * (array.ndim - sum(_dims(k) for k in key))
    return tuple(part for k in key for part in (whole if k is Ellipsis else (k,)))


def _dims(k: Any) -> int:
    """How many dims of an array a part of a key is for."""
    if k is None or k is Ellipsis:
        return 0
    return k.ndim if getattr(k, "dtype", None) in (torch.bool, np.bool_) else 1


def _is_backward(k: Any) -> bool:
    return isinstance(k, slice) and k.step is not None and k.step < 0


def _turned(array: torch.Tensor, key: tuple[Any, ...]) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """What is left to do where a key steps backwards, which torch cannot: the array turned round in those dims, and the
    key with all of them. (Places in their stead would be paired with the places of other dims.)"""
    dim = 0
    for k in key:
        if _is_backward(k):  # one dim at a time, by places: torch flips no fp8
            places = torch.tensor(range(*k.indices(array.shape[dim])), dtype=torch.int64, device=array.device)
            array = array[(slice(None),) * dim + (places,)]
        dim += _dims(k)
    return array, tuple(slice(None) if _is_backward(k) else k for k in key)


def _is_place(k: Any) -> bool:
    """One place in a dim: numpy broadcasts it with the arrays of a key, whose dims come first where they are apart."""
    whole = isinstance(k, torch.Tensor) and k.dtype == torch.int64 and not k.ndim
    return whole or (isinstance(k, int) and not isinstance(k, bool))


class Staging:
    """Pinned buffers between files and a CUDA device: while some are copied, others are read into. For many threads."""

    def __init__(self, device: torch.device, buffers: int) -> None:
        self._stream = torch.cuda.current_stream(device)
        self._free: SimpleQueue[tuple[torch.Tensor, Any]] = SimpleQueue()  # each with the event of its last copy
        for _ in range(buffers):
            self._free.put((_pinned(STAGE), None))

    def send(self, read: Read, rows: slice, out: torch.Tensor) -> None:
        """Read rows, and start to copy them to their place on the device."""
        if out.nbytes > STAGE:  # a row of the first dim alone
            return self._copy(_same_bits(read(rows, None), out.dtype), out)
        pinned, copied = self._free.get()
        try:
            if copied is not None:
                copied.synchronize()
            mine = pinned[: out.nbytes]
            read(rows, mine.numpy().view(_NUMPY_DTYPES[out.dtype]).reshape(out.shape))
            self._copy(mine.view(out.dtype).view(out.shape), out)
            copied = self._stream.record_event()
        finally:
            self._free.put((pinned, copied))

    def _copy(self, source: torch.Tensor, out: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):  # a thread has a stream of its own
            out.copy_(source, non_blocking=source.is_pinned())

    def finish(self) -> None:
        """Wait until all is copied, so that the buffers may be freed."""
        self._stream.synchronize()


def _pinned(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _in_large_units(out: torch.Tensor, source: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as tensors of the largest units of which neither breaks one: a GPU's strided copy moves a unit a thread."""
    for unit in (torch.complex128, torch.int64, torch.int32):
        if all(_has_units(array, unit.itemsize) for array in (out, source)):
            return out.view(unit), source.view(unit)
    return out, source


def _has_units(array: torch.Tensor, nbytes: int) -> bool:
    many, odd = divmod(nbytes, array.itemsize)
    if odd or many < 2 or not array.ndim or array.stride(-1) != 1 or array.data_ptr() % nbytes:
        return False
    return not any(n % many for n in (array.shape[-1], array.storage_offset(), *array.stride()[:-1]))


def _same_bits(array: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on a writeable array's memory; on a copy of it where torch cannot go along its strides."""
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    bits = torch.from_numpy(np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}")).view(dtype)
    return bits.reshape(array.shape)
