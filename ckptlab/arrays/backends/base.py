"""What a backend is, an array library on a device, with numpy's dtypes for names; and which there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ckptlab.errors import BackendError
from ckptlab.registry import Registry

if TYPE_CHECKING:
    from ckptlab.arrays.moves import Moves, View
    from ckptlab.arrays.sharding import Sharding

Coordinate = Mapping[str, int]  # mesh axis → coordinate
Read = Callable[[slice, np.ndarray | None], np.ndarray]  # the slice of the first dim, into memory that is given or not


class Backend(ABC):
    """An array library on a device. Dtypes are numpy's (and ml_dtypes') on the outside, the library's in its arrays.

    An installed package may add one: an entry point in the group `ckptlab.backends` names a class that is made with
    the device (or None).
    """

    name: ClassVar[str]
    takes_dask: ClassVar[bool] = False  # whether its arrays may be dask's blocks
    refusals: ClassVar[tuple[type[Exception], ...]] = ()  # what it raises, beside TypeError, for what it cannot do

    @property
    @abstractmethod
    def device(self) -> str:
        """Where arrays lie: "cpu", "cuda:0"."""

    @staticmethod
    def device_of(array: Any) -> str | None:
        """Where an array lies, as the backend is asked for it; None: wherever the library puts it."""
        return None

    # ------------------------------------------------------------ arrays

    @abstractmethod
    def is_array(self, value: Any) -> bool:
        """Whether a value is an array of the library."""

    @abstractmethod
    def dtype_of(self, array: Any) -> np.dtype:
        """The dtype of one of the library's arrays."""

    @abstractmethod
    def library_dtype(self, dtype: np.dtype) -> Any:
        """What the library calls a dtype. BackendError if it has none of that name."""

    @abstractmethod
    def from_numpy(self, array: np.ndarray, *, owned: bool = False) -> Any:
        """The same bits on the device. Not copied where that can be helped and nobody else writes it (`owned`)."""

    @abstractmethod
    def to_numpy(self, array: Any) -> np.ndarray:
        """The same bits as a numpy array, not copied where that can be helped."""

    @abstractmethod
    def empty(self, shape: Sequence[int], dtype: np.dtype) -> Any:
        """A destination: an array whose elements are still to be written."""

    @abstractmethod
    def cast(self, array: Any, dtype: np.dtype) -> Any:
        """The array in another dtype, rounded to nearest even."""

    def dlpack(self, array: Any, **options: Any) -> Any:
        """DLPack's capsule of an array, with the protocol's options. BackendError for a dtype that it does not know."""
        return array.__dlpack__(**options)

    def is_safe(self, array: Any) -> bool:
        """Whether xarray may hold the array as it is: it has numpy's protocols, and its numbers are right."""
        return False

    # ------------------------------------------------------------ computing

    @abstractmethod
    def function(self, name: str) -> Callable[..., Any] | None:
        """What numpy calls `name` ("sum", "linalg.norm"), with numpy's arguments and results; None if there is none."""

    def computing(self) -> AbstractContextManager[Any]:
        """Around everything that is computed."""
        return nullcontext()

    def take(self, array: Any, key: tuple[Any, ...]) -> Any:
        """`array[key]`, as numpy would have it."""
        return array[key]

    def put(self, array: Any, key: tuple[Any, ...], value: Any) -> None:
        """`array[key] = value`. TypeError where the library's arrays cannot be written to."""
        array[key] = value

    # ------------------------------------------------------------ moving

    def move(self, moves: Moves, sources: Sequence[Any], out: Any = None) -> Any:
        """Boxes of the sources copied to their places in `out`, or in a new array: see Moves.

        TypeError where an `out` is given and the library's arrays cannot be written to.
        """
        if out is None:
            out = self.empty(moves.shape, self.dtype_of(sources[0]))
        if moves.blank:
            out[...] = 0
        for wanted, which, held in moves.steps:
            self.assign(self.view(out, wanted), self.view(sources[which], held))
        return out

    def view(self, array: Any, view: View) -> Any:
        """A view of an array: nothing is copied."""
        return view.of(array)

    def assign(self, out: Any, source: Any) -> None:
        """All elements of `source` written into `out`, of the same shape and dtype."""
        out[...] = source

    def receive(self, read: Read, shape: Sequence[int], dtype: np.dtype) -> Any:
        """An array on the device of what is read from files: `read(rows, out)` gives the slice `rows` of the first dim,
        written into `out` if that is not None."""
        return self.from_numpy(read(slice(None), None), owned=True)

    # ------------------------------------------------------------ meshes of devices

    def degrees(self, mesh: Any) -> Mapping[str, int]:
        """Axis → degree of the library's own mesh of devices. BackendError where the library has none."""
        raise BackendError(f"{self.name} has no meshes of devices: mesh= is for jax and torch")

    def place(
        self,
        mesh: Any,
        stage: int,
        sharding: Sharding,
        dtype: np.dtype,
        read: Callable[[Mapping[str, int]], np.ndarray],
    ) -> Any:
        """A whole array over the mesh's devices (those of a pp stage, if it has that axis), each holding its shard.

        read: the shard at a coordinate, in the sharding's dims.
        """
        raise BackendError(f"{self.name} has no meshes of devices")

    def __reduce__(self) -> tuple[Any, ...]:
        return resolve, (self.name, self.device)

    def __repr__(self) -> str:
        return f"<{self.name} on {self.device}>"

    def refuse_dtype(self, dtype: np.dtype) -> BackendError:
        """The error for a dtype that the library lacks."""
        return BackendError(
            f'{self.name} has no dtype {dtype}: open the view with dtype="float32", or with backend="numpy", '
            "which has them all"
        )


BACKENDS = Registry[type[Backend]](
    "backend",
    "ckptlab.backends",
    BackendError,
    {
        "numpy": "ckptlab.arrays.backends.numpy:NumpyBackend",
        "torch": "ckptlab.arrays.backends.torch:TorchBackend",
        "jax": "ckptlab.arrays.backends.jax:JaxBackend",
    },
    wrong=lambda name, value: (
        ""
        if isinstance(value, type) and issubclass(value, Backend)
        else f"expected a subclass of Backend, found {value!r}"
    ),
)
_LIBRARIES = {"torch": "torch", "jax": "jax", "jaxlib": "jax"}


def resolve(backend: Backend | str | None = None, device: Any = None) -> Backend:
    """A backend by its name (None: numpy) on a device (None: the library's default; for torch the cpu).

    BackendError for a name that is not known, a library that is not installed, a device that is not there.
    """
    if isinstance(backend, Backend):
        if device is not None and str(device) != backend.device:
            raise BackendError(f"{backend!r} was given together with device {device!r}: give its name instead")
        return backend
    if not isinstance(backend, str | None):
        raise BackendError(f"a backend is 'numpy', 'torch', 'jax' or a Backend, not a {type(backend).__name__}")
    return _resolve(backend or "numpy", device if device is None else str(device))


@lru_cache(maxsize=64)
def _resolve(name: str, device: str | None) -> Backend:
    made: Backend = _class(name)(device)
    return made if made.device == device else _resolve(name, made.device)  # one of each, however it was asked for


def _class(name: str) -> Any:
    try:
        return BACKENDS.get(name)
    except ModuleNotFoundError as e:
        if not BACKENDS.is_own(name):
            raise
        raise BackendError(f"backend {name!r} needs {e.name}, which is not installed: pip install {e.name}") from None


def of(array: Any) -> Backend:
    """The backend that an array belongs to, found by the name of its type's package: numpy's for all that are strange.

    Nothing is imported for an array that is not the library's own.
    """
    if isinstance(known := getattr(array, "backend", None), Backend):
        return known
    name = _LIBRARIES.get(type(array).__module__.partition(".")[0], "numpy")
    return _resolve(name, _class(name).device_of(array))
