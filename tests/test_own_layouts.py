"""Layouts of one's own for a target, over any axes: shards, plans and costs are there, whether or not files can hold
them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from compare import GPT, ZERO2, same_bits
from real_deepspeed import make_case, requires_deepspeed

import ckptlab
from ckptlab import Layout, LayoutError, Mesh, ReshapeError
from ckptlab.catalog import MASTER, PARAM

QKV = "2.self_attention.query_key_value.weight"
WIDTHS = {"q": 32, "k": 8, "v": 8}
GROUPED = {r".*query_key_value\.weight": Layout("((tp q) + (tp k) + (tp v)) in", dims=("out", "in"), totals=WIDTHS)}
REPLICATED = {
    r".*query_key_value\.weight": "((tp q) + (kv k) + (kv v)) in",
    r".*query_key_value\.bias": "((tp q) + (kv k) + (kv v))",
}


def grouped(extra: dict[str, Any] | None = None) -> ckptlab.Checkpoint:
    """GPT read as if its q, k and v were 32, 8 and 8 wide, one behind the other."""
    own = {name.replace(".", r"\."): tensor.layout for name, tensor in ckptlab.open(GPT).tensors.items()}
    bias = Layout("((tp q) + (tp k) + (tp v))", dims=("out",), totals=WIDTHS)
    return ckptlab.open(GPT, strategy={**GROUPED, r".*query_key_value\.bias": bias, **own})


def over_both(ckpt: ckptlab.Checkpoint) -> dict[str, str]:
    """Matrices cut over tp and dp where they can be, everything else whole."""
    even = {n: len(t.shape) == 2 and not any(size % 2 for size in t.shape) for n, t in ckpt.tensors.items()}
    return {n.replace(".", r"\."): "(tp out) (dp in)" if even[n] else " ".join(t.dims) for n, t in ckpt.tensors.items()}


def assert_merges_back(reshaped: ckptlab.Reshape) -> int:
    """Every state of every tensor of the target, merged, is what the source has. How many there were."""
    shards = reshaped.shards(stack=False)
    source = ckptlab.Checkpoint(reshaped.source)
    whole, checked = source.full(stack=False), 0
    for name, tensor in reshaped.target.tensors.items():
        for state in reshaped.target.held(name):
            held = shards[name][state].load()
            again = ckptlab.merge(held, tensor.layout, on=reshaped.mesh, shape=tensor.shape)
            expected = whole[name][state] if state in whole[name] else whole[name][MASTER].astype(held.dtype)
            assert same_bits(again.values, expected.values), (name, state)
            checked += 1
    return checked


@pytest.mark.slow
def test_kv_heads_that_several_ranks_hold() -> None:
    mesh = Mesh(tp=4, dp=2).split("tp", kv=2, rep=2)
    reshaped = grouped().reshape(mesh, strategy=REPLICATED)
    held = reshaped.shards(stack=False)[QKV][MASTER]
    assert dict(held.sizes) == {"kv": 2, "rep": 2, "out": 8 + 4 + 4, "in": 16}
    whole = grouped().full(MASTER, stack=False)[QKV].values
    rows = [*range(16, 24), *range(36, 40), *range(44, 48)]  # q of tp 2, k and v of kv head 1
    np.testing.assert_array_equal(held.sel(kv=1, rep=0), whole[rows])
    np.testing.assert_array_equal(held.sel(kv=1, rep=1)[8:], whole[rows[8:]])
    assert assert_merges_back(reshaped) > 150
    assert reshaped.plan.matrix().shape == (8, 8)
    assert "tp 2 → 4 as kv 2 · rep 2" in repr(reshaped)


def test_a_vocabulary_in_widths_of_ones_own_or_whole_is_not_padded() -> None:
    name = "tied_modules.embed.word_embeddings.weight"
    rows = grouped()[name].shape[0]
    assert grouped()[name].layout.padded
    for layout in (Layout("(tp out) in", sizes={"out": (7, rows - 7)}), Layout("out in")):
        reshaped = grouped().reshape(Mesh(tp=2), strategy={name.replace(".", r"\."): layout})
        assert not reshaped.target[name].layout.padded
        assert assert_merges_back(reshaped) > 150


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 1, 3])
@pytest.mark.parametrize("case", [GPT, ZERO2], ids=lambda c: c.name)
def test_cut_over_dp_by_the_layout(case: Path, zero_stage: int) -> None:
    ckpt = ckptlab.open(case)
    reshaped = ckpt.reshape(Mesh(tp=2, dp=2), strategy=over_both(ckpt), zero_stage=zero_stage)
    assert assert_merges_back(reshaped) > 50
    flat = {name for group in reshaped.target.flat_groups for name in group.names}
    assert not any("dp" in reshaped.target[name].cut.axes for name in flat)
    assert bool(flat) == (zero_stage > 0)
    assert 0 < reshaped.cost().moved <= reshaped.plan.sent


def test_experts_and_parts_of_dp() -> None:
    ckpt = ckptlab.open(ZERO2)
    mesh = Mesh(dp=6).split("dp", edp=2, ep=3)
    reshaped = ckpt.reshape(mesh, strategy={r".*qkv\.weight": "(ep out) in"}, zero_stage=1)
    assert assert_merges_back(reshaped) > 50
    assert {group.over for group in reshaped.target.flat_groups} == {"dp", "edp"}
    assert reshaped.flat()["pp0/group0/sub1"].sizes["edp"] == 2


def test_whole_tensors_are_laid_out_on_any_mesh(tmp_path: Path) -> None:
    ckptlab.save_weights(ckptlab.open(GPT), tmp_path / "weights")
    ckpt = ckptlab.open(tmp_path / "weights")
    with pytest.raises(ReshapeError, match="say layouts, strategy="):
        ckpt.reshape(Mesh(tp=2))
    reshaped = ckpt.reshape(Mesh(tp=2, dp=2, pp=2), strategy=over_both(ckpt))
    assert_merges_back(reshaped)
    stages = {name: tensor.stages for name, tensor in reshaped.target.tensors.items()}
    assert (stages["2.mlp.dense_h_to_4h.weight"], stages["5.mlp.dense_h_to_4h.weight"]) == ((0,), (1,))
    with pytest.raises(ReshapeError, match="on paper: say the format"):
        reshaped.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    reshaped.save(tmp_path / "again", format="safetensors")
    assert ckptlab.diff(ckpt, tmp_path / "again").equal


def test_files_that_cannot_hold_it_say_which_tensor_and_axis(tmp_path: Path) -> None:
    ckpt = ckptlab.open(GPT)
    with pytest.raises(ReshapeError, match=r"is cut over dp \(\(tp out\) \(dp in\)\), and deepspeed files"):
        ckpt.reshape(Mesh(tp=2, dp=2), strategy=over_both(ckpt)).save(tmp_path / "out")
    with pytest.raises(ReshapeError, match="cannot be laid out as the strategy says"):
        ckpt.reshape(Mesh(tp=2), strategy={".*": "(tp out) in"})
    assert not (tmp_path / "out").exists()


def test_files_that_can_hold_it_do(tmp_path: Path) -> None:
    """Another layout over tp alone: DeepSpeed's files are written so, and read back."""
    ckpt = ckptlab.open(GPT)
    reshaped = ckpt.reshape(Mesh(tp=4), strategy={r".*dense_h_to_4h\.weight": "(2 tp out) in"})
    reshaped.save(tmp_path / "own" / "step")
    again = ckptlab.open(tmp_path / "own")
    name = "2.mlp.dense_h_to_4h.weight"
    numbered = np.arange(64 * 16).reshape(64, 16)
    cuts = [tensors[name].cut for tensors in (again, reshaped.target, ckpt.reshape(Mesh(tp=4)).target)]
    written, meant, before = ([cut.take(numbered, (k,)).tolist() for k in range(4)] for cut in cuts)
    assert written == meant != before
    assert ckptlab.diff(ckpt, again).equal


@pytest.mark.slow
def test_a_padded_vocabulary_follows_the_cut() -> None:
    ckpt = ckptlab.open(GPT)
    name = "tied_modules.embed.word_embeddings.weight"
    reshaped = ckpt.reshape(Mesh(tp=4, dp=3), strategy={r".*word_embeddings.*": "(tp dp out) in"})
    assert reshaped.target[name].cut.shape[0] == 108
    assert assert_merges_back(reshaped) > 100


@requires_deepspeed
def test_a_real_grouped_query_checkpoint(tmp_path: Path) -> None:
    ckpt = ckptlab.open(make_case("gqa_tp2_pp1_dp2", tmp_path) / "global_step3")
    mesh = Mesh(tp=8, dp=2).split("tp", kv=2, rep=4)
    reshaped = ckpt.reshape(mesh, strategy=REPLICATED)
    assert reshaped.shards(stack=False)[QKV][PARAM].sizes["out"] == 2 + 4 + 4
    assert assert_merges_back(reshaped) > 100
    with pytest.raises(ReshapeError, match="kv_heads=4 contradicts the checkpoint, which has 2"):
        ckpt.reshape(Mesh(tp=4), kv_heads=4)


# ------------------------------------------------------------------------------------------------ arrays, and paper


def test_arrays_from_one_layout_to_another() -> None:
    one = Layout("((tp q) + (tp k) + (tp v)) in", totals={"q": 32, "k": 16, "v": 16})
    text = "((tp a) + (kv b) + (kv c)) (dp in)"
    other = Layout(text, totals={"a": 32, "b": 16, "c": 16})
    whole = xr.DataArray(np.arange(256.0).reshape(64, 4), dims=("dim0", "in"))
    mesh = Mesh(tp=4, dp=2).split("tp", kv=2, rep=2)
    shards = ckptlab.split(whole, one, Mesh(tp=2))
    moved = ckptlab.reshape(shards, one, mesh, to=text)
    assert moved.identical(ckptlab.split(whole, other, mesh))
    assert ckptlab.reshape(moved, other, Mesh(tp=2), to=one, on=mesh, shape=(64, 4)).identical(shards)
    renamed = ckptlab.reshape(shards, one, mesh, to=Layout("rows (dp columns)"))
    assert renamed.dims == ("dp", "kv", "rep", "rows", "columns")
    with pytest.raises(LayoutError, match=r"on=Mesh\(tp=…\).split"):
        ckptlab.merge(moved, other)
    with pytest.raises(LayoutError, match="have another dim of that name"):
        ckptlab.reshape(shards.expand_dims("rows"), one, mesh, to=Layout("rows (dp columns)"))


@pytest.mark.parametrize(("kv_heads", "parts"), [(2, (2, 4)), (8, None)])
def test_kv_heads_on_paper(kv_heads: int, parts: tuple[int, int] | None) -> None:
    """tp 8 over 2 kv heads: each is held by 4 ranks; over 8 nothing is."""
    name = "layers.0.self_attention.query_key_value.weight"
    model = ckptlab.paper_model(Mesh(tp=8, dp=2), heads=16, hidden=128, kv_heads=kv_heads)
    cut = model[name].cut
    assert model.mesh.size == 16
    assert model.mesh.tp == 8
    assert [cut.shard_shape(at)[0] for at in cut.coordinates()] == [16 + 2 * 8] * 8
    assert tuple(model.mesh.get(a) for a in ("kv", "rep")) == (parts or (None, None))
    assert model.reshape(Mesh(tp=4)).plan.written > 0
    with pytest.raises(ReshapeError, match="3 key/value heads are not divisible by it, nor it by them"):
        ckptlab.paper_model(Mesh(tp=4), heads=12, hidden=96, kv_heads=3)
