"""What a checkpoint and its reshape have in common: they can be looked at as full tensors, shards and flat buffers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptlab.catalog import Catalog
from ckptlab.errors import CheckpointError
from ckptlab.paper import with_data

if TYPE_CHECKING:
    import xarray as xr

States = str | Sequence[str] | None


class Viewed:
    """`source` is the catalog of what is stored, `held` the one that says what the ranks hold.

    Every view takes `backend` ("numpy", "torch", "jax", or a Backend) and `device` ("cuda:0"): what is read arrives
    there and stays there, inside xarray, dtype and bits as stored. BackendError where that cannot be.
    """

    source: Catalog
    held: Catalog

    def full(
        self, state: States = None, *, stack: bool = True, dtype: Any = None, backend: Any = None, device: Any = None
    ) -> Any:
        """Whole tensors, lazily.

        stack=True: a DataTree with one node a tensor, same-shaped layers stacked along `layer` (with the `pp` stage as
        a coordinate), states as variables. stack=False: a Mapping from the model's own names to DataArrays of that
        state, or to Datasets if no state is named. Vocabulary padding is cut off. Dtypes are those that are stored, and
        sums of 16 bits and fewer are computed in float32; dtype="float32" shows all floating-point states so, exactly,
        and everything works on them, dask too (of a Dataset or tree, xarray's reductions leave out dtypes that are not
        numpy's own, bfloat16 among them). A reshape does not change them. CheckpointError for an unknown state.
        """
        from ckptlab import views

        on = _backend(backend, device)
        if stack:
            return views.full(with_data(self.source), _states(state, self.source), dtype, on)
        return views.full_by_name(with_data(self.source), _state(state, self.source), dtype, on)

    def shards(
        self,
        state: States = None,
        *,
        stack: bool = True,
        dtype: Any = None,
        backend: Any = None,
        device: Any = None,
        mesh: Any = None,
    ) -> Any:
        """Tensors as the model-parallel ranks hold them, padding included: a `tp` dim before the tensor's own, a `pp`
        dim where several stages hold copies. As `full` otherwise; of a reshape, gathered lazily from the source.

        mesh: the library's own mesh of devices (a `jax.sharding.Mesh`, a torch `DeviceMesh`) of the same degrees. The
        arrays are then whole, each placed over the devices as its layout says; see `ckptlab.placed`.
        """
        from ckptlab import views

        on, held = _backend(backend, device), self.held
        if mesh is not None:
            from ckptlab import placed

            if stack:
                return placed.placed(with_data(self.source), held, mesh, _states(state, held), dtype, on)
            return placed.placed_by_name(with_data(self.source), held, mesh, _state(state, held), dtype, on)
        if stack:
            return views.shards(with_data(self.source), held, _states(state, held), dtype, on)
        return views.shards_by_name(with_data(self.source), held, _state(state, held), dtype, on)

    def buffers(self, *, dtype: Any = None, backend: Any = None, device: Any = None) -> xr.DataTree:
        """The optimizer's flat buffers as the files hold them, or as the target's will: /pp0/group0 with dims
        (tp, dp, flat) and true lengths beside."""
        from ckptlab import views

        return views.buffers(with_data(self.source), self.held, dtype, _backend(backend, device))


def _states(state: States, catalog: Catalog) -> tuple[str, ...] | None:
    if state is None:
        return None
    wanted = (state,) if isinstance(state, str) else tuple(state)
    unknown = [s for s in wanted if s not in catalog.states]
    if unknown:
        raise CheckpointError(f"{catalog.path}: no state {unknown[0]!r}: there are {', '.join(catalog.states)}")
    return wanted


def _state(state: States, catalog: Catalog) -> str | None:
    wanted = _states(state, catalog)
    if wanted is not None and len(wanted) > 1:
        raise CheckpointError(f"by name, one state at a time (or none, for all): {wanted}")
    return wanted[0] if wanted else None


def _backend(backend: Any, device: Any) -> Any:
    from ckptlab.arrays.backends import resolve

    return resolve(backend, device)
