"""A single changed element is found and located, whatever format and mesh; what is the same is called the same."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3
from helpers.files import copy, poke
from safetensors.numpy import save_file

import ckptlab
from ckptlab import diff
from ckptlab.analysis import Compared, OnlyIn, Setting, elements
from ckptlab.arrays import Reader
from ckptlab.checkpoint import save_weights
from ckptlab.errors import CheckpointError
from ckptlab.formats import read
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh

DENSE = "3.self_attention.dense.weight"  # "out (tp in)": element [5, 13] is [5, 5] of tp rank 1's (16, 8)


@pytest.fixture
def poked(tmp_path: Path) -> Path:
    """The GPT checkpoint with one element of one moment of one tensor changed."""
    folder = copy(GPT, tmp_path)
    poke(folder, DENSE, "exp_avg_sq", 0.25, tp=1, element=5 * 8 + 5)
    return folder


def test_a_checkpoint_and_itself() -> None:
    found = diff(GPT, GPT)
    assert found.equal
    assert found.tensors == 52
    assert found.compared == tuple(Compared(s, 52, 14_960, 0) for s in ("master", "exp_avg", "exp_avg_sq", "param"))


def test_native_and_universal_are_equal_in_what_both_have() -> None:
    found = diff(GPT, GPT / "universal")
    assert found.equal
    assert [c.state for c in found.compared] == ["master", "exp_avg", "exp_avg_sq"]
    (missing,) = found.states_only_a
    assert (missing.state, len(missing.tensors), missing.everywhere) == ("param", 52, True)
    assert found.states_only_b == ()
    assert "only in A" in repr(found)
    (other_way,) = diff(GPT / "universal", GPT).states_only_b
    assert set(other_way.tensors) == set(missing.tensors)


@pytest.mark.parametrize(
    ("other", "window"),
    [
        *(pytest.param(GPT, n, marks=[pytest.mark.slow] * (n == 1), id=f"native-{n}") for n in (1, 7, 1 << 20)),
        *(pytest.param(GPT / "universal", n, id=f"universal-{n}") for n in (7, 1 << 20)),
    ],
)
def test_one_changed_element_is_found_and_located(poked: Path, other: Path, window: int) -> None:
    found = diff(other, poked, states=["exp_avg_sq"], window=window)
    assert not found.equal
    (one,) = found.differences
    assert (one.name, one.state, one.count, one.elements, one.at) == (DENSE, "exp_avg_sq", 1, 256, (5, 13))
    assert one.b == 0.25
    assert one.max_abs == abs(one.a - 0.25)
    assert one.max_rel == pytest.approx(one.max_abs / 0.25)
    assert found.compared == (Compared("exp_avg_sq", 52, 14_960, 1),)
    assert DENSE in repr(found)
    assert "[5, 13]" in repr(found)


def test_all_other_states_are_still_equal(poked: Path) -> None:
    found = diff(GPT, poked)
    assert {c.state: c.differ for c in found.compared} == {"master": 0, "exp_avg": 0, "exp_avg_sq": 1, "param": 0}
    assert diff(GPT, poked, states=["master", "exp_avg", "param"]).equal


def test_across_meshes_too(poked: Path, tmp_path: Path) -> None:
    read_again = ckptlab.open(poked).reshape(Mesh(tp=4, dp=3))
    read_again.save(tmp_path / "out" / "step", verify=False)  # poked: its checksums are wrong
    (one,) = diff(GPT, tmp_path / "out").differences
    assert (one.name, one.at) == (DENSE, (5, 13))
    assert diff(poked, tmp_path / "out").equal


@pytest.mark.parametrize("window", [200, 1 << 20])
def test_the_largest_difference_is_the_one_that_is_located(window: int, tmp_path: Path) -> None:
    folder = copy(ZERO2, tmp_path)
    for element, value in ((3, 1.0), (500, -9.0), (700, 2.0)):
        poke(folder, "wte.weight", "master", value, element=element)
    (one,) = diff(ZERO2, folder, window=window).differences
    assert (one.count, one.at, one.b) == (3, np.unravel_index(500, (61, 15)), -9.0)


@pytest.mark.slow
@pytest.mark.parametrize(("value", "equal"), [(math.nan, False), (math.inf, False), (-0.0, False), (0.0, True)])
def test_values_that_compare_oddly(value: float, equal: bool, tmp_path: Path) -> None:
    a, b = copy(ZERO2, tmp_path / "a"), copy(ZERO2, tmp_path / "b")
    poke(a, "gains", "exp_avg", 0.0, element=2)
    poke(b, "gains", "exp_avg", value, element=2)
    found = diff(a, b)
    assert found.equal is equal
    if not equal:
        (one,) = found.differences
        assert one.max_abs == (0.0 if value == 0 else math.inf)
        assert (one.count, one.at) == (1, (2,))
    assert diff(b, b).equal, "bitwise the same, NaN or not"
    assert found.to_dict()["equal"] is equal


def test_exported_weights_are_equal_under_every_alias(tmp_path: Path) -> None:
    for case in (ZERO2, ZERO3):
        out = tmp_path / case.name
        save_weights(read(case), out)
        found = diff(case, out)
        assert found.equal
        assert found.compared[0].state == "master"
        assert found.compared[0].tensors == 42 + 1  # and the head, which is tied
        assert (found.only_a, found.only_b) == ((), ())
        assert {m.state for m in found.states_only_a} >= {"exp_avg", "exp_avg_sq"}


def test_tied_tensors_may_be_called_by_either_name() -> None:
    catalog = read(ZERO2)
    renamed = replace(catalog.tensors["wte.weight"], name="lm_head.weight", aliases=())
    tensors = {n: t for n, t in catalog.tensors.items() if n != "wte.weight"}
    pieces = {("lm_head.weight" if n == "wte.weight" else n, s): p for (n, s), p in catalog.stored.pieces.items()}
    extents = replace(catalog.stored, pieces=pieces)
    held = {n: p for (n, _), p in catalog.placements.items() if n == "wte.weight"}
    placements = {**catalog.placements, ("lm_head.weight", "param"): held["wte.weight"]}
    only_module = replace(renamed, states={"param": renamed.states["param"]})
    other = replace(catalog, tensors={**tensors, "lm_head.weight": only_module}, placements=placements, extents=extents)
    for found in (diff(catalog, other), diff(other, catalog)):
        assert found.equal
        assert {c.state: c.tensors for c in found.compared}["param"] == 45


def test_a_state_that_some_tensors_lack_is_told_with_their_names(tmp_path: Path) -> None:
    catalog = read(ZERO2)
    lacking = {
        n: replace(t, states={s: d for s, d in t.states.items() if (n, s) != ("gains", "exp_avg")})
        for n, t in catalog.tensors.items()
    }
    found = diff(catalog, replace(catalog, tensors=lacking))
    assert found.equal
    assert found.states_only_a == (OnlyIn("exp_avg", ("gains",), False),)
    assert "only in A: gains" in repr(found)


def test_tensors_on_one_side_and_other_shapes_are_differences() -> None:
    catalog = read(GPT)
    tensors = {n: t for n, t in catalog.tensors.items() if n != DENSE}
    without = replace(catalog, tensors=tensors)
    assert (diff(catalog, without).only_a, diff(without, catalog).only_b) == ((DENSE,), (DENSE,))
    assert not diff(catalog, without).equal
    other = diff(GPT, ZERO2)
    assert not other.equal
    assert len(other.only_a) == 52
    reshaped = {**tensors, DENSE: replace(catalog.tensors[DENSE], shape=(8, 32))}
    assert diff(catalog, replace(catalog, tensors=reshaped)).shapes == ((DENSE, (16, 16), (8, 32)),)


def test_another_dtype_is_a_difference_even_of_equal_values(tmp_path: Path) -> None:
    exact = np.arange(8, dtype=np.float32)
    for name, array in (("a", exact.astype(ml_dtypes.bfloat16)), ("b", exact.astype(np.float16))):
        save_file({"w": array}, tmp_path / f"{name}.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    (one,) = found.differences
    assert (one.count, one.dtypes) == (0, ("bfloat16", "float16"))
    assert found.to_dict()["differences"][0]["reason"] == "dtype"
    assert not found.equal


def test_hyperparameters_and_steps_are_compared() -> None:
    catalog = read(GPT)
    first, second = catalog.groups
    changed = replace(first, options={**first.options, "lr": 0.5, "betas": [0.9, 0.95]}, scalars={"step": 4})
    found = diff(catalog, replace(catalog, training=replace(catalog.training, groups=(changed, second))))
    assert found.settings == (Setting("decay", "step", 3.0, 4), Setting("decay", "lr", 0.01, 0.5))
    assert not found.equal
    assert "lr" in repr(found)
    later = replace(catalog, training=replace(catalog.training, step=7))
    assert diff(catalog, later).settings == (Setting("training", "step", 3, 7),)


def test_nothing_to_compare_is_an_error(tmp_path: Path) -> None:
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "a.safetensors")
    save_file({"w": np.ones(3, np.float16)}, tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="nothing to compare"):
        diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    with pytest.raises(CheckpointError, match="no state 'fp23'"):
        diff(GPT, GPT, states=["fp23"])


def test_memory_stays_near_one_window(tmp_path: Path) -> None:
    import tracemalloc

    array = np.zeros(1 << 24, np.float32)  # 64 MiB
    save_file({"w": array}, tmp_path / "a.safetensors")
    array[-1] = 1
    save_file({"w": array}, tmp_path / "b.safetensors")
    del array
    tracemalloc.start()
    (one,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").differences
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert one.at == ((1 << 24) - 1,)
    assert peak < 16 << 20


# How far apart


def test_relative_and_cosine_are_those_of_the_whole_tensors(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((30, 40)).astype(np.float32)
    b = a.copy()
    b[:7] += 0.1 * rng.standard_normal((7, 40)).astype(np.float32)  # some windows are equal, some not
    for name, array in (("a", a), ("b", b)):
        save_file({"w": array}, tmp_path / f"{name}.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", window=100)
    (one,) = found.differences
    x, y = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    assert one.relative == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x))
    assert 1 - one.cosine == pytest.approx(1 - x @ y / np.linalg.norm(x) / np.linalg.norm(y), rel=1e-5)
    assert found.to_dict()["differences"][0]["cosine"] == one.cosine
    (measure,) = found.measures
    assert measure.squares_a == pytest.approx(x @ x)
    assert measure.squares_b == pytest.approx(y @ y)


def test_equal_tensors_are_measured_too() -> None:
    found = diff(GPT, GPT)
    assert len(found.measures) == 4 * 52
    assert {(m.relative, m.cosine, m.count) for m in found.measures} == {(0.0, 1.0, 0)}
    whole = ckptlab.open(GPT).full("master", stack=False)[DENSE].values
    (one,) = [m for m in found.measures if (m.name, m.state) == (DENSE, "master")]
    assert one.squares_a == pytest.approx(float((whole.astype(np.float64) ** 2).sum()))


def test_values_beyond_float32_and_zeros(tmp_path: Path) -> None:
    sides = {"a": {"big": [1e30, 1.0], "none": [0.0, 0.0]}, "b": {"big": [1e30, 2.0], "none": [0.0, 1.0]}}
    for side, tensors in sides.items():
        save_file({n: np.array(v, np.float32) for n, v in tensors.items()}, tmp_path / f"{side}.safetensors")
    big, none = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors").differences
    assert big.relative == pytest.approx(1e-30, rel=1e-6, abs=0)
    assert big.cosine == pytest.approx(1)
    assert none.relative == math.inf
    assert math.isnan(none.cosine)


def test_what_is_equal_may_be_beyond_float32(tmp_path: Path) -> None:
    for side, last in (("a", 1.0), ("b", 2.0)):
        save_file({"w": np.array([1e30, last], np.float32)}, tmp_path / f"{side}.safetensors")
    (one,) = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors", window=1).differences
    assert one.relative == pytest.approx(1e-30, rel=1e-6, abs=0)


def test_changes_are_summed_up_by_layer_and_kind(poked: Path) -> None:
    found = diff(GPT, poked)
    layers = found.by_layer("exp_avg_sq")
    assert [s.label for s in layers] == ["2", "3", "4", "5", "6", "other"]
    assert [s.differ for s in layers] == [0, 1, 0, 0, 0, 0]
    kinds = {s.label: s for s in found.by_kind("exp_avg_sq")}
    assert kinds["self_attention.dense.weight"].differ == 1
    assert kinds["self_attention.dense.weight"].tensors == 4
    assert kinds["self_attention.dense.weight"].relative > 0 == kinds["mlp.dense_h_to_4h.weight"].relative
    assert all(s.relative == 0 for s in found.by_layer("master"))
    text, html = repr(found), found._repr_html_()
    for word in ("kind (exp_avg_sq)", "layer (exp_avg_sq)", "self_attention.dense.weight"):
        assert word in text
        assert word in html
    assert found.to_dict()["layers"].keys() == {"exp_avg_sq"}
    with pytest.raises(CheckpointError, match="was not compared"):
        found.by_layer("momentum")


def test_what_changed_and_what_did_not(poked: Path) -> None:
    found = diff(GPT, poked)
    assert found.changed == (DENSE,)
    assert len(found.unchanged) == found.tensors - 1
    assert DENSE not in found.unchanged
    assert found.verdict == repr(found).splitlines()[0] == "different: 1 tensor with other values"
    assert "same      tied_modules.embed.word_embeddings.weight" in repr(found)
    assert found.to_dict()["unchanged"] == list(found.unchanged)
    assert "same  " not in repr(diff(GPT, GPT))


def test_numbers_that_are_whole_look_so() -> None:
    text = repr(diff(DATA / "plain_zero1_dp2_steps/global_step2", DATA / "plain_zero1_dp2_steps/global_step4"))
    assert re.search(r"no_decay +step +2 → 4", text)
    assert re.search(r"no_decay +lr +0\.\d+ → 0\.\d+", text)


def test_html_says_what_text_says(poked: Path) -> None:
    html = diff(GPT, poked)._repr_html_()
    assert "different: 1 tensor with other values" in html
    assert "[5, 13]" in html
    assert "<script" not in html
    assert "equal: 52 tensors" in diff(GPT, GPT)._repr_html_()


# Other names


def exported(case: Path, to: Path, rename: Callable[[str], str], change: float = 0.0) -> Path:
    """The weights of a case as safetensors, under other names and a little changed."""
    rng = np.random.default_rng(1)
    tensors = {}
    for name, array in ckptlab.open(case).full("master", stack=False).items():
        values = array.values.astype(np.float32)
        tensors[rename(name)] = values + change * values.std() * rng.standard_normal(values.shape).astype(np.float32)
    save_file(tensors, to)
    return to


@pytest.mark.parametrize("change", [0.0, 0.1])
def test_renamed_tensors_are_recognised_by_shape_and_content(change: float, tmp_path: Path) -> None:
    def rename(name: str) -> str:
        return f"model.layers.{name}".replace("self_attention", "attn").replace("dense_4h_to_h", "down")

    other = exported(GPT, tmp_path / "b.safetensors", rename, change)
    found = diff(GPT, other)
    assert [r for r in found.renamed if r.b != rename(r.a)] == []
    assert len(found.renamed) == 52
    assert (found.only_a, found.only_b) == ((), ())
    assert not found.equal
    assert {r.same for r in found.renamed} == {change == 0}
    assert (not found.differences) is (change == 0), "compared under their new names"
    assert "52 tensors under another name" in repr(found)
    assert len(found.to_dict()["renamed"]) == 52


def test_of_tensors_with_the_same_content_names_tell_which_is_which(tmp_path: Path) -> None:
    names = [f"{layer}.{part}.weight" for layer in range(3) for part in ("ln1", "ln2")]
    ones = {name: np.ones(7, np.float32) for name in names}
    save_file(ones, tmp_path / "a.safetensors")
    save_file({f"model.{name}": ones[name] for name in reversed(names)}, tmp_path / "b.safetensors")
    b = read(tmp_path / "b.safetensors")
    shuffled = replace(
        b, tensors={name: b.tensors[name] for name in sorted(b.tensors, key=lambda n: n[::-1], reverse=True)}
    )
    found = diff(tmp_path / "a.safetensors", shuffled)
    assert [(r.a, r.b) for r in found.renamed] == [(name, f"model.{name}") for name in sorted(names)]


def test_what_is_not_alike_is_added_or_removed(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    first, second = rng.standard_normal((2, 64, 64)).astype(np.float32)
    save_file({"old": first, "kept": second}, tmp_path / "a.safetensors")
    save_file({"new": second[::-1].copy(), "kept": second}, tmp_path / "b.safetensors")
    found = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert (found.only_a, found.only_b, found.renamed) == (("old",), ("new",), ())


def test_a_plot_of_change_over_depth(tmp_path: Path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    other = exported(GPT, tmp_path / "b.safetensors", str, 0.1)
    found = diff(GPT, other)
    axes = found.plot()
    axes.figure.savefig(tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 1000
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "layer"
    named = {line.get_label(): line for line in axes.lines}
    drawn = named["mlp.dense_h_to_4h.bias"]
    assert list(drawn.get_xdata()) == [2, 3, 4, 5]
    assert list(drawn.get_ydata()) == [
        m.relative for m in found.measures if m.kind == "mlp.dense_h_to_4h.bias" and m.state == "master"
    ]
    assert diff(GPT, GPT).plot("exp_avg", ax=axes) is axes


def test_both_checkpoints_are_read_once(poked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: Counter[tuple[str, str, int]] = Counter()
    really = elements.joined

    def noted(gather: Reader, cut: Cut, at: tuple[int, ...], start: int, stop: int) -> np.ndarray:
        taken.update((gather.name, gather.state, element) for element in range(start, stop))
        return really(gather, cut, at, start, stop)

    monkeypatch.setattr(elements, "joined", noted)
    found = diff(GPT, poked, window=300, on=1)
    assert set(taken.values()) == {2}, "each element once of each side"
    assert len(taken) == sum(m.elements for m in found.measures)
