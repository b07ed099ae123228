"""What a user holds: a checkpoint, its views, and its reshape to another mesh."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptlab import convert, paper, strategy
from ckptlab.catalog import MODULE, Catalog, Tensor, module_source
from ckptlab.errors import CheckpointError, ReshapeError, UnknownNameError
from ckptlab.findings import Finding
from ckptlab.formats import FORMATS, read
from ckptlab.formats.fileplan import FilePlan
from ckptlab.formats.locate import LATEST, LATEST_UNIVERSAL
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import Placement, Plan, compose
from ckptlab.pool import Workers
from ckptlab.shown import Shown
from ckptlab.viewed import Viewed

if TYPE_CHECKING:
    import torch

    from ckptlab.state_dict import Loaded

SHARD_BYTES = 5_000_000_000  # safetensors files are cut at this size, as Hugging Face's are


def open(
    path: str | os.PathLike[str], strategy: strategy.Strategy | Mapping[str, str | Layout] | str | None = None
) -> Checkpoint:
    """Open a checkpoint: headers only, nothing in it is executed, neither DeepSpeed nor torch is needed.

    path: a step folder, the folder that holds `latest`, a universal folder, a folder or file of safetensors, or a
    folder with exactly one of these somewhere below. strategy: layouts where the checkpoint does not tell them, or
    instead of what it tells: a registered name ("megatron"), {regular expression: notation}, a .json file of that, or a
    Strategy.

    Raises CheckpointError where files are missing, damaged or contradict each other, UnsafeFileError for what could
    execute something, UnsupportedError for a kind that ckptlab does not read yet.
    """
    return Checkpoint(read(path, _strategy(strategy)))


def paper_model(mesh: Mesh | None = None, zero_stage: int = 1, **numbers: Any) -> Checkpoint:
    """A model described by a few numbers, with no checkpoint at all: its layouts, flat buffers and plans.

    numbers: see `ckptlab.paper.PaperModel` (layers, hidden, heads, kv_heads, ffn, vocab, tied, gated, dtype).
    zero_stage: 0 to 3. Nothing is stored, so views of data are refused. Raises LayoutError where the numbers do not fit
    each other, ReshapeError where the mesh does not fit them.
    """
    return Checkpoint(paper.PaperModel(**numbers).on(mesh or Mesh(), zero_stage))


def _strategy(given: Any) -> strategy.Strategy | None:
    return strategy.resolve(given)


class Checkpoint(Viewed, Shown, Mapping[str, Tensor]):
    """A checkpoint opened by `ckptlab.open`. Nothing is read until a view's values are asked for.

    A Mapping of the model's names to what is known of each tensor; an alias is found, and not iterated over.
    """

    __eq__, __hash__ = object.__eq__, object.__hash__

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = self.source = self.held = catalog

    @property
    def path(self) -> str:
        """The folder that was opened."""
        return self.catalog.path

    @property
    def format(self) -> str:
        """ "deepspeed", "universal" or "safetensors"."""
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
        """What the user must hear about this checkpoint, as far as its headers tell; `ckptlab.health` finds more."""
        return self.catalog.findings

    @property
    def client_state(self) -> Mapping[str, Any]:
        """What the training program put in; objects of classes that are not imported are placeholders."""
        return self.catalog.client

    @property
    def iteration(self) -> int | None:
        """The training step, where the checkpoint tells."""
        return self.catalog.training.step

    def reshape(self, mesh: Mesh | None = None, **options: Any) -> Reshape:
        """The same checkpoint on another mesh: nothing is read yet.

        mesh: axes that are not named become 1; None keeps the run's. options: see TargetOptions (zero_stage, dtype,
        pipeline, padded_vocab, heads, …). ReshapeError, with the reasons and the nearest meshes that
        work, if it cannot be.
        """
        return Reshape.of(self.catalog, mesh, **options)

    def state_dict(
        self, state: str | None = None, backend: Any = "torch", dtype: Any = None, device: Any = None
    ) -> dict[str, Any]:
        """Name → whole tensor as an array of the library, under the model's own names: see `ckptlab.state_dict`."""
        from ckptlab.state_dict import state_dict

        return state_dict(self, state, backend, device, dtype)

    def load_into(self, module: torch.nn.Module, strict: bool = True, state: str | None = None) -> Loaded:
        """Copy whole tensors into a module's parameters and buffers of the same names: see `ckptlab.state_dict`."""
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


class Reshape(Viewed, Shown):
    """A checkpoint on another mesh, worked out from headers: check it, cost it, look at its views, save it."""

    def __init__(self, source: Catalog, target: Catalog, options: Any) -> None:
        self.source, self.target, self.options = source, target, options
        self.held = target

    @staticmethod
    def of(source: Catalog, mesh: Mesh | None = None, **options: Any) -> Reshape:
        from ckptlab.formats.deepspeed import target
        from ckptlab.formats.deepspeed.options import TargetOptions

        if source.training.mesh is None:
            raise ReshapeError(
                f"{source.path}: {source.format} holds whole tensors and no word of layers, groups or optimizer: "
                "there is nothing "
                "to lay out on a mesh"
            )
        unknown = set(options) - {f.name for f in fields(TargetOptions)}
        if unknown:
            raise ReshapeError(
                f"reshape has no option {sorted(unknown)[0]!r}: expected "
                f"{', '.join(f.name for f in fields(TargetOptions))}"
            )
        given = TargetOptions(**options)
        build = paper.reshape if source.format == paper.FORMAT else target.reshape
        return Reshape(source, build(source, mesh or source.training.mesh, given), given)

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
        return (*self.source.findings, *self.target.findings)

    @cached_property
    def plan(self) -> Plan:
        """Which rank's data goes to which rank."""
        return compose(self._planned())

    def _planned(self) -> Iterator[tuple[str, int, int, Placement, Placement]]:
        """What `compose` takes: states that lie alike together, the module weight by itself."""
        for name, tensor in self.target.tensors.items():
            held = self.source[name].states
            flat = [s for s in tensor.states if s != MODULE]
            if flat:
                sizes = (sum(t[s].itemsize for s in flat) for t in (held, tensor.states))
                yield from self._moves(name, flat[0], flat[0], *sizes)
            if (name, MODULE) in self.target.placements:
                state = module_source(self.source[name], tensor)
                yield from self._moves(name, state, MODULE, held[state].itemsize, tensor.states[MODULE].itemsize)

    def _moves(
        self, name: str, state: str, becomes: str, read_size: int, written_size: int
    ) -> Iterator[tuple[str, int, int, Placement, Placement]]:
        source = self.source.placement(name, state)
        for target in self.target.placements[name, becomes]:
            yield name, read_size, written_size, source, target

    @cached_property
    def files(self) -> tuple[FilePlan, ...]:
        """Every file that writing a native checkpoint makes, as a plan; on paper there are none."""
        from ckptlab.formats.deepspeed import write

        return () if self.source.format == paper.FORMAT else (*write.files(self.source, self.target),)

    @property
    def file_sizes(self) -> Mapping[str, int]:
        """Name → bytes of tensors of the model of every file that writing a native checkpoint makes."""
        return {plan.name: plan.nbytes for plan in self.files}

    def cost(self) -> Cost:
        """The bytes that writing a native checkpoint reads, writes and moves between ranks."""
        from ckptlab.formats.deepspeed import write

        wrapper = None if self.source.format == paper.FORMAT else self.target.private.wrapper
        sizes = (t.numel * max(d.itemsize for d in t.states.values()) for t in self.source.tensors.values() if t.states)
        return Cost(self.plan.sent, write.payload(self.target, wrapper), self.plan.moved, max(sizes, default=0))

    def save(
        self,
        destination: str | os.PathLike[str],
        format: str = "deepspeed",
        *,
        workers: Workers = None,
        progress: bool = False,
    ) -> convert.Report:
        """Write the target: `destination` is the step folder to make, `latest` (or `latest_universal`) is written
        beside it; beside the source itself, whose `latest` is not touched, none is.

        format: "deepspeed", "universal" or "safetensors" (see `save_weights` for its options). workers: how many
        threads, or a `concurrent.futures.Executor` whose workers see the same files. The destination appears
        when it is complete; a conversion that was interrupted goes on where it stopped when it is called again.
        DestinationError if the destination exists.
        """
        from ckptlab.formats.universal import write

        _ = self.source.stored  # or an error, at once
        if format == "safetensors":
            return save_weights(self.source, destination, workers=workers, progress=progress)
        if format not in FORMATS:
            raise ReshapeError(f"format {format!r}: expected one of {', '.join(FORMATS)}")
        native = format == "deepspeed"
        pointer = self._latest(destination) if native else LATEST_UNIVERSAL
        return convert.run(
            self.files if native else (*write.files(self.source, self.target),),
            os.fspath(destination),
            {
                "format": format,
                "source": fingerprint(self.source),
                "mesh": str(self.mesh),
                "options": _plain(self.options),
            },
            latest=pointer,
            workers=workers,
            progress=progress,
            check=self._check_native if native else None,
        )

    def _latest(self, destination: str | os.PathLike[str]) -> str | None:
        """The pointer to write beside a native destination; None in the source's own folder, whose `latest` stays."""
        parent = os.path.dirname(os.path.abspath(destination))
        is_sources = parent == os.path.dirname(self.source.path) and os.path.exists(os.path.join(parent, LATEST))
        return None if is_sources else LATEST

    def _check_native(self, folder: str) -> None:
        """Read what was written back: it must open, and say of every tensor what the target says."""
        told = self.source.training.layouts_told or self.mesh.tp == 1
        found = read(folder, None if told else LayoutsOf(self.target))
        for name, tensor in self.target.tensors.items():
            again = found.tensors.get(name)
            alike = again is not None and again.shape == tensor.shape and again.cut.dims == tensor.cut.dims
            if not alike or (self.source.training.layouts_told and again and again.layout.text != tensor.layout.text):
                raise CheckpointError(
                    f"{folder}: {name} was written as {again and (again.layout, again.cut)}, expected "
                    f"{(tensor.layout, tensor.cut)}: this is a fault of ckptlab; please report it"
                )


def save_weights(
    source: Catalog,
    destination: str | os.PathLike[str],
    *,
    dtype: np.dtype | None = None,
    max_shard_bytes: int = SHARD_BYTES,
    workers: Workers = None,
    progress: bool = False,
) -> convert.Report:
    """Consolidated safetensors of every weight, frozen tensor and buffer, under the model's own names.

    dtype: None keeps the master's (float32). Files are cut at `max_shard_bytes`, with an index.
    """
    from ckptlab.formats import safetensors

    identity = {"format": "safetensors", "source": fingerprint(source), "dtype": str(dtype), "shard": max_shard_bytes}
    files = (*safetensors.files(source, dtype, max_shard_bytes),)
    return convert.run(files, os.fspath(destination), identity, workers=workers, progress=progress)


def fingerprint(catalog: Catalog) -> str:
    """What a source is, for the journal of a conversion: its files with their sizes and times."""
    stats = {f: os.stat(os.path.join(catalog.path, f)) for f in catalog.files if os.path.isdir(catalog.path)}
    return json.dumps([catalog.path, sorted((f, s.st_size, s.st_mtime_ns) for f, s in stats.items())])


def _plain(options: Any) -> dict[str, Any]:
    return {k: repr(v) for k, v in asdict(options).items() if v is not None}


@dataclass(frozen=True)
class LayoutsOf:
    """The strategy that gives each tensor the layout it has in a catalog."""

    catalog: Catalog

    def layout(self, name: str, shards: Sequence[tuple[int, ...]]) -> Layout | None:
        found = self.catalog.tensors.get(name)
        return None if found is None or found.layout.padded else found.layout
