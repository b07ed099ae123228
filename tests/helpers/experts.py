"""Experts dealt to tensor parallel ranks too, made of a case where they are dealt to four ranks of dp."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np

from ckptlab.arrays import Tally
from ckptlab.formats import fileplan
from ckptlab.formats.deepspeed import write
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape
from ckptlab.sharding.strategies import Strategy, replicated


class Whole(Strategy):
    """Nothing is cut."""

    def layout(self, name: str, shards: Any) -> Layout:
        return replicated(len(shards[0]))


def dealt_to_tp(out: Path, case: Path, tp: int = 2, **more: Any) -> Path:
    """The case (ep 2, dp 4) as tp and 4 / tp dp ranks would have left it: the same four ranks, numbered tp first, have
    the same experts; all else is whole on all tp ranks, and its buffers are cut over dp. DeepSpeed writes the model
    files of two tp ranks alone. more: what model files say beside."""
    dp = 4 // tp
    step, source = out / "global_step3", case / "global_step3"
    step.mkdir(parents=True)
    optims = [torchfile.read(source / f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt") for r in range(4)]
    for r in range(4):
        d, t = divmod(r, tp)
        content = torchfile.read(source / f"bf16_zero_pp_rank_{r}_mp_rank_00_optim_states.pt")
        state, halves = content["optimizer_state_dict"], [optims[tp * d + i]["optimizer_state_dict"] for i in range(tp)]
        masters = "single_partition_of_fp32_groups"
        for g in (0, 1):
            state[masters][g] = _joined([h[masters][g] for h in halves])
            for key in ("exp_avg", "exp_avg_sq"):
                state["base_optimizer_state"]["state"][g][key] = _joined(
                    [h["base_optimizer_state"]["state"][g][key] for h in halves]
                )
            state["group_paddings"][g] = sum(h["group_paddings"][g] for h in halves)
        state["partition_count"] = [dp, dp, *state["partition_count"][2:]]
        state["param_slice_mappings"] = []
        torchfile.write(step / f"bf16_zero_pp_rank_{d}_mp_rank_{t:02d}_optim_states.pt", content)
    for t in range(2):  # as many as ep
        content = torchfile.read(source / "mp_rank_00_model_states.pt")
        content |= {"dp_world_size": dp, "mp_world_size": tp, **more}
        content["checkpoint_parallel_dimensions"] = {"pp_degree": 1, "tp_degree": tp}
        torchfile.write(step / f"mp_rank_{t:02d}_model_states.pt", content)
    for file in source.glob("layer_*"):
        writer = int(file.name.split("_")[3]) // 2  # of its ep rank, which is its tp rank
        shutil.copy(file, step / file.name.replace("mp_rank_00", f"mp_rank_{writer:02d}"))
    return out


def _joined(parts: list[Any]) -> np.ndarray:
    return np.concatenate([part.map() for part in parts])


def figures_are_what_happens(source: Any, mesh: Mesh, tmp_path: Path, **asked: Any) -> None:
    """What a plan says of a reshape is what its files then draw, rank by rank."""
    reshaped = Reshape.of(source, mesh, **asked)
    tmp_path.mkdir(exist_ok=True)
    tally = Tally()
    for plan in write.files(source, reshaped.target, tally):
        fileplan.write(plan, tmp_path / plan.name)
    cost = reshaped.cost()
    assert cost.read == sum(tally.read.values())
    assert cost.moved == sum(n for (a, b), n in tally.read.items() if a != b)
    matrix = reshaped.plan.matrix()
    assert {(a, b): matrix[a, b] for a, b in zip(*matrix.nonzero(), strict=True)} == dict(tally.read)
    assert cost.written == sum(reshaped.file_sizes.values())
