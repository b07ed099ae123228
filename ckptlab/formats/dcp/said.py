"""What reading a DCP folder finds, and to whom it is said: the one place to change when findings get a type of their
own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ckptlab.catalog import Notice
from ckptlab.errors import CheckpointError


@dataclass
class Said:
    """What was found. `keep`: errors are kept with the rest, as a check wants them; otherwise the first is raised."""

    keep: bool = False
    errors: list[Notice] = field(default_factory=list)
    notices: list[Notice] = field(default_factory=list)

    def error(self, code: str, text: str) -> None:
        """Data is lost or wrong."""
        if not self.keep:
            raise CheckpointError(text)
        self.errors.append(Notice(code, text))

    def notice(self, code: str, text: str) -> None:
        """Worth knowing."""
        self.notices.append(Notice(code, text))

    @contextmanager
    def caught(self, code: str, where: str) -> Iterator[None]:
        """What raises a CheckpointError in here, which does not say where, is said of `where`."""
        try:
            yield
        except CheckpointError as error:
            if not self.keep:
                raise type(error)(f"{where}: {error}") from None
            self.errors.append(Notice(code, f"{where}: {error}"))
