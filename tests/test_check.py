"""Faults planted one by one in copies of real checkpoints are found, each by its own finding; clean ones have none."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3
from helpers.command import run
from helpers.files import copy, cut, edit, fill, flip, held, overwrite, poke, swap
from safetensors.numpy import save_file

import ckptlab
from ckptlab import Finding, Health, Layout, Mesh, check
from ckptlab.analysis.checkup.jobs import gaps, jobs, stored_in
from ckptlab.checkpoint import Checkpoint, save_weights
from ckptlab.errors import CheckpointError
from ckptlab.formats import read
from ckptlab.formats.deepspeed import checks
from ckptlab.formats.torch.placeholders import foreign, named

ROUND_ROBIN = DATA / "plain_zero2_dp2_round_robin"
UNTRAINED = "untrained-copy"  # of the GPT's position embeddings on the last stage: a remark, on the clean copy too
NORM, DENSE = "3.input_layernorm.weight", "3.mlp.dense_h_to_4h.weight"  # replicated; "(tp out) in"
OPTIM, MODEL = "bf16_zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt", "mp_rank_{:02d}_model_states.pt"


def only(found: Health, code: str) -> Finding:
    """The one finding that a planted fault makes, beside what the clean copy has."""
    assert [f.code for f in found.findings if f.code != UNTRAINED] == [code], found
    (one,) = found[code]
    assert found.healthy == (one.severity == "info")
    return one


@pytest.fixture
def gpt(tmp_path: Path) -> Path:
    return copy(GPT, tmp_path)


@pytest.fixture
def zero2(tmp_path: Path) -> Path:
    return copy(ZERO2, tmp_path)


@pytest.fixture
def zero3(tmp_path: Path) -> Path:
    return copy(ZERO3, tmp_path)


@pytest.fixture
def gpt_universal(tmp_path: Path) -> Path:
    return Path(shutil.copytree(GPT / "universal" / "global_step3_universal", tmp_path / "run"))


# Clean checkpoints


@pytest.mark.parametrize("case", [ZERO2, ZERO3, GPT / "universal"], ids=lambda p: p.name)
def test_clean_checkpoints_have_no_findings(case: Path) -> None:
    found = check(case)
    assert found.findings == ()
    assert found.healthy
    assert found.checked.opened
    assert found.checked.tensors == len(ckptlab.open(case).tensors)


@pytest.mark.slow
def test_what_ckptlab_writes_is_healthy(tmp_path: Path) -> None:
    ckptlab.open(ZERO2).reshape(Mesh(dp=3), zero_stage=1).save(tmp_path / "native" / "step")
    ckptlab.open(GPT).reshape(Mesh(tp=4, dp=3)).save(tmp_path / "tp4" / "step")
    ckptlab.open(ZERO3).reshape().save(tmp_path / "universal" / "step", format="universal")
    save_weights(read(ZERO3), tmp_path / "weights")
    for folder in sorted(tmp_path.iterdir()):
        assert check(folder).findings == (), folder


def test_position_embeddings_that_the_last_stage_never_trained_are_a_remark() -> None:
    found = check(GPT)
    (one,) = found.findings
    assert found.healthy
    assert (one.code, one.severity) == (UNTRAINED, "info")
    assert one.where.tensors == ("tied_modules.embed.position_embeddings.weight",)
    assert one.where.states == ("master", "exp_avg", "exp_avg_sq")
    assert {r["pp"] for r in one.where.ranks} == {0, 1}
    assert "never trained" in one.found


def test_round_robin_mappings_are_named_and_explained() -> None:
    one = only(check(ROUND_ROBIN), "slice-mappings")
    assert one.severity == "warning"
    assert "round_robin_gradients" in one.found
    assert "ds_to_universal" in one.todo


# Files


def test_missing_files(gpt: Path) -> None:
    for name in (OPTIM.format(1, 2), MODEL.format(3), "layer_03-model_01-model_states.pt"):
        (gpt / name).unlink()
    found = check(gpt)
    assert found.codes == ("missing-file",)
    assert [f.where.files[0] for f in found.findings] == [
        MODEL.format(3),
        OPTIM.format(1, 2),
        "layer_03-model_01-model_states.pt",
    ]
    assert found.findings[1].expected == "8 optimizer files, for tp 2 · pp 2 · dp 2"
    assert not found.checked.opened
    assert found.checked.bytes > 0, "what is there is looked at all the same"


def test_a_layer_of_which_no_rank_has_a_file(gpt: Path) -> None:
    for tp in (0, 1):
        (gpt / f"layer_03-model_{tp:02d}-model_states.pt").unlink()
    one = next(f for f in check(gpt).findings if f.code == "missing-file")
    assert one.where.files == ("layer_03-model_00-model_states.pt", "layer_03-model_01-model_states.pt")


def test_every_optimizer_file_missing(zero2: Path) -> None:
    for d in (0, 1):
        (zero2 / OPTIM.format(d, 0)).unlink()
    (one,) = check(zero2)["weights-alone"]
    assert (one.severity, one.expected) == ("warning", "2 optimizer files")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.999])
@pytest.mark.parametrize("name", [OPTIM.format(0, 1), MODEL.format(2), "layer_05-model_00-model_states.pt"])
def test_a_truncated_file(gpt: Path, name: str, share: float) -> None:
    cut(gpt / name, share)
    one = only(check(gpt), "damaged-file")
    assert one.where.files == (name,)


def test_an_extra_file(gpt: Path) -> None:
    shutil.copy(gpt / OPTIM.format(1, 0), gpt / OPTIM.format(2, 0))
    one = only(check(gpt), "extra-file")
    assert (one.severity, one.where.files) == ("warning", (OPTIM.format(2, 0),))


def test_swapped_files_of_dp_ranks(zero2: Path) -> None:
    swap(zero2 / OPTIM.format(0, 0), zero2 / OPTIM.format(1, 0))
    found = check(zero2)
    assert found.codes == ("swapped-file",)
    assert [(f.where.files, f.where.ranks[0]["dp"]) for f in found.findings] == [
        ((OPTIM.format(d, 0),), d) for d in (0, 1)
    ]
    assert found.findings[0].found.endswith("holds the partition of dp 1")


def test_swapped_files_of_dp_ranks_of_bf16_optimizer(gpt: Path) -> None:
    swap(gpt / OPTIM.format(0, 3), gpt / OPTIM.format(1, 3))
    found = check(gpt)
    assert [f.where.files for f in found["swapped-file"]] == [(OPTIM.format(d, 3),) for d in (0, 1)]


def test_swapped_files_of_tp_ranks(gpt: Path) -> None:
    for d in (0, 1):
        swap(gpt / OPTIM.format(d, 0), gpt / OPTIM.format(d, 1))
    found = check(gpt)
    assert {f.code for f in found.findings} == {"master-weight", UNTRAINED, "tied-differ", "renamed-file"}
    assert [f.where.files for f in found["renamed-file"]] == [(OPTIM.format(d, t),) for d in (0, 1) for t in (0, 1)]
    one = found["master-weight"][0]
    assert "They do round to those of tp 1 · pp 0: the ranks' files were swapped" in one.found
    assert one.where.ranks == ({"tp": 0, "pp": 0},)


def test_files_that_name_neither_rank_nor_tensor_lie_under_the_name_they_were_saved_as(zero3: Path) -> None:
    swap(zero3 / OPTIM.format(0, 0), zero3 / OPTIM.format(1, 0))
    found = check(zero3, data=False)
    assert [f.where.files for f in found["renamed-file"]] == [(OPTIM.format(d, 0),) for d in (0, 1)]
    assert f"was saved as {OPTIM.format(1, 0)}" in found.findings[0].found


def test_bytes_of_another_tensor(gpt_universal: Path) -> None:
    """In a universal folder, where a state's file is called alike for all tensors."""
    zero = gpt_universal / "zero"
    a, b = (zero / f"{layer}.mlp.dense_h_to_4h.weight" / "exp_avg_sq.pt" for layer in (2, 3))
    shutil.copy(a, b)
    one = only(check(gpt_universal), "doubled-data")
    assert "exp_avg_sq of 2.mlp.dense_h_to_4h.weight, 3.mlp.dense_h_to_4h.weight" in one.found


def test_what_is_one_number_throughout_is_nobodys_copy(gpt_universal: Path) -> None:
    for layer in (2, 3):
        path = gpt_universal / "zero" / f"{layer}.mlp.dense_h_to_4h.weight" / "fp32.pt"
        edit(path, lambda content: content.update(param=np.ones(content["param"].shape, np.float32)))
    assert not check(gpt_universal)["doubled-data"]


def test_swapped_files_of_pp_ranks(gpt: Path) -> None:
    swap(gpt / OPTIM.format(0, 0), gpt / OPTIM.format(0, 2))
    assert not check(gpt, data=False).healthy


def test_a_layer_file_of_another_step(gpt: Path) -> None:
    catalog = read(gpt)
    stored, _ = held(catalog, DENSE, "param", tp=1)
    overwrite(stored, 0, stored.map().reshape(-1).astype(np.float32) * 1.25)
    one = only(check(gpt), "master-weight")
    assert one.where.tensors == (DENSE,)
    assert "another step" in one.todo
    assert "swapped" not in one.found
    assert "layer_03-model_01-model_states.pt" in one.where.files


def _later_step(content: dict) -> None:
    for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
        state["step"] = np.float32(7)[()] if not hasattr(state["step"], "map") else np.full((), 7, np.float32)


def test_an_optimizer_shard_of_another_step(gpt: Path) -> None:
    edit(gpt / OPTIM.format(1, 2), _later_step)
    one = only(check(gpt), "steps-disagree")
    assert one.where.files == (OPTIM.format(1, 2),)
    assert "optimizer step 7" in one.found
    assert one.expected == "optimizer step 3, as in 7 other files"


def test_a_model_file_of_another_step(gpt: Path) -> None:
    edit(gpt / MODEL.format(1), lambda c: {**c, "global_steps": 9})
    one = only(check(gpt), "foreign-file")
    assert one.where.files == (MODEL.format(1),)
    assert one.found.endswith("from another run or step: global_steps 9")


def test_a_file_of_another_configuration(gpt: Path) -> None:
    edit(gpt / OPTIM.format(0, 3), lambda c: {**c, "ds_config": {**c["ds_config"], "gradient_clipping": 3}})
    one = only(check(gpt), "foreign-file")
    assert one.where.files == (OPTIM.format(0, 3),)
    assert "gradient_clipping" in one.found


def test_of_two_files_that_disagree_the_model_file_knows_the_right_one(zero2: Path) -> None:
    edit(zero2 / OPTIM.format(0, 0), _later_step)
    assert only(check(zero2), "steps-disagree").where.files == (OPTIM.format(0, 0),)
    edit(zero2 / MODEL.format(0), lambda c: {**c, "global_steps": 5})  # now neither is
    assert {f.where.files for f in check(zero2)["steps-disagree"]} == {(OPTIM.format(d, 0),) for d in (0, 1)}


def test_a_file_that_is_odd_in_several_ways_is_one_finding(gpt: Path) -> None:
    edit(gpt / MODEL.format(2), lambda c: {**c, "global_steps": 9, "iteration": 9, "ds_version": "0.1"})
    one = only(check(gpt), "foreign-file")
    assert one.found.endswith("global_steps 9, iteration 9, ds_version '0.1'")


def test_hyperparameters_that_disagree(gpt: Path) -> None:
    def change(content: dict) -> None:
        content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["lr"] = 0.5

    edit(gpt / OPTIM.format(1, 1), change)
    one = only(check(gpt), "settings-disagree")
    assert (one.severity, one.where.files) == ("warning", (OPTIM.format(1, 1),))


def test_a_loss_scaler_that_disagrees(gpt: Path) -> None:
    edit(
        gpt / OPTIM.format(1, 1),
        lambda c: {**c, "optimizer_state_dict": {**c["optimizer_state_dict"], "clip_grad": 2.5}},
    )
    assert "clip_grad 2.5" in only(check(gpt), "settings-disagree").found


def test_settings_that_are_tensors_are_compared_by_value(gpt: Path) -> None:
    for file in gpt.glob("*_optim_states.pt"):
        edit(file, lambda c: _with_lr(c, 0.5))
    assert "settings-disagree" not in check(gpt, data=False).codes
    edit(gpt / OPTIM.format(0, 0), lambda c: _with_lr(c, 0.75))
    assert "[0.75]" in check(gpt, data=False)["settings-disagree"][0].found


def _with_lr(content: dict, lr: float) -> None:
    content["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0]["lr"] = np.float32([lr])


def test_shapes_that_disagree(gpt: Path) -> None:
    def change(content: dict) -> None:
        shapes = content["param_shapes"][0]
        shapes["9.invented.weight"] = shapes.pop(DENSE)

    edit(gpt / MODEL.format(1), change)
    assert "shapes-disagree" in check(gpt, data=False).codes


# Pickles


def test_a_pickle_that_would_run_a_command(zero2: Path) -> None:
    edit(zero2 / MODEL.format(0), lambda c: {**c, "note": foreign("posix", "system", "touch /tmp/pwned")})
    one = only(check(zero2), "executable-pickle")
    assert "posix.system" in one.found
    assert one.where.files == (MODEL.format(0),)


@pytest.mark.parametrize("value", [named("torch.hub", "load"), named("builtins", "eval"), named("numpy", "load")])
def test_callables_of_known_packages_are_no_value_types(zero2: Path, value: object) -> None:
    edit(zero2 / MODEL.format(0), lambda c: {**c, "note": value})
    only(check(zero2), "executable-pickle")


def test_a_class_of_the_training_program_is_a_remark(zero2: Path) -> None:
    edit(zero2 / MODEL.format(0), lambda c: {**c, "kind": foreign("megatron.enums", "PositionEmbeddingType", 1)})
    one = only(check(zero2), "foreign-class")
    assert "megatron.enums.PositionEmbeddingType" in one.found


def test_a_file_that_lies_about_its_extents(zero2: Path) -> None:
    file = zero2 / MODEL.format(0)
    raw = file.read_bytes()
    file.write_bytes(raw.replace(b"/data/0", b"/data/x"))
    assert set(check(zero2).codes) & {"unsafe-file", "damaged-file"}


# Numbers


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("state", ["exp_avg", "exp_avg_sq", "master"])
def test_nan_and_infinity(zero2: Path, state: str, value: float) -> None:
    poke(zero2, "blocks.1.fc1.weight", state, value, element=47)
    one = check(zero2)["not-finite"][0]
    assert (one.where.tensors, one.where.states) == (("blocks.1.fc1.weight",), (state,))
    assert f"{state} of blocks.1.fc1.weight[3, 2]" in one.found
    assert ("NaN" if math.isnan(value) else str(value)) in one.found


@pytest.mark.parametrize("name", ["adapter.weight", "seen"])
def test_nan_in_what_is_not_trained(zero2: Path, name: str) -> None:
    poke(zero2, name, "param", math.nan)
    assert only(check(zero2), "not-finite").where.tensors == (name,)


def test_a_negative_mean_of_squares(zero3: Path) -> None:
    poke(zero3, "blocks.0.fc1.weight", "exp_avg_sq", -1e-9, element=400)
    one = only(check(zero3), "negative-moment")
    assert one.where.tensors == ("blocks.0.fc1.weight",)
    assert one.where.files == (OPTIM.format(1, 0),)


@pytest.mark.parametrize("bit", [b if b in (0, 7, 15) else pytest.param(b, marks=pytest.mark.slow) for b in range(16)])
def test_a_flipped_bit_in_a_weight(gpt: Path, bit: int) -> None:
    flip(gpt, DENSE, "param", bit, tp=1, element=99)
    found = check(gpt)
    assert {f.code for f in found.findings} <= {UNTRAINED, "master-weight", "not-finite"}
    one = found["master-weight"][0]
    assert one.where.tensors == (DENSE,)
    assert one.where.ranks == ({"tp": 1, "pp": 0},)
    assert f"{DENSE}[6, 3]" in one.found
    assert "single elements" in one.todo


@pytest.mark.parametrize("bit", range(17, 32))
def test_a_flipped_bit_in_a_master(zero2: Path, bit: int) -> None:
    flip(zero2, "blocks.2.qkv.weight", "master", bit, element=5)
    assert {"master-weight"} <= set(check(zero2).codes) <= {"master-weight", "not-finite"}


def test_a_flipped_bit_that_only_a_checksum_shows(zero2: Path) -> None:
    assert check(zero2, checksums=True).findings == ()
    flip(zero2, "blocks.2.qkv.weight", "exp_avg", 3, element=5)
    assert check(zero2).findings == ()
    one = only(check(zero2, checksums=True), "checksum")
    (key,) = one.where.tensors
    assert key.startswith("optimizer_state_dict.base_optimizer_state.state.")
    assert key.endswith(".exp_avg")
    assert len(one.where.files) == 1


def test_files_without_checksums_are_a_remark(zero2: Path) -> None:
    file = zero2 / MODEL.format(0)
    with zipfile.ZipFile(file) as archive:
        sums = {info.CRC for info in archive.infolist() if info.file_size}
    raw = file.read_bytes()
    for crc in sums:
        raw = raw.replace(crc.to_bytes(4, "little"), b"\x12\x34\x56\x78")
    file.write_bytes(raw)
    assert only(check(zero2, checksums=True), "no-checksums").where.files == (file.name,)


@pytest.mark.parametrize("state", ["master", "exp_avg", "exp_avg_sq"])
def test_a_replica_that_drifted(gpt: Path, state: str) -> None:
    flip(gpt, NORM, state, 0, tp=1, element=3)  # the lowest bit: no rounding shows it
    one = only(check(gpt), "replicas-differ")
    assert (one.where.tensors, one.where.states) == ((NORM,), (state,))
    assert one.where.ranks == ({"tp": 1, "pp": 0}, {"tp": 0, "pp": 0})
    assert f"{NORM}[3]" in one.found


def test_drift_is_told_from_the_layer_on_in_which_it_begins(gpt: Path) -> None:
    for layer in (5, 4):
        flip(gpt, f"{layer}.input_layernorm.bias", "master", 0, tp=1)
    one = only(check(gpt), "replicas-differ")
    assert one.where.tensors == ("4.input_layernorm.bias", "5.input_layernorm.bias")
    assert "2 elements of 2 tensors (master), from 4.input_layernorm.bias on" in one.found


def test_a_replicated_weight_that_drifted(gpt: Path) -> None:
    flip(gpt, NORM, "param", 1, tp=1)
    assert set(check(gpt).codes) == {UNTRAINED, "replicas-differ", "master-weight"}


@pytest.mark.parametrize("state", ["master", "exp_avg_sq"])
def test_a_tied_tensor_that_drifted_between_stages(gpt: Path, state: str) -> None:
    flip(gpt, "tied_modules.embed.word_embeddings.weight", state, 0, stage=1, tp=1, element=40)
    one = only(check(gpt), "tied-differ")
    assert one.where.states == (state,)
    assert one.where.ranks == ({"tp": 1, "pp": 1}, {"tp": 1, "pp": 0})


def test_buffers_that_differ_between_dp_ranks(zero3: Path) -> None:
    model = read(zero3).private.folder.heads[0, 0][1]
    overwrite(model.module["seen"], 0, 5)
    one = only(check(zero3), "buffers-differ")
    assert one.severity == "info"
    assert one.where.tensors == ("seen",)


def test_padding_that_is_not_zero(zero2: Path) -> None:
    catalog = read(zero2)
    group = catalog.flat_groups[1]
    stored = catalog.stored.partitions[group.key, "exp_avg"][group.holders[0]][1]
    overwrite(stored, stored.numel - 1, 1e-3)
    one = only(check(zero2), "flat-padding")
    assert (one.severity, one.where.states, one.where.ranks) == ("warning", ("exp_avg",), ({"dp": 1},))
    assert "element 277" in one.found


def test_the_padding_of_zero3_may_hold_anything(zero3: Path) -> None:
    catalog = read(zero3)
    assert not list(gaps(catalog))
    group = next(g for g in catalog.flat_groups if "ln_f.bias" in g.names)
    stored = catalog.stored.partitions[group.key, "exp_avg"][group.holders[0]][1]
    covered = {k for _, _, at, n in group.flats[group.holders[0]].within(1).tolist() for k in range(at, at + n)}
    free = next(k for k in range(stored.numel) if k not in covered)
    overwrite(stored, free, math.nan)
    assert check(zero3).findings == ()


def test_padding_of_the_vocabulary_may_hold_anything(gpt: Path) -> None:
    embedding = "tied_modules.embed.word_embeddings.weight"  # 101 rows padded to 112: tp 1 has 45 of 56
    for stage in (0, 1):
        poke(gpt, embedding, "exp_avg", 0.5, stage=stage, tp=1, element=50 * 16)
    assert check(gpt).codes == (UNTRAINED,)


def test_moments_that_are_dead(zero2: Path) -> None:
    for state in ("exp_avg", "exp_avg_sq"):
        fill(zero2, "blocks.1.proj.weight", state, 0.0)
    one = only(check(zero2), "dead-moments")
    assert (one.severity, one.where.tensors) == ("warning", ("blocks.1.proj.weight",))


def test_moments_that_stopped(zero2: Path) -> None:
    fill(zero2, "blocks.1.proj.weight", "exp_avg", 0.0)
    assert only(check(zero2), "stopped-moments").where.tensors == ("blocks.1.proj.weight",)


@pytest.mark.slow
def test_a_moment_that_is_zero_in_part_has_not_stopped(zero2: Path) -> None:
    count = 15 * 15
    for element in range(count // 2, count):
        poke(zero2, "blocks.1.proj.weight", "exp_avg", 0.0, element=element)
    assert check(zero2, window=256).findings == ()


def test_a_copy_whose_original_is_not_trained_either_is_no_remark(gpt: Path) -> None:
    name = "tied_modules.embed.position_embeddings.weight"
    for state in ("exp_avg", "exp_avg_sq"):
        fill(gpt, name, state, 0.0)
    assert set(check(gpt).codes) == {"tied-differ", "dead-moments"}


def test_mappings_that_contradict_the_shapes(zero2: Path) -> None:
    def change(content: dict) -> None:
        mapping = content["optimizer_state_dict"]["param_slice_mappings"][0]
        first, second, *_ = mapping
        mapping[first], mapping[second] = mapping[second], mapping[first]

    for d in (0, 1):
        edit(zero2 / OPTIM.format(d, 0), change)
    one = only(check(zero2), "slice-mappings")
    assert one.severity == "warning"
    assert "no reason that ckptlab knows" in one.found


def test_a_state_that_one_tensor_lacks(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GPT / "universal" / "global_step3_universal", tmp_path / "universal"))
    (folder / "zero" / DENSE / "exp_avg.pt").unlink()
    one = only(check(folder, data=False), "missing-state")
    assert (one.where.tensors, one.where.states) == ((DENSE,), ("exp_avg",))


def test_layer_files_all_missing(gpt: Path) -> None:
    for file in gpt.glob("layer_*"):
        file.unlink()
    one = only(check(gpt), "missing-file")
    assert one.where.files[0] == "layer_02-model_00-model_states.pt", "of layers whose tensors the model files list"
    with pytest.raises(CheckpointError, match="layer_02-model_00-model_states.pt"):
        read(gpt)


def test_replicas_inside_of_shards_that_are_otherwise_cut(gpt: Path) -> None:
    catalog = read(gpt)
    name = "3.self_attention.query_key_value.weight"
    layout = Layout("((tp q) + k) in", totals={"q": 16, "k": 16})
    tensor = replace(catalog[name], shape=(32, 16), layout=layout, cut=layout.resolve((32, 16), catalog.mesh))
    lies = {
        key: tuple(replace(placement, cut=tensor.cut) for placement in copies)
        for key, copies in catalog.placements.items()
        if key[0] == name
    }
    told = replace(catalog, tensors={**catalog.tensors, name: tensor}, placements={**catalog.placements, **lies})
    for state in ("exp_avg", "exp_avg_sq", "param", "master"):  # rows 8 to 23 of each shard are k
        for tp in (0, 1):
            for element in range(8 * 16, 24 * 16):
                overwrite(*held(catalog, name, state, tp=tp, element=element), 0.5)
    assert check(Checkpoint(told)).codes == (UNTRAINED,)
    overwrite(*held(catalog, name, "exp_avg_sq", tp=1, element=9 * 16 + 5), 0.75)
    one = only(check(Checkpoint(told)), "replicas-differ")
    assert (one.where.tensors, one.where.states) == ((name,), ("exp_avg_sq",))
    assert f"{name}[9, 5] on tp 1 · pp 0: 0.75 against 0.5, 0.25 apart" in one.found


# Other formats, other kinds, nothing at all


def test_universal_and_safetensors(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GPT / "universal" / "global_step3_universal", tmp_path / "universal"))
    cut(folder / "zero" / DENSE / "exp_avg.pt", 0.5)
    poke_file = folder / "zero" / NORM / "exp_avg_sq.pt"
    edit(poke_file, lambda c: {**c, "param": np.full(c["param"].shape, -1, np.float32)})
    found = check(folder)
    assert found["damaged-file"][0].where.files == (os.path.join("zero", DENSE, "exp_avg.pt"),)
    shutil.copy(GPT / "universal/global_step3_universal/zero" / DENSE / "exp_avg.pt", folder / "zero" / DENSE)
    assert only(check(folder), "negative-moment").where.tensors == (NORM,)
    save_file({"w": np.array([1, math.inf], np.float32).astype(ml_dtypes.bfloat16)}, tmp_path / "a.safetensors")
    assert only(check(tmp_path / "a.safetensors"), "not-finite").where.tensors == ("w",)
    cut(tmp_path / "a.safetensors", 0.8)
    assert "damaged-file" in check(tmp_path / "a.safetensors").codes


def test_a_kind_that_is_not_read_yet_is_said_and_its_files_are_looked_at(gpt: Path) -> None:
    for rank in range(4):
        edit(gpt / MODEL.format(rank), lambda c: {k: v for k, v in c.items() if k != "universal_checkpoint_info"})
    assert check(gpt).healthy  # what its data and names prove is inferred
    flip(gpt, NORM, "param", 0, tp=1)  # copies that are not equal prove nothing
    one = next(iter(check(gpt)["not-read-yet"]))
    assert one.severity == "error"
    assert "Give a strategy" in one.found
    poke_at, _ = held(read(GPT), DENSE, "exp_avg")
    stored = type(poke_at)(str(gpt / Path(poke_at.path).name), poke_at.offset, poke_at.dtype, (1,), (1,))
    overwrite(stored, 0, math.nan)
    assert {"not-read-yet", "not-finite"} <= set(check(gpt).codes)
    assert check(gpt)["not-finite"][0].where.files == (Path(stored.path).name,)
    found = check(gpt, strategy="megatron")
    assert found.checked.opened
    assert "not-read-yet" not in found.codes


def test_where_there_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        check(tmp_path)


# What is read, and how


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3], ids=lambda p: p.name)
def test_each_stored_byte_is_read_once(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[str, int, int]] = []
    really = os.preadv

    def noted(file: int, buffers: list, offset: int) -> int:
        got = really(file, buffers, offset)
        taken.append((os.readlink(f"/proc/self/fd/{file}"), offset, offset + got))
        return got

    monkeypatch.setattr(os, "preadv", noted)
    with ckptlab.reading() as read_:
        found = check(case, window=1 << 12)
    assert read_.bytes == found.checked.bytes
    taken.sort()
    for (path_a, _, end), (path_b, start, _) in pairwise(taken):
        assert path_a != path_b or start >= end, "no byte twice"
    assert sum(end - start for _, start, end in taken) == found.checked.bytes
    if case != ZERO3:  # whose padding need not be read
        assert found.checked.bytes == sum(stored.nbytes for stored in read(case).stored)


@pytest.mark.slow
@pytest.mark.parametrize("window", [1 << 6, 1 << 9, 1 << 14])
@pytest.mark.parametrize("workers", [1, 3])
def test_windows_and_jobs_of_any_size_see_the_same(gpt: Path, window: int, workers: int) -> None:
    poke(gpt, DENSE, "exp_avg", math.nan, tp=1, element=200)
    flip(gpt, NORM, "master", 0, tp=1, element=15)
    flip(gpt, DENSE, "param", 9, element=310)
    fill(gpt, "4.mlp.dense_h_to_4h.bias", "exp_avg", 0.0)
    expected = check(gpt)
    assert check(gpt, window=window, on=workers).findings == expected.findings
    assert len(expected.findings) == 5


def test_memory_stays_near_the_windows(tmp_path: Path) -> None:
    save_file({"w": np.zeros(1 << 24, np.float32)}, tmp_path / "a.safetensors")  # 64 MiB
    check(tmp_path)
    tracemalloc.start()
    found = check(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.checked.bytes == 1 << 26
    assert peak < 8 << 20


def test_without_data_only_headers_are_read(gpt: Path) -> None:
    poke(gpt, DENSE, "master", math.nan)
    found = check(gpt, data=False)
    assert found.findings == ()
    assert (found.checked.data, found.checked.bytes) == (False, 0)
    assert "no data was read" in repr(found)


def test_a_checkpoint_that_is_open_may_be_given() -> None:
    ckpt = ckptlab.open(ZERO2)
    assert check(ckpt).findings == check(ZERO2).findings == ()


def test_gaps_and_tensors_make_up_the_partitions() -> None:
    catalog = read(ZERO2)
    padding = list(gaps(catalog))
    covered = sum(job.nbytes for job in jobs(catalog, {})) + sum(gap.nbytes for gap in padding)
    assert covered == sum(stored.nbytes for stored in catalog.stored)


# What is shown


def test_the_command_and_its_exit_status(gpt: Path, tmp_path: Path) -> None:
    clean = run("check", ZERO2)
    assert (clean.exit_code, clean.stdout.splitlines()[0]) == (0, "healthy")
    remarked = run("check", gpt)
    assert (remarked.exit_code, remarked.stdout.splitlines()[0]) == (0, "healthy, with 1 remark")
    poke(gpt, DENSE, "exp_avg", math.nan)
    faulty = run("check", gpt)
    assert (faulty.exit_code, faulty.stdout.splitlines()[0]) == (1, "not healthy: 1 error, 1 remark")
    assert run("check", gpt, "--no-data").exit_code == 0
    assert run("check", ZERO2, "--checksums", "--no-progress").exit_code == 0
    (tmp_path / "empty").mkdir()
    trouble = run("check", tmp_path / "empty")
    assert (trouble.exit_code, trouble.stdout) == (2, "")
    told = json.loads(run("check", gpt, "--json").stdout)
    assert told["healthy"] is False
    assert told["findings"][0]["code"] == "not-finite"
    assert told["findings"][0]["where"]["ranks"] == [{"tp": 0, "pp": 0}]
    assert set(told) == {"healthy", "path", "format", "mesh", "checked", "findings"}


def test_text_and_html(gpt: Path) -> None:
    flip(gpt, DENSE, "param", 9, element=7)
    found = check(gpt)
    text = repr(found)
    assert all(len(line) <= 110 for line in text.splitlines())
    for word in ("ERROR  master-weight", "INFO  untrained-copy", "where", "found", "expected", "do ", DENSE):
        assert word in text
    html = found._repr_html_()
    assert "master-weight" in html
    assert DENSE in html
    assert "<script" not in html
    assert str(found.findings[0]).startswith("error: master-weight (")
    assert found.verdict == text.splitlines()[0] == "not healthy: 1 error, 1 remark"
    alone = found.findings[0]._repr_html_()
    assert "master-weight" in alone
    assert "untrained-copy" not in alone


def test_every_code_is_explained() -> None:
    package = Path(ckptlab.__file__).parent
    files = [package / "findings.py", *package.glob("analysis/checkup/*.py"), *package.glob("formats/**/*.py")]
    sources = "".join(
        p.read_text() for p in files if p.name not in ("target.py", "cautions.py", "info.py", "adopted.py")
    )
    codes = set(re.findall(r'"((?:[a-z]+-)+[a-z0-9]+)",\s+"(?:error|warning|info)"', sources))
    codes |= set(re.findall(r'(?:code|todo|code, todo) = "((?:[a-z]+-)+[a-z0-9]+)"', sources))
    explained = set(re.findall(r"`([a-z-]+)`", (DATA.parent / "docs" / "check.md").read_text()))
    assert codes - explained == set()
    assert len(codes) > 20


def test_html_escapes_what_files_say(zero2: Path) -> None:
    edit(zero2 / MODEL.format(0), lambda c: {**c, "kind": foreign("evil<b>", "Class", 1)})
    assert "evil&lt;b&gt;" in check(zero2)._repr_html_()


CHANGES: list[Callable[[dict], dict]] = [
    lambda c: {**c, "param_shapes": 5},
    lambda c: {**c, "param_shapes": [5]},
    lambda c: {**c, "mp_world_size": "many"},
    lambda c: {**c, "module": None},
    lambda c: {**c, "ds_config": 3},
    lambda c: {**c, "checkpoint_parallel_dimensions": {"tp_degree": 0}},
    lambda c: {"nothing": 1},
    lambda c: [1, 2],  # type: ignore[return-value,list-item]
]


@pytest.mark.parametrize("change", range(len(CHANGES)))
def test_strange_headers_are_findings_not_tracebacks(zero2: Path, change: int) -> None:
    edit(zero2 / MODEL.format(0), CHANGES[change])
    assert not check(zero2).healthy


@pytest.mark.parametrize("key", ["ds_config", "param_shapes", "module", "lr_scheduler", "global_steps", "note"])
def test_headers_nested_without_end_are_no_tracebacks(zero2: Path, key: str) -> None:
    def nest(content: dict) -> dict:
        inside: list = []
        for _ in range(300):
            inside = [inside]
        return {**content, key: inside}

    edit(zero2 / MODEL.format(0), nest)
    not_read = key in ("lr_scheduler", "global_steps", "note")
    assert check(zero2).healthy is not_read


def deep() -> list:
    """A list in a list … 100,000 times, which holds itself."""
    outer: list = []
    inside = outer
    for _ in range(100_000):
        inside.append([])
        inside = inside[0]
    inside.append(outer)
    return outer


@pytest.mark.slow
def test_what_is_nested_without_end_has_a_text_and_no_tensors() -> None:
    assert checks.text_of(deep()) == "(nested too deep)"
    assert list(stored_in(deep())) == []


@pytest.mark.parametrize("key", ["base_optimizer_state", "param_slice_mappings", "group_paddings", "zero_stage"])
@pytest.mark.parametrize("value", [None, 3, [], {}, [7], {"state": 3}, "text"])
def test_strange_optimizer_headers_too(zero2: Path, key: str, value: object) -> None:
    edit(zero2 / OPTIM.format(1, 0), lambda c: {**c, "optimizer_state_dict": {**c["optimizer_state_dict"], key: value}})
    absent = key in ("group_paddings", "param_slice_mappings") and value in (None, [])  # older DeepSpeed writes none
    assert check(zero2).healthy is absent


def test_replicas_that_the_programs_lists_leave_out_are_said(tmp_path: Path) -> None:
    """DeepSpeed takes what no list names for cut, and joins the copies."""
    torch = pytest.importorskip("torch")
    step = tmp_path / "global_step3"
    shutil.copytree(GPT / "global_step3", step)
    for file in sorted(step.glob("mp_rank_*")):
        model = torch.load(file, weights_only=False)
        lists = model["universal_checkpoint_info"]["tp_replicated_parameter_patterns"]
        lists[:] = [pattern for pattern in lists if "input_layernorm.weight" not in pattern]
        torch.save(model, file)
    found = ckptlab.check(step)
    (one,) = (f for f in found.findings if f.code == "shards-alike")
    assert one.where.tensors == tuple(f"{layer}.input_layernorm.weight" for layer in (2, 3, 4, 5))
    assert not found.healthy
