"""DeepSpeed's names beside DeepSpeed itself: the same answers, and both where its own are wrong."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes  # noqa: F401 - teaches safetensors' numpy bfloat16
import numpy as np
import pytest
import torch
from real_deepspeed import DATA, make_case, requires_deepspeed
from safetensors.torch import load_file

from ckptlab import deepspeed as ds
from ckptlab.deepspeed import zero_to_fp32
from ckptlab.errors import CkptlabError

if importlib.util.find_spec("deepspeed") is None:
    pytest.skip("deepspeed is not installed", allow_module_level=True)

GPT = str(DATA / "gpt_tp2_pp2_dp2" / "global_step3")
LISTED = (
    "file_list",
    "layer_files",
    "mp_rank_files",
    "layer_keys",
    "layer_count",
    "tp_degree",
    "pp_degree",
    "dp_degree",
    "world_size",
    "original_world_size",
    "pp_to_transformer_map",
    "transformer_file_map",
    "tp_to_embedding_map",
    "tp_to_final_norm_map",
)
PRINTERS = (
    "show_2d_mapping",
    "show_tp_embedding_map",
    "show_tp_final_norm_map",
    "show_pp_transformer_map",
    "show_transformer_file_map",
    "validate_files",
)


@pytest.fixture(scope="module")
def real() -> Iterator[ModuleType]:
    """The installed deepspeed.checkpoint. Its merge_state is taught to keep a tensor without dims, where it stops."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed.checkpoint
    from deepspeed.checkpoint import reshape_utils, zero_checkpoint

    merge = reshape_utils.merge_state

    def keeping_scalars(a: Any, b: Any, key_list: Any = ()) -> Any:
        return a if torch.is_tensor(a) and a.dim() == 0 else merge(a, b, list(key_list))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reshape_utils, "merge_state", keeping_scalars)
        patch.setattr(zero_checkpoint, "merge_state", keeping_scalars)
        yield deepspeed.checkpoint


def differences(theirs: Any, ours: Any, path: str = "") -> list[str]:
    """Where two results differ; keys that only ours has (of the first merged, see merge_state) are none."""
    if torch.is_tensor(theirs):
        same = torch.is_tensor(ours) and theirs.dtype == ours.dtype and torch.equal(theirs, ours)
        return [] if same else [path]
    if isinstance(theirs, np.ndarray):
        return [] if np.array_equal(theirs, ours) else [path]
    if isinstance(theirs, dict):
        if not isinstance(ours, dict) or not set(theirs) <= set(ours):
            return [path]
        return [d for key in theirs for d in differences(theirs[key], ours[key], f"{path}/{key}")]
    if isinstance(theirs, (list, tuple)):
        if not isinstance(ours, type(theirs) if isinstance(theirs, list) else tuple) or len(theirs) != len(ours):
            return [path]
        return [d for i, (a, b) in enumerate(zip(theirs, ours, strict=True)) for d in differences(a, b, f"{path}/{i}")]
    if hasattr(theirs, "__dict__") and not callable(theirs) and not isinstance(theirs, int):
        attributes = getattr(ours, "attributes", None) or vars(ours)
        return [d for key, one in vars(theirs).items() for d in differences(one, attributes[key], f"{path}.{key}")]
    return [] if theirs == ours else [path]


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except (AssertionError, ValueError, RuntimeError) as error:
        return type(error)


# -------------------------------------------------------------------- names


def test_every_name_is_there_with_its_signature(real: ModuleType) -> None:
    public = {n: v for n, v in vars(real).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert set(public) <= set(ds.__all__)
    for name, theirs in public.items():
        ours = getattr(ds, name)
        if callable(theirs):
            expected = list(inspect.signature(theirs).parameters)
            assert list(inspect.signature(ours).parameters)[: len(expected)] == expected, name


def test_methods_have_their_signatures(real: ModuleType) -> None:
    from deepspeed.checkpoint.reshape_meg_2d import meg_2d_parallel_map

    classes = (real.DeepSpeedCheckpoint, real.ZeROCheckpoint, real.model_3d_desc, meg_2d_parallel_map)
    for theirs in classes:
        for name, method in vars(theirs).items():
            if inspect.isfunction(method) and not name.startswith("_"):
                ours = getattr(getattr(ds, theirs.__name__), name)
                assert list(inspect.signature(ours).parameters) == list(inspect.signature(method).parameters), name


def test_constants_are_the_same(real: ModuleType) -> None:
    theirs = {name: value for name, value in vars(real.constants).items() if name.isupper()}
    assert {name: getattr(ds.constants, name) for name in ds.constants.__all__} == theirs
    assert all(getattr(ds, name) == value for name, value in theirs.items())


def test_file_names_are_the_same(real: ModuleType) -> None:
    for a, b in ((0, 0), (3, 12), (100, 117)):
        for name, arguments in (
            ("get_layer_ckpt_name_for_rank", ("run", f"layer_{a:02d}", b)),
            ("get_model_ckpt_name_for_rank", ("run", f"{a:02d}")),
            ("get_zero_ckpt_name_for_rank", ("run", a, b)),
        ):
            assert getattr(ds, name)(*arguments) == getattr(real, name)(*arguments)


# -------------------------------------------------------------------- maps


@pytest.mark.slow
def test_2d_maps_for_every_degree_up_to_6(real: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    answered = 0
    for degrees in itertools.product(range(1, 7), repeat=4):
        theirs = outcome(lambda d=degrees: real.reshape_meg_2d_parallel(*d, verbose=True).map)
        printed = capsys.readouterr().out
        ours = ds.reshape_meg_2d_parallel(*degrees, verbose=True).map
        if theirs is not AssertionError:
            assert ours == theirs, degrees
            assert capsys.readouterr().out == printed
            answered += 1
        capsys.readouterr()
    assert answered > 200


@pytest.mark.slow
def test_3d_maps_for_every_degree_up_to_6(real: ModuleType) -> None:
    answered = 0
    for source in itertools.product(range(1, 7), repeat=3):
        divisors = [[d for d in range(1, degree + 1) if degree % d == 0] for degree in source]
        for target in itertools.product(*divisors):
            theirs = outcome(lambda s=source, t=target: real.model_3d_desc(*s).reshape(real.model_3d_desc(*t)))
            ours = ds.model_3d_desc(*source).reshape(ds.model_3d_desc(*target))
            if theirs is not AssertionError:
                assert [one.map for one in ours] == [one.map for one in theirs], (source, target)
                answered += 1
    assert answered > 1000
    refused = real.model_3d_desc(1, 1, 1).can_reshape(real.model_3d_desc(2, 2, 2))
    assert refused[0] is False
    assert ds.model_3d_desc(1, 1, 1).can_reshape(ds.model_3d_desc(2, 2, 2)) == (True, [])


def test_descriptors_and_groups(real: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    from deepspeed.checkpoint.reshape_meg_2d import get_mpu_ranks

    for tp, pp, dp in itertools.product(range(1, 5), repeat=3):
        theirs, printed = get_mpu_ranks(tp, pp, dp), capsys.readouterr().out
        assert ds.get_mpu_ranks(tp, pp, dp) == theirs
        assert capsys.readouterr().out == printed
    a, b = real.model_3d_desc(2, 3, 4), ds.model_3d_desc(2, 3, 4)
    assert (a.get_desc(), a.world_size()) == (b.get_desc(), b.world_size())
    for rank in itertools.product(range(5), repeat=3):
        assert a.is_valid(*rank) == b.is_valid(*rank)
    assert real.get_model_3d_descriptor(GPT).get_desc() == ds.get_model_3d_descriptor(GPT).get_desc()


def test_errors_that_are_kept_are_of_the_same_kind(real: ModuleType, tmp_path: Path) -> None:
    from deepspeed.checkpoint import reshape_meg_2d, reshape_utils

    theirs = SimpleNamespace(**{**vars(reshape_utils), **vars(reshape_meg_2d), **vars(real)})
    files = {
        "nothing": {},
        "disagree": {"mp_rank_00": {"pp_degree": 1, "tp_degree": 2}, "mp_rank_01": {"pp_degree": 2, "tp_degree": 1}},
        "one missing": {"mp_rank_00": {"pp_degree": 1, "tp_degree": 2}, "mp_rank_01": None},
        "too few": {"mp_rank_00": {"pp_degree": 1, "tp_degree": 2}},
        "no number": {"mp_rank_00": {"pp_degree": 1, "tp_degree": True}},
    }
    for name, models in files.items():
        (tmp_path / name).mkdir()
        for rank, dimensions in models.items():
            state = {} if dimensions is None else {"checkpoint_parallel_dimensions": dimensions}
            torch.save(state, tmp_path / name / f"{rank}_model_states.pt")
            torch.save({}, tmp_path / name / f"bf16_zero_pp_rank_0_{rank}_optim_states.pt")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "zero_pp_rank_x_optim_states.pt").touch()
    calls: list[Callable[[Any], Any]] = [
        lambda m: m.partition_data([1, 2, 3], 2),
        lambda m: m.meg_2d_parallel_map(2, 2).add_data(0, 2, [1]),
        lambda m: m.meg_2d_parallel_map(2, 2).add_data(0, 0, 1),
        lambda m: m.merge_state({"a": [1]}, {"a": [1, 2]}),
        lambda m: m.merge_state([1], (1,)),
        lambda m: m.get_zero_files(str(tmp_path / "odd")),
        lambda m: m.ZeROCheckpoint(str(tmp_path / "nothing")),
        lambda m: m.ZeROCheckpoint(str(tmp_path / "not there")),
        lambda m: m.DeepSpeedCheckpoint(str(tmp_path / "nothing")),
        lambda m: m.DeepSpeedCheckpoint(GPT).get_2d_parallel_state(2, 0),
        lambda m: m.DeepSpeedCheckpoint(GPT).get_pp_transformer_map(2),
        lambda m: m.DeepSpeedCheckpoint(GPT).get_embedding_state(2),
        lambda m: m.ZeROCheckpoint(GPT).get_files_for_rank(0, 0, 2),
        *(lambda m, n=name: m.get_model_3d_descriptor(str(tmp_path / n)) for name in files if name != "nothing"),
    ]
    for number, call in enumerate(calls):
        expected, found = outcome(lambda c=call: c(theirs)), outcome(lambda c=call: c(ds))
        assert isinstance(expected, type), number
        assert issubclass(found, expected), number
        assert issubclass(found, CkptlabError), number


# -------------------------------------------------------------------- checkpoints


def compare(real: ModuleType, folder: str, degrees: tuple[int, int, int], final_norm: int) -> list[str]:
    """Where the two classes differ on a step folder, at these (tp, pp, dp)."""
    tp, pp, dp = degrees
    theirs = real.DeepSpeedCheckpoint(folder, tp, pp, dp, final_norm)
    ours = ds.DeepSpeedCheckpoint(folder, tp, pp, dp, final_norm)
    found = [d for name in LISTED for d in differences(getattr(theirs, name), getattr(ours, name), name)]
    found += differences(theirs.model_state_metadata, ours.model_state_metadata, "model_state_metadata")
    calls: list[tuple[str, tuple[Any, ...]]] = [
        (name, ()) for name in ("get_iteration", "get_args", "get_checkpoint_info", "get_embedding_layer_id")
    ]
    calls += [("get_final_norm_layer_id", ()), ("get_checkpoint_info", ("universal_checkpoint_info",))]
    calls += [(f"is_change_{axis}_degree", ()) for axis in ("tp", "pp", "dp")]
    for t in range(tp):
        names = "get_embedding_state get_embedding_files get_final_norm_state get_final_norm_files"
        calls += [(name, (t,)) for name in names.split()]
        for p in range(pp):
            calls += [
                (f"get_{what}", (t, p)) for what in ("transformer_state", "2d_parallel_state", "2d_parallel_files")
            ]
            calls += [("get_pp_transformer_map", (p,))]
            for d in range(dp):
                calls += [("get_zero_files", (p, t, d))]
                calls += [("get_zero_checkpoint_state", (p, t, d, strip)) for strip in (True, False)]
    for name, arguments in calls:
        call = f"{name}{arguments}"
        found += differences(getattr(theirs, name)(*arguments), getattr(ours, name)(*arguments), call)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("degrees", list(itertools.product((1, 2), repeat=3)), ids="tp{0[0]}_pp{0[1]}_dp{0[2]}".format)
def test_files_layers_and_merged_states_of_a_gpt(real: ModuleType, degrees: tuple[int, int, int]) -> None:
    assert compare(real, GPT, degrees, -1) == []


def test_printed_forms(real: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for printer in PRINTERS:
        getattr(real.DeepSpeedCheckpoint(GPT, 1, 2, 1), printer)()
        expected = capsys.readouterr().out
        getattr(ds.DeepSpeedCheckpoint(GPT, 1, 2, 1), printer)()
        assert capsys.readouterr().out == expected
    real.ZeROCheckpoint(GPT).print_3d_index_map("of files")
    expected = capsys.readouterr().out
    ds.ZeROCheckpoint(GPT).print_3d_index_map("of files")
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("strip", [True, False])
def test_zero_states_with_padding(real: ModuleType, dp: int, strip: bool) -> None:
    folder = str(DATA / "plain_zero2_dp2" / "global_step3")
    theirs, ours = real.ZeROCheckpoint(folder), ds.ZeROCheckpoint(folder)
    theirs.reshape(real.model_3d_desc(1, 1, dp))
    ours.reshape(ds.model_3d_desc(1, 1, dp))
    for d in range(dp):
        rank = {"pp_index": 0, "tp_index": 0, "dp_index": d, "strip_tensor_paddings": strip}
        a, b = theirs.get_state_for_rank(**rank), ours.get_state_for_rank(**rank, keys_to_ignore=["ds_config"])
        assert "ds_config" in a
        assert "ds_config" not in b
        a.pop("ds_config")
        assert differences(a, b) == []


@requires_deepspeed
@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        ("llama_tp2_pp1_dp2", {"mlp.dense_h_to_4h.weight"}),
        (
            "gqa_tp2_pp1_dp2",
            {
                f"{part}.{kind}"
                for part in ("mlp.dense_h_to_4h", "self_attention.query_key_value")
                for kind in ("weight", "bias")
            },
        ),
    ],
)
def test_sub_parameters_are_merged_right_where_deepspeed_is_wrong(
    real: ModuleType, case: str, wrong: set[str], tmp_path: Path
) -> None:
    folder = make_case(case, tmp_path)
    (step,) = folder.glob("global_step*")
    found = compare(real, str(step), (1, 1, 1), -2)
    assert {path.split("/")[-1] for path in found} == wrong
    assert all(path.startswith("get_transformer_state") for path in found)
    assert compare(real, str(step), (2, 1, 1), -2) == []
    truth = load_file(folder / "truth.safetensors")
    theirs, ours = (m.DeepSpeedCheckpoint(str(step), 1, 1, 1, -2) for m in (real, ds))
    layers = ours.get_pp_transformer_map(0)
    assert len(layers) == 4
    for layer, a, b in zip(layers, theirs.get_transformer_state(0, 0), ours.get_transformer_state(0, 0), strict=True):
        for name, value in b.items():
            expected = truth[f"param/{int(layer.removeprefix('layer_'))}.{name}"]
            assert torch.equal(value, expected)
            assert torch.equal(a[name], expected) == (name not in wrong)


def test_parameters_load_the_same_from_a_universal_folder(real: ModuleType) -> None:
    zero = DATA / "gpt_tp2_pp2_dp2" / "universal" / "global_step3_universal" / "zero"
    for tp, rank in ((1, 0), (2, 0), (2, 1)):
        catalog = ds.DeepSpeedCheckpoint(GPT, tp, 1, 1).reshaped(padded_vocab=112).target
        for name in (
            "2.mlp.dense_4h_to_h.weight",
            "3.mlp.dense_h_to_4h.bias",
            "tied_modules.embed.word_embeddings.weight",
        ):
            cut = catalog.tensors[name].cut
            shape = cut.shard_shape(cut.coordinate({"tp": rank}))
            loaded = []
            for module in (real, ds):
                parameter: Any = torch.nn.Parameter(torch.zeros(shape))
                memory = torch.zeros(10)
                parameter._hp_mapping = SimpleNamespace(
                    lp_fragment_address=SimpleNamespace(start=5, numel=10), get_hp_fragment=lambda m=memory: m
                )
                module.enable_universal_checkpoint([parameter])
                step = parameter.load_hp_checkpoint_state(str(zero / name), rank, tp)
                loaded.append({"step": step, "master": memory, **parameter._hp_mapping.optim_fragment})
            assert differences(*loaded) == []
            assert loaded[1]["master"].any()


def described(**fields: Any) -> dict[str, Any]:
    """What AutoTP attaches to a parameter, without a map of its pieces unless one is given."""
    from deepspeed.module_inject.layers import _build_param_uc_restore_meta

    found: dict[str, Any] = _build_param_uc_restore_meta(**{"partition_type": "column", "partition_dim": 0} | fields)
    return found


def mapped(shape: tuple[int, int], **fields: Any) -> dict[str, Any]:
    """The same with the map that a layer of AutoTP's derives."""
    from deepspeed.checkpoint.affine import contiguous_split_map

    sizes, dim = fields["partition_sizes"], fields.get("partition_dim", 0)
    pieces = contiguous_split_map(shape, list(sizes), dim)
    return described(logical_shape=shape, affine_map=pieces, **fields)


LAID_OUT: dict[str, tuple[Callable[[], dict[str, Any]], list[tuple[int, int]]]] = {
    "replicated": (lambda: described(partition_dim=None, logical_shape=(10, 6), replicated=True), [(10, 6)] * 2),
    "even": (lambda: described(logical_shape=(10, 6)), [(5, 6), (5, 6)]),
    "widths": (lambda: described(logical_shape=(10, 6), partition_sizes=(6, 4)), [(6, 6), (4, 6)]),
    "widths of columns": (
        lambda: described(logical_shape=(10, 6), partition_dim=1, partition_sizes=(2, 4)),
        [(10, 2), (10, 4)],
    ),
    "sub-parameters": (
        lambda: described(
            logical_shape=(10, 6), sub_param_sizes=(6, 4), sub_param_shard_widths=[[4, 2], [1, 3]], replicated=False
        ),
        [(5, 6), (5, 6)],
    ),
    "old sub-parameters": (
        lambda: described(logical_shape=(10, 6), sub_param_shape=((6, 4), 6)) | {"universal_checkpoint_version": 0.2},
        [(5, 6), (5, 6)],
    ),
    "a map": (lambda: mapped((10, 6), partition_sizes=(7, 3)), [(7, 6), (3, 6)]),
    "nothing that says it": (lambda: described(partition_dim=None), [(5, 6), (5, 6)]),
}


@pytest.mark.parametrize("kind", LAID_OUT)
def test_parameters_that_autotp_laid_out_load_the_same(real: ModuleType, kind: str, tmp_path: Path) -> None:
    make, shapes = LAID_OUT[kind]
    whole = torch.arange(60.0).view(10, 6)
    torch.save({"param": whole, "cat_dim": 0}, tmp_path / "fp32.pt")
    for rank, shape in enumerate(shapes):
        loaded = []
        for module in (real, ds):
            parameter: Any = torch.nn.Parameter(torch.zeros(shape))
            parameter.ds_autotp_universal_checkpoint_meta = make()
            count = parameter.numel() - 3
            memory = torch.zeros(count)
            parameter._hp_mapping = SimpleNamespace(
                lp_fragment_address=SimpleNamespace(start=3, numel=count), get_hp_fragment=lambda m=memory: m
            )
            module.enable_universal_checkpoint([parameter])
            parameter.load_hp_checkpoint_state(str(tmp_path), rank, 2)
            loaded.append(memory)
        assert torch.equal(*loaded), (loaded, rank)
        assert loaded[1].any()


@pytest.mark.parametrize("ranks", [([0, 1], [2, 3]), ([2, 0], [3, 1]), ([0, 1, 2], [3])], ids=str)
def test_parameters_that_autoep_laid_out_load_the_same(real: ModuleType, ranks: Any, tmp_path: Path) -> None:
    from deepspeed.checkpoint.autoep_affine import make_autoep_placement_descriptor

    whole = torch.arange(24.0).view(4, 3, 2)
    torch.save({"param": whole, "cat_dim": 0, "is_expert_param": True, "ep_num_experts": 4}, tmp_path / "fp32.pt")
    for rank, held in enumerate(ranks):
        loaded = []
        for module in (real, ds):
            parameter: Any = torch.nn.Parameter(torch.zeros(len(held), 3, 2))
            parameter.ds_autoep_uc_meta = {
                "expert_placement": make_autoep_placement_descriptor(4, ranks),
                "logical_shape": (4, 3, 2),
                "ep_rank": rank,
                "local_experts": held,
            }
            memory = torch.zeros(parameter.numel())
            parameter._hp_mapping = SimpleNamespace(
                lp_fragment_address=SimpleNamespace(start=0, numel=parameter.numel()),
                get_hp_fragment=lambda m=memory: m,
            )
            module.enable_universal_checkpoint([parameter])
            parameter.load_hp_checkpoint_state(str(tmp_path), 0, 1, ep_rank=rank, ep_size=2)
            loaded.append(memory)
        assert torch.equal(*loaded)
        assert torch.equal(loaded[1].view(len(held), 3, 2), whole[held])


@pytest.mark.parametrize("case", ["plain_zero2_dp2", "plain_zero3_dp2"])
def test_consolidated_weights_are_the_same(real: ModuleType, case: str, tmp_path: Path) -> None:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    zero_to_fp32.convert_zero_checkpoint_to_fp32_state_dict(str(DATA / case), str(tmp_path / "out"))
    ours = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    theirs = get_fp32_state_dict_from_zero_checkpoint(str(DATA / case))
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value.float()), name
