"""The one operation: whatever a checkpoint stores of a tensor, any cut of it comes out as if taken from the whole."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
from helpers.arrays import SHAPE, cut, store
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptlab.arrays import Tally, reader
from ckptlab.arrays import gather as gathering
from ckptlab.arrays.readers import Mean, Share
from ckptlab.layout import Cut, Layout
from ckptlab.layout.boxes import flat_boxes
from ckptlab.mesh import Mesh

DTYPES = [np.float32, np.float64, np.float16, np.int64, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn]


@pytest.mark.slow
@given(cut(), cut(), st.booleans(), st.integers(0, 9), st.sampled_from(DTYPES), st.data())
@settings(max_examples=150, deadline=None)
def test_any_cut_out_of_any_other(
    source: Cut, target: Cut, zero3: bool, before: int, dtype: type, data: st.DataObject
) -> None:
    numbers = np.arange(math.prod(source.shape)) % 113
    whole = numbers.reshape(source.shape).astype(np.dtype(dtype))
    expected = np.zeros(target.shape, whole.dtype)
    rows = min(source.shape[0], target.shape[0])
    expected[:rows] = whole[:rows]
    at = data.draw(st.sampled_from(list(target.coordinates())))
    shard = target.take(expected, at)
    lo, hi = sorted(data.draw(st.tuples(st.integers(0, shard.size), st.integers(0, shard.size))))
    limit = data.draw(st.sampled_from([1, 5, 64, 1000]))
    with tempfile.TemporaryDirectory() as folder:
        catalog = store(Path(folder), source, whole, zero3, before)
        tally = Tally()
        gather = reader(catalog, "w", "master", tally=tally)
        assert gather.shard(target, at).tobytes() == shard.tobytes()
        held_by_both = (
            math.prod(n if i else min(n, rows) for i, n in enumerate(target.shape)) if not target.axes else None
        )
        if held_by_both is not None:
            assert tally.read.total() == held_by_both * whole.dtype.itemsize  # every element once
        with patch.object(gathering, "_RUN", data.draw(st.sampled_from([1, 1 << 16]))):
            pieces = [np.array(c) for c in gather.chunks(target, at, lo, hi, limit)]
        assert all(0 < len(p) <= limit for p in pieces)
        together = np.concatenate([np.empty(0, whole.dtype), *pieces])
        assert together.tobytes() == shard.reshape(-1)[lo:hi].tobytes()


@pytest.mark.parametrize(("text", "views"), [("(tp out) in", True), ("(3 tp out) in", True), ("out (tp in)", False)])
def test_long_runs_are_not_copied(text: str, views: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "_RUN", 16)
    source = Layout(text).resolve(SHAPE, Mesh(tp=2, dp=2))
    whole = np.arange(math.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
    one = reader(store(tmp_path, source, whole, False, 3), "w", "master")
    chunks = list(one.chunks(Cut.whole(SHAPE), (), 5, 100))
    assert {not chunk.flags.writeable for chunk in chunks} == {views}  # what is mapped may not be written to
    if views:
        assert np.concatenate(chunks).tolist() == whole.reshape(-1)[5:100].tolist()


@given(st.lists(st.integers(1, 5), max_size=4), st.data())
def test_flat_ranges_are_boxes(shape: list[int], data: st.DataObject) -> None:
    numbers = np.arange(math.prod(shape)).reshape(shape)
    lo, hi = sorted(data.draw(st.tuples(st.integers(0, numbers.size), st.integers(0, numbers.size))))
    boxes = list(flat_boxes(shape, lo, hi))
    assert len(boxes) <= 2 * max(len(shape), 1)
    parts = [numbers[tuple(slice(s, s + n) for s, n in zip(*b, strict=True))].reshape(-1) for b in boxes]
    assert np.concatenate([np.empty(0, int), *parts]).tolist() == list(range(lo, hi))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,)])
def test_tensors_of_no_dims_and_of_no_elements(shape: tuple[int, ...], tmp_path: Path) -> None:
    cut = Cut.whole(shape)
    whole = np.ones(shape, np.float32)
    catalog = store(tmp_path, cut, whole, False, 3)
    assert reader(catalog, "w", "master").shard(cut, ()).tobytes() == whole.tobytes()
    assert sum(len(c) for c in reader(catalog, "w", "master").chunks(cut, (), 0, whole.size)) == whole.size


def test_rounding_is_to_nearest_even(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    values[0, :4] = [1 + 2**-8, 1 + 3 * 2**-8, 3e38, -0.0]
    catalog = store(tmp_path, Cut.whole(SHAPE), values, False, 0)
    for dtype, name in ((ml_dtypes.bfloat16, "bfloat16"), (np.float16, "float16")):
        found = reader(catalog, "w", "master", dtype=np.dtype(dtype)).shard(Cut.whole(SHAPE), ())
        expected = torch.from_numpy(values).to(getattr(torch, name)).view(torch.uint16).numpy()
        np.testing.assert_array_equal(found.view(np.uint16), expected)


@pytest.mark.parametrize("dtype", [*DTYPES, np.complex64, np.complex128], ids=lambda d: np.dtype(d).name)
def test_means_and_shares_of_sums_lose_nothing_that_their_dtype_holds(dtype: type, tmp_path: Path) -> None:
    digits = {4: 20, 8: 40, 16: 40}.get(np.dtype(dtype).itemsize, 2)  # more than float32 has, where the dtype has more
    digits = 20 if dtype is np.complex64 else digits
    numbers = 2**digits + np.arange(math.prod(SHAPE)).reshape(SHAPE) * 2
    whole = (numbers * (1 + 1j) if np.dtype(dtype).kind == "c" else numbers).astype(dtype)
    one = reader(store(tmp_path, Cut.whole(SHAPE), whole, False, 0), "w", "master")
    mean, summed = (Mean([one, one], summed).shard(Cut.whole(SHAPE), ()) for summed in (False, True))
    assert mean.tobytes() == whole.tobytes()
    assert summed.tobytes() == (whole + whole).tobytes()
    assert Share(one, 2).shard(Cut.whole(SHAPE), ()).tobytes() == (whole / 2).astype(dtype).tobytes()
