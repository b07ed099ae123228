"""Files in torch's form of before 1.6: read to the bit, and nothing in them is executed or believed."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
import pytest

import ckptlab
from ckptlab.errors import CheckpointError, CkptlabError, UnsafeFileError, UnsupportedError
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.pickles import Foreign

torch = pytest.importorskip("torch")

W = torch.arange(35, dtype=torch.float32).reshape(5, 7)
STATE = OrderedDict(
    w=W,
    turned=W.t(),
    rows=W[2:4],
    ids=torch.arange(4),
    half=torch.ones(3, dtype=torch.bfloat16),
    trained=torch.nn.Parameter(torch.tensor([0.5, -2.0])),
    one=torch.tensor(3.0),
    none=torch.zeros(0),
    flag=torch.tensor([True, False]),
)


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=False)
    return path


def test_it_is_read(tmp_path: Path) -> None:
    contents = torchfile.read_contents(saved(tmp_path / "a.bin", {"state": STATE, "step": 3}))
    assert contents.value["step"] == 3
    found = contents.value["state"]
    for name, tensor in STATE.items():
        want = tensor.detach()
        assert found[name].shape == tuple(want.shape)
        assert str(found[name].dtype) == str(want.dtype).removeprefix("torch.")
        assert np.array_equal(found[name].map().astype(np.float64), want.double().numpy())
    assert found["rows"].path == found["w"].path
    assert found["rows"].offset == found["w"].offset + 2 * 7 * 4  # a view on the same storage
    assert ("torch._utils", "_rebuild_tensor_v2") in contents.globals_seen


def test_it_opens_and_is_healthy(tmp_path: Path) -> None:
    saved(tmp_path / "pytorch_model.bin", STATE)
    found = ckptlab.open(tmp_path)
    assert np.array_equal(found.full("master", stack=False)["w"].values, W.numpy())
    assert ckptlab.check(tmp_path, checksums=True).verdict.startswith("healthy")


class Made:
    def __init__(self, callee: Any, *args: Any) -> None:
        self.call = callee, args

    def __reduce__(self) -> Any:
        return self.call


def test_nothing_is_executed(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    file = saved(tmp_path / "a.bin", {"w": W, "evil": Made(os.system, f"touch {mark}")})
    contents = torchfile.read_contents(file)
    assert isinstance(contents.value["evil"], Foreign)
    assert not mark.exists()
    assert "executable-pickle" in [f.code for f in ckptlab.check(file).findings]


def pickles(content: bytes) -> list[bytes]:
    """The five pickles at the beginning, and the rest."""
    stream, parts, at = io.BytesIO(content), [], 0
    for _ in range(5):
        assert list(pickletools.genops(stream))
        parts.append(content[at : stream.tell()])
        at = stream.tell()
    return [*parts, content[at:]]


@pytest.mark.parametrize(
    ("part", "value", "error"),
    [
        (2, {"little_endian": False}, UnsupportedError),
        (2, [], UnsupportedError),
        (4, "no list", UnsafeFileError),
        (4, ["another"], UnsafeFileError),
        (4, [], CheckpointError),
    ],
    ids=["big-endian", "no machine", "no keys", "another storage", "no storage"],
)
def test_a_file_that_lies_is_refused(part: int, value: Any, error: type[CkptlabError], tmp_path: Path) -> None:
    file = saved(tmp_path / "a.bin", {"w": W})
    parts = pickles(file.read_bytes())
    parts[part] = pickle.dumps(value, protocol=2)
    file.write_bytes(b"".join(parts))
    with pytest.raises(error):
        torchfile.read(file)


@pytest.mark.parametrize("count", [-1, 36, 34, 1 << 62])
def test_a_storage_of_another_size_is_refused(count: int, tmp_path: Path) -> None:
    file = saved(tmp_path / "a.bin", {"w": W})
    *parts, rest = pickles(file.read_bytes())
    assert struct.unpack("<q", rest[:8]) == (35,)
    file.write_bytes(b"".join(parts) + struct.pack("<q", count) + rest[8:])
    with pytest.raises(CheckpointError):
        torchfile.read(file)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    content = saved(tmp_path / "a.bin", {"w": W, "b": torch.ones(3)}).read_bytes()
    cut = tmp_path / "cut.bin"
    for length in range(0, len(content), 3):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError):
            torchfile.read(cut)


def test_damaged_bytes_end_in_an_error_of_ours(tmp_path: Path) -> None:
    content = saved(tmp_path / "a.bin", STATE).read_bytes()
    end, dice = len(content) - 400, random.Random(1)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(dice.randint(1, 3)):
            damaged[dice.randrange(14, end)] = dice.randrange(256)
        (tmp_path / "b.bin").write_bytes(damaged)
        try:
            torchfile.read(tmp_path / "b.bin")
        except CkptlabError:
            continue
