"""Numbers and names for people. Sizes are decimal (1 kB is 1000 bytes), as disks and `--max-shard-size` have them."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence

_SIZES = ("kB", "MB", "GB", "TB", "PB")
_UNSEEN = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_COUNTS = ("thousand", "million", "billion", "trillion")


def size(nbytes: float) -> str:
    """Bytes in three figures: `6.46 kB`, `2.5 TB`."""
    if nbytes < 1000:
        return f"{nbytes:.0f} bytes" if nbytes else "0"
    for unit in _SIZES:
        nbytes /= 1000
        if nbytes < 999.5 or unit == _SIZES[-1]:
            break
    return f"{nbytes:.3g} {unit}" if nbytes < 999.5 else f"{nbytes:,.0f} {unit}"


def figure(value: float) -> str:
    """Three figures, so that a column of them lines up: `1.79`, `13.0`, `237`."""
    if 0 < value < 0.005:
        return "<.01"
    return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f}"


def unit_of(nbytes: float) -> tuple[int, str]:
    """The unit (its bytes, its name) in which `nbytes` has one to three figures before the point."""
    for power in range(len(_SIZES), 0, -1):
        if nbytes >= 1000**power:
            return 1000**power, _SIZES[power - 1]
    return 1, "bytes"


def count(n: int) -> str:
    """`13,312`, and from a million on in words too: `6,738,415,616 (6.74 billion)`."""
    rounded = float(n)
    word = ""
    for unit in _COUNTS:
        if rounded < 999.5:
            break
        rounded, word = rounded / 1000, unit
    return f"{n:,} ({rounded:.3g} {word})" if n >= 1_000_000 else f"{n:,}"


def elements(n: int) -> str:
    """`13,312`; from ten million on `43,159.4 M`: a column must not become too wide."""
    return f"{n:,}" if n < 10_000_000 else f"{n / 1e6:,.1f} M"


def number_of(n: int, thing: str) -> str:
    """`1 tensor`, `1,200 tensors`."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def ranges(numbers: Iterable[int], to: str = "–") -> str:
    """`0–3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and runs[-1][1] == n - 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}{to}{b}" for a, b in runs)


def shape_text(sizes: Iterable[object]) -> str:
    """`101 × 16` of a shape; `scalar` of that of a single number."""
    return " × ".join(map(str, sizes)) or "scalar"


def place_text(coordinate: Mapping[str, int]) -> str:
    """`tp 1 · pp 0 · dp 3`, in the order given: where a rank stands, or the degrees of a mesh."""
    return " · ".join(f"{axis} {k}" for axis, k in coordinate.items())


def some(names: Sequence[str], limit: int = 4) -> str:
    """The first few, and how many more there are."""
    more = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {more:,} more" if more > 0 else "")


def more(left: int, what: str = "") -> list[str]:
    """A line `… and 1,200 more` (what), where a list leaves some out; no line where it does not."""
    return [f"… and {left:,} more{what}"] if left > 0 else []


def shorten(name: str, width: int) -> str:
    """The name in at most `width` characters: the middle goes, beginning and end tell more."""
    if len(name) <= width:
        return name
    head = (width - 1) // 3
    return f"{name[:head]}…{name[head - width + 1 :]}"


def escaped(text: str) -> str:
    """Text for a terminal: characters that would command it, turn its direction or cannot be shown are spelled out."""
    return _UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 2, 80, 80, 40


def brief(value: object) -> str:
    """What a file holds, at most a line of it."""
    text = _Brief().repr(value)
    return text if len(text) <= 200 else f"{text[:199]}…"
