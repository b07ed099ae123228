"""What a cell of a picture stands for: its `data-*` attributes → a rank, a tensor, and what to say of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ckptlab.catalog import Catalog
from ckptlab.widgets.held import in_words, pieces
from ckptlab.words import number_of, size

Cell = Mapping[str, str]
SHOWN = 3  # dp ranks whose pieces of a shard are listed


def rank_of(cell: Cell, catalog: Catalog, name: str) -> int | None:
    """The rank (the first, where a cell stands for several) that a cell is of; None if of none.

    A piece of a tensor, which says its tp alone, is on the tensor's first stage and dp rank 0.
    """
    mesh = catalog.mesh
    if "rank" in cell:
        rank = _first(cell["rank"])
        return rank if rank < mesh.size else None
    if "tp" not in cell and "dp" not in cell:
        return None
    stage = catalog[name].stages[0] if name in catalog.tensors else 0
    at = {axis: _first(cell.get(axis, "0")) for axis in ("tp", "dp")} | {"pp": _first(cell.get("pp", str(stage)))}
    return mesh.rank(**at) if all(k < mesh[axis] for axis, k in at.items()) else None


def tensor_of(cell: Cell, catalog: Catalog) -> str | None:
    """The tensor that a cell is of, where it says so."""
    name = cell.get("tensor")
    return name if name in catalog.tensors else None


def told(cell: Cell, catalog: Catalog, name: str, state: str) -> list[str]:
    """What a cell stands for, line by line: rank, coordinate, indices, file and bytes of its part of the tensor."""
    if "source" in cell:
        kept = "stays on its rank" if cell["source"] == cell.get("target") else "changes rank"
        return [f"rank {cell['source']} → rank {cell.get('target')}: {size(float(cell.get('bytes', 0)))}, {kept}"]
    if "kind" in cell and "bytes" in cell:
        return [f"{_who(cell)}: {size(float(cell['bytes']))} of {cell['kind']}"]
    if "elements" in cell:
        return [f"pp {cell.get('pp')}: {cell.get('tensor')}, {number_of(int(cell['elements']), 'element')}"]
    rank = rank_of(cell, catalog, name)
    if rank is None:
        return []
    if not cell.get("rank", "0").isdecimal():
        return [f"ranks {_in_words(cell['rank'])}, drawn together; a click chooses the first"]
    mine = tensor_of(cell, catalog) or catalog[name].name
    if state not in catalog[mine].states:
        state = next(iter(catalog[mine].states))
    ranks = [rank] if "rank" in cell or "dp" in cell else _along_dp(catalog, rank)
    lines = [line for r in ranks for line in _of_rank(catalog, mine, state, r)]
    total = catalog.mesh.dp
    return lines if len(ranks) in (1, total) else [*lines, f"and {total - len(ranks)} more dp ranks"]


def _of_rank(catalog: Catalog, name: str, state: str, rank: int) -> Iterator[str]:
    found = pieces(catalog, name, state, rank)
    for piece in found:
        yield f"{in_words(catalog, rank)} · {piece}"
    if not found:
        yield f"{in_words(catalog, rank)} · holds nothing of {state} of {name}"


def _along_dp(catalog: Catalog, rank: int) -> list[int]:
    at = catalog.mesh.coordinate(rank)
    return catalog.mesh.ranks(**{axis: k for axis, k in at.items() if axis != "dp"})[:SHOWN]


def _who(cell: Cell) -> str:
    ranks = cell.get("rank", "")
    return f"rank {ranks}" if ranks.isdecimal() else f"each of ranks {_in_words(ranks)} at most"


def _in_words(ranks: str) -> str:
    return ranks.replace("-", "–").replace(",", ", ")


def _first(numbers: str) -> int:
    """`3` of `3`, `0` of `0-7`; 0 where there is no number."""
    head = numbers.split("-")[0].split(",")[0].strip()
    return int(head) if head.isdecimal() else 0
