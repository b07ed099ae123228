"""What people see: folded tables, words for numbers, escaped HTML; from headers alone, and quick at 10,000 tensors."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare import GPT, ZERO2, ZERO3
from helpers.files import refuse_reading
from helpers.html import assert_well_formed

from ckptlab.catalog import ParameterGroup, Tensor
from ckptlab.checkpoint import Checkpoint
from ckptlab.checkpoint import open as open_checkpoint
from ckptlab.convert import MANIFEST
from ckptlab.describe import plan, plan_html, plan_text, summary, summary_html, summary_text
from ckptlab.describe.fold import fold
from ckptlab.findings import Finding
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape
from ckptlab.words import count, figure, ranges, shorten, size

STATES = {s: np.dtype(np.float32) for s in ("master", "exp_avg")}


def tensor(name: str, shape: tuple[int, ...] = (8, 4), layout: str = "(tp out) in", stage: int = 0) -> Tensor:
    lies = Layout(layout, stages=(stage,))
    return Tensor(name, shape, lies, lies.resolve(shape, Mesh(tp=2, pp=2)), "parameter", STATES, 0, (stage,))


def made_of(*tensors: Tensor) -> Checkpoint:
    """The GPT checkpoint, with these tensors in place of its own."""
    found = {t.name: t for t in tensors}
    groups = (ParameterGroup({"lr": 0.1}, tuple(found)),)
    catalog = open_checkpoint(GPT).catalog
    return Checkpoint(replace(catalog, tensors=found, training=replace(catalog.training, groups=groups)))


# Words


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0"),
        (999, "999 bytes"),
        (6464, "6.46 kB"),
        (999_600, "1 MB"),
        (2_510_000_000_000, "2.51 TB"),
        (10**19, "10,000 PB"),
    ],
)
def test_sizes_are_decimal_and_have_three_figures(nbytes: int, text: str) -> None:
    assert size(nbytes) == text


def test_numbers_in_words() -> None:
    assert count(13_312) == "13,312"
    assert count(6_738_415_616) == "6,738,415,616 (6.74 billion)"
    assert [figure(v) for v in (0.001, 1.789, 9.999, 13.04, 99.96, 237.4)] == [
        "<.01",
        "1.79",
        "10.0",
        "13.0",
        "100",
        "237",
    ]
    assert ranges([3, 0, 1, 2, 7]) == "0–3, 7"
    assert ranges([]) == ""


def test_a_long_name_keeps_beginning_and_end() -> None:
    short = shorten("model.layers.{0..31}.self_attn.q_proj.weight", 30)
    assert len(short) == 30
    assert short.startswith("model.lay")
    assert short.endswith("q_proj.weight")
    assert shorten("abc", 3) == "abc"


# Folding


def test_layers_of_one_shape_share_a_line() -> None:
    lines = fold([tensor(f"{i}.mlp.weight", stage=i // 4) for i in (2, 3, 4, 5, 9)])
    assert [(n.name, n.count, n.elements, n.pp) for n in lines] == [("{2..5,9}.mlp.weight", 5, 160, "0–2")]


def test_what_differs_in_shape_or_layout_does_not() -> None:
    lines = fold([tensor("0.w"), tensor("1.w", shape=(6, 4)), tensor("2.w", layout="out (tp in)"), tensor("3.w")])
    assert [n.name for n in lines] == ["{0,3}.w", "1.w", "2.w"]


def test_experts_in_layers_fold_in_both_numbers() -> None:
    lines = fold([tensor(f"layers.{i}.experts.{e}.w1") for i in range(3) for e in range(4)])
    assert [(n.name, n.count) for n in lines] == [("layers.{0..2}.experts.{0..3}.w1", 12)]


def test_the_same_number_in_all_is_no_range() -> None:
    assert [n.name for n in fold([tensor("h.0.e.1.w"), tensor("h.0.e.2.w")])] == ["h.0.e.{1..2}.w"]


# Summaries


def test_the_summary_of_a_pipeline() -> None:
    text = repr(open_checkpoint(GPT))
    assert text.startswith("ckptlab · deepspeed checkpoint · tp 2 · pp 2 · dp 2 (8 ranks)\n")
    for line in (
        r"training +step 3 · ZeRO-1 \(BF16_Optimizer\) · bf16",
        r"size +14,960 parameters in 52 tensors · 24 files, \d+ kB on disk",
        r"states +master +float32 +59.8 kB +52 tensors",
        r" +param +bfloat16 +29.9 kB +52 tensors",
        r"groups +decay +lr 0.01 +weight decay 0.1 +18 tensors +14,096 elements",
        r".*not imported: argparse.Namespace.*",
        r"\{2\.\.5\}\.mlp\.dense_h_to_4h\.weight +64 × 16 +\(tp out\) in +0–1 +4 × +4,096",
        r"tied_modules\.embed\.word_embeddings\.weight +101 \(112\) × 16 +\(tp out\) in +0\+1 +1,616",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    assert max(map(len, text.splitlines())) <= 100


def test_frozen_tensors_buffers_and_ties_are_told() -> None:
    text = repr(open_checkpoint(ZERO2))
    assert "(2 frozen, 1 buffer)" in text
    assert re.search(r"^tied +lm_head.weight is wte.weight$", text, re.MULTILINE)
    assert re.search(r"^adapter.weight +5 × 15 +frozen +75$", text, re.MULTILINE)
    assert re.search(r"^seen +3 +buffer +3$", text, re.MULTILINE)
    assert "layout" not in text, "nothing is cut over tp, so there is nothing to tell"


def test_a_universal_folder_tells_where_it_comes_from() -> None:
    text = repr(open_checkpoint(GPT / "universal"))
    assert text.startswith("ckptlab · universal checkpoint · whole tensors, from tp 2 · pp 2 · dp 2 (8 ranks)\n")


def test_unknown_layouts_are_marked() -> None:
    text = repr(made_of(tensor("a.w"), replace(tensor("b.w"), layout=Layout("out in"), layout_known=False)))
    assert re.search(r"^b\.w +8 × 4 +\? ", text, re.MULTILINE)
    assert "? nothing in the checkpoint says how this tensor is cut over tp" in text


def test_a_tensor_without_the_usual_states_is_told() -> None:
    odd = replace(tensor("c"), states={"master": np.dtype(np.float32)})
    text = repr(made_of(tensor("a"), tensor("b"), odd))
    assert re.search(r"^c .* parameter: master ", text, re.MULTILINE)
    assert re.search(r"^a .* parameter +32$", text, re.MULTILINE)


def test_findings_come_last_or_not_at_all() -> None:
    ckpt = open_checkpoint(GPT)
    ckpt = Checkpoint(replace(ckpt.catalog, findings=(Finding("averaged", "info", found="replicas are averaged"),)))
    assert summary_text(ckpt.catalog).endswith("notes     - replicas are averaged")
    assert "averaged" not in summary_text(ckpt.catalog, findings=False)


def test_a_folder_that_is_gone_can_still_be_shown() -> None:
    ckpt = open_checkpoint(GPT)
    gone = Checkpoint(replace(ckpt.catalog, path="/nowhere"))
    assert "24 files, not there any more" in repr(gone)
    assert summary(gone.catalog)["files"] == {"count": 24, "bytes": None}


def test_the_table_is_cut_and_says_so() -> None:
    ckpt = made_of(*(tensor(f"m.{chr(97 + i // 26)}{chr(97 + i % 26)}.w") for i in range(100)))
    assert "… and 60 more tensors" in repr(ckpt)
    everything = summary_text(ckpt.catalog, everything=True)
    assert "more tensors" not in everything
    assert everything.count("\nm.") == 100


def test_nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = [open_checkpoint(path) for path in (GPT, ZERO2, ZERO3, GPT / "universal")]
    refuse_reading(monkeypatch)
    for ckpt in opened:
        assert repr(ckpt)
        assert summary_html(ckpt.catalog)
        assert summary(ckpt.catalog)
        reshaped = ckpt.reshape(Mesh(dp=3, pp=1))
        assert plan_text(reshaped)
        assert plan_html(reshaped)


@pytest.mark.parametrize("path", [GPT, ZERO2, ZERO3, GPT / "universal"], ids=lambda p: p.name)
def test_the_data_of_a_summary(path: Path) -> None:
    ckpt = open_checkpoint(path)
    about = json.loads(json.dumps(summary(ckpt.catalog), allow_nan=False))
    assert about["mesh"] == ckpt.mesh.degrees
    assert [t["name"] for t in about["tensors"]] == list(ckpt.tensors)
    assert about["counts"]["parameters"] == sum(t["elements"] for t in about["tensors"] if t["kind"] != "buffer")
    expected = {
        s: sum(t.numel * t.states[s].itemsize for t in ckpt.tensors.values() if s in t.states) for s in ckpt.states
    }
    assert {s["name"]: s["bytes"] for s in about["states"]} == expected
    folder = Path(ckpt.path)
    assert about["files"]["bytes"] == sum((folder / f).stat().st_size for f in ckpt.catalog.files)
    assert about["groups"][0]["options"]["betas"] == [0.9, 0.95]


# HTML


@pytest.mark.parametrize("path", [GPT, ZERO2, GPT / "universal"], ids=lambda p: p.name)
def test_html_is_well_formed_and_self_contained(path: Path) -> None:
    ckpt = open_checkpoint(path)
    for page in (ckpt._repr_html_(), ckpt.reshape(Mesh(dp=3))._repr_html_()):
        assert_well_formed(page)
        assert not re.search(r"https?://|url\((?!#)|@import", page)


def test_whatever_comes_from_files_is_escaped() -> None:
    evil = "<script>alert(1)</script>"
    ckpt = made_of(tensor(evil), replace(tensor("b"), aliases=(evil,)))
    catalog = replace(
        ckpt.catalog,
        path=f"/x/{evil}",
        client={evil: 1},
        findings=(Finding("x", "info", found=evil),),
        training=replace(
            ckpt.catalog.training, groups=(ParameterGroup({"name": evil, "lr": evil, evil: evil}, ("b",)),)
        ),
    )
    page = summary_html(catalog)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 8


@pytest.mark.slow
@pytest.mark.parametrize("folds", [True, False])
def test_html_of_ten_thousand_tensors_is_small(folds: bool) -> None:
    name = "model.layers.{}.w" if folds else "model.layer{}.w"
    ckpt = made_of(*(tensor(name.format(i)) for i in range(10_000)))
    assert len(summary_html(ckpt.catalog)) < 100_000


# Plans


def reshaped(path: Path, mesh: Mesh, **options: object) -> Reshape:
    return open_checkpoint(path).reshape(mesh, **options)


def test_the_plan_says_what_changes_and_what_it_costs() -> None:
    text = repr(reshaped(GPT, Mesh(tp=4)))
    assert text.startswith("ckptlab · plan · tp 2 · pp 2 · dp 2  →  tp 4 · pp 1 · dp 1 (8 → 4 ranks)\n")
    for line in (
        r"changes +mesh +tp 2 → 4, pp 2 → 1, dp 2 → 1",
        r" +layers +1–3 \| 4–6  →  1–6",
        r" +vocabulary +101 rows, padded 112 → 128",
        r"cost +read +[\d.]+ kB +from the source.*",
        r" +moved +[\d.]+ kB .*",
        r"moves +kB from source rank \(down\) to target rank \(across\).*",
    ):
        assert re.search(f"^{line}$", text, re.MULTILINE), line
    assert "\nnotes     - vocabulary padding follows tp" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_plan_that_changes_nothing_says_so() -> None:
    assert "changes   none: the same mesh, stage and dtype" in repr(reshaped(GPT, Mesh(tp=2, pp=2, dp=2)))


def test_stage_and_dtype_are_changes_too() -> None:
    text = repr(reshaped(ZERO2, Mesh(dp=2), zero_stage=3, dtype="fp16"))
    assert re.search(r"^changes +training +ZeRO-2 · bf16 → ZeRO-3 · fp16$", text, re.MULTILINE)


@pytest.mark.parametrize("mesh", [Mesh(tp=4), Mesh(tp=4, pp=4, dp=2), Mesh(dp=2, pp=2, tp=2)], ids=str)
def test_the_moves_add_up_to_the_figures(mesh: Mesh) -> None:
    about = json.loads(json.dumps(plan(reshaped(GPT, mesh)), allow_nan=False))
    received = sum(m["received"] for m in about["moves"]["by_target"])
    own = sum(m["own"] for m in about["moves"]["by_target"])
    assert received + own == about["bytes"]["read"]
    assert received == about["bytes"]["moved"]
    if mesh.size > 16:
        assert about["moves"]["matrix"] is None
        return
    matrix = np.array(about["moves"]["matrix"])
    assert matrix.sum() == about["bytes"]["read"]
    assert matrix.sum() - np.trace(matrix) == about["bytes"]["moved"]
    assert [m["sources"] for m in about["moves"]["by_target"]] == (matrix > 0).sum(axis=0).tolist()


def test_many_ranks_are_a_list_of_those_that_receive_most() -> None:
    text = repr(reshaped(GPT, Mesh(tp=4, pp=4, dp=2)))
    assert "the target ranks that receive most (of 32)" in text
    rows = re.findall(r"^ +(\d+)  tp (\d) · pp (\d) · dp (\d) ", text, re.MULTILINE)
    assert len(rows) == 8
    for rank, tp, pp, dp in rows:
        assert int(rank) == (int(pp) * 2 + int(dp)) * 4 + int(tp)


def test_files_are_those_that_are_written(tmp_path: Path) -> None:
    wanted = reshaped(GPT, Mesh(tp=4))
    wanted.save(tmp_path / "step")
    found = {p.name for p in (tmp_path / "step").rglob("*") if p.is_file()} - {MANIFEST}
    assert plan(wanted)["files"] == len(found)


def test_the_largest_tensor_is_the_largest() -> None:
    ckpt = open_checkpoint(GPT)
    largest = max(math.prod(t.shape) * 4 for t in ckpt.tensors.values())
    assert plan(ckpt.reshape(Mesh()))["largest_tensor"] == largest
