"""AutoTP: maps that are read as notation or as rows, widths that follow heads, other tp degrees, real DeepSpeed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, differences, differences_from_truth
from hypothesis import given
from hypothesis import strategies as st
from real_deepspeed import make_case, requires_deepspeed, resume

import ckptlab
from ckptlab.catalog import Tensor
from ckptlab.convert.manifest import MANIFEST
from ckptlab.errors import CheckpointError, LayoutError, ReshapeError, UnsupportedError
from ckptlab.formats import fileplan, read
from ckptlab.formats.deepspeed.autotp import AffineMap, AffineMaps, RowsLayout, map_of, on_tp, shard_widths, told_heads
from ckptlab.formats.deepspeed.header import Header
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import HuggingFace, resolve

AUTOTP = DATA / "autotp_tp2_dp2"
Q = "layers.0.self_attn.q_proj.weight"


def test_every_state_is_what_training_held() -> None:
    catalog = read(AUTOTP)
    assert differences_from_truth(catalog, AUTOTP / "truth.safetensors") == []
    assert catalog.training.layouts_told
    assert ckptlab.check(AUTOTP).findings == ()


def test_maps_are_lines_of_notation() -> None:
    tensors = read(AUTOTP).tensors
    said = {
        name: tensors[f"layers.0.{name}.weight"].layout
        for name in ("self_attn.q_proj", "mlp.down_proj", "input_layernorm")
    }
    assert said["self_attn.q_proj"] == Layout("(tp out) in", sizes={"out": (16, 8)}, stages=(0,))
    assert said["mlp.down_proj"] == Layout("out (tp in)", sizes={"in": (19, 18)}, stages=(0,))
    assert said["input_layernorm"] == Layout("out", stages=(0,))
    assert tensors["lm_head.weight"].layout == Layout("(tp out) in", sizes={"out": (31, 30)}, stages=(0,))
    assert tensors["lm_head.weight"].shape == (61, 24)  # the vocabulary is padded for nobody


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [{"tp": 3, "dp": 1}, {"tp": 1, "dp": 2}, {"tp": 4, "dp": 1}, {"dp": 3}, {"zero_stage": 2}], ids=str
)
def test_there_and_back_is_the_identity(asked: dict[str, Any], tmp_path: Path) -> None:
    source = ckptlab.open(AUTOTP)
    source.reshape(**asked).save(tmp_path / "there" / "step")
    there = ckptlab.open(tmp_path / "there")
    assert differences(source.catalog, there.catalog) == []
    if there.mesh.tp > 1:
        there.reshape(tp=2, dp=2, kv_heads=3, zero_stage=1).save(tmp_path / "back" / "step")
        back = ckptlab.open(tmp_path / "back")
        assert differences(source.catalog, back.catalog) == []
        assert {n: t.layout for n, t in back.catalog.tensors.items()} == {
            n: t.layout for n, t in source.catalog.tensors.items()
        }


def test_universal_holds_whole_tensors(tmp_path: Path) -> None:
    source = ckptlab.open(AUTOTP)
    source.reshape().save(tmp_path / "there" / "step", "universal")
    assert differences(source.catalog, read(tmp_path / "there")) == []


def test_its_own_maps_are_written_again(tmp_path: Path) -> None:
    """On its own mesh, what AutoTP recorded of every tensor, to the number."""
    ckptlab.open(AUTOTP).reshape(dp=1).save(tmp_path / "step")
    said, wanted = (
        torchfile.read_contents(str(folder / "mp_rank_01_model_states.pt")).value["universal_checkpoint_info"]
        for folder in (tmp_path / "step", AUTOTP / "global_step3")
    )
    assert said["affine_map"]["params"].keys() == wanted["affine_map"]["params"].keys()
    for pattern, written in said["affine_map"]["params"].items():
        assert written == wanted["affine_map"]["params"][pattern], pattern
    assert {k: v for k, v in said.items() if k != "affine_map"} == {
        k: v for k, v in wanted.items() if k != "affine_map"
    }


def test_the_configuration_says_the_targets_degree(tmp_path: Path) -> None:
    ckptlab.open(AUTOTP).reshape(tp=1).save(tmp_path / "step")
    config = torchfile.read(tmp_path / "step" / "mp_rank_00_model_states.pt")["ds_config"]
    assert config["tensor_parallel"]["autotp_size"] == 1


def test_heads_that_nothing_tells_are_asked_for(tmp_path: Path) -> None:
    ckptlab.open(AUTOTP).reshape(tp=3, dp=1).save(tmp_path / "step")
    even = ckptlab.open(tmp_path / "step")
    guessed = even.reshape(tp=2)
    assert [f.code for f in guessed.check()] == ["heads-unknown"]
    assert "say kv_heads=" in guessed.check()[0].text
    assert even.reshape(tp=2, kv_heads=3).target[Q].layout == read(AUTOTP)[Q].layout
    assert even.reshape(tp=2, kv_heads=3).check() == ()


def test_more_ranks_than_heads_are_written_and_said() -> None:
    """Rank 3 has nothing of attention. Real DeepSpeed 0.19.8 trains that, transformers' LLaMA too, to the same loss."""
    there = ckptlab.open(AUTOTP).reshape(tp=4, dp=1)
    assert [(f.code, f.severity) for f in there.check()] == [("heads-few", "warning")]
    assert "tp 4 of 3 key/value heads: AutoTP leaves tp ranks from 3 on no part" in there.check()[0].found
    assert there.target[Q].cut.shard_shape((3,)) == (0, 24)
    with pytest.raises(ReshapeError, match="ZeRO-3 at tp 4 of 3 key/value heads: AutoTP leaves tp ranks from 3 on"):
        ckptlab.open(AUTOTP).reshape(tp=4, dp=1, zero_stage=3)


@pytest.mark.parametrize("stage", [1, 0])
def test_tensors_of_which_a_rank_has_nothing_are_in_its_module_alone(stage: int, tmp_path: Path) -> None:
    """DeepSpeed's optimizer knows none of them, nor do its lists (`runtime/utils.py`, `filter_empty_parameters`); maps
    say where nothing begins."""
    source = ckptlab.open(AUTOTP)
    source.reshape(tp=4, dp=1, zero_stage=stage).save(tmp_path / "step")
    path = tmp_path / "step" / "mp_rank_03_model_states.pt"
    content = torchfile.read(path)
    assert content["module"][Q].shape == (0, 24)
    if stage == 0:
        assert sum(len(group["params"]) for group in content["optimizer"]["optimizer_state_dict"]["param_groups"]) == 13
    else:
        assert [len(group) for group in content["param_shapes"]] == [8, 5]
    for file in (tmp_path / "step").glob("mp_rank_*"):
        content = torchfile.read(file)
        params = content["universal_checkpoint_info"]["affine_map"]["params"]
        nothing = {"shape": [24, 0], "source": [24, [24, 1]], "dest": [0, [0, 1]], "locations": [3]}
        params["^layers\\.0\\.self_attn\\.o_proj\\.weight$"]["ranks"][3]["pieces"] = [nothing]
        torchfile.write(tmp_path / "new", content)
        (tmp_path / "new").replace(file)
    (tmp_path / "step" / MANIFEST).unlink()
    there = ckptlab.open(tmp_path / "step")
    assert differences(source.catalog, there.catalog) == []
    assert ckptlab.check(there).verdict == "healthy"
    there.reshape(tp=2, dp=2, zero_stage=1).save(tmp_path / "back" / "step")
    assert differences(source.catalog, read(tmp_path / "back")) == []


@pytest.mark.parametrize(
    "config",
    [
        {"num_key_value_heads": 3, "num_attention_heads": 6},
        {"num_kv_heads": 3},
        {"text_config": {"num_key_value_heads": 3}, "num_attention_heads": 7},
        {"n_heads": 6},  # and a key projection of half as many rows as the queries'
    ],
    ids=str,
)
def test_a_config_beside_tells_heads(config: dict[str, Any], tmp_path: Path) -> None:
    ckptlab.open(AUTOTP).reshape(tp=3, dp=1).save(tmp_path / "step")
    (tmp_path / "config.json").write_text(json.dumps(config))
    there = ckptlab.open(tmp_path / "step").reshape(tp=2)
    assert there.check() == ()
    assert there.target[Q].layout == read(AUTOTP)[Q].layout


def test_a_universal_folder_tells_heads_by_the_runs_cut(tmp_path: Path) -> None:
    """Its tensors are whole; the layouts beside them are those of the run, whose ranks had two heads and one."""
    ckptlab.open(AUTOTP).reshape(format="universal").save(tmp_path / "universal" / "step")
    found = ckptlab.open(tmp_path / "universal")
    there = found.reshape(tp=4, dp=1)
    assert [f.code for f in there.check()] == ["heads-few"]
    assert there.target[Q].cut.shard_shape((3,)) == (0, 24)
    ckptlab.open(AUTOTP).reshape(tp=4, dp=1, format="universal").save(tmp_path / "four" / "step")
    halves = ckptlab.open(tmp_path / "four").reshape(tp=2)
    assert halves.target[Q].layout == read(AUTOTP)[Q].layout


@pytest.mark.parametrize(
    ("norm", "heads"), [((8,), 3), ((3, 8), 3), ((24,), None), ((7,), None), (None, None)], ids=str
)
def test_norms_of_keys_tell_heads(norm: tuple[int, ...] | None, heads: int | None) -> None:
    """That of one head's keys (Qwen3), that of each head's (Cohere); one of all keys together (OLMo2) does not."""
    layouts = {f"x.{n}.weight": Layout(text) for n, text in (("k_proj", "(tp out) in"), ("k_norm", "out"))}
    shapes = {"x.k_proj.weight": (24, 5)} | ({} if norm is None else {"x.k_norm.weight": norm})
    layouts["x.k_norm.weight"] = Layout("out in" if norm and len(norm) == 2 else "out")
    cuts = {n: layouts[n].resolve(s, Mesh(tp=2)) for n, s in shapes.items()}
    tensors = {n: Tensor(n, s, layouts[n], cuts[n], "parameter", {}, 0, (0,), (), True) for n, s in shapes.items()}
    assert told_heads(tensors, Mesh(tp=2), None) == heads


def test_a_degree_that_divides_the_sources_needs_no_heads(tmp_path: Path) -> None:
    """As many heads on each of four ranks are twice as many on each of two, however many they are."""
    source = ckptlab.open(AUTOTP)
    source.reshape(tp=4, dp=1, kv_heads=4).save(tmp_path / "step")
    even = ckptlab.open(tmp_path / "step")
    there = even.reshape(tp=2, dp=1)
    assert there.check() == ()
    assert there.target[Q].cut.shard_shape((0,)) == there.target[Q].cut.shard_shape((1,)) == (12, 24)
    assert [f.code for f in even.reshape(tp=3, dp=1).check()] == ["heads-unknown"]


@pytest.mark.parametrize(
    ("total", "tp", "module", "kv_heads", "grain", "widths"),
    [
        (24, 2, "layers.0.self_attn.q_proj", 3, 1, (16, 8)),
        (24, 4, "layers.0.self_attn.q_proj", 3, 1, (8, 8, 8, 0)),
        (24, 2, "layers.0.self_attn.q_proj", None, 1, (12, 12)),
        (37, 2, "layers.0.mlp.up_proj", 3, 1, (19, 18)),
        (36, 2, "layers.0.mlp.up_proj", 3, 1, (18, 18)),
        (60, 4, "lm_head", 3, 1, (15, 15, 15, 15)),
        (200, 3, "layers.0.mlp.up_proj", None, 64, (64, 64, 72)),
        (61, 2, "lm_head", None, 64, (31, 30)),
    ],
)
def test_widths_are_those_of_autotp(
    total: int, tp: int, module: str, kv_heads: int | None, grain: int, widths: tuple[int, ...]
) -> None:
    assert shard_widths(total, tp, module, kv_heads, grain) == widths
    tp_shard = pytest.importorskip("deepspeed.module_inject.tp_shard")
    meta = tp_shard.AutoTPMeta(num_kv_heads=kv_heads, tp_grain_size=grain)
    assert tp_shard.get_shard_size_list(total, tp, meta, module) == list(widths)


# ------------------------------------------------------------------ maps


def entry(pieces: dict[int, list[Any]], shards: dict[int, list[int]], logical: list[int]) -> Header:
    ranks = {r: {"shard_shape": shards[r], "pieces": p} for r, p in pieces.items()}
    return Header("model.pt", {"logical_shape": logical, "ranks": ranks}, "affine_map.params.x")


def piece(shape: list[int], source: Any, dest: Any, **more: Any) -> dict[str, Any]:
    return {"shape": shape, "source": source, "dest": dest, "locations": [0], **more}


LINES = [
    (Layout("out in"), (6, 4)),
    (Layout("(tp out) in"), (6, 4)),
    (Layout("out (tp in)"), (6, 4)),
    (Layout("(tp out) in", sizes={"out": (4, 2)}), (6, 4)),
    (Layout("out (tp in)", sizes={"in": (3, 1)}), (6, 4)),
    (Layout("(tp out)", sizes={"out": (5, 0)}), (5,)),
    (Layout("((tp s0) + (tp s1) + (tp s2)) in", dims=("out", "in"), totals={"s0": 4, "s1": 2, "s2": 2}), (8, 3)),
    (Layout("((tp s0) + s1) in", dims=("out", "in"), totals={"s0": 4}, sizes={"s1": 3}), (7, 3)),
    (Layout("out (tp in) k2", sizes={"in": (2, 1)}), (4, 3, 2)),
]


def tensor_of(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> Tensor:
    return Tensor("x", shape, layout, layout.resolve(shape, mesh), "parameter", {})


@pytest.mark.parametrize(("layout", "shape"), LINES, ids=str)
def test_a_map_of_a_line_is_that_line_again(layout: Layout, shape: tuple[int, ...]) -> None:
    mesh = Mesh(tp=2)
    written = map_of(tensor_of(layout, shape, mesh))
    found = AffineMap.of(Header("model.pt", written), 2).layout()
    assert found == layout
    assert found.resolve(shape, mesh).dims == layout.resolve(shape, mesh).dims


@pytest.mark.parametrize(("layout", "shape"), LINES, ids=str)
def test_deepspeed_rebuilds_from_what_is_written(layout: Layout, shape: tuple[int, ...]) -> None:
    affine, torch = pytest.importorskip("deepspeed.checkpoint.affine"), pytest.importorskip("torch")
    tensor = tensor_of(layout, shape, Mesh(tp=2))
    theirs = affine.ParamAffineMap.from_dict(map_of(tensor))
    theirs.validate_coverage()
    whole = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    shards = {r: torch.from_numpy(tensor.cut.take(whole, tensor.cut.coordinate({"tp": r}))) for r in range(2)}
    assert (theirs.rebuild(shards).numpy() == whole).all()
    for rank, shard in shards.items():
        assert torch.equal(theirs.extract(torch.from_numpy(whole), rank), shard)


@given(st.permutations(range(6)), st.integers(1, 4))
def test_any_choice_of_blocks_is_a_cut_that_holds_it(order: list[int], block: int) -> None:
    """What follows no rule stays rows: the blocks of each rank, wherever they come from (Yuan's and CodeGen's maps)."""
    width, mesh = 3, Mesh(tp=2)
    shape = (6 * block, width)
    pieces = {
        r: [
            piece([block, width], [b * block * width, [width, 1]], [i * block * width, [width, 1]])
            for i, b in enumerate(order[3 * r : 3 * r + 3])
        ]
        for r in range(2)
    }
    found = AffineMap.of(entry(pieces, {r: [3 * block, width] for r in range(2)}, list(shape)), 2).layout()
    cut = found.replace(stages=(0,)).resolve(shape, mesh)
    whole = np.arange(6 * block * width).reshape(shape)
    blocks = whole.reshape(6, block, width)
    for r in range(2):
        assert (
            cut.take(whole, cut.coordinate({"tp": r})) == np.concatenate([blocks[b] for b in order[3 * r : 3 * r + 3]])
        ).all()
    if isinstance(found, RowsLayout):
        with pytest.raises(LayoutError, match="follows no rule"):
            found.resolve(shape, Mesh(tp=3))
        assert on_tp(found, "x.weight", shape, 3, None, 1) is found


def test_every_other_row_is_a_regular_run() -> None:
    pieces = {r: [piece([3, 2], [r * 2, [4, 1]], [0, [2, 1]])] for r in range(2)}
    found = AffineMap.of(entry(pieces, {0: [3, 2], 1: [3, 2]}, [6, 2]), 2).layout()
    whole = np.arange(12).reshape(6, 2)
    cut = found.resolve((6, 2), Mesh(tp=2))
    assert (cut.take(whole, (1,)) == whole[1::2]).all()


@pytest.mark.parametrize(
    ("odd", "error", "reason"),
    [
        ({"scale": 0.5}, UnsupportedError, "a shard that holds its tensor times 0.5"),
        ({"source": [0, [1, 4]]}, UnsupportedError, "no boxes of rows"),
        ({"source": [0]}, CheckpointError, "an offset and 2 strides"),
        ({"shape": [3]}, UnsupportedError, "no boxes of rows"),
        ({"shape": "3"}, CheckpointError, "expected a list"),
    ],
)
def test_what_a_map_says_beyond_rows_is_refused_by_name(odd: dict[str, Any], error: type, reason: str) -> None:
    good = piece([3, 2], [0, [2, 1]], [0, [2, 1]])
    with pytest.raises(error, match=reason):
        AffineMap.of(entry({0: [{**good, **odd}]}, {0: [3, 2]}, [3, 2]), 1)


def test_a_newer_version_is_refused() -> None:
    info = Header("model.pt", {"affine_map": {"version": 2, "params": {}}})
    with pytest.raises(UnsupportedError, match="version 2, ckptlab knows version 1"):
        AffineMaps.of(info, 2)


def test_what_autotp_could_not_record_is_asked_for() -> None:
    maps = AffineMaps({}, {r"^x\.": "a fused layout"})
    with pytest.raises(CheckpointError, match="did not record how it is cut"):
        maps.of_tensor("x.weight")
    assert maps.of_tensor("y.weight") is None


# ------------------------------------------------------------------ runs that recorded nothing


def silent(tmp_path: Path) -> Path:
    """The case as a run of before 2026 left it: nothing says how its tensors are cut."""
    shutil.copytree(AUTOTP, tmp_path / "run")
    for file in (tmp_path / "run" / "global_step3").glob("mp_rank*"):
        content = torchfile.read_contents(str(file)).value
        del content["universal_checkpoint_info"]
        fileplan.write(torchfile.plan(file.name, content), tmp_path / "new")
        (tmp_path / "new").replace(file)
    return tmp_path / "run"


def test_names_of_transformers_models_tell_how_they_are_cut(tmp_path: Path) -> None:
    run = silent(tmp_path)
    untold = ckptlab.open(run)
    assert "layouts-inferred" in {finding.code for finding in untold.findings}
    assert differences_from_truth(untold.catalog, AUTOTP / "truth.safetensors") == []
    assert differences_from_truth(ckptlab.open(run, strategy="hf").catalog, AUTOTP / "truth.safetensors") == []


def test_a_models_own_plan_comes_first(tmp_path: Path) -> None:
    plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise_rep",
        "layers.*.odd": "colwise",
    }
    config = tmp_path / "config.json"
    config.write_text(json.dumps({"model_type": "llama", "base_model_tp_plan": plan, "vocab_size": 100}))
    strategy = resolve(str(config))
    assert isinstance(strategy, HuggingFace)
    even = [(8, 4), (8, 4)]
    assert strategy.layout("model.layers.3.odd.weight", even).text == "(tp out) in"
    assert strategy.layout("model.layers.3.self_attn.o_proj.weight", even).text == "out (tp in)"
    assert strategy.layout("model.layers.3.self_attn.o_proj.bias", [(8,), (8,)]).text == "out"
    assert strategy.layout("model.layers.3.mlp.odd.weight", even).text == "out in"
    assert strategy.layout("lm_head.weight", [(50, 4)] * 2).text == "(tp out) in"
    assert strategy.layout("model.embed_tokens.weight", [(100, 4)] * 2).text == "out in"


def test_a_map_that_follows_no_rule_cannot_go_elsewhere(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(AUTOTP, run)
    for file in (run / "global_step3").glob("mp_rank*"):
        content = torchfile.read_contents(str(file)).value
        ranks = content["universal_checkpoint_info"]["affine_map"]["params"][rf"^{Q}$".replace(".", r"\.")]["ranks"]
        ranks[0]["pieces"] = [
            piece([8, 24], [from_ * 24, [24, 1]], [to * 24, [24, 1]]) for from_, to in ((16, 0), (0, 8))
        ]
        ranks[1]["pieces"] = [piece([8, 24], [8 * 24, [24, 1]], [0, [24, 1]], locations=[1])]
        fileplan.write(torchfile.plan(file.name, content), tmp_path / "new")
        (tmp_path / "new").replace(file)
    ckpt = ckptlab.open(run)
    truth, found = (ckptlab.open(p).full("master", stack=False)[Q].values for p in (AUTOTP, run))
    assert (found == truth.reshape(3, 8, 24)[[1, 2, 0]].reshape(24, 24)).all()
    with pytest.raises(ReshapeError, match="a map that follows no rule"):
        ckpt.reshape(tp=3)
    ckpt.reshape(dp=1).save(tmp_path / "out")
    assert differences(ckpt.catalog, read(tmp_path / "out")) == []


# ------------------------------------------------------------------ real DeepSpeed


@requires_deepspeed
@pytest.mark.parametrize("asked", [{"tp": 3, "dp": 1}, {"tp": 1, "dp": 2}, {"tp": 4, "dp": 1}], ids=str)
def test_deepspeed_resumes_at_another_tp(asked: dict[str, int], tmp_path: Path) -> None:
    """Its own words are that AutoTP restores at the same tp only."""
    ckptlab.open(AUTOTP).reshape(**asked).save(tmp_path / "out" / "step")
    report = resume(tmp_path / "out" / "step", "autotp_tp2_dp2", **asked)
    assert report["status"] == "equal", report.get("error") or report["differences"]
    assert report["compared"]["exp_avg_sq"] == 21


@requires_deepspeed
@pytest.mark.parametrize(("case", "stage"), [("autotp_tp4", 0), ("autotp_tp4_zero0", 2)])
def test_deepspeed_trains_more_ranks_than_heads(case: str, stage: int, tmp_path: Path) -> None:
    """At stage 2 it takes what a rank has nothing of for frozen there, and asks for it among these."""
    folder = make_case(case, tmp_path)
    assert differences_from_truth(read(folder), folder / "truth.safetensors") == []
    ckptlab.open(folder).reshape(zero_stage=stage).save(tmp_path / "out" / "step")
    report = resume(tmp_path / "out" / "step", folder, zero=stage)
    assert report["status"] == "equal", report.get("error") or report["differences"]


@requires_deepspeed
def test_three_ranks_at_stage_2(tmp_path: Path) -> None:
    folder = make_case("autotp_tp3_zero2", tmp_path)
    assert differences_from_truth(read(folder), folder / "truth.safetensors") == []
    ckptlab.open(folder).reshape(tp=2, kv_heads=3).save(tmp_path / "out" / "step")
    report = resume(tmp_path / "out" / "step", folder, tp=2)
    assert report["status"] == "equal", report.get("error") or report["differences"]
