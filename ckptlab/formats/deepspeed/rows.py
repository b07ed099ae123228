"""Layouts of dims that are not just cut in equal pieces: parts that are each cut on their own, and a choice of rows,
rank by rank, as AutoTP's and AutoEP's maps may say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptlab.errors import LayoutError
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import dim_names

Run = tuple[int, int, int, int, int]  # a row of a cut: start in the whole, start in the shard, length, count, stride
Runs = tuple[Run, ...]


def in_parts(ndim: int, dim: int, parts: Sequence[tuple[int, ...] | int]) -> Layout:
    """Dim `dim` holds parts, one after the other: `parts[i][rank]` is how wide a tp rank's piece of one is, a number
    how wide is one that all of them have."""
    dims = dim_names(ndim)
    labels = [dims[dim]] if len(parts) == 1 else [f"s{i}" for i in range(len(parts))]
    terms, sizes, totals = [], {}, {}
    for label, widths in zip(labels, parts, strict=True):
        terms.append(label if isinstance(widths, int) else f"(tp {label})")
        if isinstance(widths, int) or len(set(widths)) > 1:
            sizes[label] = widths
        else:
            totals[label] = sum(widths)
    term = terms[0] if len(terms) == 1 else f"({' + '.join(terms)})"
    return Layout(
        " ".join(term if i == dim else name for i, name in enumerate(dims)), dims=dims, sizes=sizes, totals=totals
    )


class RowsLayout(Layout):
    """A layout that no line of notation says: the rows of each dim that each coordinate of a mesh axis holds. Its text
    only names the dim that is cut. It is known for one degree of that axis, and for no other."""

    axis: str
    rows: tuple[tuple[Runs, ...], ...]

    def __init__(self, text: str, *, axis: str, rows: tuple[tuple[Runs, ...], ...], **fields: Any) -> None:
        object.__setattr__(self, "axis", axis)
        object.__setattr__(self, "rows", rows)
        super().__init__(text, **fields)

    def replace(self, **fields: Any) -> Layout:
        known = {name: getattr(self, name) for name in ("text", "dims", "padded", "stages", "replicas")}
        return RowsLayout(axis=self.axis, rows=self.rows, **(known | fields))

    def resolve(self, shape: Sequence[int], mesh: Mesh) -> Cut:
        """The cut. LayoutError for another degree than the one it is known for."""
        if (degree := mesh[self.axis] if self.axis in mesh.axes else 1) != len(self.rows):
            raise LayoutError(
                f"cut for {self.axis} {len(self.rows)} by a map that follows no rule: how it is cut for {self.axis} "
                f"{degree} is known to the program alone; give its layout with a strategy"
            )
        held: dict[tuple[int, ...], Runs]
        dims: list[tuple[tuple[str, ...], dict[tuple[int, ...], Runs]]] = []
        for i in range(len(self.dims)):
            if len({of_rank[i] for of_rank in self.rows}) == 1:
                dims.append(((), {(): self.rows[0][i]}))
            else:
                held = {(k,): tuple(run for run in of_rank[i] if run[2]) for k, of_rank in enumerate(self.rows)}
                dims.append(((self.axis,), held))
        return Cut.from_rows(shape, mesh, dims)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowsLayout) and self._known == other._known

    def __hash__(self) -> int:
        return hash(self._known)

    @property
    def _known(self) -> tuple[Any, ...]:
        return self.axis, self.rows, self.dims
