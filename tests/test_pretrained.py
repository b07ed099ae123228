"""Families against transformers: tiny random models made on the spot, the other programs being passes of our own."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import references
import torch
from safetensors.numpy import load_file, save_file
from torch import Tensor

import ckptlab
from ckptlab.errors import LawError
from ckptlab.sharding import families
from ckptlab.sharding.families import Family, Join, Rename
from ckptlab.testing import check_family

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

TOKENS = torch.tensor([[3, 14, 15, 9, 2, 6, 5, 35], [8, 9, 7, 9, 3, 2, 38, 4]])
EPS, THETA = 1e-5, 500000.0
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 28,
    "rms_norm_eps": EPS,
    "rope_theta": THETA,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True)
class Case:
    """A model of transformers, the family that takes it to a program's names, and that program's forward pass."""

    config: str
    fields: dict[str, Any]
    family: str
    forward: Callable[[dict[str, Tensor]], Tensor]
    heads: tuple[int, int] = (6, 2)
    args: tuple[tuple[str, Any], ...] = ()


def _core(w: dict[str, Tensor], **more: Any) -> Tensor:
    return references.core(w, TOKENS, 2, 2, 3, EPS, THETA, **more)


GPT = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 12, "layer_norm_epsilon": EPS}
CASES = {
    "llama": Case("LlamaConfig", LLAMA, "llama-megatron-core", _core),
    "llama-tied": Case("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, "llama-megatron-core", _core),
    "llama-biases": Case(
        "LlamaConfig", {**LLAMA, "attention_bias": True, "mlp_bias": True}, "llama-megatron-core", _core
    ),
    "mistral": Case("MistralConfig", {**LLAMA, "sliding_window": None}, "llama-megatron-core", _core),
    "qwen2": Case("Qwen2Config", LLAMA | {"head_dim": 4}, "llama-megatron-core", _core),
    "qwen3": Case("Qwen3Config", LLAMA, "llama-megatron-core", _core),
    "llama-interleaved": Case(
        "LlamaConfig",
        {**LLAMA, "attention_bias": True},
        "llama-interleaved-megatron-core",
        lambda w: _core(w, turn=references.turn_neighbours),
    ),
    "qwen3-interleaved": Case(
        "Qwen3Config",
        LLAMA,
        "llama-interleaved-megatron-core",
        lambda w: _core(w, turn=references.turn_neighbours),
    ),
    "mixtral": Case(
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
        "mixtral-megatron-core",
        lambda w: _core(w, top=2),
    ),
    "qwen3_moe": Case(
        "Qwen3MoeConfig",
        {**LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "norm_topk_prob": True},
        "qwen-moe-megatron-core",
        lambda w: _core(w, top=2),
    ),
    "torchtitan": Case(
        "LlamaConfig", LLAMA, "llama-torchtitan", lambda w: references.titan(w, TOKENS, 2, 6, 2, EPS, THETA)
    ),
    "gpt2": Case("GPT2Config", GPT, "gpt2-megatron", lambda w: references.gpt(w, TOKENS, 2, 4, EPS), (4, 4)),
    "gpt_neox": Case(
        "GPTNeoXConfig",
        {
            "vocab_size": 40,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 44,
            "rotary_pct": 0.5,
            "layer_norm_eps": EPS,
        },
        "gpt-neox-sequential",
        lambda w: references.neox(w, TOKENS, 2, 4, EPS, 10000.0, 0.5),
        (4, 4),
    ),
    "bloom": Case(
        "BloomConfig",
        {"vocab_size": 40, "hidden_size": 16, "n_layer": 2, "n_head": 4, "layer_norm_epsilon": EPS},
        "bloom-megatron-deepspeed-tied",
        lambda w: references.bloom(w, TOKENS, 2, 4, EPS),
        (4, 4),
    ),
}


@cache
def model(name: str) -> Any:
    """The model, every parameter drawn, norms and biases too."""
    case = CASES[name]
    torch.manual_seed(5)
    config = getattr(transformers, case.config)(**case.fields)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    return made


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder that transformers writes of a case."""
    root = tmp_path_factory.mktemp("transformers")

    def save(name: str) -> Path:
        if not (root / name).exists():
            model(name).save_pretrained(root / name)
        return root / name

    return save


def logits(of: Any) -> Tensor:
    with torch.no_grad():
        return of(TOKENS).logits


def _numbers(case: Case) -> dict[str, int]:
    heads, kv_heads = case.heads
    return {"heads": heads, "kv_heads": kv_heads}


@pytest.mark.parametrize("name", CASES)
def test_the_other_program_computes_the_same(name: str, saved: Callable[[str], Path]) -> None:
    """transformers' weights under the program's names, through the program's own forward pass."""
    case, right = CASES[name], load_file(saved(name) / "model.safetensors")
    family = families.resolve(case.family)
    left = family.arrays(right, "left", **_numbers(case))
    assert not [n for n in left if n in right]
    computed = case.forward({n: torch.from_numpy(np.ascontiguousarray(a)) for n, a in left.items()})
    torch.testing.assert_close(computed, logits(model(name)), rtol=1e-5, atol=1e-5)
    assert "right" in check_family(family, left, right, **_numbers(case))


@pytest.mark.parametrize("name", CASES)
def test_a_folder_made_of_the_programs_weights_opens_and_computes_the_same(
    name: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """What the program would have written, converted: config.json is made from shapes and its args alone."""
    case, right = CASES[name], load_file(saved(name) / "model.safetensors")
    left = families.resolve(case.family).arrays(right, "left", **_numbers(case))
    (tmp_path / "run").mkdir()
    save_file({n: np.ascontiguousarray(a) for n, a in left.items()}, tmp_path / "run" / "model.safetensors")
    rest = {k: v for k, v in case.fields.items() if k in _SAID}
    (tmp_path / "run" / "config.json").write_text(json.dumps(rest))
    word = name if name in ("mistral",) else case.family
    ckptlab.save_pretrained(ckptlab.open(tmp_path / "run"), tmp_path / "out", family=word, **_numbers(case))
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(opened) is type(model(name))
    assert torch.equal(logits(opened), logits(model(name)))
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == right.keys()


# what no shape says: a program's args would
_SAID = (
    *("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "rope_theta", "rotary_pct", "activation_function"),
    *("num_experts_per_tok", "norm_topk_prob", "max_position_embeddings"),
)


STRETCHED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
NEOX = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 44}
GPT3 = {"vocab_size": 40, "n_embd": 18, "n_layer": 3, "n_head": 3, "n_positions": 12}
VARIANTS: dict[str, tuple[str, dict[str, Any], str, tuple[int, int]]] = {
    "llama, stretched": ("LlamaConfig", {**LLAMA, "rope_scaling": STRETCHED}, "llama-megatron-core", (6, 2)),
    "mistral, window": ("MistralConfig", {**LLAMA, "sliding_window": 3}, "llama-megatron-core", (6, 2)),
    "qwen2, window": (
        "Qwen2Config",
        {**LLAMA, "head_dim": 4, "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 1},
        "llama-megatron-core",
        (6, 2),
    ),
    "qwen3, biases": ("Qwen3Config", {**LLAMA, "attention_bias": True}, "llama-megatron-core", (6, 2)),
    "mixtral, window": (
        "MixtralConfig",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 3},
        "mixtral-megatron-core",
        (6, 2),
    ),
    "qwen2_moe, every second layer": (
        "Qwen2MoeConfig",
        {**LLAMA, **MOE, "head_dim": 4, "shared_expert_intermediate_size": 20, "decoder_sparse_step": 2},
        "qwen-moe-megatron-core",
        (6, 2),
    ),
    "qwen3_moe, first dense": (
        "Qwen3MoeConfig",
        {**LLAMA, **MOE, "mlp_only_layers": [0], "norm_topk_prob": True},
        "qwen-moe-megatron-core",
        (6, 2),
    ),
    "gpt_neox, serial": (
        "GPTNeoXConfig",
        {**NEOX, "rotary_pct": 0.25, "use_parallel_residual": False},
        "gpt-neox-sequential",
        (4, 4),
    ),
    "gpt_neox, no biases": ("GPTNeoXConfig", {**NEOX, "attention_bias": False}, "gpt-neox", (4, 4)),
    "gpt_neox, tied": ("GPTNeoXConfig", {**NEOX, "tie_word_embeddings": True}, "gpt-neox-sequential", (4, 4)),
    "bloom, three heads": (
        "BloomConfig",
        {
            "vocab_size": 40,
            "hidden_size": 24,
            "n_layer": 2,
            "n_head": 3,
            "apply_residual_connection_post_layernorm": True,
        },
        "bloom-megatron-deepspeed-tied",
        (3, 3),
    ),
    "gpt2, exact gelu": (
        "GPT2Config",
        {**GPT3, "activation_function": "gelu", "n_inner": 50},
        "gpt2-megatron-core",
        (3, 3),
    ),
    "gpt2, untied": ("GPT2Config", {**GPT3, "tie_word_embeddings": False}, "gpt2-megatron-deepspeed", (3, 3)),
    "gpt2, linear": ("GPT2Config", GPT3, "conv1d", (3, 3)),
}
_ALSO = (
    *("sliding_window", "use_sliding_window", "max_window_layers", "use_parallel_residual", "rope_scaling"),
    "apply_residual_connection_post_layernorm",
)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_goes_there_and_back(name: str, tmp_path: Path) -> None:
    """A folder in several files, under a program's names, and back: the same bits, class and logits."""
    word, fields, family, (heads, kv_heads) = VARIANTS[name]
    torch.manual_seed(5)
    config = getattr(transformers, word)(**fields)
    made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1))
    made.save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists()
    numbers = {"heads": heads, "kv_heads": kv_heads}
    left = families.resolve(family).onto(ckptlab.open(tmp_path / "hf"), "left", **numbers)
    assert not left.findings
    ckptlab.save_weights(left, tmp_path / "run")
    said = {k: v for k, v in fields.items() if k in (*_SAID, *_ALSO)}
    (tmp_path / "run" / "config.json").write_text(json.dumps(said))
    ckptlab.save_pretrained(tmp_path / "run", tmp_path / "out", family=family, **numbers)
    again, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert type(again) is type(made)
    assert not any(loaded[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched"))
    assert torch.equal(logits(again), logits(made))
    assert ckptlab.diff(tmp_path / "out", tmp_path / "hf").equal


def test_linear_layers_are_no_gpt2s(tmp_path: Path) -> None:
    tensors = {"transformer.wte.weight": (5, 4), "transformer.h.0.attn.c_attn.weight": (12, 4)}
    (tmp_path / "run").mkdir()
    save_file({n: np.zeros(shape, np.float32) for n, shape in tensors.items()}, tmp_path / "run" / "model.safetensors")
    with pytest.raises(ckptlab.LayoutError, match="say family='conv1d'"):
        ckptlab.save_pretrained(tmp_path / "run", tmp_path / "out")


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_in_memory_are_those_of_the_files(name: str, saved: Callable[[str], Path]) -> None:
    held = {n: t.numpy() for n, t in model(name).state_dict().items() if ".mlp.experts." in n}
    there = {n: a for n, a in load_file(saved(name) / "model.safetensors").items() if ".experts." in n}
    family = families.resolve("mixtral-stacked" if name == "mixtral" else "qwen-moe-stacked")
    assert "left" in check_family(family, held, there)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_run_of_autoep_is_opened_by_transformers(name: str, saved: Callable[[str], Path], tmp_path: Path) -> None:
    """w1 and w3 are the halves of what transformers has in memory (`module_inject/auto_ep_layer.py`)."""
    fused, run = {}, tmp_path / "run"
    for key, tensor in model(name).state_dict().items():
        array = tensor.numpy()
        if key.endswith("experts.gate_up_proj"):
            before = key.removesuffix("gate_up_proj")
            fused[f"{before}w1"], fused[f"{before}w3"] = np.split(array, 2, axis=1)
        else:
            key = key.replace("experts.down_proj", "experts.w2").replace("mlp.gate.weight", "mlp.router.gate.weight")
            fused[key] = array
    run.mkdir()
    save_file({n: np.ascontiguousarray(a) for n, a in fused.items()}, run / "model.safetensors")
    (run / "config.json").write_text((saved(name) / "config.json").read_text())
    assert ckptlab.diff(run, saved(name)).equal  # of which most names are in both
    ckptlab.save_pretrained(ckptlab.open(run), tmp_path / "out")
    opened = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert torch.equal(logits(opened), logits(model(name)))
    assert (
        load_file(tmp_path / "out" / "model.safetensors").keys() == load_file(saved(name) / "model.safetensors").keys()
    )


@pytest.mark.parametrize("wrong", ["level", "rotary"])
def test_a_wrong_line_is_caught_by_the_law_and_by_diff(
    wrong: str, saved: Callable[[str], Path], tmp_path: Path
) -> None:
    """Interleaved a level off, or with the rotary permutation forgotten."""
    name = "llama" if wrong == "level" else "torchtitan"
    case, right = CASES[name], load_file(saved(name) / "model.safetensors")
    family = families.resolve(case.family)
    left = family.arrays(right, "left", **_numbers(case))
    lines = [_planted(line) for line in family.lines]
    planted = Family("planted", "", tuple(lines))
    with pytest.raises(LawError, match="the same elements in another order|other elements"):
        check_family(planted, left, right, **_numbers(case))


def _planted(line: Any) -> Any:
    if line.whole.endswith("linear_qkv.weight"):
        return Join(line.whole, "(kv q d + kv d + kv d) in", [name for name, _ in line.parts])
    if line.whole.endswith((".wq.weight", ".wk.weight")):
        return Rename(line.whole, line.parts[0][0])
    return line
