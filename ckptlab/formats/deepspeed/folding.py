"""What files say of AutoEP beside AutoTP, of whose ranks experts are then dealt to all ("folding"): whose they are.

DeepSpeed loads none that do not say so, or say it of other ranks. Source: DeepSpeed 0.19.8,
`checkpoint/autoep_universal.py` (`validate_folding_metadata`), engine (`_validate_autoep_folding_checkpoint_metadata`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ckptlab.errors import UnsupportedError
from ckptlab.formats.deepspeed.header import Header
from ckptlab.mesh import Mesh

VERSION = 1
EXPERTS = "routed_expert"
_FAMILIES = {".experts.": EXPERTS, ".router.": "router_gate_replicated", ".shared_experts": "shared_expert"}
_OVER = {"dense": "dense_dp", EXPERTS: "edp", "zero_optimizer_state": "per_family"}  # who has what a file holds


def said(mesh: Mesh, ep: int, rank: int, family: str, families: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Of a rank's file of a family: "dense" (a model file), "routed_expert" or "zero_optimizer_state". families: of
    what is in it, tensor by tensor."""
    of_experts = family == EXPERTS
    found = {
        "version": VERSION,
        "tp_size": mesh.tp,
        "tp_rank": rank % mesh.tp,
        "ep_size": ep,
        "ep_rank": rank % ep,
        "etp_size": 1,
        "etp_rank": 0,
        "zero_partition_group": _OVER[family],
        "zero_partition_rank": rank // ep if of_experts else rank // mesh.tp,
        "zero_partition_count": mesh.size // ep if of_experts else mesh.dp,
        "dispatch_strategy": "route_full_partition_dispatch",
        "shared_expert_placement": "tp_sharded",
        "family": family,
    }
    return found if families is None else {**found, "param_families": dict(families)}


def of_modules(names: Iterable[str]) -> dict[str, str]:
    """The families of what stands in a module."""
    return {name: _family(name) for name in names}


def of_buffer(name: str, ranks: int, part: int) -> dict[str, Any]:
    """The family of a tensor in a flat buffer of ZeRO-1 or 2 that is cut over so many ranks, on the one that has this
    part."""
    family = _family(name)
    return {
        "family": family,
        "zero_partition_group": _OVER.get(family, "dense_dp"),
        "zero_partition_rank": part,
        "zero_partition_count": ranks,
    }


def check(said: Header) -> None:
    """UnsupportedError where experts beside AutoTP lie in another way than they are read here: whole on every rank that
    has them."""
    version, etp = said.integer("version"), said.integer("etp_size", 1) if "etp_size" in said else 1
    if version > VERSION or etp > 1:
        raise UnsupportedError(
            f"{said.path}: {said.at} is of version {version} and etp_size {etp}, ckptlab knows version {VERSION} and "
            "whole experts (etp_size 1): a newer ckptlab may read it"
        )


def _family(name: str) -> str:
    return next((family for part, family in _FAMILIES.items() if part in name), "dense")
