"""A universal folder → `Catalog`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

from ckptlab import paths
from ckptlab.catalog import ALONE, MASTER, PARAM, Catalog, Extents, Fragment, ParameterGroup, Tensor, whole_placements
from ckptlab.findings import Faults, Finding, Where, contradiction
from ckptlab.formats.deepspeed.files import StepFolder, read_step_folder
from ckptlab.formats.deepspeed.groups import Groups, kinds, match_groups
from ckptlab.formats.deepspeed.header import Header
from ckptlab.formats.deepspeed.layouts import UniversalInfo
from ckptlab.formats.deepspeed.module import ModuleWeights, by_names, read_module
from ckptlab.formats.deepspeed.optimfile import EXTRAS, Wrapper
from ckptlab.formats.deepspeed.optimizer import program_order
from ckptlab.formats.deepspeed.options import dealt_to_tp
from ckptlab.formats.deepspeed.read import (
    Native,
    all_experts,
    choose_layout,
    client_state,
    layouts_are_told,
    shards_of,
    training,
    universal_info,
    whole,
)
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.sharding.strategies import Strategy
from ckptlab.stored import Stored

FOLDER = "zero"
OPTIMIZER = "optimizer_state.pt"
_FILES = {MASTER: "fp32"}  # what DeepSpeed calls a state's file, where that is not its name


def file_of(state: str) -> str:
    """The name of a state's file, without `.pt`."""
    return _FILES.get(state, state)


def state_of(file: str) -> str:
    """The state that is in a file of that name."""
    return next((state for state, name in _FILES.items() if name == file), file)


def read_universal(path: str, faults: Faults, strategy: Strategy | None = None) -> Catalog | None:
    """Open a universal folder (the one that holds `zero/`): whole tensors, mesh 1 · 1 · 1.

    The layouts, groups and pipeline layers that a reshape needs are taken from the model files beside. None where
    `faults` was told of an error, as that a state's shape contradicts them.
    """
    folder = read_step_folder(path, faults, optimizer=False)
    common = _common(path, faults)
    stored = dict(_stored(path, faults))
    if folder is None or common is None or faults.failed:
        return None
    info = universal_info(folder, faults)
    module = read_module(folder, faults)
    found = _Tensors(folder, info, strategy, module, faults)
    found.add_trained(stored)
    found.add_module()
    over_tp = dealt_to_tp(folder.experts, found.tensors, folder.mesh.tp)
    dealt = replace(folder, experts=replace(folder.experts, over_tp=over_tp))
    groups = _groups(dealt, common, {n: one.scalars for n, one in stored.items()}, faults)
    for finding in _lacking(found, groups):
        faults.report(finding)
    if faults.failed:
        return None
    return _catalog(found, groups, common, tuple(f for one in stored.values() for f in one.files))


def _catalog(found: _Tensors, groups: tuple[ParameterGroup, ...], common: _Common, files: tuple[str, ...]) -> Catalog:
    folder = found.folder
    layered = folder.is_pipeline or folder.is_numbered
    group_of = {n: i for i, g in enumerate(groups) for n in g.tensors}
    native = Native(
        folder,
        common.wrapper,
        layouts_are_told(found.info, found.strategy),
        found.module if not layered else by_names(found.module, found.tensors, common.tied_layers),
        {k: common.content[k] for k in EXTRAS if k in common.content},
        not common.options,
    )
    zero_stage = 3 if common.wrapper is Wrapper.ZERO3 or folder.is_zero3 else folder.config.stage or 1
    tensors = {n: replace(t, group=group_of.get(n)) for n, t in found.tensors.items()}
    return Catalog(
        path=folder.path,
        format="universal",
        mesh=Mesh(),
        tensors=tensors,
        placements=whole_placements(tensors, found.pieces),
        extents=Extents(found.pieces),
        training=training(native, zero_stage, groups),
        client=client_state(folder),
        private=native,
        findings=tuple(found.faults.findings),
        files=(*folder.files, *files),
    )


# What ckptlab says in optimizer_state.pt, and DeepSpeed has no word for
GROUPS = "ckptlab_groups"  # which parameter groups each pp stage has, where they differ
TIED = "ckptlab_tied"  # which layer of a pipeline a tied module is, by its prefix


@dataclass(frozen=True)
class _Common:
    """What all tensors have in common: the optimizer's parameter groups, each with the buffers in it, and its step."""

    content: Mapping[str, Any] = field(default_factory=dict)
    wrapper: Wrapper = Wrapper.BF16
    options: tuple[Mapping[str, Any], ...] = ()
    members: tuple[tuple[int, ...], ...] = ()
    step: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, path: str, content: Any) -> _Common:
        header = Header.of(path, content)
        groups = header.groups()
        # stage 3 stores no step beside the tensors; the optimizer's own state has it
        state = header.inside("optimizer_state_dict").inside("state").values
        steps = ({"step": one["step"]} for one in state.values() if isinstance(one, Mapping) and "step" in one)
        zero3 = "fp32_flat_groups" in header.values or "optimizer_state_dict" in header.values
        return cls(
            header.values,
            Wrapper.ZERO3 if zero3 else Wrapper.ZERO12 if "zero_stage" in header.values else Wrapper.BF16,
            tuple(options for options, _ in groups),
            tuple(tuple(members) for _, members in groups),
            next(steps, {}),
        )

    @property
    def tied_layers(self) -> Mapping[str, int]:
        """The layers that tied modules are, where ckptlab said it."""
        said = self.content.get(TIED)
        return {k: v for k, v in said.items() if type(v) is int and v >= 0} if isinstance(said, Mapping) else {}

    @property
    def of_stages(self) -> list[list[int]] | None:
        """Which of the groups each pp stage has, where ckptlab said it: DeepSpeed has no word for that."""
        said = self.content.get(GROUPS)
        whole = isinstance(said, list) and all(isinstance(held, list) for held in said)
        numbers = [i for held in said for i in held] if whole and said else [None]
        known = range(len(self.options))
        return said if all(isinstance(i, int) and i in known for i in numbers) else None


def _common(path: str, faults: Faults) -> _Common | None:
    """What `optimizer_state.pt` says; None where it is damaged."""
    name = os.path.join(FOLDER, OPTIMIZER)
    if not paths.is_file(os.path.join(path, name)):
        return _Common()
    contents = faults.read(path, name, torchfile.read_contents)
    if contents is not None:
        with faults.caught("odd-header", name):
            return _Common.of(os.path.join(path, name), contents.value)
    return None


@dataclass
class _Stored:
    """What the folder of a tensor holds: states, scalars, and the files that they are in (names in the checkpoint)."""

    states: dict[str, Stored] = field(default_factory=dict)
    scalars: dict[str, Any] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)


def _stored(path: str, faults: Faults) -> Iterator[tuple[str, _Stored]]:
    """(tensor name, what is stored of it) of every folder under zero/ that holds states."""
    root = os.path.join(path, FOLDER)
    for at, states in groupby(torchfile.ready(_states(root), lambda one: os.path.join(*one)), lambda one: one[0]):
        one = _Stored()
        for _, file in states:
            name = os.path.relpath(os.path.join(at, file), path)
            contents = faults.read(path, name, torchfile.read_contents)
            if contents is None:
                continue
            content, state = contents.value, state_of(file.removesuffix(".pt"))
            value = content.get("param") if isinstance(content, Mapping) else content
            if isinstance(value, Stored) and state != "step":
                one.states[state] = value
            else:
                one.scalars[state] = value
            one.files.append(name)
        yield os.path.relpath(at, root).replace(os.sep, "/"), one


def _states(root: str) -> Iterator[tuple[str, str]]:
    """(folder, file) of every state below `root`."""
    for at, folders, files in paths.walk(root):
        folders.sort()
        yield from ((at, file) for file in sorted(files) if file.endswith(".pt") and at != root)


@dataclass
class _Tensors:
    """The tensors of a universal folder, as they are found."""

    folder: StepFolder
    info: UniversalInfo | None
    strategy: Strategy | None
    module: ModuleWeights
    faults: Faults
    tensors: dict[str, Tensor] = field(default_factory=dict)
    pieces: dict[tuple[str, str], dict[Holder, tuple[Fragment, ...]]] = field(default_factory=dict)

    def add_trained(self, stored: Mapping[str, _Stored]) -> None:
        """Every tensor that the model files list, or that has a folder.

        What is not trained is read from the model files, where it has its own dtype.
        """
        shapes, stages = self.folder.shards, self.folder.stages
        for name in dict.fromkeys([*shapes, *stored]):
            if name in self.module.aliases or (name not in shapes and name in self.module.kinds):
                continue
            one = stored.get(name)
            if one is None or not one.states:
                self.faults.report(_missing(self.folder.path, name))
                continue
            with self.faults.caught():
                shards = shards_of(self.folder, name, shapes[name]) if name in shapes else None
                tensor = self._trained(name, one.states, shards, stages.get(name, (0,)))
                self.tensors[name] = tensor
                for state, data in one.states.items():
                    self.pieces[name, state] = {ALONE: (Fragment(0, data),)}

    def _trained(
        self, name: str, states: Mapping[str, Stored], shards: list[tuple[int, ...]] | None, stages: tuple[int, ...]
    ) -> Tensor:
        info = self.info
        if shards is None:  # not in the model files: what is stored is all there is to know
            shards, info = [next(iter(states.values())).shape], None
        if (fused := self.folder.experts.fused_of(name)) is not None:
            on = self.folder.experts.mesh_of(name, self.folder.mesh)
            (layout, shape, _), known = all_experts(name, fused, shards[0], on), True
        else:
            layout, known = choose_layout(name, "parameter", shards, info, self.strategy, self.folder.path)
            layout, shape, _ = whole(name, layout, shards, info, self.folder.mesh if len(shards) > 1 else Mesh())
        for state, one in states.items():
            if one.numel != math.prod(shape):
                message = (
                    f"{one.path}: {name}: {state} has shape {one.shape}, the model files say {shape}: it comes from "
                    "another run"
                )
                self.faults.report(contradiction(one.path, message, name))
        ordered = {s: states[s].dtype for s in sorted(states, key=lambda s: s != MASTER)}
        return Tensor(
            name, shape, layout.on_stages(stages), Cut.whole(shape), "parameter", ordered, None, stages, (), known
        )

    def add_module(self) -> None:
        """Frozen tensors, buffers and (at tp 1) module weights, from the model files."""
        for name, by_rank in self.module.pieces.items():
            holder, fragments = next(iter(by_rank.items()))
            dtype = fragments[0].stored.dtype
            if name in self.tensors:
                if self.folder.mesh.tp > 1:
                    continue
                self.tensors[name] = replace(self.tensors[name], states={**self.tensors[name].states, PARAM: dtype})
            else:
                shape, kind = self.module.shapes[name][holder["tp"]], self.module.kinds[name]
                layout, known = choose_layout(name, kind, [shape], None, None, self.folder.path)
                stages = tuple(sorted({one["pp"] for one in by_rank}))
                layout = layout.on_stages(stages)
                self.tensors[name] = Tensor(
                    name, shape, layout, Cut.whole(shape), kind, {PARAM: dtype}, None, stages, (), known
                )
            self.pieces[name, PARAM] = {ALONE: tuple(replace(f, dp=0) for f in fragments)}
        for name, aliases in self.module.called.items():
            if name in self.tensors:
                self.tensors[name] = replace(self.tensors[name], aliases=aliases)


def _missing(path: str, name: str) -> Finding:
    file = f"{FOLDER}/{name}"
    return Finding(
        "missing-file",
        "error",
        Where((file,), (name,)),
        "a folder of states for each tensor that the model files list",
        f"{file} holds no state",
        "convert again",
        "files",
        f"{os.path.join(path, FOLDER, name)}: missing: the model files list this tensor; convert again",
    )


def _lacking(found: _Tensors, groups: tuple[ParameterGroup, ...]) -> Iterator[Finding]:
    """States that a tensor does not have and others of its parameter group do: a copy that was cut short."""
    for group in groups:
        trained = {n: found.tensors[n] for n in group.tensors if n in found.tensors}
        kept = dict.fromkeys(s for t in trained.values() for s in t.states if s != PARAM)
        for name, tensor in trained.items():
            for state in kept:
                if state not in tensor.states:
                    file = f"{FOLDER}/{name}/{file_of(state)}.pt"
                    others = next(n for n, t in trained.items() if state in t.states)
                    yield Finding(
                        "missing-state",
                        "error",
                        Where((file,), (name,), (state,)),
                        f"{state} of every tensor of a parameter group",
                        f"{file} is not there, which {others} has",
                        "copy the missing files from where the folder was written, or convert again",
                        "files",
                        f"{os.path.join(found.folder.path, file)}: missing: {name} has no {state}, which {others} has: "
                        "copy it from where the folder was written, or convert again",
                    )


def _groups(
    folder: StepFolder, common: _Common, scalars: Mapping[str, Mapping[str, Any]], faults: Faults
) -> tuple[ParameterGroup, ...]:
    """Parameter groups: tensors from the model files, hyperparameters from what the universal folder has of them."""
    stages: list[Groups] = []
    told = common.of_stages
    dealt = common.wrapper is Wrapper.ZERO12 and folder.config.round_robin
    for p in range(folder.mesh.pp):
        shapes = folder.heads[p, 0][0].shapes or ()
        joined = [tuple(program_order(folder, list(names), dealt)) for names in shapes]
        if (
            common.wrapper is Wrapper.ZERO3
            and common.members
            and all(i < len(joined) for m in common.members for i in m)
        ):
            joined = [tuple(n for i in members for n in joined[i]) for members in common.members]
        if told is not None and p < len(told) and len(told[p]) == len(joined):
            stages.append([(common.options[i], names) for i, names in zip(told[p], joined, strict=True)])
            continue
        if common.options and len(joined) != len(common.options):
            message = (
                f"{folder.path}: pp stage {p} has {len(joined)} parameter groups, {OPTIMIZER} has "
                f"{len(common.options)}: ckptlab cannot tell which are missing there"
            )
            faults.report(contradiction(os.path.join(folder.path, FOLDER, OPTIMIZER), message))
        options = common.options or (None,) * len(joined)
        stages.append(list(zip(options, joined, strict=False)))
        if told is None and (wrong := _of_another(stages[0], stages[p])) is not None:
            message = (
                f"{folder.path}: parameter group {wrong} of pp stage {p} is another than that of stage 0, whose "
                f"hyperparameters alone are in {OPTIMIZER}: convert from the step folder with ckptlab"
            )
            faults.report(contradiction(os.path.join(folder.path, FOLDER, OPTIMIZER), message))
    with faults.caught():
        groups, _ = match_groups(folder.path, stages) if told is None else (_joined(common, stages, told), [])
        return tuple(
            replace(g, scalars=next((scalars[n] for n in g.tensors if scalars.get(n)), common.step)) for g in groups
        )
    return ()


def _of_another(first: Groups, here: Groups) -> int | None:
    """Which of a stage's groups has tensors that are called as those of another of the first stage's groups, and none
    as those of its own place's."""
    there = [kinds(names) for _, names in first]
    for i, (_, names) in enumerate(here):
        mine = kinds(names)
        if i < len(there) and not mine & there[i] and any(mine & others for others in there):
            return i
    return None


def _joined(common: _Common, stages: Sequence[Groups], told: Sequence[Sequence[int]]) -> tuple[ParameterGroup, ...]:
    """The groups of a run whose stages have these of them."""
    members: list[dict[str, None]] = [{} for _ in common.options]
    for held, indices in zip(stages, told, strict=False):
        for (_, names), i in zip(held, indices, strict=False):
            members[i] |= dict.fromkeys(names)
    return tuple(ParameterGroup(o, tuple(names)) for o, names in zip(common.options, members, strict=True))
