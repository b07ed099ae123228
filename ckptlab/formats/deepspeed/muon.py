"""Muon's momentum at ZeRO-1 and 2, which dp does not cut.

Muon makes whole matrices orthogonal, so of each that lies in a rank's partition, even in part, the rank keeps the
momentum whole, one after the other (DeepSpeed 0.19, `_muon_momentum_buffer` in `runtime/zero/stage_1_and_2.py`). With
offload_optimizer, at ZeRO-3 and in BF16_Optimizer it lies as everything else.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ckptlab.catalog import FlatGroup, Fragment, ParameterGroup
from ckptlab.errors import ReshapeError
from ckptlab.formats.deepspeed.optimfile import OptimizerFile, Wrapper
from ckptlab.plan import FlatBuffer, Holder

MOMENTUM = "momentum_buffer"
_MARK = "use_muon"  # in the options of a parameter group

Piece = tuple[str, int, Fragment]


def kept_whole(files: Sequence[OptimizerFile], b: int, flat: FlatBuffer) -> tuple[str, ...]:
    """The states of a buffer of which the files of its dp ranks have whole tensors, by their sizes. (Where a rank has
    the beginning of a tensor, they are larger than its partition.)"""
    if files[0].wrapper is not Wrapper.ZERO12 or MOMENTUM not in files[0].states[b]:
        return ()
    sizes = [file.states[b][MOMENTUM].numel if MOMENTUM in file.states[b] else 0 for file in files]
    whole = [sum(flat.counts[i] for i in held(flat, d)) for d in range(flat.dp)]
    cut = all(flat.size(d) - flat.padding(d) <= n <= flat.size(d) for d, n in enumerate(sizes))
    return (MOMENTUM,) if sizes == whole and not cut else ()


def pieces(files: Sequence[OptimizerFile], ranks: Sequence[int], b: int, flat: FlatBuffer) -> Iterator[Piece]:
    """(tensor, dp rank, where its momentum lies) of all tensors of a buffer, by the names in it: a copy for each rank
    that has some of a tensor."""
    for d, (rank, file) in enumerate(zip(ranks, files, strict=True)):
        start = 0
        for i in held(flat, d):
            stored = file.states[b][MOMENTUM].elements(start, flat.counts[i])
            yield flat.names[i], rank, Fragment(0, stored)
            start += flat.counts[i]


def of_target(
    flat_groups: Sequence[FlatGroup],
    groups: Sequence[ParameterGroup],
    wrapper: Wrapper,
    config: Mapping[str, Any],
    experts: bool,
) -> tuple[tuple[FlatGroup, ...], dict[tuple[str, str], list[Holder]]]:
    """A target's flat groups without the momentum that an engine of that configuration keeps whole, and who keeps it.
    ReshapeError where there are experts."""
    whole = [_is_whole(wrapper, config, groups[g.group]) and MOMENTUM in g.dtypes for g in flat_groups]
    if experts and any(whole):
        raise ReshapeError(
            "Muon's momentum at ZeRO-1 and 2 beside experts: ckptlab does not write it: take zero_stage=3, or write "
            "--to universal"
        )
    found: dict[tuple[str, str], list[Holder]] = {}
    for group in itertools.compress(flat_groups, whole):
        for (holder, flat), d in itertools.product(group.flats.items(), range(group.dp)):
            for i in held(flat, d):
                found.setdefault((flat.names[i], MOMENTUM), []).append(holder.with_(dp=d))
    kept = (
        replace(g, dtypes={s: d for s, d in g.dtypes.items() if s != MOMENTUM}) if w else g
        for g, w in zip(flat_groups, whole, strict=True)
    )
    return tuple(kept), found


def _is_whole(wrapper: Wrapper, config: Mapping[str, Any], group: ParameterGroup) -> bool:
    """Whether an engine of that configuration keeps the momentum of a parameter group whole."""
    zero = config.get("zero_optimization")
    offload = zero.get("offload_optimizer") if isinstance(zero, Mapping) else None
    device = offload.get("device") if isinstance(offload, Mapping) else None
    return wrapper is Wrapper.ZERO12 and bool(group.options.get(_MARK)) and device in (None, "none")


def held(flat: FlatBuffer, d: int) -> list[int]:
    """The tensors of which dp rank d has some, in order."""
    return [int(i) for i in flat.within(d)[:, 0]]
