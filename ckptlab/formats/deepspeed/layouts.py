"""Layouts out of `universal_checkpoint_info`: the lists of regular expressions by which a training program tells
DeepSpeed how its tensors are cut over tensor parallel ranks.

Where AutoTP recorded an affine map of a tensor, that comes first. The order of precedence of the lists is that of
DeepSpeed 0.19.8's `ds_to_universal.merge_tp_slices`: replicated, averaged, two sub-parameters, sub-parameters, row
parallel, else column parallel. Patterns match from the start of the name, as there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ckptlab.errors import CheckpointError
from ckptlab.formats.deepspeed.autotp import AffineMaps
from ckptlab.formats.deepspeed.header import Header
from ckptlab.formats.deepspeed.rows import in_parts
from ckptlab.layout import Layout
from ckptlab.sharding.strategies import Shape, column, cut, replicated


@dataclass(frozen=True)
class SubParameters:
    """An entry of `parameter_with_sub_params`: the shard seen as `shape`, whose dim `partition_dim` holds
    sub-parameters of the given whole sizes, each cut on its own. `widths[i][tp]`: recorded shard widths (from version
    0.4)."""

    pattern: str
    shape: tuple[Any, ...]
    partition_dim: int
    widths: tuple[tuple[int, ...], ...] | None


@dataclass(frozen=True)
class UniversalInfo:
    """A strategy: DeepSpeed's regex lists. `trusted`: the lists say enough for tensors that they do not name (a
    checkpoint of tp 1 may lack those of replicated and row-parallel tensors)."""

    replicated: tuple[str, ...]
    averaged: tuple[str, ...]
    row: tuple[str, ...]
    two_sub: tuple[str, ...]
    sub: tuple[SubParameters, ...]
    vocabulary: tuple[str, ...]
    pipeline_replicated: tuple[str, ...]
    original_vocab_size: int | None
    affine: AffineMaps
    trusted: bool

    @staticmethod
    def of(info: Header, tp: int) -> UniversalInfo:
        """CheckpointError for lists of another form, and for patterns that are no regular expressions."""
        replicated = _patterns(info, "tp_replicated_parameter")
        row = _patterns(info, "parameter_with_row_parallelism")
        return UniversalInfo(
            replicated=replicated,
            averaged=_patterns(info, "parameter_to_average"),
            row=row,
            two_sub=_patterns(info, "parameter_with_2_sub_params_cat_dim_0"),
            sub=tuple(_sub_parameters(info, tp)),
            vocabulary=_patterns(info, "vocabulary_parameter"),
            pipeline_replicated=_patterns(info, "pipeline_replicated_parameter"),
            original_vocab_size=info.integer("original_vocab_size", 1) if "original_vocab_size" in info else None,
            affine=AffineMaps.of(info, tp),
            trusted=tp > 1 or bool(replicated or row),
        )

    def is_vocabulary(self, name: str) -> bool:
        """Dim 0 is the vocabulary, padded for the ranks: AutoTP pads none."""
        return not self.affine and _matches(self.vocabulary, name)

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        """See `Strategy.layout`. CheckpointError where the lists contradict the shards."""
        ndim, tp = len(shards[0]), len(shards)
        if (found := self.affine.of_tensor(name)) is not None:
            return found.layout()
        if self.is_vocabulary(name) and self.original_vocab_size is not None:
            padded = sum(s[0] for s in shards)
            if padded < self.original_vocab_size:
                raise CheckpointError(
                    f"{name}: {padded} rows over tp {tp}, but original_vocab_size is {self.original_vocab_size}: "
                    "universal_checkpoint_info does not belong to this checkpoint"
                )
            return column(shards)
        if _matches(self.replicated, name):
            return replicated(ndim)
        if _matches(self.averaged, name):
            return replicated(ndim, replicas="mean")
        if _matches(self.two_sub, name):
            return cut(ndim, 0, "2 tp {}")
        for entry in self.sub:
            if _matches([entry.pattern], name):
                return _sub_layout(name, entry, shards)
        if _matches(self.row, name):
            if ndim < 2:
                raise CheckpointError(
                    f"{name}: parameter_with_row_parallelism lists it, but its shards have shape {shards[0]}: "
                    "universal_checkpoint_info does not belong to this checkpoint"
                )
            return column(shards, dim=1)
        return column(shards) if ndim and self.trusted else None


def _matches(patterns: Iterable[str], name: str) -> bool:
    return any(re.match(p, name) for p in patterns)


def _patterns(info: Header, key: str) -> tuple[str, ...]:
    key = f"{key}_patterns" if f"{key}_patterns" in info else key
    return tuple(_pattern(info, key, p) for p in info.names(key))


def _pattern(info: Header, key: str, pattern: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise CheckpointError(f"{info.path}: {info.at}.{key}: {pattern!r} is no regular expression: {e}") from None
    return pattern


def _sub_parameters(info: Header, tp: int) -> Iterable[SubParameters]:
    key = "parameter_with_sub_params"
    widths = info.inside("sub_param_shard_widths")
    for entry in info.several(key):
        fields = Header.of(info.path, getattr(entry, "attributes", entry), f"{info.at}.{key}")
        shape = tuple(tuple(d) if isinstance(d, (list, tuple)) else d for d in fields.several("shape"))
        dim = fields.integer("partition_dim")
        for size in [n for d in shape for n in (d if isinstance(d, tuple) else (d,))]:
            if not isinstance(size, int) or size < 1:
                raise fields.odd("shape", "sizes, or tuples of them")
        if dim >= len(shape):
            raise fields.odd("partition_dim", f"a dim of {shape}")
        for pattern in fields.names("patterns"):
            rows = [
                tuple(Header(info.path, {pattern: row}, widths.at).integers(pattern)) for row in widths.several(pattern)
            ]
            if any(len(row) != tp for row in rows):
                raise widths.odd(pattern, f"widths on each of {tp} tp ranks")
            yield SubParameters(_pattern(info, key, pattern), shape, dim, tuple(rows) or None)


def _sub_layout(name: str, entry: SubParameters, shards: Sequence[Shape]) -> Layout:
    """Each sub-parameter cut on its own: as recorded, else evenly. Before version 0.4 a plain number in the partition
    dim is how many equal sub-parameters there are."""
    ndim, tp, dim = len(shards[0]), len(shards), entry.partition_dim
    if len(entry.shape) != ndim:
        raise CheckpointError(
            f"{name}: parameter_with_sub_params describes it with {len(entry.shape)} dims {entry.shape}, its shards "
            f"have {ndim} {tuple(shards[0])}: give its layout with a strategy"
        )
    if entry.widths is not None:
        return in_parts(ndim, dim, entry.widths)
    wholes = entry.shape[dim]
    if not isinstance(wholes, tuple):
        wholes = (sum(s[dim] for s in shards) // wholes,) * wholes
    if any(n % tp for n in wholes):
        raise CheckpointError(
            f"{name}: sub-parameters of {wholes} rows are not all divisible by tp {tp}, and "
            "universal_checkpoint_info records no sub_param_shard_widths: give its layout with a strategy"
        )
    return in_parts(ndim, dim, [(n // tp,) * tp for n in wholes])
