"""Colours that people with any colour vision can tell apart, on light and dark pages alike.

The eight are Okabe and Ito's (Color Universal Design, 2008) with grey for their black, which no dark page shows.
Colour never stands alone: what it says, a label, a hatch or a place says too.
"""

from __future__ import annotations

PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#666666")

SHADE = "#2188d9"
"""What amounts are shaded with, at up to half its strength: the page's own text stays legible on it."""


def colour(k: int) -> str:
    """The k-th colour; from the ninth on the same in other strengths."""
    base, round_ = PALETTE[k % len(PALETTE)], k // len(PALETTE) % 3
    return base if not round_ else _mix(base, "#ffffff" if round_ == 1 else "#000000", 0.45)


def tinted(k: int, shade: int) -> str:
    """The k-th colour, every second shade of it lighter: neighbours of one colour are told apart."""
    return _mix(colour(k), "#ffffff", 0.38) if shade % 2 else colour(k)


def ink(fill: str) -> str:
    """ "white" or "black", whichever stands out on a colour (WCAG 2: 4.58 to 1 at least)."""
    r, g, b = (_linear(int(fill[i : i + 2], 16) / 255) for i in (1, 3, 5))
    return "black" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 else "white"


def strength(share: float) -> float:
    """The opacity of SHADE for a share of the largest amount: from nothing, seen at once when it is not nothing."""
    return 0.06 + 0.46 * share if share > 0 else 0.0


def _linear(c: float) -> float:
    return c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4


def _mix(a: str, b: str, share: float) -> str:
    pairs = ((int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5))
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in pairs)
