"""Experts: spread over a part of data parallelism, and, those of DeepSpeed-MoE, named by where they are.

A rank of the expert parallel group (`ep`) has some of each layer's experts. Its model file and its optimizer files call
them by *local* numbers, 0 … n-1 on every rank; files of their own, `layer_L_expert_E_mp_rank_XX_model_states.pt`, by
the *global* one, ep rank * n + local, which is what they are called here. The flat buffers of an expert group are cut
over the ranks that have the same experts (`edp`).

Beside tensor parallelism there are two kinds. Experts that are tensor parallel themselves
(`enable_expert_tensor_parallelism`) lie so on each tp rank. All others are whole, and are dealt to the ranks of dp and
tp alike, in the order of global ranks: tp ranks have different ones, or share the buffers of the same, and an expert's
file is the one rank's that comes first (where tp ranks share it an engine looks for one of each, so that it cannot load
what it saved; ckptlab writes them all). Those of AutoEP always lie so beside AutoTP ("folding"): the ranks of a stage
are dp × tp to all other tensors, and edp × ep to them (`Experts.mesh`). Sources: DeepSpeed 0.19.8, `moe/layer.py`,
`utils/groups.py` (`_create_expert_and_data_parallel`, `_create_expert_data_and_model_parallel`), engine
(`_save_moe_checkpoint`), `module_inject/auto_ep_folding.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import chain, groupby, pairwise
from typing import Any

from ckptlab.catalog import ParameterGroup
from ckptlab.errors import CheckpointError
from ckptlab.findings import Finding, contradiction, not_read_yet
from ckptlab.formats.deepspeed import autoep
from ckptlab.formats.deepspeed.autoep import Fused
from ckptlab.formats.deepspeed.header import Shape
from ckptlab.formats.deepspeed.modelfile import ModelFile
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.stored import Stored

_MANY = 1 << 20  # experts of a layer: more are none
_EXPERT = re.compile(r"((?:.*\.)?deepspeed_moe\.experts\.deepspeed_experts\.)(\d{1,9})(\..*)")


@lru_cache(maxsize=1 << 16)
def _in_name(name: str) -> tuple[str, int, str] | None:
    """What is before the number of an expert in the name of one of its tensors, the number, and what is behind it."""
    found = _EXPERT.fullmatch(name)
    return (found[1], int(found[2]), found[3]) if found else None


def layer_of(name: str) -> str | None:
    """What the experts of one layer have in common in their names; None for a tensor that is no expert's."""
    found = _in_name(name)
    return found and found[0]


def number_of(name: str) -> int:
    """The number of the expert in its name."""
    found = _in_name(name)
    if found is None:
        raise CheckpointError(f"{name}: not the name of an expert's tensor")
    return found[1]


def renumbered(name: str, by: int) -> str:
    """An expert's tensor with a number that is so much higher; other names stay."""
    found = _in_name(name)
    return f"{found[0]}{found[1] + by}{found[2]}" if found else name


@dataclass(frozen=True)
class Share:
    """Ranks that have the same tensors of a flat buffer: where they stand on their mesh (nothing where all dp ranks
    do), which dp ranks of it they are, and the axis that cuts the buffer."""

    at: Mapping[str, int]
    ranks: tuple[int, ...]
    over: str


@dataclass(frozen=True)
class Experts:
    """The experts of a model.

    `local[layer]` and `total[layer]`: how many of a layer's experts a rank has, and how many there are, in the order in
    which files number the layers (in a pipeline each stage's from 0 on). `files[number of the layer, expert, tp]`: the
    tensors of an expert's file, under their global names. `data_first`: ep is the slower part of dp
    (`use_data_before_expert_parallelism`), else the faster one. `fused`: layers of AutoEP, whose experts are all in one
    tensor that ep cuts. `over_tp`: experts are dealt to tp ranks too, and are whole on each. `stages[layer]`: the pp
    stage that has it.
    """

    local: Mapping[str, int] = field(default_factory=dict)
    total: Mapping[str, int] = field(default_factory=dict)
    files: Mapping[tuple[int, int, int], Mapping[str, Stored]] = field(default_factory=dict)
    data_first: bool = False
    fused: tuple[Fused, ...] = ()
    over_tp: bool = False
    stages: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        heads: Iterable[ModelFile],
        files: Mapping[tuple[int, int, int], Mapping[str, Stored]],
        ep: int,
        fused: tuple[Fused, ...] = (),
        stages: Mapping[int, int] | None = None,
        tp: int = 1,
        trained: Iterable[str] = (),
        over_tp: bool = False,
    ) -> Experts:
        """From the model files, and those of the experts. trained: what optimizer files know, where no model file does;
        ep: over how many ranks they are spread where nothing does. stages: of the layers, by their numbers, in a
        pipeline. tp: degree. over_tp: optimizer files say that they are dealt to tp ranks too, as they are where each
        expert has one file."""
        heads = list(heads)
        alone = 0 < len(files) == len({(layer, expert) for layer, expert, _ in files})
        over_tp = tp > 1 and (any(autoep.FOLDING in h.content for h in heads) if fused else alone or over_tp)
        if over_tp:
            first_of = {(i, expert): held for (i, expert, _), held in sorted(files.items(), reverse=True)}
            files = {(i, expert, t): first_of[i, expert] for i, expert, _ in files for t in range(tp)}
        local, total = (
            numbers(chain(trained, *(head.trained for head in heads))),
            numbers(n for f in files.values() for n in f),
        )
        if not local:
            local = {layer: -(-count // ep) for layer, count in total.items()}
        first = any(head.config.data_before_experts for head in heads)
        number = {layer_of(n): i for (i, _, _), tensors in files.items() for n in tensors}
        layers = sorted({**local, **total}, key=lambda layer: (number.get(layer, -1), natural(layer)))
        every = {layer: total.get(layer) or local[layer] for layer in layers}
        of_layers = {layer: stages[number[layer]] for layer in every if layer in number} if stages else {}
        return cls(local, every, files, first, fused, over_tp, of_layers)

    @classmethod
    def named(cls, names: Iterable[str], ep: int) -> Experts:
        """From the names of all experts' tensors, each layer's spread over `ep` ranks where that divides them."""
        total = dict(sorted(numbers(names).items(), key=lambda one: natural(one[0])))
        return cls({layer: n // ep if n % ep == 0 else n for layer, n in total.items()}, total)

    def __bool__(self) -> bool:
        return bool(self.total or self.fused)

    @cached_property
    def _fused(self) -> dict[str, Fused]:
        return {name: layer for layer in self.fused for name in layer.names}

    def fused_of(self, name: str) -> Fused | None:
        """The layer whose experts a tensor holds together; None where it is no such tensor."""
        return self._fused.get(name)

    def ep(self, layer: str) -> int:
        """Over how many ranks the experts of a layer are spread."""
        return max(self.total[layer] // self.local.get(layer, self.total[layer]), 1)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """The different ep degrees, ascending."""
        return tuple(sorted({*map(self.ep, self.total), *(layer.ep for layer in self.fused)}))

    def degree(self, name: str) -> int | None:
        """Over how many ranks a tensor of experts is spread; None for any other."""
        if fused := self.fused_of(name):
            return fused.ep
        layer = layer_of(name)
        return None if layer is None else self.ep(layer)

    def has(self, group: ParameterGroup, degree: int) -> bool:
        """Whether a parameter group is one of experts that are spread over so many ranks."""
        return self.degree(next(iter(group.tensors), "")) == degree

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
        ranks = mesh.dp * mesh.tp if self.over_tp else mesh.dp
        uneven = [n for n in self.sizes if ranks % n]
        if uneven or any(high % low for low, high in pairwise(self.sizes)):
            yield contradiction(
                path,
                f"{path}: experts are spread over {' and '.join(map(str, self.sizes))} ranks by the numbers of their "
                f"files, which does not fit {'dp' if ranks == mesh.dp else 'dp times tp,'} {ranks}: expert files are "
                "missing, or of another run",
            )
            return
        if self.fused and ((mesh.tp > 1 and not self.over_tp) or mesh.pp > 1 or self.total or len(self.sizes) > 1):
            others = "experts of DeepSpeed-MoE" if self.total else f"ep {' and '.join(map(str, self.sizes))} at once"
            beside = next((f"{axis} {mesh[axis]}" for axis in ("tp", "pp") if mesh[axis] > 1), others)
            yield not_read_yet(f"{path}: AutoEP (ds_autoep_layers) beside {beside}, which ckptlab cannot open yet")

    def spread(self, ep: int | None, data_first: bool | None, over_tp: bool = False) -> Experts:
        """The same experts, each layer's over `ep` ranks (None: as they are), of tp too or not; nothing is stored of
        them."""
        local = {layer: n // (ep or self.ep(layer)) for layer, n in self.total.items()}
        fused = tuple(layer.spread(ep or layer.ep) for layer in self.fused)
        first = self.data_first if data_first is None else data_first
        return Experts(local, self.total, {}, first, fused, over_tp)

    def refusals(self, mesh: Mesh, ep: int | None, target: Experts, zero_stage: int) -> Iterator[str]:
        """Why they cannot be spread over `ep` ranks (None: over as many as now) of a mesh, as `target` would be."""
        ranks = mesh.dp * mesh.tp if target.over_tp else mesh.dp
        for wanted in (ep,) if ep else self.sizes:
            if target.folded and wanted == 1:
                yield f"tp {mesh.tp}: DeepSpeed trains AutoEP beside AutoTP at an ep of at least 2 alone: say ep="
            elif ranks % wanted:
                named = f"dp {mesh.dp}" if not target.over_tp else f"dp times tp, {ranks}"
                yield f"{named}: ep {wanted} is a part of it, and does not divide it: say ep="
            elif zero_stage == 0 and target.shared(wanted, mesh) and not target.folded:
                yield (
                    f"tp {mesh.tp}, ep {wanted}: without ZeRO DeepSpeed leaves out the optimizers of tp ranks that "
                    "share experts, and cannot load what it saves; with them, nothing would tell these experts from "
                    "tensor parallel ones: take an ep that is a multiple of tp, and not "
                    "use_data_before_expert_parallelism, or zero_stage=1"
                )
        if target.folded and target.data_first:
            yield (
                f"tp {mesh.tp}: DeepSpeed trains no AutoEP beside AutoTP with use_data_before_expert_parallelism: say "
                "data_before_experts=False"
            )
        for layer, total in (*self.total.items(), *((f"{f.prefix}.", f.total) for f in self.fused if f.ep != ep)):
            if ep and total % ep:
                yield f"ep {ep}: the {total} experts of {layer}* cannot be dealt evenly to as many ranks"

    # ------------------------------------------------------------------ on the mesh

    @property
    def folded(self) -> bool:
        """Of a target: AutoEP beside AutoTP, of whose ranks experts are dealt to all."""
        return bool(self.fused) and self.over_tp

    def first_ranks(self, mesh: Mesh, degree: int) -> dict[tuple[int, int], int]:
        """(ep rank of this degree, tp rank) → the first rank of a stage that is both, which writes the files of experts
        that such ranks read; where they are dealt to tp ranks too."""
        if (known := self._first_ranks.get((mesh, degree))) is not None:
            return known
        found: dict[tuple[int, int], int] = {}
        for ep, ranks in enumerate(self.dealt(degree, mesh)):
            for d, t in ranks:
                found.setdefault((ep, t), d * mesh.tp + t)
        self._first_ranks[mesh, degree] = dict(sorted(found.items(), key=lambda one: one[1]))
        return self._first_ranks[mesh, degree]

    @cached_property
    def _first_ranks(self) -> dict[tuple[Mesh, int], dict[tuple[int, int], int]]:
        """What `first_ranks` found: each tensor of an expert asks."""
        return {}

    def shared(self, degree: int, mesh: Mesh) -> bool:
        """Whether tp ranks have the same experts of this degree, where they are dealt to tp ranks too."""
        return self.over_tp and len(self.first_ranks(mesh, degree)) > degree

    def on(self, mesh: Mesh) -> Mesh:
        """The mesh with dp split into `edp` and `ep`; where layers differ in their degrees, `ep2` and `ep4`, say, of
        which a layer that is spread over four ranks takes both. As it is where they are on a mesh of their own."""
        if not self or self.over_tp:
            return mesh
        return split(mesh, self.sizes, self.axes(self.sizes[-1]), self.data_first)

    def mesh(self, mesh: Mesh) -> Mesh:
        """The mesh on which experts are: the run's, split; where they are dealt to tp ranks too, the same ranks with
        dp and tp as one axis, `dp`, that is split so."""
        if not self.over_tp:
            return mesh
        return _folded(mesh, self.sizes, self.axes(self.sizes[-1]), self.data_first)

    def mesh_of(self, name: str, mesh: Mesh) -> Mesh:
        """The mesh on which a tensor is cut: that of experts, or the run's."""
        return self.mesh(mesh) if self.degree(name) else mesh

    def axes(self, degree: int) -> tuple[str, ...]:
        """The parts of dp over which experts of that ep degree are spread."""
        return ("ep",) if len(self.sizes) == 1 else tuple(f"ep{n}" for n in self.sizes if n <= degree)

    def shares(self, names: Iterable[str], mesh: Mesh) -> tuple[Share, ...]:
        """Who has the same tensors of a buffer of these tensors, ep rank by ep rank; one share where it holds none of
        an expert. CheckpointError where it holds both kinds, or experts that are spread in different ways."""
        degrees = {self.degree(name) for name in names}
        if len(degrees) > 1:
            raise CheckpointError(
                f"a parameter group holds tensors that are spread over ep {', '.join(map(str, degrees))}: DeepSpeed "
                "trains each kind in a group of its own"
            )
        (degree,) = degrees or {None}
        if degree is None:
            return _shares(mesh, ())
        return _shares(self.mesh(mesh), self.axes(degree))

    def of_file(self, stage: int, layer: int, expert: int, mesh: Mesh) -> list[int]:
        """The tp ranks of a pp stage whose files have an expert of its layer of that number: all, or where experts are
        dealt to tp ranks too those that have it, of which DeepSpeed writes the first one's; of AutoEP's everyone's of
        the first few dp ranks."""
        if not self.over_tp:
            return list(range(mesh.tp))
        for fused in self.fused:
            if fused.number == layer:
                ranks = zip(fused.ranks, self.dealt(fused.ep, mesh), strict=True)
                return sorted({t for held, own in ranks if expert in held for d, t in own if d < fused.ep})
        layers = [name for name in self.total if self.stages.get(name, 0) == stage]
        if self.fused or layer >= len(layers):
            return list(range(mesh.tp))
        name = layers[layer]
        rank = expert // self.local.get(name, self.total[name])
        own = self.dealt(max(self.ep(name), rank + 1), mesh)[rank]  # files of the last experts may be what is missing
        return list(dict.fromkeys(t for _, t in own)) or list(range(mesh.tp))

    def stage(self, name: str) -> int:
        """The pp stage of an expert's tensor."""
        return self.stages.get(layer_of(name) or "", 0)

    def dealt(self, degree: int, mesh: Mesh) -> list[list[tuple[int, int]]]:
        """The (dp, tp) ranks that have the same experts of layers that are spread so, ep rank by ep rank, where they
        are dealt to tp ranks too."""
        ranks = [(d, t) for d in range(mesh.dp) for t in range(mesh.tp)]
        each = len(ranks) // degree
        return [ranks[i * each : (i + 1) * each] if self.data_first else ranks[i::degree] for i in range(degree)]

    def saved(self, mesh: Mesh) -> set[int]:
        """The tp ranks whose model files DeepSpeed writes: those of the first dp rank that are the first to have their
        experts."""
        if not self.over_tp or not self.total:
            return set(range(mesh.tp))
        return {t for ranks in self.dealt(self.sizes[-1], mesh) for d, t in ranks[:1] if d == 0}

    def kept_by(self, name: str, mesh: Mesh, stage: int) -> list[int]:
        """The ranks of a pp stage that write an expert's file: of those of each tp rank the first."""
        if not self.over_tp:
            return [mesh.ranks(pp=stage, tp=t, **self.at(name, mesh))[0] for t in range(mesh.tp)]
        layer = layer_of(name) or ""
        first, own = self.first_ranks(mesh, self.ep(layer)), number_of(name) // self.local[layer]
        return [stage * mesh.dp * mesh.tp + rank for (ep, _), rank in first.items() if ep == own]

    def writers(self, ep: int, degree: int, mesh: Mesh) -> list[int]:
        """The tp ranks that write the optimizer of an ep rank where there is no ZeRO."""
        if not self.over_tp:
            return list(range(mesh.tp))
        own = self.dealt(degree, mesh)[ep]
        return sorted({t for d, t in own if d < degree}) if self.fused else [t for _, t in own[:1]]

    def writer(self, ep: int, mesh: Mesh) -> int:
        """The rank, of those that experts are dealt to, that writes what ep rank `ep` of the largest degree has: the
        first."""
        ranks = mesh.dp * mesh.tp if self.over_tp else mesh.dp
        return ep * (ranks // self.sizes[-1]) if self.data_first else ep

    def place(self, ep: int, degree: int, mesh: Mesh) -> int:
        """The ep rank, among those of a degree, of whoever writes what ep rank `ep` of the largest degree has."""
        ranks = mesh.dp * mesh.tp if self.over_tp else mesh.dp
        rank = self.writer(ep, mesh)
        return rank // (ranks // degree) if self.data_first else rank % degree

    def holder(self, name: str, mesh: Mesh, ep: int = 0, **at: int) -> Holder:
        """Who, of the ranks at these coordinates of the run's mesh, has a tensor or an ep rank's part of it."""
        spread = {"ep": ep} if self.fused_of(name) else self.at(name, mesh)
        tp = {"tp": 0 if self.over_tp and self.degree(name) else at.pop("tp")} if "tp" in at else {}
        return Holder(**{**at, **spread, **tp})

    def at(self, name: str, mesh: Mesh) -> Mapping[str, int]:
        """Where an expert's tensor is: its coordinates on the axes over which its layer is spread. Nothing for tensors
        that all have, or have a part of."""
        layer = layer_of(name)
        if layer is None:
            return {}
        rank = number_of(name) // self.local.get(layer, self.total[layer])
        return self.shares([name], mesh)[rank].at

    # ------------------------------------------------------------------ names

    def globally(self, names: Iterable[str], rank: int) -> tuple[str, ...]:
        """What an ep rank's tensors are called, by the names in its own files."""
        return tuple(renumbered(n, rank * self.local[layer]) if (layer := layer_of(n)) else n for n in names)

    def shapes_on(self, shapes: Mapping[str, Shape], rank: int) -> Mapping[str, Shape]:
        """The shapes of the shards that an ep rank has of tensors, by those of the first one."""
        if not self.fused:
            return shapes
        held = {name: len(fused.ranks[rank]) for name in shapes if (fused := self.fused_of(name))}
        return {name: (held[name], *shape[1:]) if name in held else shape for name, shape in shapes.items()}

    def on_rank(self, names: Iterable[str], rank: int) -> list[str]:
        """Those of a group's tensors that a rank has: all, or of experts those of its ep rank."""
        return [n for n in names if (layer := layer_of(n)) is None or number_of(n) // self.local[layer] == rank]

    def tensors(self, layer: str, names: Iterable[str]) -> list[tuple[int, list[str]]]:
        """The experts of a layer, each with its tensors, of which `names` are all that there are."""
        found: dict[int, list[str]] = {n: [] for n in range(self.total[layer])}
        for name in names:
            if layer_of(name) == layer:
                found[number_of(name)].append(name)
        return list(found.items())

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


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts names with numbers in them as a model counts."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def asked(mesh: Mesh) -> tuple[Mesh, int | None, bool | None]:
    """A mesh without the split of its dp; the ep degree that the split says, and whether ep is its slower part. None
    where it says none."""
    parts = mesh.leaves("dp")
    plain = Mesh(pp=mesh.pp, dp=mesh.dp, tp=mesh.tp)
    if "ep" not in parts:
        return plain, None, None
    return plain, mesh["ep"], "edp" in parts and parts.index("ep") < parts.index("edp") and mesh["edp"] > 1


def split(mesh: Mesh, sizes: Sequence[int], axes: Sequence[str], data_first: bool = False) -> Mesh:
    """The mesh with its dp as `edp` and one of these axes for each ep degree, ascending, each a multiple of the one
    before."""
    parts = {name: n // m for name, n, m in zip(axes, sizes, (1, *sizes), strict=False)}
    if not data_first:
        parts = dict(reversed(parts.items()))
    edp = {"edp": mesh["dp"] // sizes[-1]}
    return mesh.split("dp", **(parts | edp if data_first else edp | parts))


@lru_cache(maxsize=64)
def _folded(mesh: Mesh, sizes: tuple[int, ...], axes: tuple[str, ...], data_first: bool) -> Mesh:
    """The ranks of a mesh as those of pp and of dp and tp together, the latter split for experts."""
    return split(Mesh(pp=mesh.pp, dp=mesh.dp * mesh.tp), sizes, axes, data_first)


def numbers(names: Iterable[str]) -> dict[str, int]:
    """Layer → how many experts the names have."""
    found: dict[str, int] = {}
    for name in names:
        if layer := layer_of(name):
            found[layer] = max(found.get(layer, 0), number_of(name) + 1)
    return found


def experts_said(contents: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    """(layer, expert) of every expert file that model files say there is: `num_experts` of each layer that has some; a
    plain number is an old DeepSpeed's, which counts no layers."""
    said: Any = next((c["num_experts"] for c in contents if c.get("num_experts")), [])
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
