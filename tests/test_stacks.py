"""A tensor is in the same stack, at the same layer, in every view, table and picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from compare import GPT, ZERO2, ZERO3
from hypothesis import given
from hypothesis import strategies as st

import ckptlab
from ckptlab import viz
from ckptlab.analysis.measure import Measure
from ckptlab.analysis.rows import rows_of
from ckptlab.catalog import Catalog, Tensor, Training
from ckptlab.catalog.stacks import kind_and_layer, places, split, stacks
from ckptlab.describe.fold import fold
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh

NAMES = {
    "2.mlp.weight": ("mlp.weight", 2),
    "transformer.h.10.attn.0.weight": ("transformer.h.attn.0.weight", 10),
    "layers.1.experts.3.w1": ("layers.experts.3.w1", 1),
    "0.weight": ("weight", 0),
    "blocks.7": ("blocks", 7),
    "norm": ("norm", None),
    "conv1d.weight": ("conv1d.weight", None),
    "7": ("7", None),
    "h.01.weight": ("h.01.weight", None),
    "h.\u0663.weight": ("h.\u0663.weight", None),
    "h.²": ("h.²", None),
    "h.-1.weight": ("h.-1.weight", None),
    ".3.w": (".w", 3),
    "a..3": ("a.", 3),
    "a.": ("a.", None),
    "": ("", None),
    f"h.{'9' * 5000}.w": (f"h.{'9' * 5000}.w", None),
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:40])
def test_the_layer_is_the_first_part_that_is_a_number(name: str) -> None:
    assert kind_and_layer(name) == NAMES[name]


@given(st.lists(st.sampled_from(["", "a", "0", "3", "12", "01", "w1"]), max_size=5).map(".".join))
def test_a_split_name_can_be_put_together_again(name: str) -> None:
    before, number, after = split(name)
    assert before + ("" if number is None else str(number)) + after == name


def tensor(name: str, shape: tuple[int, ...] = (4, 2)) -> Tensor:
    layout = Layout("out in")
    states = {"master": np.dtype(np.float32)}
    return Tensor(name, shape, layout, layout.resolve(shape, Mesh()), "parameter", states)


MODEL = [tensor(name) for name in [*NAMES, *(name.replace("1", "5").replace("2", "3") for name in NAMES)]]
MODEL += [tensor(f"layers.{layer}.experts.{e}.w1") for layer in (0, 1, 10) for e in (0, 1)]
MODEL += [tensor(f"h.{layer}.weight", (4, 2 + layer // 2)) for layer in range(4)]


def models() -> list[Sequence[Tensor]]:
    own = list({t.name: t for t in MODEL}.values())
    return [own, *(list(ckptlab.open(case).tensors.values()) for case in (GPT, ZERO2, ZERO3))]


@pytest.mark.parametrize("tensors", models(), ids=["names", "gpt", "zero2", "zero3"])
def test_the_stack_of_a_tensor_is_the_same_for_all(tensors: Sequence[Tensor]) -> None:
    found = places(tensors)
    assert set(found) == {t.name for t in tensors}
    lines = fold(tensors)
    for stack in stacks(tensors):
        names = [t.name for t in stack.tensors]
        if stack.numbers is None:
            assert found[names[0]] == (names[0], -1)
            continue
        assert [found[name] for name in names] == [(stack.name, n) for n in stack.numbers]
        assert names == [stack.pattern.replace("{layer}", str(n)) for n in stack.numbers]
        kinds = {(m.kind, m.layer) for m in (Measure(name, "master", 1) for name in names)}  # of `diff`
        assert kinds == {(re.sub(r"\[\d+…\]$", "", stack.name), n) for n in stack.numbers}
        of_line = [_members(line.name, tensors) for line in lines]
        assert sum(set(names) <= members for members in of_line) == 1, "a line of `info` holds whole stacks"


def _members(line: str, tensors: Sequence[Tensor]) -> set[str]:
    """The tensors that a line such as `{2..5}.mlp.{0, 3}.w` names."""
    parts = re.split(r"\{([^}]*)\}", line)
    pattern = "".join(re.escape(p) if i % 2 == 0 else f"(?:{_numbers(p)})" for i, p in enumerate(parts))
    return {t.name for t in tensors if re.fullmatch(pattern, t.name)}


def _numbers(text: str) -> str:
    spans = [span.strip().split("..") for span in text.split(",")]
    return "|".join(str(n) for span in spans for n in range(int(span[0]), int(span[-1]) + 1))


@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3], ids=lambda c: c.name)
def test_views_and_tables_of_a_checkpoint_have_its_stacks(case: Path) -> None:
    ckpt = ckptlab.open(case)
    found = places(ckpt.tensors.values())
    tree = ckpt.full()
    assert set(tree.children) == {stack for stack, _ in found.values()}
    of_tree = {row.name: (row.stack, row.layer) for row in rows_of(tree)}
    of_nodes = {row.name: (row.stack, row.layer) for node in tree.children.values() for row in rows_of(node)}
    of_files = {row.name: (row.stack, row.layer) for row in rows_of(ckpt)}
    assert of_files == {name: place for name, place in found.items() if ckpt[name].states}
    assert of_tree == of_nodes == of_files
    table = ckptlab.updates(ckpt)
    told = zip(table["tensor"].values, table["stack"].values, table["layer"].values, strict=True)
    assert all(found[name] == (stack, layer) for name, stack, layer in told)


def test_the_picture_of_the_stages_says_the_same_layers() -> None:
    names = ("emb.weight", "h.0.weight", "h.1.weight", "h.01.weight", "blocks.0", "blocks.1", "norm")
    catalog: Catalog = replace(
        ckptlab.open(GPT).catalog,
        mesh=Mesh(),
        tensors={n: tensor(n) for n in names},
        flat_groups=(),
        training=Training(),
    )
    drawn = viz.stages(catalog).svg
    for label in ("h 0–1", "blocks 0–1", "h.01", "norm"):
        assert label in drawn
