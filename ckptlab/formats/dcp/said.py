"""How reading a DCP folder words what it finds, for whoever it is reported to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ckptlab.errors import CheckpointError, UnsafeFileError, UnsupportedError
from ckptlab.findings import PUT_BACK, Faults, Finding

_CODES = {UnsupportedError: "not-read-yet", UnsafeFileError: "unsafe-file"}


@dataclass(frozen=True)
class Said:
    """Findings on the folder `path`, reported to `faults`. Every text names its file."""

    faults: Faults
    path: str

    def error(self, code: str, text: str) -> None:
        """Data is lost or wrong."""
        self._report(code, "error", text, "a checkpoint whose files agree with .metadata", PUT_BACK)

    def warn(self, code: str, text: str) -> None:
        """Something may be wrong."""
        self._report(code, "warning", text, "files of one save", PUT_BACK)

    def remark(self, code: str, text: str) -> None:
        """Worth knowing."""
        self._report(code, "info", text, "", "")

    def _report(self, code: str, severity: str, text: str, expected: str, todo: str) -> None:
        found = text.replace(f"{self.path}: ", "").replace(f"{self.path}{os.sep}", "")
        self.faults.report(
            Finding(code, severity, expected=expected, found=found, todo=todo, about="headers", message=text)
        )

    @contextmanager
    def caught(self, code: str, where: str) -> Iterator[None]:
        """What raises a CheckpointError in here, which does not say where, is said of `where`."""
        try:
            yield
        except CheckpointError as error:
            self.error(_CODES.get(type(error), code), f"{where}: {error}")
