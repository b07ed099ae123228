"""A checkpoint of BLOOM-176B's shape whose data are holes: 720 files, 2.5 TB apparent, tens of MB on disk, in seconds.

tp 4, pp 12, dp 8: 384 ranks; 70 layers of hidden size 14,336; structure and sizes as DeepSpeed's BF16_Optimizer and
pipeline engine write them. Every element reads as 0.

`python benchmarks/holes.py FOLDER` makes it in FOLDER, which must lie on a file system that keeps holes. With
`--experts` it is a mixture of experts (DeepSpeed-MoE, ZeRO-2): 64 of them in each of 32 layers, ep 8 in dp 16. With
`--tensors 300000` it is one file of safetensors with so many matrices and vectors of four shapes.
"""

from __future__ import annotations

import argparse
import json
import math
import struct
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ckptlab.formats.deepspeed.groups import LARGEST
from ckptlab.formats.fileplan import Zeros
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import Size, foreign

TP, PP, DP = 4, 12, 8
LAYERS, HIDDEN, VOCAB, PADDED = 70, 14336, 250680, 250880
FIRST, LAST = 3, LAYERS + 4  # the pipeline's numbers of the first block and of the final norm
STEP = 95000

Shapes = Mapping[str, tuple[int, ...]]
BLOCK: Shapes = {
    "input_layernorm.weight": (HIDDEN,),
    "input_layernorm.bias": (HIDDEN,),
    "self_attention.query_key_value.weight": (3 * HIDDEN // TP, HIDDEN),
    "self_attention.query_key_value.bias": (3 * HIDDEN // TP,),
    "self_attention.dense.weight": (HIDDEN, HIDDEN // TP),
    "self_attention.dense.bias": (HIDDEN,),
    "post_attention_layernorm.weight": (HIDDEN,),
    "post_attention_layernorm.bias": (HIDDEN,),
    "mlp.dense_h_to_4h.weight": (4 * HIDDEN // TP, HIDDEN),
    "mlp.dense_h_to_4h.bias": (4 * HIDDEN // TP,),
    "mlp.dense_4h_to_h.weight": (HIDDEN, 4 * HIDDEN // TP),
    "mlp.dense_4h_to_h.bias": (HIDDEN,),
}
EMBED: Shapes = {
    "word_embeddings.weight": (PADDED // TP, HIDDEN),
    "word_embeddings.norm.weight": (HIDDEN,),
    "word_embeddings.norm.bias": (HIDDEN,),
}
NORM: Shapes = {"weight": (HIDDEN,), "bias": (HIDDEN,)}
TIED = "tied_modules.embed."
INFO = {
    "universal_checkpoint_version": 0.2,
    "original_vocab_size": VOCAB,
    "padded_vocab_size": PADDED,
    "vocabulary_parameter_patterns": [TIED + "word_embeddings.weight"],
    "pipeline_replicated_parameter_patterns": [TIED + "word_embeddings.weight"],
    "tp_replicated_parameter_patterns": [
        r"\d+.input_layernorm.weight",
        r"\d+.input_layernorm.bias",
        r"\d+.post_attention_layernorm.weight",
        r"\d+.post_attention_layernorm.bias",
        r"\d+.self_attention.dense.bias",
        r"\d+.mlp.dense_4h_to_h.bias",
        TIED + "word_embeddings.norm.weight",
        TIED + "word_embeddings.norm.bias",
        rf"{LAST}.weight",
        rf"{LAST}.bias",
    ],
    "parameter_with_row_parallelism_patterns": [r"\d+.self_attention.dense.weight", r"\d+.mlp.dense_4h_to_h.weight"],
}


def hole(shape: tuple[int, ...], dtype: np.dtype) -> torchfile.Pending:
    """A tensor of which nothing is written."""
    return torchfile.Pending(dtype, shape, (Zeros(math.prod(shape) * dtype.itemsize),))


def _holes(shapes: Shapes) -> OrderedDict[str, torchfile.Pending]:
    return OrderedDict((name, hole(shape, np.dtype(ml_dtypes.bfloat16))) for name, shape in shapes.items())


def _groups(stage: int) -> list[Shapes]:
    """Shapes of what a stage's optimizer holds: matrices, and what weight decay leaves out."""
    shapes: dict[str, tuple[int, ...]] = {}
    if stage in (0, PP - 1):
        shapes |= {TIED + name: shape for name, shape in EMBED.items()}
    for layer in range(round(stage * LAYERS / PP), round((stage + 1) * LAYERS / PP)):
        shapes |= {f"{layer + FIRST}.{name}": shape for name, shape in BLOCK.items()}
    if stage == PP - 1:
        shapes |= {f"{LAST}.{name}": shape for name, shape in NORM.items()}
    return [{n: s for n, s in shapes.items() if (len(s) > 1) == matrices} for matrices in (True, False)]


def _model(groups: list[Shapes]) -> dict[str, Any]:
    return {
        "param": None,
        "buffer_names": [],
        "optimizer": None,
        "param_shapes": [OrderedDict((n, Size(s)) for n, s in group.items()) for group in groups],
        "frozen_param_shapes": None,
        "shared_params": {},
        "frozen_param_fragments": None,
        "lr_scheduler": None,
        "global_steps": STEP,
        "global_samples": STEP * 2048,
        "skipped_steps": 0,
        "dp_world_size": DP,
        "mp_world_size": TP * PP,
        "ds_config": {"bf16": {"enabled": True}},
        "ds_version": "0.19.8",
        "iteration": STEP,
        "checkpoint_parallel_dimensions": {"pp_degree": PP, "tp_degree": TP},
        "universal_checkpoint_info": INFO,
        "args": foreign(
            "argparse",
            "Namespace",
            state={
                "num_layers": LAYERS,
                "hidden_size": HIDDEN,
                "num_attention_heads": 112,
                "padded_vocab_size": PADDED,
            },
            new=True,
        ),
    }


def _spans(group: Shapes, size: int, dp: int) -> OrderedDict[str, Any]:
    """DeepSpeed's record of what lies in a dp rank's partition of a flat buffer."""
    spans, offset = OrderedDict(), 0
    for name, shape in group.items():
        start, end = max(offset, dp * size), min(offset + math.prod(shape), (dp + 1) * size)
        if start < end:
            state = {"numel": end - start, "start": start - dp * size}
            spans[name] = foreign("deepspeed.utils.tensor_fragment", "fragment_address", state=state, new=True)
        offset += math.prod(shape)
    return spans


def _optimizer(groups: list[Shapes], dp: int) -> dict[str, Any]:
    totals = [sum(map(math.prod, group.values())) for group in groups]
    sizes = [-(-total // (2 * DP)) * 2 for total in totals]  # one dp rank's part of a multiple of 2 dp
    f32 = np.dtype(np.float32)
    moments = {
        i: {"step": STEP, "exp_avg": hole((n,), f32), "exp_avg_sq": hole((n,), f32)} for i, n in enumerate(sizes)
    }
    options = [{"lr": 6e-5, "weight_decay": decay, "params": [i]} for i, decay in enumerate((0.1, 0.0))]
    state = {
        "clip_grad": 1.0,
        "base_optimizer_state": {"state": moments, "param_groups": options},
        "single_partition_of_fp32_groups": [hole((n,), f32) for n in sizes],
        "group_paddings": [n * DP - total if dp == DP - 1 else 0 for n, total in zip(sizes, totals, strict=True)],
        "partition_count": [DP] * len(groups),
        "ds_version": "0.19.8",
        "param_slice_mappings": [_spans(group, size, dp) for group, size in zip(groups, sizes, strict=True)],
    }
    return {"optimizer_state_dict": state, "ds_config": {"bf16": {"enabled": True}}, "ds_version": "0.19.8"}


def make(folder: Path) -> Path:
    """The checkpoint in `folder`, which must not exist yet."""
    folder.mkdir(parents=True)
    for tp in range(TP):
        torchfile.write(folder / f"layer_01-model_{tp:02d}-model_states.pt", _holes(EMBED))
        for layer in range(FIRST, FIRST + LAYERS):
            torchfile.write(folder / f"layer_{layer:02d}-model_{tp:02d}-model_states.pt", _holes(BLOCK))
        torchfile.write(folder / f"layer_{LAST:02d}-model_{tp:02d}-model_states.pt", _holes(NORM))
    for stage in range(PP):
        groups = _groups(stage)
        for mp in range(stage * TP, (stage + 1) * TP):
            torchfile.write(folder / f"mp_rank_{mp:02d}_model_states.pt", _model(groups))
            for dp in range(DP):
                name = f"bf16_zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"
                torchfile.write(folder / name, _optimizer(groups, dp))
    return folder


EXPERTS, MOE_LAYERS, EP, MOE_DP, WIDTH = 64, 32, 8, 16, 4096
IN_LAYER = "blocks.{}.moe.deepspeed_moe.experts.deepspeed_experts.{}."
EXPERT: Shapes = {"fc1.weight": (2 * WIDTH, WIDTH), "fc1.bias": (2 * WIDTH,), "fc2.weight": (WIDTH, 2 * WIDTH)}
DENSE: Shapes = {
    "ln.weight": (WIDTH,),
    "qkv.weight": (3 * WIDTH, WIDTH),
    "proj.weight": (WIDTH, WIDTH),
    "moe.deepspeed_moe.gate.wg.weight": (EXPERTS, WIDTH),
}


def _of_experts(layer: int, experts: range, first: int = 0) -> dict[str, tuple[int, ...]]:
    """Shapes of a layer's experts, numbered from `first` on."""
    return {f"{IN_LAYER.format(layer, first + i)}{n}": s for i, _ in enumerate(experts) for n, s in EXPERT.items()}


def make_experts(folder: Path) -> Path:
    """The mixture of experts in `folder`, which must not exist yet."""
    folder.mkdir(parents=True)
    f32, local = np.dtype(np.float32), range(EXPERTS // EP)
    dense = {f"blocks.{i}.{n}": s for i in range(MOE_LAYERS) for n, s in DENSE.items()}
    groups: list[dict[str, tuple[int, ...]]] = [dense, {}]
    for name, shape in (one for i in range(MOE_LAYERS) for one in _of_experts(i, local).items()):
        if sum(map(math.prod, groups[-1].values())) + math.prod(shape) > LARGEST:  # as DeepSpeed deals them
            groups.append({})
        groups[-1][name] = shape
    over = (MOE_DP, *[MOE_DP // EP] * (len(groups) - 1))
    model = _model(groups) | {
        "module": _holes(dense),
        "dp_world_size": MOE_DP,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}},
        "num_experts": [EXPERTS] * MOE_LAYERS,
    }
    for key in ("args", "universal_checkpoint_info"):
        del model[key]
    torchfile.write(folder / "mp_rank_00_model_states.pt", model)
    for layer in range(MOE_LAYERS):
        for expert in range(EXPERTS):
            name = f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt"
            torchfile.write(folder / name, _holes(_of_experts(layer, range(1), expert)))
    totals = [sum(map(math.prod, group.values())) for group in groups]
    held = [-(-total // (2 * n)) * 2 for total, n in zip(totals, over, strict=True)]
    for dp in range(MOE_DP):
        part = (dp, *[dp // EP] * (len(groups) - 1))  # ranks of one edp are those with the same ep: dp % EP
        state = {
            "base_optimizer_state": {
                "state": {
                    i: {"step": STEP, "exp_avg": hole((n,), f32), "exp_avg_sq": hole((n,), f32)}
                    for i, n in enumerate(held)
                },
                "param_groups": [
                    {"lr": 6e-5, "params": [0]},
                    *({"lr": 6e-5, "moe": True, "name": f"ep_size_{EP}", "params": [i]} for i in range(1, len(groups))),
                ],
            },
            "single_partition_of_fp32_groups": [
                hole((min(n, total - d * n),), f32) for n, total, d in zip(held, totals, part, strict=True)
            ],
            "group_paddings": [max(0, (d + 1) * n - t) for n, t, d in zip(held, totals, part, strict=True)],
            "partition_count": [*over],
            "zero_stage": foreign("deepspeed.runtime.zero.config", "ZeroStageEnum", 2),
            "ds_version": "0.19.8",
            "param_slice_mappings": [_spans(g, n, d) for g, n, d in zip(groups, held, part, strict=True)],
        }
        torchfile.write(
            folder / f"bf16_zero_pp_rank_{dp}_mp_rank_00_optim_states.pt",
            {"optimizer_state_dict": state, "ds_config": model["ds_config"], "ds_version": "0.19.8"},
        )
    return folder


def make_tensors(folder: Path, count: int) -> Path:
    """A file of safetensors in `folder`, which must not exist yet: bfloat16, nine tensors a layer."""
    folder.mkdir(parents=True)
    shapes, header, end = ((4096, 4096), (4096,), (11008, 4096), (1024, 4096)), {}, 0
    for i in range(count):
        start, end = end, end + 2 * math.prod(shapes[i % 4])
        told = {"dtype": "BF16", "shape": shapes[i % 4], "data_offsets": [start, end]}
        header[f"model.layers.{i // 9}.mlp.w{i % 9}.weight"] = told
    data = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(data)) + data)
        file.truncate(8 + len(data) + end)
    return folder


def sizes(folder: Path) -> tuple[int, int, int]:
    """Of a folder's files: how many, their bytes as their lengths say, their bytes on disk."""
    stats = [path.stat() for path in folder.iterdir()]
    return len(stats), sum(s.st_size for s in stats), sum(s.st_blocks * 512 for s in stats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--experts", action="store_true")
    parser.add_argument("--tensors", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder.resolve()
    if options.tensors:
        make_tensors(folder, options.tensors)
    else:
        (make_experts if options.experts else make)(folder)
    count, apparent, held = sizes(folder)
    print(f"{count} files, {apparent / 1e12:.2f} TB apparent, {held / 1e6:.0f} MB on disk")


if __name__ == "__main__":
    main()
