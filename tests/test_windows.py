"""Windows of a tensor hold all of its elements or none; what differs in two of them is told to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from test_gather import store

import ckptlab
from ckptlab.analysis.accumulate import partial
from ckptlab.analysis.adam import _Task as Update
from ckptlab.analysis.elements import apart, joined, relative, unequal
from ckptlab.analysis.moved import Settings
from ckptlab.analysis.windows import spans
from ckptlab.arrays import reader
from ckptlab.arrays.lazy import Gathered
from ckptlab.catalog import Catalog, Fragment
from ckptlab.errors import CheckpointError
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh

NAN, INF = math.nan, math.inf
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int64, np.bool_]


def stored(folder: Path, layout: str, whole: np.ndarray, mesh: Mesh, before: int = 0) -> Catalog:
    """A catalog of one tensor "w" in flat buffers."""
    return store(folder, Layout(layout).resolve(whole.shape, mesh), whole, True, before)


@pytest.mark.parametrize("dtype", [*DTYPES, np.complex64, np.complex128], ids=lambda d: np.dtype(d).name)
def test_unequal_is_unequal_bits(dtype: Any) -> None:
    a = np.array([0, 1, 1, 0, 1], dtype)
    b = np.array([0, 1, 0, 1, 1], dtype)
    assert unequal(a, b).tolist() == [2, 3]
    assert unequal(a, a.copy()).tolist() == []


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128], ids=lambda d: np.dtype(d).name)
def test_complex_numbers_that_differ_in_one_part_alone(dtype: Any) -> None:
    a = np.array([1 + 2j, 3 + 4j, 5 + 6j, 7 + 8j], dtype)
    b = np.array([1 + 2j, 3 + 7j, 1 + 6j, 7 + 8j], dtype)
    where = unequal(a, b)
    assert where.tolist() == [1, 2]
    assert apart(a[where], b[where]).tolist() == [3, 4]
    assert relative(apart(a, b), a, b).tolist() == pytest.approx([0, 3 / abs(3 + 7j), 4 / abs(5 + 6j), 0])


def test_nan_is_nan_of_the_same_bits_or_of_another_dtype() -> None:
    a = np.array([NAN, NAN, 1, 0.0], np.float32)
    b = a.copy()
    b.view(np.uint32)[1] += 1
    b[3] = -0.0
    assert unequal(a, b).tolist() == [1, 3]
    assert unequal(a, b.astype(ml_dtypes.bfloat16)).tolist() == []
    assert apart(np.array([NAN, NAN, INF, INF, -0.0]), np.array([NAN, 1, INF, -INF, 0.0])).tolist() == [
        0,
        INF,
        0,
        INF,
        0,
    ]


def test_diff_compares_complex_checkpoints(tmp_path: Path) -> None:
    whole = np.arange(8).reshape(4, 2) * (1 + 1j)
    other = whole.copy()
    other[2, 1] += 2j
    sides = []
    for name, array in (("a", whole), ("b", other)):
        (tmp_path / name).mkdir()
        sides.append(stored(tmp_path / name, "(tp out) in", array, Mesh(tp=2)))
    (one,) = ckptlab.diff(*sides).differences
    assert (one.count, one.max_abs, one.at) == (1, 2.0, (2, 1))
    assert one.max_rel == pytest.approx(2 / abs(5 + 7j))
    assert one.relative == pytest.approx(2 / np.linalg.norm(whole))
    assert one.cosine == pytest.approx(np.vdot(whole, other).real / np.linalg.norm(whole) / np.linalg.norm(other))
    assert ckptlab.diff(sides[0], sides[0]).equal


# -------------------------------------------------------------------------------- what is not stored


@dataclass(frozen=True)
class Short:
    """A reader that gives three elements of five."""

    name: str = "w"
    state: str = "exp_avg"

    def chunks(self, cut: Cut, at: tuple[int, ...], lo: int, hi: int, limit: int) -> Iterator[np.ndarray]:
        yield np.ones(2, np.float32)
        yield np.ones(1, np.float32)


SHORT: Any = Short()
ONLY = r"w: exp_avg: of elements 0 to 5 of its shard of shape \(5,\) only 3 are stored"


def test_a_window_that_is_not_all_stored_is_no_window() -> None:
    with pytest.raises(CheckpointError, match=ONLY):
        joined(SHORT, Cut.whole((5,)), (), 0, 5)


def test_updates_are_not_made_of_memory_that_nobody_wrote() -> None:
    with pytest.raises(CheckpointError, match=ONLY):
        Update(0, (SHORT, SHORT, SHORT), Cut.whole((5,)), (), 0, 5, Settings(), 100).run()


class Lacking(Catalog):
    """A catalog whose last fragment of every shard is lost."""

    def fragments(self, *place: Any) -> tuple[Fragment, ...]:
        return super().fragments(*place)[:-1]


@pytest.mark.parametrize("layout", ["out in", "(tp out) in"])
def test_a_checkpoint_that_lacks_elements_is_refused_by_whoever_reads(layout: str, tmp_path: Path) -> None:
    whole = np.arange(8, dtype=np.float32).reshape(4, 2)
    catalog = stored(tmp_path, layout, whole, Mesh(tp=2, dp=2))
    lacking = Lacking(**{f.name: getattr(catalog, f.name) for f in fields(catalog)})
    count = 4 if layout == "out in" else 2
    refused = f"w: master: of the shard of pp 0 · tp \\d, shape .*, only {count} elements are stored"
    with pytest.raises(CheckpointError, match=refused):
        ckptlab.stats(lacking)
    with pytest.raises(CheckpointError, match=refused):
        ckptlab.diff(lacking, catalog)
    with pytest.raises(CheckpointError, match=refused):
        reader(lacking, "w", "master").shard(Cut.whole((4, 2)), ())


@pytest.mark.parametrize("window", [1, 3, 100])
def test_spans_hold_every_element_once(window: int, tmp_path: Path) -> None:
    whole = np.arange(40, dtype=np.float32).reshape(8, 5)
    catalog = stored(tmp_path, "(tp out) in", whole, Mesh(tp=2, dp=3), 3)
    array = Gathered(reader(catalog, "w", "master"), Cut.whole((8, 5)))
    windows = [np.array(w) for span in spans(array, window) for w in span.windows()]
    assert max(map(len, windows)) <= window
    assert np.sort(np.concatenate(windows)).tolist() == list(range(40))
    assert sum(span.count for span in spans(array, window)) == 40
    assert partial(np.concatenate(windows)).count == 40
