"""What Adam last did, by its formula: against torch's Adam and against what real DeepSpeed's weights did."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3
from helpers.files import copy, poke
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ckptlab
from ckptlab import updates
from ckptlab.analysis.adam import moved, update
from ckptlab.analysis.moved import Moved, Settings
from ckptlab.catalog import Catalog
from ckptlab.errors import CheckpointError
from ckptlab.formats import read

STEPS = DATA / "plain_zero1_dp2_steps"
GIVEN = Settings(step=3.0, lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)


# -------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("eps", [1e-8, 1e-2])
def test_the_update_is_torchs(steps: int, eps: float) -> None:
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(50, dtype=torch.float64))
    optimizer = torch.optim.Adam([weight], lr=1e-2, betas=(0.9, 0.95), eps=eps)
    for _ in range(steps):
        before = weight.detach().clone()
        weight.grad = torch.randn(50, dtype=torch.float64)
        optimizer.step()
    kept = optimizer.state[weight]
    given_ = replace(GIVEN, step=float(steps), eps=eps)
    found = update(kept["exp_avg"].numpy(), kept["exp_avg_sq"].numpy(), given_)
    np.testing.assert_allclose(found, (before - weight.detach()).numpy(), rtol=1e-9, atol=1e-14)


def test_real_deepspeed_moved_its_weights_so() -> None:
    """Steps 4 and 5 follow each other: masters moved by the update and by decoupled weight decay, at a constant lr."""
    before = ckptlab.open(STEPS / "global_step4").full("master", stack=False)
    after = ckptlab.open(STEPS / "global_step5")
    now = {s: after.full(s, stack=False) for s in ("master", "exp_avg", "exp_avg_sq")}
    found = updates(after)
    assert found.sizes["tensor"] == 42
    moved_more_than_rounding = 0
    for name in found["tensor"].values:
        told = found.sel(tensor=name)
        old, new = (view[name].values.astype(np.float64) for view in (before, now["master"]))
        step = old * (1 - told["lr"].item() * told["weight_decay"].item()) - new
        given_ = Settings(*(told[k].item() for k in ("step", "lr", "beta1", "beta2", "eps", "weight_decay")))
        formula = update(now["exp_avg"][name].values, now["exp_avg_sq"][name].values, given_)
        rounding = 4 * np.finfo(np.float32).eps * (np.abs(old) + np.abs(step))
        assert (np.abs(step - formula) <= rounding).all(), name
        assert told["update_norm"].item() == pytest.approx(np.linalg.norm(formula), rel=1e-9)
        moved_more_than_rounding += np.linalg.norm(formula) > 100 * np.linalg.norm(rounding)
    assert moved_more_than_rounding >= 40


# -------------------------------------------------------------------------------- figures


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3, STEPS, GPT / "universal"], ids=lambda c: c.name)
def test_figures_are_those_of_whole_tensors(case: Path) -> None:
    found = updates(case)
    truth = load_file((GPT if case.name == "universal" else case) / "truth.safetensors")
    trained = [key.split("/", 1)[1] for key in truth if key.startswith("exp_avg/")]
    assert set(found["tensor"].values) == set(trained)
    step = {GPT: 3, STEPS: 5}.get(case, 3)
    for name in trained:
        told = found.sel(tensor=name)
        w, m, v = (truth[f"{state}/{name}"].astype(np.float64) for state in ("master", "exp_avg", "exp_avg_sq"))
        size = 0.01 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.95**step)) + 1e-8)
        expected = {
            "elements": w.size,
            "step": step,
            "lr": 0.01,
            "weight_norm": np.linalg.norm(w),
            "update_norm": np.linalg.norm(size),
            "update_ratio": np.linalg.norm(size) / np.linalg.norm(w),
            "update_rms": math.sqrt((size**2).mean()),
            "update_max": np.abs(size).max(),
            "second_moment_low": v[v > 0].min() if (v > 0).any() else math.nan,
            "second_moment_high": v.max(),
            "dead": (v == 0).sum(),
            "dead_share": (v == 0).mean(),
        }
        for key, value in expected.items():
            np.testing.assert_allclose(told[key].item(), value, rtol=1e-9, err_msg=f"{key} of {name}")


def test_coordinates_are_those_of_stats() -> None:
    found, stats = updates(GPT), ckptlab.stats(GPT, states=["master"])
    for name in ("stack", "layer", "group", "pp", "shape", "numel"):
        np.testing.assert_array_equal(found[name], stats[name], err_msg=name)
    ratio_over_norm = found["update_norm"] / stats["norm"].sel(state="master")
    np.testing.assert_allclose(ratio_over_norm, found["update_ratio"])


def test_by_layer_by_stack_and_by_rank() -> None:
    each, layers, stacks = updates(GPT), updates(GPT, by="layer"), updates(GPT, by="stack")
    name = "mlp.dense_h_to_4h.weight"
    assert layers["update_ratio"].dims == ("tensor", "layer")
    for layer in (2, 3, 4, 5):
        one = each.sel(tensor=f"{layer}.{name}")
        assert layers["update_ratio"].sel(tensor=name, layer=layer) == one["update_ratio"]
    assert not layers["present"].sel(tensor=name, layer=-1)
    assert np.isnan(layers["update_norm"].sel(tensor=name, layer=-1))
    squares = (layers["update_norm"].sel(tensor=name) ** 2).sum("layer")
    assert stacks["update_norm"].sel(tensor=name) ** 2 == pytest.approx(float(squares))
    ranks = updates(GPT, by="layer", shards=True)
    assert ranks["update_norm"].dims == ("tensor", "layer", "tp")
    shards = (ranks["update_norm"].sel(tensor=name) ** 2).sum("tp")
    np.testing.assert_allclose(shards, layers["update_norm"].sel(tensor=name).fillna(0) ** 2)
    norm = ranks.sel(tensor="input_layernorm.weight", layer=2)  # which every rank has whole
    assert (
        norm["update_norm"].values.tolist() == [float(each["update_norm"].sel(tensor="2.input_layernorm.weight"))] * 2
    )
    assert "update_ratio" in ranks.ckptlab.worst("update_ratio", 3)
    assert updates(ZERO2, by="stack")["step"].notnull().all()
    with pytest.raises(CheckpointError, match="expected one of tensor, layer, stack"):
        updates(GPT, by="kind")


def test_dead_parameters_are_counted(tmp_path: Path) -> None:
    folder = copy(ZERO2, tmp_path)
    for element in (3, 500, 700):
        poke(folder, "wte.weight", "exp_avg_sq", 0.0, element=element)
        poke(folder, "wte.weight", "exp_avg", 0.0, element=element)
    found, before = updates(folder).sel(tensor="wte.weight"), updates(ZERO2).sel(tensor="wte.weight")
    assert (found["dead"], before["dead"]) == (3, 0)
    assert found["dead_share"] == 3 / 915
    assert np.isfinite(found["update_norm"]), "0 / (0 + eps) is no update"
    assert found["second_moment_low"] > 0


def test_a_moment_that_is_not_finite_shows(tmp_path: Path) -> None:
    folder = copy(ZERO2, tmp_path)
    poke(folder, "wte.weight", "exp_avg", math.nan, element=4)
    found = updates(folder)
    assert found["update_norm"].sel(tensor="wte.weight").isnull()
    assert found["update_max"].sel(tensor="wte.weight").isnull()
    assert found["update_norm"].notnull().sum() == 41


# -------------------------------------------------------------------------------- what the checkpoint does not tell


def changed(catalog: Catalog, scalars: dict[str, Any] | None = None, **options: Any) -> Catalog:
    groups = tuple(
        replace(g, options={**g.options, **options}, scalars=g.scalars if scalars is None else scalars)
        for g in catalog.groups
    )
    return replace(catalog, training=replace(catalog.training, groups=groups))


def test_without_its_own_step_a_group_has_the_checkpoints() -> None:
    catalog = read(ZERO2)
    np.testing.assert_array_equal(updates(changed(catalog, {}))["step"], 3)
    np.testing.assert_array_equal(updates(changed(catalog, {"step": 8}))["step"], 8)


@pytest.mark.parametrize("told", [{"lr": None}, {"betas": None}, {"eps": None}, {"step": 0}], ids=str)
def test_without_hyperparameters_or_a_step_there_is_no_update(told: dict[str, Any]) -> None:
    catalog = read(ZERO2)
    found = updates(changed(catalog, **told) if "step" not in told else changed(catalog, told))
    assert found["update_norm"].isnull().all()
    assert found["weight_norm"].notnull().all()
    assert (found["dead"] == 0).all()


def test_without_bias_correction() -> None:
    plain, without = updates(read(ZERO2)), updates(changed(read(ZERO2), bias_correction=False))
    factor = np.sqrt(1 - 0.95**3) / (1 - 0.9**3)
    ratio = (plain["update_norm"] / without["update_norm"]).drop_sel(tensor="gains")  # whose gradients are below eps
    np.testing.assert_allclose(ratio, factor, rtol=1e-2)


def test_what_adam_did_not_train_is_refused(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="no tensor has both exp_avg and exp_avg_sq"):
        updates(tmp_path / "a.safetensors")


# -------------------------------------------------------------------------------- laws


@pytest.mark.slow
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=30), st.integers(0, 30))
def test_merged_parts_are_the_whole(values: list[float], at: int) -> None:
    w = np.array(values, np.float32)
    m, v = w[::-1] / 7, (w / 3) ** 2
    whole = moved(w, m, v, GIVEN)
    parts = moved(w[:at], m[:at], v[:at], GIVEN).merge(moved(w[at:], m[at:], v[at:], GIVEN))
    assert (parts.elements, parts.dead, parts.low, parts.high) == (whole.elements, whole.dead, whole.low, whole.high)
    assert parts.update_max == whole.update_max
    assert parts.update_sq == pytest.approx(whole.update_sq)
    assert parts.weight_sq == pytest.approx(whole.weight_sq)
    assert Moved().merge(whole) == whole.merge(Moved()) == whole


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT, ZERO3], ids=lambda c: c.name)
def test_windows_of_any_size(case: Path) -> None:
    expected = updates(case)
    found = updates(case, window=1)
    for name in ("update_norm", "weight_norm", "update_max", "dead", "second_moment_low"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12, err_msg=name)


def test_the_table() -> None:
    text = repr(updates(GPT).ckptlab.table)
    assert text.splitlines()[0].split()[:3] == ["tensor", "elements", "update/weight"]
    assert "<table" in updates(GPT).ckptlab.table._repr_html_()
    assert updates(GPT).ckptlab.table.to_dict()["rows"][0]["update_ratio"] > 0


def test_it_is_said_whose_learning_rate_it_is() -> None:
    found = ckptlab.updates(GPT)
    assert "next step's" in found["lr"].attrs["long_name"]
    assert "saved learning rate" in found["update_norm"].attrs["long_name"]
