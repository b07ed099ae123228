"""What transformers' config.json says of a model: from the shapes of its tensors, and from what its program tells.

Sources: transformers 5.24, `models/*/configuration_*.py`; the `args` of Megatron-LM, Megatron-DeepSpeed and GPT-NeoX.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ckptlab.catalog import Tensor
from ckptlab.errors import LayoutError

CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "bloom": "BloomForCausalLM",
}
"""transformers' word for a model, and the class that reads it."""


@dataclass
class Config:
    """A config.json: its `values`, what nobody said (`assumed`: transformers' own defaults then hold), and what has to
    be said before a model can be made (`missing`)."""

    values: dict[str, Any] = field(default_factory=dict)
    assumed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def model_type(
    names: Mapping[str, object], asked: str | None = None, told: Sequence[Mapping[str, Any]] = ()
) -> str | None:
    """transformers' word for the model whose weights have these names; None where no class that is known here has.
    asked: what the user calls it, if it is one of those; told: what the program says, of attention within a window."""
    if asked in CLASSES:
        return asked
    if any(name.startswith("gpt_neox.") for name in names):
        return "gpt_neox"
    if "transformer.wte.weight" in names:
        return "gpt2"
    if "transformer.word_embeddings_layernorm.weight" in names:
        return "bloom"
    layer = {name.split(".", 3)[3] for name in names if name.startswith("model.layers.") and name.count(".") > 3}
    if any(name.startswith("block_sparse_moe.") for name in layer):
        return "mixtral"
    normed = "self_attn.q_norm.weight" in layer
    if any(name.startswith("mlp.experts.") for name in layer):
        return "qwen3_moe" if normed else "qwen2_moe"
    if "self_attn.q_proj.weight" not in layer:
        return None
    biased = "self_attn.q_proj.bias" in layer and "self_attn.o_proj.bias" not in layer
    if normed or biased:
        return "qwen3" if normed else "qwen2"
    windowed = any(_window(source) for source in told) and not any(name.endswith(".bias") for name in layer)
    return "mistral" if windowed else "llama"


def _window(source: Mapping[str, Any]) -> int | None:
    """How many tokens a token attends to, itself counted, as a program says it: Megatron's `window_size` are those
    before it and those behind."""
    window = source.get("sliding_window")
    before = source.get("window_size")
    if isinstance(before, tuple | list) and len(before) == 2 and type(before[0]) is int and before[0] >= 0:
        return before[0] + 1
    return window if type(window) is int else None


def config(
    kind: str, tensors: Mapping[str, Tensor], numbers: Mapping[str, int], told: Sequence[Mapping[str, Any]], dtype: str
) -> Config:
    """The config.json of a model of that kind. tensors: under transformers' names; numbers: h and kv; told: what the
    program says, by its own words; dtype: of the weights that are written."""
    found = Config({"architectures": [CLASSES[kind]], "model_type": kind, "dtype": dtype})
    _MAKERS[kind](_Known(found, tensors, numbers, told))
    return found


@dataclass
class _Known:
    """What is known of a model, and the config that is made of it."""

    config: Config
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, int]
    told: Sequence[Mapping[str, Any]]

    def size(self, name: str, dim: int = 0) -> int:
        """A size of a tensor."""
        return self.tensors[name].shape[dim]

    def has(self, name: str) -> bool:
        return name in self.tensors

    @property
    def names(self) -> set[str]:
        return {name for t in self.tensors.values() for name in (t.name, *t.aliases)}

    def set(self, **values: Any) -> None:
        self.config.values.update(values)

    def embedding(self, name: str, hidden: str = "hidden_size") -> None:
        """The vocabulary's size and the hidden one, under the word that is given."""
        vocab, size = self.tensors[name].shape
        self.set(vocab_size=vocab, **{hidden: size})

    def layers(self, before: str) -> int:
        """How many layers there are below a name."""
        return 1 + max(int(n[len(before) :].split(".")[0]) for n in self.tensors if n.startswith(before))

    def take(self, key: str, *words: str, to: Callable[[Any], Any] = lambda value: value) -> None:
        """A value that the program says, by one of these words; else transformers' own default, which is noted."""
        for source in self.told:
            for word in (key, *words):
                if (value := source.get(word)) is not None and isinstance(value, (int, float, str, bool)):
                    self.config.values[key] = to(value)
                    return
        self.config.assumed.append(key)

    def heads(self, key: str = "num_attention_heads") -> int | None:
        """Attention heads, which no shape tells."""
        if "h" not in self.numbers:
            self.config.missing.append("heads")
            return None
        self.set(**{key: self.numbers["h"]})
        return self.numbers["h"]


def _llama(known: _Known) -> None:
    layer = "model.layers.0"
    known.embedding("model.embed_tokens.weight")
    known.set(
        num_hidden_layers=known.layers("model.layers."),
        hidden_act="silu",
        tie_word_embeddings="lm_head.weight" not in known.tensors,
    )
    if (heads := known.heads()) is not None:
        head = known.size(f"{layer}.self_attn.q_proj.weight") // heads
        known.set(head_dim=head, num_key_value_heads=known.size(f"{layer}.self_attn.k_proj.weight") // head)
    if known.has(f"{layer}.mlp.down_proj.weight"):
        known.set(intermediate_size=known.size(f"{layer}.mlp.down_proj.weight", 1))
    if known.config.values["model_type"] in ("llama", "qwen3", "qwen3_moe"):
        known.set(attention_bias=known.has(f"{layer}.self_attn.q_proj.bias"))
    if known.config.values["model_type"] == "llama":
        known.set(mlp_bias=known.has(f"{layer}.mlp.down_proj.bias"))
    known.take("rms_norm_eps", "layernorm_epsilon", "norm_epsilon", "norm_eps")
    known.take("rope_theta", "rotary_base", "rotary_emb_base")
    _scaling(known)
    _windows(known)
    known.take("max_position_embeddings", "seq_length", "max_seq_len")


def _scaling(known: _Known) -> None:
    """Rotary frequencies that were stretched: as Llama 3.1's, whose numbers but the factor Megatron has as constants,
    or all alike."""
    if scaling := next((s["rope_scaling"] for s in known.told if isinstance(s.get("rope_scaling"), Mapping)), None):
        known.set(rope_scaling=dict(scaling))
    elif any(source.get("use_rope_scaling") for source in known.told):
        factor = next((s["rope_scaling_factor"] for s in known.told if s.get("rope_scaling_factor")), 8.0)
        llama3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        known.set(rope_scaling={"rope_type": "llama3", "factor": float(factor), **llama3})
    elif factor := next((f for s in known.told if (f := s.get("rotary_seq_len_interpolation_factor"))), None):
        known.set(rope_scaling={"rope_type": "linear", "factor": float(factor)})


def _windows(known: _Known) -> None:
    """Attention within a window. What Mistral's default is, no program without a word of it means."""
    kind = known.config.values["model_type"]
    said = [source for source in known.told if {"sliding_window", "window_size"} & source.keys()]
    window = _window(said[0]) if said else None
    if kind in ("mistral", "mixtral"):
        known.set(sliding_window=window)
    elif window is not None and kind.startswith("qwen") and said[0].get("use_sliding_window", True):
        known.set(use_sliding_window=True, sliding_window=window, max_window_layers=said[0].get("max_window_layers", 0))
    elif window is not None and kind == "llama":
        known.config.missing.append("attention without a window, which is all that a Llama has")


def _mixtral(known: _Known) -> None:
    _llama(known)
    moe = "model.layers.0.block_sparse_moe"
    known.set(
        num_local_experts=known.size(f"{moe}.gate.weight"), intermediate_size=known.size(f"{moe}.experts.0.w1.weight")
    )
    known.take("num_experts_per_tok", "moe_router_topk")


def _qwen_moe(known: _Known) -> None:
    _llama(known)
    layers = [f"model.layers.{i}.mlp" for i in range(known.layers("model.layers."))]
    dense = [i for i, layer in enumerate(layers) if known.has(f"{layer}.down_proj.weight")]
    moe = next((layer for i, layer in enumerate(layers) if i not in dense), layers[0])
    known.set(
        num_experts=known.size(f"{moe}.gate.weight"),
        moe_intermediate_size=known.size(f"{moe}.experts.0.gate_proj.weight"),
        decoder_sparse_step=1,
        mlp_only_layers=dense,
    )
    if dense:
        known.set(intermediate_size=known.size(f"{layers[dense[0]]}.down_proj.weight", 1))
    if known.has(shared := f"{moe}.shared_expert.gate_proj.weight"):
        known.set(shared_expert_intermediate_size=known.size(shared))
    known.take("num_experts_per_tok", "moe_router_topk")
    if any("moe_router_pre_softmax" in source for source in known.told):
        known.take("norm_topk_prob", "moe_router_pre_softmax", to=lambda said: not said)
    else:
        known.take("norm_topk_prob")


def _gpt2(known: _Known) -> None:
    joined, width = "transformer.h.0.attn.c_attn.weight", known.size("transformer.wte.weight", 1)
    if known.tensors[joined].shape == (3 * width, width):
        raise LayoutError(f"{joined} is a linear layer, out × in, and GPT2's is in × out: say family='conv1d'")
    known.embedding("transformer.wte.weight", "n_embd")
    known.set(
        n_layer=known.layers("transformer.h."),
        n_inner=known.size("transformer.h.0.mlp.c_fc.weight", 1),
        tie_word_embeddings="lm_head.weight" not in known.tensors,
    )
    known.heads("n_head")
    if known.has("transformer.wpe.weight"):
        known.set(n_positions=known.size("transformer.wpe.weight"))
    else:
        known.config.missing.append("position embeddings, which every GPT2 has")
    known.take("layer_norm_epsilon", "layernorm_epsilon", "norm_epsilon")
    known.take("activation_function", "bias_gelu_fusion", to=_gelu)


def _gelu(said: Any) -> str:
    """Megatron fuses bias and the approximation of GELU by tanh."""
    return said if isinstance(said, str) else "gelu_pytorch_tanh" if said else "gelu"


def _bloom(known: _Known) -> None:
    known.embedding("transformer.word_embeddings.weight")
    known.set(n_layer=known.layers("transformer.h."))
    known.heads("n_head")
    known.take("layer_norm_epsilon", "layernorm_epsilon")
    known.take("apply_residual_connection_post_layernorm")


def _gpt_neox(known: _Known) -> None:
    known.embedding("gpt_neox.embed_in.weight")
    known.set(
        num_hidden_layers=known.layers("gpt_neox.layers."),
        intermediate_size=known.size("gpt_neox.layers.0.mlp.dense_h_to_4h.weight"),
        tie_word_embeddings="embed_out.weight" not in known.tensors,
        attention_bias=known.has("gpt_neox.layers.0.attention.query_key_value.bias"),
    )
    known.heads()
    known.take("layer_norm_eps", "layernorm_epsilon")
    known.take("rotary_pct")
    known.take("rotary_emb_base", "rope_theta")
    known.take("use_parallel_residual", "gpt_j_residual")
    known.take("max_position_embeddings", "seq_length")


_MAKERS: Mapping[str, Callable[[_Known], None]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _llama),
    "mixtral": _mixtral,
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "gpt2": _gpt2,
    "gpt_neox": _gpt_neox,
    "bloom": _bloom,
}
