"""`open` raises exactly where `check` has an error of files or headers, whatever was done to a checkpoint; and a check
reads each file once."""

from __future__ import annotations

import json
import pickle
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3
from helpers.files import copy, cut, edit, flip, poke, swap
from helpers.small import small
from safetensors.numpy import save_file
from test_hostile_files import HOSTILE, forge

import ckptlab
from ckptlab import Health, check
from ckptlab.errors import CheckpointError, CkptlabError
from ckptlab.formats import read
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.placeholders import foreign

OPTIM, MODEL = "bf16_zero_pp_rank_{}_mp_rank_{:02d}_optim_states.pt", "mp_rank_{:02d}_model_states.pt"
LAYER = "layer_03-model_01-model_states.pt"
UNIVERSAL = GPT / "universal" / "global_step3_universal"


def law(folder: Path) -> Health:
    """Hold `open` against `check`."""
    return held_to_the_law(folder)[0]


def held_to_the_law(folder: Path) -> tuple[Health, ckptlab.Checkpoint | CkptlabError]:
    """The same; with what `open` gave."""
    opened: ckptlab.Checkpoint | CkptlabError
    try:
        opened = ckptlab.open(folder)
    except CkptlabError as caught:
        opened = caught
    found = check(folder, data=False)
    refused = isinstance(opened, CkptlabError)
    refusing = [f for f in found.findings if f.refuses]
    assert refused == bool(refusing) == (not found.checked.opened), (opened, found)
    assert not refused or type(opened) in {type(f.error) for f in refusing}, (opened, found)
    return found, opened


def put(**changes: Any) -> Callable[[dict], dict]:
    return lambda content: {**content, **changes}


def drop(*keys: str) -> Callable[[dict], dict]:
    return lambda content: {k: v for k, v in content.items() if k not in keys}


def all_models(folder: Path, change: Callable[[dict], Any]) -> None:
    for file in folder.glob("mp_rank_*"):
        edit(file, change)


def mappings_swapped(content: dict) -> None:
    mapping = content["optimizer_state_dict"]["param_slice_mappings"][0]
    first, second, *_ = mapping
    mapping[first], mapping[second] = mapping[second], mapping[first]


def another_tensor(content: dict) -> None:
    shapes = content["param_shapes"][0]
    shapes["9.invented.weight"] = shapes.pop("3.mlp.dense_h_to_4h.weight")


def another_shape(content: dict) -> None:
    content["param_shapes"][0]["tied_modules.embed.word_embeddings.weight"] = (7, 16)


GPT_FAULTS: dict[str, Callable[[Path], Any]] = {
    "nothing": lambda f: None,
    "optimizer file missing": lambda f: (f / OPTIM.format(1, 2)).unlink(),
    "model file missing": lambda f: (f / MODEL.format(3)).unlink(),
    "every model file missing": lambda f: [p.unlink() for p in f.glob("mp_rank_*")],
    "every optimizer file missing": lambda f: [p.unlink() for p in f.glob("*_optim_states.pt")],
    "layer file missing": lambda f: (f / LAYER).unlink(),
    "layer missing": lambda f: [p.unlink() for p in f.glob("layer_03*")],
    "every layer missing": lambda f: [p.unlink() for p in f.glob("layer_*")],
    "extra file": lambda f: shutil.copy(f / OPTIM.format(1, 0), f / OPTIM.format(2, 0)),
    "extra file that is cut": lambda f: (f / OPTIM.format(2, 0)).write_bytes(b"PK"),
    "rank named twice": lambda f: shutil.copy(f / MODEL.format(0), f / "mp_rank_000_model_states.pt"),
    "cut": lambda f: cut(f / LAYER, 0.5),
    "empty": lambda f: cut(f / OPTIM.format(0, 0), 0),
    "swapped dp": lambda f: swap(f / OPTIM.format(0, 3), f / OPTIM.format(1, 3)),
    "swapped tp": lambda f: [swap(f / OPTIM.format(d, 0), f / OPTIM.format(d, 1)) for d in (0, 1)],
    "swapped pp": lambda f: swap(f / OPTIM.format(0, 0), f / OPTIM.format(0, 2)),
    "swapped layers": lambda f: swap(f / LAYER, f / "layer_05-model_01-model_states.pt"),
    "another step": lambda f: edit(f / MODEL.format(3), put(global_steps=4)),
    "another sample": lambda f: edit(f / MODEL.format(3), put(global_samples=4)),
    "another mesh": lambda f: edit(f / MODEL.format(3), put(dp_world_size=4)),
    "another version": lambda f: edit(f / OPTIM.format(1, 3), put(ds_version="0.1")),
    "expert": lambda f: shutil.copy(f / MODEL.format(0), f / "layer_0_expert_0_mp_rank_00_model_states.pt"),
    "experts": lambda f: all_models(f, put(num_experts=[4])),
    "layouts untold": lambda f: all_models(f, drop("universal_checkpoint_info")),
    "affine map": lambda f: all_models(
        f, lambda c: put(universal_checkpoint_info={**c["universal_checkpoint_info"], "affine_map": {"params": [1]}})(c)
    ),
    "lists of another model": lambda f: all_models(
        f, lambda c: put(universal_checkpoint_info={"original_vocab_size": 5000,
                                                    "vocabulary_parameter_patterns": [".*"]})(c)
    ),
    "pattern that is none": lambda f: all_models(
        f, put(universal_checkpoint_info={"tp_replicated_parameter_patterns": ["("]})
    ),
    "row of a vector": lambda f: all_models(
        f, put(universal_checkpoint_info={"parameter_with_row_parallelism_patterns": [".*"]})
    ),
    "no shapes": lambda f: all_models(f, drop("param_shapes")),
    "other tensors": lambda f: edit(f / MODEL.format(1), another_tensor),
    "other shape": lambda f: edit(f / MODEL.format(2), another_shape),
    "no ranks at all": lambda f: all_models(f, put(dp_world_size=1 << 50)),
    "layer of nothing": lambda f: edit(f / LAYER, lambda c: {}),
    "layer that is a list": lambda f: edit(f / LAYER, lambda c: [1]),
    "flipped bit": lambda f: flip(f, "3.input_layernorm.weight", "master", 0, tp=1),
    "not finite": lambda f: poke(f, "3.mlp.dense_h_to_4h.weight", "exp_avg", np.nan),
}  # fmt: skip

ZERO2_FAULTS: dict[str, Callable[[Path], Any]] = {
    "swapped": lambda f: swap(f / OPTIM.format(0, 0), f / OPTIM.format(1, 0)),
    "mappings": lambda f: edit(f / OPTIM.format(0, 0), mappings_swapped),
    "stage 0": lambda f: [
        [p.unlink() for p in f.glob("*optim*")],
        edit(f / MODEL.format(0), put(optimizer={"state": {}})),
    ],
    "shapes in one mapping": lambda f: edit(f / MODEL.format(0), lambda c: put(param_shapes=c["param_shapes"][0])(c)),
    "no module": lambda f: edit(f / MODEL.format(0), put(module=None)),
    "module of another shape": lambda f: edit(
        f / MODEL.format(0), lambda c: put(module={k: np.zeros((3, 3), np.float32) for k in c["module"]})(c)
    ),
    "a list": lambda f: edit(f / MODEL.format(0), lambda c: [1, 2]),
    "nothing in it": lambda f: edit(f / MODEL.format(0), lambda c: {"nothing": 1}),
    "no config": lambda f: edit(f / MODEL.format(0), drop("ds_config")),
    "foreign class": lambda f: edit(f / MODEL.format(0), put(note=foreign("megatron.enums", "Kind", 1))),
    "of torch before 1.6": lambda f: (f / MODEL.format(0)).write_bytes(pickle.dumps(1, 2) + pickle.dumps(2, 2)),
}


@pytest.mark.parametrize("fault", GPT_FAULTS)
def test_faults_in_a_pipeline(tmp_path: Path, fault: str) -> None:
    folder = copy(GPT, tmp_path)
    GPT_FAULTS[fault](folder)
    law(folder)


@pytest.mark.parametrize("fault", ZERO2_FAULTS)
def test_faults_in_zero2(tmp_path: Path, fault: str) -> None:
    folder = copy(ZERO2, tmp_path)
    ZERO2_FAULTS[fault](folder)
    law(folder)


@pytest.mark.parametrize("case", [ZERO3, DATA / "plain_zero2_dp2_round_robin", UNIVERSAL], ids=lambda p: p.name)
def test_healthy_ones(case: Path) -> None:
    assert law(case).checked.opened


@pytest.mark.parametrize("how", HOSTILE)
def test_pickles_that_would_run_a_command(tmp_path: Path, how: str) -> None:
    folder = copy(ZERO2, tmp_path)
    data = pickle.dumps(HOSTILE[how](f"touch {tmp_path / 'executed'}"), 2)
    forge(folder / MODEL.format(0), data=data)
    law(folder)
    assert not (tmp_path / "executed").exists()


def test_code_beside_a_whole_checkpoint_is_an_error_that_open_need_not_raise(tmp_path: Path) -> None:
    folder = copy(ZERO2, tmp_path)
    edit(folder / MODEL.format(0), put(note=foreign("posix", "system", "true")))
    (one,) = law(folder)["executable-pickle"]
    assert (one.severity, one.about) == ("error", "code")


# Odd values: every key that DeepSpeed writes, with values of another form

ODD: list[Any] = [None, 3, -1, 1 << 70, "text", [], {}, [7], [[7]], {"state": 3}, {3: {}}, {"a": [None]}, 0.5, True]
ODD += [(), b"x", float("nan"), {1, 2}, np.zeros(3), np.zeros((2, 2), np.int8), {None: None}, foreign("a", "B", 3)]
_UNREAD = {"ds_config", "lr_scheduler", "args", "rng_states"}  # what is in them is not a header's


def keys(content: Any, depth: int = 4) -> Iterator[tuple[Any, ...]]:
    """The ways to every value in a header, down to some depth."""
    if isinstance(content, Mapping) and depth:
        for key, value in content.items():
            yield (key,)
            if key not in _UNREAD:
                yield from ((key, *rest) for rest in keys(value, depth - 1))
    elif isinstance(content, list) and depth and content:
        yield from ((0, *rest) for rest in keys(content[0], depth - 1))


def changed(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    first, *rest = way
    inside = changed(content[first], tuple(rest), value) if rest else value
    if isinstance(content, list):
        return [inside, *content[1:]]
    return {**content, first: inside}


AUTOTP, AUTOTP_UNIVERSAL = DATA / "autotp_tp2_dp2", Path("universal")


def universal(folder: Path) -> Path:
    """A universal folder of few files."""
    ckptlab.open(AUTOTP).reshape(format="universal").save(folder)
    return folder


CASES = [
    (ZERO2, MODEL.format(0)),
    (ZERO2, OPTIM.format(1, 0)),
    (GPT, MODEL.format(0)),
    (GPT, LAYER),
    (ZERO3, "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    (ZERO3, OPTIM.format(0, 0)),
    (DATA / "moe_ep2_dp4", OPTIM.format(2, 0)),
    (DATA / "moe_ep2_dp4", "layer_1_expert_2_mp_rank_00_model_states.pt"),
    (DATA / "autoep_ep2_dp4", MODEL.format(0)),
    (AUTOTP, MODEL.format(1)),
    (AUTOTP_UNIVERSAL, "zero/optimizer_state.pt"),
    (AUTOTP_UNIVERSAL, "zero/norm.weight/exp_avg.pt"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("case", "name"), CASES, ids=lambda p: Path(p).name)
def test_odd_headers_are_findings_and_errors_never_tracebacks(tmp_path: Path, case: Path, name: str) -> None:
    folder = universal(tmp_path / "run") if case == AUTOTP_UNIVERSAL else copy(case, tmp_path)
    file = folder / name
    content = torchfile.read(file)
    chance = random.Random(name)
    ways = list(keys(content)) + [
        ("ds_config", key) for key in ("zero_optimization", "bf16", "fp16") if key in content.get("ds_config", ())
    ]
    told = sum(told_of_odd_values(file, way, chance, folder) for way in chance.sample(ways, min(len(ways), 15)))
    assert told, "some of them are no headers of DeepSpeed's"


def told_of_odd_values(file: Path, way: tuple[Any, ...], chance: random.Random, folder: Path) -> int:
    """Put odd values in a place of a header, hold the law each time, and put the file back; how many were told of."""
    raw, told = file.read_bytes(), 0
    old = folder.parent / f"{folder.name}.old.pt"
    old.write_bytes(raw)
    for value in chance.sample(ODD, 2):
        torchfile.write(file.with_suffix(".new"), changed(torchfile.read(old), way, value))
        file.with_suffix(".new").replace(file)
        try:
            found, opened = held_to_the_law(folder)
            told += not found.healthy
            assert isinstance(opened, CkptlabError) or opened._repr_html_()
        except Exception as error:
            raise AssertionError(f"{file.name}: {way} = {value!r}") from error
        file.write_bytes(raw)
    return told


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"fused": True}, {"fused": False}, {"dtype": "fp32"}], ids=str)
def test_odd_headers_of_an_optimizer_in_the_model_file(tmp_path: Path, options: dict[str, Any]) -> None:
    """Training without ZeRO."""
    folder = small(tmp_path / "run" / "step", zero_stage=0, **options)
    file = folder / MODEL.format(0)
    chance = random.Random(repr(options))
    ways = [way for way in keys(torchfile.read(file), 6) if way[0] == "optimizer"]
    assert sum(told_of_odd_values(file, way, chance, folder) for way in chance.sample(ways, min(len(ways), 15)))


@pytest.mark.slow
def test_odd_headers_where_layouts_are_not_told(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "step"
    ckptlab.open(GPT).reshape(tp=2, pp=1, dp=1).save(folder)
    all_models(folder, drop("universal_checkpoint_info"))
    chance = random.Random(1)
    for name in (MODEL.format(1), LAYER, MODEL.format(0)):
        ways = [way for way in keys(torchfile.read(folder / name)) if way[0] not in ("rng_state", "lr_scheduler")]
        for way in chance.sample(ways, min(len(ways), 6)):
            told_of_odd_values(folder / name, way, chance, folder)
    for size in ODD:
        all_models(folder, put(checkpoint_info={"original_vocab_size": size}))
        law(folder)


@pytest.mark.parametrize("odd", [(1,), None, 7, 0.5], ids=repr)
def test_what_is_not_named_by_a_text_is_shown_all_the_same(tmp_path: Path, odd: Any) -> None:
    """Keys of the program's own, and names of parameter groups."""
    folder = copy(ZERO2, tmp_path)
    all_models(folder, lambda content: {**content, odd: 3})
    for file in folder.glob("*optim_states.pt"):
        edit(
            file, lambda c: changed(c, ("optimizer_state_dict", "base_optimizer_state", "param_groups", 0, "name"), odd)
        )
    opened = ckptlab.open(folder)
    assert opened.catalog.groups[0].name is None
    assert repr(odd) in repr(opened)
    assert opened._repr_html_()
    assert law(folder).healthy


@pytest.mark.parametrize("value", [*ODD, np.zeros(3), {"w": np.zeros(3)}, {"model": {"w": np.zeros(3)}}], ids=repr)
def test_files_of_torch_whatever_they_hold(tmp_path: Path, value: Any) -> None:
    (tmp_path / "run").mkdir()
    torchfile.write(tmp_path / "run" / "pytorch_model.bin", value)
    law(tmp_path / "run")
    law(tmp_path / "run" / "pytorch_model.bin")


@pytest.mark.parametrize("index", ["x", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b.bin"}}'])
def test_indices_of_files_of_torch(tmp_path: Path, index: str) -> None:
    torchfile.write(tmp_path / "pytorch_model.bin", {"w": np.zeros(3)})
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    law(tmp_path)


def test_folders_in_the_place_of_files(tmp_path: Path) -> None:
    for name in (MODEL.format(0), OPTIM.format(0, 0)):
        folder = copy(ZERO2, tmp_path / name)
        (folder / name).unlink()
        (folder / name).mkdir()
        law(folder)


# Universal folders and safetensors


@pytest.mark.parametrize(
    "fault",
    [
        lambda f: shutil.rmtree(f / "zero" / "3.input_layernorm.weight"),
        lambda f: cut(f / "zero" / "3.input_layernorm.weight" / "exp_avg.pt", 0.5),
        lambda f: (f / "zero" / "3.input_layernorm.weight" / "exp_avg.pt").unlink(),
        lambda f: (f / "zero" / "optimizer_state.pt").write_bytes(b""),
        lambda f: edit(f / "zero" / "3.input_layernorm.weight" / "fp32.pt", put(param=np.zeros(3, np.float32))),
        lambda f: edit(f / "zero" / "optimizer_state.pt", lambda c: put(param_groups=c["param_groups"][:1])(c)),
        lambda f: (f / MODEL.format(0)).unlink(),
    ],
    ids=["folder", "cut", "state", "optimizer", "shape", "groups", "model"],
)
def test_faults_in_a_universal_folder(tmp_path: Path, fault: Callable[[Path], Any]) -> None:
    folder = Path(shutil.copytree(UNIVERSAL, tmp_path / "universal"))
    fault(folder)
    law(folder)


def test_a_universal_folder_whose_shapes_are_in_one_mapping_has_one_group(tmp_path: Path) -> None:
    """DeepSpeed's older form; its names were once counted as groups."""
    folder = Path(shutil.copytree(UNIVERSAL, tmp_path / "universal"))
    all_models(folder, lambda c: put(param_shapes={n: s for group in c["param_shapes"] for n, s in group.items()})(c))
    edit(folder / "zero" / "optimizer_state.pt", lambda c: put(param_groups=c["param_groups"][:1])(c))
    assert [len(g.tensors) for g in read(folder).groups] == [len(read(UNIVERSAL).tensors)]
    law(folder)


def _with_header(file: Path, header: Any) -> None:
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 1600]}},
        {"w": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": ["4"], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "data_offsets": [0, 16]}},
        {"w": {"dtype": "F32", "shape": [4], "data_offsets": [0]}},
        {"w": 5},
        [],
        "x",
    ],
)
def test_headers_of_safetensors(tmp_path: Path, header: Any) -> None:
    _with_header(tmp_path / "model.safetensors", header)
    law(tmp_path)


INDICES: list[Any] = [
    {},
    [],
    {"weight_map": 3},
    {"weight_map": {"w": 3}},
    {"weight_map": {"w": "b.safetensors"}},
    {"weight_map": {"w": "../a.safetensors"}},
    {"weight_map": {"w": "a.safetensors"}},
]


@pytest.mark.parametrize("index", INDICES)
def test_indices_of_safetensors(tmp_path: Path, index: Any) -> None:
    save_file({"w": np.zeros(3, np.float32)}, tmp_path / "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert law(tmp_path).healthy == (index is INDICES[-1])


# Each file once


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3, UNIVERSAL], ids=lambda p: p.name)
def test_a_check_reads_each_file_once(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    really = torchfile._TensorUnpickler.load

    def counted(self: Any) -> Any:
        seen.append(self.source)
        return really(self)

    monkeypatch.setattr(torchfile._TensorUnpickler, "load", counted)
    found = check(case, data=False)
    assert len(seen) == len(set(seen)) == found.checked.files > 2


def test_a_file_that_may_not_be_read_is_an_error_of_ckptlabs(tmp_path: Path) -> None:
    folder = copy(ZERO2, tmp_path)
    (folder / MODEL.format(0)).unlink()
    (folder / MODEL.format(0)).symlink_to(tmp_path)  # a folder: reading it is an OSError for whoever runs this
    with pytest.raises(CheckpointError):
        read(folder)
    assert not law(folder).healthy
