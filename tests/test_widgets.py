"""The widgets without a browser: what is chosen, what is shown, what a hand changes."""

from __future__ import annotations

import math
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compare import GPT, ZERO3

import ckptlab
from ckptlab import Mesh, viz
from ckptlab.catalog import PARAM
from ckptlab.formats import read
from ckptlab.widgets import page, steps
from ckptlab.widgets.cells import rank_of, told
from ckptlab.widgets.held import inventory, pieces, sizes
from ckptlab.widgets.subject import Refusal, Subject

QKV = "2.self_attention.query_key_value.weight"
DENSE = "2.mlp.dense_h_to_4h.weight"


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject.of_checkpoint(ckptlab.open(GPT))


# ---------------------------------------------------------------- what a rank holds


@pytest.mark.slow
@pytest.mark.parametrize("case", [GPT, ZERO3], ids=lambda p: p.name)
def test_the_pieces_of_all_ranks_are_the_tensor(case: Path) -> None:
    catalog = read(case)
    whole = ckptlab.open(case).full(stack=False)
    for tensor in catalog.tensors.values():
        for state in tensor.states:
            covered: set[tuple[tuple[int, ...], int]] = set()
            for rank in range(catalog.mesh.size):
                for piece in pieces(catalog, tensor.name, state, rank):
                    at = tensor.cut.coordinate(catalog.mesh.coordinate(rank))
                    covered.update((at, i) for i in range(piece.start, piece.start + piece.count))
                    assert piece.stored is not None
                    first = piece.stored.flat[0]
                    true = all(i < n for i, n in zip(piece.first, tensor.shape, strict=True))  # not padding
                    if true and catalog.mesh.coordinate(rank)["pp"] == tensor.stages[0]:  # copies may differ
                        assert first.tobytes() == whole[tensor.name][state].values[piece.first].tobytes()
            shards = ((at, tensor.cut.shard_shape(at)) for at in tensor.cut.coordinates())
            assert len(covered) == sum(math.prod(shape) for _, shape in shards), (tensor.name, state)


def test_an_inventory_is_all_that_is_in_the_ranks_files() -> None:
    catalog = read(GPT)
    held = [inventory(catalog, rank) for rank in range(8)]
    optimizer = sum(n for i in held for state, n in i.kinds.items() if state != PARAM)
    stored = sum(s.nbytes for rows in catalog.stored.partitions.values() for row in rows.values() for s in row)
    assert optimizer == stored
    assert held[5].files["bf16_zero_pp_rank_0_mp_rank_03_optim_states.pt"] == held[5].nbytes - held[5].kinds[PARAM]
    assert {name for name, *_ in held[0].rows} == {t.name for t in catalog.tensors.values() if 0 in t.stages} - {
        t.name for t in catalog.tensors.values() if not any(pieces(catalog, t.name, s, 0) for s in t.states)
    }


def test_hovering_tells_rank_file_bytes_and_indices(subject: Subject) -> None:
    (line,) = told({"rank": "3"}, subject.catalog, DENSE, "master")
    (piece,) = pieces(subject.catalog, DENSE, "master", 3)
    assert line.startswith(
        "rank 3: tp 1 · pp 0 · dp 1 · elements 480–511 of the shard's 512 · indices [62, 0] to [63, 15]"
    )
    assert piece.stored is not None
    last = piece.stored.offset + piece.nbytes - 1
    assert line.endswith(
        f"master: bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt, bytes {piece.stored.offset:,}–{last:,}"
    )
    (nothing,) = told({"rank": "4"}, subject.catalog, DENSE, "master")
    assert "holds nothing of master" in nothing
    assert len(told({"tp": "1"}, subject.catalog, DENSE, "master")) == 2  # a piece of the picture: both dp ranks
    assert told({}, subject.catalog, DENSE, "master") == []


def test_cells_that_stand_for_several_give_the_first(subject: Subject) -> None:
    assert rank_of({"rank": "4-7"}, subject.catalog, QKV) == 4
    assert rank_of({"rank": "2,6"}, subject.catalog, QKV) == 2
    assert rank_of({"rank": "99"}, subject.catalog, QKV) is None
    assert rank_of({"tp": "1", "dp": "1"}, subject.catalog, QKV) == subject.catalog.mesh.rank(tp=1, dp=1, pp=0)
    assert rank_of({"bytes": "3"}, subject.catalog, QKV) is None


# ---------------------------------------------------------------- target, memory, steps


def test_an_impossible_mesh_is_one_readable_line(subject: Subject) -> None:
    two_reasons = subject.target(replace(subject.start(), mesh=Mesh(tp=3, pp=9)))
    assert "transformer layers; tp 3: 4 attention heads" in str(two_reasons)
    refused = subject.target(replace(subject.start(), mesh=Mesh(tp=3, dp=2)))
    assert isinstance(refused, Refusal)
    assert "tp 3: 4 attention heads are not divisible by it" in str(refused)
    assert "Meshes that work:" in str(refused)
    assert "\n" not in str(refused)
    assert str(GPT) not in str(refused)


def test_the_line_is_the_python_that_does_the_same(subject: Subject) -> None:
    start = subject.start()
    tensor = eval(subject.line(start), {"ckptlab": ckptlab})
    assert tensor.shape == subject.catalog[start.tensor].shape
    line = subject.line(replace(start, mesh=Mesh(tp=4)))
    assert line.endswith('.reshape(ckptlab.Mesh(tp=4)).save("reshaped/step")')
    reshaped = eval(line.removesuffix('.save("reshaped/step")'), {"ckptlab": ckptlab})
    assert reshaped.mesh == Mesh(tp=4)
    on_paper = Subject.of_checkpoint(ckptlab.paper_model(Mesh(tp=2), 1, layers=2, kv_heads=2))
    line = on_paper.line(replace(on_paper.start(), mesh=Mesh(dp=4), zero_stage=3))
    reshaped = eval(line, {"ckptlab": ckptlab})
    assert (reshaped.mesh, reshaped.zero_stage) == (Mesh(dp=4), 3)
    assert len(reshaped.source.tensors) == 14


def test_memory_follows_the_zero_stage() -> None:
    """The figures of the ZeRO paper: 16 bytes a parameter, of which 12, 14 and all 16 are cut over dp."""
    kept = [viz.fullest(ckptlab.paper_model(Mesh(dp=4), stage).catalog) for stage in range(4)]
    n = sum(t.numel for t in ckptlab.paper_model().tensors.values())
    assert kept[0] == dict(zip(viz.KINDS, (2 * n, 4 * n, 8 * n, 2 * n, 0), strict=True))
    wanted = [(2, 4, 8, 2, 0), (2, 1, 2, 2, 0), (2, 1, 2, 0.5, 0), (0.5, 1, 2, 0.5, 0)]
    for found, each in zip(kept, wanted, strict=True):
        assert list(found.values()) == pytest.approx([n * k for k in each], rel=0.001)


@pytest.mark.parametrize("source", [GPT, ZERO3, None], ids=str)
def test_both_pictures_of_memory_show_the_same_of_rank_0(source: Path | None) -> None:
    ckpt = ckptlab.open(source) if source else ckptlab.paper_model(Mesh(tp=2, dp=2), 2)
    subject = Subject.of_checkpoint(ckpt)
    first = [bars_of_rank_0(page.static(subject, subject.start())), bars_of_rank_0(viz.memory(ckpt.catalog).svg)]
    assert first[0] == first[1]
    kinds = dict(zip(viz.KINDS, viz.memory_by_rank(ckpt.catalog)[0].tolist(), strict=True))
    assert {kind: nbytes for kind, _, nbytes in first[0]} == {kind: n for kind, n in kinds.items() if n}
    assert kinds["gradients"] > 0
    assert f"fullest rank: {sizes({kind: n for kind, n in viz.fullest(ckpt.catalog).items() if n})}" in page.model(
        subject
    )


def bars_of_rank_0(page: str) -> list[tuple[str, str, int]]:
    """(kind, colour, bytes) of the cells that a picture of memory has for rank 0."""
    bars = [
        tag for tag in re.findall(r"<rect [^>]*class=\"cell amount[^>]*>", page) if re.search(r'data-rank="0[-"]', tag)
    ]
    said = ([re.search(f'{name}="([^"]*)"', tag) for name in ("data-kind", "fill", "data-bytes")] for tag in bars)
    return [(kind[1], fill[1], int(nbytes[1])) for kind, fill, nbytes in said if kind and fill and nbytes]


@pytest.mark.parametrize("source", [GPT, ZERO3, None], ids=str)
def test_every_step_has_a_picture_and_its_code_runs(source: Path | None) -> None:
    ckpt = ckptlab.open(source) if source else ckptlab.paper_model(Mesh(tp=2, dp=2), 0)
    subject = Subject.of_checkpoint(ckpt)
    mesh = Mesh(tp=4) if source == GPT else Mesh(dp=3)
    target = subject.target(replace(subject.start(), mesh=mesh))
    assert not isinstance(target, Refusal)
    shown = [steps.step(target, subject.start().tensor, i) for i in range(len(steps.TITLES))]
    assert [s.title for s in shown] == list(steps.TITLES)
    for step in shown:
        assert all(svg.startswith("<svg") for svg in step.pictures)
        assert step.pictures
        if source and step.code:
            assert eval(step.code, {"ckpt": ckpt, "reshaped": target}) is not None


def test_steps_say_where_the_tensor_goes(subject: Subject) -> None:
    target = subject.target(replace(subject.start(), mesh=Mesh(tp=4, dp=2)))
    assert not isinstance(target, Refusal)
    said = [steps.step(target, "4.mlp.dense_h_to_4h.weight", i).text for i in range(6)]
    assert "2 tp ranks has a shard of 32 × 16" in said[1]
    assert "goes from stage 1 to stage 0" in said[3]
    assert "4 tp ranks has a shard of 16 × 16" in said[4]
    padded = steps.step(target, "tied_modules.embed.word_embeddings.weight", 2).text
    assert "padding of the vocabulary, 11 rows, is cut off" in padded
    assert "stages 0–1 are tied" in padded


def test_a_static_page_shows_source_target_and_line(subject: Subject) -> None:
    html = page.static(subject, replace(subject.start(), mesh=Mesh(tp=4), rank=3))
    assert html.count("<svg") == 6
    assert "reshape(ckptlab.Mesh(tp=4))" in html
    assert "<script" not in html
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    refused = page.static(subject, replace(subject.start(), mesh=Mesh(tp=3)))
    assert "not divisible" in refused


def test_names_are_escaped(subject: Subject) -> None:
    assert "<img" not in page.told(["<img src=x>"], "")
    assert "<b>" not in page.code("<b>")


@pytest.mark.slow
def test_whole_formats_and_large_models_can_be_looked_at() -> None:
    weights = Subject(read(GPT.parent / "gpt_tp2_pp2_dp2" / "universal"), "ckptlab.open('u')")
    assert page.static(weights, weights.start()).count("<svg") >= 3
    large = Subject.of_checkpoint(ckptlab.paper_model(Mesh(tp=8, pp=8, dp=8), layers=160, hidden=512, heads=8))
    html = page.static(large, replace(large.start(), mesh=Mesh(tp=4, pp=4, dp=16)))
    assert len(html) < 600_000


# ---------------------------------------------------------------- the face


@pytest.fixture
def explorer() -> Iterator[Any]:
    pytest.importorskip("ipywidgets")
    pytest.importorskip("anywidget")
    made = ckptlab.explore(ckptlab.open(GPT))
    yield made
    made.close_all()


def test_a_slider_changes_layout_memory_and_cost(explorer: Any) -> None:
    explorer.pages.selected_index = 1
    change = explorer.change
    before = change.tensor.svg, change.memory.svg, change.plan.svg, change.figures.value
    change.sliders.degrees["tp"].value = 4
    after = change.tensor.svg, change.memory.svg, change.plan.svg, change.figures.value
    assert all(a != b for a, b in zip(before, after, strict=True))
    assert explorer.choice.mesh == Mesh(tp=4, pp=2, dp=2)
    change.sliders.degrees["tp"].value = 3
    assert "not divisible" in change.figures.value
    assert change.pictures.layout.display == "none"
    change.sliders.degrees["tp"].value = 1
    assert change.pictures.layout.display == ""


def test_a_long_plan_is_worked_out_beside(explorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "MANY", 0)
    change = explorer.change
    start = threading.Event()
    change.later.do(lambda: start.wait(30) and None)  # work that goes on while two sliders are moved
    explorer.pages.selected_index = 1
    explorer.choose(mesh=Mesh(tp=1, dp=2))
    superseded = change.later.last
    explorer.choose(mesh=Mesh(tp=4, dp=2))
    assert (change.plan.svg, change.figures.value.count("…")) == ("", 3)
    assert "tp 3" in change.tensor.svg
    start.set()
    change.later.last.result(30)
    assert superseded.cancelled()
    assert "<svg" in change.plan.svg
    assert "…" not in change.figures.value
    stale = explorer.subject.target(replace(explorer.choice, mesh=Mesh(dp=2)))
    before = change.figures.value
    change._count(stale)
    assert change.figures.value == before


def test_a_click_on_a_rank_shows_what_it_holds(explorer: Any) -> None:
    before = explorer.look.mesh.svg
    explorer.look.mesh._handle_custom_msg({"event": "click", "cell": {"rank": "5"}}, [])
    assert explorer.choice.rank == 5
    assert "rank 5: tp 1 · pp 1 · dp 0 holds" in explorer.look.holdings.value
    assert explorer.look.mesh.svg != before
    explorer.look.mesh._handle_custom_msg({"event": "hover", "cell": {"rank": "1"}}, [])
    assert "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt, bytes" in explorer.look.hearing.line.value
    explorer.look.mesh._handle_custom_msg({"event": "hover", "cell": {}}, [])
    assert "Hover over a cell" in explorer.look.hearing.line.value


def test_strange_messages_do_nothing(explorer: Any) -> None:
    choice = explorer.choice
    for message in ({}, {"event": "click"}, {"event": "click", "cell": {"rank": "-"}}, {"event": "x", "cell": {}}, "?"):
        explorer.look.mesh._handle_custom_msg(message, [])
    explorer.look.mesh._handle_custom_msg({"event": "click", "cell": {"tensor": "no such"}}, [])
    assert explorer.choice == choice


def test_the_tree_and_a_fragment_choose_a_tensor(explorer: Any) -> None:
    assert explorer.tree.names == list(explorer.subject.catalog.tensors)
    explorer.tree.chosen = DENSE
    assert DENSE in explorer.look.tensor.svg
    explorer.look.flat._handle_custom_msg({"event": "click", "cell": {"tensor": QKV, "dp": "1", "tp": "0"}}, [])
    assert (explorer.choice.tensor, explorer.tree.chosen) == (QKV, QKV)
    assert explorer.subject.catalog.mesh.coordinate(explorer.choice.rank)["dp"] == 1
    explorer.look.state.value = PARAM
    assert explorer.look.flat.svg == ""


def test_stepping_through(explorer: Any) -> None:
    explorer.choose(mesh=Mesh(tp=4, dp=2))
    explorer.pages.selected_index = 2
    seen = []
    for _ in steps.TITLES:
        seen.append(explorer.steps.text.value)
        explorer.steps.next.click()
    assert len(set(seen)) == len(steps.TITLES)
    assert explorer.steps.next.disabled
    explorer.steps.back.click()
    assert explorer.choice.step == len(steps.TITLES) - 2


def test_the_python_button(explorer: Any) -> None:
    assert explorer.code.value == ""
    explorer.python.value = True
    explorer.choose(mesh=Mesh(dp=4))
    assert "reshape(ckptlab.Mesh(dp=4))" in explorer.code.value


def test_the_playground_answers_to_its_numbers() -> None:
    pytest.importorskip("anywidget")
    play = ckptlab.playground(layers=2)
    fields = play.numbers.fields
    assert play.subject.catalog.mesh == Mesh(tp=2, pp=2, dp=2)
    before = play.numbers.stages.svg
    fields["layers"].value = 6
    assert len(play.subject.catalog.tensors) == 6 * 6 + 2
    assert play.numbers.stages.svg != before
    fields["heads"].value = 5
    assert "hidden(64) is not divisible by heads(5)" in play.numbers.told.value
    assert len(play.subject.catalog.tensors) == 6 * 6 + 2  # the last model that could be stays
    play.numbers.preset.value = "Llama 3 70B"
    assert play.subject.catalog.training.numbers["kv_heads"] == 8
    play.numbers.sliders.zero.value = 3
    assert play.subject.catalog.zero_stage == 3
    assert "ZeRO-1 only" in play.numbers.told.value
    play.pages.selected_index = 2
    assert "<svg" in play.change.plan.svg
    play.close_all()


@pytest.mark.slow
def test_a_saved_notebook_keeps_a_static_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    source = f"import ckptlab\nckptlab.explore(ckptlab.open({str(GPT)!r}))"
    cells = [nbformat.v4.new_code_cell(source), nbformat.v4.new_code_cell("ckptlab.playground()")]
    book = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(book, timeout=None, kernel_name="python3").execute(cwd=str(tmp_path))
    nbformat.write(book, tmp_path / "saved.ipynb")
    for cell in nbformat.read(tmp_path / "saved.ipynb", as_version=4).cells:
        (output,) = cell.outputs
        assert "application/vnd.jupyter.widget-view+json" in output.data
        assert "<svg" in output.data["text/html"]
        assert "ckptlab." in output.data["text/html"]


# ---------------------------------------------------------------- light imports


def test_importing_ckptlab_takes_no_widgets_with_it() -> None:
    code = "import sys, ckptlab; ckptlab.Mesh; assert not {'ipywidgets', 'anywidget', 'xarray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_ipywidgets_the_error_says_what_to_install() -> None:
    code = """
import sys
import threading
sys.modules.update(ipywidgets=None, anywidget=None)
import ckptlab
try:
    ckptlab.playground()
except ckptlab.UnsupportedError as error:
    assert "ipywidgets and anywidget" in str(error) and "pip install 'ckptlab[widgets]'" in str(error), error
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
