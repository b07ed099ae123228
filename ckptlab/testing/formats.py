"""The laws of a format, tried on a small checkpoint of it and on damaged copies."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ckptlab.analysis import check
from ckptlab.arguments import explained
from ckptlab.arrays import Tally, reader
from ckptlab.arrays.readers import is_sum
from ckptlab.catalog import Catalog
from ckptlab.catalog.stacks import stacks
from ckptlab.checkpoint import Checkpoint
from ckptlab.convert import MANIFEST
from ckptlab.errors import CheckpointError, CkptlabError
from ckptlab.formats import Format, Listing, fileplan, get, locate, read
from ckptlab.formats.fileplan import Elements, FilePlan, Literal
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.plan import Placement
from ckptlab.reshaping import Reshape
from ckptlab.sharding.strategies import LayoutsOf, Strategy, resolve
from ckptlab.stored import reading
from ckptlab.testing.suite import hold
from ckptlab.views.tensors import node_name

_MARKS: Mapping[str, tuple[str, ...]] = {
    "deepspeed": ("mp_rank_00_model_states.pt",),
    "safetensors": ("model.safetensors",),
    "dcp": (".metadata", "__0_0.distcp"),
    "megatron": ("latest_checkpointed_iteration.txt",),
    "orbax": ("_CHECKPOINT_METADATA",),
}
"""Names by which formats are recognised, all of them ours: what has them is a foreign folder to every other format."""


@explained
def check_format(
    format: str | Format | type[Format],
    checkpoint: str | os.PathLike[str] | Checkpoint,
    *,
    meshes: Sequence[Mesh] = (Mesh(), Mesh(dp=2)),
    options: Mapping[str, Any] | None = None,
    strategy: Strategy | Mapping[str, Any] | str | None = None,
    foreign: Sequence[str | os.PathLike[str]] = (),
    most_files: int = 6,
) -> tuple[str, ...]:
    """Hold a registered format to the laws, on a small healthy checkpoint of it (a path, or one that is on paper).

    meshes: to which it is reshaped and from which it comes back, where the format writes; options: what it is told
    then. strategy: see `ckptlab.open`. foreign: folders that it must not take for its own, beside those that are made
    here. most_files: faults are planted in so many of its files, spread over all. The checkpoint is only read, and
    copied to the temporary folder. Returns the names of the laws; LawError if one is broken.
    """
    form = get(format if isinstance(format, str) else getattr(format, "name", repr(format)))
    rules = resolve(strategy)
    catalog = checkpoint.catalog if isinstance(checkpoint, Checkpoint) else read(checkpoint, rules)
    with tempfile.TemporaryDirectory() as scratch:
        case = _Case(form, catalog, tuple(meshes), dict(options or {}), rules, Path(scratch))
        laws = {
            "foreign folders are not taken for its own": lambda: case.foreign([os.fspath(f) for f in foreign]),
            "every state lies somewhere, in its dtype": case.placed,
        }
        if catalog.extents is not None:
            laws |= {
                "it is recognised, and opening reads no data": case.recognised,
                "what is stored of a shard is all of it, without gaps": case.extents_tile,
                "a check finds nothing wrong": case.healthy,
                "whole tensors are the same in every view": case.views_agree,
                "flat buffers are shown as they are stored": case.flat_shown,
                "each element is read once": case.read_once,
                "faults are found: open raises where check has an error": lambda: case.faults_found(most_files),
            }
        if form.writes:
            laws |= {
                "a plan says what is read and written": case.plans_tell,
                "planned files are small values, and of their exact size": case.files_planned,
                "to another mesh and back is the identity": case.there_and_back,
            }
        return hold(f"format {form.name}, on {catalog.path},", laws)


@dataclass(frozen=True)
class _Case:
    form: Format
    catalog: Catalog
    meshes: tuple[Mesh, ...]
    options: dict[str, Any]
    strategy: Strategy | None
    scratch: Path
    wholes: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)

    # ---------------------------------------------------------------------------------------- what it reads

    def foreign(self, given: list[str]) -> Iterator[str]:
        folder = self.scratch / "foreign"
        for name, marks in {"nothing": (), "notes": ("notes.txt", "data.bin"), **_MARKS}.items():
            if get(self.form.name).name == name or (self.form.name == "universal" and name == "deepspeed"):
                continue
            (folder / name / "folder").mkdir(parents=True)
            for mark in marks:
                (folder / name / mark).write_bytes(b"\x00 of somebody else")
            given = [
                *given,
                str(folder / name),
                str(folder / name / "folder"),
                *(str(folder / name / m) for m in marks),
            ]
        for path in given:
            found = self.form.recognise(Listing(path))
            if found is not None and found.format == self.form.name:
                yield f"{path} is taken for {found}"

    def recognised(self) -> Iterator[str]:
        with reading() as count:
            found = locate(self.catalog.path)
            again = read(self.catalog.path, self.strategy)
        if found.format != self.form.name:
            yield f"{self.catalog.path} is taken for {found}"
        if again.format != self.form.name:
            yield f"the catalog's format is {again.format!r}"
        if count.bytes:
            yield f"{count.bytes} bytes of tensors were read"
        if not again.files:
            yield "the catalog names no files"
        yield from (
            f"{f}: there is no such file" for f in again.files if not os.path.isfile(os.path.join(self.root, f))
        )

    @property
    def root(self) -> str:
        """The folder in which the checkpoint's files are named."""
        path = self.catalog.path
        return os.path.dirname(path) if os.path.isfile(path) else path

    def placed(self) -> Iterator[str]:
        for (name, state), copies in self.catalog.placements.items():
            tensor = self.catalog.tensors.get(name)
            if tensor is None or state not in tensor.states:
                yield f"{name}: {state} is placed, but no state of a tensor"
            elif any(p.cut.logical != tensor.shape for p in copies):
                yield f"{name}: {state}: the cut is of {copies[0].cut.logical}, the tensor of {tensor.shape}"
        for tensor in self.catalog.tensors.values():
            if len(tensor.layout.dims) != len(tensor.shape) or tensor.cut.logical != tensor.shape:
                yield f"{tensor.name}: shape {tensor.shape}, {tensor.layout!r}, {tensor.cut!r}"
            if not self.catalog.held(tensor.name):
                yield f"{tensor.name}: no state of it lies anywhere"

    def states(self) -> Iterator[tuple[str, str, Placement]]:
        """Every state that ranks hold: tensor, state, how its first copy lies."""
        for name in self.catalog.tensors:
            for state in self.catalog.held(name):
                yield name, state, self.catalog.placement(name, state)

    def whole(self, name: str, state: str) -> np.ndarray:
        """What readers give of all of it."""
        if (name, state) not in self.wholes:
            self.wholes[name, state] = _whole(self.catalog, name, state)
        return self.wholes[name, state]

    def extents_tile(self) -> Iterator[str]:
        for name, state, placement in self.states():
            for holder in placement.holders:
                done, dtype = 0, np.dtype(self.catalog[name].states[state])
                for fragment in self.catalog.fragments(name, state, holder):
                    if fragment.start != done or fragment.stored.dtype != dtype:
                        yield (
                            f"{name}: {state} of {holder}: {fragment} follows {done} elements, expected {dtype} from "
                            f"element {done} on"
                        )
                    done = fragment.start + fragment.count
                if done != int(np.prod(placement.shape(holder))):
                    yield f"{name}: {state} of {holder}: {done} elements of a shard {placement.shape(holder)}"

    def healthy(self) -> Iterator[str]:
        found = check(self.catalog.path, strategy=self.strategy)
        yield from (f"{f.code}: {f.text}" for f in found.findings if f.severity == "error")

    def views_agree(self) -> Iterator[str]:
        """Full tensors by name and stacked, and shards put together by their cut."""
        ckpt = Checkpoint(self.catalog)
        for state in ckpt.states:
            full, shards = ckpt.full(state, stack=False), ckpt.shards(state, stack=False)
            for name in full:
                whole, placement = self.whole(name, state), self.catalog.placement(name, state)
                if not _same(full[name].values, whole):
                    yield f"{name}: {state}: full() by name is not what its reader gives"
                if not _same(_merged(shards[name].load(), placement, state), whole):
                    yield f"{name}: {state}: shards(), merged, are not what its reader gives"
        tree = ckpt.full()
        for stack in stacks(t for t in self.catalog.tensors.values() if self.catalog.held(t.name)):
            node = tree[node_name(stack)]
            for i, tensor in enumerate(stack.tensors):
                for state in self.catalog.held(tensor.name):
                    array: Any = node[state] if stack.numbers is None else node[state].isel(layer=i)
                    if not _same(array.values, self.whole(tensor.name, state)):
                        yield f"{tensor.name}: {state}: full() is not what its reader gives"

    def flat_shown(self) -> Iterator[str]:
        tree = Checkpoint(self.catalog).flat()
        shown = {s: 0 for g in self.catalog.flat_groups for s in g.dtypes}
        for node in tree.subtree:
            for state in map(str, node.data_vars):
                if f"{state}_numel" in node:
                    node[state].load()
                    shown[state] += int(node[f"{state}_numel"].sum())
        for state, count in shown.items():
            groups = [g for g in self.catalog.flat_groups if state in g.dtypes]
            rows = (r for g in groups for r in self.catalog.stored.partitions[g.key, state].values())
            if count != (stored := sum(s.numel for row in rows for s in row)):
                yield f"{state}: {count} elements are shown, {stored} stored"

    def read_once(self) -> Iterator[str]:
        for name, state, placement in self.states():
            tally = Tally()
            got = _whole(self.catalog, name, state, tally)
            if placement.replicas not in ("mean", "sum") and tally.read.total() != got.nbytes:
                yield f"{name}: {state}: {tally.read.total()} bytes were read for {got.nbytes}"

    # ------------------------------------------------------------------------------------------ what it writes

    def reshaped(self, mesh: Mesh) -> Reshape:
        return Reshape.of(self.catalog, mesh, self.form.name, **self.options)

    def plans_tell(self) -> Iterator[str]:
        for mesh in self.meshes:
            reshape = self.reshaped(mesh)
            if reshape.format.name != self.form.name:
                yield f"on {mesh!r}: a target of {self.form.name} says that it is {reshape.format.name}"
            cost, tally = reshape.cost(), Tally()
            if self.catalog.extents is None:
                continue
            written = sum(plan.nbytes for plan in self.form.files(self.catalog, reshape.target))
            if written != cost.written:
                yield f"on {mesh!r}: files of {written} bytes of tensors, {cost.written} in the cost"
            for plan in self.form.files(self.catalog, reshape.target, tally):
                _draw(plan)
            if not self.form.sharded:
                continue  # whole tensors are for nobody's rank
            moved = sum(n for (a, b), n in tally.read.items() if a != b)
            if (tally.read.total(), moved) != (cost.read, cost.moved):
                yield f"on {mesh!r}: {tally.read.total()} bytes read, {moved} moved; the cost says {cost}"

    def files_planned(self) -> Iterator[str]:
        if self.catalog.extents is None:
            return
        for i, mesh in enumerate(self.meshes):
            folder = self.scratch / f"planned{i}"
            for plan in self.form.files(self.catalog, self.reshaped(mesh).target):
                again: FilePlan = pickle.loads(pickle.dumps(plan))
                drawn = sum(part.nbytes for part in plan.parts if not isinstance(part, Literal))
                if drawn < plan.nbytes:
                    yield f"{plan.name} on {mesh!r}: of {plan.nbytes} bytes of tensors {drawn} are drawn"
                path = folder / plan.name
                path.parent.mkdir(parents=True, exist_ok=True)
                fileplan.write(plan, path)
                first = path.read_bytes()
                fileplan.write(again, path)
                if not len(first) == plan.size == again.size:
                    yield f"{plan.name} on {mesh!r}: {plan.size} bytes were planned, {len(first)} written"
                if first != path.read_bytes():
                    yield f"{plan.name} on {mesh!r}: pickled, it writes other bytes"

    def there_and_back(self) -> Iterator[str]:
        if self.catalog.extents is None:
            for mesh in self.meshes:
                self.reshaped(mesh)
            return
        home = self.catalog.training.mesh or self.catalog.mesh
        for i, mesh in enumerate(self.meshes):
            there = self._saved(self.reshaped(mesh), self.scratch / f"there{i}" / "step")
            yield from (f"on {mesh!r}: {found}" for found in self._differences(there))
            if self.form.home and there.training.step != self.catalog.training.step:
                yield f"on {mesh!r}: the step is {there.training.step}, it was {self.catalog.training.step}"
            if self.form.sharded and _degrees(there.mesh.joined()) != _degrees(mesh.joined()):
                yield f"saved on {mesh!r}, it opens as of {there.mesh!r}"
            reshape = Reshape.of(there, home, self.form.name, **self.options)
            back = self._saved(reshape, self.scratch / f"back{i}" / "step")
            yield from (f"to {mesh!r} and back: {found}" for found in self._differences(back))

    def _saved(self, reshape: Reshape, folder: Path) -> Catalog:
        folder.parent.mkdir()
        reshape.save(folder)
        planned = {plan.name for plan in reshape.files}
        found = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
        if planned != found:
            raise CheckpointError(f"{folder}: planned {sorted(planned)}, written {sorted(found)}")
        told = {n: t.layout for n, t in reshape.target.tensors.items()}
        return read(folder, self.strategy and LayoutsOf(told))

    def _differences(self, other: Catalog) -> Iterator[str]:
        here, there = self.catalog.tensors.keys(), other.tensors.keys()
        if here != there:
            yield f"only one of both has {', '.join(sorted(here ^ there))}"
        for name, state, _ in self.states():
            if name in there and (name, state) not in other.placements:
                yield f"{name}: {state} is lost"
            elif name in there and not _same(_whole(other, name, state), self.whole(name, state)):
                yield f"{name}: {state} differs"

    # ------------------------------------------------------------------------------------------------ faults

    def faults_found(self, most: int) -> Iterator[str]:
        """Of a file that is missing or cut: refused, or nothing that is left has changed."""
        if os.path.isfile(self.catalog.path):
            place = Path(shutil.copy(self.catalog.path, self.scratch))
            root = place.parent
        else:
            place = root = Path(shutil.copytree(self.catalog.path, self.scratch / "damaged"))
        files = self.catalog.files
        for name in files[:: -(-len(files) // most)]:
            file, aside = root / name, self.scratch / "aside"
            os.rename(file, aside)
            content = aside.read_bytes()
            faults = {
                "missing": None,
                "empty": b"",
                "cut in half": content[: len(content) // 2],
                "cut by a byte": content[:-1],
            }
            for fault, left in faults.items():
                if left is not None:
                    file.write_bytes(left)
                yield from (f"{name} is {fault}: {found}" for found in self._outcome(place))
            file.unlink(missing_ok=True)
            os.rename(aside, file)

    def _outcome(self, place: Path) -> Iterator[str]:
        opened: Catalog | None = None
        error: CkptlabError | None = None
        try:
            opened = read(place, self.strategy)
        except CkptlabError as caught:
            error = caught
        refusing = True
        with contextlib.suppress(CheckpointError):  # there is no checkpoint any more, which both may say
            refusing = any(f.refuses for f in check(place, data=False, strategy=self.strategy).findings)
        if (error is not None) != refusing:
            yield f"open says {error}, a check has {'an' if refusing else 'no'} error of files or headers"
        for name in opened.tensors if opened else ():
            for state in opened.held(name) if opened and name in self.catalog.tensors else ():
                try:
                    same = _same(_whole(opened, name, state), self.whole(name, state)) if opened else True
                except (CkptlabError, OSError) as caught:
                    yield f"it opens, and reading {name}: {state} raises {caught}"
                    return
                if not same:
                    yield f"it opens, and {name}: {state} is not what it was"


def _whole(catalog: Catalog, name: str, state: str, tally: Tally | None = None) -> np.ndarray:
    return reader(catalog, name, state, tally=tally).shard(Cut.whole(catalog[name].shape), ())


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and np.ascontiguousarray(a).tobytes() == b.tobytes()


def _merged(shards: Any, placement: Placement, state: str) -> np.ndarray:
    """The whole that a view of shards makes, put together element by element; the canonical stage's."""
    if "pp" in shards.dims:
        shards = shards.isel(pp=0)
    cut = placement.cut
    copies: dict[tuple[int, ...], list[np.ndarray]] = {}
    for holder in placement.on(placement.stages[0]):
        shard = shards.isel({axis: holder[axis] for axis in placement.axes}).values
        copies.setdefault(cut.coordinate(holder), []).append(shard[tuple(map(slice, placement.shape(holder)))])
    whole = np.zeros(cut.shape, shards.dtype)
    for at, held in copies.items():
        if placement.replicas == "mean" or is_sum(placement.replicas, state):
            wide = np.float32 if shards.dtype.itemsize < 4 else np.result_type(shards.dtype, np.float32)
            made = np.mean if placement.replicas == "mean" else np.sum
            held = [made([one.astype(wide) for one in held], axis=0, dtype=wide).astype(shards.dtype)]
        cut.put(held[0], at, whole)
    return whole[tuple(map(slice, cut.logical))]


def _degrees(mesh: Mesh) -> dict[str, int]:
    return {axis: n for axis, n in mesh.items() if n > 1}


def _draw(plan: FilePlan) -> None:
    """Read all that a planned file takes from its source."""
    for part in plan.parts:
        for _ in part.bytes() if isinstance(part, Elements) else ():
            pass
