"""Pictures from plain numbers: well-formed, self-contained, the same every time, many as few without losing any."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from xml.etree.ElementTree import fromstring

import numpy as np
import pytest
from drawn import cells, numbers, overlap, texts, tip
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptlab import draw
from ckptlab.draw import Axes, Bar, Box, Drawing, Edge, Piece, Ranks, Side, Stack
from ckptlab.draw.blocks import blocks, thinned
from ckptlab.draw.colours import PALETTE, SHADE, colour, ink, strength
from ckptlab.draw.edge import HOLDERS, STRIPS
from ckptlab.draw.svg import tail, width_of

EVIL = "\"><script>alert(1)</script>\x00\ue000]]>&'"


def edge(name: str, size: int, tp: int, repeats: int = 1, **fields: object) -> Edge:
    """A dim that tp cuts evenly, in `repeats` rounds."""
    width = size // (tp * repeats)
    held = [np.array([[(r * tp + k) * width, width] for r in range(repeats)]) for k in range(tp)]
    return Edge(name, size, size, Axes(("tp",), (tp,)), held, **fields)  # type: ignore[arg-type]


def every_kind(name: str) -> list[Drawing]:
    """One of each picture, with a name in every place that takes one."""
    side = Side(name, [name, name], [range(1), range(1, 2)])
    return [
        draw.grid(Ranks({"pp": 2, "dp": 2, "tp": 2}, (["pp"], ["dp"], ["tp"]), (), [[0, 1]], name), title=name),
        draw.sheet([edge(name, 4, 2, parts=[(name, 2), (name, 2)])], title=name, notation=name, notes=[name]),
        draw.strips([Bar(name, 10, [Piece(name, 0, 6, 0, (True, True), {"from": name})])], title=name, notes=[name]),
        draw.pipeline([(name, [Box(name, 3, name, name, {"tensor": name})]), (name, [Box(name, 3, "", name)])]),
        draw.bars([Stack(name, {name: 5}, {"rank": name})], title=name, notes=[name]),
        draw.matrix(draw.Traffic([[1, 0], [2, 3]], [[1, 0], [0, 1]], side, side), title=name, notes=[name]),
    ]


# SVG


@pytest.mark.parametrize("drawing", every_kind(EVIL), ids=lambda d: fromstring(d.svg).get("aria-label", "")[:3])
def test_whatever_names_hold_stays_text(drawing: Drawing) -> None:
    root = fromstring(drawing.svg)
    assert not [e for e in root.iter() if e.tag.endswith("script")]
    assert "alert(1)" in "".join(root.itertext())
    assert not any("alert" in value and name == "id" for e in root.iter() for name, value in e.attrib.items())


def test_drawings_fetch_nothing_and_run_nothing() -> None:
    for drawing in every_kind("w"):
        page = drawing._repr_html_()
        assert "http" not in page
        assert "<script" not in page
        assert "url(" not in page.replace("url(#", "")


def test_what_is_referred_to_is_there_and_belongs_to_one_drawing() -> None:
    ids: list[set[str]] = []
    for drawing in every_kind("w"):
        root = fromstring(drawing.svg)
        own = {e.get("id") for e in root.iter() if e.get("id")}
        used = {value[5:-1] for e in root.iter() for value in e.attrib.values() if value.startswith("url(#")}
        assert used <= own
        ids.append({i for i in own if i})
    assert len(set().union(*ids)) == sum(map(len, ids))


@pytest.mark.slow
def test_the_same_numbers_give_the_same_text_in_every_process() -> None:
    script = "import test_draw as t; print(*[d.svg for d in t.every_kind('w')])"
    runs = []
    for seed in ("1", "2"):
        env = {"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
        runs.append(done.stdout)
    assert runs[0] == runs[1] == " ".join(d.svg for d in every_kind("w")) + "\n"


def test_a_file_stands_alone(tmp_path: object) -> None:
    path = f"{tmp_path}/mesh.svg"
    drawing = every_kind("w")[0]
    drawing.save(path)
    with open(path, encoding="utf-8") as file:
        saved = file.read()
    assert fromstring(saved).get("width") == str(drawing.width)
    assert "prefers-color-scheme" in saved


def test_all_cells_have_tooltips_and_lie_within_the_picture() -> None:
    for drawing in every_kind("weight"):
        assert cells(drawing, "cell")
        for cell in cells(drawing, "cell"):
            assert tip(cell)
            assert float(cell.get("x", "")) + float(cell.get("width", "")) <= drawing.width
            assert float(cell.get("y", "")) + float(cell.get("height", "")) <= drawing.height


def test_names_lose_their_beginning() -> None:
    name = "tied_modules.embed.word_embeddings.weight"
    assert tail(name, 1000) == name
    assert tail(name, width_of("x") * 25) == "…word_embeddings.weight"
    assert tail("a.position_embeddings.weight", width_of("x") * 20) == "…n_embeddings.weight"
    assert len(tail("x" * 100, width_of("x") * 20)) == 20


# Colours


def _linear(c: float) -> float:
    return c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4


def luminance(rgb: np.ndarray) -> float:
    return float(np.array([0.2126, 0.7152, 0.0722]) @ [_linear(c) for c in rgb])


def rgb(colour: str) -> np.ndarray:
    return np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def contrast(a: np.ndarray, b: np.ndarray) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("k", range(24))
def test_labels_stand_out_on_their_colour(k: int) -> None:
    letters = {"white": rgb("#ffffff"), "black": rgb("#000000")}[ink(colour(k))]
    assert contrast(rgb(colour(k)), letters) >= 4.5


@pytest.mark.parametrize(("page", "letters"), [("#ffffff", "#1f2328"), ("#111318", "#e6edf3")], ids=["light", "dark"])
def test_figures_stay_legible_on_every_shade(page: str, letters: str) -> None:
    for share in (0.01, 0.3, 0.6, 1.0):
        under = rgb(page) * (1 - strength(share)) + rgb(SHADE) * strength(share)
        assert contrast(under, rgb(letters)) >= 4.5


# Machado, Oliveira and Fernandes (2009), severity 1: how each kind of dichromat sees linear RGB.
SEEN = {
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("kind", SEEN)
def test_colours_differ_for_every_colour_vision(kind: str) -> None:
    seen = [np.clip(np.array(SEEN[kind]) @ [_linear(c) for c in rgb(c)], 0, 1) for c in PALETTE]
    cube = [np.cbrt(s) for s in seen]  # roughly as lightness is felt
    apart = [np.linalg.norm(cube[i] - cube[j]) for i in range(len(cube)) for j in range(i)]
    assert min(apart) > 0.08


def test_the_palette_repeats_in_other_strengths() -> None:
    assert len({colour(k) for k in range(24)}) == 24


# Many as few


@given(st.integers(1, 5000), st.integers(1, 40))
def test_blocks_are_all_of_it_in_order(n: int, most: int) -> None:
    found = blocks(n, most)
    assert [i for block in found for i in block] == list(range(n))
    assert len(found) <= most


@given(st.lists(st.integers(1, 600), min_size=3, max_size=3))
def test_thinned_keeps_to_its_limits(shape: list[int]) -> None:
    found = thinned(shape, (8, 16, 8), 128)
    assert math.prod(map(len, found)) <= 128
    assert [sum(map(len, axis)) for axis in found] == shape
    assert all(len(axis) <= limit for axis, limit in zip(found, (8, 16, 8), strict=True))


@given(st.integers(1, 24), st.integers(1, 60), st.integers(1, 5))
@settings(deadline=None)
def test_strips_give_every_holder_what_it_holds(tp: int, repeats: int, width: int) -> None:
    made = edge("out", tp * repeats * width, tp, repeats)
    assert sum(s.length for s in made.strips) == made.size
    assert [s.start for s in made.strips] == np.cumsum([0, *(s.length for s in made.strips)])[:-1].tolist()
    for i, block in enumerate(made.blocks):
        assert sum(s.length for s in made.strips if i in s.holders) == len(block) * repeats * width
    assert len(made.blocks) <= HOLDERS
    if tp <= HOLDERS:
        assert made.folded == (tp * repeats if tp > 1 and tp * repeats > STRIPS else 0)


@pytest.mark.slow
def test_thousands_of_strips_are_few_and_the_picture_says_so() -> None:
    drawing = draw.sheet([edge("out", 1 << 20, 4, 1 << 16), edge("in", 8, 1)])
    assert len(cells(drawing, "piece")) == 64
    assert any("262,144 strips" in note for note in texts(drawing, "note"))


def test_pieces_too_thin_are_one_cell_with_their_number() -> None:
    pieces = [Piece("big", 0, 1_000_000, 0), *(Piece(f"t{i}", 1_000_000 + i, 1, i + 1) for i in range(500))]
    drawing = draw.strips([Bar("dp 0", 1_000_500, pieces)])
    merged = cells(drawing, "merged")
    assert [c.get("data-tensors") for c in merged] == ["500"]
    assert merged[0].get("data-count") == "500"
    assert any(note.startswith("500 pieces are too thin") for note in texts(drawing, "note"))


def test_names_that_do_not_fit_are_listed_under_their_number() -> None:
    drawing = draw.strips([Bar("dp 0", 100, [Piece("short", 0, 90, 0), Piece("a.very.long.name.weight", 90, 10, 1)])])
    assert "short" in texts(drawing)
    assert "2 · a.very.long.name.weight" in texts(drawing, "legend")
    assert not any(t.endswith("short") for t in texts(drawing, "legend"))


def test_gaps_are_padding() -> None:
    drawing = draw.strips([Bar("dp 0", 100, [Piece("a", 10, 20, 0), Piece("b", 50, 20, 1)])])
    spans = [(c.get("data-start"), c.get("data-count")) for c in cells(drawing, "padding")]
    assert spans == [("0", "10"), ("30", "20"), ("70", "30")]
    assert not overlap(cells(drawing, "cell"))


# Labels


def test_axes_say_which_coordinates() -> None:
    axes = Axes(("edp", "ep"), (2, 4))
    assert axes.label([0, 1, 2, 3]) == "edp 0 ep 0–3"
    assert axes.data([0, 4]) == {"edp": "0-1", "ep": "0"}
    assert numbers(axes.data([1, 2])["ep"]) == {1, 2}
    assert axes.where({"ep": 1}) == {1, 5}
    assert Axes(("tp",), (1,)).label([0]) == ""
    assert Axes((), ()).data([0]) == {}


def test_nothing_to_draw_is_a_drawing_too() -> None:
    for drawing in (draw.sheet([]), draw.strips([]), draw.pipeline([]), draw.bars([]), draw.sheet([edge("out", 0, 2)])):
        assert fromstring(drawing.svg) is not None


def test_a_limit_is_a_line_where_a_bar_reaches_it() -> None:
    stacks = [draw.Stack("a", {"weights": 200}), draw.Stack("b", {"weights": 50})]
    drawing = draw.bars(stacks, limit=100)
    (line,) = re.findall(r'd="M([\d.]+) [\d.]+V[\d.]+" class="limit', drawing.svg)
    (long, _) = cells(drawing, "amount")
    assert float(line) == pytest.approx(float(long.get("x", "")) + float(long.get("width", "")) / 2, abs=0.1)
    assert "limit" not in draw.bars(stacks, limit=300).svg
