"""Names of tensors with places in them: `layers.{i}.attention.wq.weight`.

A place in braces is a sum of names and numbers: `{i}` the layer, `{e}` the expert, `{i+first}` the layer counted from
the number `first`, `{layers+3}` a number that follows from others. `{*}` is any text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from ckptlab.errors import LayoutError

Places = Mapping[str, int | str]
"""What stands at the places of a name: whole numbers, and the text of `*`."""

_PLACE = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Template:
    """A name with places. `counters` are those places that count (layers, experts), in the order of the text."""

    text: str

    @cached_property
    def places(self) -> tuple[str, ...]:
        """What stands in braces, in order."""
        return tuple(_PLACE.findall(self.text))

    @cached_property
    def form(self) -> str | None:
        """What `form_of` makes of all names of this form; None where names of it differ in more."""
        if any(place == "*" for place in self.places) or re.search(r"[^.]\{|\}[^.]", self.text):
            return None
        return form_of(_PLACE.sub("0", self.text))

    @cached_property
    def counters(self) -> frozenset[str]:
        """The names of places that are found in a tensor's name, not given."""
        return frozenset(term for place in self.places for term in _terms(place) if term in ("i", "e", "*"))

    def match(self, name: str, numbers: Mapping[str, int]) -> dict[str, int | str] | None:
        """What stands at the places of a name; None where it is not of this form. A number that is not given, and
        stands there without a counter, is found (`final` of `{final}`); `first` of `{i+first}` is 0 where not given."""
        found = self._pattern.fullmatch(name)
        if found is None:
            return None
        places: dict[str, int | str] = {}
        for place, text in zip(self.places, found.groups(), strict=True):
            if place == "*":
                places["*"] = text
                continue
            terms = list(_terms(place))
            counted = [t for t in terms if t in ("i", "e")] or terms[:1]
            value = int(text) - sum(_value(t, numbers) for t in terms if t not in counted)
            if counted[0] not in ("i", "e") and value != numbers.get(counted[0], value):
                return None
            if value < 0 or places.setdefault(counted[0], value) != value:
                return None
        return places

    def name(self, places: Places, numbers: Mapping[str, int]) -> str:
        """The name with these places. LayoutError for a number that nobody gave."""

        def put(found: re.Match[str]) -> str:
            if found[1] == "*":
                return str(places["*"])
            total = 0
            for term in _terms(found[1]):
                value = int(term) if term.isdecimal() else places.get(term, numbers.get(term))
                if value is None:
                    raise LayoutError(f"{self.text}: nobody says what {term!r} is: give it, {term}=")
                total += int(value)
            return str(total)

        return _PLACE.sub(put, self.text)

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        parts = _PLACE.split(self.text)
        parts[::2] = map(re.escape, parts[::2])
        parts[1::2] = ["(.+)" if place == "*" else r"(0|[1-9]\d{0,17})" for place in parts[1::2]]
        return re.compile("".join(parts), re.DOTALL)

    def __str__(self) -> str:
        return self.text


def form_of(name: str) -> str:
    """A name with 0 for each number in it: the same for all layers and experts."""
    return ".".join("0" if part.isdecimal() else part for part in name.split("."))


def by_form(names: Iterable[str]) -> dict[str, list[str]]:
    """Names, together with those of the same form."""
    forms: dict[str, list[str]] = {}
    for name in names:
        forms.setdefault(form_of(name), []).append(name)
    return forms


def _terms(place: str) -> Iterator[str]:
    return (term.strip() for term in place.split("+"))


def _value(term: str, numbers: Mapping[str, int]) -> int:
    return int(term) if term.isdecimal() else numbers.get(term, 0)
