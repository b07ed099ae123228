"""Consolidated weights: every tensor whole, under the model's own names, in one file or in numbered ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptlab import paths
from ckptlab.arrays import Drawn
from ckptlab.catalog import MASTER, PARAM, Catalog, Tensor
from ckptlab.errors import CheckpointError
from ckptlab.findings import Finding, Where
from ckptlab.formats.fileplan import Elements, FilePlan, Literal
from ckptlab.words import some

SHARD_BYTES = 5_000_000_000  # files are cut at this size, as Hugging Face's are
_LONGEST_NAME = 255  # characters of a file's name


@dataclass(frozen=True)
class Entry:
    """One tensor to be written under `name`."""

    name: str
    tensor: Tensor
    state: str
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.numel * self.dtype.itemsize

    def elements(self, source: Catalog) -> Elements:
        """All of it, drawn from the source."""
        drawn = Drawn.whole(source, self.tensor.name, self.state, self.dtype)
        return Elements(drawn, self.dtype, 0, self.tensor.numel)


def indexed(path: str) -> dict[str, str]:
    """The file of every tensor, by an index. CheckpointError if it is no index, or names a file elsewhere."""
    try:
        index = json.loads(paths.text(path, "replace"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not JSON ({e}): copy it again") from None
    files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(files, dict) or not all(isinstance(n, str) and _is_name(n) for n in files.values()):
        raise CheckpointError(f"{path}: no weight_map of tensor names to files in this folder: copy it again")
    return files


def _is_name(name: str) -> bool:
    return name == os.path.basename(name) and len(name) <= _LONGEST_NAME


def missing(path: str, names: Sequence[str], expected: str) -> Finding:
    """Files of weights that are not in a folder."""
    found = f"{some(names, 8)} missing"
    todo = "copy the missing files from where the others were written"
    return Finding("missing-file", "error", Where(tuple(names)), expected, found, todo, "files", f"{path}: {found}")


def entries(source: Catalog, dtype: np.dtype | None, aliases: bool = True) -> Iterator[Entry]:
    """What is written: every parameter from its master weight (else the module weight), frozen tensors and buffers too.

    dtype converts floating-point weights; None keeps the master's, buffers keep theirs. aliases: they are written out
    under their own names, so that a strict load finds them.
    """
    for tensor in source.tensors.values():
        wanted = dtype
        state = MASTER if MASTER in tensor.states else PARAM
        if wanted is not None and tensor.states.get(PARAM) == wanted:
            state = PARAM  # the weight as the model had it
        if state not in tensor.states:
            continue
        stored = np.dtype(tensor.states[state])
        convertible = tensor.kind != "buffer" and stored.kind not in "iub"
        for name in (tensor.name, *(tensor.aliases if aliases else ())):
            yield Entry(name, tensor, state, wanted if wanted is not None and convertible else stored)


def sharded(
    source: Catalog,
    dtype: np.dtype | None,
    limit: int,
    single: str,
    plan: Callable[[str, Catalog, Sequence[Entry]], FilePlan],
    aliases: bool = True,
) -> Iterator[FilePlan]:
    """Whole tensors in the file `single`, or, where that would have more than `limit` bytes of them, in numbered ones
    (a larger tensor has one of its own) and an index of them. plan: of a file of this name and these tensors. aliases:
    see `entries`."""
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries(source, dtype, aliases):
        if shards[-1] and filled + entry.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.nbytes
    if len(shards) == 1:
        yield plan(single, source, shards[0])
        return
    stem, suffix = os.path.splitext(single)
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}{suffix}" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        yield plan(name, source, shard)
    index = {
        "metadata": {"total_size": sum(e.nbytes for shard in shards for e in shard)},
        "weight_map": {e.name: name for name, shard in zip(names, shards, strict=True) for e in shard},
    }
    yield FilePlan(f"{single}.index.json", (Literal(json.dumps(index, indent=2, sort_keys=True).encode()),))
