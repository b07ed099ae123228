"""Toy checkpoints: a format of somebody else's, in a package of its own, as ckptlab is told of it.

    toy.json          the mesh, the step, and of every tensor its shape, states with dtypes, and layout
    ring0_tp1.npy     what that rank has: the shards of all tensors and states one after the other, as bytes

The mesh has the axes `ring` and `tp`, of any degrees. An example of a whole format: here is what ckptlab asks for
(`Toy`), in files.py where things lie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ckptlab.arrays import Tally
from ckptlab.catalog import Catalog
from ckptlab.errors import ReshapeError
from ckptlab.findings import Faults
from ckptlab.formats import Format, Listing, Match
from ckptlab.formats.fileplan import FilePlan
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Strategy
from toy_format import files

__all__ = ["Toy"]


class Toy(Format):
    name = "toy"
    title = "a toy checkpoint (toy.json beside .npy files of ranks)"
    home = "toy"
    writes = True

    def recognise(self, folder: Listing) -> Match | None:
        return Match(folder.path, self.name) if files.HEADER in folder.names else None

    def read(self, path: str, faults: Faults, strategy: Strategy | None) -> Catalog | None:
        return files.read(path, faults, strategy)

    def target(self, source: Catalog, mesh: Mesh, options: Any) -> Catalog:
        other = [axis for axis in mesh.axes if axis not in ("ring", "tp") and mesh[axis] > 1]
        if other:
            raise ReshapeError(f"{mesh}: toy checkpoints know ring and tp, not {', '.join(other)}: leave it 1")
        return files.target(source, mesh)

    def files(self, source: Catalog, target: Catalog, tally: Tally | None = None) -> Iterator[FilePlan]:
        return files.plans(source, target, tally)
