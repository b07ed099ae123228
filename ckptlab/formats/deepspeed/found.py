"""What the files of a step folder are, parsed: the mesh, the experts and the optimizer that they tell of, and the files
that ranks must have. Headers only."""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from ckptlab import paths
from ckptlab.findings import Faults
from ckptlab.formats.deepspeed import autoep, names
from ckptlab.formats.deepspeed.autoep import Fused
from ckptlab.formats.deepspeed.experts import Experts, experts_said, numbers
from ckptlab.formats.deepspeed.groups import degrees_named
from ckptlab.formats.deepspeed.modelfile import ModelFile, layer_file
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.deepspeed.optimfile import OptimizerFile, WholeOptimizer, expert_optimizer, order_of
from ckptlab.formats.torch import torchfile
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored

_PARSERS: Mapping[str, Any] = {
    "model": ModelFile.of,
    "zero3_model": ModelFile.of,
    "optim": OptimizerFile.of,
    "layer": layer_file,
    "expert": layer_file,
    "expert_optim": expert_optimizer,
}


class Found:
    """The files that are in folders: `names` as they are called from the first, `heads`, `optims`, `layers` and so on
    what was parsed of them. `optimizer`: files of one are expected. Model files are parsed before all else is asked."""

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
        self.sets = sorted({n.prefix for n in self.names if n.kind == "optim"})
        self.axis = any(n.prefix for n in self.names if n.kind == "layer")
        self.heads: dict[FileName, ModelFile] = {}
        self.optims: dict[FileName, OptimizerFile] = {}
        self.layers: dict[FileName, Mapping[str, Stored]] = {}
        self.others: dict[FileName, Mapping[str, Any]] = {}
        self.expert_files: dict[FileName, Mapping[str, Stored]] = {}
        self.expert_optims: dict[FileName, WholeOptimizer | None] = {}

    # ---------------------------------------------------------------- reading

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

    def put_in_order(self) -> None:
        """Every rank's parameter groups in the order of the first rank's: where experts are spread over different
        numbers of ranks, each process may have another."""
        first = self.first_optim
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
        tp = self.mesh.tp
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

    # ---------------------------------------------------------------- what they tell

    @cached_property
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

    @cached_property
    def prefix(self) -> str:
        """Of the optimizer files that are this checkpoint's, where there are some with and some without `bf16_`: a set
        that is whole, and of those the one that the run's own configuration reads."""
        dtype = next((h.config.dtype for h in self.heads.values()), None)
        count = Counter(n.prefix for n in self.names if n.kind == "optim")
        order = sorted(
            self.sets, key=lambda p: (count[p] < self.mesh.size, -count[p], (p == "bf16") != (dtype == "bf16"), p)
        )
        return order[0] if order else ""

    @property
    def first_optim(self) -> OptimizerFile | None:
        """The first rank's optimizer file."""
        return self.optims.get(FileName("optim", prefix=self.prefix))

    @cached_property
    def experts(self) -> Experts:
        """The experts, by the files that could be read."""
        tp, staged = self.mesh.tp, self.mesh.pp > 1
        places = sorted({(n.mp // tp, n.layer) for n in self.expert_files})
        stages = dict(enumerate(stage for stage, _ in places)) if staged else {}
        number = {place: i if staged else place[1] for i, place in enumerate(places)}
        files = {
            (number[n.mp // tp, n.layer], n.expert, n.mp % tp): tensors for n, tensors in self.expert_files.items()
        }
        spread = 1 + max((n.expert for n in self.names if n.kind == "expert_optim"), default=0)
        fused: tuple[Fused, ...] = ()
        for head in itertools.islice(self.heads.values(), 1):
            with self.faults.caught("odd-header", head.name):
                fused = autoep.layers(head.path, head.content)
        silent = bool(files) and all(head.shapes is None for head in self.heads.values())
        listed = (name for file in self.optims.values() for span in file.spans for name in span)
        said = listed if silent else ()
        return Experts.of(self.heads.values(), files, spread, fused, stages, tp, said, self._over_tp)

    @property
    def _over_tp(self) -> bool:
        """Whether the first rank's buffers of experts are cut over ranks of tp too, by the numbers of partitions."""
        head, mesh = self.heads.get(FileName(self.head)), self.mesh
        counts = self.first_optim.state_dict.get("partition_count") if self.first_optim else None
        if mesh.tp == 1 or not isinstance(counts, (list, tuple)) or head is None or head.shapes is None:
            return False
        total = numbers(name for tensors in self.expert_files.values() for name in tensors)
        for shapes, count in zip(head.shapes, counts, strict=False):
            for layer, local in numbers(shapes).items():
                if total.get(layer, 0) // local * count == mesh.dp * mesh.tp != mesh.dp:
                    return True
        return False

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

    @property
    def _is_pipeline(self) -> bool:
        return self.head == "model" and bool(self.heads) and all(h.module is None for h in self.heads.values())

    # ---------------------------------------------------------------- what there must be

    @cached_property
    def wanted(self) -> dict[str, list[FileName]]:
        """The files that the ranks must have, by kind."""
        mesh = self.mesh
        world = range(mesh.pp * mesh.tp)
        dp = range(mesh.dp)
        writers = range(1) if self.head == "model" or self.of_one_rank else dp
        wanted = {"model": [FileName(self.head, mp, d) for mp in world for d in writers if mp not in self.left_out]}
        told = bool(self.heads) or "optim" in self.kinds  # else model files that cannot be read may hold it
        if self.optimizer and told and not self.inside and not self.weights_alone:
            wanted["optimizer"] = [FileName("optim", mp, d, prefix=self.prefix) for mp in world for d in dp]
        layers = {n.layer for n in self.names if n.kind == "layer"}
        if self.optimizer and (layers or self._is_pipeline):  # those whose tensors the model files list, too
            listed = (names.layer_number(name) for head in self.heads.values() for name in head.trained)
            layers |= {layer for layer in listed if layer is not None}
        if layers:
            axis = self.axis or mesh.tp > 1
            wanted["layer"] = [FileName.of_layer(i, t, axis) for i in sorted(layers) for t in range(mesh.tp)]
        if self.optimizer and self.head == "model":  # ZeRO-3 keeps all weights in the optimizer files
            if experts := self._wanted_of_experts():
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

    def _wanted_of_experts(self) -> list[FileName]:
        mesh = self.mesh
        found = [
            FileName("expert", mp=p * mesh.tp + t, layer=i, expert=e)
            for p in range(mesh.pp)
            for i, e in experts_said(h.content for n, h in self.heads.items() if n.mp // mesh.tp == p)
            for t in self.experts.of_file(p, i, e, mesh)
        ]
        if self.experts.over_tp and not self.experts.fused:  # copies of it are there where DeepSpeed can load them
            first = {(n.mp // mesh.tp, n.layer, n.expert): n for n in reversed(found)}
            needed = {*first.values()}
            return [n for n in found if n in needed or n in self.names]
        return found

    def _spread_said(self) -> int:
        """Over how many ranks experts are spread, by the names of their parameter groups; 0 where those do not tell."""
        return max((n for o in self.expert_optims.values() if o for n in degrees_named(o.options) if n), default=0)

    @cached_property
    def left_out(self) -> tuple[int, ...]:
        """The numbers of the model files that DeepSpeed leaves out, where experts are dealt to fewer ranks than tp has.
        Nothing where one of them is there after all, or where nothing else holds these ranks' weights."""
        if self.head != "model" or "optim" not in self.kinds or not self.experts.over_tp:
            return ()
        mesh = self.mesh
        saved = self.experts.saved(mesh)
        ranks = tuple(mp for mp in range(mesh.pp * mesh.tp) if mp % mesh.tp not in saved)
        return () if any(n.kind == self.head and n.mp in ranks for n in self.names) else ranks
