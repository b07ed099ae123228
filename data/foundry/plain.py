"""The plain transformer, whole on every rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from foundry.models import ModelConfig


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of (batch, seq, head, d) to (batch, seq, head*d); k and v may have fewer heads."""
    repeats = q.shape[2] // max(k.shape[2], 1)  # AutoTP leaves some tp ranks no heads
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(repeats, 2), v.repeat_interleave(repeats, 2)))
    scores = (q @ k.transpose(-1, -2)).float() / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(future, -1e4).softmax(-1).to(v.dtype)
    return (weights @ v).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    """What DeepSpeed makes an expert of."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(x)))


def experts(config: ModelConfig, ep: int) -> nn.Module:
    """DeepSpeed's residual MoE, whose experts are spread over `ep` ranks."""
    from deepspeed.moe.layer import MoE

    return MoE(
        config.hidden,
        FeedForward(config),
        num_experts=config.experts,
        ep_size=ep,
        capacity_factor=4.0,
        eval_capacity_factor=4.0,
        use_rts=False,
        use_residual=True,
    )


class PlainBlock(nn.Module):
    def __init__(self, config: ModelConfig, ep: int = 0):
        super().__init__()
        self.heads = config.heads
        self.ln1 = nn.LayerNorm(config.hidden)
        self.qkv = nn.Linear(config.hidden, 3 * config.hidden)
        self.proj = nn.Linear(config.hidden, config.hidden)
        self.ln2 = nn.LayerNorm(config.hidden)
        if ep:
            self.moe = experts(config, ep)
            return
        self.fc1 = nn.Linear(config.hidden, config.ffn)
        self.fc2 = nn.Linear(config.ffn, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.qkv(self.ln1(x)).chunk(3, -1))
        x = x + self.proj(attend(q, k, v))
        if hasattr(self, "moe"):
            return x + self.moe(self.ln2(x))[0]
        return x + self.fc2(functional.gelu(self.fc1(self.ln2(x))))


class PlainTransformer(nn.Module):
    """Whole on every rank, and awkward on purpose: odd sizes, a tied head, a frozen layer, a parameter of one
    element and one of none of the usual shapes, a buffer that is saved and one that is not. Where there are experts,
    every second layer's are spread over `ep` ranks."""

    seen: Tensor
    positions: Tensor

    def __init__(self, config: ModelConfig, ep: int = 1):
        super().__init__()
        self.wte = nn.Embedding(config.vocab, config.hidden)
        self.wpe = nn.Embedding(config.seq, config.hidden)
        self.blocks = nn.ModuleList(
            [PlainBlock(config, ep if config.experts and i % 2 else 0) for i in range(config.layers)]
        )
        self.ln_f = nn.LayerNorm(config.hidden)
        self.adapter = nn.Linear(config.hidden, 5).requires_grad_(False)
        self.scale = nn.Parameter(torch.empty(1))
        self.gains = nn.Parameter(torch.empty(7))
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.lm_head.weight = self.wte.weight
        self.register_buffer("seen", torch.zeros(3))
        self.register_buffer("positions", torch.arange(config.seq), persistent=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss of (batch, seq) tokens."""
        x = self.wte(tokens) + self.wpe(self.positions)
        for block in self.blocks:
            x = block(x)
        x = self.ln_f(x)
        x = x + 0.01 * self.adapter(x).sum(-1, keepdim=True)
        logits = self.lm_head(x).float() * self.scale.float() + self.gains.float().mean() * 0.01 * x.float().mean()
        self.seen += 1
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
