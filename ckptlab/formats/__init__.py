"""One module or folder a format, reader and writer. `read` opens whatever a path holds."""

from __future__ import annotations

import os

from ckptlab.catalog import Catalog
from ckptlab.formats.locate import locate
from ckptlab.strategy import Strategy

FORMATS = ("deepspeed", "universal", "safetensors")


def read(path: str | os.PathLike[str], strategy: Strategy | None = None) -> Catalog:
    """The catalog of the checkpoint at a path (see `locate`). Headers only; nothing in it is executed."""
    found = locate(path)
    if found.format == "deepspeed":
        from ckptlab.formats.deepspeed.read import read_native

        return read_native(found.path, strategy)
    if found.format == "universal":
        from ckptlab.formats.universal import read_universal

        return read_universal(found.path, strategy)
    if found.format == "dcp":
        from ckptlab.formats.dcp.format import DCP

        return DCP().read(found.path, strategy)
    from ckptlab.formats.safetensors import read_safetensors

    return read_safetensors(found.path)
