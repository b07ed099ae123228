"""Drawings say what is so: cells are counted, areas compared with what a cut holds, labels and notes read back."""

from __future__ import annotations

import math
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3
from drawn import area, box, cells, elements, numbers, overlap, paths, texts, tip
from helpers.files import refuse_reading
from helpers.html import assert_well_formed
from hypothesis import given, settings
from hypothesis import strategies as st

import ckptlab
from ckptlab import Layout, LayoutError, Mesh, MeshError, viz
from ckptlab.draw import Drawing, Side, Traffic, matrix
from ckptlab.draw.svg import width_of
from ckptlab.plan import FlatBuffer
from ckptlab.sharding import families
from ckptlab.testing.families import example

ROOT = Path(__file__).resolve().parents[1]
GQA = Layout("((tp q) + (tp k) + (tp v)) in", totals={"q": 32, "k": 16, "v": 16})
MQA = Layout("((tp q) + k + v) in", totals={"q": 32, "k": 16, "v": 16})


# Meshes


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
@settings(deadline=None, max_examples=30)
def test_every_rank_of_a_small_mesh_has_a_cell_at_its_coordinate(pp: int, dp: int, tp: int) -> None:
    mesh = Mesh(pp=pp, dp=dp, tp=tp)
    found = cells(viz.mesh(mesh), "rank")
    assert [int(c.get("data-rank", "")) for c in found] == list(range(mesh.size))
    for cell in found:
        at = {axis: int(cell.get(f"data-{axis}", "")) for axis in ("pp", "dp", "tp")}
        assert mesh.rank(**at) == int(cell.get("data-rank", ""))
    assert not overlap(found)
    assert texts(viz.mesh(mesh), "title") == [mesh.title()]


@pytest.mark.parametrize(
    "mesh", [Mesh(tp=8, pp=8, dp=8), Mesh(dp=512), Mesh(tp=512), Mesh(tp=4, pp=2, dp=64), Mesh(pp=512)], ids=str
)
def test_512_ranks_are_few_cells_that_stand_for_all(mesh: Mesh) -> None:
    drawing = viz.mesh(mesh, highlight=77)
    found = cells(drawing, "rank")
    assert len(found) <= 128
    assert sorted(r for c in found for r in numbers(c.get("data-rank"))) == list(range(512))
    assert any(f"512 ranks in {len(found)} cells" in note for note in texts(drawing, "note"))
    assert [77 in numbers(c.get("data-rank")) for c in cells(drawing, "marked")] == [True]


@pytest.mark.parametrize("axis", ["tp", "pp", "dp", "edp", "ep"])
def test_groups_are_framed_with_all_their_ranks_and_no_others(axis: str) -> None:
    mesh = Mesh(tp=3, pp=2, dp=4).split("dp", edp=2, ep=2)
    drawing = viz.mesh(mesh, group=axis)
    groups = mesh.groups(axis)
    for cell in cells(drawing, "rank"):
        assert int(cell.get("data-rank", "")) in groups[int(cell.get("data-group", ""))]
    framed: dict[int, set[int]] = {}
    for frame in cells(drawing, "group"):
        x0, y0, x1, y1 = box(frame)
        inside = {
            int(c.get("data-rank", ""))
            for c in cells(drawing, "rank")
            if x0 <= box(c)[0] and y0 <= box(c)[1] and box(c)[2] <= x1 and box(c)[3] <= y1
        }
        framed.setdefault(int(frame.get("data-group", "")), set()).update(inside)
    assert framed == {i: set(group) for i, group in enumerate(groups)}


def test_a_coordinate_marks_all_ranks_that_have_it() -> None:
    mesh = Mesh(tp=2, pp=2, dp=2)
    drawing = viz.mesh(mesh, highlight={"tp": 1})
    assert [int(c.get("data-rank", "")) for c in cells(drawing, "marked")] == mesh.ranks(tp=1)
    assert len(cells(drawing, "dimmed")) == 4


def test_parts_of_a_split_axis_and_further_axes_are_told() -> None:
    drawing = viz.mesh(Mesh(tp=2, dp=4).split("dp", edp=2, ep=2), group="ep")
    assert [c.get("data-ep") for c in cells(drawing, "rank")] == ["0", "0", "1", "1"] * 2
    assert "edp 1 ep 0" in texts(drawing, "row-label")
    assert len({c.get("data-cp") for c in cells(viz.mesh(Mesh(cp=2, pp=2)), "rank")}) == 2


def test_ranks_and_axes_that_are_not_there_are_refused() -> None:
    with pytest.raises(MeshError):
        viz.mesh(Mesh(tp=2), highlight=2)
    with pytest.raises(MeshError):
        viz.mesh(Mesh(tp=2), group="ep")


# Tensors


KINDS = [
    "column",
    "row",
    "fused",
    "parts",
    "replicated",
    "uneven",
    "padded",
    "interleaved",
    "plane",
    "experts",
    "vector",
]


@st.composite
def cut_tensors(draw: st.DrawFn) -> tuple[Layout, tuple[int, ...], Mesh]:
    """Layouts of every kind with a shape and a mesh that they fit: even, uneven, padded, fused, replicated in part."""
    tp, n, m = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(KINDS))
    mesh = Mesh(tp=tp, dp=2, pp=draw(st.integers(1, 2)))
    match kind:
        case "column":
            return Layout("(tp out) in"), (tp * n, m), mesh
        case "row":
            return Layout("out (tp in)"), (m, tp * n), mesh
        case "fused":
            return Layout("(3 tp out) in"), (3 * tp * n, m), mesh
        case "parts":
            return Layout("((tp q) + (tp k)) in", sizes={"q": n, "k": 1}), (tp * (n + 1), m), mesh
        case "replicated":
            return Layout("((tp q) + k) in", sizes={"q": n, "k": 2}), (tp * n + 2, m), mesh
        case "uneven":
            widths = draw(st.lists(st.integers(0, 5), min_size=tp, max_size=tp).filter(any))
            return Layout("(tp out) in", sizes={"out": widths}), (sum(widths), m), mesh
        case "padded":
            true = draw(st.integers(1, tp * n))
            return Layout("(tp out) in", padded={0: tp * n}), (true, m), mesh
        case "interleaved":
            return Layout("(head tp d) in", sizes={"head": m}), (m * tp * n, 3), mesh
        case "plane":
            return Layout("(tp out) (dp in)"), (tp * n, 2 * m), mesh
        case "experts":
            return Layout("(ep expert) (tp out) in"), (4, tp * n, m), Mesh(tp=tp, dp=4).split("dp", edp=2, ep=2)
        case _:
            return Layout("(tp out)"), (tp * n,), mesh


@given(cut_tensors())
@settings(deadline=None, max_examples=200)
def test_areas_are_what_each_coordinate_holds(made: tuple[Layout, tuple[int, ...], Mesh]) -> None:
    layout, shape, mesh = made
    cut = layout.resolve(shape, mesh)
    drawing = viz.tensor(layout, shape, mesh)
    pieces = cells(drawing, "piece")
    per_element = sum(map(area, pieces)) / math.prod(cut.shape)
    for at in cut.coordinates():
        mine = [
            p for p in pieces if all(k in numbers(p.get(f"data-{axis}")) for axis, k in zip(cut.axes, at, strict=True))
        ]
        held = math.prod(cut.shard_shape(at))
        assert sum(map(area, mine)) == pytest.approx(held * per_element, rel=0.01, abs=0.02 * len(mine))
        assert sum(int(p.get("data-count", "")) for p in mine) == held
    padding = math.prod(cut.shape) - math.prod(shape)
    assert sum(int(p.get("data-count", "")) for p in pieces if "padding" in p.get("class", "")) == padding
    assert not overlap(pieces) or len(pieces) > 300
    (whole,) = cells(drawing, "whole")
    assert sum(map(area, pieces)) == pytest.approx(area(whole), rel=0.01)


@given(cut_tensors(), st.data())
@settings(deadline=None, max_examples=60)
def test_what_is_marked_is_what_the_rank_holds_and_its_shard_is_as_large(
    made: tuple[Layout, tuple[int, ...], Mesh], data: st.DataObject
) -> None:
    layout, shape, mesh = made
    cut = layout.resolve(shape, mesh)
    rank = mesh.coordinate(data.draw(st.integers(0, mesh.size - 1)))
    drawing = viz.tensor(layout, shape, mesh, rank=rank)
    held = math.prod(cut.shard_shape(cut.coordinate(rank)))
    assert sum(int(c.get("data-count", "")) for c in cells(drawing, "marked")) == held
    marked, shard = (sum(map(area, cells(drawing, kind))) for kind in ("marked", "shard"))
    assert shard == pytest.approx(marked, rel=0.01, abs=2)
    said = " × ".join(f"{n:,}" for n in cut.shard_shape(cut.coordinate(rank)))
    assert texts(drawing, "shard-label")[0].endswith(f"holds {said}")


def test_parts_are_framed_named_and_as_long_as_they_are() -> None:
    drawing = viz.tensor(GQA, (64, 32), Mesh(tp=4), name="qkv")
    parts = {c.get("data-part"): c for c in cells(drawing, "part")}
    (whole,) = cells(drawing, "whole")
    assert {name: round(64 * area(c) / area(whole)) for name, c in parts.items()} == {"q": 32, "k": 16, "v": 16}
    assert texts(drawing, "part-label") == ["q 32", "k 16", "v 16"]
    assert len(cells(drawing, "piece")) == 12
    assert [c.get("data-part") for c in cells(drawing, "piece")] == ["q"] * 4 + ["k"] * 4 + ["v"] * 4
    assert {"qkv", "((tp q) + (tp k) + (tp v)) in", "in 32", "dim0 64"} <= set(texts(drawing))


def test_parts_that_all_hold_are_striped_and_say_so() -> None:
    drawing = viz.tensor(MQA, (64, 32), Mesh(tp=4))
    shared = cells(drawing, "replicated")
    assert [c.get("data-part") for c in shared] == ["k", "v"]
    assert all(c.get("data-tp") == "0-3" and c.get("fill", "").startswith("url(#") for c in shared)
    assert all("each holds it" in tip(c) for c in shared)


def test_equal_parts_of_a_fused_tensor() -> None:
    drawing = viz.tensor("(3 tp out) in", (96, 32), Mesh(tp=2))
    assert texts(drawing, "part-label") == ["part 0 32", "part 1 32", "part 2 32"]
    assert [c.get("data-tp") for c in cells(drawing, "piece")] == ["0", "1"] * 3


def test_padding_is_hatched_and_counted() -> None:
    drawing = viz.tensor(Layout("(tp out) in", padded={0: 112}), (101, 16), Mesh(tp=2))
    (padding,) = cells(drawing, "padding")
    assert padding.get("data-start") == "101,0"
    assert padding.get("data-count") == str(11 * 16)
    assert "hatched: 11 of 112 out are padding" in texts(drawing, "note")
    assert any("hatch" in e.get("fill", "") for e in elements(drawing))


def test_copies_lie_behind_and_are_told() -> None:
    drawing = viz.tensor("(tp out) in", (8, 4), Mesh(tp=2, dp=3, pp=2))
    assert len(paths(drawing, "copy")) == 2
    assert "each piece is held alike by 3 ranks (dp 3)" in texts(drawing, "note")
    assert not paths(viz.tensor("(tp out) in", (8, 4), Mesh(tp=2, pp=2)), "copy")
    whole = viz.tensor("out in", (8, 4), Mesh(tp=2))
    assert len(cells(whole, "piece")) == 1
    assert "every rank" in texts(whole)


def test_512_coordinates_are_blocks_and_the_picture_says_so() -> None:
    drawing = viz.tensor("(tp out) in", (4096, 64), Mesh(tp=512))
    assert len(cells(drawing, "piece")) == 16
    assert "out: 512 coordinates in 16 blocks of 32" in texts(drawing, "note")
    assert "tp 0–31" in texts(drawing)


def test_sizes_stand_at_the_edges() -> None:
    drawing = viz.tensor(Layout("(tp out) in", sizes={"out": (3, 3, 2, 2)}), (10, 6), Mesh(tp=4))
    assert texts(drawing, "dim") == ["out 10", "in 6"]
    assert texts(drawing, "length") == ["3", "3", "2", "2"]


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4, 5), (0, 4)])
def test_any_number_of_dims(shape: tuple[int, ...]) -> None:
    names = " ".join(f"d{i}" for i in range(len(shape)))
    drawing = viz.tensor(names, shape, Mesh(tp=2))
    assert len(cells(drawing, "piece")) == (0 if 0 in shape else 1)
    told = " ".join(texts(drawing))
    assert all(f"d{i} {n}" in told for i, n in enumerate(shape))


def test_a_piece_of_several_parts_has_the_names_of_all() -> None:
    layout = Layout("((tp q) + k + v) in", totals={"q": 64, "k": 8, "v": 8})
    drawing = viz.tensor(layout, (80, 64), Mesh(tp=4), rank={"tp": 1})
    assert {"q: dim0 16–31", "k, v: dim0 64–79"} <= set(texts(drawing))


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(LayoutError):
        viz.tensor("(tp out) in", (7, 4), Mesh(tp=2))


# Flat buffers


@given(
    st.lists(st.integers(0, 400), min_size=1, max_size=12),
    st.integers(1, 5),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_fragments_are_as_wide_as_they_are_long(counts: list[int], dp: int, zero3: bool) -> None:
    names = [f"t{i}" for i in range(len(counts))]
    buffer = FlatBuffer.per_tensor(names, counts, dp) if zero3 else FlatBuffer.contiguous(names, counts, dp)
    drawing = viz.flat(buffer)
    assert len(cells(drawing, "bar")) == dp
    found = cells(drawing, "fragment")
    for d in range(dp):
        mine = [c for c in found if c.get("data-dp") == str(d)]
        within = buffer.within(d)
        assert sum(int(c.get("data-count", "")) for c in mine) == within[:, 3].sum()
        hatched = [c for c in cells(drawing, "padding") if c.get("data-dp") == str(d)]
        assert sum(int(c.get("data-count", "")) for c in [*mine, *hatched]) == buffer.size(d)
        for cell in mine + hatched:
            share = float(cell.get("width", "")) / float(cells(drawing, "bar")[d].get("width", "1"))
            span = int(cell.get("data-count", "")) / buffer.size(d)
            assert share == pytest.approx(span, abs=1e-3) or cell.get("data-tensors")
    assert not overlap([*found, *cells(drawing, "padding")])


def test_one_element_of_padding_is_one() -> None:
    notes = texts(viz.flat(FlatBuffer.contiguous(["a"], [7], 2)), "note")
    assert "hatched: padding, 1 element in all" in notes


def test_a_tensor_across_a_border_is_torn_on_both_sides() -> None:
    drawing = viz.flat(FlatBuffer.contiguous(["a", "b", "c"], [6, 10, 4], 2))
    torn = [(c.get("data-tensor"), c.get("data-dp"), c.get("data-from")) for c in cells(drawing, "fragment")]
    assert torn == [("a", "0", "0"), ("b", "0", "0"), ("b", "1", "4"), ("c", "1", "0")]
    assert len([e for e in elements(drawing) if "tear" in e.get("class", "")]) == 2
    alone = viz.flat(FlatBuffer.contiguous(["a", "b", "c"], [6, 10, 4], 2), dp=1)
    assert texts(alone, "bar-label") == ["dp 1"]


def test_the_whole_buffer_shows_where_dp_cuts_it() -> None:
    buffer = FlatBuffer.contiguous(["a", "b", "c"], [6, 10, 3], 4)
    drawing = viz.flat(buffer)
    spans = cells(drawing, "span")
    assert [(c.get("data-tensor"), c.get("data-count")) for c in spans] == [
        ("a", "6"),
        ("b", "10"),
        ("c", "3"),
        (None, str(buffer.total - 19)),
    ]
    (whole,) = cells(drawing, "whole")
    x0, _, x1, _ = box(whole)
    cuts = [e for e in elements(drawing) if "cut" in e.get("class", "").split()]
    places = [float(re.match(r"M([\d.]+)", e.get("d", ""))[1]) for e in cuts]  # type: ignore[index]
    assert [round((x - x0) / (x1 - x0) * 4, 2) for x in places] == [1, 2, 3]
    assert not cells(viz.flat(buffer, dp=1), "span")
    assert not cells(viz.flat(FlatBuffer.per_tensor(["a"], [9], 2)), "span")


def test_experts_lie_over_edp_and_the_picture_says_so() -> None:
    groups = ckptlab.open(DATA / "moe_ep2_dp4").catalog.flat_groups
    drawing = viz.flat(next(group for group in groups if group.over == "edp"))
    assert texts(drawing, "bar-label") == ["edp 0", "edp 1"]
    assert {(c.get("data-edp"), c.get("data-dp")) for c in cells(drawing, "fragment")} == {("0", None), ("1", None)}
    assert texts(drawing, "title") == ["group 2 · pp 0 · ep 0 · tp 0: 8 tensors, 4,440 elements over edp 2"]


def test_of_512_dp_ranks_a_few_are_drawn_and_the_picture_says_so() -> None:
    drawing = viz.flat(FlatBuffer.contiguous(["a"], [1 << 20], 512))
    assert texts(drawing, "bar-label") == ["dp 0", "dp 1", "dp 2", "dp 3", "dp 4", "dp 5", "dp 511"]
    assert "marked: of 511 cuts one in 8" in texts(drawing, "note")
    assert texts(drawing, "omitted") == ["… and 505 dp ranks, 6 to 510"]
    with pytest.raises(MeshError):
        viz.flat(FlatBuffer.contiguous(["a"], [8], 2), dp=2)


@pytest.mark.parametrize("path", [GPT, ZERO2, ZERO3], ids=lambda p: p.name)
def test_the_buffers_of_real_checkpoints(path: str) -> None:
    catalog = ckptlab.open(path).catalog
    for group in catalog.flat_groups:
        for tp in range(catalog.mesh.tp):
            drawing = viz.flat(group, tp=tp)
            named = {c.get("data-tensor") for c in cells(drawing, "fragment")} - {None}
            assert named <= set(group.names)
            assert any("master (float32)" in note for note in texts(drawing, "note"))


# Stages


def test_layers_stand_on_their_stages_and_tied_tensors_on_both() -> None:
    ckpt = ckptlab.open(GPT)
    drawing = viz.stages(ckpt.catalog)
    assert texts(drawing, "stage-label") == ["pp 0", "pp 1"]
    tied = cells(drawing, "tied")
    assert [(c.get("data-tensor"), c.get("data-pp")) for c in tied] == [
        ("tied_modules.embed.word_embeddings.weight", "0"),
        ("tied_modules.embed.position_embeddings.weight", "0"),
        ("tied_modules.embed.word_embeddings.weight", "1"),
        ("tied_modules.embed.position_embeddings.weight", "1"),
    ]
    assert {"layers 2–3", "layers 4–5", "layer 6"} <= set(texts(drawing, "box-label"))
    for stage in (0, 1):
        mine = [c for c in cells(drawing, "layer") if c.get("data-pp") == str(stage)]
        held = [t for t in ckpt.tensors.values() if stage in t.stages]
        assert sum(int(c.get("data-tensors", "")) for c in mine) == len(held)
        assert sum(int(c.get("data-elements", "")) for c in mine) == sum(t.numel for t in held)
    pairs = zip(cells(drawing, "share"), cells(drawing, "layer"), strict=True)
    shares = [(float(share.get("width", "")), int(c.get("data-elements", ""))) for share, c in pairs]
    assert len({round(width / count, 2) for width, count in shares if count > 100}) == 1


def test_many_stages_and_layers_are_few_columns_and_boxes() -> None:
    catalog = ckptlab.open(GPT).catalog
    one = catalog.tensors["2.mlp.dense_h_to_4h.weight"]
    tensors = {f"{i}.w{i}.weight": replace(one, name=f"{i}.w{i}.weight", stages=(i % 64,)) for i in range(4096)}
    drawing = viz.stages(replace(catalog, tensors=tensors, mesh=Mesh(pp=64)))
    assert texts(drawing, "stage-label") == [f"pp {8 * k}–{8 * k + 7}" for k in range(8)]
    assert "64 stages in 8 columns" in texts(drawing, "note")
    assert sum(int(c.get("data-tensors", "")) for c in cells(drawing, "layer")) == 4096
    assert len(cells(drawing, "layer")) <= 8 * 12


# Memory


@pytest.mark.parametrize("path", [GPT, ZERO2], ids=lambda p: p.name)
def test_memory_is_what_the_files_of_all_ranks_hold_and_gradients(path: str) -> None:
    catalog = ckptlab.open(path).catalog
    by_rank = viz.memory_by_rank(catalog)
    flat = module = 0
    for group in catalog.flat_groups:
        width = sum(dtype.itemsize for dtype in group.dtypes.values())
        flat += sum(buffer.total for buffer in group.flats.values()) * width
    for (name, state), places in catalog.stored.pieces.items():
        tensor = catalog.tensors[name]
        if state == "param" and tensor.kind != "buffer":
            # a tied tensor is listed where it is canonical; all its stages hold it
            copies = len(tensor.stages) // len({holder["pp"] for holder in places})
            module += copies * sum(f.stored.nbytes for fragments in places.values() for f in fragments)
    assert by_rank[:, 1:3].sum() == flat
    assert by_rank[:, 0].sum() == module * catalog.mesh.dp
    if path == GPT:  # BF16_Optimizer
        kept = sum(
            4 * buffer.total * catalog.mesh.dp for group in catalog.flat_groups for buffer in group.flats.values()
        )
        assert viz.memory(catalog).svg.count("memory by rank, float32 gradients whole on each dp rank")
    else:
        kept = sum(2 * buffer.total for group in catalog.flat_groups for buffer in group.flats.values())
        assert viz.memory(catalog).svg.count("memory by rank, bfloat16 gradients cut over dp")
    assert by_rank[:, viz.KINDS.index("gradients")].sum() == kept


def test_bars_are_as_long_as_their_bytes() -> None:
    reshaped = ckptlab.open(GPT).reshape(Mesh(tp=4, dp=2))
    drawing = viz.memory(reshaped.target)
    amounts = cells(drawing, "amount")
    assert len({round(float(c.get("width", "")) / int(c.get("data-bytes", "")), 4) for c in amounts}) == 1
    found = viz.memory_by_rank(reshaped.target)
    for rank in range(8):
        mine = [int(c.get("data-bytes", "")) for c in amounts if c.get("data-rank") == str(rank)]
        assert sum(mine) == found[rank].sum()
    assert texts(drawing, "legend") == ["module weights", "master weights", "moments", "gradients"]
    assert not overlap(amounts)


def test_memory_on_paper() -> None:
    drawing = viz.memory({"dp 0": {"weights": 1, "cache": 39}, "dp 1": {"weights": 10}})
    amounts = cells(drawing, "amount")
    told = [(c.get("data-rank"), c.get("data-kind"), c.get("data-bytes")) for c in amounts]
    assert told == [("0", "weights", "1"), ("0", "cache", "39"), ("1", "weights", "10")]
    assert len({round(float(c.get("width", "")) / int(c.get("data-bytes", "")), 3) for c in amounts}) == 1
    assert texts(drawing, "bar-label") == ["dp 0", "dp 1"]
    assert cells(viz.memory({}), "amount") == []


def test_a_kind_has_one_colour_whatever_else_there_is() -> None:
    whole, part = (viz.memory({"0": dict.fromkeys(kinds, 5)}) for kinds in (viz.KINDS, viz.KINDS[1:3]))
    fills = {c.get("data-kind"): c.get("fill") for c in cells(whole, "amount")}
    assert all(fills[c.get("data-kind")] == c.get("fill") for c in cells(part, "amount"))
    assert texts(part, "legend") == list(viz.KINDS[1:3])


def test_of_512_ranks_those_that_hold_alike_are_one_bar() -> None:
    alike = {f"rank {r}": {"weights": 10 + r // 256} for r in range(512)}
    drawing = viz.memory(alike)
    assert [sorted(numbers(c.get("data-rank"))) for c in cells(drawing, "amount")] == [
        list(range(256)),
        list(range(256, 512)),
    ]
    assert any("512 ranks in 2 bars" in note for note in texts(drawing, "note"))
    uneven = viz.memory({f"rank {r}": {"weights": 10 + r} for r in range(512)})
    found = cells(uneven, "amount")
    assert len(found) <= 24
    assert all(int(c.get("data-bytes", "")) == 10 + max(numbers(c.get("data-rank"))) for c in found)
    assert any("each the fullest of" in note for note in texts(uneven, "note"))


# Plans


def test_the_matrix_is_the_plan() -> None:
    reshaped = ckptlab.open(GPT).reshape(Mesh(tp=4, dp=2))
    drawing = viz.plan(reshaped.plan)
    found = np.zeros((8, 8), np.int64)
    kept = 0
    for cell in cells(drawing, "move"):
        found[int(cell.get("data-source", "")), int(cell.get("data-target", ""))] = int(cell.get("data-bytes", ""))
        kept += int(cell.get("data-kept", ""))
    assert found.tolist() == reshaped.plan.matrix().tolist()
    assert kept == reshaped.plan.sent - reshaped.plan.moved
    assert len(cells(drawing, "own")) == int((np.diag(found) > 0).sum())
    assert len(cells(drawing, "none")) == int((found == 0).sum())
    shades = [(int(c.get("data-bytes", "")), float(c.get("fill-opacity", ""))) for c in cells(drawing, "move")]
    assert [s for _, s in sorted(shades)] == sorted(s for _, s in shades)


@pytest.mark.parametrize("rows", [1, 2, 3, 8])
def test_the_name_of_few_rows_stays_off_title_and_notes(rows: int) -> None:
    side = Side("source rank", [str(k) for k in range(rows)], [range(k, k + 1) for k in range(rows)])
    other = Side("target rank", ["0"], [range(1)])
    drawing = matrix(Traffic([[1]] * rows, [[0]] * rows, side, other), title="a plan")
    (middle,) = re.findall(r"rotate\(-90 8\.0 ([\d.]+)\)[^>]*>from source rank", drawing.svg)
    half = width_of("from source rank") / 2
    (note,) = [float(y) for y in re.findall(r'y="([\d.]+)" class="quiet note"', drawing.svg)]
    assert float(middle) - half > 8 + 6
    assert float(middle) + half < note - 5


@pytest.mark.parametrize("mesh", [Mesh(tp=4, dp=32, pp=4), Mesh(tp=4, dp=128)], ids=str)
def test_512_targets_are_stages_or_blocks_and_the_picture_says_so(mesh: Mesh) -> None:
    reshaped = ckptlab.open(GPT).reshape(mesh)
    drawing = viz.plan(reshaped.plan, reshaped.source.mesh, mesh)
    moves = cells(drawing, "move")
    assert len(moves) == 8 * (4 if mesh.pp > 1 else 16)
    assert sum(int(c.get("data-bytes", "")) for c in moves) == reshaped.plan.sent
    assert sum(int(c.get("data-kept", "")) for c in moves) == reshaped.plan.sent - reshaped.plan.moved
    assert {r for c in moves for r in numbers(c.get("data-target"))} == set(range(512))
    said = "512 target ranks in 4 pp stages" if mesh.pp > 1 else "512 target ranks in 16 blocks"
    assert said in texts(drawing, "note")
    bare = viz.plan(reshaped.plan)
    assert sum(int(c.get("data-bytes", "")) for c in cells(bare, "move")) == reshaped.plan.sent


# Plots


def test_a_plot_has_every_rank() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    reshaped = ckptlab.open(GPT).reshape(Mesh(tp=4, dp=2))
    ax = viz.plot_memory(reshaped.target)
    found = viz.memory_by_rank(reshaped.target)
    heights = [[bar.get_height() for bar in bars] for bars in ax.containers]
    assert np.array(heights).T.tolist() == found[:, found.any(axis=0)].tolist()
    (image,) = viz.plot_plan(reshaped.plan, viz.plot_memory({})).images
    assert image.get_array().filled(0).tolist() == reshaped.plan.matrix().tolist()


# Reprs


def shown(page: str) -> str:
    assert_well_formed(page)
    return page


def test_everything_shows_itself_in_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    ckpt = ckptlab.open(GPT)
    refuse_reading(monkeypatch)
    reshaped = ckpt.reshape(Mesh(tp=4, dp=2))
    for value, pictures in (
        (Mesh(tp=2), 1),
        (GQA, 1),
        (GQA.resolve((64, 32), Mesh(tp=4)), 1),
        (reshaped.plan, 1),
        (ckpt, 3),
        (reshaped, 4),
        (ckptlab.open(GPT / "universal"), 0),
    ):
        assert shown(value._repr_html_()).count("<svg") == pictures


LAYOUTS = [
    "(tp out) in",
    "out (tp in)",
    "out in",
    "(3 tp out) in",
    "(tp head qkv d) in",
    "((tp q) + (tp k) + (tp v)) in",
    "((tp q) + k + v) in",
    "(ep expert) out in",
    "(tp out) (dp in)",
    "",
    GQA,
    MQA,
    Layout("(tp out) in", sizes={"out": (3, 3, 2)}, padded={0: 8}),
    Layout("(tp q) in", units={"q": 6}, totals={"q": 12}),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_layout_by_itself_is_shown_on_an_example(layout: Layout | str) -> None:
    made = Layout(layout) if isinstance(layout, str) else layout
    page = shown(made._repr_html_())
    assert "an example: shape" in page
    assert 'class="cell piece' in page


def test_a_layout_without_an_example_is_shown_as_text() -> None:
    page = shown(Layout("(tp q) in", sizes={"q": 3}, totals={"q": 7})._repr_html_())
    assert "no small example" in page


def test_drawings_load_nothing_heavy() -> None:
    script = (
        "import sys, ckptlab\n"
        "ckptlab.viz.tensor('(tp out) in', (8, 4), ckptlab.Mesh(tp=2))._repr_html_()\n"
        "ckptlab.Mesh(tp=2)._repr_html_()\n"
        "print([m for m in ('torch', 'jax', 'xarray', 'matplotlib', 'einx', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    bare = "import sys, ckptlab; print('numpy' in sys.modules, 'ckptlab.draw' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"


def test_draw_knows_nothing_of_the_rest() -> None:
    script = "import sys, ckptlab.draw; print(sorted(m for m in sys.modules if m.startswith('ckptlab.')))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(re.findall(r"ckptlab\.\w+", done.stdout)) == {
        f"ckptlab.{name}" for name in ("aliases", "arguments", "draw", "errors", "lazily", "words")
    }


def test_drawings_are_values() -> None:
    a, b = (viz.mesh(Mesh(tp=2)) for _ in range(2))
    assert a == b
    assert isinstance(a, Drawing)
    assert repr(a).startswith("<Drawing, ")
    assert a._repr_svg_() == a.svg


# Families


def test_parts_stand_where_the_notation_puts_them() -> None:
    """Each strip of the joined tensor has the rows that the same strip of its part goes to."""
    line = families.Join("qkv", "(kv (q d + d + d)) in", ("q", "k", "v"))
    parts, _ = example(line, {"kv": 2, "q": 3, "d": 4, "in": 2})
    rows = [array[:, 0] for array in parts.values()]
    whole = families.Family("", "", (line,)).arrays(parts, "left", kv=2, q=3, d=4)["qkv"][:, 0]
    drawn = cells(viz.family(line, kv=2, q=3, d=4), "piece")
    assert len(drawn) == 2 * (2 * 3 + 2 + 2)
    sides: dict[tuple[str | None, ...], list[tuple[int, int]]] = {}
    for cell in drawn:
        at = (int(cell.get("data-start", "")), int(cell.get("data-count", "")))
        sides.setdefault(tuple(cell.get(f"data-{name}") for name in ("part", "kv", "q")), []).append(at)
    for (part, *_), ((start, count), (there, same)) in sides.items():
        assert count == same == 4
        assert whole[start : start + 4].tolist() == rows[int(part or 0)][there : there + 4].tolist()


@pytest.mark.parametrize("name", families.FAMILIES.names())
def test_every_line_can_be_drawn(name: str) -> None:
    for line in families.FAMILIES.get(name).lines:
        drawing = viz.family(line)
        assert_well_formed(drawing.svg)
        colours = {cell.get("fill") for cell in cells(drawing, "piece")}
        assert len(colours) <= 8


# The gallery


def test_what_the_page_on_drawings_shows_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/drawings.md").read_text(), re.DOTALL)
    exec(block.replace("/tmp/", f"{tmp_path}/"), {})
    assert (tmp_path / "plan.svg").read_text().startswith("<svg xmlns=")


def test_every_picture_can_be_made_and_is_there() -> None:
    pictures = runpy.run_path(str(ROOT / "docs/gallery.py"))["PICTURES"]
    for name, make in pictures.items():
        assert "<svg" in shown(make())
        assert all((ROOT / f"docs/pictures/{name}_{theme}.png").exists() for theme in ("light", "dark"))
    named = re.findall(r"pictures/(\w+)_(?:light|dark)\.png", (ROOT / "docs/drawings.md").read_text())
    assert set(named) <= set(pictures)


# A mesh as a block, a plan as a flow


@pytest.mark.parametrize("mesh", [Mesh(tp=2, pp=2, dp=2), Mesh(tp=8), Mesh(tp=8, pp=8, dp=8), Mesh(pp=512)], ids=str)
@pytest.mark.parametrize("width", [None, 420])
def test_an_oblique_block_has_every_rank_and_its_node(mesh: Mesh, width: int | None) -> None:
    drawing = viz.mesh(mesh, oblique=True, node=8, width=width)
    assert_well_formed(drawing.svg)
    found = paths(drawing, "rank")
    assert len(found) <= 128
    assert sorted(r for c in found for r in numbers(c.get("data-rank"))) == list(range(mesh.size))
    for cell in found:
        ranks = numbers(cell.get("data-rank"))
        assert numbers(cell.get("data-group")) == {rank // 8 for rank in ranks}
        for axis in mesh.axes:
            assert numbers(cell.get(f"data-{axis}")) >= {mesh.coordinate(rank)[axis] for rank in ranks}
    framed = [numbers(frame.get("data-group")) for frame in paths(drawing, "group")]
    assert set().union(*framed) == set(range(-(-mesh.size // 8)))


def test_nodes_are_framed_in_the_grid_too_and_not_beside_groups() -> None:
    found = cells(viz.mesh(Mesh(tp=4, dp=4), node=8, highlight=3), "rank")
    assert [numbers(cell.get("data-group")) for cell in found] == [{0}] * 8 + [{1}] * 8
    with pytest.raises(ckptlab.CkptlabError, match="not both"):
        viz.mesh(Mesh(tp=4), group="tp", node=2)
    with pytest.raises(ckptlab.CkptlabError, match="at least 1"):
        viz.mesh(Mesh(tp=4), node=0)


@pytest.mark.parametrize("target", [Mesh(tp=4, dp=2), Mesh(tp=4, pp=4, dp=32)], ids=str)
def test_bands_of_a_flow_are_as_wide_as_they_carry_bytes(target: Mesh) -> None:
    reshaped = ckptlab.open(GPT).reshape(target)
    drawing = viz.flow(reshaped.plan, reshaped.source.mesh, target, width=500)
    assert_well_formed(drawing.svg)
    found = paths(drawing, "flow")
    assert sum(int(band.get("data-bytes", "")) for band in found) == reshaped.cost().read
    assert sum(int(b.get("data-bytes", "")) - int(b.get("data-kept", "")) for b in found) == reshaped.cost().moved
    boxes = [cell for cell in cells(drawing, "end") if int(cell.get("data-bytes", "")) > 5_000]
    scale = {round(float(b.get("height", "")) / int(b.get("data-bytes", "")), 6) for b in boxes}
    assert len(scale) == 1
    for band in found:
        high = float(re.findall(r"v([\d.]+)", band.get("d", ""))[0])
        assert high == pytest.approx(max(int(band.get("data-bytes", "")) * scale.copy().pop(), 0.4), abs=0.02)
    plan = cells(viz.plan(reshaped.plan, reshaped.source.mesh, target), "move")
    told = {(c.get("data-source"), c.get("data-target")): c.get("data-bytes") for c in plan}
    assert all(told[b.get("data-source"), b.get("data-target")] == b.get("data-bytes") for b in found)


# What lies in what a rank holds


def test_heads_and_their_q_k_v_are_drawn_in_what_a_rank_holds() -> None:
    layout = Layout("(tp head qkv d) in", sizes={"qkv": 3, "d": 16}, dims=("out", "in"))
    rows, columns = layout.blocks((384, 128), Mesh(tp=4))
    assert columns == []
    heads = [(start, length) for depth, name, start, length in rows if depth == 0 and name.startswith("head")]
    assert heads == [(48 * k, 48) for k in range(8)]
    assert [name for depth, name, *_ in rows if depth == 1] == ["q", "k", "v"] * 8
    drawing = viz.tensor(layout, (384, 128), Mesh(tp=4))
    assert texts(drawing, "inner-label").count("q") == 8
    assert [t for t in texts(drawing, "inner-label") if t.startswith("head")] == [f"head {k}" for k in range(8)]
    assert len(paths(drawing, "inner")) == 7 + 23  # heads' borders and those of q, k and v


def test_blocks_follow_the_notation() -> None:
    grouped = Layout("(tp kv (q d + d + d)) in", sizes={"kv": 1, "q": 2, "d": 8})
    (rows, _) = grouped.blocks((64, 16), Mesh(tp=2))
    assert [(n, a, k) for d, n, a, k in rows if d == 0] == [("kv 0", 0, 32), ("kv 1", 32, 32)]
    assert [(n, a, k) for d, n, a, k in rows if d == 1][:3] == [("q d", 0, 16), ("d", 16, 8), ("d", 24, 8)]
    assert [(n, a, k) for d, n, a, k in rows if d == 2] == [
        ("q 0", 0, 8),
        ("q 1", 8, 8),
        ("q 0", 32, 8),
        ("q 1", 40, 8),
    ]
    for plain in ("(tp out) in", "(3 tp out) in", "out in", "((tp q) + (tp k)) in"):
        of = Layout(plain, totals={"q": 32, "k": 16} if "+" in plain else {})
        assert of.blocks((48, 16), Mesh(tp=2)) == [[], []]
    assert Layout("(tp head d) in", sizes={"d": 2}).blocks((4096, 8), Mesh(tp=2))[0] == []


def test_of_two_cuts_whose_labels_do_not_fit_the_heads_stand_at_the_edges() -> None:
    drawing = viz.tensor("(tp out) (dp in)", (12, 8), Mesh(tp=4, dp=8))
    assert texts(drawing, "head") == [*(f"tp {k} · 3" for k in range(4)), *(f"dp {k}" for k in range(8))]
    roomy = viz.tensor("(tp out) (dp in)", (12, 8), Mesh(tp=4, dp=2))
    assert texts(roomy, "head") == []
    assert "tp 3 dp 1" in texts(roomy)
