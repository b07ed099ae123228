"""What other programs leave: each kind is opened, or named with what to do, and nothing is taken for what it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptlab
from ckptlab.errors import CheckpointError, UnsupportedError
from ckptlab.formats.torch import torchfile

W = np.arange(6, dtype=np.float32).reshape(2, 3)
STATE = {0: {"exp_avg": W}}


def put(folder: Path, **files: Any) -> Path:
    """Files by their names, in which __ stands for a slash: what a dictionary becomes goes by the name's end."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        match content:
            case dict() if path.suffix == ".json":
                path.write_text(json.dumps(content))
            case dict() if path.suffix == ".safetensors":
                save_file(content, path)
            case dict():
                torchfile.write(path, content)
            case _:
                path.write_bytes(content)
    return folder


def codes(path: Path) -> list[str]:
    return [finding.code for finding in ckptlab.open(path).findings]


NAMED: dict[str, tuple[dict[str, Any], str]] = {
    "nanotron": ({"checkpoint_metadata.json": {}, "model__a.safetensors": {"data": W}}, "nanotron"),
    "levanter": ({"step-1__metadata.json": {"step": 1, "is_temporary": False}, "step-1__model__a": b""}, "Levanter"),
    "maxtext": ({"7__items___METADATA": b"{}", "7___CHECKPOINT_METADATA": b"{}"}, "Orbax"),
    "t5x": ({"checkpoint_9__checkpoint": b"", "checkpoint_9__target.encoder.w__.zarray": b""}, "T5X"),
    "easylm": ({"streaming_train_state_10": b""}, "EasyLM"),
    "mesh transformer": ({"shard_0__0.npz": b"", "shard_1__0.npz": b""}, "mesh-transformer-jax"),
    "nemo archive": ({"model.nemo": b"./"}, "NeMo archive"),
    "nemo, tp": ({"mp_rank_00__model_weights.ckpt": {"a": W}, "model_config.yaml": b""}, "NeMo"),
    "nemo, pp": ({"tp_rank_00_pp_rank_000__model_weights.ckpt": {"a": W}}, "NeMo"),
    "nemo, training": ({"mp_rank_00__a.ckpt": {"a": W}, "mp_rank_01__a.ckpt": {"a": W}}, "a folder for each rank"),
    "neuronx": ({"model__dp_rank_00_tp_rank_00_pp_rank_00.pt": {"a": W}}, "neuronx-distributed"),
    "colossalai": ({"pytorch_optim.bin.index.json": {}, "pytorch_optim-00001.bin": STATE}, "ColossalAI"),
    "deepspeed inference": ({"ds_inference_config.json": {}, "tp_00_00.pt": {"a": W}}, "DeepSpeed-Inference"),
    "vllm": ({f"model-rank-{r}-part-0.safetensors": {"a": W} for r in (0, 1)}, "vLLM"),
    "tensorrt-llm": ({f"rank{r}.safetensors": {"a": W} for r in (0, 1)}, "TensorRT-LLM"),
    "tensorrt": ({"rank0.engine": b""}, "TensorRT"),
    "meta": ({f"consolidated.0{r}.pth": {"a": W} for r in (0, 1)}, "convert_llama_weights_to_hf.py"),
    "fairscale": ({f"checkpoint_last-shard{r}.pt": {"model": {"a": W}} for r in (0, 1)}, "fairseq"),
    "metaseq": ({f"reshard-model_part-{r}-shard0.pt": {"model": {"a": W}} for r in (0, 1)}, "metaseq"),
    "composer": ({f"ep0-ba10-rank{r}.pt": {"state": {}} for r in (0, 1)}, "single ranks"),
    "accelerate": ({f"pytorch_model_fsdp_rank{r}.bin": {"a": W} for r in (0, 1)}, "single ranks"),
    "torch_xla": ({f"rank-0000000{r}-of-00000002-pytorch_model.bin": {"a": W} for r in (0, 1)}, "single ranks"),
    "gguf": ({"model-Q4_K_M.gguf": b"GGUF\3"}, "llama.cpp"),
    "ggml": ({"ggml-model-q4_0.bin": b"tjgg"}, "GGML"),
    "tensorflow": ({"model.ckpt-10.index": b"", "model.ckpt-10.data-00000-of-00001": b""}, "TensorFlow"),
    "flax": ({"flax_model.msgpack": b""}, "Flax"),
    "paddle": ({"model_state.pdparams": b""}, "Paddle"),
    "onnx": ({"model.onnx": b""}, "ONNX"),
    "openvino": ({"openvino_model.xml": b"", "openvino_model.bin": b""}, "OpenVINO"),
    "mlx": ({"weights.npz": b"PK"}, "MLX"),
    "torch.export": ({"model.pt2": b"PK"}, "torch.export"),
    "megatron, zarr": ({"metadata.json": {"sharded_backend": "zarr"}}, "--ckpt-format torch_dist"),
}


@pytest.mark.parametrize("kind", NAMED)
def test_named_and_what_to_do(kind: str, tmp_path: Path) -> None:
    files, said = NAMED[kind]
    put(tmp_path, **files)
    with pytest.raises(UnsupportedError, match=said):
        ckptlab.open(tmp_path)
    report = ckptlab.check(tmp_path)
    assert "not-read-yet" in [finding.code for finding in report.findings]


def test_a_file_by_its_beginning(tmp_path: Path) -> None:
    put(tmp_path, **{"model.bin": b"GGUF\3", "a.gguf": b"GGUF\3"})
    for name in ("model.bin", "a.gguf"):
        with pytest.raises(UnsupportedError, match=r"llama\.cpp"):
            ckptlab.open(tmp_path / name)


def test_what_is_read_goes_first(tmp_path: Path) -> None:
    """As a folder of Hugging Face's has the same weights for several programs."""
    others = {"tf_model.h5": b"", "flax_model.msgpack": b"", "a.gguf": b"GGUF", "onnx__model.onnx": b""}
    put(tmp_path / "here", **others, **{"model.safetensors": {"a": W}})
    put(tmp_path / "below", **others, **{"hf__model.safetensors": {"a": W}})
    for name in ("here", "below"):
        assert ckptlab.open(tmp_path / name).format == "safetensors"


@pytest.mark.parametrize("name", ["consolidated.0{}.pth", "pytorch_model_fsdp_rank{}.bin", "rank{}.safetensors"])
def test_one_of_several_ranks_by_itself(name: str, tmp_path: Path) -> None:
    put(tmp_path, **{name.format(0): {"a": W}})
    assert codes(tmp_path / name.format(0)) == []  # nothing says that there are others
    put(tmp_path, **{name.format(1): {"a": W}})
    assert codes(tmp_path / name.format(1)) == ["of-several-ranks"]
    assert ckptlab.check(tmp_path / name.format(1)).verdict.startswith("not healthy")


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_files_that_say_how_many_they_are(suffix: str, tmp_path: Path) -> None:
    stem = "model" if suffix == "safetensors" else "pytorch_model"
    first, second = (f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2))
    put(tmp_path, **{first: {"a": W}})
    with pytest.raises(CheckpointError, match=f"{second} missing"):
        ckptlab.open(tmp_path)
    put(tmp_path, **{second: {"b": W}})
    assert set(ckptlab.open(tmp_path)) == {"a", "b"}


def test_other_weights_beside_a_model(tmp_path: Path) -> None:
    """The same model under other names, as Mistral's, or an adapter: not one model of both."""
    put(tmp_path, **{"model.safetensors": {"a": W}, "consolidated.safetensors": {"b": W}})
    assert set(ckptlab.open(tmp_path)) == {"a"}
    (said,) = ckptlab.open(tmp_path).findings
    assert (said.code, said.where.files) == ("other-weights", ("consolidated.safetensors",))


@pytest.mark.parametrize(
    "names",
    [
        ("a.qweight", "a.qzeros", "a.scales"),
        ("a.weight", "a.weight.absmax", "a.weight.quant_state.bitsandbytes__nf4"),
        ("a.weight", "a.SCB"),
        ("a.weight_packed", "a.weight_scale"),
        ("a.weight", "a.weight_scale_inv"),
        ("a.weight", "a.scales", "a.biases"),
        ("a.q_weight", "a.q_scale"),
        ("a_blocks", "a_scales"),
    ],
    ids=lambda names: names[-1],
)
def test_quantised_weights_are_said(names: tuple[str, ...], tmp_path: Path) -> None:
    put(tmp_path, **{"model.safetensors": {name: np.zeros((4, 2), np.uint8) for name in names}})
    assert codes(tmp_path) == ["quantised"]
    put(tmp_path, **{"model.safetensors": {"a.weight": W, "a.bias": W}})
    assert codes(tmp_path) == []


WHOLE: dict[str, dict[str, Any]] = {
    "accelerate": {"pytorch_model_fsdp.bin": {"a": W}, "optimizer.bin": {"state": STATE}},
    "safetensors": {"model.safetensors": {"a": W}, "optimizer.bin": {"state": STATE}},
    "torchtune": {"hf_model_0001_0.pt": {"a": W}, "recipe_state.pt": {"optimizer": {"state": STATE}}},
    "file of a script": {"model.pt": {"model": {"a": W}, "optimizer": {"state": STATE}}},
    "file of Lightning": {"model.pt": {"state_dict": {"a": W}, "optimizer_states": [{"state": STATE}]}},
    "file of composer": {"model.pt": {"state": {"model": {"a": W}, "optimizers": {"Adam": STATE}}}},
    "file of fairseq": {"model.pt": {"model": {"a": W}, "last_optimizer_state": {"state": STATE}}},
}


@pytest.mark.parametrize("kind", WHOLE)
def test_weights_beside_an_optimizer(kind: str, tmp_path: Path) -> None:
    found = ckptlab.open(put(tmp_path, **WHOLE[kind]))
    assert np.array_equal(found.full("master", stack=False)["a"].values, W)
    assert [finding.code for finding in found.findings] == ["optimizer-left-out"]


def test_whole_weights_under_other_programs_names(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "pytorch_model-stage-00001-shard-00001.bin"}}
    put(tmp_path / "colossalai", **{"pytorch_model.bin.index.json": index, index["weight_map"]["a"]: {"a": W}})
    put(tmp_path / "meta", **{"consolidated.00.pth": {"a": W}})
    put(tmp_path / "litgpt", **{"lit_model.pth": {"a": W}})
    for folder in tmp_path.iterdir():
        assert set(ckptlab.open(folder)) == {"a"}
    put(tmp_path, **{"model.pth.tar": {"state_dict": {"a": W}}})
    assert set(ckptlab.open(tmp_path / "model.pth.tar")) == {"a"}


def test_an_optimizer_by_itself(tmp_path: Path) -> None:
    put(tmp_path, **{"optimizer.pt": {"state": STATE, "param_groups": []}})
    with pytest.raises(CheckpointError, match="the state of an optimizer, without weights"):
        ckptlab.open(tmp_path / "optimizer.pt")
