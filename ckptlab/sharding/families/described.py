"""A checkpoint's model as the few numbers that `PaperModel` is made of, from shapes and from whoever tells the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ckptlab.arguments import only_said
from ckptlab.catalog import DTYPES, PARAM, Catalog
from ckptlab.errors import LayoutError
from ckptlab.sharding.families.config import config, model_type
from ckptlab.sharding.families.lines import SIDES
from ckptlab.sharding.families.numbers import numbers, told
from ckptlab.sharding.families.registered import found as family_of
from ckptlab.sharding.families.registered import towards, unwrapped
from ckptlab.sharding.stages import balanced, stage_of
from ckptlab.sharding.transformer import PaperModel
from ckptlab.words import some

NEEDED = ("layers", "hidden", "heads", "vocab")
"""Facts without which no model is described."""

_WORDS: Mapping[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer"),
    "hidden": ("hidden_size", "n_embd"),
    "heads": ("num_attention_heads", "n_head"),
    "kv_heads": ("num_key_value_heads",),
    "ffn": ("moe_intermediate_size", "intermediate_size", "n_inner"),
    "vocab": ("vocab_size",),
    "head_dim": ("head_dim",),
    "experts": ("num_local_experts", "num_experts"),
    "shared_ffn": ("shared_expert_intermediate_size",),
}
"""A model's numbers by transformers' words for them (5.24, `models/*/configuration_*.py`)."""

_GATED = re.compile(r"\.(gate_proj|w3)\.weight$")
_LAYER = re.compile(r"\.(?:layers|h)\.(\d+)\.")


@dataclass(frozen=True)
class Described:
    """A model; the pp stage of each of its layers; to how many experts its router sends a token, where that is said."""

    model: PaperModel
    stages: Mapping[int, int]
    active: int | None = None


def described(catalog: Catalog, facts: Mapping[str, Any]) -> Described:
    """What a checkpoint's model is. facts: what nothing in the checkpoint tells, by the names of PaperModel's numbers.
    LayoutError where too little is known, and where a fact contradicts what is."""
    if unknown := facts.keys() - {field.name for field in fields(PaperModel)}:
        names = ", ".join(field.name for field in fields(PaperModel))
        raise LayoutError(f"{catalog.path}: no fact of a model: {', '.join(sorted(unknown))}; there are {names}")
    if catalog.training.numbers:
        model = PaperModel(**catalog.training.numbers)
        return Described(_agreeing(model, facts), catalog.training.layer_stages)
    said, stages, gated = _seen(catalog, facts)
    found = {name: said[word] for name, words in _WORDS.items() for word in reversed(words) if said.get(word)}
    if dense := said.get("mlp_only_layers"):
        if list(dense) != list(range(len(dense))):
            raise LayoutError(f"{catalog.path}: layers {list(dense)} have no experts: only the first ones may be such")
        found |= {"dense_layers": len(dense), "dense_ffn": said["intermediate_size"]}
    found |= {"gated": gated, "tied": bool(said["tie_word_embeddings"])} if said else {}
    try:
        model = _agreeing(PaperModel(**{"dtype": _dtype(catalog), **facts, **found}), facts)
    except LayoutError as error:
        raise LayoutError(f"{catalog.path}: {error}") from None
    if not stages:
        starts = balanced([0, *[1] * model.layers, 0, 0], catalog.mesh.pp)
        stages = {i: stage_of(1 + i, starts) for i in range(model.layers)}
    active = said.get("num_experts_per_tok")
    return Described(model, stages, active if isinstance(active, int) else None)


def _seen(catalog: Catalog, facts: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[int, int], bool]:
    """What a config.json says of the model, or would say, the pp stage of each layer, and whether its feed-forward
    network has a gate: nothing of a model whose names no family knows, if there are facts enough."""
    bare = unwrapped(catalog)
    if all(family_of(bare.tensors, side) is None for side in SIDES):
        if missing := [name for name in NEEDED if name not in facts]:
            raise LayoutError(
                f"{catalog.path}: no family knows these names, so how the model computes is not known: give more facts "
                f"of it, by the names of ckptlab.paper_model: {', '.join(missing)}"
            )
        if not any(facts["hidden"] in tensor.shape for tensor in bare.tensors.values()):
            raise LayoutError(f"{catalog.path}: facts say hidden {facts['hidden']}, and no tensor is that long")
        return {}, {}, False
    given = only_said(heads=facts.get("heads"), kv_heads=facts.get("kv_heads"))
    seen = towards(bare, "right", **given)
    sources = list(told(catalog))
    kind = model_type(seen.tensors, told=sources)
    if kind is None:
        raise LayoutError(
            f"{catalog.path}: how a model with these names computes is not known: {some([*seen.tensors], 4)}"
        )
    made = config(kind, seen.tensors, numbers(seen, given), sources, "float32")
    if "heads" in made.missing:
        raise LayoutError(
            f'{catalog.path}: nothing says how many attention heads the model has: say it, facts={{"heads": …}}'
        )
    places = ((match, tensor.stages) for name, tensor in seen.tensors.items() if (match := _LAYER.search(name)))
    stages = {int(match[1]): on[0] for match, on in places if on}
    return made.values, stages, any(map(_GATED.search, seen.tensors))


def _agreeing(model: PaperModel, facts: Mapping[str, Any]) -> PaperModel:
    """The model, if facts do not contradict what is known of it."""
    told_by = {"kv_heads": model.keys, "ffn": model.width, "head_dim": model.head}
    for name, fact in facts.items():
        known = told_by.get(name, getattr(model, name))
        if fact is not None and fact != known:
            raise LayoutError(f"facts say {name} {fact}, the checkpoint has {known}: leave that fact out")
    return model


def _dtype(catalog: Catalog) -> str:
    """What the model computes in: as the run says, else as the weights that it computes with are stored, else bf16."""
    if catalog.training.dtype is not None:
        return catalog.training.dtype
    stored = {tensor.states.get(PARAM) for tensor in catalog.tensors.values()}
    return next((name for name, dtype in DTYPES.items() if dtype in stored), "bf16")
