"""Safetensors as a format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptlab.arrays import Tally
from ckptlab.catalog import Catalog
from ckptlab.findings import Faults
from ckptlab.formats.fileplan import FilePlan
from ckptlab.formats.format import Format, Listing, Match
from ckptlab.formats.known import Unread
from ckptlab.formats.weights import WeightOptions, entries
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Strategy


class Safetensors(Format):
    name = "safetensors"
    title = "safetensors: whole weights, without an optimizer"
    options = WeightOptions
    writes = True
    sharded = False

    def recognise(self, folder: Listing) -> Match | None:
        ours = folder.path.endswith(".safetensors") and folder.is_file
        held = any(name.endswith(".safetensors") for name in folder.names) and not Unread.of_ranks(folder)
        if ours or held:
            return Match(folder.path, self.name, weights_only=True)
        return None

    def read(self, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        from ckptlab.formats.safetensors.read import read_safetensors

        return read_safetensors(path, faults)

    def target(self, source: Catalog, mesh: Mesh, options: Any) -> Catalog:
        """Whole tensors, whatever the mesh."""
        from ckptlab.formats.safetensors.write import weights

        return weights(source, options)

    def files(self, source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
        from ckptlab.formats.safetensors.write import files

        options: WeightOptions = target.private
        return files(source, options.wanted, options.max_shard_bytes)

    def payload(self, source: Catalog, target: Catalog) -> int:
        return sum(entry.nbytes for entry in entries(target, None))
