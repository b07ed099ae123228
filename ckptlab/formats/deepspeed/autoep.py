"""Experts that AutoEP made of a model's own (DeepSpeed 0.19): all of a layer in three tensors, cut over `ep`.

A layer's experts are `PREFIX.w1`, `PREFIX.w2` and `PREFIX.w3`, of dims (expert, out, in). Which experts a rank of the
expert parallel group has, and in which order, is recorded in `ds_autoep_layers`. Below ZeRO-3 the weights lie expert by
expert in the files that DeepSpeed-MoE has, as `PREFIX.w1.E`. Source: DeepSpeed 0.19.8, engine (`_save_moe_checkpoint`),
`checkpoint/autoep_affine.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ckptlab.formats.deepspeed import folding
from ckptlab.formats.deepspeed.header import Content, Header
from ckptlab.formats.deepspeed.rows import RowsLayout, Runs
from ckptlab.layout import Layout
from ckptlab.sharding.strategies import Shape

KEY, OLD_KEY = "ds_autoep_layers", "autoep_layers"
FOLDING = "folding"  # what is said of it beside AutoTP, of whose ranks experts are then dealt to all
VERSION = 1  # of `expert_placement`
WEIGHTS = ("w1", "w2", "w3")
DIMS = ("expert", "out", "in")
_MANY = 1 << 20  # experts of a layer: more are none


@dataclass(frozen=True)
class Fused:
    """The experts of one layer. `number`: of the layer, as files count; `ranks[r]`: those that ep rank r has, in the
    order in which its shards hold them."""

    number: int
    prefix: str
    total: int
    ranks: tuple[tuple[int, ...], ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f"{self.prefix}.{weight}" for weight in WEIGHTS)

    @property
    def router(self) -> str:
        """How the names of the layer's router begin."""
        return f"{self.prefix.removesuffix('experts')}router."

    @property
    def ep(self) -> int:
        """Over how many ranks they are spread."""
        return len(self.ranks)

    def name(self, weight: str, expert: int) -> str:
        """What an expert's part of a tensor is called in the expert's own file."""
        return f"{weight}.{expert}"

    def spread(self, ep: int) -> Fused:
        """The same experts, dealt evenly to other ranks; as they are where there are as many."""
        if ep == self.ep:
            return self
        n = self.total // ep
        dealt = tuple(tuple(range(rank * n, (rank + 1) * n)) for rank in range(ep))
        return Fused(self.number, self.prefix, self.total, dealt)

    def layout(self, shape: Shape) -> Layout:
        """How a tensor of that whole shape is cut: a line of notation where ranks follow one another, else rows."""
        if tuple(itertools.chain(*self.ranks)) == tuple(range(self.total)):
            widths = tuple(map(len, self.ranks))
            sizes: dict[str, Any] = {"expert": widths} if len(set(widths)) > 1 else {}
            return Layout("(ep expert) out in", dims=DIMS, sizes=sizes)
        whole: tuple[Runs, ...] = tuple(((0, 0, n, 1, 0),) for n in shape[1:])
        rows = tuple((_runs(held), *whole) for held in self.ranks)
        return RowsLayout("(ep expert) out in", dims=DIMS, axis="ep", rows=rows)


def _runs(held: Sequence[int]) -> Runs:
    """Neighbours that are neighbours in the shard too, as one row."""
    found: list[list[int]] = []
    for place, expert in enumerate(held):
        if found and found[-1][0] + found[-1][2] == expert:
            found[-1][2] += 1
        else:
            found.append([expert, place, 1])
    return tuple((start, place, n, 1, 0) for start, place, n in found)


def layers(path: str, content: Content) -> tuple[Fused, ...]:
    """What a model file says of them. CheckpointError for an entry of another form, UnsupportedError for one of a newer
    version."""
    header = Header(path, content)
    if content.get(FOLDING) is not None:
        folding.check(header.inside(FOLDING))
    key = KEY if content.get(KEY) else OLD_KEY
    return tuple(_layer(entry) for entry in header.dictionaries(key)) if content.get(key) else ()


def _layer(entry: Header) -> Fused:
    total, ep = entry.integer("num_experts", 1), entry.integer("ep_size", 1)
    if max(total, ep) > _MANY:
        raise entry.odd("num_experts", f"fewer than {_MANY:,} experts and ranks")
    prefix = entry.values.get("expert_key_prefix")
    if not isinstance(prefix, str):
        raise entry.odd("expert_key_prefix", "a name")
    if entry.values.get("expert_placement") is None:  # before it was recorded, all were dealt evenly
        if total % ep:
            raise entry.odd("num_experts", f"a multiple of ep_size {ep}")
        return Fused(entry.integer("moe_layer_id"), prefix, total, ((*range(total),),)).spread(ep)
    ranks = placement(entry)
    if len(ranks) != ep or set(itertools.chain(*ranks)) != set(range(total)):
        raise entry.inside("expert_placement").odd("ranks", f"{total} experts on {ep} ranks")
    return Fused(entry.integer("moe_layer_id"), prefix, total, ranks)


def placement(entry: Header) -> tuple[tuple[int, ...], ...]:
    """Which experts each ep rank has, by the `expert_placement` of an entry."""
    placed = entry.inside("expert_placement")
    placed.refuse_newer(VERSION)
    ranks = {of_rank.integer("rank"): tuple(of_rank.integers("experts")) for of_rank in placed.dictionaries("ranks")}
    if sorted(ranks) != list(range(len(ranks))):
        raise placed.odd("ranks", "one entry for each rank")
    return tuple(ranks[rank] for rank in range(len(ranks)))


def aliases(fused: Sequence[Fused], names: Collection[str]) -> dict[str, str]:
    """Further name → name of the routers among these: AutoEP puts a router under the name that the model's own had, too
    (`module_inject/auto_ep_layer.py`, `router_logits_capture_layer_name`)."""
    found = {}
    for layer in fused:
        inside = layer.router.removesuffix("router.")
        for name in names:
            child, _, rest = name.removeprefix(inside).partition(".")
            router = f"{layer.router}{rest}"
            if name.startswith(inside) and child != "router" and rest.startswith("gate.") and router in names:
                found[name] = router
    return found
