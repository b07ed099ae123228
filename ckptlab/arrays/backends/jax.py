"""jax: arrays on one device, or placed over several as a sharding says."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ckptlab.arrays.backends.base import Backend
from ckptlab.arrays.moves import Moves, View
from ckptlab.errors import BackendError

if TYPE_CHECKING:
    from ckptlab.arrays.sharding import Sharding


class JaxBackend(Backend):
    """jax's arrays. All is computed with 64-bit dtypes enabled: jax would make float32 of float64 in silence."""

    name = "jax"
    refusals = (jax.dtypes.TypePromotionError,)

    def __init__(self, device: Any = None) -> None:
        self._device = None if device is None else _device(device)

    @property
    def device(self) -> str:
        found = self._device or jax.devices()[0]
        return f"{found.platform}:{found.id}"

    @staticmethod
    def device_of(array: jax.Array) -> str | None:
        devices = list(array.devices())
        return f"{devices[0].platform}:{devices[0].id}" if len(devices) == 1 else None

    def is_array(self, value: Any) -> bool:
        return isinstance(value, jax.Array)

    def dtype_of(self, array: jax.Array) -> np.dtype:
        return np.dtype(array.dtype)

    def library_dtype(self, dtype: np.dtype) -> np.dtype:
        return np.dtype(dtype)

    def from_numpy(self, array: np.ndarray, *, owned: bool = False) -> jax.Array:
        return self._put(array if owned else np.array(array), self._device)

    def _put(self, array: np.ndarray, device: Any) -> jax.Array:
        """The array on a device, dtype and bits kept. BackendError where jax lacks the dtype."""
        with self.computing():
            try:
                found = jax.device_put(array, device)
            except TypeError:
                raise self.refuse_dtype(array.dtype) from None
        if found.dtype != array.dtype:
            raise BackendError(f"jax made {found.dtype} of {array.dtype}: this is a fault of ckptlab; please report it")
        return found

    def to_numpy(self, array: jax.Array) -> np.ndarray:
        return np.asarray(array)

    def empty(self, shape: Sequence[int], dtype: np.dtype) -> jax.Array:
        with self.computing():
            return jnp.empty(tuple(shape), dtype, device=self._device)

    def cast(self, array: jax.Array, dtype: np.dtype) -> jax.Array:
        with self.computing():
            return array.astype(dtype)

    def computing(self) -> AbstractContextManager[Any]:
        return jax.enable_x64(True)

    def function(self, name: str) -> Callable[..., Any] | None:
        try:
            return operator.attrgetter(name)(jnp)
        except AttributeError:
            return None

    def put(self, array: jax.Array, key: tuple[Any, ...], value: Any) -> None:
        raise TypeError(
            "jax arrays cannot be written to: make a new one, with xarray.where(…) or with .data.array.at[…].set(…)"
        )

    def move(self, moves: Moves, sources: Sequence[jax.Array], out: Any = None) -> jax.Array:
        if out is not None:
            raise TypeError("jax arrays cannot be written to: leave out= away, and take the array that is returned")
        with self.computing():
            return _moving(moves)(*sources)

    def degrees(self, mesh: Any) -> Mapping[str, int]:
        if not isinstance(mesh, Mesh):
            raise BackendError(f"jax wants a jax.sharding.Mesh, not {type(mesh).__name__}")
        return dict(mesh.shape)

    def place(
        self,
        mesh: Any,
        stage: int,
        sharding: Sharding,
        dtype: np.dtype,
        read: Callable[[Mapping[str, int]], np.ndarray],
    ) -> jax.Array:
        if "pp" in mesh.axis_names:
            names = tuple(axis for axis in mesh.axis_names if axis != "pp")
            mesh = Mesh(np.take(mesh.devices, stage, mesh.axis_names.index("pp")), names)
        over = NamedSharding(mesh, PartitionSpec(*sharding.axes))
        shards: dict[tuple[int, ...], np.ndarray] = {}  # each is read once, however many devices hold it
        pieces = []
        for device, index in over.addressable_devices_indices_map(sharding.shape).items():
            at = tuple((k.start or 0) // n if n else 0 for k, n in zip(index or (), sharding.local, strict=True))
            if at not in shards:
                shards[at] = read({axis: k for axis, k in zip(sharding.axes, at, strict=True) if axis})
            pieces.append(self._put(shards[at], device))
        with self.computing():
            return jax.make_array_from_single_device_arrays(sharding.shape, over, pieces)


@lru_cache(maxsize=1024)
def _moving(moves: Moves) -> Callable[..., jax.Array]:
    """The moves as one compiled function: a new one for each layout, since `Moves` are one object a pair of cuts."""

    def box(source: jax.Array, wanted: View, held: View) -> jax.Array:
        taken = source[held.key]
        taken = taken if held.shape is None else taken.reshape(held.shape)
        taken = taken if held.order is None else taken.transpose(held.order)
        back = wanted.inverse_order()
        return taken if back is None else taken.transpose(back)

    def moved(*sources: jax.Array) -> jax.Array:
        if len(moves.steps) == 1 and not moves.blank:
            wanted, which, held = moves.steps[0]
            return box(sources[which], wanted, held).reshape(moves.shape)
        out = jnp.zeros(moves.shape, sources[0].dtype)
        for wanted, which, held in moves.steps:
            place = jax.eval_shape(lambda array, key=wanted.key: array[key], out).shape
            out = out.at[wanted.key].set(box(sources[which], wanted, held).reshape(place))
        return out

    return jax.jit(moved)


def _device(wanted: str) -> Any:
    """The device of a name: "cpu", "gpu:1", "cuda:0" (which jax calls gpu)."""
    platform, _, index = wanted.partition(":")
    try:
        devices = jax.devices({"cuda": "gpu"}.get(platform, platform))
    except RuntimeError:
        devices = []
    found = [d for d in devices if not index or str(d.id) == index]
    if not found:
        have = ", ".join(f"{d.platform}:{d.id}" for d in jax.devices())
        raise BackendError(f"jax has no device {wanted!r} here: it has {have}")
    return found[0]
