"""Files as plans: whoever writes whichever piece, in whatever order, the bytes are the same."""

from __future__ import annotations

import random
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptlab.errors import CheckpointError
from ckptlab.formats import checksum, fileplan
from ckptlab.formats.fileplan import Elements, Zeros
from ckptlab.formats.torch import torchfile
from ckptlab.formats.torch.torchfile import Pending


@dataclass(frozen=True)
class Held:
    """Draws elements of an array, some at a time."""

    array: np.ndarray
    step: int = 7

    def chunks(self, lo: int, hi: int) -> list[np.ndarray]:
        return [self.array[i : min(i + self.step, hi)] for i in range(lo, hi, self.step)]


def pending(array: np.ndarray, zeros: int = 0) -> Pending:
    """A 1-D tensor that is drawn, and so many zeros."""
    padding = Zeros(zeros * array.itemsize)
    return Pending(array.dtype, (array.size + zeros,), (Elements(Held(array), array.dtype, 0, array.size), padding))


def zipped_by_python(path: Path, records: list[tuple[str, bytes]]) -> None:
    """The records as Python's zipfile streams them to a file, aligned as torch does."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file:
        for name, data in records:
            info = zipfile.ZipInfo(f"archive/{name}")
            padding = -(file.start_dir + 30 + len(info.filename) + 4 + 20) % 64
            info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
            with file.open(info, "w", force_zip64=True) as record:
                record.write(data)
            info.extra = b""


@given(st.lists(st.binary(max_size=300)), st.integers(0, 5000))
def test_checksums_of_pieces_combine(pieces: list[bytes], zeros: int) -> None:
    sums = [(zlib.crc32(piece), len(piece)) for piece in pieces]
    assert checksum.combined(sums) == zlib.crc32(b"".join(pieces))
    assert checksum.of_zeros(zeros) == zlib.crc32(bytes(zeros))


arrays = st.builds(
    lambda n, dtype: np.random.default_rng(n).integers(0, 100, n).astype(dtype),
    st.integers(0, 200),
    st.sampled_from([np.float32, np.uint8, ml_dtypes.bfloat16]),
)


@settings(max_examples=40)
@given(st.lists(st.tuples(arrays, st.integers(0, 9)), max_size=5), st.integers(1, 500), st.randoms())
def test_pieces_in_any_order_make_the_file(
    tmp_path_factory: pytest.TempPathFactory, tensors: list[Any], limit: int, order: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("pieces")
    plan = torchfile.plan("a.pt", [pending(array, zeros) for array, zeros in tensors])
    fileplan.write(plan, folder / "whole")
    path = str(folder / "pieces")
    pieces = list(plan.pieces(path, limit))
    assert sum(piece.nbytes for piece in pieces) == plan.size
    order.shuffle(pieces)
    fileplan.seal(path, plan, [s for piece in pieces for s in piece.write().sums])
    assert (folder / "pieces").read_bytes() == (folder / "whole").read_bytes()
    with zipfile.ZipFile(folder / "whole") as file:
        assert file.testzip() is None
        records = [(name.removeprefix("archive/"), file.read(name)) for name in file.namelist()]
    for i, (array, zeros) in enumerate(tensors):
        assert dict(records)[f"data/{i}"] == array.tobytes() + bytes(zeros * array.itemsize)
    zipped_by_python(folder / "python", records)
    assert (folder / "whole").read_bytes() == (folder / "python").read_bytes()


def test_a_tensor_is_as_large_as_its_parts() -> None:
    with pytest.raises(ValueError, match="has 16 bytes, not 12"):
        Pending(np.dtype(np.float32), (4,), (Zeros(12),))


def test_an_error_names_the_file_and_the_place(tmp_path: Path) -> None:
    short = Elements(Held(np.arange(3, dtype=np.uint8)), np.dtype(np.uint8), 0, 5)
    plan = fileplan.FilePlan("a", (fileplan.Literal(b"abc"), short))
    with pytest.raises(CheckpointError, match=r"a: from byte 3 on 5 elements .* but there are only 3"):
        fileplan.write(plan, tmp_path / "a")
    assert (tmp_path / "a").stat().st_size == 0
