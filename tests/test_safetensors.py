"""Consolidated weights, read by the safetensors library itself."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import GPT, ZERO2, ZERO3, differences, whole
from safetensors.numpy import load_file, save_file

import ckptlab
from ckptlab import Mesh
from ckptlab.catalog import PARAM
from ckptlab.checkpoint import save_weights
from ckptlab.errors import CheckpointError
from ckptlab.formats import read
from ckptlab.formats.safefile import SHARDING, read_header

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


# Several files that hold one name; boxes


def put(file: Path, tensors: dict[str, np.ndarray], offsets: dict[str, list[int]] | None = None) -> None:
    told = {SHARDING: json.dumps({n: {"saved_offsets": at} for n, at in offsets.items()})} if offsets else None
    save_file(tensors, file, told)


def shard(rank: int) -> str:
    return f"shard-{rank:05d}-model-00001-of-00001.safetensors"


WHOLE = np.arange(7 * 6, dtype=np.float32).reshape(7, 6)


def boxed(folder: Path) -> None:
    """A tensor cut 2 × 2, unevenly, one cut in 3 rows, and one that is whole; over files of four ranks."""
    rows, columns = np.split(np.arange(7), [4]), np.split(np.arange(6), [3])
    for rank, (r, c) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        tensors = {"w": np.ascontiguousarray(WHOLE[np.ix_(rows[r], columns[c])])}
        offsets = {"w": [int(rows[r][0]), int(columns[c][0])]}
        if rank < 3:
            tensors["v"], offsets["v"] = WHOLE[rank * 3 : rank * 3 + 3].copy(), [rank * 3, 0]
        if rank == 2:
            tensors["norm"], offsets["norm"] = WHOLE[0].copy(), [0]
        put(folder / shard(rank + 1), tensors, offsets)


def test_boxes_of_several_ranks_are_one_tensor(tmp_path: Path) -> None:
    boxed(tmp_path)
    ckpt = ckptlab.open(tmp_path)
    assert {n: t.layout.text for n, t in ckpt.items()} == {
        "w": "(shard0 out) (shard1 in)", "v": "(shard2 out) in", "norm": "out"
    }  # fmt: skip
    assert ckpt.mesh == Mesh(shard0=2, shard1=2, shard2=3)
    full, shards = ckpt.full("master", stack=False), ckpt.shards("master", stack=False)
    for name, expected in {"w": WHOLE, "v": WHOLE, "norm": WHOLE[0]}.items():
        np.testing.assert_array_equal(full[name].values, expected)
        merged = ckptlab.merge(shards[name], ckpt[name].layout, shape=expected.shape)
        np.testing.assert_array_equal(merged.values, expected)
    assert [f.code for f in ckpt.findings] == ["shapes-inferred"]
    assert ckptlab.check(tmp_path).healthy
    ckptlab.save_weights(ckpt, tmp_path / "whole")
    np.testing.assert_array_equal(load_file(tmp_path / "whole" / "model.safetensors")["w"], WHOLE)


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda f: (f / shard(2)).unlink(), r"shard-00002-model-00001-of-00001\.safetensors missing"),
        (lambda f: (f / shard(1)).rename(f / shard(9)), "shard-00001.* missing"),
        (lambda f: put(f / shard(5), {"w": WHOLE[:1, :1]}, {"w": [0, 0]}), "w in .*: 5 boxes .*are not a grid"),
        (lambda f: put(f / shard(5), {"w": WHOLE[:4, :3].copy()}, {"w": [0, 0]}), "w in .*overlap, at .0:4, 0:3"),
        (lambda f: put(f / shard(5), {"u": WHOLE[1:]}, {"u": [1, 0]}), "u in .*leave a gap, at .0:1, 0:6"),
        (lambda f: put(f / shard(5), {"w": WHOLE}), "w stands in .*and nothing in them says how they make one"),
        (lambda f: put(f / shard(5), {"norm": WHOLE[0, :3].astype("f8")}, {"norm": [6]}), "boxes of different dtypes"),
        (lambda f: put(f / shard(5), {"x": WHOLE}, {"x": [0]}), "DCP_SHARDING_INFO .* for shape .7, 6.: damaged"),
        (lambda f: put(f / shard(5), {"x": WHOLE}, {"x": [-1, 0]}), "DCP_SHARDING_INFO .*: damaged"),
        (lambda f: save_file({"x": WHOLE}, f / shard(5), {SHARDING: "[1"}), "the header is not JSON"),
    ],
)
def test_boxes_that_make_no_tensor_are_refused(tmp_path: Path, fault: Callable[[Path], Any], says: str) -> None:
    boxed(tmp_path)
    fault(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        read(tmp_path)
    assert any(f.refuses for f in ckptlab.check(tmp_path, data=False).findings)


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    save_file({"w": WHOLE}, tmp_path / "model.safetensors")
    save_file({"w": WHOLE + 1}, tmp_path / "older.safetensors")
    with pytest.raises(CheckpointError, match=r"w stands in model\.safetensors, older\.safetensors, and nothing"):
        read(tmp_path)
    assert "w" in read(tmp_path / "model.safetensors").tensors


def test_an_index_that_names_what_its_file_does_not_hold(tmp_path: Path) -> None:
    save_file({"w": WHOLE}, tmp_path / "a.safetensors")
    index = {"weight_map": {"w": "a.safetensors", "lost": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"says that lost is in a\.safetensors, which does not hold it"):
        read(tmp_path)
    assert ckptlab.check(tmp_path)["contradiction"][0].where.tensors == ("lost",)


def test_dtypes_that_numpy_cannot_say_and_tensors_without_elements(tmp_path: Path) -> None:
    entries = {
        "packed": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        "scale": {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [4, 8]},
        "gone": {"dtype": "BF16", "shape": [0], "data_offsets": [8, 8]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]},
    }
    text = json.dumps(entries).encode()
    data = bytes([127, 128, 126, 127]) * 2 + np.array([1, 2], np.float32).tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    ckpt = ckptlab.open(tmp_path)
    assert list(ckpt) == ["scale", "gone", "w"]
    assert whole(ckpt.catalog, "scale", PARAM).astype(np.float32).tolist() == [1, 2, 0.5, 1]
    assert {f.code: f.where.tensors for f in ckpt.findings} == {"unknown-dtype": ("packed",), "no-elements": ("gone",)}
    assert not ckptlab.check(tmp_path).healthy


@pytest.mark.slow
def test_what_torch_writes_distributed(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("torch_ranks").save_distributed(tmp_path / "out", tmp_path)
    assert len(list((tmp_path / "out").glob("shard-*.safetensors"))) == 2
    ckpt = ckptlab.open(tmp_path / "out")
    assert ckpt.mesh == Mesh(shard=2)
    found = ckpt.state_dict()
    torch.testing.assert_close(found["rows"], torch.arange(35.0).reshape(7, 5), rtol=0, atol=0)
    torch.testing.assert_close(found["columns"], torch.arange(35.0).reshape(7, 5), rtol=0, atol=0)
    torch.testing.assert_close(found["whole"], torch.arange(3.0), rtol=0, atol=0)


def _safe(path: Path, header: bytes, data: bytes = bytes(16), length: int | None = None) -> Path:
    """A file of safetensors with that header, word for word."""
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


_ONE = b'"w":{"dtype":"F32","shape":[%s],"data_offsets":[%d,%d]}'
HOSTILE = {
    "one name twice": (b"{" + _ONE % (b"4", 0, 16) + b"," + _ONE % (b"2,2", 0, 16) + b"}", "two entries of one name"),
    "one key twice": (b'{"w":{"dtype":"F32","shape":[4],"shape":[2,2],"data_offsets":[0,16]}}', "two entries"),
    "the same bytes": (
        b"{" + _ONE % (b"2", 4, 12) + b"," + (_ONE % (b"4", 0, 16)).replace(b"w", b"v", 1) + b"}",
        "v and w lie in",
    ),
    "negative offsets": (b"{" + _ONE % (b"4", -16, 0) + b"}", "truncated or damaged"),
    "backwards": (b"{" + _ONE % (b"4", 16, 0) + b"}", "truncated or damaged"),
    "beyond the file": (b"{" + _ONE % (b"4", 1 << 40, (1 << 40) + 16) + b"}", "truncated or damaged"),
    "too many dims": (b"{" + _ONE % (b",".join([b"1"] * 65), 0, 4) + b"}", "the header is damaged"),
    "too large": (b"{" + _ONE % (b"9" * 400, 0, 16) + b"}", "truncated or damaged"),
    "digits without end": (b"{" + _ONE % (b"9" * 6000, 0, 16) + b"}", "is not JSON"),
    "no whole numbers": (b"{" + _ONE % (b"true,4.0", 0, 16) + b"}", "the header is damaged"),
    "deep": (b'{"a":' * 100_000, "is not JSON"),
}


@pytest.mark.parametrize("fault", HOSTILE)
def test_hostile_headers_are_refused(fault: str, tmp_path: Path) -> None:
    header, says = HOSTILE[fault]
    with pytest.raises(CheckpointError, match=says) as refused:
        read_header(str(_safe(tmp_path / "a.safetensors", header)))
    assert len(str(refused.value)) < 2000


def test_a_header_longer_than_the_format_allows_is_not_read(tmp_path: Path) -> None:
    path = _safe(tmp_path / "a.safetensors", b"{}", length=200_000_000)
    os.truncate(path, 300_000_000)  # holes
    with pytest.raises(CheckpointError, match="more than the 100,000,000 that the format allows"):
        read_header(str(path))
