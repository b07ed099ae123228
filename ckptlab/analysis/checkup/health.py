"""What a check comes to: `Health`, every finding together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ckptlab.arguments import explained
from ckptlab.findings import SEVERITIES, Finding
from ckptlab.shown import Shown
from ckptlab.words import number_of


@dataclass(frozen=True)
class Checked:
    """How far a check went: files parsed, tensors and bytes of data read; `opened` is False where faults (or a kind
    that ckptlab does not read yet) left only the files one by one to be looked at, `data` where headers alone were."""

    files: int = 0
    tensors: int = 0
    bytes: int = 0
    opened: bool = True
    data: bool = True


@explained
@dataclass(frozen=True, repr=False)
class Health(Shown):
    """What `check` found in the checkpoint at `path`, the worst first."""

    path: str
    format: str
    mesh: str | None
    findings: tuple[Finding, ...] = ()
    checked: Checked = field(default_factory=Checked)

    @property
    def healthy(self) -> bool:
        """Nothing was found that is worse than "info"."""
        return all(f.severity == "info" for f in self.findings)

    @property
    def verdict(self) -> str:
        """One line: whether it is healthy, and how many findings of each severity there are."""
        counts = Counter(f.severity for f in self.findings)
        words = {"error": "error", "warning": "warning", "info": "remark"}
        told = ", ".join(number_of(counts[s], word) for s, word in words.items() if counts[s])
        if self.healthy:
            return "healthy" + (f", with {told}" if told else "")
        return f"not healthy: {told}"

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, without repeats."""
        return tuple(dict.fromkeys(f.code for f in self.findings))

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __getitem__(self, code: str) -> tuple[Finding, ...]:
        """The findings of one code; none if there are none."""
        return tuple(f for f in self.findings if f.code == code)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `ckptlab check --json` prints them; what is infinite or NaN is text.

        Keys: healthy, path, format, mesh, checked {files, tensors, bytes, opened, data}, findings [{code, severity,
        where {files, tensors, states, ranks [{axis: coordinate}]}, expected, found, todo, about}].
        """
        return {
            "healthy": self.healthy,
            "path": self.path,
            "format": self.format,
            "mesh": self.mesh,
            "checked": vars(self.checked),
            "findings": [f.to_dict() for f in self.findings],
        }


def ordered(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """The worst first, else as they were found; each once."""
    once = {repr(vars(f)): f for f in findings}
    return tuple(sorted(once.values(), key=lambda f: SEVERITIES.index(f.severity)))
