"""torch's safetensors shards (`HuggingFaceStorageWriter`): a file of each rank, in whose metadata stands where its
tensors begin. The shape of the whole is nowhere: it is as far as they reach."""

from __future__ import annotations

import json
import os
import re
import struct

import numpy as np

from ckptlab.errors import CheckpointError
from ckptlab.formats.dcp.assemble import Found
from ckptlab.formats.dcp.boxes import Boxes, grid_of
from ckptlab.formats.dcp.items import Known
from ckptlab.formats.dcp.said import Said
from ckptlab.formats.safetensors.read import read_header
from ckptlab.stored import Stored

SHARD = re.compile(r"shard-(\d{5})-model-\d{5}-of-\d{5}\.safetensors")
_INFO = "DCP_SHARDING_INFO"


def shards(names: frozenset[str] | set[str]) -> list[str]:
    """The shards among names, in the order of ranks."""
    return sorted(name for name in names if SHARD.fullmatch(name))


def find(path: str, said: Said) -> Found:
    """The weights that shards hold together."""
    names = shards(set(os.listdir(path)))
    pieces: dict[str, dict[tuple[int, ...], tuple[int, Stored]]] = {}
    ranks = []
    for file in names:
        match = SHARD.fullmatch(file)
        assert match is not None
        ranks.append(int(match[1]) - 1)
        full = os.path.join(path, file)
        offsets = _offsets(full)
        for name, stored in read_header(full).items():
            start = offsets.get(name, (0,) * len(stored.shape))
            if len(start) != len(stored.shape):
                raise CheckpointError(f"{full}: {name}: begins at {start} in a tensor of {len(stored.shape)} dims")
            pieces.setdefault(name, {}).setdefault(start, (ranks[-1], stored))
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        said.error(
            "dcp-missing-file", f"{path}: shard-{missing[0] + 1:05d}-… of rank {missing[0]} is missing: copy it again"
        )
    found = Found(path, files=tuple(names))
    for name, chunks in pieces.items():
        starts = sorted(chunks)
        boxes = [chunks[start][1] for start in starts]
        at = np.array(starts, np.int64).reshape(len(starts), -1)
        sizes = np.array([one.shape for one in boxes], np.int64).reshape(at.shape)
        shape = tuple((at + sizes).max(axis=0).tolist())
        who = np.array([chunks[start][0] for start in starts], np.int64)
        with said.caught("dcp-chunks", f"{path}: {name}"):
            found.weights[name] = grid_of(Boxes(shape, boxes[0].dtype, at, sizes, who, Known(boxes)))
    return found


def _offsets(path: str) -> dict[str, tuple[int, ...]]:
    """Where the tensors of a shard begin in the whole."""
    with open(path, "rb") as file:
        head = file.read(8)
        header = file.read(struct.unpack("<Q", head)[0]) if len(head) == 8 else b""
    try:
        told = json.loads(json.loads(header).get("__metadata__", {}).get(_INFO, "{}"))
        found = {name: tuple(entry["saved_offsets"]) for name, entry in told.items()}
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path}: {_INFO} does not say where tensors begin ({error}): it is damaged") from None
    if not all(type(n) is int and n >= 0 for start in found.values() for n in start):
        raise CheckpointError(f"{path}: {_INFO} names places that are no whole numbers: it is damaged")
    return found
