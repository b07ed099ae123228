"""What a check has to say: one `Finding` for each fault, and `Health`, all of them together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEVERITIES = ("error", "warning", "info")
"""error: data is lost, wrong, or not this checkpoint's. warning: usable, but something will go wrong with it, or could
not be checked. info: worth knowing, and harmless as far as the files tell; it does not make a checkpoint unhealthy."""

Rank = Mapping[str, int]  # mesh axis → coordinate, as far as it is known: {"pp": 0, "tp": 1}


@dataclass(frozen=True)
class Where:
    """What a finding is about: files (names in the folder), tensors, states, ranks. Empty where that says nothing.

    Tensors come in the model's order: the first is where the fault begins in depth.
    """

    files: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    ranks: tuple[Rank, ...] = ()


@dataclass(frozen=True)
class Finding:
    """One fault: a stable `code`, its severity, where it is, what was expected, what was found, what to do."""

    code: str
    severity: str
    where: Where
    expected: str
    found: str
    todo: str

    def __str__(self) -> str:
        from ckptlab.describe.health import finding_line

        return finding_line(self)

    def _repr_html_(self) -> str:
        from ckptlab.describe.health import finding_html

        return finding_html(self)


@dataclass(frozen=True)
class Checked:
    """How far a check went: files parsed, tensors and bytes of data read; `opened` is False where faults (or a kind
    that ckptlab does not read yet) left only the files one by one to be looked at, `data` where headers alone were."""

    files: int = 0
    tensors: int = 0
    bytes: int = 0
    opened: bool = True
    data: bool = True


@dataclass(frozen=True)
class Health:
    """What `health` found in the checkpoint at `path`, the worst first."""

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
        from ckptlab.describe.health import verdict

        return verdict(self)

    @property
    def codes(self) -> tuple[str, ...]:
        """The codes of the findings, without repeats."""
        return tuple(dict.fromkeys(f.code for f in self.findings))

    def __getitem__(self, code: str) -> tuple[Finding, ...]:
        """The findings of one code; none if there are none."""
        return tuple(f for f in self.findings if f.code == code)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `ckptlab check --json` prints them."""
        from ckptlab.describe.health import to_dict

        return to_dict(self)

    def __repr__(self) -> str:
        from ckptlab.describe.health import health_text

        return health_text(self)

    def _repr_html_(self) -> str:
        from ckptlab.describe.health import health_html

        return health_html(self)


def ordered(findings: list[Finding]) -> tuple[Finding, ...]:
    """The worst first, else as they were found; each once."""
    once = {repr(vars(f)): f for f in findings}
    return tuple(sorted(once.values(), key=lambda f: SEVERITIES.index(f.severity)))
