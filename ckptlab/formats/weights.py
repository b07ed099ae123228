"""Consolidated weights: every tensor whole, under the model's own names, in one file or in numbered ones."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ckptlab import paths
from ckptlab.arrays import Drawn
from ckptlab.catalog import DTYPES, PARAM, Catalog, Tensor
from ckptlab.errors import CheckpointError, ReshapeError
from ckptlab.findings import Finding, Where
from ckptlab.formats.fileplan import Elements, FilePlan, Literal
from ckptlab.formats.format import Listing
from ckptlab.formats.known import Unread
from ckptlab.words import some

SHARD_BYTES = 5_000_000_000  # files are cut at this size, as Hugging Face's are
_LONGEST_NAME = 255  # characters of a file's name
_MOST_FILES = 10_000
# files beside weights in which programs keep an optimizer: accelerate, transformers, torchtune, OLMo
OPTIMIZERS = re.compile(r"optimizer(?:_\d+)?\.(?:pt|bin|pth)|optim\.pt|recipe_state\.pt")
_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<of>\d{5})(?P<suffix>\.\w+)")


@dataclass(frozen=True)
class WeightOptions:
    """What a user may say of consolidated weights. `dtype`: "bf16", "fp16" or "fp32" for floating-point weights, None
    keeps the master's (float32). `max_shard_bytes`: at which size files are cut."""

    dtype: str | None = None
    max_shard_bytes: int = SHARD_BYTES

    @property
    def wanted(self) -> np.dtype | None:
        """What floating-point weights become. ReshapeError for a name of no dtype."""
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ReshapeError(f"dtype {self.dtype!r}: expected one of {', '.join(DTYPES)}")
        return None if self.dtype is None else DTYPES[self.dtype]


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


def of_several_ranks(folder: str, file: str) -> Iterator[Finding]:
    """A finding on a file that is opened by itself, and beside which are those of other ranks."""
    kind = None if paths.is_far(folder) else Unread.of_ranks(Listing(folder), file)
    if kind is not None:
        found = f"{file} is one of {kind.title}: its tensors may be parts of the model's"
        where, expected = Where((file,)), "tensors that are whole"
        yield Finding("of-several-ranks", "warning", where, expected, found, kind.todo, "headers")


def optimizer_left_out(places: Sequence[str], files: tuple[str, ...]) -> Finding:
    """An optimizer's states beside weights, which are read alone."""
    found = f"what an optimizer holds ({some(places, 4)}) stands beside the weights, and is not read"
    todo = "nothing, for the weights; to train on, load it with the program that wrote it"
    return Finding("optimizer-left-out", "info", Where(files), "weights alone", found, todo, "headers")


def unnumbered(names: Sequence[str]) -> list[str]:
    """What is not there of files that say how many they are, NAME-00001-of-00003, where there is no index."""
    found: dict[tuple[str, str, str], set[int]] = {}
    for name in names:
        if m := _NUMBERED.fullmatch(name):
            found.setdefault((m["stem"], m["of"], m["suffix"]), set()).add(int(m["number"]))
    return [
        f"{stem}-{i:0{len(of)}d}-of-{of}{suffix}"
        for (stem, of, suffix), have in found.items()
        for i in range(min(have | {1}), int(of) + min(have | {1}))
        if i not in have and int(of) < _MOST_FILES
    ]


def entries(source: Catalog, dtype: np.dtype | None, aliases: bool = True) -> Iterator[Entry]:
    """What is written: every parameter from its master weight (else `param`), frozen tensors and buffers too.

    dtype converts floating-point weights; None keeps the master's, buffers keep theirs. aliases: they are written out
    under their own names, so that a strict load finds them.
    """
    for tensor in source.tensors.values():
        wanted = dtype
        state = tensor.weight
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
