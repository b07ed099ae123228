"""The format "dcp": torch Distributed Checkpoint, whichever library wrote it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ckptlab.arrays import Tally
from ckptlab.catalog import Catalog
from ckptlab.errors import CheckpointError
from ckptlab.findings import Faults, Strict
from ckptlab.formats.dcp.marks import ABOUT, DATA, METADATA, MODEL_FOLDER, OF_RANK, OPTIMIZER_FOLDER, files_of
from ckptlab.formats.dcp.options import DCPOptions
from ckptlab.formats.fileplan import FilePlan
from ckptlab.formats.format import Format, Listing, Match
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Strategy

_LATEST = "latest_checkpointed_iteration.txt"  # Megatron-LM's
_MODULE = b"torch.distributed.checkpoint"
_PAIR = re.compile(rf"({MODEL_FOLDER}|{OPTIMIZER_FOLDER})\d+")


class DCP(Format):
    """`.metadata` and `.distcp` files (FSDP2, torchtitan, accelerate, Lightning), Megatron-core's `torch_dist`, and
    FSDP's files of each rank."""

    name = "dcp"
    title = "torch Distributed Checkpoint (FSDP, torchtitan, accelerate, Megatron-core)"
    options = DCPOptions
    home = "dcp"
    writes = True
    uneven = True  # as torch.chunk does

    def recognise(self, folder: Listing) -> Match | None:
        """This folder, or the one that Megatron's latest_checkpointed_iteration.txt names. Files without `.metadata`
        are its own too: reading says what is missing."""
        if _marked(folder) or any(_marked(folder.below(name)) for name in folder.folders if _PAIR.fullmatch(name)):
            return Match(folder.path, self.name)
        if _LATEST in folder.names:
            step = folder.below(_LATEST).head(64).decode("utf-8", "replace").strip()
            name = f"iter_{int(step):07d}" if step.isdecimal() else step
            if name in folder.folders and _marked(folder.below(name)):
                return Match(folder.below(name).path, self.name)
        return None

    def read(self, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        """See `read_dcp`."""
        return self._read(path, faults, strategy, None)

    def read_on(self, mesh: Mesh, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        return self._read(path, faults, strategy, mesh)

    def _read(self, path: str, faults: Faults, strategy: Strategy | None, mesh: Mesh | None) -> Catalog | None:
        from ckptlab.formats.dcp.read import read_dcp

        with faults.caught():
            catalog = read_dcp(path, strategy, faults, mesh)
            return None if faults.failed else catalog
        return None

    def target(self, source: Catalog, mesh: Mesh, options: Any) -> Catalog:
        from ckptlab.formats.dcp.target import reshape

        return reshape(source, mesh, options)

    def files(self, source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
        from ckptlab.formats.dcp.write import files

        return files(source, target, tally)

    def payload(self, source: Catalog, target: Catalog) -> int:
        from ckptlab.formats.dcp.target import payload

        return payload(target)

    def verify(self, folder: str, source: Catalog, target: Catalog) -> None:
        """The folder must open, and say of every tensor and state what the target says."""
        from ckptlab.formats.dcp.write import differences

        found = self.read(folder, Strict(), None)
        for text in differences(target, found):
            raise CheckpointError(f"{folder}: {text}: this is a fault of ckptlab; please report it")


def _marked(folder: Listing) -> bool:
    """Whether a folder has one of the files that tell the format."""
    names = folder.names
    if any(DATA.fullmatch(name) or OF_RANK.fullmatch(name) for name in names):
        return True
    if METADATA in names and folder.below(METADATA).head(512).find(_MODULE) >= 0:
        return True
    if ABOUT in names and b'"sharded_backend"' in folder.below(ABOUT).head(512):
        return True
    return "model" in files_of(names)
