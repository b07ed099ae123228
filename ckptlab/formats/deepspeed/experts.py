"""Experts of DeepSpeed-MoE: spread over a part of data parallelism, and named by where they are.

A rank of the expert parallel group (`ep`) has some of each layer's experts. Its model file and its optimizer files call
them by *local* numbers, 0 … n-1 on every rank; files of their own, `layer_L_expert_E_mp_rank_XX_model_states.pt`, by
the *global* one, ep rank * n + local, which is what they are called here. The flat buffers of an expert group are cut
over the ranks that have the same experts (`edp`). Sources: DeepSpeed 0.19.8, `moe/layer.py`, `utils/groups.py`
(`_create_expert_and_data_parallel`), engine (`_save_moe_checkpoint`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from typing import Any

from ckptlab.errors import CheckpointError
from ckptlab.findings import Finding, contradiction, not_read_yet
from ckptlab.formats.deepspeed.headers import ModelFile
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored

_MANY = 1 << 20  # experts of a layer: more are none
GROUP = "ep_size_{}"  # what DeepSpeed calls the parameter groups of experts that are spread over so many ranks
_EXPERT = re.compile(r"((?:.*\.)?deepspeed_moe\.experts\.deepspeed_experts\.)(\d{1,9})(\..*)")


def layer_of(name: str) -> str | None:
    """What the experts of one layer have in common in their names; None for a tensor that is no expert's."""
    found = _EXPERT.fullmatch(name)
    return found and found[1]


def number_of(name: str) -> int:
    """The number of the expert in its name."""
    found = _EXPERT.fullmatch(name)
    if found is None:
        raise CheckpointError(f"{name}: not the name of an expert's tensor")
    return int(found[2])


def renumbered(name: str, by: int) -> str:
    """An expert's tensor with a number that is so much higher; other names stay."""
    found = _EXPERT.fullmatch(name)
    return f"{found[1]}{int(found[2]) + by}{found[3]}" if found else name


@dataclass(frozen=True)
class Share:
    """Ranks that have the same tensors of a flat buffer: where they stand on the mesh (nothing where all dp ranks
    do), which dp ranks they are, and the axis that cuts the buffer."""

    at: Mapping[str, int]
    ranks: tuple[int, ...]
    over: str


@dataclass(frozen=True)
class Experts:
    """The experts of a model: `local[layer]` and `total[layer]` are how many of a layer's a rank has, and how many
    there are; `files[number of the layer, expert, tp]` the tensors of an expert's file, under their global names.
    `data_first`: ep is the slower part of dp (`use_data_before_expert_parallelism`), else the faster one."""

    local: Mapping[str, int] = field(default_factory=dict)
    total: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[tuple[int, int, int], Mapping[str, Stored]] = field(default_factory=dict)
    data_first: bool = False

    @classmethod
    def of(cls, heads: Iterable[ModelFile], files: Mapping[tuple[int, int, int], Mapping[str, Stored]]) -> Experts:
        """From the model files, and those of the experts."""
        heads = list(heads)
        local, total = _numbers(n for head in heads for n in head.trained), _numbers(n for f in files.values() for n in f)
        first = any(head.config.data_before_experts for head in heads)
        return cls(local, {layer: total.get(layer, n) for layer, n in local.items()} | total, files, first)

    def __bool__(self) -> bool:
        return bool(self.total)

    def ep(self, layer: str) -> int:
        """Over how many ranks the experts of a layer are spread."""
        return max(self.total[layer] // self.local.get(layer, self.total[layer]), 1)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The different ep degrees, ascending."""
        return tuple(sorted({self.ep(layer) for layer in self.total}))

    def problems(self, path: str, mesh: Mesh) -> Iterator[Finding]:
        """Why they cannot be told apart, or not yet."""
        for layer, total in self.total.items():
            if total % (local := self.local.get(layer, total)):
                message = (
                    f"{path}: the expert files have {total} experts of {layer}*, a rank's model file {local}, which "
                    "does not divide it: expert files are missing, or of another run"
                )
                yield contradiction(path, message)
                return
        uneven = [n for n in self.sizes if mesh.dp % n]
        if uneven or any(high % low for low, high in pairwise(self.sizes)):
            yield contradiction(
                path,
                f"{path}: experts are spread over {' and '.join(map(str, self.sizes))} ranks by the numbers of their "
                f"files, which does not fit dp {mesh.dp}: expert files are missing, or of another run",
            )
            return
        if self and mesh.pp > 1:
            yield not_read_yet(f"{path}: experts in a pipeline of {mesh.pp} stages, which ckptlab cannot open yet")

    # ------------------------------------------------------------------ on the mesh

    def on(self, mesh: Mesh) -> Mesh:
        """The mesh with dp split into `edp` and `ep`; where layers differ in their degrees, `ep2` and `ep4`, say, of
        which a layer that is spread over four ranks takes both."""
        return split(mesh, self.sizes, self.data_first) if self else mesh

    def shares(self, names: Iterable[str], mesh: Mesh) -> tuple[Share, ...]:
        """Who has the same tensors of a buffer of these tensors, ep rank by ep rank; one share where it holds none of
        an expert. CheckpointError where it holds both kinds, or experts that are spread in different ways."""
        layers = [layer_of(name) for name in names]
        degrees = {None if layer is None else self.ep(layer) for layer in layers}
        if len(degrees) > 1:
            raise CheckpointError(
                f"a parameter group holds tensors that are spread over ep {', '.join(map(str, degrees))}: DeepSpeed "
                "trains each kind in a group of its own"
            )
        (degree,) = degrees or {None}
        return _shares(mesh, () if degree is None else axes_of(self.sizes, degree))

    def at(self, name: str, mesh: Mesh) -> Mapping[str, int]:
        """Where an expert's tensor is: its coordinates on the axes over which its layer is spread."""
        layer = layer_of(name)
        if layer is None:
            return {}
        rank = number_of(name) // self.local.get(layer, self.total[layer])
        return self.shares([name], mesh)[rank].at

    # ------------------------------------------------------------------ names

    def globally(self, names: Iterable[str], rank: int) -> tuple[str, ...]:
        """What an ep rank's tensors are called, by the names in its own files."""
        return tuple(renumbered(n, rank * self.local[layer]) if (layer := layer_of(n)) else n for n in names)

    def locally(self, name: str) -> str:
        """What a tensor is called in the files of the ranks that have it."""
        layer = layer_of(name)
        return renumbered(name, number_of(name) % self.local[layer] - number_of(name)) if layer else name

    def everywhere(self, names: Sequence[str]) -> list[str]:
        """The tensors of all ep ranks by the names of one: layer by layer, expert by expert."""
        found: list[str] = []
        for layer, run in groupby(names, layer_of):
            held = list(run)
            for rank in range(1 if layer is None else self.ep(layer)):
                found += self.globally(held, rank)
        return found


def split(mesh: Mesh, sizes: Sequence[int], data_first: bool = False) -> Mesh:
    """The mesh with its dp as `edp` and one axis for each ep degree, ascending, each a multiple of the one before."""
    parts = {name: n // m for name, n, m in zip(axes_of(sizes, sizes[-1]), sizes, (1, *sizes), strict=False)}
    if not data_first:
        parts = dict(reversed(parts.items()))
    edp = {"edp": mesh["dp"] // sizes[-1]}
    return mesh.split("dp", **(parts | edp if data_first else edp | parts))


def axes_of(sizes: Sequence[int], degree: int) -> tuple[str, ...]:
    """The mesh axes over which experts of that ep degree are spread."""
    return ("ep",) if len(sizes) == 1 else tuple(f"ep{n}" for n in sizes if n <= degree)


def _numbers(names: Iterable[str]) -> dict[str, int]:
    """Layer → how many experts the names have."""
    found: dict[str, int] = {}
    for name in names:
        if layer := layer_of(name):
            found[layer] = max(found.get(layer, 0), number_of(name) + 1)
    return found


def experts_said(contents: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(layer, expert) of every expert file that model files say there is: `num_experts` of each layer that has some; a
    plain number is an old DeepSpeed's, which counts no layers."""
    said = next((c["num_experts"] for c in contents if c.get("num_experts")), [])
    counts = dict(enumerate(said)) if isinstance(said, (list, tuple)) else {-1: said}
    return [(i, e) for i, n in counts.items() if isinstance(n, int) and n < _MANY for e in range(n)]


@lru_cache(maxsize=64)
def _shares(mesh: Mesh, spread: tuple[str, ...]) -> tuple[Share, ...]:
    """One for each coordinate on the axes over which experts are spread."""
    if not spread:
        return (Share({}, tuple(range(mesh.dp)), "dp"),)
    axes = tuple(axis for axis in mesh.leaves("dp") if axis in spread)
    places: dict[tuple[int, ...], list[int]] = {}
    for d in range(mesh.dp):
        at = mesh.coordinate(mesh.rank(pp=0, dp=d, tp=0))
        places.setdefault(tuple(at[axis] for axis in axes), []).append(d)
    return tuple(Share(dict(zip(axes, at, strict=True)), tuple(d), "edp") for at, d in sorted(places.items()))
