"""`check`: one reading of the files, in which their headers are compared, then one pass over the data."""

from __future__ import annotations

import os
from collections.abc import Iterator

from ckptlab import paths
from ckptlab.analysis.checkup import copies, jobs, replicas, verdicts
from ckptlab.analysis.checkup import data as contents
from ckptlab.analysis.checkup.checksums import against_manifest
from ckptlab.analysis.checkup.checksums import checksums as against_checksums
from ckptlab.analysis.checkup.health import Checked, Health, ordered
from ckptlab.arguments import explained, positive
from ckptlab.catalog import MASTER, PARAM, Catalog
from ckptlab.checkpoint import Checkpoint
from ckptlab.errors import CkptlabError
from ckptlab.findings import Collecting, Finding, Where
from ckptlab.formats import Paths, found, read_at
from ckptlab.formats import get as format_of
from ckptlab.formats.torch.foreign_code import classes
from ckptlab.formats.torch.torchfile import Contents
from ckptlab.pool import Workers
from ckptlab.sharding.strategies import LayoutsOf, Strategy, resolve
from ckptlab.stored import scalar
from ckptlab.words import number_of, some


@explained
def check(
    path: Paths | Checkpoint,
    *,
    data: bool = True,
    checksums: bool = False,
    progress: bool = False,
    strategy: Strategy | str | None = None,
    on: Workers = None,
    window: int = jobs.WINDOW,
) -> Health:
    """Check a checkpoint: its files, what they say of one another, and (unless data=False) every element once.

    path: what `ckptlab.open` takes, or a checkpoint that is open (of one that is seen through a family, what is
    stored). It need not open: files that are missing, cut or
    foreign are findings, and what can be read is looked at all the same. checksums: also read every file once more and
    compare it with the checksums that torch wrote into it. progress: show bars on stderr. strategy: see `open`.
    on: how many threads (None: as many as there are cores), an executor or a dask client. window: bytes that
    a worker holds at a time, whatever the size. Files are only read.

    Raises CheckpointError where there is no checkpoint at all, LayoutError for a strategy that is none.
    """
    window = positive("window", window)
    path = Checkpoint(path.catalog.as_stored) if isinstance(path, Checkpoint) else path
    given = path if isinstance(path, Checkpoint) else None
    place = found(_parts(path.catalog) if isinstance(path, Checkpoint) else path)
    known = {name: t.layout for name, t in given.tensors.items() if t.layout_known} if given else {}
    layouts = LayoutsOf(known) if given and strategy is None else resolve(strategy)
    faults = Collecting(os.path.dirname(place.path) if paths.is_file(place.path) else place.path)
    catalog = read_at(place, faults, layouts)
    catalog = given.catalog if given else catalog
    told = {name: file for name, file in faults.files.items() if isinstance(file, Contents)}
    findings = [*faults.findings, *classes({name: file.globals_seen for name, file in told.items()})]
    already = {name for f in findings if f.severity != "info" for name in f.where.files}
    findings += copies.renamed(told, already)
    if catalog is not None:
        findings += _without_states(catalog)
    read, tensors = 0, len(catalog.tensors) if catalog else 0
    if data:
        seen, read, looked_at = _survey(catalog, faults, window, on, progress)
        tensors = tensors or looked_at
        findings += seen
    if paths.is_folder(place.path):
        changed, bytes_read = against_manifest(place.path, data, on, progress)
        findings += changed
        read += bytes_read
    if checksums:
        findings += against_checksums(catalog, faults, on, progress)
    files = {*faults.files, *faults.unread, *(catalog.files if catalog else ())}
    checked = Checked(len(files), tensors, read, catalog is not None, data)
    mesh = catalog.training.mesh if catalog else None
    return Health(place.path, place.format, str(mesh) if mesh else None, ordered(findings), checked)


def _parts(catalog: Catalog) -> str | list[str]:
    """The folders that a checkpoint was opened from, where there are several."""
    others = (os.path.dirname(file) for file in catalog.files if file.startswith(os.pardir))
    also = dict.fromkeys(paths.normal(os.path.join(catalog.path, folder)) for folder in others)
    return [catalog.path, *also] if also else catalog.path


def _without_states(catalog: Catalog) -> Iterator[Finding]:
    """Trained tensors that lack a state which the format, or another tensor that has all of theirs, has; a weight that
    others of their parameter group have. Not those of which the reader said it already."""
    said = {(name, state) for f in catalog.findings for name in f.where.tensors for state in f.where.states}
    factored = {name.rpartition(".")[0] for name in catalog.tensors}  # of whose states some have shapes of their own
    trained = [t for t in catalog.tensors.values() if t.group is not None and t.name not in factored]
    kept = {frozenset(t.states) - {PARAM} for t in trained}
    weights = {t.group for t in trained if {PARAM, MASTER} <= t.states.keys()}
    lacking: dict[str, list[str]] = {}
    for tensor in trained:
        mine = frozenset(tensor.states) - {PARAM}
        more = next((states for states in kept if states > mine), mine)
        needs_weight = tensor.group in weights or (format_of(catalog.format).sharded and catalog.zero_stage in (1, 2))
        for state in sorted(more - mine) + [PARAM] * (needs_weight and PARAM not in tensor.states):
            if (tensor.name, state) not in said:
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
    catalog: Catalog | None, found: Collecting, window: int, on: Workers, progress: bool
) -> tuple[list[Finding], int, int]:
    """Findings on the data, the bytes that were read, and the tensors that were looked at."""
    files = {n: file.value if isinstance(file, Contents) else file for n, file in found.files.items()}
    unreadable: jobs.Unreadable = {}
    todo = list(jobs.jobs(catalog, unreadable, window) if catalog is not None else jobs.loose(files, window))
    gaps = list(jobs.gaps(catalog)) if catalog is not None else []
    told = contents.survey(todo, gaps, window=window, on=on, progress=progress)
    if catalog is not None:
        told.join(replicas.survey(catalog))
    read = sum(job.nbytes for job in todo) + sum(gap.nbytes for gap in gaps)
    if catalog is None:
        return list(verdicts.loose_verdicts(told)), read, len({job.tensor for job in todo})
    alive = any(not zero for (_, state, _), zero in told.zero.items() if state not in (MASTER, PARAM))
    # torch's get_optimizer_state_dict makes an optimizer's states by a step without gradients
    stepped = any((scalar(g.scalars.get("step")) or 0) > 1 for g in catalog.groups)
    damaged = [_damaged(catalog, name, state, error) for (name, state), error in unreadable.items()]
    seen = [*damaged, *verdicts.verdicts(catalog, told, alive or stepped)]
    if (alive or stepped) and (sums := _sums(found)):
        seen += copies.doubled(catalog, sums)
    seen += copies.twins(catalog)
    seen += replicas.alike(catalog)
    return seen, read, len(catalog.tensors)


def _sums(found: Collecting) -> dict[tuple[str, int], int]:
    """The CRC-32 beside each storage of the files, by the file and the storage's first byte."""
    files = {paths.join(found.folder, n): file for n, file in found.files.items() if isinstance(file, Contents)}
    return {(path, at): crc for path, file in files.items() for at, crc in file.sums.items()}


def _damaged(catalog: Catalog, name: str, state: str, error: CkptlabError) -> Finding:
    """The finding on a tensor that cannot be read, though the headers of its checkpoint can."""
    return Finding(
        "damaged-tensor",
        "error",
        Where(tensors=(name,), states=(state,)),
        "a header before its elements that tells what they are",
        str(error).replace(f"{catalog.path}{os.sep}", ""),
        "copy the file again from the run's storage; if it is damaged there too, go back to an earlier step",
    )
