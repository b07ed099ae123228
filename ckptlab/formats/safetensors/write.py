"""A source → whole tensors → safetensors: one file, or numbered ones with an index.

The header is written here, not by the library, because tensors are streamed into the file, never held.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ckptlab.catalog import Catalog, Tensor, whole_placements
from ckptlab.formats.fileplan import FilePlan, Literal, merged
from ckptlab.formats.safefile import NAMES
from ckptlab.formats.weights import Entry, WeightOptions, entries, sharded
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh

SINGLE = "model.safetensors"


def weights(source: Catalog, options: WeightOptions) -> Catalog:
    """What safetensors would hold of a source: its weights, as whole tensors."""
    tensors: dict[str, Tensor] = {}
    for entry in entries(source, options.wanted):
        tensor = entry.tensor
        whole = replace(tensor, cut=Cut.whole(tensor.shape), states={entry.state: entry.dtype}, stages=(0,))
        tensors[tensor.name] = whole
    states = [(name, state) for name, tensor in tensors.items() for state in tensor.states]
    return Catalog(
        path="",
        format="safetensors",
        mesh=Mesh(),
        tensors=tensors,
        placements=whole_placements(tensors, states),
        training=source.training,
        private=options,
    )


def files(
    source: Catalog, dtype: np.dtype | None, max_shard_bytes: int, aliases: bool = True, single: str = SINGLE
) -> Iterator[FilePlan]:
    """The file `single`, or numbered shards of at most `max_shard_bytes` (a larger tensor has one of its own) and an
    index. aliases: tensors that have several names stand there under each."""
    return sharded(source, dtype, max_shard_bytes, single, _plan, aliases)


def _plan(name: str, source: Catalog, shard: Sequence[Entry]) -> FilePlan:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for e in shard:
        header[e.name] = {
            "dtype": NAMES[e.dtype],
            "shape": e.tensor.shape,
            "data_offsets": [offset, offset + e.nbytes],
        }
        offset += e.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    drawn = [e.elements(source) for e in shard]
    return FilePlan(name, (*merged([Literal(struct.pack("<Q", len(text)) + text), *drawn]),), nbytes=offset)
