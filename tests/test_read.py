"""DeepSpeed's checkpoints come out as the training ranks had them; what is damaged or foreign is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3, differences, differences_from_truth, whole
from helpers.files import copy, edit, swap
from real_deepspeed import make_case, requires_deepspeed

from ckptlab.errors import CheckpointError
from ckptlab.formats import read
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape
from ckptlab.sharding.strategies import Rules, resolve

STEP = "global_step3"


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    return lambda case: copy(case, tmp_path)


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3], ids=lambda c: c.name)
def test_every_state_is_what_the_training_ranks_had(case: Path) -> None:
    catalog = read(case)
    assert differences_from_truth(catalog, case / "truth.safetensors") == []
    assert catalog.findings == ()


def test_the_3d_checkpoint_in_words() -> None:
    catalog = read(GPT)
    assert catalog.mesh == Mesh(tp=2, pp=2, dp=2)
    assert catalog.states == ("master", "exp_avg", "exp_avg_sq", "param")
    assert [(g.name, len(g.tensors)) for g in catalog.groups] == [("decay", 18), ("no_decay", 34)]
    embedding = catalog["tied_modules.embed.word_embeddings.weight"]
    assert (embedding.shape, embedding.cut.shape, embedding.stages) == ((101, 16), (112, 16), (0, 1))
    assert catalog["2.self_attention.dense.weight"].layout.text == "out (tp in)"
    assert catalog["2.mlp.dense_h_to_4h.weight"].layout.text == "(tp out) in"
    assert catalog["2.input_layernorm.weight"].layout.text == "out"


def test_aliases_frozen_tensors_and_buffers() -> None:
    catalog = read(ZERO2)
    kinds = {kind: [t.name for t in catalog.tensors.values() if t.kind == kind] for kind in ("frozen", "buffer")}
    assert all(kinds.values())
    [tied] = [t for t in catalog.tensors.values() if t.aliases]
    assert catalog[tied.aliases[0]] is tied


def test_deepspeeds_own_conversion_is_the_same_checkpoint() -> None:
    native, universal = read(GPT), read(GPT / "universal")
    assert universal.format == "universal"
    assert differences(native, universal) == []
    assert {s for t in universal.tensors.values() for s in t.states} == {"master", "exp_avg", "exp_avg_sq"}


@requires_deepspeed
@pytest.mark.parametrize(
    "case", ["llama_tp2_pp1_dp2", "gqa_tp2_pp1_dp2", "plain_zero2_dp2_round_robin", "plain_zero1_dp2_fp16"]
)
def test_other_kinds_made_on_the_spot(case: str, tmp_path: Path) -> None:
    folder = make_case(case, tmp_path)
    catalog = read(folder)
    assert differences_from_truth(catalog, folder / "truth.safetensors") == []
    assert [n.code for n in catalog.findings] == (["slice-mappings"] if "round_robin" in case else [])


class TestWhereToLook:
    def test_step_folder_folder_of_latest_and_folder_above(self) -> None:
        assert read(ZERO2).path == read(ZERO2 / STEP).path == str(ZERO2 / STEP)

    def test_one_checkpoint_somewhere_below(self, tmp_path: Path) -> None:
        shutil.copytree(ZERO2, tmp_path / "runs" / "a")
        assert read(tmp_path).zero_stage == 2

    def test_several_below_are_listed(self) -> None:
        with pytest.raises(CheckpointError, match=r"(?s)\d checkpoints.*gpt_tp2.*plain_zero2.*plain_zero3"):
            read(DATA)

    def test_no_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="no checkpoint here"):
            read(tmp_path)
        with pytest.raises(CheckpointError, match="no such file or folder"):
            read(tmp_path / "nowhere")

    def test_latest_that_names_nothing(self, tmp_path: Path) -> None:
        shutil.copytree(ZERO2, tmp_path / "run")
        (tmp_path / "run" / "latest").write_text("global_step7")
        with pytest.raises(CheckpointError, match=r"latest: names 'global_step7'.*there is global_step3"):
            read(tmp_path / "run")


class TestDamage:
    def test_missing_rank_file(self, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(GPT)
        (folder / "bf16_zero_pp_rank_1_mp_rank_02_optim_states.pt").unlink()
        with pytest.raises(CheckpointError, match="bf16_zero_pp_rank_1_mp_rank_02_optim_states.pt missing"):
            read(folder)

    def test_missing_layer_file(self, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(GPT)
        (folder / "layer_03-model_01-model_states.pt").unlink()
        with pytest.raises(CheckpointError, match="layer_03-model_01-model_states.pt missing"):
            read(folder)

    def test_truncated_file(self, copy_of: Callable[[Path], Path]) -> None:
        file = copy_of(ZERO2) / "mp_rank_00_model_states.pt"
        file.write_bytes(file.read_bytes()[:-2000])
        with pytest.raises(CheckpointError, match="mp_rank_00_model_states.pt"):
            read(file.parent)

    def test_model_file_of_another_step(self, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(GPT)
        edit(folder / "mp_rank_03_model_states.pt", lambda m: m.update(global_steps=4))
        with pytest.raises(CheckpointError, match=r"mp_rank_03_model_states.pt: global_steps is 4, .* say 3"):
            read(folder)

    def test_optimizer_file_of_another_run(self, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(GPT)
        name = "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
        edit(folder / name, lambda m: m.update(ds_config={**m["ds_config"], "gradient_clipping": 9.0}))
        with pytest.raises(CheckpointError, match=f"{name}: its ds_config is another"):
            read(folder)

    def test_optimizer_file_of_another_step(self, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(ZERO2)
        name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"

        def later(content: Any) -> None:
            for state in content["optimizer_state_dict"]["base_optimizer_state"]["state"].values():
                state["step"] = 8

        edit(folder / name, later)
        with pytest.raises(CheckpointError, match=f"{name}: optimizer step 8 where .* has step 3"):
            read(folder)

    def test_swapped_rank_files(self, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(ZERO2)
        a, b = (folder / f"bf16_zero_pp_rank_{d}_mp_rank_00_optim_states.pt" for d in (0, 1))
        swap(a, b)
        with pytest.raises(CheckpointError, match="holds the partition of dp rank 1, not of 0|elements, expected"):
            read(folder)

    def test_shapes_of_another_model(self, copy_of: Callable[[Path], Path]) -> None:
        file = copy_of(ZERO2) / "mp_rank_00_model_states.pt"

        def wider(content: Any) -> None:
            shapes = content["param_shapes"][0]
            name = next(iter(shapes))
            shapes[name] = (shapes[name][0] * 9, *shapes[name][1:])

        edit(file, wider)
        with pytest.raises(CheckpointError):
            read(file.parent)

    def test_extra_file_is_said_and_left_alone(self, copy_of: Callable[[Path], Path]) -> None:
        folder = copy_of(ZERO2)
        shutil.copy(folder / "mp_rank_00_model_states.pt", folder / "mp_rank_07_model_states.pt")
        [notice] = read(folder).findings
        assert notice.code == "extra-file"
        assert "mp_rank_07_model_states.pt" in notice.text


class TestLayoutsThatAreNotTold:
    @pytest.fixture
    def untold(self, copy_of: Callable[[Path], Path]) -> Path:
        folder = copy_of(GPT)
        for file in folder.glob("mp_rank_*"):
            edit(file, lambda m: {key: value for key, value in m.items() if key != "universal_checkpoint_info"})
        return folder

    def test_a_registered_strategy(self, untold: Path) -> None:
        found, told = read(untold, resolve("megatron")), read(GPT)
        assert found["tied_modules.embed.word_embeddings.weight"].shape == (101, 16)  # as checkpoint_info tells
        for name in ("2.mlp.dense_4h_to_h.weight", "3.self_attention.query_key_value.bias", "4.input_layernorm.bias"):
            assert whole(found, name, "exp_avg").tobytes() == whole(told, name, "exp_avg").tobytes()

    def test_the_users_own_lines_of_notation(self, untold: Path) -> None:
        own = Rules.of(
            {
                r".*(dense_h_to_4h|query_key_value|word_embeddings)\.weight": "(tp out) in",
                r".*(dense_h_to_4h|query_key_value)\.bias": "(tp out)",
                r".*(attention\.dense|dense_4h_to_h)\.weight": "out (tp in)",
                r".*position_embeddings\.weight": Layout("out in"),
                r".*": "out",
            }
        )
        found, told = read(untold, own), read(GPT)
        for name in told.tensors:
            if "word_embeddings" not in name:
                assert whole(found, name, "master").tobytes() == whole(told, name, "master").tobytes(), name


def test_wrong_mappings_are_said_and_not_believed(copy_of: Callable[[Path], Path]) -> None:
    folder = copy_of(ZERO2)

    def scramble(content: Any) -> None:
        mapping = content["optimizer_state_dict"]["param_slice_mappings"][0]
        first, second = list(mapping)[:2]
        mapping[first], mapping[second] = mapping[second], mapping[first]

    edit(folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", scramble)
    catalog = read(folder)
    assert [n.code for n in catalog.findings] == ["slice-mappings"]
    assert differences_from_truth(catalog, ZERO2 / "truth.safetensors") == []


class TestOtherOptimizers:
    """No list of states is hard-coded: one moment under another name, none, or moments of another dtype."""

    def rewrite(self, folder: Path, change: Callable[[dict], dict]) -> None:
        def edit_states(content: Any) -> None:
            base = content["optimizer_state_dict"]["base_optimizer_state"]
            base["state"] = {i: change(dict(s)) for i, s in base["state"].items()}

        for file in folder.glob("*optim_states.pt"):
            edit(file, edit_states)

    @pytest.mark.parametrize("form", ["deepspeed", "universal"])
    def test_one_moment(self, copy_of: Callable[[Path], Path], tmp_path: Path, form: str) -> None:
        folder = copy_of(ZERO2)
        self.rewrite(folder, lambda s: {"momentum_buffer": s["exp_avg"]})
        catalog, adam = read(folder), read(ZERO2)
        assert catalog.states == ("master", "momentum_buffer", "param")
        name = next(n for n, t in adam.tensors.items() if t.kind == "parameter")
        assert whole(catalog, name, "momentum_buffer").tobytes() == whole(adam, name, "exp_avg").tobytes()
        Reshape.of(catalog, Mesh(dp=3)).save(tmp_path / "out" / "step", form)
        again = read(tmp_path / "out")
        assert again[name].states.keys() >= {"master", "momentum_buffer"}
        assert differences(catalog, again) == []

    def test_no_moment(self, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
        folder = copy_of(GPT)
        self.rewrite(folder, lambda s: {})
        catalog = read(folder)
        assert catalog.states == ("master", "param")
        Reshape.of(catalog, Mesh(tp=4)).save(tmp_path / "out" / "step")
        assert differences(catalog, read(tmp_path / "out")) == []

    def test_moments_in_sixteen_bits_stay_so(self, copy_of: Callable[[Path], Path], tmp_path: Path) -> None:
        folder = copy_of(ZERO2)
        bf16 = np.dtype(ml_dtypes.bfloat16)
        self.rewrite(folder, lambda s: {**s, "exp_avg": s["exp_avg"].map().astype(bf16)})
        catalog = read(folder)
        assert {t.states["exp_avg"] for t in catalog.tensors.values() if t.kind == "parameter"} == {bf16}
        Reshape.of(catalog, Mesh(dp=5)).save(tmp_path / "out" / "step")
        assert differences(catalog, read(tmp_path / "out")) == []


def test_parameter_groups_are_in_the_programs_order_whatever_the_buffers_is() -> None:
    plain, dealt = read(DATA / "plain_zero2_dp2"), read(DATA / "plain_zero2_dp2_round_robin")
    assert [g.tensors for g in dealt.groups] == [g.tensors for g in plain.groups]
    assert [f.names for f in dealt.flat_groups] != [f.names for f in plain.flat_groups]
