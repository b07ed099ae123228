"""A transformer with the names of Hugging Face's Llama, whole when it is made, which DeepSpeed's AutoTP then cuts.

Three key/value heads over two ranks, 37 hidden features, 61 tokens: nothing is divided evenly.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from foundry.models import ModelConfig
from foundry.plain import attend

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head")
ROW = ("o_proj", "down_proj")


def setting(tp: int) -> dict[str, Any]:
    """DeepSpeed's `tensor_parallel` for it."""
    spoken = {name: {"patterns": [rf".*{name}\.weight$"], "partition_type": "column"} for name in COLUMN}
    spoken["lm_head"]["gather_output"] = True
    spoken |= {name: {"patterns": [rf".*{name}\.weight$"], "partition_type": "row"} for name in ROW}
    return {"autotp_size": tp, "partition_config": {"use_default_specs": False, "layer_specs": [*spoken.values()]}}


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        q, k, v = config.qkv_widths
        self.head_dim = config.head_dim
        self.q_proj = nn.Linear(config.hidden, q, bias=False)
        self.k_proj = nn.Linear(config.hidden, k, bias=False)
        self.v_proj = nn.Linear(config.hidden, v, bias=False)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (-1, self.head_dim)) for part in (self.q_proj, self.k_proj, self.v_proj))
        return self.o_proj(attend(q, k, v))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.up_proj = nn.Linear(config.hidden, config.ffn, bias=False)
        self.down_proj = nn.Linear(config.ffn, config.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.mlp = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class HeadCounts:
    """What AutoTP reads of a model's configuration."""

    def __init__(self, config: ModelConfig):
        self.hidden_size = config.hidden
        self.num_attention_heads = config.heads
        self.num_key_value_heads = config.kv_heads


class AutoTPTransformer(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = HeadCounts(config)
        self.embed_tokens = nn.Embedding(config.vocab, config.hidden)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.layers)])
        self.norm = nn.RMSNorm(config.hidden, eps=1e-6)
        self.lm_head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The loss of (batch, seq) tokens."""
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        logits = self.lm_head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def cut_dim(name: str) -> int | None:
    """Which dim AutoTP cuts; None for what every rank has."""
    module = name.split(".")[-2] if "." in name else ""
    return 0 if module in COLUMN else 1 if module in ROW else None
