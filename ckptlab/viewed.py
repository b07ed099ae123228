"""What a checkpoint and its reshape have in common: they can be looked at as full tensors, shards and flat buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload

from ckptlab.arguments import explained
from ckptlab.catalog import Catalog, asked
from ckptlab.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    import xarray as xr

    from ckptlab.arrays.backends import Backend

States = str | Sequence[str] | None


class Arriving(TypedDict, total=False):
    """How what is read arrives: see `Viewed.full`."""

    dtype: Any
    backend: Any
    device: Any
    chunks: Any


@explained
class Viewed:
    """`source` is the catalog of what is stored, `held` the one that says what the ranks hold: itself, or a target's.

    Every view takes `backend` ("numpy", "torch", "jax", or a Backend) and `device` ("cuda:0"): what is read arrives
    there and stays there, inside xarray, dtype and bits as stored. BackendError where that cannot be. CheckpointError
    where nothing is stored, as of a model on paper.
    """

    source: Catalog
    held: Catalog

    @overload
    def full(
        self, state: States = None, *, stack: Literal[True] = True, **arriving: Unpack[Arriving]
    ) -> xr.DataTree: ...

    @overload
    def full(
        self, state: States = None, *, stack: Literal[False], **arriving: Unpack[Arriving]
    ) -> Mapping[str, Any]: ...

    def full(
        self,
        state: States = None,
        *,
        stack: bool = True,
        dtype: Any = None,
        backend: Any = None,
        device: Any = None,
        chunks: Any = None,
    ) -> xr.DataTree | Mapping[str, Any]:
        """Whole tensors, lazily.

        stack=True: a DataTree with one node a tensor, same-shaped layers stacked along `layer` (with the `pp` stage as
        a coordinate), states as variables. stack=False: a Mapping from the model's own names to DataArrays of that
        state, or to Datasets if no state is named. Vocabulary padding is cut off. Dtypes are those that are stored, and
        sums of 16 bits and fewer are computed in float32; dtype="float32" shows all floating-point states so, exactly,
        and everything works on them, dask too. A reshape does not change them. CheckpointError for an unknown state.

        chunks: as arrays of dask, cut so (xarray's `chunk`): {"layer": 1}, or {} for that where there are layers; on a
        cluster the workers read the files. TypeError for dtypes and libraries for which dask would give other numbers.
        """
        from ckptlab.views import Full

        view = Full(self.source, None, _states(state, self.source), *_arriving(dtype, backend, device))
        return _shown(view, stack, _state(state, self.source) if not stack else None, chunks)

    @overload
    def shards(
        self, state: States = None, *, stack: Literal[True] = True, mesh: Any = None, **arriving: Unpack[Arriving]
    ) -> xr.DataTree: ...

    @overload
    def shards(
        self, state: States = None, *, stack: Literal[False], mesh: Any = None, **arriving: Unpack[Arriving]
    ) -> Mapping[str, Any]: ...

    def shards(
        self,
        state: States = None,
        *,
        stack: bool = True,
        dtype: Any = None,
        backend: Any = None,
        device: Any = None,
        mesh: Any = None,
        chunks: Any = None,
    ) -> xr.DataTree | Mapping[str, Any]:
        """Tensors as the model-parallel ranks hold them, padding included: a `tp` dim (and one for each other axis on
        which holders differ) before the tensor's own, a `pp` dim where several stages hold copies. As `full`
        otherwise; of a reshape, gathered lazily from the source.

        mesh: the library's own mesh of devices (a `jax.sharding.Mesh`, a torch `DeviceMesh`) of the same degrees. The
        arrays are then whole, each placed over the devices as its layout says; see `ckptlab.views.Placed`.
        """
        from ckptlab.views import Placed, Shards, View

        fields = (self.source, self._target, _states(state, self.held), *_arriving(dtype, backend, device))
        view: View = Shards(*fields) if mesh is None else Placed(*fields, devices=mesh)
        return _shown(view, stack, _state(state, self.held) if not stack else None, chunks)

    def flat(self, *, dtype: Any = None, backend: Any = None, device: Any = None, chunks: Any = None) -> xr.DataTree:
        """The optimizer's flat buffers as the files hold them, or as the target's will: /pp0/group0 with dims
        (tp, dp, flat) and true lengths beside. Of a checkpoint that is seen through a family they are the stored one's,
        with its tensors in them. dtype, backend, device, chunks: as for `full`."""
        from ckptlab.views import Flat

        source = self.source.as_stored if self._target is None else self.source
        view = Flat(source, self._target, *_arriving(dtype, backend, device))
        return _shown(view, True, None, chunks)

    def of_rank(self, rank: int) -> dict[tuple[str, str], np.ndarray]:
        """(name, state) → what one rank holds, as `Plan.run` takes and gives it: its shard, or, flat, the part of the
        flattened shard that ZeRO gives it. Read at once. MeshError where there is no such rank."""
        from ckptlab.arrays.held import rank_arrays

        self.held.mesh.coordinate(rank)  # or an error
        return rank_arrays(self.source, self.held, rank)

    @property
    def _target(self) -> Catalog | None:
        return None if self.held is self.source else self.held


def _arriving(dtype: Any, backend: Any, device: Any) -> tuple[np.dtype | None, Backend]:
    """What a view is told of dtype and backend."""
    from ckptlab.arrays.backends import resolve
    from ckptlab.arrays.dtypes import dtype_called

    return dtype_called(dtype), resolve(backend, device)


def _shown(view: Any, stack: bool, state: str | None, chunks: Any) -> Any:
    """A view as a tree, or by name; as arrays of dask where `chunks` are said."""
    found = view.tree() if stack else view.by_name(state)
    if chunks is None:
        return found
    from ckptlab.views.chunks import chunked, each_chunked

    return chunked(found, view.backend, chunks) if stack else each_chunked(found, view.backend, chunks)


def _states(state: States, catalog: Catalog) -> tuple[str, ...] | None:
    return asked(state, catalog.states, f"{catalog.path}: ")


def _state(state: States, catalog: Catalog) -> str | None:
    wanted = _states(state, catalog)
    if wanted is not None and len(wanted) > 1:
        raise CheckpointError(f"by name, one state at a time (or none, for all): {wanted}")
    return wanted[0] if wanted else None
