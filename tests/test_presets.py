"""Shapes of today's models: their sums are what their authors count."""

from __future__ import annotations

import math

import pytest

from ckptlab import Mesh, paper_model
from ckptlab.widgets.presets import PRESETS

SAID = {name: preset.billions for name, preset in PRESETS.items()}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_that_its_authors_count(name: str) -> None:
    found = sum(math.prod(shape) for shape in PRESETS[name].model.shapes.values()) / 1e9
    assert found == pytest.approx(SAID[name], rel=0.01)


def test_experts_are_dealt_to_the_axis_that_the_mesh_has() -> None:
    numbers = {"layers": 2, "experts": 4, "gated": True, "shared_ffn": 32, "ffn": 32}
    whole = paper_model(Mesh(tp=2, dp=4), **numbers)
    dealt = paper_model(Mesh(tp=2, dp=4).split("dp", edp=2, ep=2), **numbers)
    name = "layers.1.mlp.experts.dense_h_to_4h.weight"
    assert whole[name].layout.text == "expert (2 tp out) in"
    assert dealt[name].layout.text == "(ep expert) (2 tp out) in"
    assert dealt[name].cut.shard_shape((0, 0)) == (2, 32, 64)
    kept = [model.catalog.placement(name, "param").numel for model in (whole, dealt)]
    assert kept[0] == kept[1] == 4 * 64 * 64


def test_latent_attention_has_the_matrices_of_the_paper() -> None:
    """arXiv:2412.19437, section 4.2: 128 heads of 128, ranks 1536 and 512, a rotary part of 64."""
    shapes = PRESETS["DeepSeek-V3"].model.shapes
    found = {name.split(".")[3]: shape for name, shape in shapes.items() if name.startswith("layers.5.self_attention")}
    assert found == {
        "linear_q_down_proj": (1536, 7168),
        "linear_q_up_proj": (128 * (128 + 64), 1536),
        "linear_kv_down_proj": (512 + 64, 7168),
        "linear_kv_up_proj": (128 * (128 + 128), 512),
        "dense": (7168, 128 * 128),
    }
