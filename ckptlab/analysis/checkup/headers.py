"""What the headers of a step folder say of one another: files of another run or step, shapes and settings that
disagree."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from ckptlab.analysis.checkup.files import Scan, param_shapes
from ckptlab.analysis.checkup.finding import Finding, Rank, Where
from ckptlab.describe.words import number_of, some
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.deepspeed.optimizer import scalar
from ckptlab.mesh import Mesh

_SHORT = 100  # characters of a value that is shown
_PUT_BACK = "put back the file of this run and step; if there is none, go back to an earlier step"


def agreement(found: Scan, mesh: Mesh) -> Iterator[Finding]:
    """Findings on what the ranks' headers should say alike."""
    heads, optims = found.heads, found.of_kind("optim")
    for key in ("dp_world_size", "mp_world_size", "global_steps", "skipped_steps"):
        yield from _minority("foreign-file", key, {n: c.get(key) for n, c in heads.items() if key in c})
    for key in ("ds_version", "ds_config"):
        yield from _minority("foreign-file", key, {n: c[key] for n, c in {**heads, **optims}.items() if key in c})
    yield from _minority(
        "steps-disagree", "optimizer step", {n: s for n, c in optims.items() if (s := _steps(c)) is not None}
    )
    yield from _settings(found, optims, mesh)
    yield from _shapes(found, heads, mesh)


def rank_of(name: FileName, mesh: Mesh) -> Rank:
    """The coordinate that a rank's file name stands for."""
    if name.kind == "layer":
        return {"tp": name.mp}
    place = {"pp": name.mp // mesh.tp, "tp": name.mp % mesh.tp}
    return {**place, "dp": name.dp} if name.kind in ("optim", "zero3_model") else place


def _minority(code: str, key: str, said: Mapping[str, Any]) -> Iterator[Finding]:
    """A finding for the files that say something else than most; where there is no majority, on all of them."""
    texts = {name: repr(value) for name, value in said.items()}
    counts = Counter(texts.values()).most_common()
    if len(counts) < 2:
        return
    usual = counts[0][0]
    drawn = counts[0][1] == counts[1][1]
    for text, _ in counts[0 if drawn else 1 :]:
        files = tuple(n for n, t in texts.items() if t == text)
        other = next(t for t, _ in counts if t != text) if drawn else usual
        told = f"{some(files, 3)}: {key} is {_shown(text)}"
        if len(text) > _SHORT:
            told = f"{some(files, 3)}: {key} is not the same{_first_difference(said[files[0]], said, other, texts)}"
        yield Finding(
            code,
            "error",
            Where(files=files),
            f"{key} {_shown(other)}, as in {number_of(list(texts.values()).count(other), 'other file')}",
            f"{told}: from another run or step",
            _PUT_BACK,
        )


def _first_difference(mine: Any, said: Mapping[str, Any], other: str, texts: Mapping[str, str]) -> str:
    """Which key of two dictionaries differs first."""
    theirs = next(said[n] for n, t in texts.items() if t == other)
    if not (isinstance(mine, Mapping) and isinstance(theirs, Mapping)):
        return ""
    key = next((k for k in {**mine, **theirs} if repr(mine.get(k)) != repr(theirs.get(k))), None)
    return "" if key is None else f" ({key}: {_shown(repr(mine.get(key)))} for {_shown(repr(theirs.get(key)))})"


def _shown(text: str) -> str:
    return text if len(text) <= _SHORT else f"{text[:_SHORT]}…"


def _base(content: Mapping[str, Any]) -> Any:
    state = content.get("optimizer_state_dict")
    if not isinstance(state, Mapping):
        return None
    return state.get("base_optimizer_state", state.get("optimizer_state_dict"))


def _steps(content: Mapping[str, Any]) -> tuple[float, ...] | None:
    """The steps that an optimizer file names; None if it names none."""
    base = _base(content)
    states = base.get("state") if isinstance(base, Mapping) else dict(enumerate(base)) if isinstance(base, list) else {}
    if not isinstance(states, Mapping):
        return None
    found = (scalar(s.get("step")) for s in states.values() if isinstance(s, Mapping))
    return tuple(sorted({s for s in found if s is not None})) or None


def _settings(found: Scan, optims: Mapping[str, Mapping[str, Any]], mesh: Mesh) -> Iterator[Finding]:
    """Hyperparameters are those of the parameter group on every rank of a pp stage."""
    for stage in range(mesh.pp):
        said = {}
        for name, content in optims.items():
            base = _base(content)
            if found.parsed[name].mp // mesh.tp == stage and isinstance(base, Mapping) and "param_groups" in base:
                said[name] = [{k: v for k, v in g.items() if k != "params"} for g in base["param_groups"]]
        for finding in _minority("settings-disagree", "hyperparameters", said):
            yield Finding(
                finding.code,
                "warning",
                finding.where,
                "the same hyperparameters on every rank of a pp stage",
                finding.found,
                "resume only after you know which are right: each rank goes on with its own",
            )


def _shapes(found: Scan, heads: Mapping[str, Mapping[str, Any]], mesh: Mesh) -> Iterator[Finding]:
    """The ranks of one stage list the same tensors; copies of a tensor on one tp rank have one shape."""
    by_stage: dict[int, dict[str, list[tuple[str, ...]]]] = {}
    shapes: dict[tuple[str, int], dict[str, list[str]]] = {}
    for name, head in heads.items():
        groups, rank = param_shapes(head), rank_of(found.parsed[name], mesh)
        if not groups:
            continue
        by_stage.setdefault(rank["pp"], {})[name] = [tuple(g) for g in groups]
        for tensor, shape in (pair for g in groups for pair in g.items()):
            shapes.setdefault((tensor, rank["tp"]), {}).setdefault(
                str(tuple(shape) if isinstance(shape, tuple) else shape), []
            ).append(name)
    for lists in by_stage.values():
        for finding in _minority("shapes-disagree", "param_shapes", {n: str(names) for n, names in lists.items()}):
            expected = "the same tensors, in the same order, on every rank of a pp stage"
            said = f"{some(finding.where.files, 3)}: lists other tensors than the ranks beside it"
            yield Finding("shapes-disagree", "error", finding.where, expected, said, _PUT_BACK)
    for (tensor, tp), by_shape in shapes.items():
        if len(by_shape) > 1:
            told = "; ".join(f"{shape} in {some(files, 2)}" for shape, files in by_shape.items())
            where = Where(tuple(f for files in by_shape.values() for f in files), (tensor,), (), ({"tp": tp},))
            yield Finding("shapes-disagree", "error", where, "one shape of a tensor on every rank", told, _PUT_BACK)
