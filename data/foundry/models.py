"""Sizes of the tiny models, how tensor parallelism cuts them, and their initial values.

An initial value depends on nothing but the parameter's name, its whole shape and a salt, so every mesh starts
from the same weights.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

VOCAB_CEILING = 256
"""Initial vocabulary rows are drawn for at least this many tokens: those in use then do not depend on the padding."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and flavour; the flags turn GPT (layer norms, biases, tied embeddings) into Llama."""

    vocab: int = 101
    seq: int = 12
    hidden: int = 16
    heads: int = 4
    kv_heads: int = 4
    ffn: int = 64
    layers: int = 4
    vocab_divisor: int = 8
    bias: bool = True
    rms_norm: bool = False
    swiglu: bool = False
    untied: bool = False
    rotary: bool = False
    sub_params: bool = False
    """q, k and v one below the other, each cut on its own: what unequal numbers of heads need."""
    experts: int = 0
    """Of every second layer, beside its own feed-forward network (DeepSpeed's residual MoE); 0: no layer has any."""
    shared_expert: bool = False
    """One of AutoEP's experts that takes every token, beside the others."""

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def qkv_widths(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the fused weight."""
        return self.hidden, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim

    def padded_vocab(self, tp: int) -> int:
        """Rows of the vocabulary at tensor-parallel degree `tp`: a multiple of `vocab_divisor * tp`."""
        unit = self.vocab_divisor * tp
        return math.ceil(self.vocab / unit) * unit


GPT = ModelConfig()
LLAMA = ModelConfig(ffn=40, bias=False, rms_norm=True, swiglu=True, untied=True, rotary=True)
GQA = ModelConfig(ffn=40, kv_heads=2, rms_norm=True, swiglu=True, untied=True, rotary=True, sub_params=True)
PLAIN = ModelConfig(vocab=61, seq=10, hidden=15, heads=3, kv_heads=3, ffn=37, layers=3)
MOE = replace(PLAIN, layers=4, experts=4)
GPT_MOE = replace(GPT, experts=4)
AUTOTP = ModelConfig(vocab=61, seq=10, hidden=24, heads=6, kv_heads=3, ffn=37, layers=2, bias=False, rms_norm=True)
AUTOEP = replace(AUTOTP, experts=4)
WIDE = replace(AUTOEP, heads=12, kv_heads=12, experts=6, layers=4, shared_expert=True)
"""Heads and experts for more ranks, in two layers, with a shared expert in each."""
LARGE = ModelConfig(vocab=32000, seq=8, hidden=768, heads=12, kv_heads=12, ffn=3072, layers=11)
"""103 million parameters, for benchmarks: as "gpt_large" and "plain_large"."""
CONFIGS = {
    "gpt": GPT,
    "llama": LLAMA,
    "gqa": GQA,
    "plain": PLAIN,
    "plain_moe": MOE,
    "gpt_moe": GPT_MOE,
    "plain_autotp": AUTOTP,
    "plain_autoep": AUTOEP,
    "plain_autoep_wide": WIDE,
    "gpt_large": LARGE,
    "plain_large": LARGE,
}


@dataclass(frozen=True)
class TensorParallel:
    """The tensor-parallel ranks that share one copy of the model, and which of them this process is."""

    rank: int = 0
    size: int = 1
    group: Any = None


# How tensors are cut -----------------------------------------------------------------------------------


def is_vocabulary(name: str) -> bool:
    """Whether dim 0 of the tensor is the (padded) vocabulary of the parallel model."""
    return name.endswith(("word_embeddings.weight", "lm_head.weight"))


def cut_of(name: str, config: ModelConfig, tp: int) -> tuple[int, tuple[int, ...]] | None:
    """Which dim tensor parallelism cuts and the widths of the sub-parameters along it; None for a replica."""
    if is_vocabulary(name):
        return 0, (config.padded_vocab(tp),)
    if "dense_h_to_4h" in name:
        return 0, (config.ffn, config.ffn) if config.swiglu else (config.ffn,)
    if "query_key_value" in name:
        return 0, config.qkv_widths if config.sub_params else (sum(config.qkv_widths),)
    if name.endswith("dense_4h_to_h.weight"):
        return 1, (config.ffn,)
    if name.endswith("self_attention.dense.weight"):
        return 1, (config.hidden,)
    return None


def shard(whole: Tensor, cut: tuple[int, tuple[int, ...]] | None, tp: TensorParallel) -> Tensor:
    """What this tensor-parallel rank holds of a whole tensor."""
    if cut is None:
        return whole
    dim, widths = cut
    return torch.cat([part.chunk(tp.size, dim)[tp.rank] for part in whole.split(widths, dim)], dim)


def unshard(shards: list[Tensor], cut: tuple[int, tuple[int, ...]] | None) -> Tensor:
    """The whole tensor from the shards of all tensor-parallel ranks in order; of replicas, the first."""
    if cut is None:
        return shards[0]
    dim, widths = cut
    parts = [piece.split([width // len(shards) for width in widths], dim) for piece in shards]
    return torch.cat([piece[i] for i in range(len(widths)) for piece in parts], dim)


# Initial values ----------------------------------------------------------------------------------------


def initial_value(name: str, shape: tuple[int, ...], salt: int) -> Tensor:
    """The whole initial value of a parameter (fp32)."""
    generator = torch.Generator().manual_seed((zlib.crc32(name.encode()) + salt) % 2**31)
    noise = torch.randn(shape, generator=generator)
    if name.endswith("bias"):
        return 0.02 * noise
    return 1 + 0.05 * noise if len(shape) < 2 else 0.08 * noise


def initialise_parallel(
    module: nn.Module, config: ModelConfig, tp: TensorParallel, ep: tuple[int, int] = (0, 1), salt: int = 0
) -> None:
    """Fill this rank's part of the parallel model; see `global_name` for `ep`."""
    with torch.no_grad():
        for local, parameter in module.named_parameters():
            name = global_name(local, config, ep)
            shape = list(parameter.shape)
            cut = cut_of(name, config, tp.size)
            if cut is not None:
                shape[cut[0]] = sum(cut[1])
            if is_vocabulary(name):
                whole = initial_value(name, (max(VOCAB_CEILING, shape[0]), shape[1]), salt)[: shape[0]]
            else:
                whole = initial_value(name, tuple(shape), salt)
            parameter.copy_(shard(whole, cut, tp))


def initialise_plain(module: nn.Module, config: ModelConfig, ep: tuple[int, int] = (0, 1), salt: int = 0) -> None:
    """Fill the plain model; see `global_name` for `ep`."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(initial_value(global_name(name, config, ep), tuple(parameter.shape), salt))


def global_name(name: str, config: ModelConfig, ep: tuple[int, int]) -> str:
    """What an expert's tensor is called by its number among all; `ep`: this rank of the expert-parallel group, and its
    size. Other names stay."""
    rank, size = ep
    return re.sub(
        r"(?<=deepspeed_experts\.)\d+", lambda local: str(rank * config.experts // size + int(local[0])), name
    )
