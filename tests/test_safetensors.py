"""Consolidated weights, read by the safetensors library itself."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from compare import GPT, ZERO2, ZERO3, differences, whole
from safetensors.numpy import load_file

from ckptlab.catalog import PARAM
from ckptlab.checkpoint import save_weights
from ckptlab.errors import CheckpointError
from ckptlab.formats import read

BF16 = np.dtype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3, GPT / "universal"], ids=lambda c: c.name)
def test_masters_under_the_models_own_names(case: Path, tmp_path: Path) -> None:
    source = read(case)
    save_weights(source, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert set(found) == {n for t in source.tensors.values() for n in (t.name, *t.aliases)}
    for name, array in found.items():
        state = "master" if "master" in source[name].states else PARAM
        np.testing.assert_array_equal(array, whole(source, name, state), err_msg=name)


def test_sixteen_bits_are_the_models_own_and_buffers_keep_their_dtype(tmp_path: Path) -> None:
    source = read(ZERO2)
    save_weights(source, tmp_path / "out", dtype="bf16")
    for name, array in load_file(tmp_path / "out" / "model.safetensors").items():
        assert array.dtype == source[name].states[PARAM]
        assert array.tobytes() == whole(source, name, PARAM).tobytes()


def test_zero3_rounds_its_masters(tmp_path: Path) -> None:
    source = read(ZERO3)
    save_weights(source, tmp_path / "out", dtype="bf16")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for tensor in source.tensors.values():
        if tensor.kind == "parameter":
            assert found[tensor.name].tobytes() == whole(source, tensor.name, "master").astype(BF16).tobytes()


def test_large_ones_are_sharded_with_an_index(tmp_path: Path) -> None:
    source = read(GPT)
    save_weights(source, tmp_path / "out", max_shard_bytes=15_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) > 3
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "out" / file)
    sizes = [(tmp_path / "out" / f).stat().st_size for f in files]
    assert max(sizes) < 15_000 + 4_000  # the header is not counted
    again = read(tmp_path / "out")
    assert differences(source, again) == []


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    save_weights(read(ZERO2), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*truncated or damaged"):
        read(tmp_path / "out")
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="the header claims"):
        read(tmp_path / "out")
