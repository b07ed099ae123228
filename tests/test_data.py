"""The committed checkpoints agree with their truth, are small, and name no machine."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import pytest
from compare import whole
from real_deepspeed import DATA
from safetensors.numpy import load_file

import ckptlab

CASES = ["gpt_tp2_pp2_dp2", "plain_zero2_dp2", "plain_zero2_dp2_round_robin", "plain_zero3_dp2"]


def of_state(truth: dict[str, np.ndarray], state: str) -> dict[str, np.ndarray]:
    return {key.split("/", 1)[1]: array for key, array in truth.items() if key.startswith(state + "/")}


@pytest.mark.parametrize("case", CASES)
def test_master_weights_round_to_the_module_weights(case: str) -> None:
    truth = load_file(DATA / case / "truth.safetensors")
    masters, modules = of_state(truth, "master"), of_state(truth, "param")
    assert masters.keys() == modules.keys() == of_state(truth, "exp_avg").keys() == of_state(truth, "exp_avg_sq").keys()
    for name, module in modules.items():
        np.testing.assert_array_equal(masters[name].astype(module.dtype), module, err_msg=name)


def test_deepspeeds_own_conversion_agrees_with_the_truth() -> None:
    torch = pytest.importorskip("torch")
    case = DATA / "gpt_tp2_pp2_dp2"
    truth = load_file(case / "truth.safetensors")
    step = case / "universal" / (case / "universal" / "latest_universal").read_text()
    assert {path.parent.name for path in step.glob("zero/*/fp32.pt")} == of_state(truth, "master").keys()
    for state in ("master", "exp_avg", "exp_avg_sq"):
        for name, array in of_state(truth, state).items():
            stored = torch.load(
                step / "zero" / name / f"{'fp32' if state == 'master' else state}.pt", weights_only=False
            )["param"].detach()
            np.testing.assert_array_equal(stored.numpy(), array, err_msg=f"{state} of {name}")


def test_a_case_says_what_it_is() -> None:
    for case in CASES:
        description = json.loads((DATA / case / "truth.json").read_text())
        assert description["name"] == case
        assert (DATA / case / (DATA / case / "latest").read_text()).is_dir()


def test_data_is_small_and_names_no_machine() -> None:
    files = [path for case in CASES for path in (DATA / case).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    assert not [path for path in files if path.suffix == ".py"]
    place = re.compile(rb"/(?:home|root|work|tmp|Users|usr|opt)/")
    assert not [path.name for path in files if place.search(path.read_bytes())]


def test_the_case_with_sub_groups_has_several() -> None:
    torch = pytest.importorskip("torch")
    [file] = Path(DATA / "plain_zero3_dp2" / "global_step3").glob("zero_pp_rank_0_*model_states.pt")
    assert len(torch.load(file, weights_only=False)["param_shapes"]) == 5


def test_what_fsdp_saved_is_its_truth_and_says_how_it_is_cut() -> None:
    case = DATA / "fsdp2_tp2_dp2"
    described = json.loads((case / "truth.json").read_text())
    ckpt = ckptlab.open(case / "step-3", mesh=described["mesh"])
    truth = load_file(case / "truth.safetensors")
    assert ckptlab.check(ckpt).checked.files == len(list((case / "step-3").iterdir()))
    assert {(state, name) for name in ckpt for state in ckpt.catalog.held(name)} == {
        (state, name) for state, _, name in (key.partition("/") for key in truth)
    }
    for key, expected in truth.items():
        state, _, name = key.partition("/")
        np.testing.assert_array_equal(whole(ckpt.catalog, name, state), expected, err_msg=key)
    said = {
        "(_StridedShard(dim=0, sf=2), Shard(dim=0))": ("(tp dp out) in", "(tp dp out)"),
        "(Shard(dim=0), Shard(dim=1))": ("(dp out) (tp in)",),
        "(Shard(dim=0),)": ("(dp out) in", "(dp out)"),
    }
    assert set(described["placements"].values()) == set(said)
    for name, placements in described["placements"].items():
        assert ckpt[name].layout.text in said[placements]
    assert (ckpt.iteration, ckpt.findings) == (described["step"], ())
