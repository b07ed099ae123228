"""In which order models have their parameters, which names in a file do not say: that in which modules are made.

Sources: transformers 5.24 (`models/*/modeling_*.py`); Megatron-DeepSpeed's `ParallelTransformerLayer` and
`EmbeddingPipe`, GPT-NeoX's `ParallelTransformerLayerPipe`, under the names that a pipeline gives them: a module that is
tied comes first, then layer after layer. (Not transformers' GPT-NeoX, whose head its files and its models of today call
by different names.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Order:
    """Modules before the layers, what stands before a layer's number, modules of a layer, and those behind."""

    before: tuple[str, ...]
    layer: str
    within: tuple[str, ...]
    behind: tuple[str, ...] = ()
    tied: str | None = None  # what is one with the first module where no file has it

    def place(self, name: str) -> tuple[int, int, int, bool] | None:
        """Where a tensor comes among the others; None where it is none of these."""
        module, _, kind = name.rpartition(".")
        if kind not in ("weight", "bias"):
            return None
        for number, modules in ((0, self.before), (2, self.behind)):
            if module in modules:
                return number, 0, modules.index(module), kind == "bias"
        found = re.fullmatch(rf"{re.escape(self.layer)}(\d+)(?:\.(.+))?", module)
        if found is None or (found[2] or "") not in self.within:
            return None
        return 1, int(found[1]), self.within.index(found[2] or ""), kind == "bias"


_MLP = ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
_ORDERS = (
    _Order(
        ("model.embed_tokens",),
        "model.layers.",
        (
            *(f"self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
            *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
            "input_layernorm",
            "post_attention_layernorm",
        ),
        ("model.norm", "lm_head"),
        "lm_head.weight",
    ),
    _Order(
        ("transformer.wte", "transformer.wpe"),
        "transformer.h.",
        ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"),
        ("transformer.ln_f", "lm_head"),
        "lm_head.weight",
    ),
    _Order(
        ("transformer.word_embeddings", "transformer.word_embeddings_layernorm"),
        "transformer.h.",
        (
            "input_layernorm",
            *(f"self_attention.{part}" for part in ("query_key_value", "dense")),
            "post_attention_layernorm",
            *_MLP,
        ),
        ("transformer.ln_f", "lm_head"),
        "lm_head.weight",
    ),
    _Order(
        tuple(f"tied_modules.embed.{m}" for m in ("word_embeddings", "word_embeddings.norm", "position_embeddings")),
        "",
        (
            *("word_embeddings", "word_embeddings.norm", "position_embeddings", "input_layernorm"),
            *(f"{at}attention.{part}" for at in ("self_", "") for part in ("query_key_value", "dense")),
            "post_attention_layernorm",
            *_MLP,
            *("", "norm", "lm_head", "final_linear"),
        ),
    ),
)


def ordered(names: Iterable[str]) -> tuple[list[str], dict[str, str]] | None:
    """The names as their model has its parameters, and what is tied: further name → name. None where no model that is
    known here has just these."""
    names = list(names)
    for order in _ORDERS:
        places = {name: place for name in names if (place := order.place(name)) is not None}
        if names and len(places) == len(names):
            first = f"{order.before[0]}.weight"
            tied = {order.tied: first} if order.tied and order.tied not in places and first in places else {}
            return sorted(places, key=places.__getitem__), tied
    return None
