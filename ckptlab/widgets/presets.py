"""Shapes of today's models, to start from: on paper, as their authors publish them.

Only matrices and the norms of a layer: biases, position embeddings, norms within attention, heads for several tokens at
once, and what sees pictures are left out, which is under one part in a hundred of each. tests/test_presets.py holds the
sums against what the authors say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckptlab.sharding.transformer import PaperModel


@dataclass(frozen=True)
class Preset:
    """A model's numbers, its parameters as its authors count them (billions), and where both are from; `active`: to how
    many of a layer's experts a token goes."""

    model: PaperModel
    billions: float
    source: str
    active: int = 1


def _model(layers: int, hidden: int, heads: int, kv: int, ffn: int, vocab: int, **others: Any) -> PaperModel:
    return PaperModel(layers, hidden, heads, kv, ffn, vocab, **{"tied": False, "gated": True} | others)


_LLAMA3 = "Grattafiori et al. 2024, arXiv:2407.21783, table 3"
_QWEN3 = "Yang et al. 2025, arXiv:2505.09388, tables 1 and 2, and the models' config.json"
_MIXTRAL = "Jiang et al. 2024, arXiv:2401.04088, table 1, and the models' config.json"
_OSS = "OpenAI 2025, arXiv:2508.10925, table 1, and the models' config.json"

PRESETS: dict[str, Preset] = {
    "GPT-2": Preset(PaperModel(12, 768, 12, vocab=50257), 0.124, "Radford et al. 2019, table 2"),
    "GPT-3 175B": Preset(
        PaperModel(96, 12288, 96, vocab=50257), 174.6, "Brown et al. 2020, arXiv:2005.14165, table 2.1"
    ),
    "Llama 2 7B": Preset(_model(32, 4096, 32, 32, 11008, 32000), 6.74, "Touvron et al. 2023, arXiv:2307.09288"),
    "Llama 3 8B": Preset(_model(32, 4096, 32, 8, 14336, 128256), 8.03, _LLAMA3),
    "Llama 3 70B": Preset(_model(80, 8192, 64, 8, 28672, 128256), 70.6, _LLAMA3),
    "Llama 3 405B": Preset(_model(126, 16384, 128, 8, 53248, 128256), 405.9, _LLAMA3),
    "Llama 4 Scout": Preset(
        _model(48, 5120, 40, 8, 8192, 202048, head_dim=128, experts=16, shared_ffn=8192),
        107.8,
        "Meta 2025, config.json of Llama-4-Scout-17B-16E, its text model",
    ),
    "Qwen 3 8B": Preset(_model(36, 4096, 32, 8, 12288, 151936, head_dim=128), 8.19, _QWEN3),
    "Qwen 3 32B": Preset(_model(64, 5120, 64, 8, 25600, 151936, head_dim=128), 32.8, _QWEN3),
    "Qwen 3 235B A22B": Preset(_model(94, 4096, 64, 4, 1536, 151936, head_dim=128, experts=128), 235, _QWEN3, 8),
    "DeepSeek-V3": Preset(
        _model(
            61,
            7168,
            128,
            128,
            2048,
            129280,
            head_dim=128,
            experts=256,
            shared_ffn=2048,
            dense_layers=3,
            dense_ffn=18432,
            latent=(1536, 512, 64, 128),
        ),
        671,
        "DeepSeek-AI 2024, arXiv:2412.19437, section 4.2",
        8,
    ),
    "Mixtral 8x7B": Preset(_model(32, 4096, 32, 8, 14336, 32000, experts=8), 46.7, _MIXTRAL, 2),
    "Mixtral 8x22B": Preset(_model(56, 6144, 48, 8, 16384, 32768, experts=8), 141, _MIXTRAL, 2),
    "gpt-oss 20B": Preset(_model(24, 2880, 64, 8, 2880, 201088, head_dim=64, experts=32), 20.9, _OSS, 4),
    "gpt-oss 120B": Preset(_model(36, 2880, 64, 8, 2880, 201088, head_dim=64, experts=128), 116.8, _OSS, 4),
}
