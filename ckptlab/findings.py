"""What is wrong with a checkpoint, and to whom it is said.

A `Finding` is one fault, warning or remark. Whoever reads files reports what is found to a `Faults`: that of `open`
raises at the first error, that of `check` keeps everything and lets the reader go on, so that every rule stands once.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ckptlab import paths
from ckptlab.errors import CheckpointError, CkptlabError, UnsafeFileError, UnsupportedError
from ckptlab.plain import plain
from ckptlab.shown import Shown

SEVERITIES = ("error", "warning", "info")
"""error: data is lost, wrong, not this checkpoint's, or of a kind that ckptlab does not read. warning: usable, but
something will go wrong with it. info: worth knowing, and harmless as far as the files tell; it does not make a
checkpoint unhealthy."""

SUBJECTS = ("files", "headers", "code", "data", "target")
"""files: missing, damaged, in the way. headers: what files say of one another. code: what other programs would run when
they load the files. data: numbers. target: what a reshape has to assume or change. `open` raises exactly where there is
an error of files or headers."""

PUT_BACK = "put back the file of this run and step; if there is none, go back to an earlier step"
_ERRORS = {"unsafe-file": UnsafeFileError, "unsupported-file": UnsupportedError, "not-read-yet": UnsupportedError}

Rank = Mapping[str, int]  # mesh axis → coordinate, as far as it is known: {"pp": 0, "tp": 1}
T = TypeVar("T")


@dataclass(frozen=True)
class Where:
    """What a finding is about: files (names in the folder), tensors, states, ranks. Empty where that says nothing.

    Tensors come in the model's order: the first is where the fault begins in depth.
    """

    files: tuple[str, ...] = ()
    tensors: tuple[str, ...] = ()
    states: tuple[str, ...] = ()
    ranks: tuple[Rank, ...] = ()


@dataclass(frozen=True, repr=False)
class Finding(Shown):
    """One fault: a stable `code`, its severity, where it is, what was expected, what was found, what to do, and what it
    is `about` (see SUBJECTS). `message` is the whole in one sentence, where `found` needs the rest beside it."""

    code: str
    severity: str
    where: Where = field(default_factory=Where)
    expected: str = ""
    found: str = ""
    todo: str = ""
    about: str = "data"
    message: str = ""

    @property
    def text(self) -> str:
        """What there is to say, for people."""
        return self.message or self.found

    @property
    def refuses(self) -> bool:
        """`open` raises where it finds this."""
        return self.severity == "error" and self.about in ("files", "headers")

    @property
    def error(self) -> CheckpointError:
        """The error that says the same."""
        return _ERRORS.get(self.code, CheckpointError)(self.text)

    def to_dict(self) -> dict[str, Any]:
        """Plain values: see `Health.to_dict`."""
        where = {k: [dict(v) if k == "ranks" else v for v in values] for k, values in vars(self.where).items()}
        told = {k: v for k, v in vars(self).items() if k != "message"}
        return {**plain(told), "where": where}


def not_read_yet(message: str) -> Finding:
    """A kind of checkpoint that ckptlab knows but does not read."""
    return Finding(
        "not-read-yet",
        "error",
        Where(),
        "a kind of checkpoint that ckptlab reads",
        message,
        "its files were looked at one by one; how their tensors belong together could not be checked",
        "headers",
    )


def contradiction(path: str, message: str, *tensors: str) -> Finding:
    """A file that does not go with the others. message: the whole, in which the path stands."""
    found = message.replace(f"{os.path.dirname(path)}{os.sep}", "")
    where = Where((os.path.basename(path),), tensors)
    expected = "files that agree with one another"
    return Finding("contradiction", "error", where, expected, found, PUT_BACK, "headers", message)


class Faults(ABC):
    """Where a reader reports what it finds. `findings`: those that were kept."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []

    @property
    def failed(self) -> bool:
        """There was an error: what needs whole files that agree cannot be told any more."""
        return any(f.refuses for f in self.findings)

    def keep(self, finding: Finding) -> None:
        """Add a finding to those that are kept, once."""
        if finding not in self.findings:
            self.findings.append(finding)

    @abstractmethod
    def report(self, finding: Finding) -> None:
        """Take a finding, or raise it."""

    @abstractmethod
    def caught(self, code: str = "contradiction", *files: str) -> Any:
        """A context: an error that is raised in it becomes a finding of that code on these files, or goes on."""

    def read(self, folder: str, name: str, parse: Callable[[str], T]) -> T | None:
        """What `parse` makes of a file; None if it cannot be read, which is a finding."""
        try:
            return parse(paths.join(folder, name))
        except (CkptlabError, OSError) as error:
            self.report(unreadable(folder, name, error))
            return None


class Strict(Faults):
    """Raises the first error; keeps the rest."""

    def report(self, finding: Finding) -> None:
        if finding.refuses:
            raise finding.error
        self.keep(finding)

    @contextmanager
    def caught(self, code: str = "contradiction", *files: str) -> Iterator[None]:
        yield


class Collecting(Faults):
    """Keeps every finding, and what could be read of the files of `folder`: `files[name]`, as its parser gave it; of
    the others the names, `unread`."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.unread: list[str] = []

    def report(self, finding: Finding) -> None:
        self.keep(finding)

    @contextmanager
    def caught(self, code: str = "contradiction", *files: str) -> Iterator[None]:
        try:
            yield
        except UnsupportedError as error:
            self.report(not_read_yet(self._said(error)))
        except UnsafeFileError as error:
            expected, todo = "a file that tells of a checkpoint and of nothing else", "do not use the file"
            self.report(Finding("unsafe-file", "error", Where(files), expected, self._said(error), todo, "headers"))
        except CkptlabError as error:
            expected = "files that agree with one another" if code == "contradiction" else "headers as DeepSpeed's are"
            self.report(Finding(code, "error", Where(files), expected, self._said(error), PUT_BACK, "headers"))

    def read(self, folder: str, name: str, parse: Callable[[str], T]) -> T | None:
        found = super().read(folder, name, parse)
        if found is None:
            self.unread.append(name)
        else:
            self.files[name] = found
        return found

    def _said(self, error: CkptlabError) -> str:
        """What an error says, without the folder that the reader knows."""
        return str(error).replace(f"{self.folder}: ", "").replace(f"{self.folder}{os.sep}", "")


def unreadable(folder: str, name: str, error: Exception) -> Finding:
    """The finding on a file that cannot be read."""
    code, todo = (
        "damaged-file",
        "copy it again from the run's storage; if it is cut there too, go back to an earlier step",
    )
    message = str(error)
    if isinstance(error, UnsafeFileError):
        code = "unsafe-file"
        todo = "do not load it with anything that unpickles; get it again from where it was written"
    elif isinstance(error, UnsupportedError):
        code, todo = "unsupported-file", "save it again with a current torch where you trust it"
    elif not isinstance(error, CheckpointError):
        code, todo = "unreadable-file", "see that it can be read (permissions, storage), then check again"
        message = f"{os.path.join(folder, name)}: cannot be read: {error}"
    found = message.replace(f"{folder}{os.sep}", "")
    return Finding(code, "error", Where((name,)), "a complete file that can be read", found, todo, "files", message)
