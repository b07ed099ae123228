"""What a user holds: a checkpoint, its views, and its reshape to another mesh."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptlab import formats, paths
from ckptlab.arguments import check_fields, explained, only_said
from ckptlab.catalog import PARAM, Catalog, Tensor, Training, drawn_from
from ckptlab.errors import CheckpointError, ReshapeError, UnknownNameError
from ckptlab.findings import Finding
from ckptlab.formats import Format
from ckptlab.formats.fileplan import FilePlan
from ckptlab.layout import Layout
from ckptlab.layout.notation import names
from ckptlab.mesh import Mesh
from ckptlab.plan import Made, Move, Placement, Plan, compose
from ckptlab.pool import Workers
from ckptlab.sharding.relaid import relaid
from ckptlab.sharding.rules import unmatched
from ckptlab.sharding.strategies import Rules, Strategy, resolve
from ckptlab.sharding.transformer import PaperModel
from ckptlab.shown import Shown
from ckptlab.stored import reading_apart
from ckptlab.viewed import Viewed

if TYPE_CHECKING:
    import torch

    from ckptlab import convert
    from ckptlab.state_dict import Loaded

PAPER = "paper"  # the format without files, in which anything can be laid out


@explained
def open(
    path: formats.Paths,
    strategy: Strategy | Mapping[str, str | Layout] | str | None = None,
    *,
    mesh: Mesh | Mapping[str, int] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Open a checkpoint: headers only, nothing in it is executed, neither DeepSpeed nor torch is needed.

    path: a step folder, the folder that holds `latest`, a universal folder, a folder of torch's Distributed Checkpoint,
    a folder or file of safetensors or of torch.save, or a folder with exactly one of these somewhere below
    (docs/formats.md has all kinds); or a list of step folders that hold parts of one checkpoint, as nodes without a
    shared disk leave them. strategy: layouts where the checkpoint does not tell them, or instead of what it tells: a
    registered name ("megatron"), {regular expression: notation}, a .json file of that, or a Strategy. mesh: the run's,
    where the files do not say it (torch's DCP). Any of the paths may be a URL that fsspec knows (s3://, gs://, http://,
    …); storage_options are of the file system behind it, and hold for all that lies in the same bucket or on the same
    host.

    Raises CheckpointError where files are missing, damaged or contradict each other, UnsafeFileError for what could
    execute something, UnsupportedError for a kind that ckptlab does not read yet.
    """
    said = Mesh(**mesh) if mesh is not None and not isinstance(mesh, Mesh) else mesh
    found = Checkpoint(formats.read(path, resolve(strategy), storage_options, said))
    found.plainly = strategy is mesh is storage_options is None and isinstance(path, str | os.PathLike)
    return found


@explained
def paper_model(mesh: Mesh | None = None, zero_stage: int = 1, **numbers: Any) -> Checkpoint:
    """A model described by a few numbers, with no checkpoint at all: its layouts, flat buffers and plans.

    numbers: see `ckptlab.sharding.transformer.PaperModel` (layers, hidden, heads, kv_heads, ffn, vocab, tied, gated,
    dtype). zero_stage: 0 to 3. Nothing is stored, so views of data are refused. Raises LayoutError where the numbers do
    not fit each other, ReshapeError where the mesh does not fit them.
    """
    check_fields("paper_model", PaperModel, numbers)
    described = Training(mesh=Mesh(), numbers=asdict(PaperModel(**numbers)))
    model = Catalog("a model on paper", "paper", Mesh(), {}, {}, training=described)
    return Checkpoint(Reshape.of(model, mesh or Mesh(), zero_stage=zero_stage).target)


@explained
class Checkpoint(Viewed, Shown, Mapping[str, Tensor]):
    """A checkpoint opened by `ckptlab.open`. Nothing is read until a view's values are asked for.

    A Mapping of the model's names to what is known of each tensor; an alias is found, and not iterated over.
    """

    __eq__, __hash__ = object.__eq__, object.__hash__
    plainly = False
    """Whether `ckptlab.open` of its path, and nothing said beside, gives the same."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = self.source = self.held = catalog

    @property
    def path(self) -> str:
        """The folder that was opened."""
        return self.catalog.path

    @property
    def format(self) -> str:
        """The name of its format: "deepspeed", "dcp", "safetensors", …; `ckptlab formats` lists all."""
        return self.catalog.format

    @property
    def mesh(self) -> Mesh:
        """The mesh whose ranks wrote it (1 · 1 · 1 where tensors are stored whole)."""
        return self.catalog.mesh

    @property
    def zero_stage(self) -> int | None:
        return self.catalog.zero_stage

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor by name: shape, layout, kind, states."""
        return self.catalog.tensors

    @property
    def states(self) -> tuple[str, ...]:
        """Every state that some tensor has, the master weight first."""
        return self.catalog.states

    @property
    def findings(self) -> tuple[Finding, ...]:
        """What the user must hear about this checkpoint, as far as its headers tell; `ckptlab.check` finds more."""
        return self.catalog.findings

    @property
    def client_state(self) -> Mapping[str, Any]:
        """What the training program put in; objects of classes that are not imported are placeholders."""
        return self.catalog.client

    @property
    def iteration(self) -> int | None:
        """The training step, where the checkpoint tells."""
        return self.catalog.training.step

    def reshape(
        self,
        mesh: Mesh | Mapping[str, int] | None = None,
        format: str | None = None,
        *,
        strategy: Strategy | Mapping[str, str | Layout] | str | None = None,
        **options: Any,
    ) -> Reshape:
        """The same checkpoint on another mesh: nothing is read yet.

        mesh: axes that are not named become 1; None keeps the run's. A degree by its axis, `reshape(tp=4)`, keeps those
        of the other axes, as on the command line. format: what it is to be saved as (None: as such checkpoints are).
        strategy: layouts of the *target*, over whatever axes the mesh has, in all forms that `ckptlab.open` takes; a
        tensor of which it says nothing keeps its own, and lengths of parts (q, k, v) are the source's where it does not
        say them. Without a format it is then laid out on paper (see `formats.paper.drawn`): views, plan and cost are
        there, and saving is up to the format, which says what it cannot hold.
        options: what that format takes; see TargetOptions for DeepSpeed's (zero_stage, dtype, pipeline, padded_vocab,
        heads, …). ReshapeError, with the reasons and the nearest meshes that work, if it cannot be.
        """
        told = self.catalog.training.mesh
        trained = (told or self.mesh).joined()
        axes = {name: options.pop(name) for name in list(options) if name in trained}
        if axes and mesh is not None:
            raise ReshapeError(f"a mesh and {next(iter(axes))}= are both given: say the degree in one of them")
        if mesh is not None and not isinstance(mesh, Mesh):
            if not isinstance(mesh, Mapping):
                raise ReshapeError(f"reshape takes a mesh, Mesh(tp=4), or degrees by axis, tp=4; not {mesh!r}")
            mesh = Mesh(**mesh)
        if axes:  # axes that nobody named are none to keep
            mesh = Mesh(**axes) if told is None else trained.replace(**axes)
        return Reshape.of(self.catalog, mesh, format, strategy, **options)

    def save(self, destination: str | os.PathLike[str], format: str | None = None, **running: Any) -> convert.Report:
        """Write it as it is, for its own mesh: `reshape(format=format).save(destination, **running)`."""
        return self.reshape(format=format).save(destination, **running)

    def state_dict(
        self, state: str | None = None, backend: Any = "torch", dtype: Any = None, device: Any = None
    ) -> dict[str, Any]:
        """Name → whole tensor as an array of the library, for every tensor that has the state; a tied tensor once,
        under each of its names.

        state: None takes the master weight, and `param` where there is none (frozen tensors, buffers). dtype, numpy's
        or torch's: what floating-point tensors are rounded to (None: as stored). CheckpointError for a state that no
        tensor has, BackendError for a library or dtype that is not there.
        """
        from ckptlab.state_dict import state_dict

        return state_dict(self, state, backend, device, dtype)

    def load_into(self, module: torch.nn.Module, strict: bool = True, state: str | None = None) -> Loaded:
        """Copy whole tensors into the parameters and buffers of a module that have their names, one after the other.

        state: as for `state_dict`. Elements are rounded to the module's dtypes; of a vocabulary that the run padded the
        module may have more rows, which become 0. Nothing is copied before all names and shapes are known to fit:
        CheckpointError where shapes differ and, if `strict`, where names of the module are missing here or names here
        are unknown to it.
        """
        from ckptlab.state_dict import load_into

        return load_into(self, module, strict, state)

    def __getitem__(self, name: str) -> Tensor:
        try:
            return self.catalog[name]
        except CheckpointError as e:
            raise UnknownNameError(str(e)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)


_MOST = 1 << 24  # ranks of a target: many tables have a row for each
Source = Checkpoint | Catalog | str | os.PathLike[str]


def _kept(value: Any) -> Any:
    """An option as it is kept: lists as tuples, numpy's numbers as Python's, which files can hold."""
    return tuple(value) if isinstance(value, list) else value.item() if isinstance(value, np.generic) else value


def opened(source: Source) -> Checkpoint:
    """A checkpoint that may be open already, or a catalog, or its path."""
    if isinstance(source, Catalog):
        return Checkpoint(source)
    return source if isinstance(source, Checkpoint) else open(source)


@dataclass(frozen=True)
class Cost:
    """What a reshape costs, in bytes of tensor data; headers are not counted.

    read: drawn from the source, for every rank that needs it. written: into the target, padding included. moved: of
    what is read, what a rank of the target needs and another rank of the source has. largest_tensor: the biggest whole
    state.
    """

    read: int
    written: int
    moved: int
    largest_tensor: int


@explained
class Reshape(Viewed, Shown):
    """A checkpoint on another mesh, worked out from headers: check it, cost it, look at its views, save it."""

    def __init__(self, source: Catalog, target: Catalog, options: Any, strategy: Strategy | None = None) -> None:
        self.source, self.target, self.options, self.strategy = source, target, options, strategy
        self.held = target

    @staticmethod
    def of(
        source: Catalog,
        mesh: Mesh | None = None,
        format: str | None = None,
        strategy: Strategy | Mapping[str, str | Layout] | str | None = None,
        **options: Any,
    ) -> Reshape:
        """A source in a format (None: where checkpoints of its own go, `Format.home`; with a strategy on paper) on a
        mesh (None: the run's)."""
        if format is None:
            format = formats.get(source.format).home if strategy is None else PAPER
        if format is None:
            raise ReshapeError(
                f"{source.path}: {source.format} has no word of a program's layers, groups and optimizer: there is "
                'nothing to write for another mesh; say layouts, strategy={".*": "(tp out) in"}, to lay it out on paper'
            )
        form = formats.get(format)
        known = [field.name for field in fields(form.options)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise ReshapeError(
                f"reshape has no option {unknown[0]!r}: expected an axis of the mesh{''.join(f', {k}' for k in known)}"
            )
        options = {name: _kept(value) for name, value in options.items()}
        check_fields("reshape", form.options, options)
        _check_heads(source, options)
        given, mesh = form.options(**options), mesh or source.training.mesh or source.mesh
        if mesh.size > _MOST:
            raise ReshapeError(f"{source.path}: {mesh} is {mesh.size:,} ranks, ckptlab plans for {_MOST:,} at most")
        said, laid = resolve(strategy), source
        if said is not None or (format == PAPER and not source.training.numbers):
            laid = relaid(source, mesh, said or Rules(()), form.cuts, form.uneven)
            _check_cuts(laid, mesh, form)
        target = form.target(laid, mesh, given)
        if idle := unmatched(said, source.tensors):
            target = replace(target, findings=(*target.findings, replace(idle, about="target")))
        return Reshape(source, target, given, said)

    @property
    def format(self) -> Format:
        """The format that the target is of."""
        return formats.get(self.target.format)

    @property
    def mesh(self) -> Mesh:
        """The target's mesh."""
        return self.target.mesh

    @property
    def zero_stage(self) -> int | None:
        """The target's ZeRO stage."""
        return self.target.zero_stage

    def check(self) -> tuple[Finding, ...]:
        """What the user must hear before this is done: what was inferred, is averaged, padded or lost."""
        return (*self.source.findings, *self.target.findings, *self.format.beside(self.source, self.target).findings)

    @cached_property
    def plan(self) -> Plan:
        """Which rank's data goes to which rank."""
        return compose(self._planned(), self._states)

    def _planned(self) -> Iterator[tuple[str, int, int, Placement | Made, Placement]]:
        """What `compose` takes: states that lie alike together, `param` by itself."""
        known: dict[tuple[int, int], list[tuple[str, str, int, int]]] = {}  # of states that many tensors have
        placements = self.target.placements
        for name, tensor in self.target.tensors.items():
            held = self.source[name]
            kind = (id(held.states), id(tensor.states))
            if kind not in known:
                known[kind] = list(_together(held, tensor, lambda *states, of=name: self._alike(of, *states)))
            for state, becomes, read, written in known[kind]:
                if becomes != PARAM or (name, PARAM) in placements:
                    source = self.source.lies(name, state)
                    for target in placements[name, becomes]:
                        for a, b in self._kept(name, becomes, source, target):
                            yield name, read, written, a, b

    def _kept(
        self, name: str, state: str, source: Placement | Made, target: Placement
    ) -> Iterator[tuple[Placement | Made, Placement]]:
        """From where to where a state goes: of a buffer of which a target's holders keep copies of their own, holder by
        holder."""
        from ckptlab.arrays.held import own_copy

        if isinstance(source, Made) or self.target.tensors[name].kind != "buffer":
            yield source, target
            return
        kept = {}
        for holder in target.holders:
            if (own := own_copy(self.source, self.target, name, state, holder)) is None:
                yield source, target
                return
            kept[holder.without(*target.cut.axes)] = own.without(*source.cut.axes)
        for there, own in kept.items():
            taken = replace(source, stages=(own["pp"],), at=own.without("pp"))
            yield taken, replace(target, stages=(there["pp"],), at=there.without("pp"))

    def _alike(self, name: str, state: str, other: str) -> bool:
        """Whether two states of a tensor lie in the same places, of the source and of the target."""
        found, there = self.target.placements, self.source
        alike = found[name, state] is found[name, other] or found[name, state] == found[name, other]
        return alike and there.placement(name, state) == there.placement(name, other)

    def _states(self) -> Iterator[Move]:
        """Every state by itself, as `Plan.run` moves them: keys are (name, state)."""
        for name, tensor in self.target.tensors.items():
            held = self.source[name]
            for state in self.target.held(name):
                drawn = drawn_from(held, tensor, state)
                source = self.source.placement(name, drawn)
                for target in self.target.placements[name, state]:
                    yield Move((name, state), source, target, held.states[drawn], tensor.states[state], (name, drawn))

    @cached_property
    def files(self) -> tuple[FilePlan, ...]:
        """Every file that saving makes, as a plan; on paper there are none."""
        return tuple(self.format.files(self.source, self.target))

    @property
    def file_sizes(self) -> Mapping[str, int]:
        """Name → bytes of tensors of the model of every file that saving makes."""
        return {plan.name: plan.nbytes for plan in self.files}

    def cost(self) -> Cost:
        """The bytes that saving reads, writes and moves between ranks."""
        sizes = (t.numel * max(d.itemsize for d in t.states.values()) for t in self.source.tensors.values() if t.states)
        written = self.format.payload(self.source, self.target)
        return Cost(self.plan.sent, written, self.plan.moved, max(sizes, default=0))

    def save(
        self,
        destination: str | os.PathLike[str],
        format: str | None = None,
        *,
        on: Workers = None,
        progress: bool = False,
        verify: bool = True,
        sync: bool = True,
        storage_options: Mapping[str, Any] | None = None,
    ) -> convert.Report:
        """Write the target: `destination` is the folder to make; where the format has one, a pointer that names it
        (`latest`) is written beside it, but not beside the source itself, whose own stays. What a Trainer left beside
        the source (config, tokenizer, scheduler, …) is copied there too, where it is still true and nothing has its
        name. Both may be URLs that fsspec can write to; storage_options are of the file system behind it.

        format: that of the target, or another that takes the same options ("universal"), or whole weights
        ("safetensors", see `save_weights` for its own). on: how many threads, a `concurrent.futures.Executor`
        or a client of dask.distributed, whose workers see the same files. verify: compare what is read with the
        checksums that it carries, and stop where it is damaged. sync: wait until all is on the disk. The destination
        appears when it is complete; a conversion that was interrupted goes on where it stopped when it is called again.
        DestinationError if the destination exists, or has no room; ReshapeError where a strategy calls copies equal
        that are not (`arrays.copies`).
        """
        _ = self.source.stored  # or an error, at once
        destination = paths.absolute(destination, storage_options)
        if format is None and not self.format.writes:
            format = formats.get(self.source.format).home
            if format is None:
                raise ReshapeError(
                    f"{self.source.path}: this target is on paper: say the format whose files it is to be, format="
                )
        if format is not None and format != self.target.format:
            there = self._in(format)
            running: dict[str, Any] = {"on": on, "progress": progress, "verify": verify, "sync": sync}
            return there.save(destination, storage_options=storage_options, **running)
        from ckptlab import convert
        from ckptlab.arrays.copies import refuse_unequal

        with reading_apart():  # not part of what the plan says is read
            refuse_unequal(self.source)
        return convert.run(
            self.files,
            destination,
            {
                "format": self.target.format,
                "source": fingerprint(self.source),
                "target": laid_out(self.target),
                "mesh": str(self.mesh),
                "options": _plain(self.options),
            },
            latest=self.format.pointer(destination, self.source),
            on=on,
            progress=progress,
            check=lambda folder: self.format.verify(folder, self.source, self.target),
            source=source_of(self.source),
            verify=verify,
            sync=sync,
            beside=self.format.beside(self.source, self.target).files,
        )

    def _in(self, format: str) -> Reshape:
        """The same in another format, with those of the options that it knows."""
        known = {field.name for field in fields(formats.get(format).options)}
        given = {f.name: getattr(self.options, f.name) for f in fields(self.options) if f.name in known}
        return Reshape.of(self.source, self.mesh, format, self.strategy, **given)


@explained
def save_weights(
    source: Source,
    destination: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    **running: Any,
) -> convert.Report:
    """Consolidated safetensors of every weight, frozen tensor and buffer, under the model's own names.

    dtype: "bf16", "fp16" or "fp32"; None keeps the master's (float32). Files are cut at `max_shard_bytes` (None: 5 GB),
    with an index. running: on, progress, verify, sync, storage_options; see `Reshape.save`.
    """
    options = only_said(dtype=dtype, max_shard_bytes=max_shard_bytes)
    return Reshape.of(opened(source).catalog, None, "safetensors", **options).save(destination, **running)


def source_of(catalog: Catalog) -> convert.Source:
    """What a conversion of a checkpoint reads."""
    from ckptlab import convert

    files = [paths.join(catalog.path, name) for name in catalog.files] if paths.is_folder(catalog.path) else []
    filled = () if catalog.filled is None else source_of(catalog.filled).files
    return convert.Source((*(files or [catalog.path]), *filled), catalog.lying_in)


def _together(source: Tensor, target: Tensor, alike: Callable[[str, str], bool]) -> Iterator[tuple[str, str, int, int]]:
    """(state, what becomes of it, bytes an element read, and written) of those that lie alike: what an optimizer keeps,
    by the first state of those that do, and `param` by itself."""
    held, wanted = source.states, target.states
    groups: list[list[str]] = []
    for state in wanted:
        if state != PARAM:
            known = next((group for group in groups if alike(group[0], state)), None)
            groups.append([state]) if known is None else known.append(state)
    for group in groups:
        yield group[0], group[0], sum(held[s].itemsize for s in group), sum(wanted[s].itemsize for s in group)
    if PARAM in wanted:
        drawn = drawn_from(source, target, PARAM)
        yield drawn, PARAM, held[drawn].itemsize, wanted[PARAM].itemsize


def _check_cuts(laid: Catalog, mesh: Mesh, form: Format) -> None:
    """ReshapeError, naming tensor and axis, where a format's files cannot hold a layout."""
    for name, tensor in laid.tensors.items() if form.cuts is not None else ():
        named = {axis for node in tensor.layout.tree for axis in names(node) if axis in mesh and mesh[axis] > 1}
        if beyond := sorted(named - set(form.cuts or ())):
            raise ReshapeError(
                f"{laid.path}: {name} is cut over {', '.join(beyond)} ({tensor.layout.text}), and {form.name} files "
                f"hold tensors that are cut over {' or '.join(form.cuts or ())} alone: without format= it is laid out "
                "on paper"
            )


def _check_heads(source: Catalog, options: Mapping[str, Any]) -> None:
    """ReshapeError where counts of heads contradict what the checkpoint says."""
    for name, what in (("heads", "attention heads"), ("kv_heads", "key/value heads")):
        told, said = getattr(source.training, name), options.get(name)
        if None not in (told, said) and told != said:
            raise ReshapeError(
                f"{source.path}: {name}={said} contradicts the checkpoint, which has {told} {what}: leave {name}= out"
            )


def fingerprint(catalog: Catalog) -> str:
    """What a source is, for the journal of a conversion: its files with their sizes, times and identities, and what its
    tensors are taken to be."""
    return json.dumps([catalog.path, sorted(source_of(catalog).stamp()), laid_out(catalog)])


def laid_out(catalog: Catalog) -> str:
    """A digest of how a catalog's tensors lie and of what they are made: another strategy or family is another one."""
    groups = [(group.name, list(group.options.items())) for group in catalog.groups]
    found = hashlib.sha256(f"{catalog.mesh!r} {catalog.training.dtype} {groups!r}".encode())
    for tensor in catalog.tensors.values():
        states = [(state, np.dtype(dtype).name) for state, dtype in tensor.states.items()]
        layout = tensor.layout, getattr(tensor.layout, "rows", None)
        found.update(repr((tensor.name, tensor.shape, layout, tensor.kind, tensor.group, states)).encode())
    for name, pieces in catalog.seen.items():
        found.update(repr((name, [(piece.name, piece.key) for piece in pieces])).encode())
    found.update(repr(list(catalog.added.items())).encode())
    return found.hexdigest() + (laid_out(catalog.filled) if catalog.filled is not None else "")


def _plain(options: Any) -> dict[str, Any]:
    return {k: repr(v) for k, v in asdict(options).items() if v is not None}
