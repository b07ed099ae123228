"""Optimizer files that stand under another dp rank's name: each says which part of the flat buffers it holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ckptlab.analysis.checkup.files import Scan, param_shapes
from ckptlab.analysis.checkup.finding import Finding, Where
from ckptlab.analysis.checkup.headers import rank_of
from ckptlab.errors import CkptlabError
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer
from ckptlab.stored import Stored

Spans = dict[str, tuple[int, int]]  # tensor → (start, count) in a partition


def swapped(found: Scan, mesh: Mesh) -> Iterator[Finding]:
    """Findings on files whose `param_slice_mappings` are those of another dp rank (ZeRO-1 and 2, which write them)."""
    for name, content in found.of_kind("optim").items():
        rank = rank_of(found.parsed[name], mesh)
        head = _head(found, found.parsed[name].mp)
        if head is None or rank["dp"] >= mesh.dp:
            continue
        try:
            holder = _holder(content["optimizer_state_dict"], param_shapes(head), rank["dp"], mesh.dp)
        except (CkptlabError, KeyError, TypeError, ValueError, AttributeError, IndexError):
            continue  # headers of another form: the reader says what is wrong with them
        if holder is not None:
            yield Finding(
                "swapped-file",
                "error",
                Where(files=(name,), ranks=(rank,)),
                f"the partition of dp {rank['dp']}",
                f"{name} holds the partition of dp {holder}",
                "give the files back their own names: they were swapped when they were copied",
            )


def _head(found: Scan, mp: int) -> Mapping[str, Any] | None:
    return next((c for n, c in found.heads.items() if found.parsed[n].mp == mp), None)


def _holder(state: Mapping[str, Any], groups: list[Mapping[str, Any]], mine: int, dp: int) -> int | None:
    """The dp rank whose partition the file holds in every group; None if that is its own, or nobody's."""
    alignment = state.get("param_alignment_paddings")
    holders = set(range(dp))
    for b, (mapping, shapes) in enumerate(zip(state["param_slice_mappings"], groups, strict=True)):
        counts = [math.prod(int(n) for n in shape) for shape in shapes.values()]
        flat = FlatBuffer.contiguous(
            list(shapes), counts, dp, alignment[b] if alignment else None, _partition(state, b)
        )
        said = {str(n): (int(a.start), int(a.numel)) for n, a in mapping.items() if int(a.numel)}
        holders &= {d for d in range(dp) if _spans(flat, d) == said}
    return min(holders) if holders and mine not in holders else None


def _partition(state: Mapping[str, Any], b: int) -> int:
    """Elements of each rank's partition of group b: what a moment has, whose padding is kept."""
    base = state["base_optimizer_state"]
    held = base["state"][b] if isinstance(base, Mapping) else base[b]
    fp32 = state["single_partition_of_fp32_groups"][b]
    return max(v.numel for v in (fp32, *held.values()) if isinstance(v, Stored))


def _spans(flat: FlatBuffer, d: int) -> Spans:
    return {flat.names[i]: (int(start), int(count)) for i, _, start, count in flat.within(d)}
