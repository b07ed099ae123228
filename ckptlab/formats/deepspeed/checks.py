"""What the files of one step must say alike: those of another run or step, shapes and settings that disagree."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ckptlab.findings import PUT_BACK, Finding, Where
from ckptlab.formats.deepspeed.modelfile import ModelFile
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.deepspeed.optimfile import OptimizerFile
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored
from ckptlab.words import number_of, some

Heads = Mapping[FileName, ModelFile]
Optims = Mapping[FileName, OptimizerFile]

# what every model file says alike, and every optimizer file beside its parameter groups
_OF_THE_RUN = ("dp_world_size", "mp_world_size", "global_steps", "global_samples", "skipped_steps", "iteration")
_OF_ALL = ("ds_version", "ds_config")
_OF_THE_OPTIMIZER = ("loss_scaler", "dynamic_loss_scale", "clip_grad", "zero_stage")
_READ = 64  # elements of a tensor that is compared by its values
_SHORT = 100  # characters of a value that is shown


def noted(path: str, code: str, severity: str, where: Where, expected: str, found: str, todo: str) -> Finding:
    """A finding on the headers of a step folder, which the whole sentence names."""
    return Finding(code, severity, where, expected, found, todo, "headers", f"{path}: {found}")


def _wrong(code: str, where: Where, expected: str, found: str, message: str) -> Finding:
    """An error: files that do not go together."""
    return Finding(code, "error", where, expected, found, PUT_BACK, "headers", message)


def agreement(path: str, heads: Heads, optims: Optims, mesh: Mesh) -> Iterator[Finding]:
    """Findings on what the ranks' headers should say alike: one for each file (or files that say the same)."""
    both: dict[FileName, ModelFile | OptimizerFile] = {**heads, **optims}
    odd: list[_Odd] = []
    for key in _OF_THE_RUN:
        odd += minority(key, {f.name: f.content[key] for f in heads.values() if key in f.content})
    for key in _OF_ALL:
        odd += minority(key, {f.name: f.content[key] for f in both.values() if key in f.content})
    odd += minority("optimizer", {f.name: f.wrapper.value for f in optims.values()})
    yield from _put_together(path, odd)
    steps = {f.name: f.steps for f in optims.values() if f.steps}
    made = {name: max(each) for name, each in steps.items()}  # some group of every rank makes every step
    late = list(minority("optimizer step", made, _step_of(heads)))
    told_late = {file for one in late for file in one.files}
    by_mp: dict[int, dict[str, list[float]]] = {}
    for n, f in optims.items():
        if f.name not in told_late:
            by_mp.setdefault(n.mp, {})[f.name] = list(f.steps)
    for _, said in sorted(by_mp.items()):
        late += minority("optimizer step", said)
    yield from _steps(path, late)
    yield from _groups_apart(path, steps)
    told = {f for one in (*odd, *late) for f in one.files}
    yield from _settings(
        {n: f for n, f in optims.items() if f.name not in told},
        {n: f for n, f in heads.items() if f.name not in told},
        mesh,
    )
    yield from _shapes(path, heads, mesh)


@dataclass(frozen=True)
class _Odd:
    """Files that say something else than most: `said` and `usual` are in words, `others` are those that say so."""

    files: tuple[str, ...]
    key: str
    said: str
    usual: str
    others: tuple[str, ...]


def minority(key: str, said: Mapping[str, Any], expected: str | None = None) -> Iterator[_Odd]:
    """The files that say something else than most; where there is no majority, than is expected, or all of them."""
    texts = _texts(said)
    counts = Counter(texts.values()).most_common()
    if len(counts) < 2:
        return
    drawn = [text for text, count in counts if count == counts[0][1]]
    usual = counts[0][0] if len(drawn) == 1 else expected if expected in drawn else None
    for text, _ in counts:
        if text != usual:
            files = tuple(n for n, t in texts.items() if t == text)
            other = usual or next(t for t, _ in counts if t != text)
            others = tuple(n for n, t in texts.items() if t == other)
            yield _Odd(files, key, *_told(said[files[0]], said[others[0]], text, other), others)


def _texts(said: Mapping[str, Any]) -> dict[str, str]:
    """What each file says, as a text. Plain values that are equal to the first are not put into words again."""
    found: dict[str, str] = {}
    first, text = None, ""
    for name, value in said.items():
        if not found:
            first, text = value, text_of(value)
        found[name] = text if _plainly_equal(value, first) else text_of(value)
    return found


def _plainly_equal(a: Any, b: Any) -> bool:
    try:
        return type(a) is type(b) and bool(a == b)
    except (ValueError, RecursionError):  # arrays inside, or nested too deep
        return False


def _put_together(path: str, odd: Iterable[_Odd]) -> Iterator[Finding]:
    """What is odd about the same files, as one finding."""
    by_files: dict[tuple[str, ...], list[_Odd]] = {}
    for one in odd:
        by_files.setdefault(one.files, []).append(one)
    for files, ones in by_files.items():
        one = ones[0]
        short = one.key != "ds_config" and len(one.usual) < 80
        shown = f"{one.key} is {one.said}, the other files say {one.usual}" if short else f"its {one.key} is another"
        yield _wrong(
            "foreign-file",
            Where(files=files),
            ", ".join(f"{o.key} {o.usual}" for o in ones) + f", as in {number_of(len(one.others), 'other file')}",
            f"{some(files, 3)}: from another run or step: " + ", ".join(f"{o.key} {o.said}" for o in ones),
            f"{os.path.join(path, files[0])}: {shown}: it comes from another run or step. Put back this run's own file",
        )


def _steps(path: str, late: Iterable[_Odd]) -> Iterator[Finding]:
    for one in late:
        yield _wrong(
            "steps-disagree",
            Where(files=one.files),
            f"optimizer step {one.usual}, as in {number_of(len(one.others), 'other file')}",
            f"{some(one.files, 3)}: from another run or step: optimizer step {one.said}",
            f"{os.path.join(path, one.files[0])}: optimizer step {one.said} where {one.others[0]} has step "
            f"{one.usual}: one of them comes from another step. Put back the file of this step",
        )


def _groups_apart(path: str, steps: Mapping[str, tuple[float, ...]]) -> Iterator[Finding]:
    """Parameter groups that made other numbers of steps than the rest, which need not be a fault."""
    if apart := {name: each for name, each in steps.items() if len(each) > 1}:
        made = ", ".join(map(str, next(iter(apart.values()))))
        found = f"parameter groups made different numbers of steps: {made}"
        todo = "nothing, if some were frozen for a time or added later; each group goes on from its own"
        yield noted(path, "groups-apart", "info", Where(tuple(apart)), "one step of all groups", found, todo)


def _told(mine: Any, theirs: Any, text: str, other: str) -> tuple[str, str]:
    """Two values that differ, in words: those that are long by what differs first in them."""
    if max(len(text), len(other)) <= _SHORT:
        return text, other
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        key = next((k for k in {**mine, **theirs} if text_of(mine.get(k)) != text_of(theirs.get(k))), None)
        return f"with {key} {_shown(text_of(mine.get(key)))}", f"with {key} {_shown(text_of(theirs.get(key)))}"
    return _shown(text), _shown(other)


def text_of(value: Any) -> str:
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


def _step_of(heads: Heads) -> str | None:
    """The optimizer's step by what most model files say."""
    made = Counter(
        f.content["global_steps"] - skipped
        for f in heads.values()
        if isinstance(f.content["global_steps"], int)
        and isinstance(skipped := f.content.get("skipped_steps") or 0, int)
    )
    return text_of(made.most_common(1)[0][0]) if made else None


def _settings(optims: Optims, heads: Heads, mesh: Mesh) -> Iterator[Finding]:
    """Hyperparameters, and how many ranks share a buffer, are alike on the ranks of a stage, loss scalers and schedules
    on all."""
    for stage in range(mesh.pp):
        there = [f for n, f in optims.items() if n.mp // mesh.tp == stage]
        said = {f.name: f.options for f in there if not f.elastic}
        yield from _warned("the same hyperparameters on every rank of a pp stage", "hyperparameters", said)
        key = "partition_count"
        said = {f.name: f.state_dict[key] for f in there if key in f.state_dict}
        yield from _warned(f"the same {key} on every rank of a pp stage", key, said)
    for key in _OF_THE_OPTIMIZER:
        values = {f.name: f.state_dict[key] for f in optims.values() if key in f.state_dict}
        yield from _warned(f"the same {key} on every rank", key, values)
    schedules = {f.name: f.content["lr_scheduler"] for f in heads.values() if "lr_scheduler" in f.content}
    yield from _warned("the same learning rate schedule on every rank", "lr_scheduler", schedules)


def _warned(expected: str, key: str, said: Mapping[str, Any]) -> Iterator[Finding]:
    todo = "resume only after you know which is right: each rank goes on with its own"
    for odd in minority(key, said):
        told = f"{some(odd.files, 3)}: {key} {odd.said}; {number_of(len(odd.others), 'other file')}: {odd.usual}"
        yield Finding("settings-disagree", "warning", Where(files=odd.files), expected, told, todo, "headers")


def _shapes(path: str, heads: Heads, mesh: Mesh) -> Iterator[Finding]:
    """The ranks of one stage list the same tensors; copies of a tensor on one tp rank have one shape."""
    lists: dict[int, dict[str, Any]] = {}
    shapes: dict[tuple[str, int], dict[tuple[int, ...], list[str]]] = {}
    for name, head in heads.items():
        if head.shapes is None:
            continue
        stage, tp = divmod(name.mp, mesh.tp)
        lists.setdefault(stage, {})[head.name] = [tuple(g) for g in head.shapes]
        for tensor, shape in head.trained.items():
            shapes.setdefault((tensor, tp), {}).setdefault(shape, []).append(head.name)
    for by_file in lists.values():
        for odd in minority("param_shapes", by_file):
            expected = "the same tensors, in the same order, on every rank of a pp stage"
            told = f"{some(odd.files, 3)}: lists other tensors than the ranks beside it"
            yield _wrong(
                "shapes-disagree",
                Where(files=odd.files),
                expected,
                told,
                f"{os.path.join(path, odd.files[0])}: its param_shapes list other tensors than those of "
                f"{odd.others[0]}: the files do not belong together",
            )
    for (tensor, tp), by_shape in shapes.items():
        if len(by_shape) > 1:
            (first, _), (other, files), *_ = by_shape.items()
            yield _wrong(
                "shapes-disagree",
                Where(tuple(f for files in by_shape.values() for f in files), (tensor,), (), ({"tp": tp},)),
                "one shape of a tensor on every rank",
                "; ".join(f"{shape} in {some(files, 2)}" for shape, files in by_shape.items()),
                f"{os.path.join(path, files[0])}: {tensor} has shape {other}, on an earlier pp stage {first}: a tied "
                "tensor must have one shape; the files do not belong together",
            )
