"""Findings on which files of a step folder are there: those of ranks that are missing, those of no rank, and what is
not as usual and read all the same."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ckptlab.catalog import PARAM
from ckptlab.findings import Finding, Where
from ckptlab.formats.deepspeed.checks import noted
from ckptlab.formats.deepspeed.experts import layer_of
from ckptlab.formats.deepspeed.found import Found
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.words import number_of, some

_COPY = "copy the missing files from the storage of the nodes that wrote them"
_RANKS_A_FILE = 1000  # a mesh of more ranks for each file that is there is no mesh


def misplaced(files: Found) -> Iterator[Finding]:
    """Files of ranks that are missing, and files of ranks that the mesh does not have."""
    mesh, path = files.mesh, files.path
    if mesh.size > _RANKS_A_FILE * (len(files.names) + 1):
        message = f"{path}: the model files say {mesh}, but there are {number_of(len(files.names), 'file')}"
        yield Finding("odd-header", "error", Where(), "a mesh", message, _COPY, "headers", message)
        return
    missing = {kind: [n for n in needed if n not in files.names] for kind, needed in files.wanted.items()}
    message = _complaint(files, [n.text for of_kind in missing.values() for n in of_kind])
    for kind, absent in missing.items():
        if absent:
            yield Finding(
                "missing-file",
                "error",
                Where(files=tuple(n.text for n in absent)),
                f"{number_of(len(files.wanted[kind]), f'{kind} file')}, for {mesh}",
                f"{some([n.text for n in absent], 4)} {'is' if len(absent) == 1 else 'are'} not there",
                _COPY,
                "files",
                message,
            )
    known = {n for needed in files.wanted.values() for n in needed}
    kinds = {"model", "zero3_model", "layer", "expert", *(("optim",) if files.optimizer else ())}
    extra = [file for n, file in files.names.items() if n.kind in kinds and n not in known]
    optims = {file for n, file in files.names.items() if n.kind == "optim"}
    if len(files.sets) > 1 and not files.doubles and optims.issuperset(extra):
        taken = f"those {'with' if files.prefix else 'without'} {files.prefix or 'a prefix'}"
        found = f"two sets of optimizer files; {taken} are taken, {some(extra, 4)} left alone"
        yield Finding(
            "extra-file",
            "warning",
            Where(files=tuple(sorted(extra))),
            "optimizer files of one run",
            found,
            "move the others away: they are left from a run in another dtype, and DeepSpeed goes by that of its own",
            "files",
            f"{path}: {found}",
        )
    elif extra := sorted([*extra, *files.doubles]):
        yield Finding(
            "extra-file",
            "warning",
            Where(files=tuple(extra)),
            f"the files of {mesh} and no others",
            f"{some(extra, 4)}: of no rank of that mesh. ckptlab leaves them alone; DeepSpeed's own tools count "
            "files and take them for ranks",
            "move them away: they are left from another run or mesh",
            "files",
            f"{path}: {some(extra, 4)}: not part of this checkpoint's mesh ({mesh}); left alone",
        )


def _complaint(files: Found, missing: list[str]) -> str:
    mesh, path = files.mesh, files.path
    if files.head not in files.kinds:
        return (
            f"{path}: no mp_rank_*_model_states.pt and no zero_pp_rank_*_model_states.pt: not a DeepSpeed "
            "step folder, or its model files are missing"
        )
    if files.experts.over_tp and missing and all(name.startswith("mp_rank_") for name in missing):
        ep = files.experts.sizes[-1]
        return (
            f"{path}: incomplete: {some(missing, 4)} missing. DeepSpeed, to 0.19.8 at least, writes those of "
            f"the tp ranks alone that come first among ranks with the same experts (ep {ep}, of tp {mesh.tp}) and "
            "cannot load it: save it again with an ep that is a multiple of tp, or experts that are tensor "
            "parallel themselves"
        )
    model = mesh.pp * mesh.tp * (mesh.dp if files.head == "zero3_model" else 1)
    needs = f"{model} model files" + (f" and {mesh.size} optimizer files" if files.optimizer else "")
    return (
        f"{path}: incomplete: {some(missing, 4)} missing. The other files say {mesh}, which needs {needs}: "
        "copy the missing files from the run's storage"
    )


def notices(files: Found) -> Iterator[Finding]:
    """What is not as usual, and read all the same."""
    if files.left_out:
        yield _left_out(files)
    if files.weights_alone:
        expected = f"{number_of(files.mesh.size, 'optimizer file')}"
        found = "no optimizer file: the weights of the model are all there is"
        todo = "nothing, if that is what was copied; to resume, copy the optimizer files too"
        yield noted(files.path, "weights-alone", "warning", Where(), expected, found, todo)
    if files.of_one_rank and files.mesh.dp > 1:
        yield _of_one_rank(files)


def _left_out(files: Found) -> Finding:
    absent = tuple(FileName("model", mp).text for mp in files.left_out)
    heads = files.heads.values()
    trained = dict.fromkeys(n for h in heads for n in h.trained if not layer_of(n))
    others = (n for h in heads for n in h.module or {} if n not in h.buffers and n not in h.shared)
    frozen = tuple(dict.fromkeys(n for n in others if n not in trained))
    found = (
        f"{some(absent, 4)}: not there. DeepSpeed, to 0.19.8 at least, writes the model files of those tp ranks "
        f"alone that come first among ranks with the same experts (ep {files.experts.sizes[-1]}, of tp "
        f"{files.mesh.tp}), and cannot load it. The module's weights are left out, and made of the optimizer's where "
        "they are written" + (f"; of {some(frozen, 4)} nothing else is stored" if frozen else "")
    )
    todo = "convert it, and train on with that: ckptlab writes all files, on the same mesh too"
    where = Where(absent, (*trained, *frozen), (PARAM,))
    return noted(files.path, "model-files", "warning", where, "one a rank", found, todo)


def _of_one_rank(files: Found) -> Finding:
    dp = files.mesh.dp
    frozen = [(name, math.prod(shape)) for head in files.heads.values() for name, shape in head.frozen.items()]
    lost = tuple(dict.fromkeys(name for name, numel in frozen if -(-numel // dp) < numel))
    found, rest = f"the model files of dp rank 0 alone are there, of {dp}", "nothing is lost"
    todo = "nothing for ckptlab; DeepSpeed wants a file a rank: convert it"
    if lost:
        rest = f"of the frozen tensors {some(lost, 4)} the rest is in the others: left out"
        todo = "copy the others, if there are any"
    severity, where = "warning" if lost else "info", Where(tensors=lost)
    return noted(files.path, "model-files", severity, where, "one a rank", f"{found}: {rest}", todo)
