"""Tiny models of Megatron-core's own, run on a CPU: `python real_megatron.py TP FOLDER CASE …`.

Of each case it writes FOLDER/CASE/logits.npy, the model's answer to TOKENS, and FOLDER/CASE/iter_0000001, what its
`dist_checkpointing` saves of it. It computes with FOLDER/CASE/weights.safetensors, whole tensors under its names, where
that is there (on one rank); else every parameter is drawn.

Megatron-core wants CUDA. What stands in here for it decides nothing that is computed: `torch.cuda.current_device()`
says cpu, `synchronize()` and the tracker of CUDA's random numbers, of which dropout of 0 draws none, do nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn import functional
from torch.overrides import TorchFunctionMode

TOKENS = [[3, 14, 15, 9, 2, 6, 5, 35], [8, 9, 7, 9, 3, 2, 38, 4]]
EPS, THETA, VOCAB, LENGTH, LAYERS, HIDDEN = 1e-5, 500000.0, 40, 16, 2, 24
SIZES: dict[str, Any] = {"num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": 6, "ffn_hidden_size": 28}
PLAIN: dict[str, Any] = {
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layernorm_epsilon": EPS,
    "use_cpu_initialization": True,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
    "gradient_accumulation_fusion": False,
}
GATED: dict[str, Any] = {
    "gated_linear_unit": True,
    "activation_func": functional.silu,
    "normalization": "RMSNorm",
    "num_query_groups": 2,
    "kv_channels": 8,
    "add_bias_linear": False,
}
EXPERTS: dict[str, Any] = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 12,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_load_balancing_type": "none",
    "moe_router_pre_softmax": False,
}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"activation_func": lambda x: functional.gelu(x, approximate="tanh")},
    "llama": GATED,
    "llama-tied": {**GATED, "tied": True},
    "llama-biases": {**GATED, "add_bias_linear": True},
    "llama-interleaved": {**GATED, "rotary_interleaved": True},
    "llama-stretched": {**GATED, "rope_scaling": True},
    "mistral": {**GATED, "window_size": (3, 0)},
    "qwen2": {**GATED, "add_qkv_bias": True, "kv_channels": 4},
    "qwen3": {**GATED, "qk_layernorm": True},
    "mixtral": {**GATED, **EXPERTS},
    "qwen3_moe": {**GATED, **EXPERTS, "qk_layernorm": True},
    "qwen2_moe": {
        **GATED,
        **EXPERTS,
        "add_qkv_bias": True,
        "kv_channels": 4,
        "moe_router_pre_softmax": True,
        "moe_shared_expert_intermediate_size": 20,
        "moe_shared_expert_gate": True,
    },
}
"""What transformers calls it, and what Megatron-core's `TransformerConfig` then says."""


class _OnCpu(TorchFunctionMode):
    """A mask of attention within a window is made on "cuda", whatever it masks."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        return func(*args, **(given | {"device": "cpu"} if given.get("device") == "cuda" else given))


class _NoRandomNumbers:
    def fork(self, name: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return True

    def is_inference_rng_tracker(self) -> bool:
        return False


def model_of(case: str, tp: int) -> tuple[Any, argparse.Namespace]:
    """The model, and what `args` of a training script would say of it."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.moe import moe_utils
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not hasattr(moe_utils, "te_general_gemm"):  # 0.16.1 leaves it out where Transformer Engine is not installed
        moe_utils.te_general_gemm = None
    said = dict(CASES[case])
    tied, stretched = said.pop("tied", case == "gpt2"), said.pop("rope_scaling", False)
    config = TransformerConfig(**{**SIZES, **PLAIN, **said}, tensor_model_parallel_size=tp)
    norm = {"normalization": "RMSNorm"} if "normalization" in said else {}
    norm = norm | {"qk_layernorm": config.qk_layernorm, "num_experts": config.num_moe_experts}
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(**norm, moe_grouped_gemm=False),
        vocab_size=VOCAB,
        max_sequence_length=LENGTH,
        parallel_output=False,
        share_embeddings_and_output_weights=tied,
        position_embedding_type="learned_absolute" if case == "gpt2" else "rope",
        rotary_base=THETA,
        rope_scaling=stretched,
        rope_scaling_factor=8.0,
    )
    args = argparse.Namespace(
        num_layers=LAYERS,
        num_attention_heads=6,
        group_query_attention="num_query_groups" in said,
        num_query_groups=said.get("num_query_groups", 1),
        kv_channels=config.kv_channels,
        layernorm_epsilon=EPS,
        rotary_base=THETA,
        max_position_embeddings=LENGTH,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=1,
        world_size=tp,
        swiglu=config.gated_linear_unit,
        bias_gelu_fusion=True,
        rotary_interleaved=config.rotary_interleaved,
        use_rope_scaling=stretched,
        rope_scaling_factor=8.0,
        window_size=config.window_size,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_topk=config.moe_router_topk,
    )
    return model.eval(), args


def fill(model: Any, weights: Path) -> None:
    """Every parameter drawn, norms and biases too, or taken from the file."""
    torch.manual_seed(11 + dist.get_rank())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn_like(parameter) * 0.2 + name.endswith("norm.weight")
            if not getattr(parameter, "tensor_model_parallel", False):  # the same on every rank
                dist.broadcast(drawn, 0)
            parameter.copy_(drawn)
    if weights.exists():
        from safetensors.torch import load_file

        own = {
            "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
            "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
        }
        given = load_file(weights)
        for saved, called in own.items():  # files have Transformer Engine's names, by its `sharded_state_dict_keys_map`
            given = {name.replace(saved, called): tensor for name, tensor in given.items()}
        beside = {name for name in model.state_dict() if name.endswith("_extra_state")}
        loaded = model.load_state_dict(given, strict=False)
        assert not loaded.unexpected_keys, loaded.unexpected_keys
        assert not {*loaded.missing_keys} - beside, loaded.missing_keys


def run(rank: int, tp: int, folder: str, cases: list[str]) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *of: None
    dist.init_process_group("gloo", rank=rank, world_size=tp, init_method=f"file://{folder}/ranks")
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.tensor_parallel import random

    parallel_state.initialize_model_parallel(tp, 1)
    random._CUDA_RNG_STATE_TRACKER = _NoRandomNumbers()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    tokens = torch.tensor(TOKENS)
    count = tokens.shape[1]
    future = torch.ones(count, count, dtype=torch.bool).triu(1)[None, None]
    for case in cases:
        place = Path(folder) / case
        model, args = model_of(case, tp)
        fill(model, place / "weights.safetensors")
        with torch.no_grad(), _OnCpu():
            answer = model(tokens, torch.arange(count).expand(tokens.shape), future)
        (place / "iter_0000001").mkdir(parents=True, exist_ok=True)
        dist.barrier()
        state = {"args": args, "iteration": 1, "checkpoint_version": 3.0, "model": model.sharded_state_dict()}
        dist_checkpointing.save(state, str(place / "iter_0000001"))
        if rank == 0:
            np.save(place / "logits.npy", answer.numpy())
    dist.barrier()
    os._exit(0)  # its writer leaves a process running, which who started this ends


if __name__ == "__main__":
    tp, folder, *cases = sys.argv[1:]
    Path(folder).mkdir(parents=True, exist_ok=True)
    if int(tp) == 1:
        run(0, 1, folder, cases)
    torch.multiprocessing.start_processes(run, (int(tp), folder, cases), int(tp), start_method="spawn")
