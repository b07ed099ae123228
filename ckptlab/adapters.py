"""Low-rank adapters (LoRA) of a run: their weights alone, as PEFT's files have them, or merged into the base.

A run that PEFT wrapped has, of a layer `X` that is adapted, `X.base_layer.weight` (frozen), `X.lora_A.default.weight`
(rank, in) and `X.lora_B.default.weight` (out, rank); of a layer that is trained as a whole `X.original_module.weight`
and `X.modules_to_save.default.weight`; of an embedding `X.lora_embedding_A.default` (rank, vocab) and B (width, rank).
What the model computes with is base + alpha / rank * B A; alpha may be another for some modules (`alpha_pattern`).
Sources: Hu et al. 2021, arXiv:2106.09685; PEFT 0.21, `tuners/lora/layer.py`, `utils/save_and_load.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ckptlab.catalog import MASTER, PARAM, Catalog, LowRank
from ckptlab.catalog.seen import identity
from ckptlab.errors import CheckpointError
from ckptlab.sharding.families.numbers import said_beside
from ckptlab.sharding.families.seen import View, seen_as
from ckptlab.words import some

_LORA = re.compile(r"(?P<module>.+)\.(?P<of>lora_(?:embedding_)?)(?P<kind>A|B)\.(?P<adapter>[^.]+)(?P<rest>\.weight)?")
_SAVED = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<rest>.+)")
_ORIGINAL = re.compile(r".+\.original_module\..+")
_OTHER = re.compile(r".*\.lora_(?!(embedding_)?[AB]\.).*")
_CONV1D = re.compile(r"(.+\.)?h\.\d+\.(attn\.c_attn|attn\.c_proj|mlp\.c_fc|mlp\.c_proj)")
PREFIX = "base_model.model."
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Adapter:
    """A low-rank adapter of a run: `pairs` names A and B of each module that it adapts, `saved` the tensors that it
    trains as a whole (the run's name → that in the model)."""

    name: str
    pairs: Mapping[str, tuple[str, str]]
    saved: Mapping[str, str]

    def ranks(self, catalog: Catalog) -> dict[str, int]:
        """The rank of each module."""
        return {module: catalog[a].shape[0] for module, (a, _) in self.pairs.items()}


def find(catalog: Catalog, name: str | None = None) -> Adapter:
    """The adapter of a run. name: which, where there are several. CheckpointError where there is none, several, or one
    of a kind that is not known here."""
    if other := [n for n in catalog.tensors if _OTHER.fullmatch(n)]:
        raise CheckpointError(f"{catalog.path}: {other[0]} is of an adapter of a kind that ckptlab does not know")
    halves: dict[str, dict[str, dict[str, str]]] = {}
    saved: dict[str, dict[str, str]] = {}
    for tensor in catalog.tensors:
        if found := _LORA.fullmatch(tensor):
            halves.setdefault(found["adapter"], {}).setdefault(found["module"], {})[found["kind"]] = tensor
        elif found := _SAVED.fullmatch(tensor):
            saved.setdefault(found["adapter"], {})[tensor] = f"{found['module']}.{found['rest']}"
    names = list(dict.fromkeys([*halves, *saved]))
    if not names or (name is not None and name not in names):
        raise CheckpointError(f"{catalog.path}: no adapter {name or ''}: its tensors are {some([*catalog.tensors], 4)}")
    if name is None and len(names) > 1:
        raise CheckpointError(f"{catalog.path}: holds the adapters {', '.join(names)}: say which")
    chosen = name or names[0]
    mine = halves.get(chosen, {})
    for module, both in mine.items():
        if lacking := {"A", "B"} - both.keys():
            raise CheckpointError(f"{catalog.path}: {module} has no lora_{min(lacking)} of the adapter {chosen}")
    pairs = {module: (both["A"], both["B"]) for module, both in mine.items()}
    return Adapter(chosen, pairs, saved.get(chosen, {}))


def has_adapter(names: Iterable[str]) -> bool:
    """Whether some of the names are an adapter's."""
    return any(_LORA.fullmatch(name) for name in names)


def told(catalog: Catalog) -> Mapping[str, Any]:
    """The adapter_config.json in the run's folder, or beside it; empty where there is none."""
    return said_beside(catalog, CONFIG) or {}


def alone(catalog: Catalog, adapter: Adapter) -> Catalog:
    """The weights of the adapter, under the names that PEFT's files have: without the adapter's own."""
    views = []
    if (bias := told(catalog).get("bias", "none")) != "none":
        raise CheckpointError(
            f"{catalog.path}: its {CONFIG} says bias {bias!r}: biases are no part of it here: merge it"
        )
    for name in (name for pair in adapter.pairs.values() for name in pair):
        shape, found = catalog[name].shape, _LORA.fullmatch(name)
        assert found is not None
        plain = f"{found['module']}.{found['of']}{found['kind']}{found['rest'] or ''}"
        views.append(View(_with_prefix(plain), shape, (identity(name, shape),)))
    for name, plain in adapter.saved.items():
        shape = catalog[name].shape
        views.append(View(_with_prefix(plain), shape, (identity(name, shape),)))
    return seen_as(catalog, views, catalog.findings, _aliases(catalog))


def config(catalog: Catalog, adapter: Adapter, alpha: float | None) -> dict[str, Any]:
    """What adapter_config.json says. CheckpointError where nobody says alpha."""
    said = told(catalog)
    ranks = adapter.ranks(catalog)
    usual = max(ranks.values(), key=[*ranks.values()].count, default=0)
    found: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": any(_turned(said, module) for module in adapter.pairs),
        "inference_mode": True,
        "lora_dropout": 0.0,
        "r": usual,
        "rank_pattern": {_bare(module): rank for module, rank in ranks.items() if rank != usual},
        "target_modules": sorted({module.rpartition(".")[2] for module in adapter.pairs}),
        "modules_to_save": sorted({name.split(".")[-2] for name in adapter.saved.values()}) or None,
        **said,
    }
    found["lora_alpha"] = _alpha(catalog, said, alpha)
    return found


def merged(catalog: Catalog, adapter: Adapter, alpha: float | None) -> Catalog:
    """The model with the adapter in its weights, under its own names: sums are float32, and are rounded once to what is
    asked for. Weights alone: an optimizer's states are of the adapter, and of no tensor here.

    alpha: None takes it from adapter_config.json. CheckpointError where nobody says it, or the base is not in the run.
    """
    said = told(catalog)
    usual, ranks = _alpha(catalog, said, alpha), adapter.ranks(catalog)
    rooted = bool(said.get("use_rslora"))
    views, added = [], {}
    for name, tensor in catalog.tensors.items():
        if _LORA.fullmatch(name) or _ORIGINAL.fullmatch(name) or (_SAVED.fullmatch(name) and name not in adapter.saved):
            continue
        plain = adapter.saved.get(name, name)
        module, rest = plain.rsplit(".", 1) if "." in plain else (plain, "")
        module = module.removesuffix(".base_layer")
        here = f"{module}.{rest}" if rest else plain
        views.append(View(here.removeprefix(PREFIX), tensor.shape, (identity(name, tensor.shape),)))
        if rest == "weight" and module in adapter.pairs:
            a, b = adapter.pairs[module]
            scale = _alpha_of(catalog, said, module, usual) / (math.sqrt(ranks[module]) if rooted else ranks[module])
            by = LowRank(a, b, scale, _turned(said, module) or a.endswith(f"_A.{adapter.name}"))
            _check(catalog, name, by)
            added[views[-1].name] = by
    if lacking := [m for m in adapter.pairs if f"{m.removeprefix(PREFIX)}.weight" not in added]:
        raise CheckpointError(f"{catalog.path}: holds no base of {lacking[0]}: merge the adapter where its base is")
    seen = seen_as(catalog, views, catalog.findings, _aliases(catalog))
    tensors, placements = dict(seen.tensors), dict(seen.placements)
    for name in added:
        held = next(state for state in (MASTER, PARAM) if state in tensors[name].states)
        placements[name, MASTER] = placements[name, held]
        tensors[name] = replace(tensors[name], states={MASTER: np.dtype(np.float32)})
    return replace(seen, tensors=tensors, placements=placements, added=added)


def _check(catalog: Catalog, name: str, by: LowRank) -> None:
    """CheckpointError where the shapes of a weight and of what is added to it do not fit."""
    if any(dtype.kind in "iub" for dtype in catalog[name].states.values()):
        kept = ", ".join(map(str, catalog[name].states.values()))
        raise CheckpointError(
            f"{catalog.path}: {name} is quantized ({kept}, as QLoRA keeps its base): write the adapter alone, or merge "
            "it into the base as it was published"
        )
    a, b = catalog[by.a].shape, catalog[by.b].shape
    wanted = (a[1], b[0]) if by.transposed else (b[0], a[1])
    if catalog[name].shape != wanted or a[0] != b[1]:
        raise CheckpointError(
            f"{catalog.path}: {name} has shape {catalog[name].shape}; {by.b} {b} and {by.a} {a} make {wanted}"
        )


def _alpha(catalog: Catalog, said: Mapping[str, Any], alpha: float | None) -> float:
    found = said.get("lora_alpha") if alpha is None else alpha
    if not isinstance(found, (int, float)) or isinstance(found, bool):
        raise CheckpointError(
            f"{catalog.path}: nobody says lora_alpha: no {CONFIG} is beside the run: give lora_alpha="
        )
    return found


def _alpha_of(catalog: Catalog, said: Mapping[str, Any], module: str, usual: float) -> float:
    """Alpha of one module: keys of alpha_pattern are the ends of names, or regular expressions for them."""
    patterns = said.get("alpha_pattern") or {}
    for pattern in patterns if isinstance(patterns, Mapping) else ():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", _bare(module)):
                return _alpha(catalog, {"lora_alpha": patterns[pattern]}, None)
        except re.error as error:
            raise CheckpointError(f"{catalog.path}: alpha_pattern {pattern!r} of its {CONFIG}: {error}") from None
    return usual


def _turned(said: Mapping[str, Any], module: str) -> bool:
    """Whether the weight of a layer is in × out: what adapter_config.json says, or that it is GPT-2's `Conv1D`."""
    turned = said.get("fan_in_fan_out")
    return bool(turned) if turned is not None else _CONV1D.fullmatch(_bare(module)) is not None


def _bare(module: str) -> str:
    return module.removeprefix(PREFIX)


def _with_prefix(name: str) -> str:
    return name if name.startswith(PREFIX) else PREFIX + name


def _aliases(catalog: Catalog) -> dict[str, str]:
    """Tied tensors' further names, which stay."""
    return {alias: alias for tensor in catalog.tensors.values() for alias in tensor.aliases}
