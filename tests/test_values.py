"""Values shown: what a cell says of value, rank, file and byte is what the file holds there."""

from __future__ import annotations

import base64
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, GPT, ZERO3
from drawn import cells, numbers, texts, tip
from helpers.html import assert_well_formed
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptlab
from ckptlab import Mesh, viz
from ckptlab.errors import InputError
from ckptlab.viz import sampled
from ckptlab.viz.sampled import Sampled, sample
from ckptlab.widgets import numbers as page_numbers

DENSE = "2.mlp.dense_h_to_4h.weight"
SOURCES = (GPT, ZERO3, DATA / "plain_zero2_dp2")


def in_file(found: Sampled, i: int, j: int) -> float:
    """The element whose bytes a cell names."""
    place = found.places[found.place[i, j]]
    assert place.stored is not None
    with open(place.stored.path, "rb") as file:
        file.seek(place.byte(int(found.at[i, j])) or 0)
        return float(np.frombuffer(file.read(found.dtype.itemsize), found.dtype)[0])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
@pytest.mark.parametrize("most", [(96, 96), (5, 3)])
def test_every_cell_tells_the_bytes_that_hold_its_value(path: Path, most: tuple[int, int]) -> None:
    ckpt = ckptlab.open(path)
    for name, tensor in list(ckpt.catalog.tensors.items())[:12]:
        for state in tensor.states:
            found = sample(ckpt.catalog, name, state, None, most)
            whole = np.asarray(ckpt.full(state, stack=False)[name].values)
            high, wide = found.values.shape
            for i, j in {(0, 0), (high - 1, wide - 1), (high // 2, wide // 3)}:
                assert found.values[i, j] == float(whole[found.index(i, j)]) == in_file(found, i, j)


@pytest.mark.slow
@given(st.integers(1, 70), st.integers(1, 20), st.integers(1, 9), st.integers(1, 9), st.integers(1, 64))
@settings(deadline=None, max_examples=40)
def test_a_cell_is_the_largest_of_its_elements(rows: int, columns: int, down: int, across: int, piece: int) -> None:
    ckpt = ckptlab.open(GPT)
    rows, columns = min(rows, 64), min(columns, 16)
    whole = np.asarray(ckpt.full("master", stack=False)[DENSE].values)[:rows, :columns]
    before, sampled.PIECE = sampled.PIECE, piece
    try:
        found = sample(ckpt.catalog, DENSE, "master", {"out": slice(0, rows), "in": slice(0, columns)}, (down, across))
    finally:
        sampled.PIECE = before
    assert found.values.shape[0] <= down
    assert found.values.shape[1] <= across
    for (i, j), value in np.ndenumerate(found.values):
        (a, b) = found.steps
        of = whole[i * a : (i + 1) * a, j * b : (j + 1) * b]
        assert abs(value) == np.abs(of).max()
        assert whole[found.rows[i, j], found.columns[i, j]] == value
    assert (found.lowest, found.highest) == (whole.min(), whole.max())


def test_values_of_a_window_are_written_in_their_cells() -> None:
    catalog = ckptlab.open(GPT).catalog
    drawing = viz.values(catalog, DENSE, "master", where={"out": slice(28, 34), "in": slice(2, 6)})
    assert_well_formed(drawing.svg)
    whole = np.asarray(ckptlab.open(GPT).full("master", stack=False)[DENSE].values)
    found = cells(drawing, "value")
    assert len(found) == 24
    for cell in found:
        i, j = map(int, cell.get("data-start", "").split(","))
        said = re.match(rf"\[{i}, {j}\] = (\S+) · rank \d · bf16_zero_pp_rank_\d_mp_rank_0\d_optim", tip(cell))
        assert said
        assert float(said[1]) == pytest.approx(float(whole[i, j]), rel=1e-8)
        (rank,) = numbers(cell.get("data-rank"))
        at = catalog.mesh.coordinate(rank)
        assert (at["pp"], at["tp"]) == (0, i // 32)  # 32 rows each; dp cuts the flattened shard
    assert {rank for c in found for rank in numbers(c.get("data-rank"))} == {0, 1, 2}
    (cut,) = re.findall(r'<path d="([^"]*)" class="cut', drawing.svg)
    assert cut.count("H") == 2  # dp within tp 0, and tp


def test_large_tensors_are_few_cells_and_say_so() -> None:
    drawing = viz.values(ckptlab.open(GPT), "tied_modules.embed.word_embeddings.weight", "master", width=500)
    assert drawing.width <= 500
    said = " ".join(texts(drawing, "note"))
    assert "101 × 16 elements in 51 × 16 cells: each shows the largest in size of 2 × 1" in said
    narrow = viz.values(ckptlab.open(GPT), "tied_modules.embed.word_embeddings.weight", "master", width=160)
    assert "of 2 × 2" in " ".join(texts(narrow, "note"))


def test_what_is_no_number_stands_out(tmp_path: Path) -> None:
    step = tmp_path / "plain"
    shutil.copytree(DATA / "plain_zero2_dp2", step)
    catalog = ckptlab.open(step).catalog
    name = next(n for n, t in catalog.tensors.items() if len(t.shape) == 2)
    found = sample(catalog, name, "master")
    place = found.places[found.place[1, 2]]
    assert place.stored is not None
    with open(place.stored.path, "r+b") as file:
        file.seek(place.byte(int(found.at[1, 2])) or 0)
        file.write(np.float32(np.nan).tobytes())
    again = sample(catalog, name, "master", None, (1, 1))
    assert np.isnan(again.values[0, 0])
    assert (again.index(0, 0), again.nan) == ((1, 2), 1)
    assert any("1 NaN" in note for note in texts(viz.values(catalog, name, "master")))


def test_values_that_are_not_there_are_refused_in_a_line() -> None:
    catalog = ckptlab.open(GPT).catalog
    with pytest.raises(InputError, match="no dim 'up' to look at: it has out, in"):
        viz.values(catalog, DENSE, where={"up": 3})
    with pytest.raises(InputError, match="out 64 is not among the 64"):
        viz.values(catalog, DENSE, where={"out": 64})
    with pytest.raises(InputError, match="takes a slice of step 1"):
        viz.values(catalog, DENSE, where={"out": slice(0, 9, 2)})
    with pytest.raises(ckptlab.UnsupportedError, match="there are no values"):
        viz.values(ckptlab.paper_model(Mesh(tp=2), 1, layers=1, hidden=8, heads=2), "word_embeddings.weight")


# ---------------------------------------------------------------- in the page


@pytest.fixture
def explorer() -> Any:
    pytest.importorskip("anywidget")
    made = ckptlab.explore(ckptlab.open(GPT))
    yield made
    made.close_all()


def test_the_page_is_sent_what_tells_every_element(explorer: Any) -> None:
    explorer.choose(tensor=DENSE, tab="Values", window=[[30, 34], [0, 16]])
    told = explorer.shown("values.map")["grid"]
    assert (told["cells"], told["dims"], told["window"]) == ([4, 16], ["out", "in"], [[30, 34], [0, 16]])
    values = np.frombuffer(base64.b64decode(told["values"]), "<f8").reshape(4, 16)
    whole = np.asarray(ckptlab.open(GPT).full("master", stack=False)[DENSE].values)
    assert np.array_equal(values, whole[30:34].astype(np.float64))
    place = np.frombuffer(base64.b64decode(told["place"]), "<i4").reshape(4, 16)
    assert [told["places"][k]["ranks"] for k in place[:, 0]] == [[2], [2], [1], [1]]
    assert 'where={"out": slice(30, 34)}' in explorer.shown("line.Values")
    drawing = eval(explorer.shown("line.Values"), {"ckptlab": ckptlab})
    assert "30" in texts(drawing)


def test_a_window_that_another_tensor_has_not_is_let_go(explorer: Any) -> None:
    explorer.choose(tensor=DENSE, tab="Values", window=[[30, 64], [0, 16]])
    explorer.tensor = "2.mlp.dense_h_to_4h.bias"
    assert explorer.window == []
    assert "grid" in explorer.shown("values.map")


def test_what_cannot_be_read_is_said_in_the_page(explorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_: Any) -> None:
        raise OSError("no such file")

    monkeypatch.setattr(page_numbers, "sample", gone)
    explorer.tab = "Values"
    assert explorer.shown("values.map") == {"svg": '<div class="refused">No such file</div>'}


def test_what_has_no_values_has_no_such_tab() -> None:
    pytest.importorskip("anywidget")
    paper = ckptlab.explore(ckptlab.paper_model(Mesh(tp=2), 1, layers=1, hidden=8, heads=2))
    assert "Values" not in paper.plan["tabs"]
    with pytest.raises(ckptlab.CheckpointError, match="no tab 'Values'"):
        paper.tab = "Values"
    paper.close_all()
