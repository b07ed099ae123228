"""Strategies: rules that give every tensor a layout.

A strategy is a small immutable value that works on metadata alone: a tensor's name and the shapes of its shards in, a
`Layout` out (None: it says nothing about that tensor). Wherever ckptlab infers layouts, a user can give a strategy
instead: a registered name (`"megatron"`), a mapping from regular expressions to lines of notation, or an object with
`layout`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Protocol, cast, runtime_checkable

from ckptlab.aliases import Shape
from ckptlab.arguments import behaves, explained, kind_of
from ckptlab.errors import InputError, LayoutError
from ckptlab.layout import Layout
from ckptlab.registry import Registry
from ckptlab.sharding.rules import Rules

MOST_DIMS = 64  # numpy's own


@runtime_checkable
class Strategy(Protocol):
    """Anything with this method is a strategy."""

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        """The layout of tensor `name`, whose shard on tp rank i has shape `shards[i]`; None if it has no say."""


def dim_names(ndim: int) -> tuple[str, ...]:
    """What ckptlab calls the dims of a tensor that nobody named: out, in, then k2, k3, …"""
    if not 0 <= ndim <= MOST_DIMS:
        raise LayoutError(f"a tensor has 0 to {MOST_DIMS} dims, not {ndim}")
    return ("out", "in", *(f"k{i}" for i in range(2, ndim)))[:ndim]


@explained
def replicated(ndim: int, **fields: Any) -> Layout:
    """Every rank holds the whole."""
    return _replicated(ndim).replace(**fields) if fields else _replicated(ndim)


@lru_cache(maxsize=64)
def _replicated(ndim: int) -> Layout:
    return Layout(" ".join(dim_names(ndim)))


@explained
def cut(ndim: int, dim: int, term: str = "tp {}", **fields: Any) -> Layout:
    """Dim `dim` is composed as `term` says (`{}` stands for the dim's name); the others are whole."""
    plain = _cut(ndim, dim, term)
    return plain.replace(**fields) if fields else plain


@lru_cache(maxsize=1024)
def _cut(ndim: int, dim: int, term: str) -> Layout:
    names = dim_names(ndim)
    return Layout(" ".join(f"({term.format(n)})" if i == dim else n for i, n in enumerate(names)), dims=names)


@explained
def column(shards: Sequence[Shape], dim: int = 0) -> Layout:
    """Cut along `dim` over tp, each rank as wide as its shard is (even or not)."""
    ndim = _ndim(shards)
    widths = tuple(s[dim] for s in shards)
    if len(set(widths)) == 1:
        return cut(ndim, dim)
    return cut(ndim, dim, sizes={dim_names(ndim)[dim]: widths})


def _ndim(shards: Sequence[Shape]) -> int:
    """The dims of a tensor. LayoutError where there is no shard of it."""
    if not len(shards):
        raise LayoutError("a tensor has at least one shard: give the shape of each")
    return len(shards[0])


@explained
@dataclass(frozen=True)
class Convention:
    """How programs that call their tensors alike cut them: patterns of names, of which `re.search` finds one at the end
    of a tensor's.

    column, row: cut by output, by input. glu: column, and two halves that are each cut on their own. summed: biases
    that every rank adds, so that the whole is their sum. replicated: whole on every rank. `known`: it has no say on
    other names; else those are taken to be replicated.
    """

    column: str
    row: str
    replicated: str
    glu: str = r"(?!)"
    summed: str = r"(?!)"
    known: bool = False

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        ndim = _ndim(shards)
        if _ends(self.summed, name):
            return replicated(ndim, replicas="sum")
        if _ends(self.glu, name):
            return cut(ndim, 0, "2 tp {}")
        if _ends(self.column, name):
            return column(shards)
        if _ends(self.row, name) and ndim > 1:
            return column(shards, 1)
        return replicated(ndim) if not self.known or _ends(self.replicated, name) else None


def _ends(pattern: str, name: str) -> bool:
    return re.search(rf"(?:^|[._])(?:{pattern})$", name) is not None


_NORMS = (
    r"(?:\w*(?:norm|ln)\w*|layer_?norm_\w+)(?:\.(?:weight|bias|scale))?|norm\.norm\.\w+|position_embeddings\.weight"
)
MLP_LAYERS = (("dense_h_to_4h", "dense_4h_to_h"), ("linear_fc1", "linear_fc2"))
"""How Megatron, and its core, call the first and the second layer of an MLP."""
_UP = r"(?:dense_h_to_4h|linear_fc1)\.(?:weight|bias)"
MEGATRON = Convention(
    column=r"(?:word_embeddings|lm_head|output_layer)\.weight|(?:query_key_value|query|key_value|linear_qkv|linear_q_proj"
    rf"|linear_q_up_proj|linear_kv_up_proj)\.(?:weight|bias)|{_UP}",
    row=r"(?:attention\.dense|dense_4h_to_h|linear_proj|linear_fc2)\.weight",
    replicated=rf"{_NORMS}|(?:attention\.dense|dense_4h_to_h|linear_proj|linear_fc2)\.bias|(?:linear_q_down_proj"
    r"|linear_kv_down_proj|tokentype_embeddings|router)\.weight",
)
MEGATRON_SWIGLU = replace(MEGATRON, glu=_UP)
# GPT-NeoX adds the row-parallel layers' biases on every rank, before it sums over ranks
GPT_NEOX = Convention(
    column=r"(?:word_embeddings|final_linear|lm_head|output_layer)\.weight"
    r"|(?:query_key_value|dense_h_to_4h|linear1|w1|w3)\.(?:weight|bias)",
    row=r"(?:attention\.dense|dense_4h_to_h|linear2|w2)\.weight",
    summed=r"(?:attention\.dense|dense_4h_to_h|linear2|w2)\.bias",
    replicated=rf"{_NORMS}|rotary_emb\.inv_freq",
)


@explained
@dataclass(frozen=True)
class Megatron:
    """Megatron-LM's names, and those of Megatron-core: embeddings and output layer cut by vocabulary, query_key_value
    and dense_h_to_4h column parallel, attention's dense and dense_4h_to_h row parallel, the rest replicated. `swiglu`:
    dense_h_to_4h holds gate and up projection, each cut on its own."""

    swiglu: bool = False

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        return (MEGATRON_SWIGLU if self.swiglu else MEGATRON).layout(name, shards)

    def _denied(self, shapes: Mapping[str, Shape]) -> tuple[str, ...]:
        """Of these tensors, whole, the first layers of MLPs that hold something else than `swiglu` says: gate and up
        projection have twice as many outputs as the second layer has inputs."""
        return tuple(
            name
            for first, second in MLP_LAYERS
            for name, shape in shapes.items()
            if name.endswith(f"{first}.weight")
            and (after := shapes.get(name.replace(f"{first}.weight", f"{second}.weight")))
            and (len(shape), len(after)) == (2, 2)
            and shape[0] == after[1] * (1 if self.swiglu else 2)
        )


@explained
@dataclass(frozen=True)
class HuggingFace:
    """Names of transformers' models, as AutoTP cuts them: q, k, v, gate and up projections by their rows, o and down
    projections by their columns, the rest replicated but for a vocabulary of which the ranks hold unequal or, by
    `vocab`, too few rows. `plan`: a model's own `tp_plan`, name (with * for a number) → style, which comes first.
    """

    plan: tuple[tuple[str, str], ...] = ()
    vocab: int | None = None

    @staticmethod
    def of(config: Mapping[str, Any]) -> HuggingFace:
        """What a config.json says: `tp_plan` or `base_model_tp_plan`, and the vocabulary's size."""
        plan = config.get("tp_plan") or config.get("base_model_tp_plan") or {}
        vocab = config.get("vocab_size")
        return HuggingFace(
            tuple(plan.items()) if isinstance(plan, Mapping) else (), vocab if isinstance(vocab, int) else None
        )

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        """See `Strategy.layout`."""
        module, ndim = name.rpartition(".")[0], _ndim(shards)
        style = next((s for pattern, s in self.plan if _names(pattern, module)), None) or self._style(module, shards)
        if (turned := _CONV1D.get(".".join(module.split(".")[-2:]))) is not None and module.startswith(
            "transformer.h."
        ):
            return Layout(turned if ndim > 1 else turned.removeprefix("in ") if turned.startswith("in ") else "out")
        if style.startswith("colwise"):
            return column(shards)
        if style.startswith(("rowwise", "embedding_rowwise")) and ndim > 1:
            return column(shards, dim=0 if style.startswith("embedding") else 1)
        return replicated(ndim)

    def _style(self, module: str, shards: Sequence[Shape]) -> str:
        last = module.rpartition(".")[2]
        if last in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "fc1"):
            return "colwise"
        if last in ("o_proj", "out_proj", "down_proj", "w2", "fc2"):
            return "rowwise"
        rows = {shard[0] for shard in shards if shard}
        if last in ("lm_head", "embed_out", "embed_tokens") and (
            len(rows) > 1 or (self.vocab and rows != {self.vocab})
        ):
            return "colwise"
        return "replicated"


_CONV1D = {
    "attn.c_attn": "in (3 tp out)",
    "attn.c_proj": "(tp in) out",
    "mlp.c_fc": "in (tp out)",
    "mlp.c_proj": "(tp in) out",
}
"""GPT-2's linear layers, which are the other way round (`Conv1D`: in × out), q, k and v one after the other."""


def _names(pattern: str, module: str) -> bool:
    """Whether a key of a tp_plan names a module: `layers.*.mlp.up_proj` does `model.layers.3.mlp.up_proj`."""
    said = r"\.".join(r"\d+" if part == "*" else re.escape(part) for part in pattern.split("."))
    return re.fullmatch(rf"(?:.*\.)?{said}", module) is not None


REGISTRY = Registry[Strategy](
    "strategy",
    "ckptlab.strategies",
    LayoutError,
    {
        "megatron": Megatron(),
        "megatron-swiglu": Megatron(swiglu=True),
        "gpt-neox": GPT_NEOX,
        "hf": HuggingFace(),
    },
    hint=", a .json file of pattern: notation, or a model's config.json",
    wrong=lambda name, value: "" if behaves(value, Strategy) else f"expected an object with layout, found {value!r}",
)


@explained
def resolve(strategy: Strategy | Mapping[str, str | Layout] | str | None) -> Strategy | None:
    """A strategy from whatever a user may give: an object, a mapping, a registered name, or the path of a JSON one."""
    if strategy is None or behaves(strategy, Strategy):
        return cast(Strategy | None, strategy)
    if isinstance(strategy, Mapping):
        return Rules.of(strategy)
    if not isinstance(strategy, str):
        raise InputError(
            "a strategy is a registered name, {pattern: notation}, a .json file of that, or has layout(name, shards); "
            f"not {kind_of(strategy)}"
        )
    if strategy.endswith(".json"):
        try:
            with open(strategy, encoding="utf-8") as f:
                said = json.load(f)
        except OSError as e:
            raise LayoutError(f"strategy file {strategy}: {e.strerror}") from None
        except (ValueError, RecursionError) as e:
            raise LayoutError(f"strategy file {strategy}: expected a JSON object of pattern: notation: {e}") from None
        if not isinstance(said, Mapping):
            raise LayoutError(
                f"strategy file {strategy}: expected a JSON object of pattern: notation, found {kind_of(said)}"
            )
        return HuggingFace.of(said) if "model_type" in said else Rules.of(said, strategy)
    return REGISTRY.get(strategy)


def denied(strategy: Strategy | None, shapes: Mapping[str, Shape]) -> tuple[tuple[str, ...], str, str]:
    """The tensors, of these whole shapes, that contradict a strategy, why, and what to do; nothing where none do."""
    if not isinstance(strategy, Megatron) or not (found := strategy._denied(shapes)):
        return (), "", ""
    held, many, instead = "gate and up projection in one", "twice as many outputs as", "megatron-swiglu"
    if strategy.swiglu:
        held, many, instead = "no gate in it", "as many outputs as", "megatron"
    return found, f"{held} ({many} the next layer has inputs)", f"say strategy={instead!r}"


@dataclass(frozen=True)
class LayoutsOf:
    """The strategy that gives each tensor the layout that it is known to have; one that is padded says it by its
    checkpoint's own word."""

    layouts: Mapping[str, Layout]

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        found = self.layouts.get(name)
        return None if found is None or found.padded else found
