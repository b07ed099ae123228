"""Families: lines of notation between two programs' names, read both ways; checkpoints seen through them."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.command import run
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import ckptlab
from ckptlab import Layout, Mesh
from ckptlab.arrays import reader
from ckptlab.errors import LawError, LayoutError, NotationError
from ckptlab.sharding import families
from ckptlab.sharding.families import FAMILIES, Family, Join, Permute, Rename, Stack
from ckptlab.testing import check_family
from ckptlab.testing.families import example, placement, there_and_back
from ckptlab.testing.strategies import cuts

DATA = Path(__file__).parents[1] / "data"
EVERY = (line for name in FAMILIES.names() for line in FAMILIES.get(name).lines)
KINDS = {(line.text, line.texts, line.stacks): line for line in EVERY if line.text is not None}
LINES = [*KINDS.values()]
QKV = Join("qkv", "(kv (q d + d + d)) in", ("q", "k", "v"))


@pytest.mark.parametrize("name", FAMILIES.names())
def test_every_family_obeys_the_laws(name: str) -> None:
    assert check_family(name) == ("placement", "identity", "names")


@settings(max_examples=60)
@given(data=st.data())
def test_there_and_back_is_the_identity_for_all_lines_and_lengths(data: st.DataObject) -> None:
    line = data.draw(st.sampled_from(LINES))
    lengths = {name: data.draw(st.integers(1, 4), label=name) for name in sorted(line.known)}
    assert [*placement(line, lengths), *there_and_back(line, lengths)] == []


def test_q_k_and_v_of_each_head_lie_where_the_notation_says() -> None:
    q, k, v = np.arange(8 * 3).reshape(8, 3), 100 + np.arange(4 * 3).reshape(4, 3), 200 + np.arange(4 * 3).reshape(4, 3)
    family = Family("mine", "", (QKV,))
    whole = family.arrays({"q": q, "k": k, "v": v}, "left", heads=4, kv_heads=2)["qkv"]
    assert np.array_equal(whole, np.concatenate([q[:4], k[:2], v[:2], q[4:], k[2:], v[2:]]))
    back = family.arrays({"qkv": whole}, heads=4, kv_heads=2)
    assert {name: array.tolist() for name, array in back.items()} == {"q": q.tolist(), "k": k.tolist(), "v": v.tolist()}


def test_a_rotary_permutation_takes_neighbours_to_halves() -> None:
    family = Family("mine", "", (Permute("wq", "q", "(h p two) in -> (h two p) in", two=2),))
    made = family.arrays({"wq": np.arange(12)[:, None]}, heads=2)
    assert made["q"][:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


def test_experts_are_stacked_and_taken_apart() -> None:
    line = Stack("gate_up", "e (ffn + ffn) in", ("experts.{e}.w1", "experts.{e}.w3"))
    parts, _ = example(line, {"e": 3, "ffn": 2, "in": 4})
    family = Family("mine", "", (line,))
    whole = family.arrays(parts, "left")["gate_up"]
    assert whole.shape == (3, 4, 4)
    for e in range(3):
        assert np.array_equal(whole[e], np.concatenate([parts[f"experts.{e}.w1"], parts[f"experts.{e}.w3"]]))


def test_lines_that_do_not_fit_themselves_are_refused() -> None:
    with pytest.raises(NotationError, match="has 2 terms, there are 3 parts"):
        Join("qkv", "(q + k) in", ("q", "k", "v"))
    with pytest.raises(NotationError, match="has the names"):
        Join("qkv", "(q + k) in", (("q", "d in"), "k"))
    with pytest.raises(NotationError, match="needs a name"):
        Join("qkv", "(3 out) in", ("q",))
    with pytest.raises(LayoutError, match=r"\{e\} in the names"):
        Stack("w", "e out in", ("w.0",))


def _saved(folder: Path, tensors: dict[str, np.ndarray]) -> ckptlab.Checkpoint:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return ckptlab.open(folder)


def test_names_that_no_line_takes_are_kept_and_listed(tmp_path: Path) -> None:
    there = {"q": np.zeros((4, 2), "f4"), "k": np.zeros((4, 2), "f4"), "other": np.ones(3, "f4")}
    seen = Family("mine", "", (QKV,)).onto(_saved(tmp_path / "a", there), "left", heads=2, kv_heads=2)
    assert list(seen) == ["k", "other", "q"]
    left, incomplete = seen.findings
    assert (left.code, left.where.tensors) == ("family-left", ("other",))
    assert (incomplete.code, incomplete.where.tensors) == ("family-incomplete", ("k", "q"))
    assert "needs v" in incomplete.found
    assert seen.full("master", stack=False)["other"].values.tolist() == [1, 1, 1]


def test_what_does_not_fit_is_refused_with_the_tensor(tmp_path: Path) -> None:
    ckpt = _saved(tmp_path / "a", {"qkv": np.zeros((16, 2), "f4")})
    family = Family("mine", "", (QKV,))
    with pytest.raises(LayoutError, match="qkv, shape .*: say heads= and kv_heads="):
        family.onto(ckpt)
    with pytest.raises(LayoutError, match="is not a multiple"):
        family.onto(ckpt, heads=9, kv_heads=3)
    with pytest.raises(LayoutError, match="takes any of 1 tensor: qkv"):
        families.resolve("llama").onto(ckpt)
    two = Family("two", "", (Rename("a", "c"), Rename("b", "c")))
    with pytest.raises(LayoutError, match="a, b would all be c"):
        two.onto(_saved(tmp_path / "b", {"a": np.zeros(1, "f4"), "b": np.zeros(1, "f4")}), "right")
    narrow = Family(
        "narrow", "", (Join("up", "(ffn + ffn) in", ("g", "u")), Permute("down", "d", "out ffn -> out ffn"))
    )
    ckpt = _saved(tmp_path / "c", {"up": np.zeros((8, 2), "f4"), "down": np.zeros((2, 8), "f4")})
    with pytest.raises(LayoutError, match=r"ffn is 8 in down and 4 in up"):
        narrow.onto(ckpt)


@settings(max_examples=60)
@given(data=st.data())
def test_a_tensor_that_is_seen_is_read_in_any_cut(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The readers, against the arrays that the reference puts together."""
    line = data.draw(st.sampled_from(LINES))
    lengths = {name: data.draw(st.integers(1, 4), label=name) for name in sorted(line.known)}
    parts, known = example(line, lengths)
    family = Family("line", "", (line,))
    towards = data.draw(st.sampled_from(["left", "right"]))
    numbers = {**known, "first": 2, "embed": 1, "final": 9, "head": 10}
    expected = family.arrays(parts, line.joined, **numbers)
    held = parts if towards == line.joined else expected
    expected = family.arrays(held, towards, **numbers)
    ckpt = _saved(tmp_path_factory.mktemp("family") / "a", {n: a.astype("f4") for n, a in held.items()})
    seen = family.onto(ckpt, towards, **numbers)
    name = data.draw(st.sampled_from(sorted(seen)))
    cut = data.draw(cuts(seen[name].shape, Mesh(tp=data.draw(st.integers(1, 3)), dp=2)))
    one = reader(seen.catalog, name, "master")
    for at in cut.coordinates():
        shard = one.shard(cut, at)
        whole = np.zeros(cut.shape, "f4")
        whole[tuple(slice(0, n) for n in seen[name].shape)] = expected[name]
        assert np.array_equal(shard, cut.take(whole, at))
        lo = data.draw(st.integers(0, shard.size))
        pieces = [piece.copy() for piece in one.chunks(cut, at, lo, shard.size, 5)]
        assert np.array_equal(np.concatenate([np.zeros(0, "f4"), *pieces]), shard.reshape(-1)[lo:])


def test_a_checkpoint_is_seen_with_all_its_states_and_shards() -> None:
    """A real run of DeepSpeed, tied, on two stages: there and back nothing has changed but flat buffers."""
    ckpt = ckptlab.open(DATA / "gpt_tp2_pp2_dp2")
    family = families.resolve("gpt2", ckpt)
    assert family.name == "gpt2-megatron-deepspeed-tied"
    seen = family.onto(ckpt)
    assert seen.findings == ckpt.findings
    c_attn = seen["transformer.h.0.attn.c_attn.weight"]
    assert (c_attn.shape, c_attn.dims, c_attn.layout.text) == ((16, 48), ("in", "out"), "in (3 tp out)")
    heads = ckpt.full(stack=False)["2.self_attention.query_key_value.weight"]
    shown = seen.full(stack=False)["transformer.h.0.attn.c_attn.weight"]
    for state in ("master", "exp_avg", "exp_avg_sq", "param"):
        apart = heads[state].values.reshape(4, 3, 4, 16)
        assert np.array_equal(shown[state].values.reshape(16, 3, 4, 4), apart.transpose(3, 1, 0, 2)), state
    shards = seen.shards("exp_avg", stack=False)["transformer.h.0.attn.c_attn.weight"]
    assert shards.dims == ("tp", "in", "out")
    assert np.array_equal(shards.values[1].reshape(16, 3, 2, 4), shown.exp_avg.values.reshape(16, 3, 4, 4)[:, :, 2:])
    back = family.onto(seen, first=2, final=6)
    assert set(back) == set(ckpt)
    assert ckptlab.diff(ckpt, back).equal
    for name in ckpt:
        assert np.array_equal(_bits(back.shards(stack=False)[name]), _bits(ckpt.shards(stack=False)[name])), name
    assert [g.options for g in seen.catalog.groups] == [g.options for g in ckpt.catalog.groups]
    assert {n for g in seen.catalog.groups for n in g.tensors} == set(seen)


def _bits(shown: Any) -> bytes:
    return b"".join(array.values.tobytes() for array in shown.data_vars.values())


def test_what_is_averaged_is_joined_as_the_mean() -> None:
    """Readers that compute (means, sums) say nothing of what is beside their piece, and leave it alone."""
    averaged = Layout("out", replicas="mean")
    ckpt = ckptlab.open(DATA / "gpt_tp2_pp2_dp2", strategy={r"\d+\.\w+_layernorm\.weight": averaged})
    line = Join("both", "(d + d)", ("2.input_layernorm.weight", "2.post_attention_layernorm.weight"))
    seen = Family("mine", "", (line,)).onto(ckpt, "left")
    parts = [ckpt.full("exp_avg", stack=False)[name].values for name, _ in line.parts]
    assert np.abs(parts[0]).min() > 0
    assert np.array_equal(seen.full("exp_avg", stack=False)["both"].values, np.concatenate(parts))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(tp=4, dp=2), Mesh(dp=2)], ids=str)
def test_a_run_goes_on_under_another_programs_names(mesh: Mesh, tmp_path: Path) -> None:
    """A pipeline of Megatron's becomes a run of DeepSpeed with transformers' names, moments and all, on a new mesh."""
    run_ = ckptlab.open(DATA / "gpt_tp2_pp2_dp2")
    seen = families.resolve("gpt2", run_).onto(run_)
    seen.reshape(mesh, format="deepspeed").save(tmp_path / "run" / "global_step3")
    found = ckptlab.open(tmp_path / "run")
    assert found.mesh == mesh
    compared = ckptlab.diff(run_, found)
    assert compared.equal
    assert compared.states == ("master", "exp_avg", "exp_avg_sq", "param")


def test_a_tensor_that_is_put_together_shows_no_file_of_its_own() -> None:
    pytest.importorskip("ipywidgets")
    ckpt = ckptlab.open(DATA / "gpt_tp2_pp2_dp2")
    seen = families.resolve("gpt2", ckpt).onto(ckpt)
    assert ckptlab.explore(seen) is not None
    name = "transformer.h.0.attn.c_attn.weight"
    holder = seen.catalog.placement(name, "master").holders[0]
    with pytest.raises(ckptlab.CheckpointError, match="c_attn.weight is not stored as it is seen"):
        seen.catalog.fragments(name, "master", holder)
    assert ckptlab.check(seen).verdict == ckptlab.check(ckpt).verdict


def test_a_reader_of_what_is_seen_travels_to_another_process() -> None:
    import pickle

    ckpt = ckptlab.open(DATA / "gpt_tp2_pp2_dp2")
    seen = families.resolve("gpt2", ckpt).onto(ckpt)
    name = "transformer.h.1.attn.c_attn.weight"
    one = reader(seen.catalog, name, "master")
    there = pickle.loads(pickle.dumps(one))
    whole = ckptlab.Cut.whole(seen[name].shape)
    assert np.array_equal(one.shard(whole, ()), there.shard(whole, ()))
    assert copy.copy(one).name == name


def test_a_wrong_line_is_caught_by_data_of_both_programs() -> None:
    rng = np.random.default_rng(0)
    right = {f"{n}": rng.normal(size=(s, 6)).astype("f4") for n, s in (("q", 16), ("k", 8), ("v", 8))}
    true = Family("true", "", (QKV, Permute("wo", "o", "(h p two) in -> (h two p) in", two=2)))
    right["o"] = rng.normal(size=(16, 6)).astype("f4")
    left = true.arrays(right, "left", heads=4, kv_heads=2)
    assert "right" in check_family(true, left, right, heads=4, kv_heads=2)
    level = Join("qkv", "((kv q d + kv d + kv d)) in", ("q", "k", "v"))  # interleaved one level off
    for wrong in (Family("level", "", (level, true.lines[1])), Family("rotary", "", (QKV, Rename("wo", "o")))):
        with pytest.raises(LawError, match="the same elements in another order|other elements"):
            check_family(wrong, left, right, heads=4, kv_heads=2)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of DeepSpeed as a folder for transformers."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    ckptlab.save_pretrained(ckptlab.open(DATA / "gpt_tp2_pp2_dp2"), folder)
    return folder


def test_a_run_is_exported_with_a_config_of_its_own(exported: Path) -> None:
    said = json.loads((exported / "config.json").read_text())
    assert said["architectures"] == ["GPT2LMHeadModel"]
    assert {k: said[k] for k in ("n_embd", "n_head", "n_layer", "n_positions", "vocab_size", "n_inner")} == {
        "n_embd": 16,
        "n_head": 4,
        "n_layer": 4,
        "n_positions": 12,
        "vocab_size": 101,
        "n_inner": 64,
    }
    assert (said["tie_word_embeddings"], said["dtype"]) == (True, "float32")
    assert "lm_head.weight" not in load_file(exported / "model.safetensors")


def test_what_nobody_says_of_a_model_is_told(tmp_path: Path) -> None:
    from ckptlab.pretrained import pretrained

    told = {finding.code: finding.found for finding in pretrained(ckptlab.open(DATA / "gpt_tp2_pp2_dp2")).check()}
    assert told["config-assumed"].startswith("nobody says layer_norm_epsilon")
    held = families.resolve("gpt2-megatron").arrays(_gpt2(), "left", heads=2)
    ckpt = _saved(tmp_path / "a", held)
    with pytest.raises(LayoutError, match="say heads= and kv_heads="):
        pretrained(ckpt)
    renamed = pretrained(_saved(tmp_path / "b", _gpt2()))
    assert [f.found for f in renamed.check()] == ["nobody says its heads: no config.json is written"]
    assert [plan.name for plan in renamed.files] == ["model.safetensors"]


def _gpt2() -> dict[str, np.ndarray]:
    """The weights of a GPT2 of one layer."""
    rng, layer = np.random.default_rng(1), "transformer.h.0"
    shapes = {f"{layer}.attn.c_attn": (4, 12), f"{layer}.attn.c_proj": (4, 4), f"{layer}.mlp.c_fc": (4, 8)}
    shapes[f"{layer}.mlp.c_proj"] = (8, 4)
    found = {f"{name}.weight": rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    found |= {f"{name}.bias": rng.normal(size=shape[1]).astype("f4") for name, shape in shapes.items()}
    norms = (f"{layer}.ln_1", f"{layer}.ln_2", "transformer.ln_f")
    found |= {f"{n}.{kind}": rng.normal(size=4).astype("f4") for n in norms for kind in ("weight", "bias")}
    found |= {f"transformer.{n}.weight": rng.normal(size=(7, 4)).astype("f4") for n in ("wte", "wpe")}
    return found


def test_a_run_and_its_export_are_equal_bit_for_bit(exported: Path) -> None:
    found = ckptlab.diff(DATA / "gpt_tp2_pp2_dp2", exported)
    assert found.equal
    assert found.verdict.startswith("equal: 52 tensors, bit for bit")
    assert ckptlab.diff(exported, DATA / "gpt_tp2_pp2_dp2" / "universal", family="gpt2").equal


def test_an_export_by_a_wrong_line_is_told_by_what_is_permuted(exported: Path, tmp_path: Path) -> None:
    weights = load_file(exported / "model.safetensors")
    name = "transformer.h.2.attn.c_attn.weight"
    there = weights[name].reshape(16, 3, 4, 4).transpose(0, 2, 1, 3).reshape(16, 48)  # heads before q, k, v
    other = "transformer.h.1.mlp.c_fc.bias"
    wrong = {**weights, name: np.ascontiguousarray(there), other: weights[other] + 1}
    found = ckptlab.diff(DATA / "gpt_tp2_pp2_dp2", _saved(tmp_path / "wrong", wrong))
    assert (found.permuted, set(found.changed)) == ((name,), {name, other})
    assert found.verdict == ("different: 1 tensor with other values, 1 tensor with the same values in another order")
    assert {d.name: d.reason for d in found.differences} == {name: "order", other: "values"}
    assert "the same in another order" in repr(found)


def test_of_families_that_take_the_same_names_the_layouts_tell(tmp_path: Path) -> None:
    """Fused q, k, v that are cut part by part are no heads that interleave."""
    fused = "((tp q) + (tp k) + (tp v)) in"
    rng, layer = np.random.default_rng(2), "2"
    shapes = {
        f"{layer}.self_attention.query_key_value.weight": (32, 8),
        f"{layer}.self_attention.dense.weight": (8, 16),
    }
    shapes |= {f"{layer}.mlp.dense_h_to_4h.weight": (24, 8), f"{layer}.mlp.dense_4h_to_h.weight": (8, 12)}
    shapes |= {f"{layer}.{norm}_layernorm.weight": (8,) for norm in ("input", "post_attention")}
    shapes |= {"1.word_embeddings.weight": (11, 8), "3.weight": (8,), "4.lm_head.weight": (11, 8)}
    ckpt = _saved(tmp_path / "a", {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()})
    for text, chosen in (("(tp out) in", "(kv (q d + d + d)) in"), (fused, "(kv q d + kv d + kv d) in")):
        layouts = {".*query_key_value.weight": Layout(text, totals={"q": 16, "k": 8} if "+" in text else {})}
        on_tp = ckpt.reshape(Mesh(tp=2), strategy=layouts).target
        told = replace(on_tp, extents=ckpt.catalog.extents)
        made = families.towards(told, "right", heads=4, kv_heads=2)
        assert not [f for f in made.findings if f.code.startswith("family-")], text
        line = next(line for line in families.resolve("llama-megatron-deepspeed").lines if "query" in line.whole)
        line = replace(line, text=chosen)
        assert made["model.layers.0.self_attn.q_proj.weight"].layout.text == "(tp out) in"
        pieces = made.seen["model.layers.0.self_attn.k_proj.weight"]
        expected = line.piece_of(1, pieces[0].name, (8, 8), {"kv": 2, "q": 2, "d": 4, "in": 8})
        assert np.array_equal(pieces[0].dims[0][1], expected.dims[0][1])  # type: ignore[index]


def test_the_command_line_goes_to_transformers_and_back(tmp_path: Path) -> None:
    out, back = tmp_path / "hf", tmp_path / "back"
    made = run("convert", DATA / "gpt_tp2_pp2_dp2", out, "--to", "huggingface", "--dtype", "bf16", "--json")
    assert made.exit_code == 0
    codes = [finding["code"] for finding in json.loads(made.stdout)["findings"]]
    assert codes[-2:] == ["config-assumed", "states-left-out"]
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert run("diff", DATA / "gpt_tp2_pp2_dp2", out).exit_code == 0
    family = ("--family", "gpt2-megatron-core")
    assert run("convert", out, back, "--from", "huggingface", *family, "--to", "safetensors").exit_code == 0
    there = ckptlab.open(back)
    assert there["decoder.layers.3.self_attention.linear_qkv.weight"].shape == (48, 16)
    assert run("diff", DATA / "gpt_tp2_pp2_dp2", back).exit_code == 0


def test_the_command_line_says_what_does_not_go_together(tmp_path: Path) -> None:
    to = (DATA / "gpt_tp2_pp2_dp2", tmp_path / "out", "--to")
    for arguments, said in (
        (("safetensors", "--from", "huggingface"), "--from huggingface needs --family"),
        (("safetensors", "--config", __file__), "--config goes with --to huggingface"),
        (("huggingface", "--tp", "2"), "--tp has no meaning with --to huggingface"),
        (("huggingface", "--config", __file__), "expected a JSON object"),
        (("huggingface", "--family", "lama"), "no family is called 'lama'"),
    ):
        result = run("convert", *to, *arguments)
        assert result.exit_code == 2
        assert said in result.stderr, arguments
    assert not (tmp_path / "out").exists()


def test_a_model_starts_a_run_on_paper(exported: Path) -> None:
    """A published model under a program's names, cut as that program cuts it: what each rank would hold."""
    family = families.resolve("gpt2-megatron-core")
    start = family.onto(ckptlab.open(exported), "left")
    on_tp = start.reshape(Mesh(tp=2), strategy=families.start(family, 2, {"heads": 4}))
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    assert on_tp.target[name].layout.text == "(tp h qkv d) in"
    assert on_tp.target["embedding.word_embeddings.weight"].cut.shape == (102, 16)
    with pytest.raises(ckptlab.ReshapeError, match=r"linear_qkv.weight.*4 of h are not divided by tp 3"):
        start.reshape(Mesh(tp=3), strategy=families.start(family, 3, {"heads": 4}))
    shards = on_tp.shards("master", stack=False)[name].values
    trained = ckptlab.open(DATA / "gpt_tp2_pp2_dp2").shards("master", stack=False)
    assert np.array_equal(shards, trained["2.self_attention.query_key_value.weight"].values)


def test_a_published_model_starts_a_run(exported: Path, tmp_path: Path) -> None:
    """On another mesh, in DeepSpeed's own files: weights are the model's, moments 0, all else is the run's."""
    rng = np.random.default_rng(4)
    published = {n: rng.normal(size=t.shape).astype("f4") for n, t in load_file(exported / "model.safetensors").items()}
    folder = tmp_path / "published"
    _saved(folder, published)
    run_, out = DATA / "gpt_tp2_pp2_dp2", tmp_path / "start" / "global_step3"
    mesh = ("--tp", "4", "--pp", "1", "--dp", "1")
    made = run("convert", run_, out, "--weights", folder, "--to", "deepspeed", *mesh)
    assert made.exit_code == 0, made.stderr
    began, trained = ckptlab.open(out), ckptlab.open(run_)
    assert began.mesh == Mesh(tp=4)
    heads = began.full(stack=False)["4.self_attention.query_key_value.weight"]
    there = published["transformer.h.2.attn.c_attn.weight"].reshape(16, 3, 4, 4).transpose(2, 1, 3, 0).reshape(48, 16)
    assert np.array_equal(heads.master.values, there)
    assert np.array_equal(heads.param.values, there.astype(heads.param.dtype))
    assert not heads.exp_avg.values.any()
    assert not heads.exp_avg_sq.values.any()
    assert [g.options for g in began.catalog.groups] == [g.options for g in trained.catalog.groups]
    assert ckptlab.diff(began, folder, states=["master"]).equal
    assert {f.code for f in ckptlab.check(began).findings if f.severity != "info"} == {"dead-moments"}


def test_weights_that_are_not_a_runs_are_refused(exported: Path, tmp_path: Path) -> None:
    weights, trained = load_file(exported / "model.safetensors"), ckptlab.open(DATA / "gpt_tp2_pp2_dp2")
    fewer = {n: t for n, t in weights.items() if ".h.3." not in n}
    with pytest.raises(LayoutError, match=r"no weights for 12 tensors of .*: 5\."):
        ckptlab.with_weights(trained, _saved(tmp_path / "fewer", fewer))
    longer = {**weights, "transformer.wpe.weight": np.zeros((24, 16), "f4")}
    with pytest.raises(LayoutError, match=r"position_embeddings.weight has shape \(24, 16\), in .* \(12, 16\)"):
        ckptlab.with_weights(trained, _saved(tmp_path / "longer", longer))
    more = {**weights, "lm_head.weight": weights["transformer.wte.weight"]}
    told = ckptlab.with_weights(trained, _saved(tmp_path / "more", more)).findings
    assert told[-1].code == "weights-left"


def test_what_the_programs_args_say_decides(tmp_path: Path) -> None:
    held = families.resolve("llama-megatron-core").arrays(_llama(), "left", heads=4, kv_heads=2)
    for rotary in (False, True):
        folder = tmp_path / str(rotary)
        ckpt = _saved(folder, held)
        (folder / "config.json").write_text(json.dumps({"rotary_interleaved": rotary, "num_attention_heads": 4}))
        q = families.towards(ckpt.catalog, "right", kv_heads=2).seen["model.layers.0.self_attn.q_proj.weight"]
        assert (len(q[0].dims[0][1]) > 2) == rotary  # type: ignore[index,arg-type]


def _llama() -> dict[str, np.ndarray]:
    """The weights of a Llama of one layer."""
    rng, layer = np.random.default_rng(3), "model.layers.0"
    shapes: dict[str, tuple[int, ...]] = {f"{layer}.self_attn.{n}_proj": (16 if n == "q" else 8, 8) for n in "qkv"}
    shapes |= {f"{layer}.self_attn.o_proj": (8, 16), f"{layer}.mlp.gate_proj": (6, 8), f"{layer}.mlp.up_proj": (6, 8)}
    shapes |= {f"{layer}.mlp.down_proj": (8, 6), "model.embed_tokens": (11, 8), "lm_head": (11, 8), "model.norm": (8,)}
    shapes |= {f"{layer}.{norm}_layernorm": (8,) for norm in ("input", "post_attention")}
    return {f"{name}.weight": rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}


def test_a_line_that_is_never_reached_breaks_a_law() -> None:
    lines = (Rename("a.{i}", "b.{i}"), Rename("a.{i}", "c.{i}"))
    with pytest.raises(LawError, match=r"a\.\{i\}: the line to c\.\{i\} is never reached"):
        check_family(Family("mine", "", lines))
    with pytest.raises(LawError, match="two lines make it"):
        check_family(Family("mine", "", (lines[0], Rename("a.{i}", "b.{i}"))))


def test_one_of_your_own_goes_by_a_name() -> None:
    mine = Family("mine-megatron", "", (QKV,), model_types=("mine",))
    FAMILIES.register("mine-megatron", mine)
    try:
        assert families.resolve("mine-megatron") is mine
        assert families.resolve("mine", ["qkv"]) is mine
        assert families.found(["qkv"]) is mine
    finally:
        FAMILIES._own.pop("mine-megatron")
    with pytest.raises(LayoutError, match="no family is called 'mine-megatron'"):
        families.resolve("mine-megatron")


def test_a_wrapper_takes_its_prefix_away() -> None:
    held = {"module.module.a.weight": np.zeros(1)}
    family = families.resolve("wrappers")
    assert list(family.arrays(held)) == ["module.a.weight"]
