"""DeepSpeed's names on our parts: what holds whatever DeepSpeed does, and where ours goes further."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401 - teaches safetensors' numpy bfloat16
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

import ckptlab
from ckptlab import deepspeed as ds
from ckptlab.catalog import ALONE
from ckptlab.deepspeed import ds_to_universal, zero_to_fp32
from ckptlab.deepspeed.tensors import load
from ckptlab.errors import CheckpointError, CkptlabError, LayoutError, UnsupportedError

DATA = Path(__file__).resolve().parents[1] / "data"
GPT = str(DATA / "gpt_tp2_pp2_dp2" / "global_step3")
UNIVERSAL = DATA / "gpt_tp2_pp2_dp2" / "universal" / "global_step3_universal"
ZERO2 = DATA / "plain_zero2_dp2"
ZERO3 = DATA / "plain_zero3_dp2"

degrees = st.integers(1, 8)


def truth(case: Path) -> dict[str, torch.Tensor]:
    return load_file(case / "truth.safetensors")


def leaves(value: Any, path: str = "") -> dict[str, torch.Tensor]:
    """Every tensor in nested containers, by the way to it."""
    if torch.is_tensor(value):
        return {path: value}
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    return {k: v for key, one in inside for k, v in leaves(one, f"{path}/{key}").items()}


def assert_same_tensors(a: Any, b: Any) -> int:
    found, expected = leaves(a), leaves(b)
    assert list(found) == list(expected)
    different = [k for k in found if found[k].dtype != expected[k].dtype or not torch.equal(found[k], expected[k])]
    assert not different
    return len(found)


# -------------------------------------------------------------------- maps


def test_the_map_of_222_to_111() -> None:
    (one,) = ds.model_3d_desc(2, 2, 2).reshape(ds.model_3d_desc(1, 1, 1))
    assert one.get_data(0, 0) == [0, 4, 1, 5, 2, 6, 3, 7]


@given(degrees, degrees, degrees, degrees)
def test_every_old_rank_is_used_and_every_new_rank_has_something(pp: int, tp: int, new_pp: int, new_tp: int) -> None:
    found = ds.reshape_meg_2d_parallel(pp, tp, new_pp, new_tp)
    assert set(found.get_data()) == set(range(pp * tp))
    assert all(found.get_data(p, t) for p in range(new_pp) for t in range(new_tp))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_up_is_the_inverse_of_down(pp: int, tp: int, times_pp: int, times_tp: int) -> None:
    big = (pp * times_pp, tp * times_tp)
    up, down = ds.reshape_meg_2d_parallel(pp, tp, *big), ds.reshape_meg_2d_parallel(*big, pp, tp)
    for (p, t), (q, s) in itertools.product(np.ndindex(pp, tp), np.ndindex(*big)):
        assert (p * tp + t in up.get_data(q, s)) == (q * big[1] + s in down.get_data(p, t))


@given(degrees, degrees, degrees, degrees, degrees, degrees)
def test_every_file_is_read_in_3d(pp: int, tp: int, dp: int, new_pp: int, new_tp: int, new_dp: int) -> None:
    source, target = ds.model_3d_desc(pp, tp, dp), ds.model_3d_desc(new_pp, new_tp, new_dp)
    assert source.can_reshape(target) == (True, [])
    maps = source.reshape(target)
    assert len(maps) == new_dp
    assert {file for one in maps for file in one.get_data()} == set(range(source.world_size()))


def test_more_data_parallel_ranks_share_files_in_order() -> None:
    maps = ds.model_3d_desc(1, 1, 2).reshape(ds.model_3d_desc(1, 1, 4))
    assert [one.get_data() for one in maps] == [[0], [0], [1], [1]]


def test_arguments_that_deepspeed_asserts_against() -> None:
    grid = ds.meg_2d_parallel_map(2, 2)
    for call in (
        lambda: ds.partition_data([1, 2, 3], 2),
        lambda: grid.add_data(2, 0, [1]),
        lambda: grid.add_data(0, 0, (1,)),  # type: ignore[arg-type]
        lambda: grid.get_data(pp_index=5),
        lambda: ds.model_3d_desc(1, 1, 1).reshape(ds.model_3d_desc(1, 0, 1)),
        lambda: ds.ZeROCheckpoint("no such folder"),
    ):
        with pytest.raises(AssertionError) as raised:
            call()
        assert isinstance(raised.value, ckptlab.CkptlabError)
        assert str(raised.value)


# -------------------------------------------------------------------- merging by structure


def test_merge_keeps_what_one_side_has_and_scalars() -> None:
    a = {"exp_avg": torch.ones(4), "step": torch.tensor(3.0), "only_a": torch.ones(2), "lr": 0.1}
    b = {"exp_avg": torch.zeros(2), "step": torch.tensor(3.0), "only_b": [1]}
    merged = ds.merge_state(a, b)
    assert list(merged) == ["exp_avg", "step", "only_a", "lr", "only_b"]
    assert merged["exp_avg"].tolist() == [1, 1, 1, 1, 0, 0]
    assert merged["step"].dim() == 0
    assert type(ds.merge_state(OrderedDict(a=1), OrderedDict(a=2))) is OrderedDict


def test_merge_says_where_states_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=r"lists of different lengths, 2 and 1, at opt.groups"):
        ds.merge_state({"opt": {"groups": [1, 2]}}, {"opt": {"groups": [1]}})
    assert "opt.groups" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"types .*list.* and .*tuple.*, at a"):
        ds.merge_state({"a": [1]}, {"a": (1,)})


# -------------------------------------------------------------------- the checkpoint classes


def test_states_are_tensors_that_may_be_written_to(tmp_path: Path) -> None:
    path = shutil.copy(ds.DeepSpeedCheckpoint(GPT).get_embedding_files(0)[0], tmp_path)
    before = Path(path).read_bytes()
    weight = load(path)["word_embeddings.weight"]
    assert weight.dtype == torch.bfloat16
    weight.zero_()
    assert Path(path).read_bytes() == before
    assert load(path)["word_embeddings.weight"].any()


def test_a_file_that_was_cut_since_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cut.pt"
    torch.save({"w": torch.ones(10_000)}, path)
    content = ckptlab.formats.torch.torchfile.read(path)
    os.truncate(path, 2_000)
    with pytest.raises(CheckpointError, match="was cut"):
        ckptlab.deepspeed.tensors.as_torch(content)


def test_client_state_needs_no_class_of_the_client() -> None:
    args = ds.DeepSpeedCheckpoint(GPT).get_args()
    assert type(args) is argparse.Namespace
    assert args.hidden_size == 16
    assert args.params_dtype is torch.bfloat16
    random_states = ds.DeepSpeedCheckpoint(GPT).get_checkpoint_info("rng_state")[0]
    assert random_states["np_rng_state"][1].shape == (624,)
    assert random_states["torch_rng_state"].dtype == torch.uint8


@pytest.mark.slow
def test_an_unknown_class_stays_a_placeholder(tmp_path: Path) -> None:
    code = f"""
import torch, types, sys
module = sys.modules["clients"] = types.ModuleType("clients")
exec("class Kind: pass", module.__dict__); module.Kind.__module__ = "clients"
kind = module.Kind(); kind.depth = 7
torch.save({{"kind": kind, "w": torch.ones(2)}}, {str(tmp_path / "client.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    found = load(str(tmp_path / "client.pt"))
    assert found["kind"].depth == 7
    assert found["w"].tolist() == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("target", [(4, 4, 4), (4, 2, 1), (2, 2, 3)], ids="tp{0[0]}_pp{0[1]}_dp{0[2]}".format)
def test_what_grows_is_what_save_writes(target: tuple[int, int, int], tmp_path: Path) -> None:
    tp, pp, dp = target
    asked = ds.DeepSpeedCheckpoint(GPT, tp, pp, dp)
    asked.save(str(tmp_path / "saved"))
    written = ds.DeepSpeedCheckpoint(str(tmp_path / "saved"))
    assert (written.tp_degree, written.pp_degree, written.dp_degree) == target
    compared = 0
    for p, t in itertools.product(range(pp), range(tp)):
        compared += assert_same_tensors(asked.get_transformer_state(t, p), written.get_transformer_state(t, p))
        if tp > 2:
            compared += assert_same_tensors(asked.get_embedding_state(t), written.get_embedding_state(t))
            compared += assert_same_tensors(asked.get_2d_parallel_state(t, p), written.get_2d_parallel_state(t, p))
        for d, strip in itertools.product(range(dp), (True, False)):
            rank = (p, t, d, strip)
            found = asked.get_zero_checkpoint_state(*rank)
            compared += assert_same_tensors(found, written.get_zero_checkpoint_state(*rank))
    assert compared > 100
    assert [layer for p in range(pp) for layer in asked.get_pp_transformer_map(p)] == asked.layer_keys[1:-1]


def test_layers_that_do_not_come_out_even() -> None:
    up = ds.DeepSpeedCheckpoint(GPT, pp_degree=3)
    assert [len(up.get_pp_transformer_map(p)) for p in range(3)] == [2, 1, 1]
    with pytest.warns(UserWarning, match="layer_04 are on no stage"):
        down = ds.DeepSpeedCheckpoint(GPT, final_layer_norm_idx=-2)
    assert down.get_pp_transformer_map(1) == ["layer_03"]


class Holder(torch.nn.Module):
    """A module whose parameters and buffers have any names and shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in shapes.items():
            at = self
            *path, last = name.split(".")
            for part in path:
                if part not in at._modules:
                    at.add_module(part, torch.nn.Module())
                at = at._modules[part]  # type: ignore[assignment]
            at.register_parameter(last, torch.nn.Parameter(torch.zeros(shape, dtype=dtype)))


def holder(case: Path, **changes: Any) -> Holder:
    shapes = {k.removeprefix("master/"): tuple(v.shape) for k, v in truth(case).items() if k.startswith("master/")}
    return Holder(shapes | changes.pop("shapes", {}), **changes)


@pytest.mark.parametrize("make", [ds.DeepSpeedCheckpoint, ds.ZeROCheckpoint])
def test_load_gives_a_module_the_master_weights(make: Any) -> None:
    module = holder(DATA / "gpt_tp2_pp2_dp2")
    assert make(GPT).load(module) == ([], [])
    wanted = truth(DATA / "gpt_tp2_pp2_dp2")
    for name, value in module.state_dict().items():
        assert torch.equal(value, wanted[f"master/{name}"])


def test_load_another_state_and_another_dtype() -> None:
    wanted = truth(DATA / "gpt_tp2_pp2_dp2")
    moments, rounded = holder(DATA / "gpt_tp2_pp2_dp2"), holder(DATA / "gpt_tp2_pp2_dp2", dtype=torch.bfloat16)
    ds.ZeROCheckpoint(GPT).load(moments, state="exp_avg")
    ds.DeepSpeedCheckpoint(GPT).load(rounded)
    for name, value in rounded.state_dict().items():
        assert torch.equal(moments.state_dict()[name], wanted[f"exp_avg/{name}"])
        assert torch.equal(value, wanted[f"param/{name}"])
    with pytest.raises(CheckpointError, match=r"no state 'velocity': there are master, exp_avg"):
        ds.ZeROCheckpoint(GPT).load(moments, state="velocity")


def test_load_says_which_keys_are_missing_or_unexpected() -> None:
    first = "tied_modules.embed.word_embeddings.weight"
    module = Holder({first: (112, 16), "added.weight": (3,)})
    with pytest.raises(
        CheckpointError, match=r"lacks, added.weight .*the module lacks, tied_modules.embed.position_embeddings"
    ):
        ds.DeepSpeedCheckpoint(GPT).load(module)
    missing, unexpected = ds.DeepSpeedCheckpoint(GPT).load(module, strict=False)
    assert missing == ["added.weight"]
    assert "2.mlp.dense_h_to_4h.weight" in unexpected
    weight = module.state_dict()[first]
    assert torch.equal(weight[:101], truth(DATA / "gpt_tp2_pp2_dp2")[f"master/{first}"])  # the padding of tp 2 below


def test_zero3_too_has_its_degrees_and_its_states() -> None:
    zero = ds.ZeROCheckpoint(str(ZERO3 / "global_step3"))
    assert zero.src_3d.get_desc() == "PP,TP,DP = (1, 1, 2)"
    assert all(file.endswith("_optim_states.pt") for file in zero.file_list)
    zero.reshape(ds.model_3d_desc(1, 1, 3))
    assert zero.get_state_for_rank(0, 0, 2)["optimizer_state_dict"]["partition_count"] == 3


def test_print_3d_file_map(capsys: pytest.CaptureFixture[str]) -> None:
    zero = ds.ZeROCheckpoint(GPT)
    zero.print_3d_file_map("files")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3D file map: files"
    assert len(lines) == 9
    assert lines[1].startswith("0, 0, 0 => [")
    assert lines[1].endswith("bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt']")


# -------------------------------------------------------------------- universal checkpoints


def shard_of(name: str, tp: int, rank: int, state: str) -> torch.Tensor:
    """What a tp rank holds of a tensor of the GPT, cut out of the truth (the catalog's own cut, element by element)."""
    tensor = ckptlab.open(GPT).reshape(ckptlab.Mesh(tp=tp)).target.tensors[name]
    whole = np.zeros(tensor.cut.shape, np.float32)
    whole[tuple(slice(0, n) for n in tensor.shape)] = truth(DATA / "gpt_tp2_pp2_dp2")[f"{state}/{name}"]
    return torch.from_numpy(tensor.cut.take(whole, tensor.cut.coordinate({"tp": rank})))


@pytest.mark.slow
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize(
    "name",
    [
        "tied_modules.embed.word_embeddings.weight",
        "2.self_attention.query_key_value.weight",
        "2.mlp.dense_4h_to_h.weight",
        "2.input_layernorm.bias",
    ],
)
def test_a_parameter_loads_its_shard_from_a_universal_folder(name: str, tp: int) -> None:
    for rank in range(tp):
        expected = shard_of(name, tp, rank, "master")
        module = Holder({"w": tuple(expected.shape)})
        ds.enable_universal_checkpoint(module)
        step = module.w.load_hp_checkpoint_state(str(UNIVERSAL / "zero" / name), rank, tp)
        assert float(step) == 3
        assert torch.equal(module.w.data, expected)
        for state, found in module.w._hp_mapping.optim_fragment.items():
            assert torch.equal(found.view(expected.shape), shard_of(name, tp, rank, state))
        assert set(module.w._hp_mapping.optim_fragment) == {"exp_avg", "exp_avg_sq"}


def test_a_fragment_goes_where_the_engine_says() -> None:
    name, start, count = "2.self_attention.dense.weight", 37, 64
    shard = shard_of(name, 2, 1, "master")
    parameter: Any = torch.nn.Parameter(torch.zeros_like(shard))
    memory = torch.zeros(count)
    parameter._hp_mapping = SimpleNamespace(
        lp_fragment_address=SimpleNamespace(start=start, numel=count), get_hp_fragment=lambda: memory
    )
    ds.enable_universal_checkpoint([parameter])
    parameter.load_hp_checkpoint_state(str(UNIVERSAL / "zero" / name), 1, 2)
    assert torch.equal(memory, shard.flatten()[start : start + count])
    assert not parameter.data.any()


def test_sub_parameters_are_cut_each_on_its_own(tmp_path: Path) -> None:
    whole = torch.arange(48.0).view(8, 6)
    shape = ds.SubparamShape(patterns=["w"], shape=((4, 2, 2), 6), partition_dim=0)
    parts = whole.split((4, 2, 2))
    ckptlab.formats.torch.torchfile.write(
        tmp_path / "fp32.pt",
        {
            "param": whole.numpy(),
            "sub_param_shape": ckptlab.formats.torch.pickles.foreign(
                "deepspeed.checkpoint.universal_checkpoint", "SubparamShape", state=vars(shape), new=True
            ),
        },
    )
    for rank in range(2):
        parameter: Any = torch.nn.Parameter(torch.zeros(4, 6))
        ds.enable_universal_checkpoint([parameter])
        assert parameter.load_hp_checkpoint_state(str(tmp_path), rank, 2) is None
        assert torch.equal(parameter.data, torch.cat([part.chunk(2)[rank] for part in parts]))


def test_equal_sub_parameters_are_cut_each_on_its_own(tmp_path: Path) -> None:
    whole = torch.arange(48.0).view(8, 6)
    torch.save({"param": whole, "cat_dim": 0, "param_n_sub_params": 2}, tmp_path / "fp32.pt")
    for rank in range(2):
        parameter: Any = torch.nn.Parameter(torch.zeros(4, 6))
        ds.enable_universal_checkpoint([parameter])
        parameter.load_hp_checkpoint_state(str(tmp_path), rank, 2)
        assert torch.equal(parameter.data, torch.cat([half.chunk(2)[rank] for half in whole.chunk(2)]))


def test_an_expert_rank_loads_its_experts(tmp_path: Path) -> None:
    whole = torch.arange(24.0).view(4, 3, 2)
    torch.save({"param": whole, "is_expert_param": True, "ep_num_experts": 4}, tmp_path / "fp32.pt")
    parameter: Any = torch.nn.Parameter(torch.zeros(2, 3, 2))
    ds.enable_universal_checkpoint([parameter])
    parameter.load_hp_checkpoint_state(str(tmp_path), 0, 1, ep_rank=1, ep_size=2)
    assert torch.equal(parameter.data, whole[2:])


def test_what_does_not_fit_a_parameter_is_refused() -> None:
    parameter: Any = torch.nn.Parameter(torch.zeros(5, 16))
    ds.enable_universal_checkpoint([parameter])
    with pytest.raises(LayoutError, match=r"exp_avg.pt: .*\(64, 16\).*\(5, 16\)"):
        parameter.load_hp_checkpoint_state(str(UNIVERSAL / "zero" / "2.mlp.dense_h_to_4h.weight"), 0, 2)
    for meta, error, says in (
        ({"conversion": {"unsupported_reason": "it is quantised"}}, UnsupportedError, "AutoTP cannot.*quantised"),
        ({"partition_dim": 0, "logical_shape": (63, 16)}, LayoutError, "63 rows are not divisible by tp 2"),
        ({"partition_dim": 7, "logical_shape": (64, 16)}, CkptlabError, "partition_dim"),
        (3, CheckpointError, "expected a dictionary, found 3"),
    ):
        parameter.ds_autotp_universal_checkpoint_meta = meta
        with pytest.raises(error, match=says):
            parameter.load_hp_checkpoint_state(str(UNIVERSAL / "zero" / "2.mlp.dense_h_to_4h.weight"), 0, 2)


# -------------------------------------------------------------------- console scripts


def test_ds_to_universal_makes_what_deepspeed_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step_universal"
    flags = ["--input_folder", GPT, "--output_folder", str(out), "--keep_temp_folder", "--num_merge_workers", "1"]
    ds_to_universal.main(ds_to_universal.parse_arguments(flags))
    said = capsys.readouterr().out
    assert "--keep_temp_folder has no meaning here" in said
    assert "--num_merge_workers has no meaning here" in said
    assert (tmp_path / "latest_universal").read_text() == "step_universal"
    ours, theirs = (ckptlab.formats.read(path) for path in (out, UNIVERSAL))
    assert set(ours.tensors) == set(theirs.tensors)
    for (name, state), by_holder in theirs.stored.pieces.items():
        found = ours.stored.pieces[name, state]
        assert np.array_equal(found[ALONE][0].stored.map(), by_holder[ALONE][0].stored.map()), (name, state)


def test_ds_to_universal_says_what_is_found_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = DATA / "plain_zero2_dp2_round_robin"
    ds_to_universal.convert(str(case), str(tmp_path / "universal"))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert "round_robin_gradients" in line


@pytest.mark.parametrize("flags", [[], ["--safe_serialization"]])
def test_zero_to_fp32_writes_one_file_or_several(flags: list[str], tmp_path: Path) -> None:
    name = "model.safetensors" if flags else "pytorch_model.bin"
    zero_to_fp32.main(zero_to_fp32.parse_arguments([str(ZERO2), str(tmp_path / "one"), *flags]))
    zero_to_fp32.main(
        zero_to_fp32.parse_arguments(
            [str(ZERO2), str(tmp_path / "many"), "-t", "global_step3", "--max_shard_size", "4KB", *flags]
        )
    )
    read = load_file if flags else lambda path: torch.load(path, weights_only=True)
    one = read(tmp_path / "one" / name)
    index = json.loads((tmp_path / "many" / f"{name}.index.json").read_text())["weight_map"]
    assert set(index) == set(one)
    assert len(set(index.values())) > 2
    for tensor, file in index.items():
        assert torch.equal(read(tmp_path / "many" / file)[tensor], one[tensor])
    for key, value in truth(ZERO2).items():
        state, tensor = key.split("/")
        if state == "master":
            assert torch.equal(one[tensor], value)
        if state == "frozen":
            assert torch.equal(one[tensor], value.float())


def test_zero_to_fp32_leaves_frozen_tensors_out(tmp_path: Path) -> None:
    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(
        str(ZERO3), str(tmp_path / "out"), exclude_frozen_parameters=True
    )
    found = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    frozen = {key.removeprefix("frozen/") for key in truth(ZERO3) if key.startswith("frozen/")}
    assert frozen
    assert not frozen & set(found)


def test_scripts_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"zero_to_fp32: .*no such file or folder"):
        zero_to_fp32.main(zero_to_fp32.parse_arguments([str(tmp_path / "none"), str(tmp_path / "out")]))
    flags = ds_to_universal.parse_arguments(["--input_folder", GPT, "--output_folder", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"ds_to_universal: .*exists already"):
        ds_to_universal.main(flags)


def test_neither_deepspeed_nor_torch_is_needed_before_a_tensor_is() -> None:
    code = f"""
import sys
sys.modules["deepspeed"] = sys.modules["torch"] = None
from ckptlab.deepspeed import DeepSpeedCheckpoint, get_model_3d_descriptor
c = DeepSpeedCheckpoint({GPT!r}, tp_degree=1)
assert c.get_iteration() == 3 and get_model_3d_descriptor({GPT!r}).world_size() == 8
c.show_2d_mapping()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "reshaped 2d map ---- begin" in done.stdout


def test_the_names_are_importable_from_ckptlab_itself() -> None:
    import ckptlab
    from ckptlab import deepspeed

    for name in deepspeed.__all__:
        assert getattr(ckptlab, name) is getattr(deepspeed, name), name
    assert not hasattr(ckptlab, "no_such_name")


def test_the_global_state_has_what_deepspeeds_has() -> None:
    state = ds.DeepSpeedCheckpoint(GPT).global_state
    assert set(state) == {"iteration", "args", "checkpoint_info", "universal_checkpoint_info"}
    assert isinstance(state["args"], argparse.Namespace)
    assert state["checkpoint_info"]["original_vocab_size"] == 101


def test_dtypes_in_placeholders_are_torchs(tmp_path: Path) -> None:
    from ckptlab.formats.torch import torchfile
    from ckptlab.formats.torch.pickles import Global, foreign

    scaler = foreign(
        "deepspeed.runtime.fp16.loss_scaler", "DynamicLossScaler", state={"dtype": Global("torch", "float16")}, new=True
    )
    torchfile.write(tmp_path / "x.pt", {"loss_scaler": scaler})
    found = load(str(tmp_path / "x.pt"))["loss_scaler"]
    assert found.dtype is torch.float16
    assert found.name == "DynamicLossScaler"
