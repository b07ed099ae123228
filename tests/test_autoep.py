"""Experts of DeepSpeed's AutoEP: all of a layer in one tensor, which ep cuts; read, shown, and spread anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, differences, differences_from_truth, digest, whole
from helpers.experts import Whole, dealt_to_tp, figures_are_what_happens
from real_deepspeed import make_case, requires_deepspeed, resume
from safetensors.numpy import load_file

import ckptlab
from ckptlab.catalog import MASTER, PARAM
from ckptlab.errors import CheckpointError, CkptlabError, ReshapeError, UnsupportedError
from ckptlab.findings import Strict
from ckptlab.formats import fileplan, read
from ckptlab.formats.deepspeed.autoep import DIMS, Fused, aliases
from ckptlab.formats.deepspeed.experts import Experts
from ckptlab.formats.deepspeed.module import ModuleWeights, _from_expert_files
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder
from ckptlab.sharding.strategies import LayoutsOf
from ckptlab.widgets.held import inventory, pieces

AUTOEP = DATA / "autoep_ep2_dp4"
STEP = "global_step3"
LAYER = "layers.1.mlp.experts"
W1 = f"{LAYER}.w1"
SHARDED = {"stage3_param_persistence_threshold": 0}


def changed(tmp_path: Path, change: Callable[[Any], None]) -> Path:
    """A copy of the checkpoint whose model file says something else."""
    path = Path(shutil.copytree(AUTOEP, tmp_path / "run")) / STEP / "mp_rank_00_model_states.pt"
    content = torchfile.read_contents(str(path)).value
    change(content)
    fileplan.write(torchfile.plan(path.name, content), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    return path.parent


@pytest.mark.parametrize("ranks", [[[0, 1], [2, 3]], [[3, 0], [1, 2]]], ids=str)
def test_beside_autotp_they_are_dealt_to_tp_ranks_too(ranks: list[list[int]], tmp_path: Path) -> None:
    """As real DeepSpeed 0.19.8 writes them ("folded"), of which cases at stages 1 and 2 were read bit for bit too."""
    dealt_to_tp(tmp_path / "run", AUTOEP, folding={"version": 1, "tp_size": 2, "ep_size": 2, "etp_size": 1})
    step = tmp_path / "run" / STEP
    if ranks != [[0, 1], [2, 3]]:
        for file in step.glob("mp_rank_*"):
            content = torchfile.read(file)
            placed(*ranks)(content)
            torchfile.write(tmp_path / "new", content)
            (tmp_path / "new").replace(file)
        for expert, old, new in ((1, "00", "01"), (3, "01", "00")):
            file = f"layer_0_expert_{expert}_mp_rank_{{}}_model_states.pt"
            (step / file.format(old)).rename(step / file.format(new))
    found = ckptlab.open(step, strategy=Whole())
    assert (found.mesh, found[W1].shape) == (Mesh(dp=2, tp=2), (4, 37, 24))
    order = [held for rank in ranks for held in rank]  # where experts lie otherwise, states are those of others
    truth = load_file(AUTOEP / "truth.safetensors")
    for state in (MASTER, "exp_avg", "exp_avg_sq"):
        assert np.array_equal(whole(found.catalog, W1, state)[order], truth[f"{state}/{W1}"])
    if order == sorted(order):
        assert differences_from_truth(found.catalog, AUTOEP / "truth.safetensors") == []
        assert ckptlab.check(found).verdict == "healthy"
        figures_are_what_happens(found.catalog, Mesh(dp=2), tmp_path / "figures", ep=1)
        found.reshape(tp=1, dp=2, ep=2).save(tmp_path / "out" / "step")
        back = ckptlab.open(tmp_path / "out")
        assert (back.mesh["ep"], differences(found.catalog, back.catalog)) == (2, [])
        assert "folding" not in torchfile.read(tmp_path / "out" / "step" / "mp_rank_00_model_states.pt")
        found.reshape(zero_stage=3).save(tmp_path / "again" / "step")
        assert differences(found.catalog, read(tmp_path / "again")) == []


BESIDE_AUTOTP = [
    {"dp": 2, "tp": 2, "ep": 2, "zero_stage": 1},
    {"dp": 2, "tp": 2, "ep": 4, "zero_stage": 0},
    {"dp": 2, "tp": 2, "ep": 4, "zero_stage": 3},
    {"dp": 1, "tp": 4, "ep": 2, "zero_stage": 2},  # tp ranks that have the same experts
    {"dp": 1, "tp": 4, "ep": 2, "zero_stage": 0},
    {"dp": 1, "tp": 4, "ep": 2, "zero_stage": 3},
    {"dp": 2, "tp": 6, "ep": 4, "zero_stage": 0},  # neither a multiple of the other
    {"dp": 2, "tp": 6, "ep": 4, "zero_stage": 1},
    {"dp": 4, "tp": 2, "ep": 2, "zero_stage": 2, "round_robin": True},
    {"dp": 2, "tp": 2, "ep": 2, "zero_stage": 3, "sub_group_size": 900},
    {"dp": 2, "tp": 1, "ep": 2, "zero_stage": 1},
]


@pytest.mark.parametrize("asked", BESIDE_AUTOTP, ids=str)
def test_beside_autotp_they_are_written_so_too(asked: dict[str, Any], tmp_path: Path) -> None:
    source = ckptlab.open(AUTOEP, strategy=Whole())
    source.reshape(**asked).save(tmp_path / "there" / "step")
    there = ckptlab.open(tmp_path / "there", strategy=Whole())
    assert (there.mesh.tp, there.mesh.dp, there.zero_stage) == (asked["tp"], asked["dp"], asked["zero_stage"])
    assert differences(source.catalog, there.catalog) == []
    assert ckptlab.check(there).verdict == "healthy"
    there.reshape(tp=1, dp=4, ep=2, zero_stage=2, round_robin=False).save(tmp_path / "back" / "step")
    back = ckptlab.open(tmp_path / "back")
    assert (back.mesh, differences(source.catalog, back.catalog)) == (source.mesh, [])


class Cut(Whole):
    """Some are cut, into parts of two sizes."""

    def layout(self, name: str, shards: Any) -> Layout:
        cut = "gate_proj" in name
        return Layout("(tp out) in", sizes={"out": (20, 17)}) if cut else super().layout(name, shards)


@pytest.mark.parametrize("options", [{"zero_stage": 1}, {"zero_stage": 0}, {"zero_stage": 0, "fused": True}], ids=str)
def test_beside_autotp_others_are_cut(options: dict[str, Any], tmp_path: Path) -> None:
    source = ckptlab.open(AUTOEP, strategy=Cut())
    source.reshape(dp=2, tp=2, ep=4, **options).save(tmp_path / "there" / "step")
    there = ckptlab.open(tmp_path / "there", strategy=Cut())
    assert there["layers.0.mlp.gate_proj.weight"].cut.shard_shape((1,)) == (17, 24)
    assert differences(source.catalog, there.catalog) == []
    assert "experts  edp 1 → 2, ep 4 → 2" in str(there.reshape(ep=2))
    assert "changes   none" in str(there.reshape())


def test_beside_autotp_ranks_keep_the_order_of_their_experts(tmp_path: Path) -> None:
    source = ckptlab.open(changed(tmp_path, placed([2, 0], [3, 1])), strategy=Whole())
    source.reshape(dp=2, tp=2, ep=2).save(tmp_path / "there" / "step")
    there = ckptlab.open(tmp_path / "there", strategy=Whole())
    assert there.catalog.private.folder.experts.fused[0].ranks == ((2, 0), (3, 1))
    assert differences(source.catalog, there.catalog) == []


def test_views_of_a_target_beside_autotp() -> None:
    """Each rank has the experts of its number, whichever of dp and tp it is."""
    target = ckptlab.open(AUTOEP, strategy=Whole()).reshape(dp=2, tp=2, ep=2)
    truth = load_file(AUTOEP / "truth.safetensors")[f"exp_avg/{W1}"]
    shards = target.shards("exp_avg", stack=False)[W1]
    assert dict(shards.sizes) == {"ep": 2, "tp": 1, "expert": 2, "out": 37, "in": 24}
    assert (shards.sel(ep=1, tp=0).values == truth[2:]).all()
    ranks = [target.of_rank(rank) for rank in range(4)]
    parts = [one.get((W1, "exp_avg"), np.empty(0, np.float32)).ravel() for one in ranks]
    for ep in (0, 1):
        assert (np.concatenate([parts[ep], parts[ep + 2]]) == truth[2 * ep : 2 * ep + 2].ravel()).all()
    buffers = target.flat()["pp0/group2"]
    assert dict(buffers.exp_avg.sizes) == {"ep": 2, "tp": 1, "edp": 2, "flat": buffers.sizes["flat"]}
    shown = [[sum(p.count for p in pieces(target.target, W1, s, r)) for r in range(4)] for s in ("exp_avg", PARAM)]
    assert shown == [[part.size for part in parts], [truth[:2].size] * 4]
    sizes = {name: tensor.numel for name, tensor in target.target.tensors.items()}
    held = [n // 2 if ".experts." in name else n for name, n in sizes.items()]  # of two bytes each
    assert ckptlab.viz.memory_by_rank(target)[:, 0].tolist() == [2 * sum(held)] * 4
    assert [inventory(target.target, rank).kinds[PARAM] for rank in range(4)] == [2 * sum(held)] * 4


@pytest.mark.parametrize(("ep", "cut"), [(4, False), (2, True)])
def test_a_picture_says_that_shards_are_cut_where_they_are(ep: int, cut: bool) -> None:
    target = ckptlab.open(AUTOEP, strategy=Whole()).reshape(dp=2, tp=2, ep=ep).target
    said = "each shard is cut over edp into up to 2 fragments: not drawn"
    assert (said in ckptlab.viz.placed(target, W1, "exp_avg").svg) is cut
    assert "up to 1 fragments" not in ckptlab.viz.placed(target, W1, "exp_avg").svg


def test_what_files_say_of_experts_beside_autotp(tmp_path: Path) -> None:
    """Which DeepSpeed insists on (`validate_folding_metadata`): who wrote them, and over how many ranks they lie."""
    ckptlab.open(AUTOEP, strategy=Whole()).reshape(dp=2, tp=2, ep=4, zero_stage=2).save(tmp_path / "step")
    keys = ("tp_rank", "ep_rank", "zero_partition_group", "zero_partition_rank", "zero_partition_count", "family")
    said = {f.name: torchfile.read(f)["folding"] for f in (tmp_path / "step").glob("*.pt")}
    assert {(s["version"], s["tp_size"], s["ep_size"], s["etp_size"]) for s in said.values()} == {(1, 2, 4, 1)}
    found = {name: tuple(one[key] for key in keys) for name, one in said.items()}
    assert found["mp_rank_01_model_states.pt"] == (1, 1, "dense_dp", 0, 2, "dense")
    assert found["layer_0_expert_2_mp_rank_00_model_states.pt"] == (0, 2, "edp", 0, 1, "routed_expert")
    optim = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert found[optim] == (0, 2, "per_family", 1, 2, "zero_optimizer_state")
    router = "layers.1.mlp.router.gate.weight"
    assert said["mp_rank_01_model_states.pt"]["param_families"][router] == "router_gate_replicated"
    families = said[optim]["param_families"]
    dense = {"zero_partition_group": "dense_dp", "zero_partition_rank": 1, "zero_partition_count": 2}
    assert families["norm.weight"] == {"family": "dense", **dense}
    assert families[router] == {"family": "router_gate_replicated", **dense}
    assert families[W1] == {
        "family": "routed_expert",
        "zero_partition_group": "edp",
        "zero_partition_rank": 0,
        "zero_partition_count": 1,
    }
    (layer,) = torchfile.read(tmp_path / "step" / "mp_rank_01_model_states.pt")["ds_autoep_layers"]
    assert (layer["ep_rank"], layer["num_local_experts"], layer["expert_data_parallel_world_size"]) == (1, 1, 1)
    ckptlab.open(AUTOEP, strategy=Whole()).reshape(dp=4, tp=2, ep=4, zero_stage=3).save(tmp_path / "sharded")
    content = torchfile.read(tmp_path / "sharded" / "bf16_zero_pp_rank_2_mp_rank_01_optim_states.pt")
    groups = content["optimizer_state_dict"]["ds_zero_partition_groups"]
    assert [(g["partition_ranks"], g["partition_rank"]) for g in groups] == [([1, 3, 5, 7], 2)] * 2 + [([1, 5], 1)]
    assert "param_families" not in content["folding"]


@pytest.mark.parametrize(("dp", "tp", "ep"), [(2, 2, 4), (2, 4, 2), (2, 6, 4), (3, 2, 3)])
def test_who_writes_the_files_of_experts_beside_autotp(dp: int, tp: int, ep: int) -> None:
    """As DeepSpeed's engine: the first ep dp ranks, each that of its own ep rank and tp rank."""
    experts = Experts(fused=(Fused(0, LAYER, ep, tuple((e,) for e in range(ep))),), over_tp=True)
    ranks = [(rank % ep, rank % tp) for rank in range(dp * tp) if rank // tp < ep]
    assert set(experts.first_ranks(Mesh(dp=dp, tp=tp), ep)) == set(ranks)
    assert experts.mesh(Mesh(dp=dp, tp=tp)).groups("edp") == [list(range(e, dp * tp, ep)) for e in range(ep)]


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"ep": 1}, "AutoEP beside AutoTP at an ep of at least 2 alone"),
        ({"dp": 3}, "dp times tp, 6: ep 4 is a part of it"),
        ({"data_before_experts": True}, "no AutoEP beside AutoTP with use_data_before_expert_parallelism"),
    ],
)
def test_what_deepspeed_does_not_train_beside_autotp_is_refused(asked: dict[str, Any], says: str) -> None:
    with pytest.raises(ReshapeError, match=says):
        ckptlab.open(AUTOEP, strategy=Whole()).reshape(**{"dp": 2, "tp": 2, "ep": 4, **asked})


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_beside_autotp_without_zero(dtype: str, tmp_path: Path) -> None:
    """As real DeepSpeed 0.19.8 writes it: each tp rank has a model file, and the optimizer of its own experts."""
    ckptlab.open(AUTOEP).reshape(dp=4, ep=2, zero_stage=0, dtype=dtype).save(tmp_path / "made" / STEP)
    made, step = tmp_path / "made" / STEP, tmp_path / "run" / STEP
    step.mkdir(parents=True)
    for t in range(2):
        content = torchfile.read(made / "mp_rank_00_model_states.pt")
        content |= {"dp_world_size": 2, "mp_world_size": 2, "folding": {"version": 1, "tp_size": 2, "ep_size": 2}}
        content["checkpoint_parallel_dimensions"] = {"pp_degree": 1, "tp_degree": 2}
        torchfile.write(step / f"mp_rank_{t:02d}_model_states.pt", content)
        shutil.copy(
            made / f"expp_rank_{t}_mp_rank_00_optim_states.pt", step / f"expp_rank_{t}_mp_rank_{t:02d}_optim_states.pt"
        )
        for e in (2 * t, 2 * t + 1):
            shutil.copy(
                made / f"layer_0_expert_{e}_mp_rank_00_model_states.pt",
                step / f"layer_0_expert_{e}_mp_rank_{t:02d}_model_states.pt",
            )
    found, case = ckptlab.open(step, strategy=Whole()), read(AUTOEP)
    assert (found.mesh, found[W1].shape, found.zero_stage) == (Mesh(dp=2, tp=2), (4, 37, 24), 0)
    assert [d for d in differences(case, found.catalog) if dtype == "bf16" or not d.startswith(PARAM)] == []
    assert ckptlab.check(found).verdict == "healthy"
    found.reshape(tp=1, dp=2, ep=1, zero_stage=2).save(tmp_path / "out" / "step")
    assert differences(found.catalog, read(tmp_path / "out")) == []


def placed(*ranks: list[int], total: int = 4) -> Callable[[Any], None]:
    """A change of what is recorded: who has which experts."""

    def change(content: Any) -> None:
        for layer in content["ds_autoep_layers"]:
            said = [{"rank": rank, "experts": held} for rank, held in enumerate(ranks)]
            layer["expert_placement"] = {"version": 1, "num_experts": total, "ep_size": len(ranks), "ranks": said}
            layer["ep_size"] = len(ranks)

    return change


def test_every_state_is_what_training_held() -> None:
    catalog = read(AUTOEP)
    assert differences_from_truth(catalog, AUTOEP / "truth.safetensors") == []
    tensor = catalog[W1]
    assert (tensor.shape, tensor.layout.text, tensor.layout.dims) == ((4, 37, 24), "(ep expert) out in", DIMS)
    assert tensor.states.keys() == {MASTER, "exp_avg", "exp_avg_sq", PARAM}
    assert "ds_autoep_layers" not in catalog.client
    assert ckptlab.check(AUTOEP).findings == ()


def test_ep_cuts_experts_and_edp_their_buffers() -> None:
    ckpt = ckptlab.open(AUTOEP)
    assert ckpt.mesh == Mesh(dp=4).split("dp", edp=2, ep=2)
    truth = load_file(AUTOEP / "truth.safetensors")
    shards = ckpt.shards(stack=False)[W1]
    assert dict(shards.exp_avg.sizes) == {"ep": 2, "tp": 1, "expert": 2, "out": 37, "in": 24}
    for ep in (0, 1):
        assert (shards.exp_avg.sel(ep=ep, tp=0).values == truth[f"exp_avg/{W1}"][2 * ep : 2 * ep + 2]).all()
    placement = ckpt.catalog.placement(W1, MASTER)
    assert {tuple(placement.ranks(holder).tolist()) for holder in placement.holders} == {(0, 2), (1, 3)}
    (group,) = (g for g in ckpt.catalog.flat_groups if W1 in g.names)
    assert (dict(group.at), group.axes, group.over, group.dp) == ({"pp": 0}, ("ep", "tp"), "edp", 2)


SPREAD = [
    {"dp": 4, "ep": 4},
    {"dp": 4, "ep": 1},
    {"dp": 2, "ep": 2, "zero_stage": 1},
    {"dp": 8, "ep": 4},
    {"dp": 4, "data_before_experts": True},
    {"dp": 4, "ep": 2, "round_robin": True},
    {"dp": 2, "ep": 2, "zero_stage": 0},
    {"dp": 4, "ep": 2, "zero_stage": 3},
    {"dp": 2, "ep": 1, "zero_stage": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "form"),
    [
        *((asked, "deepspeed") for asked in SPREAD),
        *((asked, "universal") for asked in (SPREAD[0], SPREAD[-1])),  # which has no mesh
    ],
    ids=str,
)
def test_there_and_back_is_the_identity(asked: dict[str, Any], form: str, tmp_path: Path) -> None:
    source, before = ckptlab.open(AUTOEP), digest(AUTOEP)
    source.reshape(**asked).save(tmp_path / "there" / "step", form)
    there = ckptlab.open(tmp_path / "there")
    assert there.catalog.format == form
    assert differences(source.catalog, there.catalog) == []
    assert ckptlab.check(tmp_path / "there").findings == ()
    if form == "deepspeed" and "ep" in asked:
        assert there.mesh["ep"] == asked["ep"]
    options = {"zero_stage": 2, "data_before_experts": False, "round_robin": False}
    there.reshape(dp=4, ep=2, **options).save(tmp_path / "back" / "step")
    back = ckptlab.open(tmp_path / "back")
    assert differences(source.catalog, back.catalog) == []
    assert back.mesh == source.mesh
    assert digest(AUTOEP) == before


def test_what_is_written_is_what_deepspeed_would_write(tmp_path: Path) -> None:
    """On the same mesh: the same files, and of the engine's keys the same values."""
    ckptlab.open(AUTOEP).reshape(dp=4).save(tmp_path / "run" / STEP)
    theirs, mine = AUTOEP / STEP, tmp_path / "run" / STEP
    names = sorted(p.name for p in theirs.iterdir())
    assert sorted(p.name for p in mine.iterdir() if p.suffix == ".pt") == [n for n in names if n.endswith(".pt")]
    a, b = (torchfile.read_contents(str(folder / "mp_rank_00_model_states.pt")).value for folder in (theirs, mine))
    for key in ("ds_autoep_layers", "num_experts", "param_shapes", "universal_checkpoint_info", "ds_config"):
        assert a[key] == b[key], key
    one, other = (
        torchfile.read_contents(str(f / "layer_0_expert_2_mp_rank_00_model_states.pt")).value for f in (theirs, mine)
    )
    assert {n: (x.shape, x.map().tobytes()) for n, x in one.items()} == {
        n: (x.shape, x.map().tobytes()) for n, x in other.items()
    }


# ------------------------------------------------------------------------------------------------ other placements


@pytest.mark.parametrize(
    "ranks",
    [([0, 1, 2], [3]), ([2, 0], [3, 1]), ([1], [0, 2, 3]), ([0, 1], [1, 2, 3]), ([0, 1, 2, 3], [])],
    ids=str,
)
def test_a_placement_of_any_kind_is_a_layout(ranks: tuple[list[int], ...]) -> None:
    fused = Fused(0, LAYER, 4, tuple(map(tuple, ranks)))
    mesh = Mesh(dp=2).split("dp", edp=1, ep=2)
    whole = np.arange(24).reshape(4, 3, 2)
    layout = fused.layout(whole.shape)
    cut = layout.resolve(whole.shape, mesh)
    for rank, held in enumerate(ranks):
        assert cut.take(whole, cut.coordinate({"ep": rank})).tolist() == whole[held].tolist()
    follows = [e for held in ranks for e in held] == [0, 1, 2, 3]
    assert (type(layout) is Layout) == follows
    if not follows:
        with pytest.raises(CkptlabError, match="cut for ep 2 by a map"):
            layout.resolve(whole.shape, Mesh(dp=4).split("dp", edp=1, ep=4))
        assert fused.spread(4).layout(whole.shape) == Layout("(ep expert) out in", dims=DIMS)


def test_ranks_that_have_experts_in_another_order(tmp_path: Path) -> None:
    """The masters on a rank are in its own order; an expert's weight is in the file of its number."""
    known, truth = read(AUTOEP), load_file(AUTOEP / "truth.safetensors")
    catalog = read(changed(tmp_path, placed([1, 0], [3, 2])))
    from compare import whole

    assert (whole(catalog, W1, MASTER) == truth[f"master/{W1}"][[1, 0, 3, 2]]).all()
    assert (whole(catalog, W1, PARAM).view(np.uint16) == whole(known, W1, PARAM).view(np.uint16)).all()


def test_what_nobody_recorded_was_dealt_evenly(tmp_path: Path) -> None:
    def change(content: Any) -> None:
        content["autoep_layers"] = [
            {k: v for k, v in layer.items() if k not in ("expert_placement", "affine_maps")}
            for layer in content.pop("ds_autoep_layers")
        ]

    assert differences(read(AUTOEP), read(changed(tmp_path, change))) == []


BAD: dict[str, tuple[Callable[[Any], None], type[CkptlabError], str]] = {
    "no ranks": (placed(), CheckpointError, "ep_size"),
    "a rank too few": (lambda c: c["ds_autoep_layers"][0].update(ep_size=3), CheckpointError, "4 experts on 3 ranks"),
    "an expert that nobody has": (placed([0, 1], [2]), CheckpointError, "4 experts on 2 ranks"),
    "more than the shards hold": (placed([0, 1, 2], [3]), CheckpointError, r"param_shapes says \(2, 37, 24\)"),
    "a billion": (lambda c: c["ds_autoep_layers"][0].update(num_experts=10**9), CheckpointError, "fewer than"),
    "no prefix": (lambda c: c["ds_autoep_layers"][0].update(expert_key_prefix=7), CheckpointError, "a name, found 7"),
    "no list": (lambda c: c.update(ds_autoep_layers=3), CheckpointError, "expected a list"),
    "newer beside AutoTP": (lambda c: c.update(folding={"version": 2}), UnsupportedError, "folding is of version 2"),
    "experts that are cut": (
        lambda c: c.update(folding={"version": 1, "etp_size": 2}),
        UnsupportedError,
        "folding is of version 1 and etp_size 2, ckptlab knows version 1 and whole experts",
    ),
    "odd beside AutoTP": (lambda c: c.update(folding={"version": "one"}), CheckpointError, "folding.version"),
    "newer": (
        lambda c: c["ds_autoep_layers"][0]["expert_placement"].update(version=2),
        UnsupportedError,
        "version 2, ckptlab knows version 1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_odd_is_refused(name: str, tmp_path: Path) -> None:
    change, error, says = BAD[name]
    with pytest.raises(error, match=says):
        ckptlab.open(changed(tmp_path, change))


@pytest.mark.parametrize(
    ("others", "mesh", "says"),
    [
        ({}, Mesh(dp=2, tp=2), "AutoEP (ds_autoep_layers) beside tp 2"),
        ({"local": {"moe.": 2}, "total": {"moe.": 4}}, Mesh(dp=2), "beside experts of DeepSpeed-MoE"),
    ],
)
def test_what_is_beside_them_is_refused_by_name(others: dict[str, Any], mesh: Mesh, says: str) -> None:
    experts = Experts(**others, fused=(Fused(0, LAYER, 4, ((0, 1), (2, 3))),))
    (finding,) = experts.problems("run", mesh)
    assert says in finding.text


@pytest.mark.parametrize("ranks", [([0, 1], [1, 2, 3]), ([0, 1, 2, 3], []), ([3, 1], [2, 0])], ids=str)
def test_each_rank_has_the_weights_of_its_experts(ranks: tuple[list[int], ...]) -> None:
    """One that stands on several ranks too, and ranks that have none."""
    known = read(AUTOEP)
    folder = known.private.folder
    fused = Fused(0, LAYER, 4, tuple(map(tuple, ranks)))
    weights = ModuleWeights()
    _from_expert_files(replace(folder, experts=replace(folder.experts, fused=(fused,))), weights, Strict())
    whole = load_file(AUTOEP / "truth.safetensors")[f"param/{W1}"]
    for rank, held in enumerate(ranks):
        fragments = weights.pieces[W1][Holder(pp=0, ep=rank, tp=0)]
        assert [f.stored.map().tobytes() for f in fragments] == [whole[e].tobytes() for e in held]
    assert weights.shapes[W1][0] == (len(ranks[0]), 37, 24)


def test_an_expert_file_without_a_tensor_is_a_contradiction(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(AUTOEP, tmp_path / "run")) / STEP
    path = folder / "layer_0_expert_2_mp_rank_00_model_states.pt"
    content = torchfile.read_contents(str(path)).value
    del content[f"{W1}.2"]
    fileplan.write(torchfile.plan(path.name, content), path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)
    with pytest.raises(CheckpointError, match=r"experts\.w1: the files of experts 2 do not have it"):
        ckptlab.open(folder)


def test_they_are_dealt_evenly_to_another_degree() -> None:
    with pytest.raises(ReshapeError, match=r"the 4 experts of layers\.1\.mlp\.experts\.\* cannot be dealt evenly"):
        ckptlab.open(AUTOEP).reshape(dp=3, ep=3)


def test_a_router_has_the_models_own_name_too() -> None:
    fused = [Fused(0, "model.layers.3.mlp.experts", 4, ((0, 1), (2, 3)))]
    router = "model.layers.3.mlp.router.gate.weight"
    names = [router, "model.layers.3.mlp.gate.gate.weight", "model.layers.2.mlp.gate.gate.weight", "lm_head.weight"]
    assert aliases(fused, [*names, "model.layers.3.mlp.shared_experts.gate_proj.weight"]) == {names[1]: router}


# ------------------------------------------------------------------------------------------------ real DeepSpeed


@requires_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "run"),
    [
        ({"dp": 4, "ep": 4}, {"ep": 4}),
        ({"dp": 2, "ep": 1, "zero_stage": 1}, {"dp": 2, "ep": 1, "zero": 1}),
        ({"dp": 2, "zero_stage": 0}, {"dp": 2, "zero": 0}),
        ({"dp": 2, "zero_stage": 3}, {"dp": 2, "zero": 3, "zero_config": SHARDED}),
    ],
    ids=str,
)
def test_deepspeed_resumes_them(asked: dict[str, Any], run: dict[str, Any], tmp_path: Path) -> None:
    ckptlab.open(AUTOEP).reshape(**asked).save(tmp_path / STEP)
    report = resume(tmp_path, AUTOEP.name, **run)
    assert report["status"] == "equal", report
    assert report["losses"]["4"] == pytest.approx(report["uninterrupted"]["4"], rel=1e-4)


def headers(folder: Path) -> dict[str, dict[str, Any]]:
    """What the files of a step say of AutoEP beside AutoTP, by name."""
    keys = ("folding", "ds_autoep_layers", "universal_checkpoint_info", "param_shapes", "num_experts")
    found = {}
    for file in folder.glob("*.pt"):
        content = torchfile.read(file)
        found[file.name] = {key: content[key] for key in keys if key in content}
        state = content.get("optimizer_state_dict", {})
        found[file.name] |= {key: state[key] for key in ("ds_zero_partition_groups", "partition_count") if key in state}
    return found


@requires_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "asked", "run"),
    [
        ("autoep_tp2_ep4_dp2", {"ep": 2, "zero_stage": 1}, {"ep": 2, "zero": 1}),
        ("autoep_tp2_ep4_dp2_zero0", {"dp": 1, "ep": 2}, {"dp": 1, "ep": 2}),
        ("autoep_tp2_ep4_dp2_zero3", {"dp": 1, "ep": 2}, {"dp": 1, "ep": 2}),
        ("autoep_tp4_ep2", {"tp": 2, "dp": 3, "ep": 3}, {"tp": 2, "dp": 3, "ep": 3}),
        ("autoep_tp2_ep4_dp2", {"tp": 1, "ep": 2, "zero_stage": 0}, {"tp": 1, "ep": 2, "zero": 0}),
    ],
)
def test_deepspeed_resumes_them_beside_autotp(
    case: str, asked: dict[str, Any], run: dict[str, Any], tmp_path: Path
) -> None:
    made = make_case(case, tmp_path / "made")
    source = ckptlab.open(made)
    assert differences_from_truth(source.catalog, made / "truth.safetensors") == []
    assert ckptlab.check(source).verdict == "healthy"
    source.reshape().save(tmp_path / "same" / STEP)
    assert headers(tmp_path / "same" / STEP) == headers(made / STEP)
    source.reshape(**asked).save(tmp_path / "run" / STEP)
    assert ckptlab.check(tmp_path / "run").verdict == "healthy"
    report = resume(tmp_path / "run", made, **run)
    assert report["status"] == "equal", report
    assert report["losses"]["4"] == pytest.approx(report["uninterrupted"]["4"], rel=1e-4)


@requires_deepspeed
@pytest.mark.slow
def test_deepspeed_resumes_beside_autotp_what_had_no_tp(tmp_path: Path) -> None:
    """How AutoTP cuts tensors is known of a run that it was on in."""
    like = read(make_case("autoep_tp2_ep4_dp2", tmp_path / "made"))
    layouts = LayoutsOf({name: tensor.layout for name, tensor in like.tensors.items()})
    ckptlab.open(AUTOEP, strategy=layouts).reshape(tp=2, dp=2, ep=4).save(tmp_path / "run" / STEP)
    report = resume(tmp_path / "run", AUTOEP.name, tp=2, dp=2, ep=4)
    assert report["status"] == "equal", report


@requires_deepspeed
@pytest.mark.slow
def test_deepspeed_loads_a_universal_folder_beside_autotp(tmp_path: Path) -> None:
    """Of which its own converter makes none."""
    made = make_case("autoep_tp2_ep4_dp2", tmp_path / "made")
    ckptlab.open(made).reshape(ep=2, format="universal").save(tmp_path / "run" / STEP)
    assert resume(tmp_path / "run", made, steps=0, ep=2, universal=True)["status"] == "equal"


@requires_deepspeed
@pytest.mark.slow
def test_deepspeed_loads_the_universal_folder(tmp_path: Path) -> None:
    ckptlab.open(AUTOEP).reshape(dp=4).save(tmp_path / STEP, "universal")
    assert resume(tmp_path, AUTOEP.name, universal=True, steps=0, ep=4)["status"] == "equal"


@requires_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("case", ["autoep_ep2_dp4_zero3", "autoep_ep2_dp2_zero0", "autoep_ep2_dp2_bf16_optimizer"])
def test_other_stages_are_read_and_resumed_at_stage_2(case: str, tmp_path: Path) -> None:
    made = make_case(case, tmp_path / "made")
    assert differences_from_truth(read(made), made / "truth.safetensors") == []
    ckptlab.open(made).reshape(dp=2, ep=1, zero_stage=2).save(tmp_path / "run" / STEP)
    report = resume(tmp_path / "run", made, steps=0, dp=2, ep=1, zero=2, zero_config={})
    assert report["status"] == "equal", report


@requires_deepspeed
@pytest.mark.slow
def test_a_tp_rank_without_heads_has_another_optimizer(tmp_path: Path) -> None:
    """Three heads on four tp ranks: the last one's own file lacks what the others' have, and gives its experts."""
    folder = make_case("autoep_tp4_ep2_zero0", tmp_path)
    assert differences_from_truth(read(folder), folder / "truth.safetensors") == []
    assert ckptlab.check(folder).verdict == "healthy"
