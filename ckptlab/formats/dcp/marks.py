"""The names by which files and folders of DCP are known, looked for in any folder: nothing heavy is imported here."""

from __future__ import annotations

import re

METADATA = ".metadata"
DATA = re.compile(r"__(\d{1,9})_(\d+)\.distcp")
ABOUT = "metadata.json"  # Megatron-core's
MODEL_FOLDER = "pytorch_model_fsdp_"  # accelerate's, a number behind
OPTIMIZER_FOLDER = "optimizer_"
OF_RANK = re.compile(r"__(\d{1,9})\.metadata")
FILE = re.compile(r"(model|optim|extra_state)_world_size_(\d{1,9})_rank_(\d{1,9})\.pt")  # FSDP's, one of each rank


def files_of(names: frozenset[str] | set[str]) -> dict[str, dict[int, str]]:
    """ "model", "optim" or "extra_state" → rank → file."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        match = FILE.fullmatch(name)
        if match:
            found.setdefault(match[1], {})[int(match[3])] = name
    return found
