"""Activations on paper: against the tables of the papers, and in the pictures of memory."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

import ckptlab
from ckptlab import Mesh, viz
from ckptlab.errors import LayoutError, UnsupportedError
from ckptlab.sharding.transformer import PaperModel
from ckptlab.viz import Activations
from ckptlab.widgets.presets import PRESETS

GPT3 = PaperModel(96, 12288, 96, vocab=50257)
MT_NLG = PaperModel(105, 20480, 128, vocab=51200)
KEPT = Activations(sequence=2048, flash=False, sequence_parallel=False, dropout=True)


@pytest.mark.parametrize("model", [GPT3, MT_NLG], ids=["GPT-3", "MT-NLG"])
@pytest.mark.parametrize("tp", [1, 8])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_gpts_layer_is_that_of_the_table(model: PaperModel, tp: int, batch: int) -> None:
    """Korthikanti et al. 2022, arXiv:2205.05198, table 2 (s * b * h times …), and its 5as/h of 80 and 64."""
    mesh, kept = Mesh(tp=tp), replace(KEPT, micro_batch=batch)
    unit, matrix = 2048 * batch * model.hidden, 5 * model.heads * 2048 / model.hidden
    assert matrix == {GPT3: 80, MT_NLG: 64}[model]
    assert kept.of_layer(model, mesh) == unit * (10 + 24 / tp + matrix / tp)
    assert replace(kept, sequence_parallel=True).of_layer(model, mesh) == unit * (34 + matrix) / tp
    for without in (replace(kept, flash=True), replace(kept, recompute="attention")):
        assert without.of_layer(model, mesh) == unit * (10 + 24 / tp)
        assert replace(without, sequence_parallel=True).of_layer(model, mesh) == unit * 34 / tp
    whole = replace(kept, recompute="layers").by_stage(model, mesh, dict.fromkeys(range(model.layers), 0))
    head = 2048 * batch * (4 * model.hidden + 4 * model.vocab / tp)
    assert whole == [model.layers * 2 * unit + round(unit * (10 + 24 / tp)) + round(head)]


def test_stages_keep_as_many_micro_batches_as_are_under_way() -> None:
    """The first stage of 1F1B keeps as much as without pp, all stages' micro-batches of its layers."""
    stages = {i: i // 24 for i in range(96)}
    found = KEPT.by_stage(GPT3, Mesh(pp=4), stages)
    layer, head = KEPT.of_layer(GPT3, Mesh()), 2048 * 4 * (GPT3.hidden + GPT3.vocab)
    assert found == [96 * layer, 72 * layer, 48 * layer, 24 * layer + head]


def test_context_parallelism_keeps_a_part_of_the_tokens() -> None:
    kept = Activations(sequence=8192)
    assert 4 * kept.of_layer(GPT3, Mesh(cp=4)) == kept.of_layer(GPT3, Mesh())


def test_experts_keep_what_their_tokens_need() -> None:
    """Of Mixtral two experts' hidden vectors a token, of DeepSeek-V3's first layers none."""
    mixtral, deepseek = PRESETS["Mixtral 8x7B"], PRESETS["DeepSeek-V3"]
    one, two = (Activations(active=n).of_layer(mixtral.model, Mesh(tp=2)) for n in (1, 2))
    assert two - one == 4096 * (4096 * 2 + 3 * 14336 * 2) / 2
    first = Activations(active=8).of_layer(deepseek.model, Mesh(), layer=0)
    assert first == Activations(active=1).of_layer(deepseek.model, Mesh(), layer=0)
    assert first < Activations(active=8).of_layer(deepseek.model, Mesh(), layer=3)
    assert {name: p.active for name, p in PRESETS.items() if p.model.experts} == {
        **{"Llama 4 Scout": 1, "Qwen 3 235B A22B": 8, "DeepSeek-V3": 8, "Mixtral 8x7B": 2, "Mixtral 8x22B": 2},
        **{"gpt-oss 20B": 4, "gpt-oss 120B": 4},
    }


def test_fewer_kv_heads_than_tp_ranks_are_kept_by_several() -> None:
    model = PRESETS["Llama 3 8B"].model
    assert model.keys == 8
    more, most = (Activations().of_layer(model, Mesh(tp=tp)) for tp in (8, 16))
    keys = 4096 * 2 * 128 * 2  # one head's keys and values
    assert most - keys == (more - keys) / 2


def test_pictures_of_memory_have_them_beside_the_rest() -> None:
    ckpt = ckptlab.paper_model(Mesh(tp=2, pp=2, dp=2), layers=4, hidden=64, heads=4)
    kept = Activations(sequence=128)
    before, after = viz.memory_by_rank(ckpt), viz.memory_by_rank(ckpt, kept)
    column = viz.KINDS.index("activations")
    stages = kept.by_stage(PaperModel(4, 64, 4), ckpt.mesh, {0: 0, 1: 0, 2: 1, 3: 1})
    assert np.array_equal(np.delete(before, column, 1), np.delete(after, column, 1))
    assert not before[:, column].any()
    assert after[:, column].tolist() == [stages[0]] * 4 + [stages[1]] * 4
    assert viz.memory(ckpt, activations=kept).svg.count('data-kind="activations"') == 8
    assert "1 × 128 tokens, FlashAttention, sequence parallelism" in viz.memory(ckpt, activations=kept).svg
    other = ckpt.reshape(Mesh(tp=4, dp=2))
    assert len(set(viz.memory_by_rank(other, kept)[:, column].tolist())) == 1
    assert viz.fullest(ckpt, kept)["activations"] == max(stages)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(LayoutError, match="sequence is at least 1, not 0"):
        Activations(sequence=0)
    with pytest.raises(LayoutError, match="recompute 'everything': expected one of nothing, attention, layers"):
        Activations(recompute="everything")
    gpt = ckptlab.open(Path(__file__).parents[1] / "data/gpt_tp2_pp2_dp2")
    with pytest.raises(UnsupportedError, match="its headers do not say how it computes"):
        viz.memory(gpt, activations=Activations())
    with pytest.raises(UnsupportedError, match="models on paper alone"):
        ckptlab.explore(gpt).activations = asdict(Activations())


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
        assert play.shown("model.zero").count(">activations<") == 1
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
