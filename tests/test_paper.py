"""Models on paper: the same geometry as real checkpoints, the memory that ZeRO promises, clear refusals."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

import ckptlab
from ckptlab import Mesh, viz
from ckptlab.catalog import PARAM
from ckptlab.errors import CheckpointError, LayoutError, ReshapeError
from ckptlab.formats.paper.model import OPTIMIZER, laid_out
from ckptlab.plan import Holder
from ckptlab.sharding.transformer import PaperModel

MODELS: list[dict[str, Any]] = [{}, {"kv_heads": 2}, {"kv_heads": 1, "tied": False, "gated": True, "vocab": 1001}]


@pytest.mark.parametrize("numbers", MODELS, ids=str)
def test_the_plan_writes_every_state_once_and_padding_is_the_rest(numbers: dict[str, Any]) -> None:
    for before, after in ((0, 1), (1, 3), (3, 2), (2, 0)):
        source = ckptlab.paper_model(Mesh(tp=2, pp=2, dp=2), before, **numbers)
        reshape = source.reshape(Mesh(tp=2, dp=3), zero_stage=after)
        elements = sum(
            math.prod(t.cut.shard_shape(at)) * len(t.stages) * (1 if t.cut.axes else 2)
            for t in reshape.target.tensors.values()
            for at in t.cut.coordinates()
        )
        each = 12 if after == 3 else 14  # bytes an element: fp32 and Adam's two, and the bf16 weight
        assert elements * each <= reshape.cost().written < elements * each * 1.02
        assert reshape.plan.written <= reshape.cost().written
        assert reshape.plan.matrix().shape == (8, 6)


def test_a_mesh_that_stays_moves_nothing() -> None:
    model = ckptlab.paper_model(Mesh(pp=2, dp=2), 1, tied=False)  # no replicas: they are read from the first holder
    assert model.reshape(model.mesh).cost().moved == 0


def test_zero_stages_say_where_things_lie() -> None:
    model, mesh = PaperModel(), Mesh(tp=2, dp=4)
    by_stage = [laid_out(model, mesh, stage) for stage in range(4)]
    assert [len(c.flat_groups) for c in by_stage] == [0, 1, 1, 1]
    outside = [{state for name, state in c.placements if not c.is_flat(name, state)} for c in by_stage]
    assert outside[:2] == [{*OPTIMIZER, PARAM}, {PARAM}]
    assert by_stage[1].flat_groups[0].flats[Holder(pp=0, tp=0)].partition is not None
    assert by_stage[3].flat_groups[0].flats[Holder(pp=0, tp=0)].partition is None
    assert outside[3] == set()


def test_layouts_follow_the_heads() -> None:
    name = "layers.0.self_attention.query_key_value.weight"
    layouts = [laid_out(PaperModel(kv_heads=n), Mesh(tp=2)).tensors[name].layout.text for n in (8, 2, 1)]
    assert layouts == ["(tp head qkv out) in", "((tp q) + (tp k) + (tp v)) in", "((tp q) + k + v) in"]
    assert laid_out(PaperModel(gated=True), Mesh(tp=2)).tensors["layers.0.mlp.dense_h_to_4h.weight"].layout.text == (
        "(2 tp out) in"
    )


def test_the_tied_embedding_is_on_both_ends_and_padded_to_tp() -> None:
    embedding = laid_out(PaperModel(vocab=1001), Mesh(tp=4, pp=2)).tensors["word_embeddings.weight"]
    assert (embedding.stages, embedding.aliases) == ((0, 1), ("lm_head.weight",))
    assert (embedding.shape[0], embedding.cut.shape[0]) == (1001, 1004)


def test_what_cannot_be_is_refused_with_its_reasons() -> None:
    with pytest.raises(ReshapeError, match=r"pp 9: more stages than the 4(.|\n)*tp 3: 8 attention heads"):
        ckptlab.paper_model(Mesh(tp=3, pp=9))
    with pytest.raises(ReshapeError, match="3 key/value heads"):
        ckptlab.paper_model(Mesh(tp=4), heads=12, hidden=96, kv_heads=3)
    with pytest.raises(LayoutError, match=r"hidden\(100\) is not divisible by heads\(8\)"):
        ckptlab.paper_model(hidden=100)
    with pytest.raises(LayoutError, match="layers is at least 1"):
        ckptlab.paper_model(layers=0)


def test_there_is_nothing_to_read_or_save(tmp_path: Any) -> None:
    model = ckptlab.paper_model()
    for attempt in (model.full, model.flat, lambda: model.reshape(Mesh(tp=2)).save(tmp_path / "x")):
        with pytest.raises(CheckpointError, match="paper model .*: nothing is stored of it"):
            attempt()


def test_it_is_described_as_what_it_is() -> None:
    model = ckptlab.paper_model(Mesh(pp=2), 2, layers=6)
    assert "paper model (layers=6, hidden=64, heads=8, vocab=1000)" in repr(model)
    assert "ZeRO-1 only" in model._repr_html_()
    assert "tp 1 → 2" in repr(model.reshape(Mesh(tp=2)))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_mesh_whose_dp_is_split(zero_stage: int) -> None:
    """Shown and planned as the same mesh unsplit, its axes called by their parts."""
    plain = Mesh(pp=2, dp=4, tp=2)
    mesh = plain.split("dp", edp=2, ep=2)
    model, same = (ckptlab.paper_model(m, zero_stage) for m in (mesh, plain))
    assert np.array_equal(viz.memory_by_rank(model.catalog), viz.memory_by_rank(same.catalog))
    assert viz.stages(model.catalog).svg == viz.stages(same.catalog).svg
    assert viz.memory(model.catalog).svg.count("<rect") == viz.memory(same.catalog).svg.count("<rect")
    for group, alike in zip(model.catalog.flat_groups, same.catalog.flat_groups, strict=True):
        assert viz.flat(group, tp=1).svg == viz.flat(alike, tp=1).svg
    there = Mesh(dp=2, tp=4)
    assert model.reshape(there).cost() == same.reshape(there).cost()
    assert np.array_equal(model.reshape(there).plan.matrix(), same.reshape(there).plan.matrix())
    assert "<svg" in viz.plan(model.reshape(there).plan).svg
    assert "tp 2 · pp 2 · edp 2 · ep 2 (16 ranks)" in repr(model)
    assert "edp 2 → 16" in repr(model.reshape(mesh.replace(edp=16)))
    wide = model.reshape(Mesh(dp=64, tp=4).split("dp", edp=32, ep=2))
    assert re.search(r"tp \d · pp 0 · edp \d+ · ep [01]<", wide._repr_html_())


def test_the_explorer_shows_a_mesh_whose_dp_is_split() -> None:
    pytest.importorskip("anywidget")
    model = ckptlab.paper_model(Mesh(pp=2, dp=4, tp=2).split("dp", edp=2, ep=2), 1)
    explorer = ckptlab.explore(model)
    explorer.choose(rank=13, tensor="layers.3.mlp.dense_4h_to_h.weight", state="exp_avg")
    for tab in explorer.tabs:
        explorer.tab = tab
        assert explorer.view["parts"]
    assert "pp 1 · tp 1" in explorer.shown("look.flat")
