"""ZeRO-1 before DeepSpeed 0.4: buffers in pieces that are dealt to dp ranks in turn, made here by the rules of
`runtime/zero/stage1.py` of 0.3.16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, GPT, differences, differences_from_truth
from real_deepspeed import requires_deepspeed, resume

import ckptlab
from ckptlab.errors import CheckpointError, ReshapeError
from ckptlab.formats import read
from ckptlab.formats.torch import torchfile

PLAIN = DATA / "plain_zero1_dp2_steps"
STATES = ("exp_avg", "exp_avg_sq")


def pieces(flat: np.ndarray, dp: int, turns: int, stripped: bool) -> list[list[np.ndarray]]:
    """What each rank has of a buffer: piece i * dp + rank in its turn i, without the padding at the end or with it."""
    size = math.ceil(flat.size / (dp * turns))
    padded = np.concatenate([flat, np.zeros(size * dp * turns - flat.size, flat.dtype)])
    held = flat if stripped else padded
    return [[held[(i * dp + r) * size : (i * dp + r + 1) * size] for i in range(turns)] for r in range(dp)]


def old(out: Path, step: Path, turns: int = 1, elastic: bool = True) -> Path:
    """A step folder as DeepSpeed 0.3 would have written it: no param_shapes, no slice mappings, no ds_config."""
    out.mkdir()
    for model in step.glob("mp_rank_*"):
        content = torchfile.read(model)
        files = sorted(step.glob(f"*zero_pp_rank_*_{model.name.replace('model', 'optim')}"))
        states = [torchfile.read(file)["optimizer_state_dict"] for file in files]
        sizes = [sum(math.prod(s) for s in group.values()) for group in content["param_shapes"]]
        base = [one["base_optimizer_state"]["state"] for one in states]
        cut: list[dict[str, list[list[np.ndarray]]]] = []
        for g, n in enumerate(sizes):
            flats = {"master": [one["single_partition_of_fp32_groups"][g] for one in states]}
            flats |= {s: [one[g][s] for one in base] for s in STATES}
            joined = {s: np.concatenate([part.map() for part in held])[:n] for s, held in flats.items()}
            cut.append({s: pieces(flat, len(files), turns, elastic) for s, flat in joined.items()})
        for r in range(len(files)):
            kept: list[list[dict[str, Any]]] = [
                [{"step": 5, **{s: one[s][r][i] for s in STATES}} for i in range(turns)] for one in cut
            ]
            ids = iter(range(len(cut) * turns))
            params = [[next(ids) for _ in range(turns)] for _ in cut]
            groups = [{"lr": 1e-2, "weight_decay": w, "params": p} for w, p in zip((0.1, 0.0), params, strict=True)]
            rigid = {"state": dict(enumerate(s for one in kept for s in one)), "param_groups": groups}
            state = {
                "base_optimizer_state": kept if elastic else rigid,
                "local_sub_partitions_of_fp32_groups": [one["master"][r] for one in cut],
                "zero_stage": 1,
                "partition_count": len(files),
                "num_comm_intervals_per_group": [turns] * len(cut),
            }
            name = f"zero_pp_rank_{r}_{model.name.replace('_model', 'optim')}"
            torchfile.write(out / name, {"optimizer_state_dict": state})
        of_0_4 = ("param_shapes", "ds_config", "ds_version", "shared_params", "checkpoint_parallel_dimensions")
        left = {k: v for k, v in content.items() if k not in of_0_4}
        torchfile.write(out / model.name, left)
    for layer in step.glob("layer_*"):
        (out / layer.name).write_bytes(layer.read_bytes())
    return out


@pytest.mark.slow
@pytest.mark.parametrize("turns", [1, 3])
@pytest.mark.parametrize("case", [PLAIN, GPT], ids=lambda case: case.name)
def test_every_state_is_what_training_held(case: Path, turns: int, tmp_path: Path) -> None:
    step = case / ("global_step5" if case is PLAIN else "global_step3")
    found = ckptlab.open(old(tmp_path / step.name, step, turns))
    assert differences_from_truth(found.catalog, case / "truth.safetensors") == []
    assert ckptlab.check(found).verdict.startswith("healthy")
    assert found.catalog.zero_stage == 1


@pytest.mark.parametrize("turns", [1, 2])
def test_hyperparameters_are_there_where_it_is_not_elastic(turns: int, tmp_path: Path) -> None:
    found = read(old(tmp_path / "global_step3", GPT / "global_step3", turns, elastic=False))
    assert [g.options["weight_decay"] for g in found.groups] == [0.1, 0.0]
    assert differences_from_truth(found, GPT / "truth.safetensors") == []


@pytest.mark.parametrize("turns", [1, 3])
def test_it_is_written_as_today(turns: int, tmp_path: Path) -> None:
    found = ckptlab.open(old(tmp_path / "global_step5", PLAIN / "global_step5", turns))
    with pytest.raises(ReshapeError, match="give param_groups"):
        found.reshape(dp=3)
    groups = [{"lr": 1e-2, "weight_decay": w} for w in (0.1, 0.0)]
    found.reshape(dp=3, zero_stage=2, param_groups=groups).save(tmp_path / "new" / "global_step5")
    there = read(tmp_path / "new" / "global_step5")
    assert differences(found.catalog, there) == []
    assert there.mesh.dp == 3
    for file in (tmp_path / "new" / "global_step5").glob("*.pt"):
        content = torchfile.read(file)
        assert content.get("optimizer_state_dict", content)["ds_version"], "without, DeepSpeed loads nothing"


@requires_deepspeed
def test_deepspeed_resumes_what_is_written_of_it(tmp_path: Path) -> None:
    found = ckptlab.open(old(tmp_path / "global_step5", PLAIN / "global_step5", 3))
    groups = [dict(group.options) for group in read(PLAIN / "global_step5").groups]
    found.reshape(dp=3, zero_stage=2, param_groups=groups).save(tmp_path / "new" / "step")
    report = resume(tmp_path / "new" / "step", PLAIN.name, dp=3, zero=2)
    assert report["status"] == "equal", report.get("error") or report["differences"]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda group: group.pop(), "a state for each of 3, 3 pieces"),
        (lambda group: group[1].pop("exp_avg"), "which are not those of"),
    ],
)
def test_pieces_that_do_not_make_up_the_tensors_are_refused(fault: Any, says: str, tmp_path: Path) -> None:
    step = old(tmp_path / "global_step5", PLAIN / "global_step5", 3)
    file = step / "zero_pp_rank_1_mp_rank_00optim_states.pt"
    content = torchfile.read(file)
    fault(content["optimizer_state_dict"]["base_optimizer_state"][0])
    torchfile.write(tmp_path / "new", content)
    (tmp_path / "new").replace(file)
    with pytest.raises(CheckpointError, match=f"zero_pp_rank_1_mp_rank_00optim_states.*{says}"):
        read(step)
