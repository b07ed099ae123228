"""A step folder's files, parsed and put in their places on the mesh. Headers only."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ckptlab.findings import Faults, Finding, Where, not_read_yet
from ckptlab.formats.deepspeed import checks, names
from ckptlab.formats.deepspeed.experts import Experts, experts_said
from ckptlab.formats.deepspeed.headers import Content, EngineConfig, ModelFile, OptimizerFile, Shape, layer_file
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.torch import torchfile
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored
from ckptlab.words import number_of, some

Rank = tuple[int, int]  # (pp stage, tp rank)

_DIGITS = 6  # of a layer's number: more are none
_RANKS_A_FILE = 1000  # a mesh of more ranks for each file that is there is no mesh
_PARSERS: Mapping[str, Any] = {
    "model": ModelFile.of,
    "zero3_model": ModelFile.of,
    "optim": OptimizerFile.of,
    "layer": layer_file,
    "expert": layer_file,
}


@dataclass(frozen=True)
class StepFolder:
    """What `engine.save_checkpoint` wrote for one step.

    `heads[pp, tp]` are that rank's model files (at ZeRO-3 one for each dp rank, else one), `optims[pp, tp][dp]` the
    optimizer files, `layers[layer][tp]` the tensors of the pipeline engine's layer files, whose names carry `-model_TT`
    if `layer_axis`. `prefix` is that of the optimizer files ("bf16" or ""). Where there are experts, dp is split.
    """

    path: str
    mesh: Mesh
    heads: Mapping[Rank, tuple[ModelFile, ...]]
    optims: Mapping[Rank, tuple[OptimizerFile, ...]] = field(default_factory=dict)
    layers: Mapping[int, tuple[Mapping[str, Stored], ...]] = field(default_factory=dict)
    layer_axis: bool = True
    prefix: str = ""
    is_zero3: bool = False
    files: tuple[str, ...] = ()
    experts: Experts = field(default_factory=Experts)

    @cached_property
    def models(self) -> dict[Rank, Content]:
        """The content of each rank's model file, at ZeRO-3 that of dp rank 0."""
        return {rank: heads[0].content for rank, heads in self.heads.items()}

    @property
    def first(self) -> ModelFile:
        """The first rank's model file."""
        return self.heads[0, 0][0]

    @property
    def config(self) -> EngineConfig:
        """The run's ds_config, as far as it concerns a checkpoint."""
        return self.first.config

    @cached_property
    def trained(self) -> dict[Rank, dict[str, Shape]]:
        """Shard shapes of the tensors that each rank's optimizer knows, in memory order; of experts, those of all ep
        ranks."""
        found = {}
        for rank, (head, *_) in self.heads.items():
            local = head.trained
            of_ranks = self.experts.everywhere(list(local)) if self.experts else []
            found[rank] = {name: local[self.experts.locally(name)] for name in of_ranks} or local
        return found

    @property
    def is_pipeline(self) -> bool:
        """Written by the pipeline engine: no rank's model file holds the module, layer files do."""
        return self.first.module is None


def read_step_folder(path: str, faults: Faults, *, optimizer: bool = True) -> StepFolder | None:
    """Parse every file of the step folder, and see that they are all there and of one run.

    With `optimizer=False` no optimizer files are expected (a universal folder keeps the model files alone). None if
    that is not so, which `faults` is told of: files that are missing, unreadable or of another run, and as not read yet
    training without ZeRO.
    """
    found = _Found(path, faults, optimizer)
    found.parse()
    mesh = found.mesh()
    for finding in (
        *found.stage_zero(),
        *found.misplaced(mesh),
        *found.experts.problems(path, mesh),
        *checks.agreement(path, found.heads, found.optims, mesh),
    ):
        faults.report(finding)
    return None if faults.failed else found.folder(found.experts.on(mesh))


class _Found:
    """The files that are in a folder: `names` as they are called, `heads`, `optims` and `layers` what was parsed."""

    def __init__(self, path: str, faults: Faults, optimizer: bool) -> None:
        self.path, self.faults, self.optimizer = path, faults, optimizer
        parsed = {e.name: n for e in os.scandir(path) if e.is_file() and (n := names.parse(e.name))}
        # where two names mean the same rank, the one that DeepSpeed writes is the rank's
        self.names = {parsed[name]: name for name in sorted(parsed, key=lambda n: (parsed[n].text == n, n))}
        self.doubles = sorted(set(parsed) - set(self.names.values()))
        self.kinds = {n.kind for n in self.names}
        self.head = "zero3_model" if "zero3_model" in self.kinds else "model"
        self.prefix = self._usual_prefix()
        self.axis = any(n.prefix for n in self.names if n.kind == "layer")
        self.heads: dict[FileName, ModelFile] = {}
        self.optims: dict[FileName, OptimizerFile] = {}
        self.layers: dict[FileName, Mapping[str, Stored]] = {}
        self.expert_files: dict[FileName, Mapping[str, Stored]] = {}

    @cached_property
    def experts(self) -> Experts:
        """The experts, by the files that could be read."""
        files = {(n.layer, n.expert, n.mp): tensors for n, tensors in self.expert_files.items()}
        return Experts.of(self.heads.values(), files)

    def _usual_prefix(self) -> str:
        counts = Counter(n.prefix for n in self.names if n.kind == "optim").most_common(1)
        return counts[0][0] if counts else ""

    def parse(self) -> None:
        """Read every file; what cannot be read, or has another form, is a finding."""
        kept: dict[str, dict[FileName, Any]] = {
            self.head: self.heads,
            "optim": self.optims,
            "layer": self.layers,
            "expert": self.expert_files,
        }
        for name, file in sorted(self.names.items(), key=lambda item: item[1]):
            contents = self.faults.read(self.path, file, torchfile.read_contents)
            if contents is not None and name.kind in kept:
                with self.faults.caught("odd-header", file):
                    kept[name.kind][name] = _PARSERS[name.kind](os.path.join(self.path, file), contents.value)

    def mesh(self) -> Mesh:
        """The mesh that most of the model files name; where none can be read, the one that the file names span.

        DeepSpeed before 0.16 did not record pp and tp; its layer files tell.
        """
        layers = max((n.mp + 1 for n in self.names if n.kind == "layer"), default=0)
        said = Counter((h.world, h.dp, h.degrees) for h in self.heads.values())
        ranks = [n for n in self.names if n.kind in (self.head, "optim")]
        spanned = max((n.mp for n in ranks), default=0) + 1, max((n.dp for n in ranks), default=0) + 1, None
        world, dp, degrees = said.most_common(1)[0][0] if said else spanned
        tp = layers or world
        pp, tp = degrees or (max(world // tp, 1), tp)
        return Mesh(pp=pp, dp=dp, tp=tp)

    def stage_zero(self) -> Iterator[Finding]:
        inside = any(h.content.get("optimizer") is not None for h in self.heads.values())
        if self.optimizer and "optim" not in self.kinds and (inside or "expert_optim" in self.kinds):
            yield not_read_yet(
                f"{self.path}: trained without ZeRO (stage 0): the optimizer stands in the model files, which ckptlab "
                "cannot read yet"
            )

    def misplaced(self, mesh: Mesh) -> Iterator[Finding]:
        """Files of ranks that are missing, and files of ranks that the mesh does not have."""
        if mesh.size > _RANKS_A_FILE * (len(self.names) + 1):
            message = f"{self.path}: the model files say {mesh}, but there are {number_of(len(self.names), 'file')}"
            yield Finding("odd-header", "error", Where(), "a mesh", message, _COPY, "headers", message)
            return
        wanted = self.wanted(mesh)
        missing = {kind: [n for n in needed if n not in self.names] for kind, needed in wanted.items()}
        message = self._complaint(mesh, [n.text for of_kind in missing.values() for n in of_kind])
        for kind, absent in missing.items():
            if absent:
                yield Finding(
                    "missing-file",
                    "error",
                    Where(files=tuple(n.text for n in absent)),
                    f"{number_of(len(wanted[kind]), f'{kind} file')}, for {mesh}",
                    f"{some([n.text for n in absent], 4)} {'is' if len(absent) == 1 else 'are'} not there",
                    _COPY,
                    "files",
                    message,
                )
        known = {n for needed in wanted.values() for n in needed}
        kinds = {"model", "zero3_model", "layer", "expert", *(("optim",) if self.optimizer else ())}
        extra = [file for n, file in self.names.items() if n.kind in kinds and n not in known]
        if extra := sorted([*extra, *self.doubles]):
            yield Finding(
                "extra-file",
                "warning",
                Where(files=tuple(extra)),
                f"the files of {mesh} and no others",
                f"{some(extra, 4)}: of no rank of that mesh. ckptlab leaves them alone; DeepSpeed's own tools count "
                "files and take them for ranks",
                "move them away: they are left from another run or mesh",
                "files",
                f"{self.path}: {some(extra, 4)}: not part of this checkpoint's mesh ({mesh}); left alone",
            )

    def wanted(self, mesh: Mesh) -> dict[str, list[FileName]]:
        """The files that the ranks must have, by kind."""
        world = range(mesh.pp * mesh.tp)
        dp = range(mesh.dp)
        wanted = {"model": [FileName(self.head, mp, d) for mp in world for d in (dp if self.head != "model" else [0])]}
        if self.optimizer and not any(self.stage_zero()):
            wanted["optimizer"] = [FileName("optim", mp, d, prefix=self.prefix) for mp in world for d in dp]
        numbers = {n.layer for n in self.names if n.kind == "layer"}
        if self.optimizer and (numbers or self._is_pipeline):
            numbers |= self._layers_named()
        if numbers:
            axis = self.axis or mesh.tp > 1
            wanted["layer"] = [self.layer(i, t, axis) for i in sorted(numbers) for t in range(mesh.tp)]
        if self.optimizer:
            every = itertools.product(experts_said(h.content for h in self.heads.values()), range(mesh.tp))
            if experts := [FileName("expert", mp=t, layer=i, expert=e) for (i, e), t in every]:
                wanted["expert"] = experts
        return wanted

    @staticmethod
    def layer(number: int, tp: int, axis: bool) -> FileName:
        return FileName("layer", mp=tp if axis else 0, layer=number, prefix="model" if axis else "")

    @property
    def _is_pipeline(self) -> bool:
        return self.head == "model" and bool(self.heads) and all(h.module is None for h in self.heads.values())

    def _layers_named(self) -> set[int]:
        """The layers whose tensors the model files list."""
        firsts = {name.partition(".")[0] for head in self.heads.values() for name in head.trained}
        return {int(first) for first in firsts if first.isascii() and first.isdecimal() and len(first) < _DIGITS}

    def _complaint(self, mesh: Mesh, missing: list[str]) -> str:
        if self.head not in self.kinds:
            return (
                f"{self.path}: no mp_rank_*_model_states.pt and no zero_pp_rank_*_model_states.pt: not a DeepSpeed "
                "step folder, or its model files are missing"
            )
        model = mesh.pp * mesh.tp * (mesh.dp if self.head == "zero3_model" else 1)
        needs = f"{model} model files" + (f" and {mesh.size} optimizer files" if self.optimizer else "")
        return (
            f"{self.path}: incomplete: {some(missing, 4)} missing. The other files say {mesh}, which needs {needs}: "
            "copy the missing files from the run's storage"
        )

    def folder(self, mesh: Mesh) -> StepFolder:
        wanted = self.wanted(mesh)
        ranks = {(p, t): p * mesh.tp + t for p in range(mesh.pp) for t in range(mesh.tp)}
        dp = range(mesh.dp) if self.head == "zero3_model" else range(1)
        numbers = sorted({n.layer for n in wanted.get("layer", ())})
        axis = self.axis or mesh.tp > 1
        optims = {}
        if self.optimizer:
            optims = {
                r: tuple(self.optims[FileName("optim", mp, d, prefix=self.prefix)] for d in range(mesh.dp))
                for r, mp in ranks.items()
            }
        return StepFolder(
            self.path,
            mesh,
            {r: tuple(self.heads[FileName(self.head, mp, d)] for d in dp) for r, mp in ranks.items()},
            optims,
            {i: tuple(self.layers[self.layer(i, t, axis)] for t in range(mesh.tp)) for i in numbers},
            self.axis,
            self.prefix,
            self.head == "zero3_model",
            tuple(sorted(self.names[n] for needed in wanted.values() for n in needed)),
            self.experts,
        )


_COPY = "copy the missing files from the storage of the nodes that wrote them"
