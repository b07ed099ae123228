"""How layers are dealt to stages, beside DeepSpeed's own partitioners."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from compare import GPT, whole
from hypothesis import given
from hypothesis import strategies as st

import ckptlab
from ckptlab import Mesh
from ckptlab.catalog import PARAM, Catalog
from ckptlab.errors import CheckpointError
from ckptlab.formats import read
from ckptlab.formats.deepspeed.groups import match_groups
from ckptlab.formats.deepspeed.names import layer_number
from ckptlab.formats.deepspeed.pipeline import Pipeline, describe, stage_of
from ckptlab.formats.torch import torchfile
from ckptlab.reshaping import Reshape

BLOCK, NORM = (("w", (4, 4)),), (("b", (4,)),)


def pipeline(weights: list[int]) -> Pipeline:
    return Pipeline(tuple((BLOCK if w else ()) for w in weights), tuple(weights), (0,) * len(weights))


@pytest.mark.slow
@given(st.lists(st.sampled_from([0, 0, 1, 1, 1, 5, 100]), min_size=1, max_size=14), st.integers(1, 6))
def test_dealt_as_deepspeed_deals(weights: list[int], pp: int) -> None:
    runtime = pytest.importorskip("deepspeed.runtime.utils")
    assert list(pipeline(weights).starts(pp, "parameters")) == [
        int(i) for i in runtime.partition_balanced(weights, pp)[:-1]
    ]
    assert list(pipeline(weights).starts(pp, "uniform")) == runtime.partition_uniform(len(weights), pp)[:-1]


def test_megatrons_nine_layers() -> None:
    layers = describe(read(GPT))
    assert layers.blocks == (0, 0, 1, 1, 1, 1, 0, 0)
    assert layers.starts(2, "blocks") == (0, 4)
    assert layers.starts(4, "blocks") == (0, 3, 4, 5)
    assert [stage_of(i, (0, 3, 4, 5)) for i in range(8)] == [0, 0, 0, 1, 2, 3, 3, 3]


def test_the_method_is_the_one_that_fits() -> None:
    signatures = ((), BLOCK, BLOCK, BLOCK, BLOCK, NORM, ())
    counts = (0, 16, 16, 16, 16, 4, 0)
    assert Pipeline(signatures, counts, (0, 0, 0, 1, 1, 1, 1)).infer_method(2) == "blocks"
    assert Pipeline(signatures, counts, (0, 0, 0, 0, 1, 1, 1)).infer_method(2) == "uniform"
    assert Pipeline(signatures, counts, (0, 0, 1, 1, 1, 1, 1)).infer_method(2) is None


@pytest.mark.parametrize(
    ("name", "layer"),
    [("0.weight", 0), ("12.mlp.bias", 12), ("layers.3.weight", None), ("²", None), ("9" * 5000, None), ("", None)],
    ids=["first", "twelfth", "of no pipeline", "no digit", "too many", "none"],
)
def test_a_layers_number_begins_the_names_of_its_tensors(name: str, layer: int | None) -> None:
    assert layer_number(name) == layer


def test_groups_with_the_same_hyperparameters_are_told_by_their_tensors() -> None:
    """A stage in the middle has none of the embeddings' group, and DeepSpeed leaves that out there."""
    embedding, weights, norms = ("tied_modules.embed.w",), "2.up.weight", "2.norm.weight"
    stages = [
        [({"lr": 1}, embedding), ({"lr": 1}, (weights,)), ({"lr": 1}, (norms,))],
        [({"lr": 1}, ("3.up.weight",)), ({"lr": 1}, ("3.norm.weight",))],
        [({"lr": 1}, embedding), ({"lr": 1}, ("4.up.weight",)), ({"lr": 1}, ("4.norm.weight",))],
    ]
    groups, index = match_groups("run", stages)
    assert [g.tensors for g in groups] == [
        embedding,
        ("2.up.weight", "3.up.weight", "4.up.weight"),
        ("2.norm.weight", "3.norm.weight", "4.norm.weight"),
    ]
    assert index == [[0, 1, 2], [1, 2], [0, 1, 2]]


def test_groups_of_later_stages_come_behind_unless_one_that_follows_is_known() -> None:
    """As those of a learning rate that falls from layer to layer."""
    stages = [
        [({"lr": 1}, ("tied",)), ({"lr": 2}, ("2.w",)), ({"lr": 3}, ("3.w",)), ({"lr": 9}, ("3.b",))],
        [({"lr": 1}, ("tied",)), ({"lr": 4}, ("4.w",)), ({"lr": 5}, ("5.w",)), ({"lr": 9}, ("5.b",))],
        [({"lr": 1}, ("tied",)), ({"lr": 9}, ("6.b",)), ({"lr": 6}, ("6.w",))],
    ]
    groups, index = match_groups("run", stages)
    assert [g.tensors for g in groups] == [
        ("tied",),
        ("2.w",),
        ("3.w",),
        ("4.w",),
        ("5.w",),
        ("3.b", "5.b", "6.b"),
        ("6.w",),
    ]
    assert index == [[0, 1, 2, 5], [0, 3, 4, 5], [0, 5, 6]]


def _with_buffers(path: Path) -> Path:
    """GPT with a rotary table, which is saved, in every transformer layer, as GPT-NeoX has it."""
    torch = pytest.importorskip("torch")
    shutil.copytree(GPT / "global_step3", path)
    for file in sorted(path.glob("layer_*")):
        held = torch.load(file, weights_only=False)
        if "self_attention.dense.weight" in held:
            held["self_attention.inv_freq"] = torch.arange(1.0, 5.0)
            torch.save(held, file)
    for stage, layers in enumerate(((2, 3), (4, 5))):
        for tp in range(2):
            file = path / f"mp_rank_{2 * stage + tp:02d}_model_states.pt"
            model = torch.load(file, weights_only=False)
            model["buffer_names"] = [f"{layer}.self_attention.inv_freq" for layer in layers]
            torch.save(model, file)
    return path


def test_buffers_of_a_pipelines_layers_are_no_parts(tmp_path: Path) -> None:
    name = "3.self_attention.inv_freq"
    ckpt = ckptlab.open(_with_buffers(tmp_path / "global_step3"))
    assert (ckpt[name].kind, ckpt[name].shape) == ("buffer", (4,))
    ckpt.reshape(tp=1, pp=4, dp=1).save(tmp_path / "out" / "global_step3")
    model = torchfile.read(str(tmp_path / "out" / "global_step3" / "mp_rank_01_model_states.pt"))
    assert model["buffer_names"] == [name]
    again = ckptlab.open(tmp_path / "out" / "global_step3")
    assert whole(again.catalog, name, PARAM).tolist() == [1, 2, 3, 4]
    assert "universal-left-out" in [f.code for f in ckpt.reshape(format="universal").check()]
    assert "universal-left-out" not in [f.code for f in ckptlab.open(GPT).reshape(format="universal").check()]


def test_a_group_that_is_in_no_order_of_layers_is_told(tmp_path: Path) -> None:
    catalog = read(GPT)
    groups = tuple(replace(g, tensors=g.tensors[::-1]) for g in catalog.groups)
    backwards = replace(catalog, training=replace(catalog.training, groups=groups))
    for pp, told in ((4, True), (2, False)):
        assert ("group-order" in [f.code for f in Reshape.of(backwards, Mesh(pp=pp)).check()]) is told
    assert "group-order" not in [f.code for f in Reshape.of(catalog, Mesh(pp=4)).check()]


def _with_a_layer_apart() -> Catalog:
    """GPT's run with weights of a layer in a parameter group of their own, which other stages have nothing of."""
    catalog = read(GPT)
    mine = tuple(n for n in catalog.tensors if n.startswith("2.mlp") and n.endswith("weight"))
    others = tuple(replace(g, tensors=tuple(n for n in g.tensors if n not in mine)) for g in catalog.groups)
    apart = replace(catalog.groups[0], options={**catalog.groups[0].options, "lr": 3e-4}, tensors=mine)
    groups = (apart, *others)
    tensors = {
        n: replace(t, group=next(i for i, g in enumerate(groups) if n in g.tensors)) for n, t in catalog.tensors.items()
    }
    return replace(catalog, tensors=tensors, training=replace(catalog.training, groups=groups))


def test_a_universal_folder_says_which_groups_a_stage_has(tmp_path: Path) -> None:
    """By their number alone a stage's groups would get those of others."""
    catalog = _with_a_layer_apart()
    made = Reshape.of(catalog, Mesh(pp=2), "universal")
    assert "universal-groups" in [f.code for f in made.check()]
    assert "universal-groups" not in [f.code for f in Reshape.of(catalog, Mesh(), "universal").check()]
    made.save(tmp_path / "universal")
    again = read(tmp_path / "universal")
    assert [(g.options["lr"], set(g.tensors)) for g in again.groups] == [
        (g.options["lr"], set(g.tensors)) for g in catalog.groups
    ]
    torch = pytest.importorskip("torch")  # as DeepSpeed's own converter leaves it
    file = tmp_path / "universal" / "zero" / "optimizer_state.pt"
    held = torch.load(file, weights_only=False)
    held["param_groups"] = held["param_groups"][:2]
    del held["ckptlab_groups"]
    torch.save(held, file)
    with pytest.raises(CheckpointError, match="parameter group"):
        read(tmp_path / "universal")


def test_a_tied_modules_layer_comes_through_a_universal_folder(tmp_path: Path) -> None:
    """Functions may stand between it and the first block, as in Megatron-DeepSpeed's own model: names do not tell."""
    step = tmp_path / "global_step3"
    shutil.copytree(GPT / "global_step3", step)
    for file in sorted(step.glob("layer_01-*")):
        file.rename(step / file.name.replace("layer_01", "layer_00"))
    ckptlab.open(step).reshape(format="universal").save(tmp_path / "universal")
    made = ckptlab.open(tmp_path / "universal").reshape(tp=2, pp=2, dp=2, format="deepspeed")
    assert sorted(f.name for f in made.files if f.name.startswith("layer_0"))[0].startswith("layer_00")
    assert "tied-layer-assumed" not in [f.code for f in made.check()]
    theirs = ckptlab.open(GPT / "universal").reshape(tp=2, pp=2, dp=2, format="deepspeed")
    assert "tied-layer-assumed" in [f.code for f in theirs.check()]
