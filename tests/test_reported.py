"""Folders as people really have them, after public reports: each kind is made here from a checkpoint of data/, and
opens with its right value, or is refused by name."""

from __future__ import annotations

import json
import os
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3, differences, differences_from_truth
from helpers.files import edit
from safetensors.numpy import save_file

import ckptlab
from ckptlab.errors import CheckpointError, ReshapeError, UnsupportedError
from ckptlab.formats import read
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import foreign, named
from ckptlab.stored import Stored

STEPS = DATA / "plain_zero1_dp2_steps"


@pytest.fixture
def made(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a case without its truth: the folder that holds `latest`."""

    def make(case: Path) -> Path:
        return Path(shutil.copytree(case, tmp_path / case.name, ignore=shutil.ignore_patterns("truth*", "universal")))

    return make


def files(folder: Path, pattern: str) -> Iterator[Path]:
    return (p for p in sorted(folder.rglob("*")) if p.is_file() and re.search(pattern, p.name))


def change(folder: Path, pattern: str, how: Callable[[Any], Any]) -> None:
    for file in files(folder, pattern):
        edit(file, how)


def codes(path: Path) -> list[str]:
    return [f.code for f in ckptlab.open(path).findings]


def right(path: Path, case: Path) -> None:
    """Everything that the truth of a case says is read so."""
    assert differences_from_truth(read(path), case / "truth.safetensors") == []


def drop(*keys: str) -> Callable[[dict], dict]:
    return lambda content: {k: v for k, v in content.items() if k not in keys}


class TestOldReleases:
    def test_shapes_in_the_optimizer_files(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        shapes = torchfile.read(next(files(folder, "model_states")))["param_shapes"]
        change(folder, "model_states", drop("param_shapes"))
        change(folder, "optim_states", lambda c: c["optimizer_state_dict"].update(param_shapes=shapes))
        right(folder, ZERO2)

    @pytest.mark.parametrize("case", [ZERO2, ZERO3, STEPS], ids=lambda c: c.name)
    @pytest.mark.parametrize("mapped", [True, False])
    def test_shapes_of_all_groups_in_one_dictionary(
        self, case: Path, mapped: bool, made: Callable[[Path], Path]
    ) -> None:
        folder = made(case)
        joined = lambda groups: OrderedDict((n, s) for group in groups for n, s in group.items())  # noqa: E731
        change(folder, "model_states", lambda c: {**c, "param_shapes": joined(c["param_shapes"])})
        if not mapped:
            change(folder, "optim", lambda c: c["optimizer_state_dict"].pop("param_slice_mappings", None) and None)
        right(folder, case)

    def test_nothing_names_the_tensors_of_the_buffers(self, made: Callable[[Path], Path]) -> None:
        """They are those of the module, whose weights are the masters rounded."""
        folder = made(ZERO2)
        change(folder, "model_states", drop("param_shapes"))
        change(folder, "optim", lambda c: c["optimizer_state_dict"].pop("param_slice_mappings") and None)
        right(folder, ZERO2)

    @pytest.mark.parametrize("case", [ZERO2, ZERO3, GPT], ids=lambda c: c.name)
    def test_no_configuration(self, case: Path, made: Callable[[Path], Path]) -> None:
        folder = made(case)
        change(folder, "states", drop("ds_config", "ds_version"))
        right(folder, case)
        assert ckptlab.open(folder).catalog.training.dtype == "bf16"

    def test_names_without_the_underscore(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        for file in list(files(folder, "_optim_states")):
            file.rename(file.with_name(file.name.replace("_optim_states", "optim_states")))
        right(folder, ZERO2)

    def test_no_dp_world_size(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        change(folder, "model_states", lambda c: c.update(dp_world_size=0))
        right(folder, ZERO2)

    def test_a_world_size_of_tp_in_a_pipeline(self, made: Callable[[Path], Path]) -> None:
        """As others' converters write it; `check` must not tell to move half of the files away."""
        folder = made(GPT)
        lie = lambda c: {**drop("checkpoint_parallel_dimensions")(c), "mp_world_size": 2}  # noqa: E731
        change(folder, r"^mp_rank", lie)
        right(folder, GPT)
        assert "extra-file" not in [f.code for f in ckptlab.check(folder, data=False).findings]


class TestSequenceParallelism:
    """DeepSpeed (0.19) says the degree of Ulysses' ranks, among which ZeRO cuts as among those of dp, as that of tp."""

    @pytest.mark.parametrize("case", [ZERO2, ZERO3], ids=lambda c: c.name)
    def test_its_ranks_are_of_dp(self, case: Path, made: Callable[[Path], Path], tmp_path: Path) -> None:
        folder = made(case)
        said = {"pp_degree": 1, "tp_degree": 2}
        change(folder, "model_states", lambda c: c.update(checkpoint_parallel_dimensions=said))
        right(folder, case)
        assert ckptlab.open(folder).mesh.dp == 2
        assert ckptlab.check(folder).verdict == "healthy"
        ckptlab.open(folder).reshape(dp=4).save(tmp_path / "out" / "step")
        right(tmp_path / "out", case)

    def test_half_of_a_run_with_tp_is_still_refused(self, made: Callable[[Path], Path]) -> None:
        folder = made(GPT)
        for file in list(files(folder, r"mp_rank_0[13]|model_01")):
            file.unlink()
        with pytest.raises(CheckpointError, match="incomplete"):
            ckptlab.open(folder)


class TestWhatIsThere:
    @pytest.mark.parametrize("case", [ZERO2, GPT], ids=lambda c: c.name)
    def test_weights_alone(self, case: Path, made: Callable[[Path], Path], tmp_path: Path) -> None:
        folder = made(case)
        for file in list(files(folder, "optim_states")):
            file.unlink()
        ckpt = ckptlab.open(folder)
        assert ckpt.states == ("param",)
        assert [f.code for f in ckpt.findings] == ["weights-alone"]
        assert differences(ckpt.catalog, read(case)) == []
        ckptlab.save_weights(ckpt, tmp_path / "weights")
        with pytest.raises(ReshapeError, match="holds weights alone"):
            ckpt.reshape(dp=1)

    def test_some_optimizer_files_missing_is_an_error(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        next(files(folder, "optim_states")).unlink()
        with pytest.raises(CheckpointError, match="incomplete"):
            ckptlab.open(folder)

    def test_one_model_file_at_zero3(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO3)
        next(files(folder, "zero_pp_rank_1_.*model_states")).unlink()
        ckpt = ckptlab.open(folder)
        lost = {"frozen/adapter.weight", "frozen/adapter.bias"}
        whole = read(ZERO3)
        trained = [n for n, t in whole.tensors.items() if t.kind == "parameter"]
        assert set(whole.tensors) - set(ckpt.tensors) == {key.partition("/")[2] for key in lost}
        assert set(trained) <= set(ckpt.tensors)
        (notice,) = ckpt.findings
        assert notice.code == "model-files"
        assert set(notice.where.tensors) == {"adapter.weight", "adapter.bias"}

    def test_a_layer_lost(self, made: Callable[[Path], Path]) -> None:
        folder = made(GPT)
        for file in list(files(folder, r"layer_03-")):
            file.unlink()
        with pytest.raises(CheckpointError, match="layer_03-model_00-model_states.pt"):
            ckptlab.open(folder)

    def test_a_folder_for_each_node(self, made: Callable[[Path], Path], tmp_path: Path) -> None:
        whole = made(ZERO2)
        for node, other in ((0, "rank_1_"), (1, "rank_0_")):
            shutil.copytree(whole, tmp_path / "nodes" / f"node{node}")
            for file in list(files(tmp_path / "nodes" / f"node{node}", f"{other}.*optim")):
                file.unlink()
        nodes = [tmp_path / "nodes" / "node0", tmp_path / "nodes" / "node1"]
        with pytest.raises(CheckpointError, match="all together"):
            ckptlab.open(tmp_path / "nodes")
        for order in (nodes, nodes[::-1]):
            ckpt = ckptlab.open(order)
            assert differences_from_truth(ckpt.catalog, ZERO2 / "truth.safetensors") == []
            assert ckptlab.check(ckpt).verdict == ckptlab.check(order).verdict == "healthy"
        with pytest.raises(CheckpointError, match="incomplete"):
            ckptlab.open(nodes[1])
        with pytest.raises(CheckpointError, match="is no part of"):
            ckptlab.open([nodes[0], GPT / "universal"])

    def test_two_sets_of_optimizer_files(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        for file in list(files(folder, "^bf16_")):
            shutil.copy(file, file.with_name(file.name[5:]))
        change(folder, "^zero_pp", lambda c: c["optimizer_state_dict"]["base_optimizer_state"]["state"].clear())
        right(folder, ZERO2)
        (said,) = ckptlab.open(folder).findings
        assert "those with bf16 are taken" in said.text
        next(files(folder, "^bf16_")).unlink()  # an incomplete set never wins
        (said,) = ckptlab.open(folder).findings
        assert "those without a prefix are taken" in said.text

    def test_latest_is_a_link(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        (folder / "latest").unlink()
        (folder / "latest").symlink_to("global_step3")
        right(folder, ZERO2)
        (folder.parent / "again").symlink_to(folder)  # found twice, it is one
        right(folder.parent, ZERO2)

    def test_latest_is_old(self, made: Callable[[Path], Path]) -> None:
        folder = made(STEPS)
        assert codes(folder) == []
        (folder / "latest").write_text("global_step2")
        (notice,) = ckptlab.open(folder).findings
        assert (notice.code, notice.severity) == ("latest-old", "info")
        assert "global_step5" in notice.text
        for step in (4, 5):
            next(files(folder / f"global_step{step}", "optim")).unlink()
        assert codes(folder) == []  # newer, and not whole

    def test_weights_beside_a_step_folder(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        (folder / "latest").unlink()
        save_file({"wte.weight": np.zeros((2, 2), np.float32)}, folder / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"holds 2 checkpoints(?s:.*)deepspeed"):
            ckptlab.open(folder)

    def test_groups_of_other_steps(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        change(folder, "optim", lambda c: _state(c)[1].update(step=1))
        right(folder, ZERO2)
        assert codes(folder) == ["groups-apart"]
        edit(next(files(folder, "rank_1_.*optim")), lambda c: _state(c)[1].update(step=2))
        with pytest.raises(CheckpointError, match="step"):  # dp ranks of one buffer agree
            ckptlab.open(folder)

    def test_universal_lacks_a_state(self, tmp_path: Path) -> None:
        folder = Path(shutil.copytree(GPT / "universal", tmp_path / "universal"))
        read(folder)
        (folder / "global_step3_universal/zero/2.input_layernorm.weight/exp_avg.pt").unlink()
        with pytest.raises(CheckpointError, match=r"2.input_layernorm.weight has no exp_avg"):
            ckptlab.open(folder)


def _state(content: dict) -> dict:
    return content["optimizer_state_dict"]["base_optimizer_state"]["state"]


class TestTheModule:
    def test_a_tree_of_dictionaries(self, made: Callable[[Path], Path], tmp_path: Path) -> None:
        """Its tensors are known by the names of param_shapes, and it is a tree again where it is written."""

        def nest(content: dict) -> None:
            tree: dict[str, Any] = {}
            for key, value in content["module"].items():
                *path, leaf = key.split(".")
                node = tree
                for part in path:
                    node = node.setdefault(part, {})
                node[leaf] = value
            content["module"] = {"language_model": tree}

        folder = made(ZERO2)
        change(folder, "model_states", nest)
        right(folder, ZERO2)
        ckptlab.open(folder).reshape(dp=1).save(tmp_path / "out" / "step")
        right(tmp_path / "out", ZERO2)
        module = torchfile.read(tmp_path / "out" / "step" / "mp_rank_00_model_states.pt")["module"]
        assert {"ln1", "qkv"} <= set(module["language_model"]["blocks"]["0"])

    def test_extra_state_is_kept(self, made: Callable[[Path], Path], tmp_path: Path) -> None:
        extra = {"blocks.0.qkv._extra_state": None, "blocks.1.qkv._extra_state": foreign("_io", "BytesIO", new=True)}
        folder = made(ZERO2)
        change(folder, "model_states", lambda c: c["module"].update(extra, raw=b"abc"))
        right(folder, ZERO2)
        assert ckptlab.check(folder).verdict == "healthy"
        ckptlab.open(folder).reshape(dp=1).save(tmp_path / "out" / "step")
        module = torchfile.read(tmp_path / "out" / "step" / "mp_rank_00_model_states.pt")["module"]
        assert module["blocks.0.qkv._extra_state"] is None
        assert str(module["blocks.1.qkv._extra_state"]) == str(extra["blocks.1.qkv._extra_state"])
        assert module["raw"] == b"abc"

    def test_extra_state_of_a_layer_is_kept(self, made: Callable[[Path], Path], tmp_path: Path) -> None:
        folder = made(GPT)
        change(folder, "^layer_03", lambda c: c.update(_extra_state=b"abc"))
        ckptlab.open(folder).reshape(tp=1).save(tmp_path / "out" / "step")
        assert torchfile.read(tmp_path / "out/step/layer_03-model_00-model_states.pt")["_extra_state"] == b"abc"


def _deep(value: Any, change: Callable[[Stored], Any]) -> Any:
    """An object with all its tensors changed."""
    if isinstance(value, Stored):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, _deep(inside, change)) for key, inside in value.items())
    return [_deep(inside, change) for inside in value] if isinstance(value, list) else value


def _on_device(rebuild: str) -> Callable[[Stored], Any]:
    return lambda t: foreign("torch._utils", rebuild, t.map().copy(), named("torch", t.dtype.name), "xla:0", False)


class TestOtherDevices:
    """What builds of torch for other devices write in the place of a tensor, or of its storage's class."""

    def test_a_copy_on_the_cpu(self, made: Callable[[Path], Path]) -> None:
        """torch_xla, and others whose tensors have no storages (torch 2.6 on)."""
        folder = made(ZERO2)
        for pattern in ("model_states", "optim_states"):
            change(folder, pattern, lambda c: c.update(_deep(c, _on_device("_rebuild_device_tensor_from_cpu_tensor"))))
        right(folder, ZERO2)
        assert ckptlab.check(folder).verdict == "healthy"

    @pytest.mark.parametrize("rebuild", ["_rebuild_device_tensor_from_numpy", "_rebuild_xla_tensor"])
    def test_an_array_in_the_pickle(self, made: Callable[[Path], Path], rebuild: str) -> None:
        folder = made(ZERO2)
        change(folder, "optim_states", lambda c: c.update(_deep(c, _on_device(rebuild))))
        with pytest.raises(UnsupportedError, match=r"zero_pp_rank_0.*map_location='cpu'"):
            ckptlab.open(folder)

    @pytest.mark.parametrize(
        ("plain", "other"),
        [
            (b"ctorch\nFloatStorage", b"ctorch.npu\nFloatStorage"),
            (b"ctorch\nBFloat16Storage", b"ctorch_npu.npu\nBFloat16Storage"),
            (b"ctorch\nFloatStorage", b"ctorch.hpu\nFloatStorage"),
            (b"ctorch._utils\n_rebuild_tensor_v2", b"ctorch_npu.utils.storage\n_rebuild_npu_tensor"),
        ],
        ids=["torch.npu", "torch_npu", "torch.hpu", "rebuilt"],
    )
    def test_names_of_their_own(self, made: Callable[[Path], Path], plain: bytes, other: bytes) -> None:
        folder, changed = made(ZERO2), 0
        for file in files(folder, r"\.pt$"):
            with zipfile.ZipFile(file) as archive:
                records = {name: archive.read(name) for name in archive.namelist()}
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for name, data in records.items():
                    changed += plain in data and name.endswith("data.pkl")
                    archive.writestr(name, data.replace(plain, other) if name.endswith("data.pkl") else data)
        assert changed
        right(folder, ZERO2)
        assert ckptlab.check(folder).verdict == "healthy"


class TestOtherTensors:
    """What is neither read nor left out without a word: sparse and quantised tensors, and those of classes of their
    own (torchao's states of an 8-bit optimizer)."""

    ODD = foreign("torch._utils", "_rebuild_wrapper_subclass", named("torchao.optim", "OptimState8bit"), (9,), (1,), 0)

    @pytest.mark.parametrize("place", ["module", "optimizer", "layer"])
    def test_refused_by_name(self, made: Callable[[Path], Path], place: str) -> None:
        def put(content: dict) -> None:
            if place == "optimizer":
                _state(content)[0]["exp_avg"] = self.ODD
            else:
                held = content if place == "layer" else content["module"]
                held[next(iter(held))] = self.ODD

        folder = made(GPT if place == "layer" else ZERO2)
        change(folder, {"module": "model_states", "optimizer": "optim_states", "layer": "^layer_03"}[place], put)
        with pytest.raises(UnsupportedError, match="is made by torch._utils._rebuild_wrapper_subclass"):
            ckptlab.open(folder)

    def test_left_out_of_a_file_of_weights_and_said(self, tmp_path: Path) -> None:
        torchfile.write(tmp_path / "pytorch_model.bin", {"a": np.ones(3, np.float32), "b": self.ODD})
        found = ckptlab.open(tmp_path)
        assert list(found.catalog.tensors) == ["a"]
        assert [(f.code, f.where.tensors) for f in found.findings] == [("unknown-dtype", ("b",))]


def test_a_folder_of_single_files_says_which_may_open(tmp_path: Path) -> None:
    """As Lightning's `dirpath` of one file a checkpoint."""
    content = {"epoch": 1, "state_dict": {"model.a": np.ones((4, 3), np.float32)}, "optimizer_states": []}
    torchfile.write(tmp_path / "last.ckpt", content)
    (tmp_path / "hparams.yaml").write_text("lr: 0.1")
    (tmp_path / "of_others.bin").write_bytes(b"no torch")
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as program:
        program.writestr("scripted/constants.pkl", b"")
    with pytest.raises(CheckpointError, match=r"; last\.ckpt may open by itself"):
        ckptlab.open(tmp_path)
    assert list(ckptlab.open(tmp_path / "last.ckpt").catalog.tensors) == ["model.a"]


class TestRefusedByName:
    def test_an_8_bit_optimizer(self, made: Callable[[Path], Path]) -> None:
        def quantise(content: dict) -> None:
            for state in _state(content).values():
                n = state["exp_avg"].numel
                state.clear()
                state.update(
                    step=3,
                    state1=np.arange(n).astype(np.uint8),
                    state2=np.arange(n).astype(np.uint8),
                    qmap1=np.zeros(256, np.float32),
                    absmax1=np.ones(-(-n // 256), np.float32),
                )

        folder = made(ZERO2)
        change(folder, "optim", quantise)
        with pytest.raises(UnsupportedError, match="8-bit"):
            ckptlab.open(folder)

    def test_a_factored_optimizer(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        change(folder, "optim", lambda c: _state(c)[0].update(exp_avg_sq_row=np.zeros(7, np.float32)))
        with pytest.raises(UnsupportedError, match="exp_avg_sq_row float32"):
            ckptlab.open(folder)

    def test_offloaded_to_nvme(self, made: Callable[[Path], Path]) -> None:
        def empty(content: dict) -> None:
            state = content["optimizer_state_dict"]
            state["fp32_flat_groups"] = [np.zeros(0, np.float32) for _ in state["fp32_flat_groups"]]

        folder = made(ZERO3)
        change(folder, "optim", empty)
        with pytest.raises(UnsupportedError, match="NVMe"):
            ckptlab.open(folder)

    def test_a_pointer_of_git_lfs(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        next(files(folder, "model_states")).write_text(
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123\n"
        )
        with pytest.raises(CheckpointError, match="git lfs pull"):
            ckptlab.open(folder)


class TestSingleFiles:
    W = np.arange(6, dtype=np.float32).reshape(2, 3)

    @pytest.mark.parametrize("key", [None, "state_dict", "module", "model"])
    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
    def test_a_state_dict(self, key: str | None, name: str, tmp_path: Path) -> None:
        state = OrderedDict(w=self.W, n=np.ones(2, np.float16))
        torchfile.write(tmp_path / name, state if key is None else {"epoch": 3, key: state})
        for path in (tmp_path, tmp_path / name):
            ckpt = ckptlab.open(path)
            assert ckpt.format == "torch"
            assert np.array_equal(ckpt.full("master", stack=False)["w"].values, self.W)
            assert ckpt["n"].states == {"param": np.dtype(np.float16)}

    def test_several_with_an_index(self, tmp_path: Path) -> None:
        for i in (1, 2):
            torchfile.write(tmp_path / f"pytorch_model-0000{i}-of-00002.bin", {f"w{i}": self.W})
        index = {"weight_map": {f"w{i}": f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert set(ckptlab.open(tmp_path)) == {"w1", "w2"}
        os.remove(tmp_path / "pytorch_model-00002-of-00002.bin")
        with pytest.raises(CheckpointError, match="00002-of-00002.bin missing"):
            ckptlab.open(tmp_path)

    def test_one_name_in_two_files(self, tmp_path: Path) -> None:
        for i in (1, 2):
            torchfile.write(tmp_path / f"pytorch_model-0000{i}-of-00002.bin", {"w": self.W})
        with pytest.raises(CheckpointError, match="stands in another file too"):
            ckptlab.open(tmp_path)

    def test_no_weights_inside(self, tmp_path: Path) -> None:
        torchfile.write(tmp_path / "model.pt", {"epoch": 3})
        with pytest.raises(CheckpointError, match="no tensors by name"):
            ckptlab.open(tmp_path)

    def test_it_gives_way_to_a_training_checkpoint(self, made: Callable[[Path], Path]) -> None:
        folder = made(ZERO2)
        torchfile.write(folder / "fp32_out.bin", {"w": self.W})
        right(folder, ZERO2)
