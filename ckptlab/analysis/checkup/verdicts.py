"""What was seen in the data, as findings: one for each kind of fault, with every tensor and rank that it touches."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ckptlab.analysis.checkup.data import Key, Seen, Told, is_second_moment
from ckptlab.analysis.elements import unrounded
from ckptlab.catalog import MASTER, PARAM, Catalog, Fragment, Tensor
from ckptlab.findings import Finding, Where
from ckptlab.findings import Rank as NamedRank
from ckptlab.mesh import Mesh, spoken
from ckptlab.plan import Holder
from ckptlab.words import number_of, place_text, some

Group = Sequence[tuple[Key, Seen]]


def verdicts(catalog: Catalog, told: Told, trained: bool) -> Iterator[Finding]:
    """Findings on the data of a checkpoint that opened. trained: its optimizer has made a step."""
    order = {name: i for i, name in enumerate(catalog.tensors)}
    groups: dict[tuple[str, object], list[tuple[Key, Seen]]] = {}
    untrained = _untrained(catalog, told)
    for key, seen in sorted(told.seen.items(), key=lambda one: order.get(one[0].tensor, -1)):
        groups.setdefault(_together(catalog, key, untrained), []).append((key, seen))
    judge = _Judge(catalog)
    for (code, _), group in groups.items():
        yield judge.drifted(code, group) if code in _DRIFTED else getattr(judge, code)(group)
    yield from _moments(catalog, told, trained)


def loose_verdicts(told: Told) -> Iterator[Finding]:
    """Findings on tensors of files that were looked at one by one."""
    for key, seen in told.seen.items():
        file, _, place = key.tensor.partition(": ")
        where = Where((file,), (place,))
        yield Finding("not-finite", "error", where, "finite numbers", f"{place}: {_unfinite(seen)}", _BACK)


_MOST = 0.25  # of a tensor's elements: more are not single damages
_SAMPLE = 1 << 12  # elements by which another rank's weights are recognised
_BACK = "go back to an earlier step, and look for where it first appears (`ckptlab check` on each)"


def _together(catalog: Catalog, key: Key, untrained: set[tuple[str, int]]) -> tuple[str, object]:
    """The code of a fault (of `_DRIFTED`, or a method of `_Judge`), and what the faults that make one finding have in
    common."""
    if key.what != "equal":
        code = {"finite": "not_finite", "negative": "negative_moment", "rounded": "master_weight"}.get(
            key.what, key.what
        )
        return code, key.rank if key.what == "rounded" else None
    assert key.other is not None
    if catalog.tensors[key.tensor].kind == "buffer":
        return "buffers-differ", None
    if key.rank["pp"] != key.other["pp"]:
        return ("untrained-copy" if (key.tensor, key.rank["pp"]) in untrained else "tied-differ"), key.rank["pp"]
    return "replicas-differ", key.rank["pp"]


class _Drift(NamedTuple):
    """How copies that are not the same are told: how bad it is, what is expected, what is to be done; and what is said
    behind how far apart they are."""

    severity: str
    expected: str
    todo: str
    beside: str = ""


_DRIFTED = {
    "replicas-differ": _Drift(
        "error",
        "the same bits on every rank that holds a copy",
        "find the step in which it begins (`ckptlab check` on each): from there on the ranks trained different models. "
        "ckptlab reads the copy of the lowest rank",
    ),
    "tied-differ": _Drift(
        "error",
        "the same bits on every pp stage that holds the tied tensor",
        "see whether the gradients of tied weights are summed over stages (tied_weight_attr). ckptlab reads the copy "
        "of the first stage, which stays right if the later ones are not used",
    ),
    "untrained-copy": _Drift(
        "info",
        "the same bits on every pp stage that holds the tied tensor",
        "nothing, unless that stage computes with it: the first stage's copy is the trained one, which ckptlab reads",
        ". The later stage has never trained its copy (its moments are zero): it lies in a tied module of which only "
        "another tensor is tied, as Megatron's position embeddings beside the word embeddings",
    ),
    "buffers-differ": _Drift(
        "info",
        "the same buffer on every rank, or statistics of each rank's own",
        "nothing, if these are running statistics that are not synchronised; ckptlab reads the first rank's",
    ),
}


class _Judge:
    """Puts a group of like faults into words; a method for each code that is not of `_DRIFTED`."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog

    def not_finite(self, group: Group) -> Finding:
        key, seen = group[0]
        told = f"{self._spread(group)}; first {self._place(key, seen)}: {_unfinite(seen)}"
        return Finding("not-finite", "error", self._where(group), "finite numbers", told, _BACK)

    def negative_moment(self, group: Group) -> Finding:
        key, seen = group[0]
        told = f"{self._spread(group)}; first {self._place(key, seen)}: {seen.a:.6g}"
        todo = "the file is damaged, or something else wrote into this state: put back this run's own file"
        return Finding("negative-moment", "error", self._where(group), "means of squares, none negative", told, todo)

    def padding(self, group: Group) -> Finding:
        key, seen = group[0]
        told = (
            f"{number_of(sum(s.count for _, s in group), 'element')} not zero; first in {key.state} of {key.tensor} …, "
            f"{_rank(self.catalog.mesh, key.rank)}, element {seen.at} of its partition: {seen.a:.6g}"
        )
        return Finding(
            "flat-padding",
            "warning",
            self._where(group, tensors=False),
            "zeros between and behind the tensors of flat buffers (ZeRO-1 and 2)",
            told,
            "compare with an earlier step: the file may be shifted or of another run. ckptlab reads past it and writes "
            "zeros",
        )

    def master_weight(self, group: Group) -> Finding:
        most = max((s.count / self._elements(k) for k, s in group), default=0.0)
        key, seen = max(group, key=lambda one: one[1].worst)
        told = f"{self._spread(group)}; worst {self._place(key, seen)}: master {seen.a:.9g}, weight {seen.b:.9g}" + (
            f"; up to {most:.0%} of a tensor" if most > 0.01 else ""
        )
        hint = "single elements mean that a file was damaged, or weights were edited after the save. "
        if most > _MOST:
            hint = "so many elements mean that a file is of another step or rank: put back the right one. "
            cut = [
                k for k, s in group if s.count > _MOST * self._elements(k) if self.catalog.tensors[k.tensor].cut.axes
            ]
            twin, *others = {self._twin(k) for k in cut[:4]} or {None}
            twin = None if others else twin
            told += f". They do round to those of {twin}: the ranks' files were swapped" if twin else ""
        return Finding(
            "master-weight",
            "error",
            self._where(group, states=(MASTER, PARAM)),
            "fp32 masters that round to the weights that the model computed with",
            told,
            f"{hint}DeepSpeed resumes from the masters, inference from the weights",
        )

    def _fragments(self, tensor: str, state: str, rank: Holder) -> tuple[Fragment, ...]:
        """Where a rank's shard lies; nothing where it holds none."""
        for placement in self.catalog.placements.get((tensor, state), ()):
            for holder in placement.holders:
                if rank.within(holder):
                    return self.catalog.fragments(tensor, state, holder)
        return ()

    def _twin(self, key: Key) -> str | None:
        """The other tp rank of the stage to whose weights a master does round, as far as a sample says."""
        fragments = self._fragments(key.tensor, MASTER, key.rank)
        master = fragments[0].stored.flat[:_SAMPLE] if fragments else np.empty(0, np.float32)
        pieces = self.catalog.stored.pieces.get((key.tensor, PARAM), {})
        for holder, held in pieces.items():
            weight = held[0].stored.flat[: len(master)] if held else master[:0]
            if holder == key.rank or holder["pp"] != key.rank["pp"] or len(weight) < len(master) or not len(master):
                continue
            if not len(unrounded(master, weight, np.empty(len(master), np.uint32))):
                return _rank(self.catalog.mesh, holder)
        return None

    def drifted(self, code: str, group: Group) -> Finding:
        """Copies that are not the same: see `_DRIFTED`."""
        drift = _DRIFTED[code]
        told = f"{self._drift(group)}{drift.beside}"
        return Finding(code, drift.severity, self._where(group), drift.expected, told, drift.todo)

    def _drift(self, group: Group) -> str:
        """How much, between which ranks, since which layer."""
        key, seen = max(group, key=lambda one: one[1].worst)
        assert key.other is not None
        mesh = self.catalog.mesh
        first = group[0][0].tensor
        since = f", from {first} on" if len({k.tensor for k, _ in group}) > 1 else ""
        others = list(dict.fromkeys(k.rank for k, _ in group))
        all_but_one = mesh.tp > 2 and key.rank["pp"] == key.other["pp"] and len(others) == mesh.tp - 1
        return (
            f"{some([_rank(mesh, r) for r in others], 4)} against {_rank(mesh, key.other)}"
            f"{', which may be the one that is wrong' if all_but_one else ''}: {self._spread(group)}{since}; worst "
            f"{self._place(key, seen)}: {seen.a:.9g} against {seen.b:.9g}, {seen.worst:.3g} apart"
        )

    def _spread(self, group: Group) -> str:
        """How many elements of how many tensors, in which states."""
        tensors = list(dict.fromkeys(k.tensor for k, _ in group))
        states = ", ".join(dict.fromkeys(k.state for k, _ in group))
        total = sum(s.count for _, s in group)
        where = tensors[0] if len(tensors) == 1 else number_of(len(tensors), "tensor")
        return f"{number_of(total, 'element')} of {where} ({states})"

    def _place(self, key: Key, seen: Seen, rank: bool = True) -> str:
        """`exp_avg of 3.mlp.weight[4, 2] on pp 0 · tp 1`: the index is that in the rank's shard."""
        tensor = self.catalog.tensors[key.tensor]
        at = ", ".join(str(int(i)) for i in np.unravel_index(seen.at, self._shard(tensor, key.rank)))
        on = f" on {_rank(self.catalog.mesh, key.rank)}" if rank and self.catalog.mesh.size > 1 else ""
        return f"{key.state} of {key.tensor}[{at}]{on}"

    def _shard(self, tensor: Tensor, rank: Holder) -> tuple[int, ...]:
        return tensor.cut.shard_shape(tensor.cut.coordinate(rank))

    def _elements(self, key: Key) -> int:
        return max(math.prod(self._shard(self.catalog.tensors[key.tensor], key.rank)), 1)

    def _where(self, group: Group, *, tensors: bool = True, states: tuple[str, ...] = ()) -> Where:
        mesh = self.catalog.mesh
        ranks = dict.fromkeys(r for k, _ in group for r in (k.rank, k.other) if r is not None)
        return Where(
            files=tuple(self._files(group)),
            tensors=tuple(dict.fromkeys(k.tensor for k, _ in group)) if tensors else (),
            states=states or tuple(dict.fromkeys(k.state for k, _ in group)),
            ranks=tuple(named(mesh, r) for r in ranks) if mesh.size > 1 else (),
        )

    def _files(self, group: Group) -> list[str]:
        """The files in which the elements that are shown lie, of the first few faults."""

        found: dict[str, None] = {}
        for key, seen in group[:20]:
            for rank in (key.rank, key.other):
                if rank is not None and key.what != "padding" and not rank.get("dp"):
                    for state in (key.state, PARAM) if key.what == "rounded" else (key.state,):
                        for f in self._fragments(key.tensor, state, rank):
                            if f.start <= seen.at < f.start + f.count:
                                found[os.path.basename(f.stored.path)] = None
        return list(found)


def _untrained(catalog: Catalog, told: Told) -> set[tuple[str, int]]:
    """(tensor, stage) of copies on later stages whose moments are zero, where the canonical stage's are not."""
    found = set()
    for tensor in catalog.tensors.values():
        moments = [s for s in tensor.states if s not in (MASTER, PARAM)]
        if len(tensor.stages) < 2 or not moments:
            continue
        first, *later = tensor.stages
        alive = [not _zero(told, tensor.name, s, first) for s in moments]
        found |= {
            (tensor.name, p) for p in later if any(alive) and all(_zero(told, tensor.name, s, p) for s in moments)
        }
    return found


def _zero(told: Told, name: str, state: str, stage: int) -> bool:
    """The state of the tensor is zero on every rank of a stage that was looked at."""
    seen = [zero for (n, s, rank), zero in told.zero.items() if n == name and s == state and rank["pp"] == stage]
    return bool(seen) and all(seen)


def _moments(catalog: Catalog, told: Told, trained: bool) -> Iterator[Finding]:
    """Tensors whose moments say that they are not, or no longer, trained, while others are."""
    zero = _by_tensor(told)
    dead: list[str] = []
    stopped: list[str] = []
    for tensor in catalog.tensors.values():
        moments = {
            s: zero[tensor.name, s] for s in tensor.states if s not in (MASTER, PARAM) and (tensor.name, s) in zero
        }
        if not moments:
            continue
        first = {s: z for s, z in moments.items() if not is_second_moment(s)}
        if all(moments.values()):
            dead.append(tensor.name)
        elif first and all(first.values()):
            stopped.append(tensor.name)
    if dead and trained:
        yield Finding(
            "dead-moments",
            "warning",
            Where(tensors=tuple(dead)),
            "moments that are not zero, once a step was made",
            f"{number_of(len(dead), 'trained tensor')}: {some(dead, 4)}: every moment is zero: no gradient ever came",
            "see whether they are used in the model, or frozen by accident; if meant so, leave them to no optimizer",
        )
    if stopped:
        yield Finding(
            "stopped-moments",
            "warning",
            Where(tensors=tuple(stopped)),
            "first moments that are not zero",
            f"{number_of(len(stopped), 'trained tensor')}: {some(stopped, 4)}: the first moment is zero throughout, "
            "the mean of squares is not: gradients came once, and have stopped",
            "see whether they were frozen by accident since",
        )


def _by_tensor(told: Told) -> dict[tuple[str, str], bool]:
    """(tensor, state) → zero on all ranks."""
    found: dict[tuple[str, str], bool] = {}
    for (name, state, _), zero in told.zero.items():
        found[name, state] = found.get((name, state), True) and zero
    return found


def _unfinite(seen: Seen) -> str:
    return f"{'NaN' if math.isnan(seen.a) else seen.a} ({number_of(seen.count, 'element')})"


def named(mesh: Mesh, rank: Holder) -> NamedRank:
    """A rank with its axes; those of degree 1 are left out, as are those of the mesh itself where the holder is on
    another mesh of its ranks."""
    if any(axis not in mesh for axis in rank):
        return {axis: rank[axis] for axis in spoken(rank) if axis not in mesh or (axis == "pp" and mesh.pp > 1)}
    data = (*mesh.leaves("dp"), "dp")  # the first dp rank speaks for all
    return {axis: rank[axis] for axis in spoken(rank) if mesh[axis] > 1 and (axis not in data or rank[axis])}


def _rank(mesh: Mesh, rank: Holder) -> str:
    return place_text(named(mesh, rank)) or "the first rank"
