"""One module or folder a format, reader and writer. `read` opens whatever a path holds."""

from __future__ import annotations

import os

from ckptlab.catalog import Catalog
from ckptlab.findings import Faults, Strict
from ckptlab.formats.locate import Location, locate
from ckptlab.strategy import Strategy

FORMATS = ("deepspeed", "universal", "safetensors")


def read(path: str | os.PathLike[str], strategy: Strategy | None = None) -> Catalog:
    """The catalog of the checkpoint at a path (see `locate`). Headers only; nothing in it is executed.

    Raises the first error that its reader finds.
    """
    catalog = read_at(locate(path), Strict(), strategy)
    assert catalog is not None, "a reader that has no catalog has reported why"
    return catalog


def read_at(place: Location, faults: Faults, strategy: Strategy | None = None) -> Catalog | None:
    """The catalog of what was found at a place; None where `faults` was told of an error."""
    if place.format == "deepspeed":
        from ckptlab.formats.deepspeed.read import read_native

        return read_native(place.path, faults, strategy)
    if place.format == "universal":
        from ckptlab.formats.universal import read_universal

        return read_universal(place.path, faults, strategy)
    from ckptlab.formats.safetensors import read_safetensors

    return read_safetensors(place.path, faults)
