"""What a DCP folder would hold of a source: weights and states in the chunks that the ranks of a mesh have."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckptlab.catalog import DTYPES, MASTER, PARAM, Catalog, ParameterGroup, Tensor
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.findings import Finding
from ckptlab.formats.dcp.axes import DimAxes, Laid, laid, ways_of
from ckptlab.formats.dcp.options import DCPOptions
from ckptlab.formats.dcp.styles import KeyStyle, style
from ckptlab.mesh import Mesh
from ckptlab.plan import Placement
from ckptlab.sharding.stages import dealt

CHUNKS = ("fsdp", "layouts", "whole")
ADAM: Mapping[str, Any] = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}
"""What each group of torch's AdamW (2.13) has beside lr, betas, eps and weight_decay: load asks for every one."""


@dataclass(frozen=True)
class DCPTarget:
    """What the writer must know beyond the catalog: how keys are nested, name → the name in keys."""

    style: KeyStyle
    names: Mapping[str, str]


def reshape(source: Catalog, mesh: Mesh, options: DCPOptions) -> Catalog:
    """The target's catalog. ReshapeError, with the reason, where it cannot be."""
    chunks = options.chunks or CHUNKS[0]
    if chunks not in CHUNKS:
        raise ReshapeError(f"chunks {chunks!r}: expected one of {', '.join(CHUNKS)}")
    if options.dtype is not None and options.dtype not in DTYPES:
        raise ReshapeError(f"dtype {options.dtype!r}: expected one of {', '.join(DTYPES)}")
    own = source.private if isinstance(source.private, KeyStyle) else None
    keys = style(options.keys, options.model_key, options.optimizer_key, own)
    if chunks == "whole":
        mesh = Mesh()
    stages = dealt(source, mesh.pp)
    tensors: dict[str, Tensor] = {}
    placements: dict[tuple[str, str], tuple[Placement, ...]] = {}
    for name, tensor in source.tensors.items():
        states = _states(source, tensor, options, keys)
        if not states:
            continue
        made, told = _cut(source, tensor, mesh, chunks, options.padded_vocab)
        stage = stages[name][0]
        layout = made.layout.replace(stages=(stage,)) if mesh.pp > 1 else made.layout
        known = tensor.layout_known and told
        tensors[name] = replace(tensor, layout=layout, cut=made.cut, states=states, stages=(stage,), layout_known=known)
        fixed = (*made.cut.axes, *mesh.leaves("pp"), *mesh.leaves("dp"))
        place = Placement(made.cut, (stage,), at={axis: 0 for axis in mesh.axes if axis not in fixed})
        placements |= {(name, state): (place,) for state in states}
    groups, findings = _groups(source, options, keys, tensors)
    findings += _padding(tensors)
    training = replace(
        source.training, mesh=mesh, groups=groups, zero_stage=None, wrapper=None, gradients=None, layer_stages={}
    )
    return Catalog(
        path="",
        format="dcp",
        mesh=mesh,
        tensors=tensors,
        placements=placements,
        training=replace(training, dtype=options.dtype or training.dtype),
        private=DCPTarget(keys, _renamed(source, tensors, options.rename or ())),
        findings=tuple(findings),
    )


def _states(source: Catalog, tensor: Tensor, options: DCPOptions, keys: KeyStyle) -> dict[str, np.dtype]:
    """The states that are written: the weight, as the model's program is to have it, and what its optimizer keeps."""
    held = {state: np.dtype(tensor.states[state]) for state in source.held(tensor.name)}
    weight = held.get(MASTER, held.get(PARAM))
    if weight is None:  # of a weight that is stored in parts, fused
        return {} if keys.optimizer is None else held
    wanted = None if options.dtype is None or tensor.kind == "buffer" else DTYPES[options.dtype]
    if wanted is not None and weight.kind not in "iub":
        found = {PARAM: wanted} if wanted != held.get(MASTER) else {MASTER: wanted}
    elif isinstance(source.private, KeyStyle) and PARAM in held:
        found = {PARAM: held[PARAM]}
    else:
        found = {MASTER: held[MASTER]} if MASTER in held else {PARAM: held[PARAM]}
    if keys.optimizer is None:
        return found
    return {**{s: d for s, d in held.items() if s != PARAM}, **found}


def _cut(source: Catalog, tensor: Tensor, mesh: Mesh, chunks: str, rows: int | None) -> tuple[Laid, bool]:
    """How a tensor is cut: over the axes that its layout names, each as torch.chunk does; for FSDP over dp within. A
    padded vocabulary is cut with its padding, of `rows` in all. And whether that says all that the layout does."""
    padded = {dim: size if rows is None else rows for dim, size in tensor.layout.padded}
    if any(size < tensor.shape[dim] for dim, size in padded.items()):
        raise ReshapeError(
            f"{source.path}: padded_vocab {rows}: {tensor.name} has {tensor.shape[0]} rows that are used"
        )
    shape = tuple(padded.get(dim, n) for dim, n in enumerate(tensor.shape))
    try:
        said = ways_of(tensor.layout, mesh.axes)
    except LayoutError:  # as no DTensor is cut
        said = None
    ways = tuple(
        way if way.fits(size) else replace(way, parts=1)
        for way, size in zip(said or (DimAxes(),) * len(shape), shape, strict=True)
    )
    told = ways == said
    data = mesh.leaves("dp")
    if chunks == "fsdp" and shape and not any(axis in data for way in ways for axis in way.axes):
        ways = (replace(ways[0], axes=(*ways[0].axes, *(axis for axis in data if mesh[axis] > 1))), *ways[1:])
    return laid(shape, mesh, ways).within(tensor.shape), told


def _groups(
    source: Catalog, options: DCPOptions, keys: KeyStyle, tensors: Mapping[str, Tensor]
) -> tuple[tuple[ParameterGroup, ...], list[Finding]]:
    """The parameter groups, with what torch's AdamW asks for; and what was made up of that."""
    if keys.optimizer is None:
        return (), []
    given = options.param_groups
    if given is not None and len(given) != len(source.groups):
        raise ReshapeError(f"param_groups: {len(given)} given, {source.path} has {len(source.groups)} groups")
    groups: list[ParameterGroup] = []
    added: dict[str, Any] = {}
    for i, group in enumerate(source.groups):
        told = {**group.options, **(given[i] if given is not None else {})}
        adam = any("exp_avg_sq" in tensors[name].states for name in group.tensors if name in tensors)
        more = {key: value for key, value in ADAM.items() if adam and key not in told}
        added |= more
        groups.append(replace(group, options={**told, **more}))
    if not added:
        return tuple(groups), []
    said = ", ".join(f"{key}={value}" for key, value in added.items())
    text = (
        f"{source.path} does not say of its optimizer what torch's AdamW loads: written as {said}; say "
        "param_groups= if the program's optimizer has others"
    )
    return tuple(groups), [Finding("hyperparameters-assumed", "info", found=text, about="target")]


def _padding(tensors: Mapping[str, Tensor]) -> list[Finding]:
    padded = [t for t in tensors.values() if t.cut.shape != t.shape]
    if not padded:
        return []
    one = padded[0]
    text = (
        f"{one.name} is written with {one.cut.shape[0] - one.shape[0]} rows of padding behind its {one.shape[0]}, "
        f"as the run had it: dcp.load asks for the model's own size; say padded_vocab={one.shape[0]} for one without"
    )
    return [Finding("vocabulary-padding", "info", found=text, about="target")]


def _renamed(source: Catalog, tensors: Mapping[str, Tensor], rules: tuple[str, ...]) -> dict[str, str]:
    """Name (aliases too) → the name in keys. ReshapeError for a rule that is none, and where two names collide."""
    parsed: list[tuple[re.Pattern[str], str]] = []
    for rule in rules:
        pattern, equals, replacement = rule.partition("=")
        try:
            if not equals:
                raise re.error("there is no = in it")
            parsed.append((re.compile(pattern), replacement))
        except re.error as error:
            raise ReshapeError(f"rename {rule!r}: expected regex=replacement: {error}") from None
    found = {}
    for name in (n for t in tensors.values() for n in (t.name, *t.aliases)):
        new = name
        for found_by, text in parsed:
            try:
                new = found_by.sub(text, new)
            except (re.error, IndexError) as error:
                raise ReshapeError(f"rename: {name} by {found_by.pattern}={text}: {error}") from None
        found[name] = new
    twice = [new for new, count in Counter(found.values()).items() if count > 1 or not new]
    if twice:
        names = [name for name, new in found.items() if new == twice[0]]
        raise ReshapeError(f"{source.path}: rename makes {twice[0]!r} of {' and '.join(names[:3])}: names must differ")
    return found


def payload(target: Catalog) -> int:
    """Bytes of tensors in all files: every chunk once."""
    return sum(
        math.prod(target.tensors[name].cut.shape) * target.tensors[name].states[state].itemsize
        for name, state in target.placements
    )
