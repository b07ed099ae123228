"""Activations on paper: against the tables of the papers, and in the pictures of memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import ckptlab
from ckptlab import Mesh, viz
from ckptlab.errors import LayoutError
from ckptlab.sharding.transformer import PaperModel
from ckptlab.viz import Activations
from ckptlab.widgets.presets import PRESETS

GPT3 = PaperModel(96, 12288, 96, vocab=50257)
MT_NLG = PaperModel(105, 20480, 128, vocab=51200)
KEPT = Activations(sequence=2048, flash=False, sequence_parallel=False, dropout=True)


def layer(kept: Activations, model: PaperModel, mesh: Mesh, number: int = 0) -> int:
    """Bytes of a layer, of all kinds."""
    return sum(kept.of_layer(model, mesh, number).values())


@pytest.mark.parametrize("model", [GPT3, MT_NLG], ids=["GPT-3", "MT-NLG"])
@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_gpts_layer_is_that_of_the_table(model: PaperModel, tp: int, batch: int) -> None:
    """Korthikanti et al. 2022, arXiv:2205.05198, table 2 (s * b * h times …), and its 5as/h of 80 and 64."""
    mesh, kept = Mesh(tp=tp), replace(KEPT, micro_batch=batch)
    unit, matrix = 2048 * batch * model.hidden, 5 * model.heads * 2048 / model.hidden
    assert matrix == {GPT3: 80, MT_NLG: 64}[model]
    assert layer(kept, model, mesh) == unit * (10 + 24 / tp + matrix / tp)
    assert layer(replace(kept, sequence_parallel=True), model, mesh) == unit * (34 + matrix) / tp
    for without in (replace(kept, flash=True), replace(kept, recompute="attention")):
        assert layer(without, model, mesh) == unit * (10 + 24 / tp)
        assert layer(replace(without, sequence_parallel=True), model, mesh) == unit * 34 / tp
    (whole,) = replace(kept, recompute="layers").by_stage(model, mesh, dict.fromkeys(range(model.layers), 0))
    assert whole["layers' inputs"] == model.layers * 2 * unit
    head, mask = 2048 * batch * (4 * model.hidden + 4 * model.vocab / tp), unit
    assert sum(whole.values()) == model.layers * 2 * unit + round(unit * (10 + 24 / tp)) + round(head) + mask


def test_each_kind_is_the_papers_term() -> None:
    """Korthikanti et al. 2022, section 4.1: attention 11sbh + 5as²b (its masks sbh and as²b), the feed-forward network
    19sbh (its mask sbh), the norms 4sbh; section 4.2: what tp does not cut is 10sbh of these, 2 in the norms each, what
    goes into attention and network 2 each, and the masks."""
    s, h, a, tp = 2048, GPT3.hidden, GPT3.heads, 8
    unit, matrix = s * h, a * s * s
    assert KEPT.of_layer(GPT3, Mesh()) == {
        **{"attention": 10 * unit, "softmax": 4 * matrix, "feed-forward": 18 * unit, "norms": 4 * unit},
        "dropout masks": 2 * unit + matrix,
    }
    assert KEPT.of_layer(GPT3, Mesh(tp=tp)) == {
        **{"attention": (2 + 8 / tp) * unit, "softmax": 4 * matrix / tp, "feed-forward": (2 + 16 / tp) * unit},
        **{"norms": 4 * unit, "dropout masks": 2 * unit + matrix / tp},
    }
    with_flash = replace(KEPT, flash=True).of_layer(GPT3, Mesh())
    assert (with_flash["softmax"], with_flash["dropout masks"]) == (0, 2 * unit)
    assert replace(KEPT, dropout=False).of_layer(GPT3, Mesh())["softmax"] == 2 * matrix


@pytest.mark.parametrize(("model", "saved"), [(GPT3, 70), (MT_NLG, 65)], ids=["GPT-3", "MT-NLG"])
def test_recomputing_attention_saves_what_the_paper_says(model: PaperModel, saved: int) -> None:
    """Korthikanti et al. 2022, section 5: 70 % of GPT-3's activations, 65 % of MT-NLG's."""
    all_, some = (layer(replace(KEPT, recompute=what), model, Mesh()) for what in ("nothing", "attention"))
    assert round(100 * (1 - some / all_)) == saved


def test_stages_keep_as_many_micro_batches_as_are_under_way() -> None:
    """The first stage of 1F1B keeps as much as without pp, all stages' micro-batches of its layers; and by Korthikanti
    et al. 2022, section 4.3, the mask of the embedding for each, the last stage the logits."""
    stages = {i: i // 24 for i in range(96)}
    found = [sum(kinds.values()) for kinds in KEPT.by_stage(GPT3, Mesh(pp=4), stages)]
    each, head, mask = layer(KEPT, GPT3, Mesh()), 2048 * 4 * (GPT3.hidden + GPT3.vocab), 2048 * GPT3.hidden
    assert found == [96 * each + 4 * mask, 72 * each, 48 * each, 24 * each + head]


def test_context_parallelism_keeps_a_part_of_the_tokens() -> None:
    kept = Activations(sequence=8192)
    assert 4 * layer(kept, GPT3, Mesh(cp=4)) == layer(kept, GPT3, Mesh())


def test_experts_keep_what_their_tokens_need() -> None:
    """Of Mixtral two experts' hidden vectors a token, of DeepSeek-V3's first layers none."""
    mixtral, deepseek = PRESETS["Mixtral 8x7B"], PRESETS["DeepSeek-V3"]
    one, two = (layer(Activations(active=n), mixtral.model, Mesh(tp=2)) for n in (1, 2))
    assert two - one == 4096 * (4096 * 2 + 3 * 14336 * 2) / 2
    first = layer(Activations(active=8), deepseek.model, Mesh())
    assert first == layer(Activations(active=1), deepseek.model, Mesh())
    assert first < layer(Activations(active=8), deepseek.model, Mesh(), 3)
    assert {name: p.active for name, p in PRESETS.items() if p.model.experts} == {
        **{"Llama 4 Scout": 1, "Qwen 3 235B A22B": 8, "DeepSeek-V3": 8, "Mixtral 8x7B": 2, "Mixtral 8x22B": 2},
        **{"gpt-oss 20B": 4, "gpt-oss 120B": 4},
    }


def test_fewer_kv_heads_than_tp_ranks_are_kept_by_several() -> None:
    model = PRESETS["Llama 3 8B"].model
    assert model.keys == 8
    more, most = (layer(Activations(), model, Mesh(tp=tp)) for tp in (8, 16))
    keys = 4096 * 2 * 128 * 2  # one head's keys and values
    assert most - keys == (more - keys) / 2


KINDS = viz.ACTIVATIONS


def test_pictures_of_memory_have_them_beside_the_rest() -> None:
    ckpt = ckptlab.paper_model(Mesh(tp=2, pp=2, dp=2), layers=4, hidden=64, heads=4)
    kept = Activations(sequence=128)
    before, after = viz.memory_by_rank(ckpt), viz.memory_by_rank(ckpt, kept)
    column = len(viz.KINDS) - len(KINDS)
    stages = kept.by_stage(PaperModel(4, 64, 4), ckpt.mesh, {0: 0, 1: 0, 2: 1, 3: 1})
    assert np.array_equal(before[:, :column], after[:, :column])
    assert not before[:, column:].any()
    assert after[:, column:].tolist() == [[*stages[0].values()]] * 4 + [[*stages[1].values()]] * 4
    picture = viz.memory(ckpt, activations=kept).svg
    assert {kind for kind in KINDS if f'data-kind="{kind}"' in picture} == {
        *("attention", "feed-forward", "norms", "logits"),
    }
    assert picture.count('data-kind="logits"') == 4
    assert ">activations:</text>" in picture
    assert "· activations, attention · " in picture  # what a hover says
    assert "1 × 128 tokens, FlashAttention, sequence parallelism" in picture
    other = ckpt.reshape(Mesh(tp=4, dp=2))
    assert len(set(map(tuple, viz.memory_by_rank(other, kept)[:, column:].tolist()))) == 1
    assert viz.fullest(ckpt, kept)["logits"] == stages[1]["logits"]  # which outweigh the other stage's layers


GPT = Path(__file__).parents[1] / "data/gpt_tp2_pp2_dp2"


def test_a_checkpoints_are_those_of_its_model_on_paper() -> None:
    """Its names are of a family, its shapes say the rest but the heads, which its arguments say."""
    gpt, kept = ckptlab.open(GPT), Activations(sequence=64, flash=False, dropout=True)
    paper = ckptlab.paper_model(gpt.mesh, layers=4, hidden=16, heads=4, ffn=64, vocab=101)
    ours = viz.memory_by_rank(gpt, kept)[:, -len(KINDS) :]
    assert ours.any(axis=0).tolist() == [kind != "layers' inputs" for kind in KINDS]
    assert np.array_equal(ours, viz.memory_by_rank(paper, kept)[:, -len(KINDS) :])
    assert np.array_equal(ours, viz.memory_by_rank(gpt, replace(kept, facts={"heads": 4}))[:, -len(KINDS) :])
    target, on_paper = (one.reshape(Mesh(tp=4, dp=2)) for one in (gpt, paper))
    assert viz.fullest(target, kept)["softmax"] == viz.fullest(on_paper, kept)["softmax"]
    looked = ckptlab.explore(gpt)
    looked.choose(tab="Reshape", activations=asdict(kept))
    assert "activations, softmax" in looked.shown("to.memory")


def test_of_a_hugging_face_folder_config_json_says_the_heads(tmp_path: Path) -> None:
    ckptlab.save_pretrained(GPT, tmp_path / "hf")
    folder = ckptlab.open(tmp_path / "hf")
    one = viz.fullest(folder, Activations(sequence=64))
    assert one["attention"] == 4 * 64 * 5 * 16 * 2  # layers, tokens, what goes in, q, k, v, what comes out; bf16
    wide = Activations(sequence=64, facts={"dtype": "fp32"})
    assert viz.fullest(folder, wide)["attention"] == 2 * one["attention"]
    (tmp_path / "hf" / "config.json").unlink()
    with pytest.raises(LayoutError, match="nothing says how many attention heads"):
        viz.memory(ckptlab.open(tmp_path / "hf"), activations=Activations())
    said = viz.fullest(ckptlab.open(tmp_path / "hf"), Activations(sequence=64, facts={"heads": 4}))
    assert said["attention"] == one["attention"]


def test_experts_of_a_checkpoint_are_told_by_its_config(tmp_path: Path) -> None:
    """A Mixtral of two layers: shapes say its experts, config.json its heads and to how many a token goes."""
    h, ffn, experts = 16, 24, 4
    shapes = {"model.embed_tokens.weight": (50, h), "model.norm.weight": (h,), "lm_head.weight": (50, h)}
    for i in range(2):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (h,) for norm in ("input", "post_attention")}
        shapes |= {f"{layer}.self_attn.{k}_proj.weight": (n, h) for k, n in (("q", h), ("k", 8), ("v", 8), ("o", h))}
        shapes[f"{layer}.block_sparse_moe.gate.weight"] = (experts, h)
        for e in range(experts):
            expert = f"{layer}.block_sparse_moe.experts.{e}"
            shapes |= {
                f"{expert}.w1.weight": (ffn, h),
                f"{expert}.w3.weight": (ffn, h),
                f"{expert}.w2.weight": (h, ffn),
            }
    save_file({n: np.zeros(shape, np.float32) for n, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"num_attention_heads": 4, "num_experts_per_tok": 2}')
    found = viz.fullest(ckptlab.open(tmp_path), Activations(sequence=10))
    assert found["feed-forward"] == 2 * 10 * 2 * ((1 + 2) * h + 2 * 3 * ffn)  # layers, tokens, bytes
    assert found["attention"] == 2 * 10 * 2 * (h + h + 2 * 8 + h)
    one = viz.fullest(ckptlab.open(tmp_path), Activations(sequence=10, active=1))
    assert found["feed-forward"] - one["feed-forward"] == 2 * 10 * 2 * (h + 3 * ffn)


def test_of_names_that_no_family_has_the_facts_are_told() -> None:
    plain = ckptlab.open(GPT.parent / "plain_zero2_dp2")
    with pytest.raises(
        LayoutError, match="no family knows these names.* give more facts.*: layers, hidden, heads, vocab"
    ):
        viz.memory(plain, activations=Activations())
    facts = {"layers": 3, "hidden": plain["wte.weight"].shape[1], "heads": 5, "vocab": plain["wte.weight"].shape[0]}
    kept = viz.fullest(plain, Activations(sequence=8, facts=facts))
    assert kept["norms"] == (2 * 3 + 1) * 8 * facts["hidden"] * 2
    for wrong, said in (
        ({**facts, "hidden": 999}, "no tensor is that long"),
        ({"head": 1}, "no fact of a model: head;"),
    ):
        with pytest.raises(LayoutError, match=said):
            viz.memory(plain, activations=Activations(facts=wrong))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(LayoutError, match="sequence is at least 1, not 0"):
        Activations(sequence=0)
    with pytest.raises(LayoutError, match="recompute 'everything': expected one of nothing, attention, layers"):
        Activations(recompute="everything")
    gpt = ckptlab.open(GPT)
    with pytest.raises(LayoutError, match="facts say layers 5, the checkpoint has 4"):
        viz.memory(gpt, activations=Activations(facts={"layers": 5}))
    plain = ckptlab.explore(ckptlab.open(GPT.parent / "plain_zero2_dp2"))
    with pytest.raises(LayoutError, match="no family knows these names"):
        plain.activations = asdict(Activations())


def test_the_playground_has_them_in_bars_heading_and_figures() -> None:
    """All that tells the fullest rank's memory tells the same of it."""
    play = ckptlab.playground(Mesh(tp=2, pp=2, dp=2), 1)
    assert play.activations == asdict(Activations(sequence=64))
    found = {}
    for flash in (True, False):
        play.activations = {**play.activations, "sequence": 512, "flash": flash}
        kept = Activations(sequence=512, flash=flash)
        whole = ckptlab.words.size(sum(viz.fullest(play.subject.catalog, kept).values()))
        assert f"{whole} on the fullest rank" in play.shown("model.told")
        assert f"{whole} → {whole}" in play.shown("to.figures")["html"]
        assert whole in play.shown("to.memory")
        assert play.shown("model.zero").count(">activations:<") == 1
        assert whole in play.shown("model.zero")
        found[flash] = whole
    assert found[True] != found[False]
    play.activations = {}
    assert "without activations" in play.shown("model.zero")
    assert "activations" not in play.shown("model.told")


def test_a_preset_and_its_activations_are_chosen_at_once() -> None:
    """The source follows before anything is shown, whichever trait is told of first."""
    play = ckptlab.playground(Mesh(tp=4, pp=2, dp=2), 1)
    preset = play.presets["Llama 3 70B"]
    play.choose(activations=preset["activations"], model=preset["model"])
    play.settled()
    assert play.shown("about")["title"].startswith("model on paper, 80 layers of 8,192")
    assert "(70.6 billion) parameters in 483 tensors" in play.shown("model.told")
    assert len(play.shown("tensors")["names"]) == 483
