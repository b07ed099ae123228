"""`health`: the files, what their headers say of one another, then one pass over the data."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ckptlab.analysis.checkup import data as contents
from ckptlab.analysis.checkup import jobs, replicas, verdicts
from ckptlab.analysis.checkup.checksums import checksums as against_checksums
from ckptlab.analysis.checkup.files import Scan, mesh_of, places, scan
from ckptlab.analysis.checkup.finding import Checked, Finding, Health, Where, ordered
from ckptlab.analysis.checkup.headers import agreement
from ckptlab.analysis.checkup.pickled import classes
from ckptlab.analysis.checkup.swaps import swapped
from ckptlab.catalog import MASTER, MODULE, Catalog
from ckptlab.checkpoint import Checkpoint
from ckptlab.checkpoint import open as open_checkpoint
from ckptlab.errors import CkptlabError, UnsupportedError
from ckptlab.formats.deepspeed.optimizer import scalar
from ckptlab.formats.locate import locate
from ckptlab.pool import Workers
from ckptlab.strategy import Strategy
from ckptlab.words import number_of, some


def health(
    path: str | os.PathLike[str] | Checkpoint,
    *,
    data: bool = True,
    checksums: bool = False,
    progress: bool = False,
    strategy: Strategy | str | None = None,
    workers: Workers = None,
    window: int = jobs.WINDOW,
) -> Health:
    """Check a checkpoint: its files, what they say of one another, and (unless data=False) every element once.

    path: what `ckptlab.open` takes, or a checkpoint that is open. It need not open: files that are missing, cut or
    foreign are findings, and what can be read is looked at all the same. checksums: also read every file once more and
    compare it with the checksums that torch wrote into it. progress: show bars on stderr. strategy: see `open`.
    workers: how many threads (None: as many as there are cores), or a `concurrent.futures.Executor`. window: bytes that
    a worker holds at a time, whatever the size. Files are only read.

    Raises CheckpointError where there is no checkpoint at all.
    """
    given = path if isinstance(path, Checkpoint) else None
    place = locate(given.path if given else path)  # type: ignore[arg-type]
    found = scan(place.path, place.format)
    findings = [*found.findings, *classes(found.globals_seen)]
    mesh = None if place.format == "safetensors" else mesh_of(found)
    if mesh is not None:
        findings += places(found, mesh, optimizer=place.format == "deepspeed")
        findings += agreement(found, mesh)
        findings += swapped(found, mesh)
    catalog, refusal = (given.catalog, None) if given else _open(place.path, strategy)
    if refusal is not None:
        findings += _refused(refusal, place.path, findings)
    if catalog is not None:
        findings += [*_noticed(catalog), *_without_states(catalog)]
    read, tensors = 0, len(catalog.tensors) if catalog else 0
    if data:
        told, read, looked_at = _survey(catalog, found, window, workers, progress)
        tensors = tensors or looked_at
        findings += told
    if checksums:
        findings += against_checksums(found, workers, progress)
    checked = Checked(len(found.contents) + len(found.findings), tensors, read, catalog is not None, data)
    said = str(catalog.mesh) if catalog and place.format == "deepspeed" else str(mesh) if mesh else None
    return Health(place.path, place.format, said, ordered(findings), checked)


def _open(path: str, strategy: Strategy | str | None) -> tuple[Catalog | None, Exception | None]:
    """The catalog, or why there is none: whatever is wrong with the files, the check goes on."""
    try:
        return open_checkpoint(path, strategy).catalog, None
    except (CkptlabError, OSError) as error:
        return None, error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
        return None, error  # headers of another form than any writer's


def _refused(error: Exception, path: str, findings: list[Finding]) -> Iterator[Finding]:
    """Why it does not open, unless a finding on a file says it."""
    if isinstance(error, UnsupportedError):
        if "unsupported-file" in {f.code for f in findings}:
            return
        yield Finding(
            "not-read-yet",
            "warning",
            Where(),
            "a kind of checkpoint that ckptlab reads",
            _said(error, path),
            "its files were looked at one by one; how their tensors belong together could not be checked",
        )
    elif not any(f.severity == "error" for f in findings):
        todo = "put back this run's own file; if none is whole, go back to an earlier step"
        yield Finding("contradiction", "error", Where(), "files that agree with one another", _said(error, path), todo)


def _said(error: Exception, path: str) -> str:
    """What an error says, without the folder that the reader knows; of an unexpected one its kind too."""
    text = str(error).replace(f"{path}: ", "").replace(f"{path}{os.sep}", "")
    return text if isinstance(error, CkptlabError) else f"{type(error).__name__}: {text}"


def _noticed(catalog: Catalog) -> Iterator[Finding]:
    """What the reader had to work around."""
    for notice in catalog.notices:
        if notice.code == "slice-mappings":
            known = "round_robin" in notice.text
            yield Finding(
                "slice-mappings",
                "warning" if known else "error",
                Where(tuple(f for f in catalog.files if f.endswith("_optim_states.pt"))),
                "param_slice_mappings that say where the tensors lie in memory",
                notice.text.removeprefix(f"{catalog.path}: "),
                "convert it with ckptlab (or zero_to_fp32), never with ds_to_universal"
                if known
                else "compare the weights with an earlier step's before you go on with them",
            )


def _without_states(catalog: Catalog) -> Iterator[Finding]:
    """Trained tensors that lack a state which the format, or another tensor that has all of theirs, has."""
    trained = [t for t in catalog.tensors.values() if t.group is not None]
    kept = {frozenset(t.states) - {MODULE} for t in trained}
    weights = [t for t in trained if MODULE in t.states]
    lacking: dict[str, list[str]] = {}
    for tensor in trained:
        mine = frozenset(tensor.states) - {MODULE}
        more = next((states for states in kept if states > mine), mine)
        needs_weight = bool(weights) or (catalog.format == "deepspeed" and catalog.zero_stage != 3)
        for state in sorted(more - mine) + [MODULE] * (needs_weight and MODULE not in tensor.states):
            lacking.setdefault(state, []).append(tensor.name)
    for state, names in lacking.items():
        yield Finding(
            "missing-state",
            "error",
            Where(tensors=tuple(names), states=(state,)),
            f"{state} of every trained tensor",
            f"{number_of(len(names), 'tensor')}: {some(names, 4)}: no file has it",
            "see whether a layer file or the file of a state is missing",
        )


def _survey(
    catalog: Catalog | None, found: Scan, window: int, workers: Workers, progress: bool
) -> tuple[list[Finding], int, int]:
    """Findings on the data, the bytes that were read, and the tensors that were looked at."""
    todo = list(jobs.jobs(catalog, window) if catalog is not None else jobs.loose(found.contents, window))
    gaps = list(jobs.gaps(catalog)) if catalog is not None else []
    told = contents.survey(todo, gaps, window=window, workers=workers, progress=progress)
    if catalog is not None:
        told.join(replicas.survey(catalog))
    read = sum(job.nbytes for job in todo) + sum(gap.nbytes for gap in gaps)
    if catalog is None:
        return list(verdicts.loose_verdicts(told)), read, len({job.tensor for job in todo})
    alive = any(not zero for (_, state, _), zero in told.zero.items() if state not in (MASTER, MODULE))
    stepped = any((scalar(g.scalars.get("step")) or 0) > 0 for g in catalog.groups)
    return list(verdicts.verdicts(catalog, told, alive or stepped)), read, len(catalog.tensors)
