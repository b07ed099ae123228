"""Names that training programs give the tensors of a transformer.

Megatron-core 0.16 (`core/models/gpt`, local and Transformer Engine's layers), Megatron-LM's older `legacy/model`,
Megatron-DeepSpeed's pipelines (`model/gpt_model.py`), GPT-NeoX 2.0 (`megatron/model`), torchtitan (`models/llama3`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Program:
    """A program's names, `{i}` being the layer. Several: those of its variants, the usual one first.

    `norm1`, `norm2` stand before attention and feed-forward network; `up` is the layer that widens (with a gate, both);
    names of modules are without `.weight` but where a norm has another word for it. `experts`: (gate and up, down) of
    an expert `{e}`. `defaults`: see `Family`.
    """

    name: str
    embed: str
    layer: str
    norm1: tuple[str, ...]
    norm2: tuple[str, ...]
    qkv: str
    dense: str
    up: str
    down: str
    final: tuple[str, ...]
    head: str
    positions: str | None = None
    embed_norm: str | None = None
    q_norm: str | None = None
    k_norm: str | None = None
    router: str | None = None
    shared: tuple[str, str, str] | None = None
    experts: tuple[tuple[str, str], ...] = ()
    defaults: dict[str, str] = field(default_factory=dict, hash=False)
    strategy: str = "megatron"

    def at(self, module: str) -> str:
        """A module of a layer."""
        return f"{self.layer}.{module}"


CORE = Program(
    name="megatron-core",
    embed="embedding.word_embeddings",
    positions="embedding.position_embeddings",
    layer="decoder.layers.{i}",
    norm1=("self_attention.linear_qkv.layer_norm_", "input_layernorm."),
    norm2=("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm."),
    qkv="self_attention.linear_qkv",
    dense="self_attention.linear_proj",
    q_norm="self_attention.q_layernorm",
    k_norm="self_attention.k_layernorm",
    up="mlp.linear_fc1",
    down="mlp.linear_fc2",
    final=("decoder.final_layernorm",),
    head="output_layer",
    router="mlp.router",
    shared=("mlp.shared_experts.linear_fc1", "mlp.shared_experts.linear_fc2", "mlp.shared_experts.gate_weight"),
    experts=(
        ("mlp.experts.local_experts.{e}.linear_fc1.weight", "mlp.experts.local_experts.{e}.linear_fc2.weight"),
        ("mlp.experts.linear_fc1.weight{e}", "mlp.experts.linear_fc2.weight{e}"),
    ),
)
"""With Transformer Engine norms are part of the layer behind them."""

LEGACY = Program(
    name="megatron",
    embed="language_model.embedding.word_embeddings",
    positions="language_model.embedding.position_embeddings",
    layer="language_model.encoder.layers.{i}",
    norm1=("input_layernorm.", "input_norm."),
    norm2=("post_attention_layernorm.", "post_attention_norm."),
    qkv="self_attention.query_key_value",
    dense="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    final=("language_model.encoder.final_layernorm", "language_model.encoder.final_norm"),
    head="language_model.output_layer",
)

PIPELINE = Program(
    name="megatron-deepspeed",
    embed="{embed}.word_embeddings",
    positions="{embed}.position_embeddings",
    embed_norm="{embed}.word_embeddings.norm",
    layer="{i+first}",
    norm1=("input_layernorm.",),
    norm2=("post_attention_layernorm.",),
    qkv="self_attention.query_key_value",
    dense="self_attention.dense",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
    final=("{final}",),
    head="{head}.lm_head",
    defaults={"first": "2", "embed": "1", "final": "layers+first", "head": "final+1"},
)
"""Layers are numbered with those around them: `first` is the number of the first transformer layer."""

TIED_PIPELINE = replace(
    PIPELINE,
    name="megatron-deepspeed-tied",
    embed="tied_modules.embed.word_embeddings",
    positions="tied_modules.embed.position_embeddings",
    embed_norm="tied_modules.embed.word_embeddings.norm",
    defaults={"first": "3", "final": "layers+first+1", "head": "final+1"},
)

PROGRAMS = (CORE, LEGACY, PIPELINE, TIED_PIPELINE)
