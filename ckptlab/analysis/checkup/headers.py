"""What the headers of a step folder say of one another: files of another run or step, shapes and settings that
disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptlab.analysis.checkup.files import Scan, param_shapes
from ckptlab.analysis.checkup.finding import Finding, Rank, Where
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.deepspeed.optimizer import scalar
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored
from ckptlab.words import number_of, some

Files = Mapping[str, Mapping[str, Any]]  # name → content

# what every model file says alike, and every optimizer file beside its parameter groups
_OF_THE_RUN = ("dp_world_size", "mp_world_size", "global_steps", "global_samples", "skipped_steps", "iteration")
_OF_THE_OPTIMIZER = ("loss_scaler", "dynamic_loss_scale", "clip_grad", "zero_stage", "partition_count")
_READ = 64  # elements of a tensor that is compared by its values
_SHORT = 100  # characters of a value that is shown
_PUT_BACK = "put back the file of this run and step; if there is none, go back to an earlier step"


def agreement(found: Scan, mesh: Mesh) -> Iterator[Finding]:
    """Findings on what the ranks' headers should say alike: one for each file (or files that say the same)."""
    heads, optims = found.heads, found.of_kind("optim")
    odd: list[_Odd] = []
    for key in _OF_THE_RUN:
        odd += _minority(key, {n: c[key] for n, c in heads.items() if key in c})
    for key in ("ds_version", "ds_config"):
        odd += _minority(key, {n: c[key] for n, c in {**heads, **optims}.items() if key in c})
    yield from _put_together("foreign-file", odd)
    steps = {n: s for n, c in optims.items() if (s := _steps(c)) is not None}
    late = list(_minority("optimizer step", steps, _step_of(heads)))
    yield from _put_together("steps-disagree", late)
    told = {f for one in (*odd, *late) for f in one.files}
    optims, models = ({n: c for n, c in files.items() if n not in told} for files in (optims, heads))
    yield from _settings(found, optims, models, mesh)
    yield from _shapes(found, heads, mesh)


def rank_of(name: FileName, mesh: Mesh) -> Rank:
    """The coordinate that a rank's file name stands for."""
    if name.kind == "layer":
        return {"tp": name.mp}
    place = {"pp": name.mp // mesh.tp, "tp": name.mp % mesh.tp}
    return {**place, "dp": name.dp} if name.kind in ("optim", "zero3_model") else place


@dataclass(frozen=True)
class _Odd:
    """Files that say of something else than most do: `said` and `usual` are in words, `others` how many say so."""

    files: tuple[str, ...]
    key: str
    said: str
    usual: str
    others: int


def _minority(key: str, said: Mapping[str, Any], expected: str | None = None) -> Iterator[_Odd]:
    """The files that say something else than most; where there is no majority, than is expected, or all of them."""
    texts = {name: _text(value) for name, value in said.items()}
    counts = Counter(texts.values()).most_common()
    if len(counts) < 2:
        return
    drawn = [text for text, count in counts if count == counts[0][1]]
    usual = counts[0][0] if len(drawn) == 1 else expected if expected in drawn else None
    for text, _ in counts:
        if text != usual:
            files = tuple(n for n, t in texts.items() if t == text)
            other = usual or next(t for t, _ in counts if t != text)
            theirs = next(said[n] for n, t in texts.items() if t == other)
            yield _Odd(files, key, *_told(said[files[0]], theirs, text, other), list(texts.values()).count(other))


def _put_together(code: str, odd: Iterable[_Odd]) -> Iterator[Finding]:
    """What is odd about the same files, as one finding."""
    by_files: dict[tuple[str, ...], list[_Odd]] = {}
    for one in odd:
        by_files.setdefault(one.files, []).append(one)
    for files, ones in by_files.items():
        yield Finding(
            code,
            "error",
            Where(files=files),
            ", ".join(f"{o.key} {o.usual}" for o in ones) + f", as in {number_of(ones[0].others, 'other file')}",
            f"{some(files, 3)}: from another run or step: " + ", ".join(f"{o.key} {o.said}" for o in ones),
            _PUT_BACK,
        )


def _told(mine: Any, theirs: Any, text: str, other: str) -> tuple[str, str]:
    """Two values that differ, in words: those that are long by what differs first in them."""
    if max(len(text), len(other)) <= _SHORT:
        return text, other
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        key = next((k for k in {**mine, **theirs} if _text(mine.get(k)) != _text(theirs.get(k))), None)
        return f"with {key} {_shown(_text(mine.get(key)))}", f"with {key} {_shown(_text(theirs.get(key)))}"
    return _shown(text), _shown(other)


def _text(value: Any) -> str:
    """What a value says, wherever it is stored: equal texts are equal values."""
    try:
        return repr(_read(value))
    except RecursionError:
        return "(nested too deep)"


def _read(value: Any) -> Any:
    if isinstance(value, Stored):
        return value.map().tolist() if value.numel <= _READ else (value.shape, str(value.dtype))
    if isinstance(value, Mapping):
        return {k: _read(v) for k, v in value.items()}
    return [_read(v) for v in value] if isinstance(value, (list, tuple)) else value


def _shown(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"


def _base(content: Mapping[str, Any]) -> Any:
    state = content.get("optimizer_state_dict")
    if not isinstance(state, Mapping):
        return None
    return state.get("base_optimizer_state", state.get("optimizer_state_dict"))


def _step_of(heads: Files) -> str | None:
    """The optimizer's step by what most model files say."""
    made = Counter(
        c["global_steps"] - (c.get("skipped_steps") or 0)
        for c in heads.values()
        if isinstance(c.get("global_steps"), int)
    )
    return _text(made.most_common(1)[0][0]) if made else None


def _steps(content: Mapping[str, Any]) -> float | list[float] | None:
    """The step that an optimizer file names (or several); None if it names none."""
    base = _base(content)
    states = base.get("state") if isinstance(base, Mapping) else dict(enumerate(base)) if isinstance(base, list) else {}
    if not isinstance(states, Mapping):
        return None
    found = (scalar(s.get("step")) for s in states.values() if isinstance(s, Mapping))
    steps = sorted({int(s) if s.is_integer() else s for s in found if s is not None})  # torch keeps a float
    return steps[0] if len(steps) == 1 else steps or None


def _settings(found: Scan, optims: Files, models: Files, mesh: Mesh) -> Iterator[Finding]:
    """Hyperparameters are alike on the ranks of a pp stage, loss scalers and schedules on all ranks."""
    for stage in range(mesh.pp):
        said = {}
        for name, content in optims.items():
            base = _base(content)
            if found.parsed[name].mp // mesh.tp == stage and isinstance(base, Mapping) and "param_groups" in base:
                said[name] = [{k: v for k, v in g.items() if k != "params"} for g in base["param_groups"]]
        yield from _warned("the same hyperparameters on every rank of a pp stage", "hyperparameters", said)
    for key in _OF_THE_OPTIMIZER:
        states = {n: c["optimizer_state_dict"] for n, c in optims.items() if _base(c) is not None}
        yield from _warned(f"the same {key} on every rank", key, {n: s[key] for n, s in states.items() if key in s})
    schedules = {n: c["lr_scheduler"] for n, c in models.items() if "lr_scheduler" in c}
    yield from _warned("the same learning rate schedule on every rank", "lr_scheduler", schedules)


def _warned(expected: str, key: str, said: Mapping[str, Any]) -> Iterator[Finding]:
    todo = "resume only after you know which is right: each rank goes on with its own"
    for odd in _minority(key, said):
        told = f"{some(odd.files, 3)}: {key} {odd.said}; {number_of(odd.others, 'other file')}: {odd.usual}"
        yield Finding("settings-disagree", "warning", Where(files=odd.files), expected, told, todo)


def _shapes(found: Scan, heads: Files, mesh: Mesh) -> Iterator[Finding]:
    """The ranks of one stage list the same tensors; copies of a tensor on one tp rank have one shape."""
    by_stage: dict[int, dict[str, list[tuple[str, ...]]]] = {}
    shapes: dict[tuple[str, int], dict[str, list[str]]] = {}
    for name, head in heads.items():
        groups, rank = param_shapes(head), rank_of(found.parsed[name], mesh)
        if not groups:
            continue
        by_stage.setdefault(rank["pp"], {})[name] = [tuple(g) for g in groups]
        for tensor, shape in (pair for g in groups for pair in g.items()):
            if isinstance(tensor, str):
                shapes.setdefault((tensor, rank["tp"]), {}).setdefault(_text(shape), []).append(name)
    for lists in by_stage.values():
        for odd in _minority("param_shapes", lists):
            expected = "the same tensors, in the same order, on every rank of a pp stage"
            told = f"{some(odd.files, 3)}: lists other tensors than the ranks beside it"
            yield Finding("shapes-disagree", "error", Where(files=odd.files), expected, told, _PUT_BACK)
    for (tensor, tp), by_shape in shapes.items():
        if len(by_shape) > 1:
            told = "; ".join(f"{shape} in {some(files, 2)}" for shape, files in by_shape.items())
            where = Where(tuple(f for files in by_shape.values() for f in files), (tensor,), (), ({"tp": tp},))
            yield Finding("shapes-disagree", "error", where, "one shape of a tensor on every rank", told, _PUT_BACK)
