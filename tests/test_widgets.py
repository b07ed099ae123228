"""The widgets without a browser: what is chosen, what is shown, what a hand changes."""

from __future__ import annotations

import base64
import itertools
import json
import math
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from compare import DATA, GPT, ZERO3

import ckptlab
from ckptlab import Mesh, viz
from ckptlab.catalog import PARAM
from ckptlab.formats import read
from ckptlab.widgets import page, parts, steps
from ckptlab.widgets.held import by_rank, inventory, pieces, sizes
from ckptlab.widgets.subject import Refusal, Subject, mesh_code

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


def test_all_ranks_at_once_are_told_what_each_is_told(subject: Subject) -> None:
    for name, state in (
        (DENSE, "master"),
        (QKV, "exp_avg"),
        (DENSE, PARAM),
        ("tied_modules.embed.word_embeddings.weight", "master"),
    ):
        lines, of = by_rank(subject.catalog, name, state)
        for rank, index in enumerate(of):
            told = [str(piece) for piece in pieces(subject.catalog, name, state, rank)]
            assert (lines[index] if index >= 0 else []) == told
    lines, of = by_rank(subject.catalog, DENSE, "master")
    (piece,) = pieces(subject.catalog, DENSE, "master", 3)
    assert piece.stored is not None
    last = piece.stored.offset + piece.nbytes - 1
    assert lines[of[3]] == [
        "elements 480–511 of the shard's 512 · indices [62, 0] to [63, 15] · "
        f"master: bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt, bytes {piece.stored.offset:,}–{last:,}"
    ]
    assert of[4] == -1


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
    tensor = eval(subject.opening(start), {"ckptlab": ckptlab})
    assert tensor.shape == subject.catalog[start.tensor].shape
    line = subject.reshaping(replace(start, mesh=Mesh(tp=4)))
    assert line.endswith('.reshape(ckptlab.Mesh(tp=4)).save("reshaped/step")')
    reshaped = eval(line.removesuffix('.save("reshaped/step")'), {"ckptlab": ckptlab})
    assert reshaped.mesh == Mesh(tp=4)
    assert subject.reshaping(replace(start, mesh=Mesh(tp=3))).startswith("# tp 3 · pp 1 · dp 1: Cannot be reshaped")
    split = Mesh(tp=2, dp=4).split("dp", edp=2, ep=2)
    on_paper = Subject.of_checkpoint(ckptlab.paper_model(split, 1, layers=2, kv_heads=2))
    assert eval(on_paper.opening(on_paper.start()), {"ckptlab": ckptlab}).mesh == split
    line = on_paper.reshaping(replace(on_paper.start(), mesh=Mesh(dp=4), zero_stage=3))
    reshaped = eval(line, {"ckptlab": ckptlab})
    assert (reshaped.mesh, reshaped.zero_stage) == (Mesh(dp=4), 3)
    assert len(reshaped.source.tensors) == 14


def test_memory_follows_the_zero_stage() -> None:
    """The figures of the ZeRO paper: 16 bytes a parameter, of which 12, 14 and all 16 are cut over dp."""
    kept = [viz.fullest(ckptlab.paper_model(Mesh(dp=4), stage).catalog) for stage in range(4)]
    n = sum(t.numel for t in ckptlab.paper_model().tensors.values())
    assert kept[0] == dict(zip(viz.KINDS, (2 * n, 4 * n, 8 * n, 2 * n, *[0] * 8), strict=True))
    wanted = [(2, 4, 8, 2, 0, 0), (2, 1, 2, 2, 0, 0), (2, 1, 2, 0.5, 0, 0), (0.5, 1, 2, 0.5, 0, 0)]
    for found, each in zip(kept, wanted, strict=True):
        assert list(found.values())[:6] == pytest.approx([n * k for k in each], rel=0.001)


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


def test_names_are_escaped() -> None:
    assert "<b>" not in page.code("<b>")
    assert "<b>" not in page.refusal(Refusal("<b>"))


@pytest.mark.slow
def test_whole_formats_and_large_models_can_be_looked_at() -> None:
    weights = Subject(read(GPT.parent / "gpt_tp2_pp2_dp2" / "universal"), "ckptlab.open('u')")
    assert page.static(weights, weights.start()).count("<svg") >= 3
    large = Subject.of_checkpoint(ckptlab.paper_model(Mesh(tp=8, pp=8, dp=8), layers=160, hidden=512, heads=8))
    html = page.static(large, replace(large.start(), mesh=Mesh(tp=4, pp=4, dp=16)))
    assert len(html) < 600_000


# ---------------------------------------------------------------- the widget


@pytest.fixture
def explorer() -> Iterator[Any]:
    pytest.importorskip("anywidget")
    made = ckptlab.explore(ckptlab.open(GPT))
    yield made
    made.close_all()


def drive(explorer: Any, **wanted: Any) -> None:
    """What the page does: set fields in one message, and ask."""
    explorer.set_state({**wanted, "asked": explorer.asked + 1})


def test_what_is_chosen_is_in_traits(explorer: Any) -> None:
    heard = []
    explorer.observe(lambda change: heard.append((change["name"], change["new"])), ["tensor", "rank", "mesh"])
    explorer.tensor = DENSE
    explorer.rank = 5
    explorer.mesh = {"tp": 4, "dp": 2}
    assert heard == [("tensor", DENSE), ("rank", 5), ("mesh", Mesh(tp=4, dp=2))]
    drive(explorer, rank=2, mesh=[["tp", 1], ["pp", 2], ["dp", 2]])
    assert heard[3:] == [("rank", 2), ("mesh", Mesh(pp=2, dp=2))]
    with pytest.raises(ckptlab.CheckpointError, match="did you mean"):
        explorer.tensor = DENSE.replace("dense", "dens")
    with pytest.raises(ckptlab.MeshError, match="rank 8 is not on"):
        explorer.rank = 8
    with pytest.raises(ckptlab.CheckpointError, match="there is no tab 'Looks'"):
        explorer.tab = "Looks"
    assert (explorer.tensor, explorer.rank, explorer.tab) == (DENSE, 2, "Look")


@pytest.mark.slow
def test_every_answer_is_of_one_state(explorer: Any) -> None:
    """Whatever is slid to: heading, picture, cost and line that come in one answer are of the mesh that was asked
    for."""
    explorer.tab = "Reshape"
    for tp, pp, dp in itertools.product((1, 3, 4), (1, 2, 9), (1, 3)):
        mesh = Mesh(tp=tp, pp=pp, dp=dp)
        drive(explorer, mesh=[["tp", tp], ["pp", pp], ["dp", dp]])
        assert explorer.view["asked"] == explorer.asked
        found = {name.split("[")[0]: content for name, content in explorer.view["parts"].items()}
        assert all(
            str([["tp", tp], ["pp", pp], ["dp", dp]]).replace(" ", "").replace("'", '"') in name
            for name in explorer.view["parts"]
            if name.startswith("to.")
        )
        if "refused" in found["to.figures"]:
            assert found["line.Reshape"].startswith(f"# {mesh}: ")
            assert {found[slot] for slot in ("to.mesh", "to.tensor", "to.memory", "to.plan", "to.holdings")} == {None}
            continue
        assert f"{mesh} · ZeRO-1" in found["to.figures"]["title"]
        assert f">{mesh} (" in found["to.mesh"]
        assert f"8 → {mesh.size} ranks" in found["to.plan"]
        assert f".reshape({mesh_code(mesh)})" in found["line.Reshape"]
        assert dict(found["to.figures"]["axes"]) == dict(mesh.degrees)


@pytest.mark.slow
def test_a_refused_mesh_tells_the_degrees_that_work(explorer: Any) -> None:
    explorer.choose(tab="Reshape", mesh=Mesh(tp=3, pp=2, dp=2))
    assert "4 attention heads are not divisible" in explorer.shown("to.figures")["refused"]
    explorer.settled()
    works = explorer.shown("to.works")
    assert works["tp"] == [1, 2, 4]
    assert 3 not in works["tp"]
    for tp in works["tp"]:
        assert not isinstance(explorer.subject.target(replace(explorer.choice, mesh=Mesh(tp=tp, pp=2, dp=2))), Refusal)


def test_stale_work_is_dropped(explorer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptlab.widgets.explorer.AT_ONCE", 0)  # everything beside the kernel
    start = threading.Event()
    explorer._worker.submit(start.wait, 30)
    explorer.tab = "Reshape"
    explorer.mesh = Mesh(tp=1, dp=2)
    explorer.mesh = Mesh(tp=4, dp=2)
    before = explorer.view
    start.set()
    explorer.settled()
    made = {name for name in explorer._parts if name.startswith("to.plan")}
    assert explorer.view != before
    assert len(made) == 1
    assert '[["tp",4],["pp",1],["dp",2]]' in made.pop()


def test_a_rank_that_holds_nothing_is_shown_so(explorer: Any) -> None:
    explorer.choose(tensor=DENSE, rank=5)
    assert "rank 5 (tp 1 · pp 1 · dp 0) holds nothing of it" in explorer.shown("look.tensor")
    assert explorer.shown("look.held")["of"][5] == -1
    assert "rank 5: tp 1 · pp 1 · dp 0 holds" in explorer.shown("look.holdings")
    explorer.rank = 3
    assert "tp 1 dp 1 holds 32 of 512" in explorer.shown("look.tensor")
    explorer.state = PARAM
    assert "tp 1 holds 32 × 16" in explorer.shown("look.tensor")
    assert explorer.shown("look.flat") == ""


def test_the_line_belongs_to_the_tab(explorer: Any) -> None:
    assert ".full(" in explorer.shown("line.Look")
    explorer.choose(tab="Reshape", mesh=Mesh(dp=4))
    assert explorer.shown("line.Reshape").endswith('.reshape(ckptlab.Mesh(dp=4)).save("reshaped/step")')
    assert ".full(" in explorer.shown("line.Look")


def test_a_choice_that_a_tensor_lacks_is_moved(explorer: Any) -> None:
    explorer.state = "exp_avg"
    buffers = ckptlab.explore(ckptlab.open_run(DATA / "plain_zero1_dp2_steps")[2])
    lone = next(t.name for t in buffers.subject.catalog.tensors.values() if "exp_avg" not in t.states)
    buffers.state = "exp_avg"
    buffers.tensor = lone
    assert buffers.state in buffers.shown("states")
    buffers.close_all()


@pytest.mark.parametrize("mesh", [Mesh(tp=2, dp=4).split("dp", edp=2, ep=2), Mesh(cp=2, tp=2, dp=2)], ids=str)
def test_sliders_are_the_axes_of_the_mesh(mesh: Mesh) -> None:
    explorer = ckptlab.explore(ckptlab.paper_model(mesh, 1))
    assert [axis for axis, _ in explorer.get_state("mesh")["mesh"]] == list(
        dict.fromkeys(["tp", "pp", "dp", *mesh.joined()])
    )
    assert dict(explorer.shown("about")["axes"]) == dict(mesh.degrees)
    for tab in explorer.tabs:
        explorer.tab = tab
        assert all(explorer.shown(slot) is not None for slot in parts.TABS[tab])
    explorer.mesh = {**explorer.mesh.degrees, "tp": 1}
    assert explorer.mesh.get("cp", 1) == mesh.get("cp", 1)
    explorer.close_all()


@pytest.mark.parametrize("step", ["step-3", "truth.safetensors"])
def test_other_formats_are_looked_at_and_reshaped(step: str) -> None:
    """FSDP2's chunks are uneven, over axes that nobody named; its files know of no ZeRO stage."""
    explorer = ckptlab.explore(ckptlab.open(DATA / "fsdp2_tp2_dp2" / step))
    for name in explorer.subject.catalog.tensors:
        explorer.tensor = name
        for explorer.tab in ("Look", "Reshape"):
            assert None not in [explorer.shown(slot) for slot in parts.TABS[explorer.tab] if "held" not in slot]
    explorer.tab = "Steps"
    for explorer.step in range(len(steps.TITLES)):
        assert "<svg" in explorer.shown("step.pictures")
    assert ("zero_stage" in explorer.shown("line.Reshape")) <= bool(explorer.stages)
    explorer.close_all()


@pytest.mark.slow
def test_the_playground_answers_to_its_numbers() -> None:
    pytest.importorskip("anywidget")
    play = ckptlab.playground(layers=2)
    before = play.shown("model.zero")
    drive(play, model={**play.model, "layers": 6})
    assert len(play.subject.catalog.tensors) == 6 * 6 + 2
    assert play.shown("model.zero") != before
    play.source_mesh = Mesh(tp=4, pp=2, dp=2)
    assert play.mesh == Mesh(tp=4, pp=2, dp=2)  # the target follows
    assert "reshape(ckptlab.Mesh(tp=4, pp=2, dp=2))" in play.shown("line.Reshape")
    play.model = {**play.model, "heads": 5}
    assert "hidden(64) is not divisible by heads(5)" in play.shown("about")["refused"]
    assert play.shown("look.mesh") is None
    play.model = {**play.model, "heads": 8}
    drive(play, model=play.presets["Llama 3 70B"]["model"], mesh=[["tp", 2], ["pp", 1], ["dp", 2]])
    play.source_mesh = Mesh(tp=8, pp=2, dp=2)
    assert play.mesh == Mesh(tp=2, dp=2)  # it was moved, and stays
    play.source_stage = 3
    assert "ZeRO-1 only" in play.shown("model.told")
    play.close_all()


@pytest.mark.slow
def test_a_page_without_a_kernel_has_what_it_is_to_answer(explorer: Any, tmp_path: Path) -> None:
    explorer.choose(tensor=DENSE, rank=3)
    explorer.to_html(tmp_path / "page.html", meshes=[Mesh(tp=4, dp=2)], tensors=[QKV])
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")
    packed = re.search(r'id="parts">([^<]*)<', html)
    assert packed
    stored = json.loads(zlib.decompress(base64.b64decode(packed[1])))
    for changes in (
        {},
        {"tensor": QKV},
        {"rank": 6},
        {"tensor": DENSE, "rank": 3, "tab": "Reshape", "mesh": Mesh(tp=4, dp=2)},
        {"tab": "Steps", "step": 4},
    ):
        explorer.choose(**{"width": 520, **changes})
        for slot, name in parts.wanted(explorer.wanted()):
            if slot not in parts.OPTIONAL:
                assert stored["contents"][stored["of"][name]] == json.loads(json.dumps(explorer.shown(slot))), name
    with pytest.raises(ckptlab.CkptlabError, match="tp 3"):
        explorer.to_html(tmp_path / "other.html", meshes=[Mesh(tp=3)])


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


@pytest.mark.slow
def test_without_ipywidgets_the_error_says_what_to_install() -> None:
    code = """
import sys
import threading
sys.modules.update(ipywidgets=None, anywidget=None)
import ckptlab
try:
    ckptlab.playground()
except ckptlab.UnsupportedError as error:
    assert "anywidget" in str(error) and "pip install anywidget" in str(error), error
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_chosen_tensor_has_one_colour_through_all_steps(subject: Subject) -> None:
    target = subject.target(replace(subject.start(), mesh=Mesh(tp=4, dp=2)))
    assert not isinstance(target, Refusal)
    blue = {"#0072b2", "#61a8cf"}  # and its tint
    for number in (0, 1, 2, 4, 5):
        (svg,) = steps.step(target, DENSE, number).pictures
        fills = re.findall(r'class="cell (?:piece|fragment)[^"]*" fill="(#\w+)"(?: data-tensor="([^"]*)")?', svg)
        assert fills
        mine = {fill for fill, name in fills if name in ("", DENSE)}
        assert mine
        assert mine <= blue
        assert {fill for fill, name in fills if name not in ("", DENSE)} <= {"#a8a8a8"}


def test_the_line_opens_what_is_shown() -> None:
    """What was opened with a mesh or layouts, or is seen under other names, no `open` of its path gives."""
    step = DATA / "fsdp2_tp2_dp2" / "step-3"
    named = ckptlab.open(step, mesh=Mesh(dp=2, tp=2))
    assert ckptlab.explore(step).shown("line.Look").startswith("ckptlab.open(")
    assert ckptlab.explore(named).shown("line.Look") == 'ckpt.full("master", stack=False)["embed.weight"]'
    seen = ckptlab.families.resolve("gpt2", (run := ckptlab.open(GPT))).onto(run)
    assert ckptlab.explore(seen).shown("line.Look").startswith('ckpt.full("master", stack=False)["transformer.')
    explorer = ckptlab.explore(named)
    explorer.choose(tab="Reshape", mesh=Mesh(dp=2, tp=2))
    assert explorer.shown("line.Reshape").startswith("ckpt.reshape(ckptlab.Mesh(tp=2, dp=2)")
