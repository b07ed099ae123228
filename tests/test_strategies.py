"""Layouts that a checkpoint does not tell: inferred where data and names prove them, asked for where not, and what
strategies can say."""

from __future__ import annotations

import json
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from compare import GPT, ZERO2, differences, differences_from_truth, whole
from helpers.command import run
from helpers.files import edit, poke
from safetensors.numpy import save_file

import ckptlab
from ckptlab import Mesh
from ckptlab.arrays import copies
from ckptlab.errors import CheckpointError, LayoutError, ReshapeError, UnsupportedError
from ckptlab.formats import read
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Layout
from ckptlab.sharding.strategies import replicated, resolve

BIAS = "3.mlp.dense_4h_to_h.bias"


@pytest.fixture
def untold(tmp_path: Path) -> Path:
    """A checkpoint of tp 2 that says nothing of its layouts."""
    folder = Path(shutil.copytree(GPT / "global_step3", tmp_path / "run"))
    for file in folder.glob("mp_rank_*"):
        edit(file, lambda c: {k: v for k, v in c.items() if k != "universal_checkpoint_info"})
    return folder


class TestInferred:
    def test_by_equal_shards_and_known_names(self, untold: Path, tmp_path: Path) -> None:
        ckpt = ckptlab.open(untold)
        assert differences_from_truth(ckpt.catalog, GPT / "truth.safetensors") == []
        cuts = {name: tensor.cut for name, tensor in ckpt.tensors.items()}
        assert cuts == {name: tensor.cut for name, tensor in ckptlab.open(GPT).tensors.items()}
        notices = [f for f in ckpt.findings if f.code == "layouts-inferred"]
        assert sorted(n for f in notices for n in f.where.tensors) == sorted(ckpt)
        assert {f.severity for f in notices} == {"info"}
        ckpt.reshape(tp=4, pp=1, dp=1).save(tmp_path / "a" / "step")
        ckptlab.open(tmp_path / "a").reshape(tp=2, pp=2, dp=2).save(tmp_path / "b" / "step")
        assert differences(read(tmp_path / "b"), read(GPT)) == []

    def test_names_of_no_family_are_asked_for(self, untold: Path) -> None:
        rename(untold, "3.mlp.dense_h_to_4h.weight", "3.mlp.widen.weight")
        with pytest.raises(UnsupportedError, match=r"3.mlp.widen.weight.* its shards differ.* Give a strategy"):
            ckptlab.open(untold)
        strategy = {r".*mlp\.widen\.weight": "(tp out) in"}  # the rest is inferred all the same
        assert ckptlab.open(untold, strategy)["3.mlp.widen.weight"].shape[0] % 2 == 0

    def test_a_name_of_no_family_is_a_replica_if_its_shards_are_equal(self, untold: Path) -> None:
        rename(untold, "3.input_layernorm.weight", "3.scale.weight")
        assert ckptlab.open(untold)["3.scale.weight"].layout.text == "out"

    def test_replicas_that_differ_are_asked_for(self, untold: Path) -> None:
        poke(untold, BIAS, "param", 9.0, tp=1)
        with pytest.raises(UnsupportedError, match=f"{BIAS}.*its copies differ"):
            ckptlab.open(untold)

    def test_shapes_beside_it_speak_against_a_family(self, untold: Path) -> None:
        """An MLP that holds gate and up projection is not taken for a plain one."""
        doubled(untold, "3.mlp.dense_h_to_4h.weight")
        with pytest.raises(UnsupportedError, match="Give a strategy"):
            ckptlab.open(untold)


def rename(folder: Path, old: str, new: str) -> None:
    layer, old_key, new_key = old.partition(".")[0], old.partition(".")[2], new.partition(".")[2]
    for file in folder.glob(f"layer_{int(layer):02d}-*"):
        edit(file, lambda c: {new_key if k == old_key else k: v for k, v in c.items()})
    for file in folder.glob("mp_rank_*"):
        edit(
            file,
            lambda c: c.update(
                param_shapes=[{new if k == old else k: v for k, v in g.items()} for g in c["param_shapes"]]
            ),
        )
    for file in folder.glob("*optim_states.pt"):
        edit(file, lambda c: c["optimizer_state_dict"].pop("param_slice_mappings") and None)


def doubled(folder: Path, name: str) -> None:
    """A layer file and shapes that say twice the rows (the flat buffers are then another run's: not looked at here)."""
    layer, _, key = name.partition(".")
    for file in folder.glob(f"layer_{int(layer):02d}-*"):
        edit(file, lambda c: {**c, key: np.concatenate([c[key].map()] * 2)})
    for file in folder.glob("*optim_states.pt"):
        file.unlink()
    for file in folder.glob("mp_rank_*"):
        edit(
            file,
            lambda c: c.update(
                param_shapes=[
                    {k: (2 * v[0], *v[1:]) if k == name else v for k, v in g.items()} for g in c["param_shapes"]
                ]
            ),
        )


class TestCopies:
    def test_a_strategy_that_calls_shards_copies_is_refused_before_any_is_dropped(
        self, untold: Path, tmp_path: Path
    ) -> None:
        wrong = ckptlab.open(untold, {r".*dense_h_to_4h\.bias": "out"})
        for save in (
            lambda: wrong.reshape(tp=1).save(tmp_path / "a" / "step"),
            lambda: ckptlab.save_weights(wrong, tmp_path / "weights"),
        ):
            with pytest.raises(ReshapeError, match=r"dense_h_to_4h.bias.*tolerance 0.01"):
                save()
        assert not (tmp_path / "a").exists()

    def test_so_is_one_that_calls_a_part_of_them_copies(self, untold: Path, tmp_path: Path) -> None:
        """Keys and values that are cut, said to be those of multi-query attention."""
        layout = Layout("((tp q) + k)", sizes={"q": 16, "k": 16})
        wrong = ckptlab.open(untold, {r".*dense_h_to_4h\.bias": layout})
        with pytest.raises(ReshapeError, match=r"dense_h_to_4h.bias.*tp 0 and pp 0 · tp 1 hold the same"):
            ckptlab.save_weights(wrong, tmp_path / "weights")
        averaged = ckptlab.open(untold, {r".*dense_h_to_4h\.bias": layout.replace(replicas="mean")})
        with pytest.raises(LayoutError, match='dense_h_to_4h.bias: replicas="mean" is for tensors that ranks have'):
            averaged.full("master", stack=False)["2.mlp.dense_h_to_4h.bias"].load()

    def test_copies_that_drifted_a_little_are_let_through(self, untold: Path, tmp_path: Path) -> None:
        held = float(whole(read(GPT), "3.input_layernorm.weight", "master")[0])
        poke(untold, "3.input_layernorm.weight", "master", held * 1.001, tp=1)
        ckptlab.open(untold, "megatron").reshape(tp=1).save(tmp_path / "a" / "step", verify=False)

    def test_copies_of_complex_numbers_differ_in_imaginary_parts_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        held = iter([np.array([1 + 1j, 2]), np.array([1 + 3j, 2])])
        monkeypatch.setattr(copies, "reader", lambda *_, **__: Namespace(chunks=lambda *_: [next(held)]))
        first, other = read(GPT).placement("3.input_layernorm.weight", "master").holders[:2]
        found = copies._difference(read(GPT), "3.input_layernorm.weight", "master", first, other)
        assert found == pytest.approx((2, 2))


class TestSums:
    """Biases that every rank adds: the whole is their sum, and moments are equal."""

    STRATEGY: ClassVar = {r".*mlp\.dense_4h_to_h\.bias": Layout("out", replicas="sum")}

    def test_there_and_back(self, tmp_path: Path) -> None:
        once, two = read(GPT), read(GPT, resolve(self.STRATEGY | RULES))
        assert np.allclose(whole(two, BIAS, "master"), 2 * whole(once, BIAS, "master"))
        assert np.array_equal(whole(two, BIAS, "exp_avg"), whole(once, BIAS, "exp_avg"))
        reshaped = ckptlab.open(GPT, self.STRATEGY | RULES).reshape(tp=4, pp=1, dp=1)
        cost = reshaped.cost()
        with ckptlab.reading() as did:
            reshaped.save(tmp_path / "a" / "step", verify=False)
        assert did.bytes == cost.read
        strategy = self.STRATEGY | RULES
        four = read(tmp_path / "a", resolve(strategy))
        assert four[BIAS].layout.replicas == "sum"
        assert np.allclose(whole(four, BIAS, "master"), whole(two, BIAS, "master"), rtol=1e-6)
        assert np.array_equal(whole(four, BIAS, "exp_avg"), whole(two, BIAS, "exp_avg"))
        assert "universal_checkpoint_info" not in torchfile.read(tmp_path / "a" / "step" / "mp_rank_00_model_states.pt")

    def test_gpt_neox(self) -> None:
        neox = resolve("gpt-neox")
        assert neox is not None
        says = lambda name, *shards: neox.layout(name, list(shards))  # noqa: E731
        assert says("2.mlp.dense_4h_to_h.bias", (8,), (8,)).replicas == "sum"
        assert says("2.mlp.linear2.bias", (8,), (8,)).replicas == "sum"
        assert says("2.mlp.linear2.weight", (8, 4), (8, 4)).text == "out (tp in)"
        assert says("9.final_linear.weight", (8, 4), (8, 4)).text == "(tp out) in"
        assert says("2.attention.query_key_value.weight", (8, 4), (8, 4)).text == "(tp out) in"
        assert says("2.input_layernorm.weight", (8,), (8,)).text == "out"


RULES = {
    r".*word_embeddings\.weight|.*(query_key_value|dense_h_to_4h)\.weight": "(tp out) in",
    r".*(query_key_value|dense_h_to_4h)\.bias": "(tp out)",
    r".*(self_attention\.dense|dense_4h_to_h)\.weight": "out (tp in)",
    r".*(norm\w*\.weight|bias)": "out",
    r".*position_embeddings\.weight": "out in",
}


@pytest.mark.parametrize(
    ("name", "shards", "text"),
    [
        ("decoder.layers.3.self_attention.linear_qkv.weight", [(12, 4)] * 2, "(tp out) in"),
        ("decoder.layers.3.self_attention.linear_proj.weight", [(4, 4)] * 2, "out (tp in)"),
        ("decoder.layers.3.mlp.linear_fc1.weight", [(16, 4)] * 2, "(tp out) in"),
        ("decoder.layers.3.mlp.linear_fc1.layer_norm_weight", [(4,)] * 2, "out"),
        ("decoder.layers.3.mlp.linear_fc2.weight", [(4, 8)] * 2, "out (tp in)"),
        ("decoder.layers.3.mlp.linear_fc2.bias", [(4,)] * 2, "out"),
        ("embedding.word_embeddings.weight", [(4, 8)] * 2, "(tp out) in"),
        ("output_layer.weight", [(4, 8)] * 2, "(tp out) in"),
    ],
)
def test_megatron_knows_the_names_of_its_core(name: str, shards: list, text: str) -> None:
    strategy = resolve("megatron")
    assert strategy is not None
    layout = strategy.layout(name, shards)
    assert layout is not None
    assert layout.text == text
    gated = resolve("megatron-swiglu").layout(name, shards)  # type: ignore[union-attr]
    assert gated.text == ("(2 tp out) in" if "linear_fc1.weight" in name else text)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("rows", "strategy", "why"),
    [
        (16, "megatron", r"a.dense_h_to_4h.weight: gate and up projection in one .* say strategy='megatron-swiglu'"),
        (8, "megatron-swiglu", r"a.dense_h_to_4h.weight: no gate in it .* say strategy='megatron'"),
    ],
)
def test_a_strategy_that_the_shapes_deny_is_refused(tmp_path: Path, rows: int, strategy: str, why: str) -> None:
    """Else the halves of a gated layer would be cut as one block, in silence."""
    weights = {"a.dense_h_to_4h.weight": np.zeros((rows, 4), np.float32), "a.dense_4h_to_h.weight": np.zeros((4, 8))}
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=why):
        ckptlab.open(tmp_path, strategy=strategy)
    assert [f.code for f in ckptlab.check(tmp_path, strategy=strategy).findings] == ["strategy-denied"]
    with pytest.raises(ReshapeError, match=why):
        ckptlab.open(tmp_path).reshape(tp=2, strategy=strategy)
    other = {"megatron": "megatron-swiglu", "megatron-swiglu": "megatron"}[strategy]
    assert ckptlab.open(tmp_path).reshape(tp=2, strategy=other).mesh.tp == 2


def test_a_pattern_that_matches_no_tensor_is_said() -> None:
    """Else a slip of the pen leaves a tensor as it was, in silence: of a source, and of a target."""
    slip = {r"fc1\.weight": "(tp out) in", r".*fc2\.weight": "out (tp in)"}
    opened = ckptlab.open(ZERO2, strategy=slip)
    assert ("strategy-unmatched", "info") in {(f.code, f.severity) for f in opened.findings}
    said = next(f for f in opened.findings if f.code == "strategy-unmatched")
    assert repr(r"fc1\.weight") in said.found
    assert "fc2" not in said.found
    assert said in ckptlab.check(ZERO2, strategy=slip).findings
    target = ckptlab.open(ZERO2).reshape(dp=1, strategy=slip)
    assert [f.found for f in target.check() if f.code == "strategy-unmatched"] == [said.found]
    whole = ckptlab.open(ZERO2, strategy={r".*fc1\.weight": "(tp out) in"})
    assert not [f for f in whole.findings if f.code == "strategy-unmatched"]
    alone = ckptlab.open(ZERO2, strategy={"wte": "(tp out) in"}).findings
    assert [f.severity for f in alone if f.code == "strategy-unmatched"] == ["warning"]


class TestJSON:
    def test_says_all_of_a_layout(self, tmp_path: Path) -> None:
        told = {
            ".*qkv": {
                "layout": "((tp q) + (tp k) + (tp v)) in",
                "dims": ["rows", "in"],
                "totals": {"q": 32, "k": 16, "v": 16},
                "units": {"q": 4},
            },
            ".*bias": {"layout": "out", "replicas": "sum"},
            ".*odd": {"layout": "(tp out)", "sizes": {"out": [3, 2]}, "stages": [0, 1]},
            ".*vocab": {"layout": "(tp out) in", "padded": {"0": 12}},
        }
        (tmp_path / "s.json").write_text(json.dumps(told))
        strategy = resolve(str(tmp_path / "s.json"))
        assert strategy is not None
        qkv = strategy.layout("a.qkv", [(32, 4)] * 2)
        assert qkv == Layout(
            "((tp q) + (tp k) + (tp v)) in",
            dims=("rows", "in"),
            totals={"q": 32, "k": 16, "v": 16},
            units={"q": 4},
        )
        assert qkv.resolve((64, 4), Mesh(tp=2)).shard_shape((0,)) == (32, 4)
        assert strategy.layout("a.bias", [(4,)]) == Layout("out", replicas="sum")
        assert strategy.layout("a.odd", [(3,)]) == Layout("(tp out)", sizes={"out": (3, 2)}, stages=(0, 1))
        assert strategy.layout("a.vocab", [(3, 2)]) == Layout("(tp out) in", padded={0: 12})

    @pytest.mark.parametrize(
        "value",
        [3, None, [], {}, {"layout": 3}, {"layout": "out", "colour": 1}, {"layout": "out", "replicas": "some"},
         {"layout": "(tp out)", "sizes": 3}, {"layout": "(tp out)", "sizes": {"out": "x"}},
         {"layout": "(tp out)", "sizes": {"out": None}}, {"layout": "(tp out)", "totals": {"q": 1}},
         {"layout": "out", "padded": {"x": 1}}, {"layout": "out", "padded": 3}, {"layout": "out", "stages": "x"},
         {"layout": "out", "dims": 3}, {"layout": "(tp out)", "totals": {"out": "a"}}],
        ids=str,
    )  # fmt: skip
    def test_what_is_none_is_one_line(self, value: Any, tmp_path: Path) -> None:
        (tmp_path / "s.json").write_text(json.dumps({".*": value}))
        with pytest.raises(LayoutError, match=r"strategy .*s.json") as caught:
            resolve(str(tmp_path / "s.json"))
        assert "\n" not in str(caught.value)


class Halves:
    """A strategy for the plain model: attention is cut, the rest replicated."""

    def layout(self, name: str, shards: Any) -> Layout | None:
        if name.endswith(("qkv.weight", "proj.weight")):
            return Layout("(tp out) in" if "qkv" in name else "out (tp in)")
        return replicated(len(shards[0]))


def test_zero_3_with_tensor_parallelism_there_and_back(tmp_path: Path) -> None:
    ckptlab.open(ZERO2, Halves()).reshape(tp=3, dp=2, zero_stage=3).save(tmp_path / "a" / "step")
    there = ckptlab.open(tmp_path / "a")
    assert (str(there.mesh), there.zero_stage) == ("tp 3 · pp 1 · dp 2", 3)
    assert len(list((tmp_path / "a" / "step").glob("zero_pp_rank_*_model_states.pt"))) == 6
    assert there["blocks.0.qkv.weight"].cut.axes == ("tp",)
    assert differences_from_truth(there.catalog, ZERO2 / "truth.safetensors") == []
    assert ckptlab.check(there).healthy
    there.reshape(tp=1, dp=2, zero_stage=2).save(tmp_path / "b" / "step")
    assert differences(read(tmp_path / "b"), read(ZERO2)) == []


def test_several_folders_on_the_command_line(tmp_path: Path) -> None:
    for node, other in ((0, 1), (1, 0)):
        folder = Path(shutil.copytree(ZERO2 / "global_step3", tmp_path / f"node{node}"))
        next(folder.glob(f"*rank_{other}_*optim_states.pt")).unlink()
    told = json.loads(run("info", tmp_path / "node0", tmp_path / "node1", "--json").stdout)
    assert told["mesh"]["dp"] == 2


def test_the_command_line_names_every_strategy() -> None:
    from ckptlab.cli.options import strategy_option
    from ckptlab.sharding.strategies import REGISTRY

    command: Any = strategy_option(lambda: None)
    [option] = command.__click_params__
    assert all(name in option.help for name in ("megatron", "megatron-swiglu", "gpt-neox", "hf"))
    assert set(REGISTRY.names()) >= {"megatron", "megatron-swiglu", "gpt-neox", "hf"}
