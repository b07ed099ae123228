"""A transformer with the names of Hugging Face's Qwen3-MoE, whole when it is made, whose experts DeepSpeed's AutoEP
then spreads: four in every second layer."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from foundry.autotp import AutoTPTransformer, FeedForward
from foundry.models import ModelConfig

EXPERTS = re.compile(r".*\.experts\.w[123]")


def setting(ep: int, shared: bool) -> dict[str, Any]:
    """DeepSpeed's `expert_parallel` for it, with a shared expert or without."""
    said = {"has_shared_experts": True, "shared_experts_pattern": "shared_expert"} if shared else {}
    return {
        "enabled": True,
        "autoep_size": ep,
        "moe_layer_pattern": r"layers\.\d+\.mlp",
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "num_experts_attr": "num_experts",
        "top_k": 2,
        "use_grouped_mm": False,
        **said,
    }


class Experts(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(config.experts, 2 * config.ffn, config.hidden))
        self.down_proj = nn.Parameter(torch.empty(config.experts, config.hidden, config.ffn))


class MoE(nn.Module):
    """What AutoEP recognises, and puts a layer of its own in the place of."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = nn.Linear(config.hidden, config.experts, bias=False)
        self.experts = Experts(config)
        if config.shared_expert:
            self.shared_expert = FeedForward(config)

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("AutoEP computes it")


class AutoEPTransformer(AutoTPTransformer):
    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.config.num_experts = config.experts
        for layer in list(self.layers)[1::2]:
            layer.mlp = MoE(config)
