"""xarray's engine "ckptlab" (and "deepspeed"): the views of a checkpoint for those who live in xarray."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xarray as xr
from xarray.backends import BackendEntrypoint

from ckptlab.arrays.backends import Backend, resolve
from ckptlab.catalog import Catalog
from ckptlab.errors import CheckpointError, UnknownNameError
from ckptlab.formats import read
from ckptlab.formats.locate import at
from ckptlab.sharding.strategies import resolve as resolve_strategy
from ckptlab.views import Flat, Full, Shards, View

_TENSORS: dict[str, type[View]] = {"full": Full, "shards": Shards}
VIEWS = (*_TENSORS, "flat")
OPTIONS = ("drop_variables", "group", "tensor", "view", "strategy", "dtype", "backend", "device")
CONVENTIONS = (
    *("mask_and_scale", "decode_times", "decode_timedelta", "use_cftime", "concat_characters"),
    "decode_coords",
)


class CkptlabBackend(BackendEntrypoint):
    """Opens the folders that `ckptlab.open` opens: `xarray.open_datatree(path, engine="ckptlab", view="shards")`.

    What xarray asks of files that follow the conventions of CF (`decode_times`, `mask_and_scale`, …) is taken and has
    nothing to do here.
    """

    description = "Checkpoints of 3D-parallel training runs (DeepSpeed's, universal, safetensors) with ckptlab"
    open_dataset_parameters = ("filename_or_obj", *OPTIONS, *CONVENTIONS)
    supports_groups = True

    def guess_can_open(self, filename_or_obj: Any) -> bool:
        """Whether it is a checkpoint's folder, or one whose `latest` points to it; folders below are not searched."""
        if not isinstance(filename_or_obj, str | os.PathLike) or not os.path.isdir(filename_or_obj):
            return False
        try:
            return bool(at(os.path.abspath(filename_or_obj)))
        except CheckpointError:
            return False

    def open_datatree(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        view: str = "full",
        strategy: Any = None,
        dtype: Any = None,
        backend: Any = None,
        device: Any = None,
        group: str | None = None,
        **conventions: Any,
    ) -> xr.DataTree:
        """A whole view: "full", "shards" or "flat"; of a `group`, the node of that name alone.

        drop_variables: states to leave out. strategy: as for `ckptlab.open`. dtype, backend, device: as for
        `Checkpoint.full`.
        """
        named = {"view": view, "strategy": strategy, "dtype": dtype, "backend": backend, "device": device}
        if group is not None and group.strip("/"):
            named |= {"drop_variables": drop_variables, "group": group, **conventions}
            return xr.DataTree(self.open_dataset(filename_or_obj, **named))
        _check(conventions)
        dropped = _names(drop_variables)
        found = _view(_read(filename_or_obj, view, strategy), view, dropped, dtype, resolve(backend, device)).tree()
        return found.map_over_datasets(lambda ds: ds.drop_vars(dropped, errors="ignore")) if view == "flat" else found

    def open_groups_as_dict(self, filename_or_obj: Any, **options: Any) -> dict[str, xr.Dataset]:
        """The nodes of `open_datatree` by path."""
        return self.open_datatree(filename_or_obj, **options).to_dict()

    def open_dataset(
        self,
        filename_or_obj: Any,
        *,
        drop_variables: str | Iterable[str] | None = None,
        group: str | None = None,
        tensor: str | None = None,
        view: str = "full",
        strategy: Any = None,
        dtype: Any = None,
        backend: Any = None,
        device: Any = None,
        **conventions: Any,
    ) -> xr.Dataset:
        """One node of a view: a tensor by the model's name, a stack of layers or a flat buffer by its node's.

        group, tensor: its name (xarray's word for it, and ours). UnknownNameError, with the nearest names, if there is
        none.
        """
        _check(conventions)
        source = _read(filename_or_obj, view, strategy)
        tensor = tensor if group is None else group.strip("/").replace("∕", "/")
        if not tensor:
            first = ", ".join(list(source.tensors)[:3])
            raise UnknownNameError(
                f"{source.path}: holds {len(source.tensors)} tensors ({first}, …), one Dataset holds one: give "
                "group= (or tensor=), or use open_datatree for all"
            )
        dropped = _names(drop_variables)
        found = _view(source, view, dropped, dtype, resolve(backend, device)).node(tensor)
        return found.drop_vars(dropped, errors="ignore")


def _check(conventions: Mapping[str, Any]) -> None:
    """TypeError for an option that nobody knows."""
    unknown = [name for name in conventions if name not in CONVENTIONS]
    if unknown:
        raise TypeError(f"engine 'ckptlab' has no option {unknown[0]!r}: it has {', '.join(OPTIONS)}")


def _read(path: Any, view: str, strategy: Any) -> Catalog:
    if not isinstance(path, str | os.PathLike):
        raise CheckpointError(f"a checkpoint is opened by the path of its folder, not by {type(path).__name__}")
    if view not in VIEWS:
        raise CheckpointError(f"{os.fspath(path)}: no view {view!r}: expected one of {', '.join(VIEWS)}")
    return read(path, resolve_strategy(strategy))


def _names(names: str | Iterable[str] | None) -> list[str]:
    return [names] if isinstance(names, str) else list(names or ())


def _view(source: Catalog, view: str, dropped: Sequence[str], dtype: Any, on: Backend) -> View | Flat:
    if view == "flat":
        return Flat(source, None, dtype, on)
    return _TENSORS[view](source, None, [state for state in source.states if state not in dropped], dtype, on)
