"""Layouts of a checkpoint with tensor parallelism that says nothing of them, as far as its data and names prove them.

Shards that are equal on all ranks are replicas; shards of different sizes are cut along that dim; a name of a known
family says how a tensor is cut, where shapes beside it and the shards' values do not speak against it. What is not
proven is asked for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ckptlab.findings import Faults, Finding, Where, not_read_yet
from ckptlab.formats.deepspeed.files import StepFolder
from ckptlab.formats.deepspeed.header import Header, Shape
from ckptlab.formats.deepspeed.layouts import UniversalInfo
from ckptlab.formats.deepspeed.module import ModuleWeights
from ckptlab.layout import Layout, cut_dim
from ckptlab.sharding.strategies import (
    GPT_NEOX,
    MEGATRON,
    MEGATRON_SWIGLU,
    MLP_LAYERS,
    REGISTRY,
    Convention,
    Strategy,
    column,
    replicated,
)
from ckptlab.stored import Stored
from ckptlab.words import number_of, some

_COMPARED = 1 << 16  # elements at the beginning and the end of a shard that are compared
_CONVENTIONS = {"Megatron": MEGATRON, "Megatron with SwiGLU": MEGATRON_SWIGLU, "GPT-NeoX": GPT_NEOX}
_VOCABULARY = re.compile(r"(?:.*[._])?(?:word_embeddings|final_linear|lm_head|output_layer)\.weight")


@dataclass(frozen=True)
class Inferred(Strategy):
    """A strategy: what a user said, and what was proven beside it."""

    said: Strategy | None
    layouts: Mapping[str, Layout]

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        told = self.said.layout(name, shards) if self.said is not None else None
        return told if told is not None else self.layouts.get(name)


def infer(folder: StepFolder, module: ModuleWeights, said: Strategy | None, faults: Faults) -> Inferred:
    """The layouts of all tensors on whose cut nothing has a say. `faults` is told of each inference, and of what is to
    be asked for."""
    shapes = {name: [by_tp[t] for t in sorted(by_tp)] for name, by_tp in _shapes(folder, module).items()}
    left = {n: s for n, s in shapes.items() if s[0] and (said is None or said.layout(n, s) is None)}
    family, named = _convention(left)
    found: dict[str, Layout] = {}
    reasons: dict[str, list[str]] = {}
    unknown: list[tuple[str, str]] = []
    for name, shards in left.items():
        layout, reason = _proven(shards, _data(folder, module, name), named.get(name), family)
        if layout is None:
            unknown.append((name, reason))
        else:
            found[name] = layout
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        where = Where(tensors=tuple(names))
        told = f"{number_of(len(names), 'layout')} inferred: {reason}"
        todo = "say a strategy if that is not so"
        text = f"{folder.path}: {told} ({some(names, 2)})"
        faults.report(
            Finding("layouts-inferred", "info", where, "layouts that the run told", told, todo, "headers", text)
        )
    if unknown:
        name, reason = unknown[0]
        more = f" ({number_of(len(unknown) - 1, 'more tensor')} likewise)" if unknown[1:] else ""
        faults.report(
            not_read_yet(
                f"{folder.path}: tp {folder.mesh.tp}, and no universal_checkpoint_info says how the tensors are cut. "
                f"Of {name} nothing proves it: {reason}{more}. Give a strategy: a registered one "
                f"({', '.join(REGISTRY.names())}), or {{pattern: notation}}"
            )
        )
    return Inferred(said, found)


def vocabulary(folder: StepFolder) -> UniversalInfo | None:
    """The true size of the vocabulary, where the training program told it (`checkpoint_info`)."""
    told = folder.first.content.get("checkpoint_info")
    size = told.get("original_vocab_size") if isinstance(told, Mapping) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        return None
    rows: dict[str, Counter[int]] = {}  # of a tensor on each stage, over its tp ranks
    for (stage, _), shapes in folder.trained.items():
        for name in filter(_VOCABULARY.fullmatch, shapes):
            rows.setdefault(name, Counter())[stage] += (shapes[name] or (0,))[0]
    patterns = [f"{re.escape(name)}$" for name, on_stages in rows.items() if min(on_stages.values()) >= size]
    info = {"vocabulary_parameter_patterns": patterns, "original_vocab_size": size}
    return UniversalInfo.of(Header(folder.first.path, info, "checkpoint_info"), folder.mesh.tp) if patterns else None


def _shapes(folder: StepFolder, module: ModuleWeights) -> dict[str, dict[int, Shape]]:
    """Shapes of every tensor's shards by tp rank, without buffers, and experts that are whole since tp ranks are dealt
    them."""
    dealt = folder.experts.degree if folder.experts.over_tp else lambda name: None
    stored = {name: by_tp for name, by_tp in module.shapes.items() if module.kinds[name] != "buffer"}
    shapes = folder.shards | {name: by_tp for name, by_tp in stored.items() if name not in folder.shards}
    return {n: by_tp for n, by_tp in shapes.items() if len(by_tp) == folder.mesh.tp and dealt(n) is None}


def _data(folder: StepFolder, module: ModuleWeights, name: str) -> list[Stored]:
    """What the tp ranks of the first stage have of a module weight; nothing where it is not stored whole."""
    pieces = module.pieces.get(name, {})
    stage = min((h["pp"] for h in pieces), default=0)
    held = [fragments for h, fragments in pieces.items() if h["pp"] == stage]
    alone = len(held) == folder.mesh.tp and all(len(fragments) == 1 for fragments in held)
    return [fragments[0].stored for fragments in held] if alone else []


def _convention(shapes: Mapping[str, list[Shape]]) -> tuple[str, dict[str, Layout]]:
    """The convention whose names these are, and what it says of each; "" and nothing where none knows the most."""
    best: tuple[str, dict[str, Layout]] = ("", {})
    for name, convention in _CONVENTIONS.items():
        known = replace(convention, known=True)
        says = {n: layout for n, s in shapes.items() if (layout := known.layout(n, s)) is not None}
        fits = all(_fits(n, shapes, convention) for n in says)
        of_neox = any(n.endswith(("final_linear.weight", "mlp.linear1.weight")) for n in shapes)
        if fits and len(says) > len(best[1]) and (convention is GPT_NEOX) == of_neox:
            best = name, says
    return best


def _fits(name: str, shapes: Mapping[str, list[Shape]], convention: Convention) -> bool:
    """Whether shapes beside a tensor agree with what a convention says of it: an MLP's first layer has as many outputs
    as its second has inputs, twice as many where it holds gate and up; a fused q, k, v has three times its inputs."""
    shards = shapes[name]
    rows = sum(s[0] for s in shards)
    for first, second in MLP_LAYERS:
        beside = shapes.get(name.replace(f"{first}.weight", f"{second}.weight"))
        if name.endswith(f"{first}.weight") and beside is not None:
            return rows == sum(s[1] for s in beside) * (2 if convention is MEGATRON_SWIGLU else 1)
    if name.endswith("query_key_value.weight"):
        return rows == 3 * shards[0][1]
    return True


def _proven(shards: list[Shape], data: list[Stored], said: Layout | None, family: str) -> tuple[Layout | None, str]:
    """(layout, why); (None, what is missing) where nothing proves one."""
    apart = [d for d in range(len(shards[0])) if len({s[d] for s in shards}) > 1]
    dim = None if said is None else cut_dim(said, "tp")
    if apart:
        if len(apart) > 1 or (said is not None and dim != apart[0]):
            return None, f"its shards have shapes {', '.join(map(str, dict.fromkeys(shards)))}"
        sizes = "the shards differ in size along one dim"
        return (column(shards, apart[0]), sizes) if said is None else (said, f"{sizes}, as names of {family} say")
    if not data:
        named = f"the names are those of {family}; no weights are stored that could be compared"
        return (said, named) if said is not None else (None, "its name is of no family that ckptlab knows")
    equal, varied = _compared(data)
    if equal and varied and dim is None:
        return replicated(len(shards[0])), "the shards are equal on all tp ranks: replicas"
    if equal and varied:
        return None, f"its shards are equal on all tp ranks, where names of {family} say that it is cut"
    if said is None:
        differ = "its shards are all one number" if equal else "its shards differ"
        return None, f"{differ}, and its name is of no family that ckptlab knows"
    if dim is None and not equal:
        also = '; where they are parts of a sum, say replicas="sum"' if said.replicas == "sum" else ""
        return None, f"names of {family} say that it is replicated, and its copies differ{also}"
    return said, f"the names are those of {family}"


def _compared(data: list[Stored]) -> tuple[bool, bool]:
    """(all shards are equal, and not all elements are one number), by their beginnings and ends."""
    first = list(_ends(data[0]))
    equal = all(np.array_equal(a, b) for one in data[1:] for a, b in zip(first, _ends(one), strict=True))
    return equal, any(not np.array_equal(a, np.broadcast_to(first[0].reshape(-1)[:1], a.shape)) for a in first)


def _ends(stored: Stored) -> Iterator[np.ndarray]:
    flat = stored.reshape((stored.numel,)) if stored.contiguous else None
    if flat is None:
        yield stored.flat
        return
    count = min(_COMPARED, stored.numel)
    for start in dict.fromkeys((0, stored.numel - count)):
        bits = flat.elements(start, count).map()
        yield bits.view(f"u{bits.dtype.itemsize}")
