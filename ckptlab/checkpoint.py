"""What a user holds: a checkpoint, a Mapping of tensors with its views."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ckptlab import formats
from ckptlab.arguments import check_fields, explained, only_said
from ckptlab.catalog import Catalog, Tensor, Training
from ckptlab.errors import CheckpointError, ReshapeError, UnknownNameError
from ckptlab.findings import Finding
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape
from ckptlab.sharding.strategies import Strategy, resolve
from ckptlab.sharding.transformer import PaperModel
from ckptlab.shown import Shown
from ckptlab.viewed import Viewed

if TYPE_CHECKING:
    import torch

    from ckptlab import convert
    from ckptlab.state_dict import Loaded


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


Source = Checkpoint | Catalog | str | os.PathLike[str]


def opened(source: Source) -> Checkpoint:
    """A checkpoint that may be open already, or a catalog, or its path."""
    if isinstance(source, Catalog):
        return Checkpoint(source)
    return source if isinstance(source, Checkpoint) else open(source)


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
