"""The families there are: ours, and those of installed packages (entry point group `ckptlab.families`)."""

from __future__ import annotations

from collections.abc import Iterable

from ckptlab.errors import LayoutError
from ckptlab.registry import Registry
from ckptlab.sharding.families.family import Family
from ckptlab.sharding.families.lines import Side
from ckptlab.sharding.families.models import families

FAMILIES: Registry[Family] = Registry("family", "ckptlab.families", LayoutError, families())


def resolve(family: Family | str, names: Iterable[str] = (), side: Side = "left") -> Family:
    """A family from its object, its name, or that of a model ("llama", "mixtral"), of whose families the one that takes
    most of the names. LayoutError, with the names there are, where there is none."""
    if isinstance(family, Family):
        return family
    if family in FAMILIES.names():
        return FAMILIES.get(family)
    model = family.lower().replace("_", "-")
    mine = [f for f in every() if f.name.startswith(f"{model}-") or model.replace("-", "_") in f.model_types]
    if not mine:
        return FAMILIES.get(family)  # the error that lists them
    names = list(names)
    return max(mine, key=lambda f: f.fits(names, side)[0])


def every() -> list[Family]:
    """All that are registered."""
    return [FAMILIES.get(name) for name in FAMILIES.names()]


def found(names: Iterable[str], side: Side = "left") -> Family | None:
    """The family that takes the most of the names on a side, and all that a model's weights need of a layer; None where
    none takes more than half."""
    names = list(names)
    counts = [(f.fits(names, side)[0], f) for f in every() if f.model_types]
    best, family = max(counts, key=lambda count: count[0], default=(0, None))
    return family if best * 2 > len(names) else None
