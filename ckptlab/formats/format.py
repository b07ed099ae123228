"""What a format is: how its folders are recognised, what reads them, and how its files are planned.

A format is one folder and one registration: an entry point in the group `ckptlab.formats` names a subclass of `Format`.
Nobody outside a format's folder imports from it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from ckptlab import paths
from ckptlab.arrays import Tally
from ckptlab.catalog import Catalog
from ckptlab.errors import CheckpointError, ReshapeError
from ckptlab.findings import Faults, Finding, not_read_yet
from ckptlab.formats.fileplan import FilePlan
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Strategy


@dataclass(frozen=True)
class Listing:
    """A folder (or a single file) as a format looks at it to see whether it is its own: by names, and first bytes."""

    path: str

    @cached_property
    def is_file(self) -> bool:
        return paths.is_file(self.path)

    @cached_property
    def names(self) -> frozenset[str]:
        """The entries of the folder; nothing of a file."""
        return frozenset() if self.is_file else frozenset(paths.names(self.path))

    @cached_property
    def folders(self) -> frozenset[str]:
        """Those entries that are folders, or links to some."""
        return frozenset(name for name in self.names if paths.is_folder(os.path.join(self.path, name)))

    def below(self, name: str) -> Listing:
        """An entry of the folder."""
        return Listing(os.path.join(self.path, name))

    def head(self, count: int) -> bytes:
        """The first bytes of a file."""
        return paths.read(self.path, 0, count)

    def pointed(self, pointer: str) -> str | None:
        """The folder here that the text of a file (or a link) of that name says; None where there is no such file.
        CheckpointError where it says something else."""
        if pointer not in self.names:
            return None
        file = os.path.join(self.path, pointer)
        if paths.is_folder(file):
            return paths.real(file)
        tag = paths.text(file, "replace", 4096).strip()
        target = os.path.join(self.path, tag)
        if not tag or os.path.isabs(tag) or not paths.is_folder(target):
            tags = sorted(self.folders)
            there = f"there {'is' if len(tags) == 1 else 'are'} {', '.join(tags)}" if tags else "there are no folders"
            raise CheckpointError(
                f"{file}: names {tag!r}, which is no folder in {self.path}; {there}: open one of them"
            )
        return target


@dataclass(frozen=True)
class Match:
    """What a format found: the folder (or file) that it opens. `weights_only`: it holds weights and no training state,
    so that a training checkpoint nearby is not passed over in silence. `also`: folders that hold further parts of
    it."""

    path: str
    format: str
    weights_only: bool = False
    also: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.path} ({self.format})"


@dataclass(frozen=True)
class Beside:
    """Files beside a checkpoint that go along with it (paths), and findings on those that cannot."""

    files: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class NoOptions:
    """Of a target of this format a user may say nothing."""


class Format(ABC):
    """One kind of checkpoint. What a format does not do (reading, writing) it leaves as it is here.

    `name` is what users call it, `title` a line about it; `options` the frozen dataclass of what a user may say of a
    target (see `Checkpoint.reshape`); `home`: the format that its checkpoints are reshaped to where none is said
    (None: they say too little of a run to be laid out on a mesh); `sharded`: its files are those of a mesh's ranks;
    `cuts`: the mesh axes that may cut a tensor in them (None: any, or none at all); `pointed`: a file beside its
    folders names one of them (see `pointer`); `uneven`: it cuts a dim over an axis that does not divide it,
    in a way of its own.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    options: ClassVar[type] = NoOptions
    home: ClassVar[str | None] = None
    reads: ClassVar[bool] = True
    writes: ClassVar[bool] = False
    sharded: ClassVar[bool] = True
    cuts: ClassVar[tuple[str, ...] | None] = None
    pointed: ClassVar[bool] = False
    uneven: ClassVar[bool] = False

    @abstractmethod
    def recognise(self, folder: Listing) -> Match | None:
        """What it would open there. None where its markers are absent; where they are there and something is wrong it
        raises an error: a broken checkpoint is never another format's."""

    def read(self, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        """The catalog of what `recognise` matched: from headers only, executing nothing. What is wrong is reported to
        `faults`, which raises it or goes on; None where there was an error."""
        faults.report(not_read_yet(f"{path}: this is {self.title}, which ckptlab cannot open yet"))
        return None

    def read_on(self, mesh: Mesh, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        """The catalog of a checkpoint on the mesh that somebody says its run had. CheckpointError where it says itself
        on which mesh it lies."""
        raise CheckpointError(f"{path}: {self.title} says itself on which mesh it lies: leave mesh= out")

    def read_parts(self, match: Match, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        """The catalog of a checkpoint whose parts are in several folders."""
        faults.report(not_read_yet(f"{match.path}: {self.title}: ckptlab opens such folders one at a time"))
        return None

    def target(self, source: Catalog, mesh: Mesh, options: Any) -> Catalog:
        """What this format would hold of a source on a mesh, nothing stored behind it. ReshapeError with every reason,
        and the nearest that works, where it cannot be."""
        raise ReshapeError(f"{source.path}: ckptlab does not write {self.name} checkpoints")

    def files(self, source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
        """Every file of the target, drawn from the source. `tally` counts what is then read."""
        return iter(())

    def payload(self, source: Catalog, target: Catalog) -> int:
        """Bytes of tensors in all files of a target, padding included."""
        return target.nbytes

    def verify(self, folder: str, source: Catalog, target: Catalog) -> None:  # noqa: B027 (not every format has to)
        """Read what was written back. CheckpointError where it does not say what the target says."""

    def beside(self, source: Catalog, target: Catalog) -> Beside:
        """What lies beside a source's folder, and is to lie beside the target's."""
        return Beside()

    def pointer(self, destination: str, source: Catalog) -> str | None:
        """The name of the file beside a destination that is to name it; None: there is none to write."""
        return None
