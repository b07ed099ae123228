"""What safetensors would hold of a source: its weights, whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ckptlab.catalog import DTYPES, Catalog, Tensor, whole_placements
from ckptlab.formats.weights import entries
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh


def weights(source: Catalog, options: Any) -> Catalog:
    """The weights of a source as whole tensors. options: see `WeightOptions`."""
    tensors: dict[str, Tensor] = {}
    for entry in entries(source, DTYPES[options.dtype] if options.dtype else None):
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
