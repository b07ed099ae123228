"""jax: arrays on one device, or placed over several as a sharding says."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
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
        if name in _NUMPYS:
            return _NUMPYS[name]
        if name in ("cumsum", "cumprod", "cumulative_prod", "nancumsum", "nancumprod"):
            return partial(_cumulated, getattr(jnp, name))
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

    def moved(*sources: jax.Array) -> jax.Array:
        boxes = [_box(sources[which], wanted, held, moves.shape) for wanted, which, held in moves.steps]
        keys = [_places(wanted.key, moves.shape) for wanted, _, _ in moves.steps]
        joined = _joined(keys, boxes, moves.shape, sources[0].dtype)
        if joined is not None:
            return joined
        out = jnp.zeros(moves.shape, sources[0].dtype)
        for (wanted, _, _), box in zip(moves.steps, boxes, strict=True):
            out = out.at[wanted.key].set(box)
        return out

    return jax.jit(moved)


def _cumulated(function: Callable[..., Any], array: Any, *args: Any, **options: Any) -> Any:
    """Sums and products along a dim in numpy's dtype: jax's of int8 are int8, and overflow."""
    if np.issubdtype(array.dtype, np.integer) or array.dtype == np.bool_:
        array = array.astype(np.empty(0, array.dtype).cumsum().dtype)
    return function(array, *args, **options)


def _rounded_once(function: Callable[..., Any], array: Any) -> Any:
    """What jax multiplies by a constant, computed in float32: it rounds the constant to the array's own few bits, where
    exp2(5) of fp8 is 56."""
    few = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize <= 2
    return function(array.astype(np.float32)).astype(array.dtype) if few else function(array)


def _divided(a: Any, b: Any) -> jax.Array:
    """Quotients as numpy's: a whole number divided by 0 is 0 (jax: -1 and less), and 0 has the sign of both."""
    found = jnp.floor_divide(a, b)
    if jnp.issubdtype(found.dtype, jnp.floating) and found.dtype.itemsize > 1:
        return jnp.where(found == 0, jnp.copysign(found, jnp.divide(a, b)), found)
    whole = jnp.issubdtype(found.dtype, jnp.integer)
    return jnp.where(jnp.asarray(b) == 0, 0, found).astype(found.dtype) if whole else found


def _rest(a: Any, b: Any) -> jax.Array:
    """Rests as numpy's: of a whole number and 0 it is 0, and those with fractions have the sign of b, 0 too."""
    found = jnp.remainder(a, b)
    if jnp.issubdtype(found.dtype, jnp.floating) and found.dtype.itemsize > 1:
        return jnp.copysign(found, b)
    whole = jnp.issubdtype(found.dtype, jnp.integer)
    return jnp.where(jnp.asarray(b) == 0, 0, found).astype(found.dtype) if whole else found


def _rounded(array: Any, *args: Any, **options: Any) -> Any:
    """jax.numpy.round; of bool in numpy's dtype, since jax has no answer."""
    return jnp.round(array.astype(np.float16) if array.dtype == np.bool_ else array, *args, **options)


def _padded(array: Any, widths: Any, mode: Any = "constant", **options: Any) -> Any:
    """jax.numpy.pad, for what it compiles for: tuples, where others take lists."""
    return jnp.pad(array, widths, mode, **{name: _as_tuples(value) for name, value in options.items()})


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list | tuple) else value


_NUMPYS: Mapping[str, Callable[..., Any]] = {
    **{name: partial(_rounded_once, getattr(jnp, name)) for name in ("exp2", "log2", "log10")},
    "divmod": lambda a, b: (_divided(a, b), _rest(a, b)),
    "floor_divide": _divided,
    "mod": _rest,
    "pad": _padded,
    "remainder": _rest,
    "round": _rounded,
    "sign": lambda array: jnp.sign(array) + 0,  # of -0 too
    "searchsorted": lambda *args, **options: jnp.searchsorted(*args, **options).astype(np.int64),
}

Place = int | range  # of one dim: an index, or the indices of a slice


def _places(key: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[Place, ...]:
    whole = (*key, *(slice(None) for _ in shape[len(key) :]))
    return tuple(range(*k.indices(n)) if isinstance(k, slice) else int(k) for k, n in zip(whole, shape, strict=True))


def _box(source: jax.Array, wanted: View, held: View, shape: tuple[int, ...]) -> jax.Array:
    """What a view of the source holds, in the shape that it has at its place in the destination."""
    taken, back = held.of(source), wanted.inverse_order()
    taken = taken if back is None else taken.transpose(back)
    return taken.reshape([len(place) for place in _places(wanted.key, shape) if isinstance(place, range)])


def _joined(
    keys: Sequence[tuple[Place, ...]], boxes: Sequence[jax.Array], shape: tuple[int, ...], dtype: Any
) -> jax.Array | None:
    """The destination as boxes behind one another, with 0 between them; None where they do not lie so.

    XLA copies them several times as fast as updates of an array, which it may copy for each. They lie so where each
    begins with indices and then takes whole dims but for one, of which it takes consecutive elements.
    """
    leads = [tuple(k for k in key if isinstance(k, int)) for key in keys]
    depth = len(leads[0]) if leads else 0
    varying = {i for key in keys for i, k in enumerate(key) if isinstance(k, range) and k != range(shape[i])} or {depth}
    if len(varying) > 1 or any(
        len(lead) != depth or not _begins(key, depth) for lead, key in zip(leads, keys, strict=True)
    ):
        return None
    (dim,) = varying
    if dim >= len(shape):
        return boxes[0].reshape(shape) if len(boxes) == 1 else None
    axis = dim - depth
    rows: dict[tuple[int, ...], list[tuple[range, jax.Array]]] = {at: [] for at in np.ndindex(*shape[:depth])}
    for lead, key, box in zip(leads, keys, boxes, strict=True):
        place = key[dim]
        if not isinstance(place, range) or (place.step != 1 and len(place) > 1):
            return None
        rows[lead].append((place, box))
    made = []
    for pieces in rows.values():
        parts, done = [], 0
        for place, box in sorted(pieces, key=lambda piece: piece[0].start):
            parts += [_zeros(shape, depth, dim, place.start - done, dtype), box]
            done = place.stop
        parts.append(_zeros(shape, depth, dim, shape[dim] - done, dtype))
        made.append(jnp.concatenate([part for part in parts if part.shape[axis]] or parts[:1], axis))
    return jnp.concatenate([one[None] for one in made]).reshape(shape) if len(made) > 1 else made[0].reshape(shape)


def _begins(key: tuple[Place, ...], depth: int) -> bool:
    return all(isinstance(k, int) for k in key[:depth])


def _zeros(shape: tuple[int, ...], depth: int, dim: int, count: int, dtype: Any) -> jax.Array:
    return jnp.zeros((*shape[depth:dim], count, *shape[dim + 1 :]), dtype)


def _on_cpu() -> list[Any]:
    """The CPU's devices; none where JAX_PLATFORMS leaves the CPU out."""
    try:
        return list(jax.devices("cpu"))
    except RuntimeError:
        return []


def _device(wanted: str) -> Any:
    """The device of a name: "cpu", "gpu:1", "cuda:0" (which jax calls gpu)."""
    platform, _, index = wanted.partition(":")
    try:
        devices = jax.devices({"cuda": "gpu"}.get(platform, platform))
    except RuntimeError:
        devices = []
    found = [d for d in devices if not index or str(d.id) == index]
    if not found:
        have = ", ".join(dict.fromkeys(f"{d.platform}:{d.id}" for d in (*jax.devices(), *_on_cpu())))
        raise BackendError(f"jax has no device {wanted!r} here: it has {have}")
    return found[0]
