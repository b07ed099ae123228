"""A checkpoint's reshape to another mesh: what it needs, costs and warns of, its views, and its files."""

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
from ckptlab.arguments import check_fields, explained
from ckptlab.catalog import PARAM, Catalog, Tensor, drawn_from
from ckptlab.errors import ReshapeError
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
from ckptlab.shown import Shown
from ckptlab.stored import reading_apart
from ckptlab.viewed import Viewed

if TYPE_CHECKING:
    from ckptlab import convert

PAPER = "paper"  # the format without files, in which anything can be laid out
_MOST = 1 << 24  # ranks of a target: many tables have a row for each


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


def _kept(value: Any) -> Any:
    """An option as it is kept: lists as tuples, numpy's numbers as Python's, which files can hold."""
    return tuple(value) if isinstance(value, list) else value.item() if isinstance(value, np.generic) else value


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
