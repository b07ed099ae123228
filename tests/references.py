"""Small transformers written for tests, as training programs lay out their weights: whole tensors by name, in float32.

Each is the forward pass of one program, from its own names: Megatron-core's (grouped queries interleaved, gate and up
in one layer), Megatron-LM's older GPT, GPT-NeoX's, BLOOM's (ALiBi), torchtitan's (rotary over neighbours).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

Weights = Mapping[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}weight"], w[f"{name}bias"], eps)


def rms_norm(weight: Tensor, x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def angles(length: int, d: int, theta: float) -> Tensor:
    """(length, d / 2)"""
    steps = theta ** (-torch.arange(0, d, 2, dtype=torch.float32) / d)
    return torch.outer(torch.arange(length, dtype=torch.float32), steps)


def turn_halves(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary over p and p + d / 2: x is (batch, head, length, d)."""
    a, b = x.chunk(2, -1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def turn_neighbours(x: Tensor, angle: Tensor) -> Tensor:
    """Rotary over 2 p and 2 p + 1, as complex numbers."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """Causal attention; q, k, v are (batch, head, length, d), of k and v fewer heads. (batch, length, heads * d)"""
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]) + bias
    future = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    mixed = scores.masked_fill(future, -torch.inf).softmax(-1) @ v
    return mixed.transpose(1, 2).flatten(-2)


def apart(joined: Tensor, kv: int, q: int) -> tuple[Tensor, Tensor, Tensor]:
    """Megatron's fused q, k, v: for each key/value head its queries, its key, its value."""
    heads = joined.unflatten(-1, (kv, q + 2, -1))
    queries = heads[..., :q, :].flatten(-3, -2)
    return tuple(x.transpose(1, 2) for x in (queries, heads[..., q, :], heads[..., q + 1, :]))  # type: ignore[return-value]


def core(
    w: Weights,
    tokens: Tensor,
    layers: int,
    kv: int,
    q: int,
    eps: float,
    theta: float,
    top: int = 0,
    turn: Callable[[Tensor, Tensor], Tensor] = turn_halves,
) -> Tensor:
    """Megatron-core's Llama with Transformer Engine's names; top: experts of each token, 0 without; turn: its rotary.
    Logits."""
    x = w["embedding.word_embeddings.weight"][tokens]
    for i in range(layers):
        at = f"decoder.layers.{i}."
        name = f"{at}self_attention.linear_qkv"
        queries, keys, values = apart(linear(w, name, rms_norm(w[f"{name}.layer_norm_weight"], x, eps)), kv, q)
        if (norm := w.get(f"{at}self_attention.q_layernorm.weight")) is not None:
            queries = rms_norm(norm, queries, eps)
            keys = rms_norm(w[f"{at}self_attention.k_layernorm.weight"], keys, eps)
        angle = angles(x.shape[1], keys.shape[-1], theta)
        mixed = attend(turn(queries, angle), turn(keys, angle), values)
        x = x + linear(w, f"{at}self_attention.linear_proj", mixed)
        norm = w.get(f"{at}mlp.linear_fc1.layer_norm_weight", w.get(f"{at}pre_mlp_layernorm.weight"))
        assert norm is not None
        y = rms_norm(norm, x, eps)
        x = x + (experts(w, f"{at}mlp", y, top) if top else gated(w, f"{at}mlp", y))
    x = rms_norm(w["decoder.final_layernorm.weight"], x, eps)
    return x @ w.get("output_layer.weight", w["embedding.word_embeddings.weight"]).T


def gated(w: Weights, at: str, x: Tensor) -> Tensor:
    gate, up = linear(w, f"{at}.linear_fc1", x).chunk(2, -1)
    return linear(w, f"{at}.linear_fc2", functional.silu(gate) * up)


def experts(w: Weights, at: str, x: Tensor, top: int) -> Tensor:
    share = linear(w, f"{at}.router", x).softmax(-1)
    best, chosen = share.topk(top, -1)
    best = best / best.sum(-1, keepdim=True)
    total = torch.zeros_like(x)
    for e in range(share.shape[-1]):
        weight = (best * (chosen == e)).sum(-1, keepdim=True)
        total = total + weight * gated(w, f"{at}.experts.local_experts.{e}", x)
    return total


def gpt(w: Weights, tokens: Tensor, layers: int, heads: int, eps: float, at: str = "language_model.") -> Tensor:
    """Megatron-LM's older GPT: learned positions, tied head, GELU by tanh. Logits."""
    table = w[f"{at}embedding.word_embeddings.weight"]
    x = table[tokens] + w[f"{at}embedding.position_embeddings.weight"][: tokens.shape[1]]
    for i in range(layers):
        layer = f"{at}encoder.layers.{i}."
        y = layer_norm(w, f"{layer}input_layernorm.", x, eps)
        mixed = attend(*apart(linear(w, f"{layer}self_attention.query_key_value", y), heads, 1))
        x = x + linear(w, f"{layer}self_attention.dense", mixed)
        x = x + network(w, f"{layer}mlp", layer_norm(w, f"{layer}post_attention_layernorm.", x, eps), "tanh")
    return layer_norm(w, f"{at}encoder.final_layernorm.", x, eps) @ table.T


def network(w: Weights, at: str, x: Tensor, approximate: str) -> Tensor:
    y = functional.gelu(linear(w, f"{at}.dense_h_to_4h", x), approximate=approximate)
    return linear(w, f"{at}.dense_4h_to_h", y)


def neox(w: Weights, tokens: Tensor, layers: int, heads: int, eps: float, theta: float, share: float) -> Tensor:
    """GPT-NeoX: rotary over a share of each head, attention and network side by side. Logits."""
    x = w["sequential.0.word_embeddings.weight"][tokens]
    for i in range(layers):
        at = f"sequential.{i + 2}."
        y = layer_norm(w, f"{at}input_layernorm.", x, eps)
        q, k, v = apart(linear(w, f"{at}attention.query_key_value", y), heads, 1)
        d = int(q.shape[-1] * share)
        angle = angles(x.shape[1], d, theta)
        q, k = (torch.cat([turn_halves(z[..., :d], angle), z[..., d:]], -1) for z in (q, k))
        z = layer_norm(w, f"{at}post_attention_layernorm.", x, eps)
        x = x + linear(w, f"{at}attention.dense", attend(q, k, v)) + network(w, f"{at}mlp", z, "none")
    x = layer_norm(w, f"sequential.{layers + 3}.norm.", x, eps)
    return linear(w, f"sequential.{layers + 4}.final_linear", x)


def bloom(w: Weights, tokens: Tensor, layers: int, heads: int, eps: float) -> Tensor:
    """BLOOM as Megatron-DeepSpeed's pipeline names it; heads: a power of two. Logits."""
    at, table = "tied_modules.embed.word_embeddings", w["tied_modules.embed.word_embeddings.weight"]
    x = layer_norm(w, f"{at}.norm.", table[tokens], eps)
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1))
    alibi = slopes[:, None, None] * torch.arange(tokens.shape[1])
    for i in range(layers):
        layer = f"{i + 3}."
        y = layer_norm(w, f"{layer}input_layernorm.", x, eps)
        q, k, v = apart(linear(w, f"{layer}self_attention.query_key_value", y), heads, 1)
        x = x + linear(w, f"{layer}self_attention.dense", attend(q, k, v, alibi))
        x = x + network(w, f"{layer}mlp", layer_norm(w, f"{layer}post_attention_layernorm.", x, eps), "tanh")
    return layer_norm(w, f"{layers + 4}.", x, eps) @ table.T


def titan(w: Weights, tokens: Tensor, layers: int, heads: int, kv: int, eps: float, theta: float) -> Tensor:
    """torchtitan's Llama. Logits."""
    x = w["tok_embeddings.weight"][tokens]
    for i in range(layers):
        at = f"layers.{i}."
        y = rms_norm(w[f"{at}attention_norm.weight"], x, eps)
        split: Callable[[str, int], Tensor] = lambda name, n: (  # noqa: E731
            linear(w, f"{at}attention.{name}", y).unflatten(-1, (n, -1)).transpose(1, 2)  # noqa: B023
        )
        q, k, v = split("wq", heads), split("wk", kv), split("wv", kv)
        angle = angles(x.shape[1], q.shape[-1], theta)
        x = x + linear(w, f"{at}attention.wo", attend(turn_neighbours(q, angle), turn_neighbours(k, angle), v))
        y = rms_norm(w[f"{at}ffn_norm.weight"], x, eps)
        up = functional.silu(linear(w, f"{at}feed_forward.w1", y)) * linear(w, f"{at}feed_forward.w3", y)
        x = x + linear(w, f"{at}feed_forward.w2", up)
    return linear(w, "output", rms_norm(w["norm.weight"], x, eps))
