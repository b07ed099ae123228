"""Layouts as jax's NamedSharding and torch's DTensor can say them: an axis cuts a dim into equal blocks.

A fused dim, `(3 tp out)`, is placed through a reshape, as the two dims `<dim>_part` and `<dim>`. What cannot be said
(uneven, parts of unequal size, partly replicated) is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ckptlab.arrays.moves import segments
from ckptlab.errors import LayoutError
from ckptlab.layout import Cut


@dataclass(frozen=True)
class Sharding:
    """How a whole tensor lies on a mesh, dim by dim: names, sizes, and the mesh axis that cuts a dim into equal blocks
    (None: no axis). `local` is the shape of a shard in these dims."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    local: tuple[int, ...]

    @staticmethod
    def of(cut: Cut, names: Sequence[str]) -> Sharding:
        """The sharding of a cut. LayoutError, with the reason, where equal blocks cannot say it."""
        found: list[tuple[str, int, str | None, int]] = []
        for name, dim in zip(names, cut.dims, strict=True):
            parts = segments(dim)
            if parts is None or len(parts) != 1:
                why = "into parts of unequal size" if parts else "unevenly, or leaves parts replicated"
                raise LayoutError(
                    f"dim {name!r} of {cut.logical} is cut {why} over {', '.join(dim.axes)}, which no sharding into "
                    "equal blocks says: take shards without mesh=, which have a dim for the axis"
                )
            part = parts[0]
            if part.degree is None:
                found.append((name, dim.size, None, dim.size))
                continue
            if part.repeats > 1:
                found.append((f"{name}_part", part.repeats, None, part.repeats))
            found.append((name, part.degree * part.length, dim.axes[0], part.length))
        dims, shape, axes, local = zip(*found, strict=True) if found else ((), (), (), ())
        return Sharding(dims, shape, axes, local)

    def beneath(self, dim: str, size: int) -> Sharding:
        """The sharding of many such tensors, stacked along a dim of their own."""
        return Sharding((dim, *self.dims), (size, *self.shape), (None, *self.axes), (size, *self.local))
