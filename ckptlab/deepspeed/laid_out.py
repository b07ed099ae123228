"""How a parameter that AutoTP or AutoEP has laid out holds its tensor: what they attach to it, as cuts.

Sources: DeepSpeed 0.19.8, `checkpoint/universal_checkpoint.py` (`_resolve_autotp_partition`,
`_resolve_autoep_partition`), `module_inject/layers.py` (`_build_param_uc_restore_meta`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptlab.deepspeed.constants import (
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
    DS_AUTOTP_UC_META,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
)
from ckptlab.errors import LayoutError, UnsupportedError
from ckptlab.formats.deepspeed import autoep
from ckptlab.formats.deepspeed.autotp import AffineMap
from ckptlab.formats.deepspeed.header import Header
from ckptlab.formats.deepspeed.rows import in_parts
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored

Held = tuple[Stored, Cut, tuple[int, ...]]
"""The stored whole in the shape in which it is cut, the cut, and the coordinate of a rank in it."""

WIDTHS = 0.4  # the version from which widths are recorded; before, sub-parameters were cut evenly


def by_autotp(path: str, parameter: Any, stored: Stored, rank: int, tp: int) -> Held | None:
    """What a tp rank holds by what AutoTP attached; None where it attached nothing that says it.

    UnsupportedError where AutoTP itself could not describe the cut, CheckpointError or LayoutError where what it says
    fits no tensor.
    """
    meta = getattr(parameter, DS_AUTOTP_UC_META, None)
    if not meta:
        return None
    header = Header.of(path, meta, DS_AUTOTP_UC_META)
    conversion, mesh = header.inside("conversion"), Mesh(tp=tp)
    if reason := conversion.values.get("unsupported_reason"):
        raise UnsupportedError(f"{path}: AutoTP cannot describe how it cut this parameter: {reason}")
    ranks = conversion.inside("affine_map").inside("ranks").values
    if {str(r) for r in ranks} == {str(r) for r in range(tp)}:
        found = AffineMap.of(conversion.inside("affine_map"), tp)
        cut = found.layout().resolve(found.logical, mesh)
        return stored.reshape(found.logical), cut, cut.coordinate({"tp": rank})
    if header.values.get("replicated"):
        cut = Cut.whole(stored.shape, mesh)
        return stored, cut, cut.coordinate({"tp": rank})
    if "partition_dim" not in header or "logical_shape" not in header:
        return None
    shape = tuple(header.integers("logical_shape"))
    cut = _layout(header, shape, tp).resolve(shape, mesh)
    return stored.reshape(shape), cut, cut.coordinate({"tp": rank})


def _layout(header: Header, shape: Sequence[int], tp: int) -> Layout:
    """Sub-parameters of recorded or even widths, recorded widths, or even ones."""
    dim = header.integer("partition_dim")
    if dim >= len(shape):
        raise header.odd("partition_dim", f"a dim of {tuple(shape)}")
    version = header.values.get(UNIVERSAL_CHECKPOINT_VERSION_KEY, 0.0)
    widths: list[Any]
    if sizes := _sub_parameters(header):
        widths = header.several("sub_param_shard_widths") if version >= WIDTHS else [even(n, tp) for n in sizes]
        if len(widths) != len(sizes):
            raise header.odd("sub_param_shard_widths", f"widths of {len(sizes)} sub-parameters")
    else:
        widths = [header.integers("partition_sizes") or even(shape[dim], tp)]
    if any(len(of) != tp for of in widths) or sum(map(sum, widths)) != shape[dim]:
        raise LayoutError(f"widths of {widths} are not those of {shape[dim]} rows on {tp} tp ranks")
    return in_parts(len(shape), dim, [tuple(of) for of in widths])


def _sub_parameters(header: Header) -> list[int]:
    """The whole widths of the sub-parameters; nothing where there are none."""
    if "sub_param_sizes" in header:
        return header.integers("sub_param_sizes", 1)
    said = header.values.get("sub_param_shape")
    shape = getattr(said, "shape", said)
    if shape is None:
        return []
    part = shape[getattr(said, "partition_dim", header.integer("partition_dim"))]
    return [int(n) for n in part] if isinstance(part, (tuple, list)) else [int(part)]


def even(total: int, tp: int) -> list[int]:
    """The widths of an even cut. LayoutError where there is none."""
    if total % tp:
        raise LayoutError(f"{total} rows are not divisible by tp {tp}, and the parameter records no widths")
    return [total // tp] * tp


def by_autoep(path: str, parameter: Any, stored: Stored, rank: int) -> Held | None:
    """What an ep rank holds by what AutoEP attached; None where it attached nothing.

    CheckpointError where that has another form, LayoutError where it is of another rank or shape.
    """
    meta = getattr(parameter, DS_AUTOEP_UC_META, None)
    if meta is None:
        return None
    header = Header.of(path, meta, DS_AUTOEP_UC_META)
    shape, told = tuple(header.integers(AUTOEP_PARAM_LOGICAL_SHAPE)), header.integer(AUTOEP_PARAM_EP_RANK)
    if told != rank or shape != stored.shape:
        raise LayoutError(
            f"{path}: a tensor of shape {stored.shape} for ep rank {rank}; the parameter is of ep rank {told} and of "
            f"shape {shape}"
        )
    ranks = autoep.placement(header)
    cut = (
        autoep.Fused(0, "", shape[0], ranks)
        .layout(shape)
        .resolve(shape, Mesh(dp=len(ranks)).split("dp", ep=len(ranks)))
    )
    return stored, cut, cut.coordinate({"ep": rank})
