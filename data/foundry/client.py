"""What Megatron keeps beside the weights: arguments, random states, universal_checkpoint_info."""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch

from foundry.models import ModelConfig
from foundry.train import BATCH, DTYPES, Case


def client_state(case: Case, step: int) -> dict[str, Any]:
    """The client state of a run of the parallel model at `step`."""
    config, padded = case.config, case.config.padded_vocab(case.tp)
    args = argparse.Namespace(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        data_parallel_size=case.dp,
        world_size=case.world,
        num_layers=config.layers,
        hidden_size=config.hidden,
        ffn_hidden_size=config.ffn,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        seq_length=config.seq,
        max_position_embeddings=config.seq,
        make_vocab_size_divisible_by=config.vocab_divisor,
        padded_vocab_size=padded,
        swiglu=config.swiglu,
        normalization="rmsnorm" if config.rms_norm else "layernorm",
        add_bias_linear=config.bias,
        untie_embeddings_and_output_weights=config.untied,
        use_rotary_position_embeddings=config.rotary,
        params_dtype=DTYPES[case.dtype],
        bf16=case.dtype == "bf16",
        fp16=case.dtype == "fp16",
        iteration=step,
        consumed_train_samples=step * BATCH,
        deepspeed=True,
        zero_stage=case.zero,
    )
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": step,
        "tokens": step * BATCH * config.seq,
        "checkpoint_info": {"padded_vocab_size": padded, "original_vocab_size": config.vocab},
        "rng_state": [_random_states()],
        "universal_checkpoint_info": universal_checkpoint_info(config, case.tp),
    }


def _random_states() -> dict[str, Any]:
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
    }


def universal_checkpoint_info(config: ModelConfig, tp: int) -> dict[str, Any]:
    """DeepSpeed's own description of how tensors are cut (keys: deepspeed/checkpoint/constants.py).

    As in Megatron-DeepSpeed, the patterns of replicated and row-parallel tensors are left out at tp 1.
    """
    tied = "tied_modules.embed."
    prefix = r"\d+." if config.untied else tied
    vocabulary = [prefix + "word_embeddings.weight"] + ([r"\d+.lm_head.weight"] if config.untied else [])
    positions = [] if config.rotary else [prefix + "position_embeddings.weight"]
    info: dict[str, Any] = {
        "universal_checkpoint_version": 0.4,
        "original_vocab_size": config.vocab,
        "padded_vocab_size": config.padded_vocab(tp),
        "vocabulary_parameter_patterns": vocabulary,
        "pipeline_replicated_parameter_patterns": [] if config.untied else vocabulary + positions,
    }
    if tp > 1:
        info["tp_replicated_parameter_patterns"] = _replicated_patterns(config) + positions
        info["parameter_with_row_parallelism_patterns"] = [
            r"\d+.mlp.dense_4h_to_h.weight",
            r"\d+.self_attention.dense.weight",
        ]
    if config.swiglu:
        kinds = ["weight", "bias"] if config.bias else ["weight"]
        info["parameter_with_2_sub_params_cat_dim_0"] = [rf"\d+.mlp.dense_h_to_4h.{kind}" for kind in kinds]
    if config.sub_params:
        info |= _sub_params(config, tp)
    return info


def _replicated_patterns(config: ModelConfig) -> list[str]:
    norms = [r"\d+.input_layernorm", r"\d+.post_attention_layernorm", r"\d+"]
    kinds = ["weight"] if config.rms_norm else ["weight", "bias"]
    patterns = [f"{norm}.{kind}" for kind in kinds for norm in norms]
    if config.bias:
        patterns += [r"\d+.self_attention.dense.bias", r"\d+.mlp.dense_4h_to_h.bias"]
    return patterns


def _sub_params(config: ModelConfig, tp: int) -> dict[str, Any]:
    widths = config.qkv_widths
    shapes = {r"\d+.self_attention.query_key_value.weight": [widths, config.hidden]}
    if config.bias:
        shapes[r"\d+.self_attention.query_key_value.bias"] = [widths]
    return {
        "parameter_with_sub_params": [
            {"patterns": [pattern], "shape": shape, "partition_dim": 0} for pattern, shape in shapes.items()
        ],
        "sub_param_shard_widths": {pattern: [[width // tp] * tp for width in widths] for pattern in shapes},
    }
