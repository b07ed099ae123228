"""A step folder's files, parsed and put in their places on the mesh. Headers only."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from ckptlab import paths
from ckptlab.catalog import PARAM
from ckptlab.findings import Faults, Finding, Where
from ckptlab.formats.deepspeed import autoep, checks, names
from ckptlab.formats.deepspeed.autoep import Fused
from ckptlab.formats.deepspeed.experts import Experts, degrees_named, experts_said, layer_of, numbers
from ckptlab.formats.deepspeed.headers import (
    Content,
    EngineConfig,
    ModelFile,
    OptimizerFile,
    Shape,
    WholeOptimizer,
    expert_optimizer,
    layer_file,
    order_of,
)
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
    "expert_optim": expert_optimizer,
}


@dataclass(frozen=True)
class StepFolder:
    """What `engine.save_checkpoint` wrote for one step.

    `heads[pp, tp]` are that rank's model files (at ZeRO-3 one for each dp rank, else one), `optims[pp, tp][dp]` the
    optimizer files (none where the model files hold the optimizer, or there are weights alone), `layers[layer][tp]` the
    tensors of the pipeline engine's layer files, whose names carry `-model_TT` if `layer_axis`, and `others[layer][tp]`
    what else is in them. `prefix` is that of the optimizer files ("bf16" or ""). Where there are experts, dp is split;
    `expert_optims[pp, tp]` are the ep ranks' optimizers where they train without ZeRO, each with its ep rank; the first
    is one of that tp rank. `left_out` are ranks without a model file, whose head is the one beside with its buffers
    alone.
    """

    path: str
    mesh: Mesh
    heads: Mapping[Rank, tuple[ModelFile, ...]]
    optims: Mapping[Rank, tuple[OptimizerFile, ...]] = field(default_factory=dict)
    layers: Mapping[int, tuple[Mapping[str, Stored], ...]] = field(default_factory=dict)
    others: Mapping[int, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    layer_axis: bool = True
    prefix: str = ""
    is_zero3: bool = False
    files: tuple[str, ...] = ()
    experts: Experts = field(default_factory=Experts)
    expert_optims: Mapping[Rank, tuple[tuple[int, WholeOptimizer], ...]] = field(default_factory=dict)
    left_out: tuple[Rank, ...] = ()

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
        found: dict[Rank, dict[str, Shape]] = {}
        for rank, (head, *_) in self.heads.items():
            local = head.trained
            of_ranks = self.experts.everywhere(list(local)) if self.experts else []
            found[rank] = {name: local[self.experts.locally(name)] for name in of_ranks} or dict(local)
        return found

    @cached_property
    def shards(self) -> dict[str, dict[int, Shape]]:
        """Of each tensor that an optimizer knows the shape of its shard on every tp rank."""
        found: dict[str, dict[int, Shape]] = {}
        for (_, tp), of_rank in self.trained.items():
            for name, shape in of_rank.items():
                found.setdefault(name, {})[tp] = shape
        return found

    @cached_property
    def stages(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor that an optimizer knows the pp stages that hold it."""
        found: dict[str, tuple[int, ...]] = {}
        for (stage, _), of_rank in self.trained.items():
            for name in of_rank:
                if stage not in (held := found.get(name, ())):
                    found[name] = (*held, stage)
        return found

    @cached_property
    def buffers(self) -> frozenset[str]:
        """The buffers that are saved, of all ranks."""
        return frozenset().union(*(head.buffers for head, *_ in self.heads.values()))

    @property
    def is_pipeline(self) -> bool:
        """Written by the pipeline engine: no rank's model file holds the module, layer files do."""
        return self.first.module is None

    @cached_property
    def is_numbered(self) -> bool:
        """There are experts, and tensors go by the numbers of layers, as those of a pipeline do. Of such a model each
        stage has its part of the module in its model file."""
        named = (n for of_rank in self.heads.values() for n in of_rank[0].module or {})
        numbered = all(n.partition(".")[0].isdigit() or n.startswith(names.TIED) for n in named)
        return bool(self.experts) and not self.is_pipeline and numbered


def read_step_folder(
    path: str, faults: Faults, *, optimizer: bool = True, also: Sequence[str] = ()
) -> StepFolder | None:
    """Parse every file of the step folder, and see that they are all there and of one run.

    also: folders that hold further files of the same step, those of other nodes. With `optimizer=False` no optimizer
    files are expected (a universal folder keeps the model files alone). None if that is not so, which `faults` is told
    of: files that are missing, unreadable or of another run.
    """
    found = _Found((path, *also), faults, optimizer)
    found.parse("model", "zero3_model", "layer", "expert")
    mesh = found.mesh()
    found.choose(mesh)
    found.parse("optim" if found.sets else "expert_optim")
    found.put_in_order()
    found.with_empty()
    for finding in (
        *found.misplaced(mesh),
        *found.notices(mesh),
        *found.experts.problems(path, mesh),
        *checks.agreement(path, found.heads, found.optims, mesh),
    ):
        faults.report(finding)
    return None if faults.failed else found.folder(found.experts.on(mesh))


class _Found:
    """The files that are in folders: `names` as they are called from the first, `heads`, `optims` and `layers` what was
    parsed."""

    def __init__(self, folders: Sequence[str], faults: Faults, optimizer: bool) -> None:
        self.path, self.faults, self.optimizer = folders[0], faults, optimizer
        self.names: dict[FileName, str] = {}
        self.doubles: list[str] = []
        for folder in folders:
            parsed = {e.name: n for e in paths.entries(folder) if e.is_file and (n := names.parse(e.name))}
            # where two names mean the same rank, the one that DeepSpeed writes is the rank's
            mine = {parsed[name]: name for name in sorted(parsed, key=lambda n: (parsed[n].text == n, n))}
            self.doubles += sorted(set(parsed) - set(mine.values()))
            here = "" if folder == self.path else os.path.relpath(folder, self.path)
            for parts, name in mine.items():  # what all nodes wrote is taken from the first
                self.names.setdefault(parts, os.path.join(here, name))
        self.kinds = {n.kind for n in self.names}
        self.head = "zero3_model" if "zero3_model" in self.kinds else "model"
        self.prefix = ""
        self.sets = sorted({n.prefix for n in self.names if n.kind == "optim"})
        self.axis = any(n.prefix for n in self.names if n.kind == "layer")
        self.heads: dict[FileName, ModelFile] = {}
        self.optims: dict[FileName, OptimizerFile] = {}
        self.layers: dict[FileName, Mapping[str, Stored]] = {}
        self.expert_files: dict[FileName, Mapping[str, Stored]] = {}
        self.expert_optims: dict[FileName, WholeOptimizer | None] = {}
        self.others: dict[FileName, Mapping[str, Any]] = {}

    @cached_property
    def experts(self) -> Experts:
        """The experts, by the files that could be read."""
        tp = self.mesh().tp
        places = sorted({(n.mp // tp, n.layer) for n in self.expert_files})
        stages = dict(enumerate(stage for stage, _ in places)) if self.mesh().pp > 1 else {}
        number = {place: i if stages else place[1] for i, place in enumerate(places)}
        files = {
            (number[n.mp // tp, n.layer], n.expert, n.mp % tp): tensors for n, tensors in self.expert_files.items()
        }
        spread = 1 + max((n.expert for n in self.names if n.kind == "expert_optim"), default=0)
        fused: tuple[Fused, ...] = ()
        for head in itertools.islice(self.heads.values(), 1):
            with self.faults.caught("odd-header", os.path.basename(head.path)):
                fused = autoep.layers(head.path, head.content)
        silent = bool(files) and all(head.shapes is None for head in self.heads.values())
        listed = (name for file in self.optims.values() for span in file.spans for name in span)
        said = listed if silent else ()
        return Experts.of(self.heads.values(), files, spread, fused, stages, tp, said, self._over_tp())

    def _over_tp(self) -> bool:
        """Whether the first rank's buffers of experts are cut over ranks of tp too, by the numbers of partitions."""
        first, head = self.optims.get(FileName("optim", prefix=self.prefix)), self.heads.get(FileName(self.head))
        counts = first.state_dict.get("partition_count") if first else None
        mesh = self.mesh()
        if mesh.tp == 1 or not isinstance(counts, (list, tuple)) or head is None or head.shapes is None:
            return False
        total = numbers(name for tensors in self.expert_files.values() for name in tensors)
        for shapes, count in zip(head.shapes, counts, strict=False):
            for layer, local in numbers(shapes).items():
                if total.get(layer, 0) // local * count == mesh.dp * mesh.tp != mesh.dp:
                    return True
        return False

    def parse(self, *kinds: str) -> None:
        """Read every file of these kinds; what cannot be read, or has another form, is a finding."""
        kept: dict[str, dict[FileName, Any]] = {
            self.head: self.heads,
            "optim": self.optims,
            "layer": self.layers,
            "expert": self.expert_files,
            "expert_optim": self.expert_optims,
        }
        wanted = [
            (name, file)
            for name, file in sorted(self.names.items(), key=lambda item: item[1])
            if name.kind in kinds and (name.kind != "optim" or name.prefix == self.prefix)
        ]
        for name, file in torchfile.ready(wanted, lambda one: paths.join(self.path, one[1])):
            contents = self.faults.read(self.path, file, torchfile.read_contents)
            if contents is not None and name.kind in kept:
                with self.faults.caught("odd-header", file):
                    path = paths.normal(os.path.join(self.path, file))
                    kept[name.kind][name] = _PARSERS[name.kind](path, contents.value)
                    if name.kind == "layer":
                        self.others[name] = {k: v for k, v in contents.value.items() if not isinstance(v, Stored)}

    def mesh(self) -> Mesh:
        """The mesh that most of the model files name; where none can be read, the one that the file names span.

        DeepSpeed before 0.16 did not record pp and tp; its layer files tell. Where the number of dp ranks is not said
        (0), or in a pipeline that of tp ranks for all of a stage's and its own (as converters of others do), file
        names tell. Under sequence parallelism, whose ranks are ranks of dp here, DeepSpeed calls its degree that of tp.
        """
        layers = max((n.mp + 1 for n in self.names if n.kind == "layer"), default=0)
        said = Counter((h.world, h.dp, h.degrees) for h in self.heads.values())
        ranks = [n for n in self.names if n.kind in (self.head, "optim")]
        spanned = max((n.mp for n in ranks), default=0) + 1, max((n.dp for n in ranks), default=0) + 1, None
        world, dp, degrees = said.most_common(1)[0][0] if said else spanned
        if degrees is not None and spanned[0] <= world < math.prod(degrees):  # of sequence parallelism
            degrees = None
        tp = layers or world
        if degrees is None and world == layers and self._is_pipeline and spanned[0] % tp == 0:
            world = max(world, sum(n.kind == self.head for n in self.names))
        pp, tp = degrees or (max(world // tp, 1), tp)
        return Mesh(pp=pp, dp=dp or spanned[1], tp=tp)

    def choose(self, mesh: Mesh) -> None:
        """Which optimizer files are this checkpoint's, where there are some with and some without `bf16_`: a set that
        is whole, and of those the one that the run's own configuration reads."""
        dtype = next((h.config.dtype for h in self.heads.values()), None)
        count = Counter(n.prefix for n in self.names if n.kind == "optim")
        whole = {p: count[p] >= mesh.size for p in self.sets}
        order = sorted(self.sets, key=lambda p: (not whole[p], -count[p], (p == "bf16") != (dtype == "bf16"), p))
        self.prefix = order[0] if order else ""

    def put_in_order(self) -> None:
        """Every rank's parameter groups in the order of the first rank's: where experts are spread over different
        numbers of ranks, each process may have another."""
        first = self.optims.get(FileName("optim", prefix=self.prefix))
        if first is None or any(list(f.group_of) != [*range(len(first.options))] for f in self.optims.values()):
            return
        orders = {name: order_of(f.options, first.options) for name, f in self.optims.items()}
        for name, head in self.heads.items():
            order = orders.get(FileName("optim", name.mp, name.dp, prefix=self.prefix))
            if order and head.shapes is not None and len(head.shapes) == len(order):
                self.heads[name] = replace(head, shapes=tuple(head.shapes[i] for i in order))
        self.optims.update({name: self.optims[name].reordered(order) for name, order in orders.items() if order})

    def with_empty(self) -> None:
        """Give every rank the tensors too of which it has nothing, and which DeepSpeed lists in its module alone: those
        that AutoTP cuts between fewer heads than there are tp ranks."""
        tp = self.mesh().tp
        for name, head in self.heads.items():
            first = self.heads.get(replace(name, mp=name.mp // tp * tp))
            if first is None or not first.shapes or not head.shapes or len(first.shapes) != len(head.shapes):
                continue
            if all(len(own) == len(every) for own, every in zip(head.shapes, first.shapes, strict=True)):
                continue
            module = head.module or {}
            groups = []
            for every, own in zip(first.shapes, head.shapes, strict=True):
                empty = {n: module[n].shape for n in every if n not in own and n in module and not module[n].numel}
                known = {**empty, **own}
                groups.append({n: known[n] for n in every if n in known} if own.keys() <= every.keys() else own)
            self.heads[name] = replace(head, shapes=tuple(groups))

    @property
    def inside(self) -> bool:
        """The optimizer is in the model files."""
        held = (*(head.optimizer for head in self.heads.values()), *self.expert_optims.values())
        return "optim" not in self.kinds and any(optimizer is not None for optimizer in held)

    @property
    def weights_alone(self) -> bool:
        """There is no optimizer, and there are the module's weights."""
        if not self.optimizer or "optim" in self.kinds or self.inside:
            return False
        return self.head == "model" and bool(self.heads)

    @property
    def of_one_rank(self) -> bool:
        """ZeRO-3, and of the model files of each (pp, tp) coordinate only that of dp rank 0 is there, as a run leaves
        them that had loaded a universal checkpoint. They hold nothing that is not in it, but for frozen tensors."""
        return self.head == "zero3_model" and not any(n.dp for n in self.names if n.kind == self.head)

    def notices(self, mesh: Mesh) -> Iterator[Finding]:
        """What is not as usual, and read all the same."""
        if left_out := self.left_out(mesh):
            yield self._left_out(left_out, mesh)
        if self.weights_alone:
            found = "no optimizer file: the weights of the model are all there is"
            todo = "nothing, if that is what was copied; to resume, copy the optimizer files too"
            expected = f"{number_of(mesh.size, 'optimizer file')}"
            yield Finding(
                "weights-alone", "warning", Where(), expected, found, todo, "headers", f"{self.path}: {found}"
            )
        if self.of_one_rank and mesh.dp > 1:
            found = f"the model files of dp rank 0 alone are there, of {mesh.dp}"
            part = {n: -(-math.prod(s) // mesh.dp) for h in self.heads.values() for n, s in h.frozen.items()}
            lost = tuple(n for h in self.heads.values() for n, s in h.frozen.items() if part[n] < math.prod(s))
            rest = (
                f"of the frozen tensors {some(lost, 4)} the rest is in the others: left out"
                if lost
                else "nothing is lost"
            )
            todo = (
                "copy the others, if there are any"
                if lost
                else "nothing for ckptlab; DeepSpeed wants a file a rank: convert it"
            )
            where = Where(tensors=tuple(dict.fromkeys(lost)))
            severity, text = "warning" if lost else "info", f"{self.path}: {found}: {rest}"
            yield Finding("model-files", severity, where, "one a rank", f"{found}: {rest}", todo, "headers", text)

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
        optims = {file for n, file in self.names.items() if n.kind == "optim"}
        if len(self.sets) > 1 and not self.doubles and optims.issuperset(extra):
            yield self._second_set(extra)
        elif extra := sorted([*extra, *self.doubles]):
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

    def _second_set(self, extra: list[str]) -> Finding:
        taken = f"those {'with' if self.prefix else 'without'} {self.prefix or 'a prefix'}"
        found = f"two sets of optimizer files; {taken} are taken, {some(extra, 4)} left alone"
        return Finding(
            "extra-file",
            "warning",
            Where(files=tuple(sorted(extra))),
            "optimizer files of one run",
            found,
            "move the others away: they are left from a run in another dtype, and DeepSpeed goes by that of its own",
            "files",
            f"{self.path}: {found}",
        )

    def wanted(self, mesh: Mesh) -> dict[str, list[FileName]]:
        """The files that the ranks must have, by kind."""
        world = range(mesh.pp * mesh.tp)
        dp = range(mesh.dp)
        writers = range(1) if self.head == "model" or self.of_one_rank else dp
        absent = self.left_out(mesh)
        wanted = {"model": [FileName(self.head, mp, d) for mp in world for d in writers if mp not in absent]}
        told = bool(self.heads) or "optim" in self.kinds  # else model files that cannot be read may hold it
        if self.optimizer and told and not self.inside and not self.weights_alone:
            wanted["optimizer"] = [FileName("optim", mp, d, prefix=self.prefix) for mp in world for d in dp]
        numbers = {n.layer for n in self.names if n.kind == "layer"}
        if self.optimizer and (numbers or self._is_pipeline):
            numbers |= self._layers_named()
        if numbers:
            axis = self.axis or mesh.tp > 1
            wanted["layer"] = [self.layer(i, t, axis) for i in sorted(numbers) for t in range(mesh.tp)]
        if self.optimizer and self.head == "model":  # ZeRO-3 keeps all weights in the optimizer files
            experts = [
                FileName("expert", mp=p * mesh.tp + t, layer=i, expert=e)
                for p in range(mesh.pp)
                for i, e in experts_said(h.content for n, h in self.heads.items() if n.mp // mesh.tp == p)
                for t in self.experts.of_file(p, i, e, mesh)
            ]
            if self.experts.over_tp and not self.experts.fused:  # copies of it are there where DeepSpeed can load them
                first = {(n.mp // mesh.tp, n.layer, n.expert): n for n in reversed(experts)}
                needed = {*first.values()}
                experts = [n for n in experts if n in needed or n in self.names]
            if experts:
                wanted["expert"] = experts
            if self.inside and self.expert_optims:
                ranks = range(max(1 + max(n.expert for n in self.expert_optims), self._spread_said()))
                wanted["expert optimizer"] = [
                    FileName("expert_optim", mp=p * mesh.tp + t, expert=e)
                    for e in ranks
                    for p in range(mesh.pp)
                    for t in self.experts.writers(e, len(ranks), mesh)
                ]
        return wanted

    def left_out(self, mesh: Mesh) -> tuple[int, ...]:
        """The numbers of the model files that DeepSpeed leaves out, where experts are dealt to fewer ranks than tp has.
        Nothing where one of them is there after all, or where nothing else holds these ranks' weights."""
        if self.head != "model" or "optim" not in self.kinds or not self.experts.over_tp:
            return ()
        saved = self.experts.saved(mesh)
        ranks = tuple(mp for mp in range(mesh.pp * mesh.tp) if mp % mesh.tp not in saved)
        return () if any(n.kind == self.head and n.mp in ranks for n in self.names) else ranks

    def _left_out(self, ranks: tuple[int, ...], mesh: Mesh) -> Finding:
        files = tuple(names.model(mp) for mp in ranks)
        heads = self.heads.values()
        trained = dict.fromkeys(n for h in heads for n in h.trained if not layer_of(n))
        others = (n for h in heads for n in h.module or {} if n not in h.buffers and n not in h.shared)
        frozen = tuple(dict.fromkeys(n for n in others if n not in trained))
        found = (
            f"{some(files, 4)}: not there. DeepSpeed, to 0.19.8 at least, writes the model files of those tp ranks "
            f"alone that come first among ranks with the same experts (ep {self.experts.sizes[-1]}, of tp {mesh.tp}), "
            "and cannot load it. The module's weights are left out, and made of the optimizer's where they are written"
            + (f"; of {some(frozen, 4)} nothing else is stored" if frozen else "")
        )
        todo = "convert it, and train on with that: ckptlab writes all files, on the same mesh too"
        where = Where(files, (*trained, *frozen), (PARAM,))
        return Finding("model-files", "warning", where, "one a rank", found, todo, "headers", f"{self.path}: {found}")

    def _spread_said(self) -> int:
        """Over how many ranks experts are spread, by the names of their parameter groups; 0 where those do not tell."""
        return max((n for o in self.expert_optims.values() if o for n in degrees_named(o.options) if n), default=0)

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
        if self.experts.over_tp and missing and all(name.startswith("mp_rank_") for name in missing):
            ep = self.experts.sizes[-1]
            return (
                f"{self.path}: incomplete: {some(missing, 4)} missing. DeepSpeed, to 0.19.8 at least, writes those of "
                f"the tp ranks alone that come first among ranks with the same experts (ep {ep}, of tp {mesh.tp}) and "
                "cannot load it: save it again with an ep that is a multiple of tp, or experts that are tensor "
                "parallel themselves"
            )
        needs = f"{model} model files" + (f" and {mesh.size} optimizer files" if self.optimizer else "")
        return (
            f"{self.path}: incomplete: {some(missing, 4)} missing. The other files say {mesh}, which needs {needs}: "
            "copy the missing files from the run's storage"
        )

    def folder(self, mesh: Mesh) -> StepFolder:
        wanted = self.wanted(mesh)
        ranks = {(p, t): p * mesh.tp + t for p in range(mesh.pp) for t in range(mesh.tp)}
        dp = range(1) if self.head == "model" or self.of_one_rank else range(mesh.dp)
        numbers = sorted({n.layer for n in wanted.get("layer", ())})
        axis = self.axis or mesh.tp > 1
        optims = {}
        if "optimizer" in wanted:
            optims = {
                r: tuple(self.optims[FileName("optim", mp, d, prefix=self.prefix)] for d in range(mesh.dp))
                for r, mp in ranks.items()
            }
        of_experts: dict[Rank, tuple[tuple[int, WholeOptimizer], ...]] = {}
        held = [(name, one) for name in wanted.get("expert optimizer", ()) if (one := self.expert_optims[name])]
        for mp in sorted({name.mp for name, _ in held}):
            own = [(name.expert, one) for name, one in held if name.mp == mp]
            beside = [(n, one) for n, one in held if n.mp != mp and n.mp // mesh.tp == mp // mesh.tp]
            others = [(name.expert, one) for name, one in beside if self.experts.over_tp]
            of_experts[mp // mesh.tp, mp % mesh.tp] = (*own, *others)
        absent = self.left_out(mesh)
        heads = {
            r: tuple(self.heads[FileName(self.head, mp, d)] for d in dp) for r, mp in ranks.items() if mp not in absent
        }
        left_out = tuple(r for r, mp in ranks.items() if mp in absent)
        for rank in left_out:
            head = heads[rank[0], 0][0]
            buffers = {n: t for n, t in (head.module or {}).items() if n in head.buffers}
            heads[rank] = (replace(head, module=buffers, shared={}),)
        heads = {rank: heads[rank] for rank in ranks}
        if fused := self.experts.fused:
            heads = {
                r: tuple(replace(h, shared={**h.shared, **autoep.aliases(fused, h.module or {})}) for h in of_rank)
                for r, of_rank in heads.items()
            }
        for rank, ((_, first), *_) in of_experts.items():
            heads[rank] = tuple(replace(h, optimizer=first) for h in heads[rank])
        return StepFolder(
            self.path,
            mesh,
            heads,
            optims,
            {i: tuple(self.layers[self.layer(i, t, axis)] for t in range(mesh.tp)) for i in numbers},
            {i: tuple(self.others[self.layer(i, t, axis)] for t in range(mesh.tp)) for i in numbers},
            self.axis,
            self.prefix,
            self.head == "zero3_model",
            tuple(sorted(self.names[n] for needed in wanted.values() for n in needed)),
            self.experts,
            of_experts,
            left_out,
        )


_COPY = "copy the missing files from the storage of the nodes that wrote them"
