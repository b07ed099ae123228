"""The format "dcp": torch Distributed Checkpoint, whichever library wrote it."""

from __future__ import annotations

import os
import re
from typing import Any

from ckptlab.catalog import Catalog
from ckptlab.formats.dcp import hugging, megatron, ranks
from ckptlab.formats.dcp.folder import OF_RANK
from ckptlab.formats.dcp.metadata import DATA, METADATA
from ckptlab.formats.dcp.read import MODEL_FOLDER, OPTIMIZER_FOLDER, read_dcp
from ckptlab.strategy import Strategy

LATEST = "latest_checkpointed_iteration.txt"  # Megatron-LM's
_MODULE = b"torch.distributed.checkpoint"


class DCP:
    """`.metadata` and `.distcp` files (FSDP2, torchtitan, accelerate, Lightning), Megatron-core's `torch_dist`, torch's
    safetensors shards, and FSDP's files of each rank."""

    name = "dcp"
    title = "torch Distributed Checkpoint (FSDP, torchtitan, accelerate, Megatron-core)"
    reads = True
    writes = False

    def recognise(self, folder: str) -> str | None:
        """The folder that it would open there: this one, or the one that Megatron's latest_checkpointed_iteration.txt
        names. Files without `.metadata` are its own too: reading says what is missing."""
        if not os.path.isdir(folder):
            return None
        names = set(os.listdir(folder))
        if _marked(folder, names) or any(_marked(os.path.join(folder, n), None) for n in names if _PAIR.fullmatch(n)):
            return folder
        if LATEST in names:
            with open(os.path.join(folder, LATEST), encoding="utf-8", errors="replace") as file:
                step = file.read(64).strip()
            below = os.path.join(folder, f"iter_{int(step):07d}" if step.isdecimal() else step)
            return below if os.path.isdir(below) and _marked(below, None) else None
        return None

    def read(self, path: str, strategy: Strategy | None, faults: Any = None) -> Catalog:
        """See `read_dcp`."""
        return read_dcp(path, strategy, faults)


_PAIR = re.compile(rf"({MODEL_FOLDER}|{OPTIMIZER_FOLDER})\d+")


def _marked(folder: str, names: set[str] | None) -> bool:
    """Whether a folder has one of the files that tell the format."""
    if names is None:
        names = set(os.listdir(folder)) if os.path.isdir(folder) else set()
    if any(DATA.fullmatch(name) or OF_RANK.fullmatch(name) for name in names) or hugging.shards(names):
        return True
    if METADATA in names and _head(folder, METADATA).find(_MODULE) >= 0:
        return True
    if megatron.ABOUT in names and b'"sharded_backend"' in _head(folder, megatron.ABOUT):
        return True
    return "model" in ranks.files_of(names)


def _head(folder: str, name: str) -> bytes:
    with open(os.path.join(folder, name), "rb") as file:
        return file.read(512)
