"""The families there are: ours, and those of installed packages (entry point group `ckptlab.families`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ckptlab.arguments import explained
from ckptlab.catalog import Catalog, Piece
from ckptlab.errors import LayoutError
from ckptlab.findings import Finding
from ckptlab.registry import Registry
from ckptlab.sharding.families.family import Family, fits_forms
from ckptlab.sharding.families.lines import SIDES, Rename, Side, other
from ckptlab.sharding.families.models import families
from ckptlab.sharding.families.names import by_form
from ckptlab.sharding.families.numbers import told
from ckptlab.words import number_of, some

FAMILIES: Registry[Family] = Registry(
    "family",
    "ckptlab.families",
    LayoutError,
    families(),
    wrong=lambda name, value: "" if isinstance(value, Family) else f"expected a Family, found {value!r}",
)


@explained
def resolve(family: Family | str, names: Iterable[str] = (), side: Side | None = None) -> Family:
    """A family from its object, its name, or that of a model ("llama", "mixtral"), of whose families the one that takes
    most of the names (on that side; None: on either). LayoutError, with the names there are, where there is none."""
    return _alike(family, list(names), SIDES if side is None else (side,))[0]


@explained
def found(names: Iterable[str], side: Side = "left") -> Family | None:
    """The family that takes the most of the names on a side; None where none takes more than half."""
    alike = _alike(None, list(names), (side,))
    return alike[0] if alike else None


def unwrapped(catalog: Catalog) -> Catalog:
    """A catalog without what wrappers put before most of its names."""
    wrappers = FAMILIES.get("wrappers")
    while wrappers.fits(catalog.tensors, "left")[0] * 2 > len(catalog.tensors):
        catalog = wrappers.onto(catalog, "right")
    return catalog


@explained
def towards(catalog: Catalog, side: Side, family: Family | str | None = None, **numbers: Any) -> Catalog:
    """A catalog under the names of one side, what wrappers put before them taken away; the same if it has them already.

    family: as `resolve` takes it; None finds one by the names. Of several that fit alike it takes the first by which
    ranks hold whole heads, and a finding says so. LayoutError where no family takes the names, and as `Family.onto`.
    """
    bare = unwrapped(catalog)
    names = [*bare.tensors]
    alike = _as_told(bare, _alike(family, names, (other(side),)))
    there = _alike(family, names, (side,))
    if there and (not alike or there[0].fits(names, side) > alike[0].fits(names, other(side))):
        return bare
    if not alike:
        raise LayoutError(
            f"{catalog.path}: no family takes the names of {number_of(len(names), 'tensor')} ({some(names, 4)}): say "
            f"which, family=, one of {', '.join(FAMILIES.names())}, or lines of your own"
        )
    seen: list[tuple[Family, Catalog]] = []
    refused: LayoutError | None = None
    for one in alike:
        try:
            seen.append((one, one.onto(bare, side, **numbers)))
        except LayoutError as error:
            refused = refused or error
    if refused is not None and not seen:
        raise refused
    fewest = min(_unplaced(made) for _, made in seen)
    best = [(one, made) for one, made in seen if _unplaced(made) == fewest]
    chosen, made = best[0]
    others = [one for one, of in best[1:] if not _same(made, of)]
    if not others:
        return made
    assumed = Finding(
        "family-assumed",
        "warning",
        expected="names that one family takes",
        found=f"the family {chosen.name} is assumed; {', '.join(map(str, others))} would fit as well",
        todo="say family= if it is not so",
        about="headers",
    )
    return replace(made, findings=(*made.findings, assumed))


@explained
def like(catalog: Catalog, model: Catalog, family: Family | str | None = None, **numbers: Any) -> Catalog:
    """A catalog with transformers' names under those that another of the same model has, what wrappers put before them
    too. LayoutError where no family takes the model's names, and as `Family.onto`."""
    bare, wrappers, prefixes = [*model.tensors], FAMILIES.get("wrappers"), list[str]()
    while bare and (prefix := _prefix(wrappers, bare)):
        prefixes.append(prefix)
        bare = [name.removeprefix(prefix) for name in bare]
    alike = _as_told(model, _alike(family, bare, ("left",)))
    if not alike:
        raise LayoutError(f"{model.path}: no family takes its names ({some(bare, 4)}): say which, family=")
    found = {k: n for k, n in alike[0].take(bare, "left", {}).numbers.items() if k != "layers"}
    made = alike[0].onto(catalog, "left", **{**found, **numbers})
    for prefix in reversed(prefixes):
        made = Family("wrapper", "", (Rename(f"{prefix}{{*}}", "{*}"),)).onto(made, "left")
    return made


def _prefix(wrappers: Family, names: list[str]) -> str:
    """What a wrapper puts before all of the names; nothing if none does."""
    prefixes = (line.whole.removesuffix("{*}") for line in wrappers.lines)
    return next((prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)), "")


def _alike(family: Family | str | None, names: list[str], sides: Iterable[Side]) -> list[Family]:
    """The families that take the most of the names, of those that a user says (of none: more than half of them)."""
    if isinstance(family, Family):
        return [family]
    if family in FAMILIES.names():
        return [FAMILIES.get(str(family))]
    every = FAMILIES.every()
    if family is None:
        mine = [one for one in every if one.model_types]
    else:
        model = family.lower().replace("_", "-")
        mine = [f for f in every if f.name.startswith(f"{model}-") or model.replace("-", "_") in f.model_types]
        if not mine:
            FAMILIES.get(family)  # the error that lists them
    forms = by_form(names)
    counts = [max(fits_forms(one, forms, side)[0] for side in sides) for one in mine]
    best = max(counts)
    if family is None and best * 2 <= len(names):
        return []
    return [one for one, count in zip(mine, counts, strict=True) if count == best]


def _as_told(catalog: Catalog, alike: list[Family]) -> list[Family]:
    """Those of several families whose switches are as the program's args say."""
    said = list(told(catalog))
    return [one for one in alike if len(alike) == 1 or all(_says(said, word) is value for word, value in one.told)]


def _says(said: Iterable[Mapping[str, Any]], word: str) -> bool:
    """What a program's args say of a switch; False where they do not."""
    return next((bool(source[word]) for source in said if source.get(word) is not None), False)


def _same(a: Catalog, b: Catalog) -> bool:
    """Whether two views of one catalog are the same."""
    return a.seen.keys() == b.seen.keys() and all(
        len(pieces) == len(b.seen[name]) and all(map(Piece.same, pieces, b.seen[name]))
        for name, pieces in a.seen.items()
    )


def _unplaced(catalog: Catalog) -> int:
    """How many tensors ranks hold no whole parts of."""
    return sum(len(finding.where.tensors) for finding in catalog.findings if finding.code == "family-unplaced")
