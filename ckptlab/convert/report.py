"""What a conversion did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ckptlab.convert.journal import Done


@dataclass(frozen=True)
class Report:
    """What a conversion did: `files` of the destination, those `resumed` from an interrupted run, bytes of tensor data,
    the pointer beside the destination that names it (None: none was written), and what was copied `beside` it.

    verified: bytes of the source that were compared with the checksums beside them. not_finite: how many elements of
    what is written are NaN or infinite, by "tensor: state".
    """

    destination: str
    latest: str | None
    files: int
    resumed: int
    bytes_written: int
    verified: int = 0
    not_finite: Mapping[str, int] = field(default_factory=dict)
    beside: tuple[str, ...] = ()


def not_finite(done: Iterable[Done]) -> dict[str, int]:
    """How many elements of these files are NaN or infinite, by "tensor: state"."""
    return dict(sum((Counter(file.odd) for file in done), Counter[str]()))
