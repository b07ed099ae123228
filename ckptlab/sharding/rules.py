"""Rules that a user writes: patterns of names, each with a layout, in Python or in JSON."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptlab.aliases import Shape
from ckptlab.arguments import explained
from ckptlab.errors import CkptlabError, LayoutError, NotationError
from ckptlab.findings import Finding, Where
from ckptlab.layout import Layout
from ckptlab.words import some


@explained
@dataclass(frozen=True)
class Rules:
    """Regular expressions (the whole name must match) and what they mean; the first that matches wins."""

    rules: tuple[tuple[str, Layout], ...]
    name: str = "rules"

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        return next((layout for pattern, layout in self.rules if re.fullmatch(pattern, name)), None)

    @staticmethod
    def of(mapping: Mapping[str, str | Layout | Mapping[str, Any]], name: str = "rules") -> Rules:
        """From {pattern: line of notation, Layout, or {"layout": line} with a Layout's other fields beside it}.

        NotationError for a bad line, LayoutError for a bad pattern, field or value.
        """
        rules = []
        for pattern, layout in mapping.items():
            try:
                re.compile(pattern)
            except re.error as e:
                raise LayoutError(f"strategy {name}: {pattern!r} is no regular expression: {e}") from None
            rules.append(
                (pattern, layout if isinstance(layout, Layout) else _layout_of(layout, f"{name}: {pattern!r}"))
            )
        return Rules(tuple(rules), name)


def unmatched(strategy: Any, names: Collection[str]) -> Finding | None:
    """What there is to say of rules that match none of these names of tensors: they say nothing."""
    if not isinstance(strategy, Rules):
        return None
    idle = [pattern for pattern, _ in strategy.rules if not any(re.fullmatch(pattern, name) for name in names)]
    if not idle or not names:
        return None
    severity = "warning" if len(idle) == len(strategy.rules) else "info"
    found = f"{strategy.name}: {some(list(map(repr, idle)), 3)}: no tensor has such a name"
    expected = f"patterns that match whole names, such as {next(iter(names))!r}"
    todo = "look at the names (ckptlab ls); `.*` at the start of a pattern stands for what is before"
    return Finding("strategy-unmatched", severity, Where(), expected, found, todo, "headers")


def _layout_of(told: Any, where: str) -> Layout:
    """A layout as JSON says it. LayoutError with `where` it stands for what is none."""
    fields: Any = {"layout": told} if isinstance(told, str) else told
    known = {"layout", "dims", "sizes", "totals", "units", "padded", "stages", "replicas"}
    if not isinstance(fields, Mapping) or not isinstance(fields.get("layout"), str):
        raise LayoutError(f'strategy {where}: expected a line of notation, or {{"layout": line, …}}, found {told!r}')
    if unknown := sorted(map(str, fields.keys() - known)):
        raise LayoutError(f"strategy {where}: no field {unknown[0]!r}: expected {', '.join(sorted(known))}")
    others: dict[str, Any] = {key: value for key, value in fields.items() if key != "layout"}
    for key, kind in (("stages", int), ("dims", str)):
        if key in others and not (isinstance(others[key], list) and all(isinstance(v, kind) for v in others[key])):
            raise LayoutError(f"strategy {where}: {key}: expected a list of {kind.__name__}, found {others[key]!r}")
    for key in ("sizes", "totals", "units", "padded"):
        if key in others and not isinstance(others[key], Mapping):
            raise LayoutError(f"strategy {where}: {key}: expected an object, name: length, found {others[key]!r}")
    try:
        if "padded" in others:
            others["padded"] = {int(dim): size for dim, size in others["padded"].items()}
        return Layout(fields["layout"], **others)
    except NotationError as e:
        raise NotationError(f"strategy {where}: {e}") from None
    except (CkptlabError, ValueError) as e:
        raise LayoutError(f"strategy {where}: {e}") from None
