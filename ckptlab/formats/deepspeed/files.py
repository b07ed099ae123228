"""A step folder's files, parsed and put in their places on the mesh. Headers only."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ckptlab.catalog import Notice
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats import torchfile
from ckptlab.formats.deepspeed import names
from ckptlab.mesh import Mesh

Rank = tuple[int, int]  # (pp stage, tp rank)

_NEEDED = ("dp_world_size", "mp_world_size", "global_steps", "ds_config")
_SAME = ("dp_world_size", "mp_world_size", "global_steps", "skipped_steps", "ds_version", "ds_config")


@dataclass(frozen=True)
class StepFolder:
    """What `engine.save_checkpoint` wrote for one step.

    `models[pp, tp]` is the content of that rank's model file (at ZeRO-3 that of dp rank 0), `zero3_models[pp, tp][dp]` and
    `optims[pp, tp][dp]` those of the partitioned files, `layers[layer][tp]` those of the pipeline engine's layer files.
    """

    path: str
    mesh: Mesh
    models: Mapping[Rank, Mapping[str, Any]]
    zero3_models: Mapping[Rank, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    optims: Mapping[Rank, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    layers: Mapping[int, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    layer_axis: bool = True  # the layer files' names carry `-model_TT`
    prefix: str = ""
    notices: tuple[Notice, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def is_pipeline(self) -> bool:
        """Written by the pipeline engine: the weights stand in layer files."""
        return bool(self.layers)

    @property
    def is_zero3(self) -> bool:
        return bool(self.zero3_models)

    def name_of(self, kind: str, rank: Rank, dp: int = 0) -> str:
        """The path of a rank's "model" or "optim" file, for messages."""
        mp = rank[0] * self.mesh.tp + rank[1]
        name = names.optim(dp, mp, self.prefix) if kind == "optim" else names.model(mp)
        if kind == "model" and self.is_zero3:
            name = names.zero3_model(dp, mp)
        return os.path.join(self.path, name)


def read_step_folder(path: str, *, optimizer: bool = True) -> StepFolder:
    """Parse every file of the step folder.

    With `optimizer=False` optimizer files are not expected (a universal folder keeps the model files alone). CheckpointError
    if a rank's file is missing or belongs to another run; UnsupportedError for experts.
    """
    found = {e.name: n for e in os.scandir(path) if e.is_file() and (n := names.parse(e.name))}
    if any(n.kind == "expert" for n in found.values()):
        raise UnsupportedError(f"{path}: has expert files (DeepSpeed-MoE), which ckptlab cannot open yet")
    by_kind: dict[str, dict[str, names.FileName]] = {}
    for name, parsed in sorted(found.items()):
        by_kind.setdefault(parsed.kind, {})[name] = parsed
    heads = by_kind.get("zero3_model") or by_kind.get("model")
    if not heads:
        raise CheckpointError(
            f"{path}: no mp_rank_*_model_states.pt or zero_pp_rank_*_model_states.pt: not a DeepSpeed step folder"
        )
    contents = {name: _read_dict(os.path.join(path, name)) for name in found}
    mesh = _mesh(path, heads, contents, by_kind.get("layer", {}))
    zero3 = "zero3_model" in by_kind
    _same_run(path, {name: contents[name] for name in heads})

    stages = {
        (kind, n.dp, n.mp, n.layer): name for kind, files in by_kind.items() for name, n in files.items()
    }
    ranks = [(p, t) for p in range(mesh.pp) for t in range(mesh.tp)]
    wanted: list[tuple[str, str]] = []

    def take(kind: str, file_name: str, dp: int, mp: int, layer: int = 0) -> Mapping[str, Any]:
        name = stages.pop((kind, dp, mp, layer), None)
        if name is None:
            wanted.append((kind, file_name))
            return {}
        return contents[name]

    prefix = next((n.prefix for n in by_kind.get("optim", {}).values()), "")
    models: dict[Rank, Mapping[str, Any]] = {}
    zero3_models: dict[Rank, tuple[Mapping[str, Any], ...]] = {}
    optims: dict[Rank, tuple[Mapping[str, Any], ...]] = {}
    for p, t in ranks:
        mp = p * mesh.tp + t
        if zero3:
            zero3_models[p, t] = tuple(take("zero3_model", names.zero3_model(d, mp), d, mp) for d in range(mesh.dp))
            models[p, t] = zero3_models[p, t][0]
        else:
            models[p, t] = take("model", names.model(mp), 0, mp)
    if optimizer:
        _refuse_zero0(path, models, by_kind)
        for p, t in ranks:
            mp = p * mesh.tp + t
            optims[p, t] = tuple(take("optim", names.optim(d, mp, prefix), d, mp) for d in range(mesh.dp))
    layer_axis = any(n.prefix for n in by_kind.get("layer", {}).values())
    layers = {
        number: tuple(
            take("layer", names.layer(number, t if layer_axis else None), 0, t, number) for t in range(mesh.tp)
        )
        for number in sorted({n.layer for n in by_kind.get("layer", {}).values()})
    }
    if wanted:
        listed = ", ".join(name for _, name in wanted[:4]) + (f" and {len(wanted) - 4} more" if len(wanted) > 4 else "")
        raise CheckpointError(
            f"{path}: incomplete: {listed} missing; the other files say {mesh}, which needs {_count(mesh, zero3, optimizer)}. "
            "Copy the missing files from the run's storage"
        )
    if optimizer:
        _same_run(path, {os.path.join(names.optim(d, 0, prefix)): c for d, c in enumerate(optims[0, 0])}, keys=("ds_version",))
    notices = tuple(
        Notice("extra-file", f"{os.path.join(path, name)}: not part of this checkpoint's mesh ({mesh}); left alone")
        for name in stages.values()
        if optimizer or not name.endswith("_optim_states.pt")
    )
    used = tuple(sorted(set(found) - set(stages.values())))
    return StepFolder(path, mesh, models, zero3_models, optims, layers, layer_axis, prefix, notices, used)


def _read_dict(path: str) -> Mapping[str, Any]:
    content = torchfile.read(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: expected a dictionary, found {type(content).__name__}: not written by DeepSpeed")
    return content


def _mesh(
    path: str,
    heads: Mapping[str, names.FileName],
    contents: Mapping[str, Mapping[str, Any]],
    layers: Mapping[str, names.FileName],
) -> Mesh:
    """Degrees from the files themselves; DeepSpeed before 0.16 did not record pp and tp, its layer files tell."""
    first = contents[next(iter(heads))]
    for key in _NEEDED:
        if key not in first:
            raise CheckpointError(
                f"{os.path.join(path, next(iter(heads)))}: no {key!r}: not a model file that DeepSpeed wrote"
            )
    degrees = first.get("checkpoint_parallel_dimensions")
    world = int(first["mp_world_size"])
    if degrees:
        pp, tp = int(degrees["pp_degree"]), int(degrees["tp_degree"])
    else:
        tp = max((n.mp for n in layers.values()), default=0) + 1 if layers else world
        pp = max(world // tp, 1)
    return Mesh(pp=pp, dp=int(first["dp_world_size"]), tp=tp)


def _same_run(path: str, files: Mapping[str, Mapping[str, Any]], keys: Iterable[str] = _SAME) -> None:
    """Refuse a file that disagrees with the majority in what every rank of a run must say alike."""
    for key in keys:
        said = Counter(repr(_plain(content.get(key))) for content in files.values())
        if len(said) < 2:
            continue
        usual = said.most_common(1)[0][0]
        name, odd = next((n, c.get(key)) for n, c in files.items() if repr(_plain(c.get(key))) != usual)
        shown = f"{key} {odd!r} where the other files say {usual}" if len(usual) < 80 else f"another {key}"
        raise CheckpointError(
            f"{os.path.join(path, name)}: {shown}: it comes from another run or step. Put back this run's own file"
        )


def _plain(value: Any) -> Any:
    return sorted(value.items(), key=repr) if isinstance(value, Mapping) else value


def _count(mesh: Mesh, zero3: bool, optimizer: bool) -> str:
    mp = mesh.pp * mesh.tp
    model = mp * mesh.dp if zero3 else mp
    return f"{model} model files" + (f" and {mp * mesh.dp} optimizer files" if optimizer else "")


def _refuse_zero0(path: str, models: Mapping[Rank, Mapping[str, Any]], by_kind: Mapping[str, Any]) -> None:
    if "optim" not in by_kind and any(m.get("optimizer") is not None for m in models.values()):
        raise UnsupportedError(
            f"{path}: trained without ZeRO (stage 0): the optimizer stands in the model files, which ckptlab cannot read yet"
        )


ReadDict = Callable[[str], Mapping[str, Any]]
