"""Formats: what is stored, read and written. One folder each; read format.py first, then registered.py.

`torch` is what several of them are written in: pickles and zips, read without torch and without executing anything.
"""

from __future__ import annotations

import os

from ckptlab.catalog import Catalog
from ckptlab.findings import Faults, Strict
from ckptlab.formats.format import Format, Listing, Match
from ckptlab.formats.locate import locate
from ckptlab.formats.registered import FORMATS, every, get
from ckptlab.sharding.strategies import Strategy

__all__ = ["FORMATS", "Format", "Listing", "Match", "every", "get", "locate", "read", "read_at"]


def read(path: str | os.PathLike[str], strategy: Strategy | None = None) -> Catalog:
    """The catalog of the checkpoint at a path (see `locate`). Headers only; nothing in it is executed.

    Raises the first error that its reader finds.
    """
    catalog = read_at(locate(path), Strict(), strategy)
    assert catalog is not None, "a reader that has no catalog has reported why"
    return catalog


def read_at(match: Match, faults: Faults, strategy: Strategy | None = None) -> Catalog | None:
    """The catalog of what a format matched; None where `faults` was told of an error."""
    return get(match.format).read(match.path, faults, strategy)
