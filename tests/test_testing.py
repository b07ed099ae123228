"""The suites for third parties: what ckptlab ships passes them, and what is broken on purpose does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from compare import DATA, GPT, ZERO2, ZERO3
from helpers.small import small

import ckptlab
from ckptlab import Layout, Mesh
from ckptlab.errors import LawError
from ckptlab.formats.torch import torchfile
from ckptlab.sharding.strategies import REGISTRY, replicated
from ckptlab.testing import check_format, check_strategy

SUMMED = {".*weight": "out (tp in)", ".*bias": {"layout": "out", "replicas": "sum"}}
CASES: dict[str, tuple[str, Path | None, dict[str, Any]]] = {
    "ZeRO-1 in 3D": ("deepspeed", GPT, {"meshes": [Mesh(tp=1, pp=4, dp=3)]}),
    "parts of a sum": ("deepspeed", None, {"meshes": [Mesh(tp=4)], "most_files": 1, "strategy": SUMMED}),
    "ZeRO-1": ("deepspeed", DATA / "plain_zero1_dp2_steps", {"meshes": [Mesh(dp=3)]}),
    "ZeRO-2": ("deepspeed", ZERO2, {"meshes": [Mesh(dp=5)]}),
    "ZeRO-3": ("deepspeed", ZERO3, {"meshes": [Mesh(dp=3)]}),
    "experts": ("deepspeed", DATA / "moe_ep2_dp4", {"meshes": [Mesh(dp=2)], "most_files": 3}),
    "AutoTP": ("deepspeed", DATA / "autotp_tp2_dp2", {"meshes": [Mesh(tp=2)], "most_files": 3}),
    "FSDP2": ("dcp", DATA / "fsdp2_tp2_dp2" / "step-3", {"meshes": [Mesh(dp=2)], "most_files": 3}),
    "universal": ("universal", GPT / "universal", {"meshes": [Mesh(tp=2)], "most_files": 3}),
}
SHAPES = {
    "word_embeddings.weight": (64, 16),
    "0.query_key_value.weight": (48, 16),
    "0.query_key_value.bias": (48,),
    "0.attention.dense.weight": (16, 16),
    "0.mlp.dense_h_to_4h.weight": (64, 16),
    "0.mlp.dense_4h_to_h.weight": (16, 64),
    "norm.weight": (16,),
}
TRANSFORMERS = {
    "model.layers.0.self_attn.q_proj.weight": (16, 16),
    "model.layers.0.self_attn.o_proj.weight": (16, 16),
    "model.layers.0.mlp.gate_proj.weight": (32, 16),
    "model.layers.0.mlp.down_proj.weight": (16, 32),
    "transformer.h.0.attn.c_attn.weight": (16, 48),
    "transformer.h.0.mlp.c_fc.bias": (64,),
    "model.norm.weight": (16,),
}
RULES = {r".*(query_key_value|4h)\.weight": "(2 tp out) in", r".*bias": "(3 tp out)", "norm.*": "out", ".*": "out in"}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_our_formats_pass(case: str, tmp_path: Path) -> None:
    name, folder, options = CASES[case]
    assert len(check_format(name, folder or small(tmp_path / "step", tp=2, strategy=SUMMED), **options)) == 12


@pytest.mark.parametrize("limit", [20_000, 5_000_000])
def test_safetensors_pass(limit: int, tmp_path: Path) -> None:
    ckptlab.save_weights(ckptlab.open(ZERO2), tmp_path / "weights", max_shard_bytes=limit)
    laws = check_format("safetensors", tmp_path / "weights", meshes=[Mesh()], options={"max_shard_bytes": limit})
    assert len(laws) == 12


def test_files_of_torch_pass(tmp_path: Path) -> None:
    weights = ckptlab.open(ZERO2).state_dict(backend="numpy")
    torchfile.write(tmp_path / "pytorch_model.bin", weights)
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        assert len(check_format("torch", path)) == 9


def test_a_model_on_paper_obeys_what_needs_no_data() -> None:
    assert len(check_format("paper", ckptlab.paper_model(Mesh(tp=2, pp=2)))) == 2


@pytest.mark.parametrize("strategy", [*REGISTRY.names(), RULES], ids=str)
def test_our_strategies_pass(strategy: Any) -> None:
    assert len(check_strategy(strategy, SHAPES if strategy != "hf" else TRANSFORMERS)) == 6


class Wrong:
    """A strategy that breaks one law at a time."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.closed = (lambda: how) if how == "closed" else None

    def layout(self, name: str, shards: Sequence[tuple[int, ...]]) -> Layout | None:
        if self.how == "silent" and name == "norm.weight":
            return None
        if self.how == "unfit" and len(shards[0]) == 2:
            return Layout("(tp 7 out) in")
        if self.how == "fickle" and shards[0][0] == 32:
            return replicated(len(shards[0]))
        return Layout(" ".join(["(tp out)", "in"][: len(shards[0])]))


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("silent", r"every name gets a layout of as many dims: norm\.weight \(16,\): expected a Layout, found None"),
        ("unfit", r"every tensor fits one of the meshes: word_embeddings\.weight \(64, 16\) fits none"),
        ("closed", r"it is a value: pickled, it says the same: \w*Error: Can't pickle"),
        ("fickle", r"what a mesh's shards are given is the same cut: word_embeddings\.weight on .*not \(64, 16\)"),
    ],
)
def test_a_strategy_that_is_wrong_is_told_how(how: str, says: str) -> None:
    with pytest.raises(LawError, match=says):
        check_strategy(Wrong(how), SHAPES)


@pytest.mark.slow
def test_hypothesis_is_asked_for_where_it_is_missing() -> None:
    code = (
        "import sys; sys.modules['hypothesis'] = None\n"
        "import ckptlab.testing; from ckptlab.errors import UnsupportedError\n"
        "try: from ckptlab.testing import strategies\n"
        "except UnsupportedError as e: assert str(e).endswith('needs hypothesis: pip install hypothesis'), e\n"
        "else: raise SystemExit('it was not missed')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
