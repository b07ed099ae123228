"""A step folder's files, parsed and put in their places on the mesh. Headers only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptlab.catalog import Notice
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats import torchfile
from ckptlab.formats.deepspeed import names
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.mesh import Mesh

Rank = tuple[int, int]  # (pp stage, tp rank)
Content = Mapping[str, Any]

_NEEDED = ("dp_world_size", "mp_world_size", "global_steps", "ds_config")
_SAME_IN_MODELS = ("dp_world_size", "mp_world_size", "global_steps", "skipped_steps", "ds_version", "ds_config")
_SAME_IN_ALL = ("ds_version", "ds_config")


@dataclass(frozen=True)
class StepFolder:
    """What `engine.save_checkpoint` wrote for one step.

    `models[pp, tp]` is the content of that rank's model file (at ZeRO-3 that of dp rank 0), `zero3_models[pp, tp][dp]`
    and `optims[pp, tp][dp]` those of the partitioned files, `layers[layer][tp]` those of the pipeline engine's layer
    files, whose names carry `-model_TT` if `layer_axis`. `prefix` is that of the optimizer files ("bf16" or "").
    """

    path: str
    mesh: Mesh
    models: Mapping[Rank, Content]
    zero3_models: Mapping[Rank, tuple[Content, ...]] = field(default_factory=dict)
    optims: Mapping[Rank, tuple[Content, ...]] = field(default_factory=dict)
    layers: Mapping[int, tuple[Content, ...]] = field(default_factory=dict)
    layer_axis: bool = True
    prefix: str = ""
    notices: tuple[Notice, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def is_pipeline(self) -> bool:
        """Written by the pipeline engine: no rank's model file holds the module, layer files do."""
        return self.models[0, 0].get("module") is None

    @property
    def is_zero3(self) -> bool:
        """Every dp rank wrote a model file of its own."""
        return bool(self.zero3_models)

    def name_of(self, kind: str, rank: Rank, dp: int = 0) -> str:
        """The path of a rank's "model" or "optim" file, for messages."""
        mp = rank[0] * self.mesh.tp + rank[1]
        if kind == "optim":
            return os.path.join(self.path, names.optim(dp, mp, self.prefix))
        return os.path.join(self.path, names.zero3_model(dp, mp) if self.is_zero3 else names.model(mp))


def read_step_folder(path: str, *, optimizer: bool = True) -> StepFolder:
    """Parse every file of the step folder.

    With `optimizer=False` no optimizer files are expected (a universal folder keeps the model files alone).
    CheckpointError if a rank's file is missing or belongs to another run; UnsupportedError for experts and for training
    without ZeRO.
    """
    found = {e.name: n for e in os.scandir(path) if e.is_file() and (n := names.parse(e.name))}
    kinds = {n.kind for n in found.values()}
    if "expert" in kinds:
        raise UnsupportedError(f"{path}: has expert files (DeepSpeed-MoE), which ckptlab cannot open yet")
    head = "zero3_model" if "zero3_model" in kinds else "model"
    if head not in kinds:
        raise CheckpointError(
            f"{path}: no mp_rank_*_model_states.pt and no zero_pp_rank_*_model_states.pt: not a DeepSpeed step folder, "
            "or its model files are missing"
        )
    contents = {name: _read_dict(os.path.join(path, name)) for name in sorted(found)}
    heads = {name: contents[name] for name in contents if found[name].kind == head}
    mesh = _mesh(path, heads, [n for n in found.values() if n.kind == "layer"])
    _same_run(path, heads, _SAME_IN_MODELS)
    if optimizer and "optim" not in kinds and any(m.get("optimizer") is not None for m in heads.values()):
        raise UnsupportedError(
            f"{path}: trained without ZeRO (stage 0): the optimizer stands in the model files, which ckptlab cannot "
            "read yet"
        )
    places = _Places(contents, {n: name for name, n in found.items()}, mesh, optimizer)
    folder = places.folder(path)
    _same_run(path, {n: c for n, c in contents.items() if found[n].kind in (head, "optim")}, _SAME_IN_ALL)
    return folder


class _Places:
    """Takes each rank's file out of those that were found, and remembers which were missing."""

    def __init__(
        self, contents: Mapping[str, Content], found: Mapping[FileName, str], mesh: Mesh, optimizer: bool
    ) -> None:
        self.contents, self.left, self.mesh, self.optimizer = contents, dict(found), mesh, optimizer
        self.missing: list[str] = []
        self.prefix = next((n.prefix for n in found if n.kind == "optim"), "")
        self.layer_axis = any(n.prefix for n in found if n.kind == "layer")
        self.zero3 = any(n.kind == "zero3_model" for n in found)

    def take(self, wanted: str) -> Content:
        parsed = names.parse(wanted)
        name = self.left.pop(parsed, None) if parsed else None
        if name is None:
            self.missing.append(wanted)
            return {}
        return self.contents[name]

    def folder(self, path: str) -> StepFolder:
        mesh = self.mesh
        ranks = {(p, t): p * mesh.tp + t for p in range(mesh.pp) for t in range(mesh.tp)}
        zero3_models: dict[Rank, tuple[Content, ...]] = {}
        if self.zero3:
            zero3_models = {
                r: tuple(self.take(names.zero3_model(d, mp)) for d in range(mesh.dp)) for r, mp in ranks.items()
            }
            models = {r: by_dp[0] for r, by_dp in zero3_models.items()}
        else:
            models = {r: self.take(names.model(mp)) for r, mp in ranks.items()}
        optims: dict[Rank, tuple[Content, ...]] = {}
        if self.optimizer:
            optims = {
                r: tuple(self.take(names.optim(d, mp, self.prefix)) for d in range(mesh.dp)) for r, mp in ranks.items()
            }
        numbers = sorted({n.layer for n in self.left if n.kind == "layer"})
        layers = {i: tuple(self.take(self.layer(i, t)) for t in range(mesh.tp)) for i in numbers}
        if self.missing:
            raise CheckpointError(self.complaint(path))
        extra = sorted(name for n, name in self.left.items() if self.optimizer or n.kind != "optim")
        notices = tuple(
            Notice("extra-file", f"{os.path.join(path, name)}: not part of this checkpoint's mesh ({mesh}); left alone")
            for name in extra
        )
        used = tuple(sorted(set(self.contents) - set(self.left.values())))
        return StepFolder(path, mesh, models, zero3_models, optims, layers, self.layer_axis, self.prefix, notices, used)

    def layer(self, number: int, tp: int) -> str:
        return names.layer(number, tp if self.layer_axis else None)

    def complaint(self, path: str) -> str:
        mesh = self.mesh
        model = mesh.pp * mesh.tp * (mesh.dp if self.zero3 else 1)
        needs = f"{model} model files" + (f" and {mesh.size} optimizer files" if self.optimizer else "")
        more = f" and {len(self.missing) - 4} more" if len(self.missing) > 4 else ""
        return (
            f"{path}: incomplete: {', '.join(self.missing[:4])}{more} missing. The other files say {mesh}, which needs "
            f"{needs}: copy the missing files from the run's storage"
        )


def _read_dict(path: str) -> Content:
    content = torchfile.read(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{path}: expected a dictionary, found {type(content).__name__}: not written by DeepSpeed"
        )
    return content


def _mesh(path: str, heads: Mapping[str, Content], layers: Iterable[FileName]) -> Mesh:
    """Degrees from the files themselves; DeepSpeed before 0.16 did not record pp and tp, its layer files tell."""
    name, first = next(iter(heads.items()))
    for key in _NEEDED:
        if key not in first:
            raise CheckpointError(f"{os.path.join(path, name)}: no {key!r}: not a model file that DeepSpeed wrote")
    world = int(first["mp_world_size"])
    if degrees := first.get("checkpoint_parallel_dimensions"):
        pp, tp = int(degrees["pp_degree"]), int(degrees["tp_degree"])
    else:
        tp = max((n.mp + 1 for n in layers), default=world)
        pp = max(world // tp, 1)
    return Mesh(pp=pp, dp=int(first["dp_world_size"]), tp=tp)


def _same_run(path: str, files: Mapping[str, Content], keys: Iterable[str]) -> None:
    """Refuse a file that disagrees with the majority in what every rank of a run says alike."""
    for key in keys:
        said = {name: repr(content[key]) for name, content in files.items() if key in content}
        counts = Counter(said.values())
        if len(counts) < 2:
            continue
        usual = counts.most_common(1)[0][0]
        name = next(n for n, value in said.items() if value != usual)
        shown = f"{key} is {said[name]}, the other files say {usual}" if len(usual) < 80 else f"its {key} is another"
        raise CheckpointError(
            f"{os.path.join(path, name)}: {shown}: it comes from another run or step. Put back this run's own file"
        )
