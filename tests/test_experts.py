"""Experts of DeepSpeed-MoE: read under their global names, shown by where they are, spread over any part of dp."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from compare import DATA, differences, differences_from_truth, digest, same_bits, whole
from helpers.experts import Whole, dealt_to_tp, figures_are_what_happens
from real_deepspeed import make_case, requires_deepspeed, resume
from safetensors.numpy import load_file

import ckptlab
from ckptlab.catalog import MASTER, PARAM, ParameterGroup
from ckptlab.convert.manifest import MANIFEST
from ckptlab.errors import CheckpointError, ReshapeError, UnsupportedError
from ckptlab.findings import Strict
from ckptlab.formats import fileplan, read
from ckptlab.formats.deepspeed import experts, pipeline
from ckptlab.formats.deepspeed import groups as grouping
from ckptlab.formats.deepspeed.experts import Experts
from ckptlab.formats.torch import torchfile
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape

MOE = DATA / "moe_ep2_dp4"
LAYER = "blocks.1.moe.deepspeed_moe.experts.deepspeed_experts."
SPREAD = [
    {"dp": 4, "ep": 1},
    {"dp": 4, "ep": 4},
    {"dp": 2, "ep": 2},
    {"dp": 1, "ep": 1},
    {"dp": 8, "ep": 4},
    {"dp": 6, "ep": 2, "zero_stage": 1},
    {"dp": 4, "data_before_experts": True},
    {"dp": 4, "ep": 2, "round_robin": True},
    {"dp": 4, "ep": 4, "zero_stage": 0},
    {"dp": 2, "ep": 1, "zero_stage": 0, "fused": True},
]


def test_every_state_of_every_expert_is_what_training_held() -> None:
    catalog = read(MOE)
    assert differences_from_truth(catalog, MOE / "truth.safetensors") == []
    assert {f"{LAYER}{e}.fc1.weight" for e in range(4)} <= set(catalog.tensors)
    assert catalog[f"{LAYER}3.fc1.weight"].states.keys() == {MASTER, "exp_avg", "exp_avg_sq", PARAM}


def test_experts_lie_on_ep_and_their_buffers_over_edp() -> None:
    catalog = read(MOE)
    assert catalog.mesh == Mesh(dp=4).split("dp", edp=2, ep=2)
    for expert, ep in enumerate((0, 0, 1, 1)):
        for state in (MASTER, PARAM):
            placement = catalog.placement(f"{LAYER}{expert}.fc1.weight", state)
            assert dict(placement.at) == {"ep": ep}
            assert placement.data == ("edp",)
            assert placement.ranks(placement.holders[0]).tolist() == [ep, ep + 2]
    dense = catalog.placement("wte.weight", MASTER)
    assert dense.ranks(dense.holders[0]).tolist() == [0, 1, 2, 3]
    over = {(g.group, g.at.get("ep"), g.over, g.dp) for g in catalog.flat_groups}
    assert over == {(0, None, "dp", 4), (1, None, "dp", 4), *((g, ep, "edp", 2) for g in (2, 3) for ep in (0, 1))}


def test_views_show_where_an_expert_is() -> None:
    ckpt = ckptlab.open(MOE)
    truth = load_file(MOE / "truth.safetensors")
    for expert, ep in ((1, 0), (2, 1)):
        name = f"{LAYER}{expert}.fc2.weight"
        shards = ckpt.shards(stack=False)[name]
        assert int(shards.ep) == ep
        assert (shards.exp_avg.values[0] == truth[f"exp_avg/{name}"]).all()
    flat = ckpt.flat()["/pp0/group2/ep1"]
    assert flat.master.dims == ("tp", "edp", "flat")
    held = np.concatenate([flat.master.values[0, i, : int(flat.master_numel[0, i])] for i in range(2)])
    first = truth[f"master/{LAYER}2.fc1.weight"].ravel()
    assert (held[: first.size] == first).all()


def test_a_healthy_one_has_no_finding() -> None:
    assert ckptlab.check(MOE).findings == ()


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
    source, before = ckptlab.open(MOE), digest(MOE)
    if form == "universal" and asked.get("zero_stage") == 0:
        with pytest.raises(ReshapeError, match="a universal folder for training without ZeRO"):
            source.reshape(**asked).save(tmp_path / "there" / "step", form)
        return
    source.reshape(**asked).save(tmp_path / "there" / "step", form)
    there = ckptlab.open(tmp_path / "there")
    assert there.catalog.format == form
    assert differences(source.catalog, there.catalog) == []
    there.reshape(dp=4, ep=2, zero_stage=2, data_before_experts=False, round_robin=False).save(
        tmp_path / "back" / "step"
    )
    back = ckptlab.open(tmp_path / "back")
    assert differences(source.catalog, back.catalog) == []
    assert (back.mesh, [g.tensors for g in back.catalog.groups]) == (
        source.mesh,
        [g.tensors for g in source.catalog.groups],
    )
    assert digest(MOE) == before


def test_what_is_written_is_what_deepspeed_would_write(tmp_path: Path) -> None:
    """On its own mesh: every file of the source, with the same names, shapes and hyperparameters in it."""
    ckptlab.open(MOE).reshape().save(tmp_path / "global_step3")
    for file in sorted((MOE / "global_step3").iterdir()):
        said = torchfile.read_contents(str(tmp_path / "global_step3" / file.name)).value
        wanted = torchfile.read_contents(str(file)).value
        if "optim" not in file.name:
            assert list(said) == list(wanted)
            assert [getattr(v, "shape", None) for v in said.values()] == [
                getattr(v, "shape", None) for v in wanted.values()
            ]
            continue
        said, wanted = said["optimizer_state_dict"], wanted["optimizer_state_dict"]
        assert said["partition_count"] == wanted["partition_count"] == [4, 4, 2, 2]
        assert said["group_paddings"] == wanted["group_paddings"]
        assert said["base_optimizer_state"]["param_groups"] == wanted["base_optimizer_state"]["param_groups"]
        mappings = [
            [[(n, a.attributes) for n, a in group.items()] for group in one["param_slice_mappings"]]
            for one in (said, wanted)
        ]
        assert mappings[0] == mappings[1]


def test_groups_are_called_by_the_new_degree(tmp_path: Path) -> None:
    ckptlab.open(MOE).reshape(ep=4).save(tmp_path / "step")
    found = ckptlab.open(tmp_path / "step")
    assert [g.name for g in found.catalog.groups] == ["decay", "no_decay", "ep_size_4", "ep_size_4"]
    assert found.mesh == Mesh(dp=4).split("dp", edp=1, ep=4)


def test_a_mesh_may_say_ep_too() -> None:
    source = read(MOE)
    assert Reshape.of(source, Mesh(dp=4).split("dp", edp=1, ep=4)).mesh["ep"] == 4
    assert Reshape.of(source, Mesh(dp=8)).mesh == Mesh(dp=8).split("dp", edp=4, ep=2)
    assert Reshape.of(source, Mesh(dp=4).split("dp", ep=2, edp=2)).mesh == Mesh(dp=4).split("dp", ep=2, edp=2)


@pytest.mark.parametrize("stage", [None, 0])
@pytest.mark.parametrize(("case", "dp", "ep"), [(MOE, 2, 1), (DATA / "autoep_ep2_dp4", 4, 4)], ids=["moe", "autoep"])
def test_the_plans_figures_are_what_happens(case: Path, dp: int, ep: int, stage: int | None, tmp_path: Path) -> None:
    figures_are_what_happens(read(case), Mesh(dp=dp), tmp_path, ep=ep, zero_stage=stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 0])
def test_the_plans_figures_where_tp_ranks_have_different_ones(stage: int, tmp_path: Path) -> None:
    source = ckptlab.open(dealt_to_tp(tmp_path / "run", MOE), strategy=Whole()).catalog
    figures_are_what_happens(source, Mesh(dp=2, tp=2), tmp_path / "out", ep=4, zero_stage=stage)
    figures_are_what_happens(source, Mesh(dp=4), tmp_path / "at tp 1", ep=2, zero_stage=stage)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 0, 3])
@pytest.mark.parametrize(("dp", "tp", "ep"), [(2, 2, 4), (1, 4, 2)])
def test_the_plans_figures_of_autoep_beside_autotp(dp: int, tp: int, ep: int, stage: int, tmp_path: Path) -> None:
    source = ckptlab.open(DATA / "autoep_ep2_dp4", strategy=Whole()).catalog
    figures_are_what_happens(source, Mesh(dp=dp, tp=tp), tmp_path, ep=ep, zero_stage=stage)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "ranks"),
    [
        ({"dp": 2, "tp": 2, "ep": 1}, [[0, 1, 2, 3]]),
        ({"dp": 2, "tp": 2, "ep": 2, "data_before_experts": True}, [[0, 1], [2, 3]]),
        ({"dp": 4, "tp": 3, "ep": 4}, [[0, 4, 8], [1, 5, 9], [2, 6, 10], [3, 7, 11]]),
    ],
    ids=str,
)
def test_experts_lie_on_ranks_that_are_no_grid_of_dp_and_tp(
    asked: dict[str, Any], ranks: list[list[int]], tmp_path: Path
) -> None:
    """DeepSpeed deals them so (moe/layer.py, groups.py), leaves out files of some, and cannot load that itself: all
    that it looks for is written. Real DeepSpeed 0.19.8 resumed such folders."""
    source = ckptlab.open(dealt_to_tp(tmp_path / "run", MOE), strategy=Whole())
    degrees = {axis: asked[axis] for axis in ("dp", "tp")}
    options = {key: value for key, value in asked.items() if key not in degrees}
    figures_are_what_happens(source.catalog, Mesh(**degrees), tmp_path / "figures", **options)
    source.reshape(**asked).save(tmp_path / "out" / "step")
    back = ckptlab.open(tmp_path / "out", strategy=Whole())
    assert (back.mesh, differences(source.catalog, back.catalog)) == (Mesh(**degrees), [])
    assert ckptlab.check(back).findings == ()
    for expert in range(4):
        place = back.catalog.placement(f"{LAYER}{expert}.fc1.weight", "exp_avg")
        assert place.ranks(place.holders[0]).tolist() == ranks[expert * asked["ep"] // 4]
    figures_are_what_happens(back.catalog, Mesh(dp=2), tmp_path / "from it", ep=2, data_before_experts=False)
    with pytest.raises(ReshapeError, match="without ZeRO DeepSpeed leaves out the optimizers"):
        source.reshape(**asked, zero_stage=0)


@pytest.mark.parametrize("stage", [1, 0])
def test_what_is_written_of_a_universal_folder_has_experts_in_their_own_files_alone(stage: int, tmp_path: Path) -> None:
    """Whose model file has them all: DeepSpeed takes none that a rank has not ("Unexpected key(s) in state_dict")."""
    ckptlab.open(MOE).reshape(format="universal").save(tmp_path / "universal" / "step")
    source = read(tmp_path / "universal")
    figures_are_what_happens(source, Mesh(dp=4), tmp_path / "out", ep=2, zero_stage=stage)
    module = torchfile.read(tmp_path / "out" / "mp_rank_00_model_states.pt")["module"]
    assert module.keys() == torchfile.read(MOE / "global_step3" / "mp_rank_00_model_states.pt")["module"].keys()


def test_weights_are_saved_under_global_names(tmp_path: Path) -> None:
    ckptlab.save_weights(ckptlab.open(MOE), tmp_path / "weights")
    truth, found = load_file(MOE / "truth.safetensors"), load_file(tmp_path / "weights" / "model.safetensors")
    name = f"{LAYER}3.fc1.bias"
    assert (found[name] == truth[f"master/{name}"]).all()


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({"ep": 3}, "ep 3 is a part of it, and does not divide it"),
        ({"dp": 8, "ep": 8}, "the 4 experts of .* cannot be dealt evenly"),
        ({"dp": 3}, "dp 3: ep 2 is a part of it"),
        ({"zero_stage": 3}, "ZeRO-3 with experts"),
        ({"tp": 2}, "nothing says how .* are cut"),
        ({"mesh": Mesh(dp=4, ep=2)}, "ep as a part of dp"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_its_reason(asked: dict[str, Any], reason: str) -> None:
    with pytest.raises(ReshapeError, match=reason):
        ckptlab.open(MOE).reshape(**asked)


def test_ep_of_a_checkpoint_without_experts_is_refused() -> None:
    with pytest.raises(ReshapeError, match="has no experts"):
        ckptlab.open(DATA / "plain_zero2_dp2").reshape(ep=2)


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    shutil.copytree(MOE, tmp_path / "run")
    (tmp_path / "run" / "global_step3" / "layer_1_expert_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="layer_1_expert_2_mp_rank_00_model_states"):
        ckptlab.open(tmp_path / "run")
    (finding, *_) = ckptlab.check(tmp_path / "run").findings
    assert finding.code == "missing-file"
    assert finding.where.files == ("layer_1_expert_2_mp_rank_00_model_states.pt",)


def changed(tmp_path: Path, change: Any, pattern: str) -> Path:
    """A copy of the case whose files of that pattern say something else."""
    shutil.copytree(MOE, tmp_path / "run")
    for file in (tmp_path / "run" / "global_step3").glob(pattern):
        content = torchfile.read_contents(str(file)).value
        change(content)
        fileplan.write(torchfile.plan(file.name, content), file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)
    return tmp_path / "run"


def test_experts_are_dealt_to_tp_ranks_too(tmp_path: Path) -> None:
    """Unless they are tensor parallel themselves. Made so by real DeepSpeed 0.19.8 too, and read bit for bit."""
    found = ckptlab.open(dealt_to_tp(tmp_path / "run", MOE), strategy=Whole())
    assert found.mesh == Mesh(dp=2, tp=2)
    assert differences_from_truth(found.catalog, MOE / "truth.safetensors") == []
    assert ckptlab.check(found).verdict == "healthy"
    found.reshape(tp=1, dp=2, ep=2).save(tmp_path / "out" / "step")
    back = ckptlab.open(tmp_path / "out")
    assert (back.mesh["ep"], differences(found.catalog, back.catalog)) == (2, [])


def test_of_dealt_experts_there_is_no_layout_to_prove(tmp_path: Path) -> None:
    """A tp rank has the whole of some, and nothing of others."""
    path = dealt_to_tp(tmp_path / "run", MOE)
    with pytest.raises(UnsupportedError, match="Of scale nothing proves it: its shards are all one number") as caught:
        ckptlab.open(path)
    assert "likewise" not in str(caught.value)
    found = ckptlab.open(path, strategy={"scale$": "out"})
    assert differences_from_truth(found.catalog, MOE / "truth.safetensors") == []
    (finding,) = found.catalog.findings
    assert finding.code == "layouts-inferred"
    assert not any(map(experts.layer_of, finding.where.tensors))


@pytest.mark.parametrize("ep", [1, 2])
def test_dealt_experts_keep_their_order_by_way_of_a_universal_folder(ep: int, tmp_path: Path) -> None:
    """Round robin deals a buffer to all ranks that share it, of tp too."""
    found = ckptlab.open(dealt_to_tp(tmp_path / "run", MOE), strategy=Whole())
    found.reshape(format="universal", ep=ep, round_robin=True).save(tmp_path / "universal" / "step")
    there = ckptlab.open(tmp_path / "universal", strategy=Whole())
    assert [g.tensors for g in there.catalog.groups] == [g.tensors for g in found.catalog.groups]
    found.reshape(round_robin=True, ep=ep).save(tmp_path / "native" / "step")
    there = ckptlab.open(tmp_path / "native", strategy=Whole())
    assert [g.tensors for g in there.catalog.groups] == [g.tensors for g in found.catalog.groups]


def test_views_show_whose_dealt_experts_are(tmp_path: Path) -> None:
    """On edp and ep, into which dp and tp are arranged once more: ep rank 1 is ranks 1 and 3."""
    found = ckptlab.open(dealt_to_tp(tmp_path / "run", MOE), strategy=Whole())
    truth, name = load_file(MOE / "truth.safetensors"), f"{LAYER}2.fc2.weight"
    shards = found.shards(stack=False)[name]
    assert (dict(shards.sizes), int(shards.ep)) == ({"tp": 1, "out": 15, "in": 37}, 1)
    assert (shards.exp_avg.values[0] == truth[f"exp_avg/{name}"]).all()
    place = found.catalog.placement(name, MASTER)
    assert (place.mesh, place.mesh.size) == (Mesh(dp=4).split("dp", edp=2, ep=2), found.mesh.size)
    assert [place.holder(rank) is not None for rank in range(4)] == [False, True, False, True]
    assert {r for r in range(4) if (name, "exp_avg") in found.of_rank(r)} <= {1, 3}
    flat = found.flat()["/pp0/group2/ep1"]
    assert flat.master.dims == ("tp", "edp", "flat")
    assert dict(found.flat()["/pp0/group0"].sizes)["tp"] == 2
    assert "replicas-differ" not in {f.code for f in ckptlab.check(found).findings}


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked", [{}, {"dp": 1}, {"ep": 4}, {"tp": 4, "dp": 1, "ep": 4}, {"zero_stage": 0, "ep": 4}], ids=str
)
def test_they_are_written_so_too(asked: dict[str, Any], tmp_path: Path) -> None:
    """Each tp rank has files and buffers of its own experts alone. Real DeepSpeed 0.19.8 resumed such folders, at other
    tp, ep, dp and stages."""
    found = ckptlab.open(dealt_to_tp(tmp_path / "run", MOE), strategy=Whole())
    there = found.reshape(**asked)
    there.save(tmp_path / "out" / "step")
    step, mesh, ep = tmp_path / "out" / "step", {"tp": 2, "dp": 2, "ep": 2} | asked, asked.get("ep", 2)
    for expert in range(4):
        of = {f.name for f in step.glob(f"layer_1_expert_{expert}_*")}
        assert of == {f"layer_1_expert_{expert}_mp_rank_{expert // (4 // ep) % mesh['tp']:02d}_model_states.pt"}
    if asked.get("zero_stage") == 0:
        optims = {f"expp_rank_{e}_mp_rank_{e % 2:02d}_optim_states.pt" for e in range(4)}
        assert {f.name for f in step.glob("expp_*")} == optims
    else:
        state = torchfile.read(step / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt")["optimizer_state_dict"]
        assert state["partition_count"] == [mesh["dp"]] * 2 + [mesh["dp"] * mesh["tp"] // ep] * 2
    back = ckptlab.open(tmp_path / "out", strategy=Whole())
    assert (back.mesh.tp, back.mesh.dp, differences(found.catalog, back.catalog)) == (mesh["tp"], mesh["dp"], [])
    assert ckptlab.check(back).verdict == "healthy"


def test_model_files_that_deepspeed_leaves_out(tmp_path: Path) -> None:
    """At ep of less than tp, so that it cannot load its own (0.19.8: "checkpoint count 2 is different from saved
    mp_world_size 4"). The optimizer's files are all there. Cases of real DeepSpeed were read bit for bit, written at
    other degrees and resumed by it."""
    path = dealt_to_tp(tmp_path / "run", MOE, tp=4)
    found = ckptlab.open(path, strategy=Whole())
    assert "mp_rank_02_model_states.pt, mp_rank_03_model_states.pt: not there" in found.catalog.findings[0].found
    assert (found.mesh, found.zero_stage) == (Mesh(tp=4), 2)
    case = read(MOE)
    lost = [f"{PARAM}/{n}" for n, t in case.tensors.items() if t.kind == "parameter" and not experts.layer_of(n)]
    gone = [n for n, t in case.tensors.items() if t.kind == "frozen"]
    assert sorted(set(case.tensors) - set(found.catalog.tensors)) == sorted(gone)
    assert [f for f in differences(case, found.catalog) if not f.startswith("only one has")] == []
    assert sorted(f"{PARAM}/{n}" for n, t in found.catalog.tensors.items() if PARAM not in t.states) == sorted(lost)
    (finding,) = ckptlab.check(found).findings
    assert (finding.code, finding.severity) == ("model-files", "warning")
    assert "adapter.weight" in finding.found
    with pytest.raises(ReshapeError, match="adapter.weight, adapter.bias: not stored whole"):
        found.reshape(tp=2, dp=2, ep=2)
    for file in (path / "global_step3").glob("mp_rank_*"):
        content = torchfile.read(file)
        content["module"] = {n: t for n, t in content["module"].items() if n not in gone}
        torchfile.write(tmp_path / "new", content)
        (tmp_path / "new").replace(file)
    ckptlab.open(path, strategy=Whole()).reshape(tp=2, dp=2, ep=2).save(tmp_path / "out" / "step")
    back = ckptlab.open(tmp_path / "out", strategy=Whole())
    for name in back.catalog.tensors:  # masters rounded are what training held
        assert same_bits(whole(back.catalog, name, PARAM), whole(case, name, PARAM)), name
    step = tmp_path / "run" / "global_step3"
    (step / "mp_rank_01_model_states.pt").rename(step / "mp_rank_02_model_states.pt")
    with pytest.raises(CheckpointError, match="mp_rank_01_model_states.pt, mp_rank_03_model_states.pt missing"):
        ckptlab.open(step, strategy=Whole())


@pytest.mark.parametrize("expert", range(4))
def test_a_missing_expert_of_a_tp_rank_is_named(expert: int, tmp_path: Path) -> None:
    step = dealt_to_tp(tmp_path / "run", MOE) / "global_step3"
    for file in step.glob(f"layer_1_expert_{expert}_*"):
        file.unlink()
    with pytest.raises(
        CheckpointError, match=f"layer_1_expert_{expert}_mp_rank_0{expert // 2}_model_states.pt missing"
    ):
        ckptlab.open(step, strategy=Whole())
    assert {f.code for f in ckptlab.check(step).findings} >= {"missing-file"}


@pytest.mark.parametrize("fault", ["partitions", "an expert's file"])
def test_experts_that_are_not_dealt_as_their_files_say_are_refused(fault: str, tmp_path: Path) -> None:
    step = dealt_to_tp(tmp_path / "run", MOE) / "global_step3"
    if fault == "partitions":
        file = step / "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
        content = torchfile.read(file)
        content["optimizer_state_dict"]["partition_count"] = [2, 2, 1, 1]
        torchfile.write(tmp_path / "new", content)
        (tmp_path / "new").replace(file)
    else:
        (step / "layer_1_expert_2_mp_rank_01_model_states.pt").unlink()
    message = "is cut over 1 ranks" if fault == "partitions" else "layer_1_expert_2_mp_rank_01_model_states"
    with pytest.raises(CheckpointError, match=message):
        ckptlab.open(step, strategy=Whole())


def numbered(name: str) -> str:
    """What the pipeline engine calls a tensor of the case: by the number of its layer."""
    if found := re.fullmatch(r"blocks\.(\d)\.(.*)", name):
        return f"{int(found[1]) + 1}.{found[2]}"
    return f"5.{name}" if name.startswith("ln_f") else f"0.{name}"


def staged(out: Path) -> Path:
    """The case as a pipeline of two stages would have left it: of each stage its part of the module, and the experts of
    its layers, which it counts from 0 on."""
    catalog, source = read(MOE), MOE / "global_step3"
    (out / "global_step3").mkdir(parents=True)
    of_stage = [
        lambda n: not n.startswith(("blocks.2", "blocks.3", "ln_f")),
        lambda n: n.startswith(("blocks.2", "blocks.3", "ln_f")),
    ]
    for p, held in enumerate(of_stage):
        model = torchfile.read(source / "mp_rank_00_model_states.pt")
        shapes = [{n: s for n, s in group.items() if held(n)} for group in model["param_shapes"]]
        named = [{numbered(n): s for n, s in group.items()} for group in shapes]
        model |= {"mp_world_size": 2, "num_experts": [4], "param_shapes": named}
        model["module"] = {numbered(n): t for n, t in model["module"].items() if held(n)}
        model["buffer_names"] = [numbered(n) for n in model["buffer_names"] if held(n)]
        model["frozen_param_shapes"] = model["frozen_param_fragments"] = None
        model["shared_params"] = {numbered(a): numbered(n) for a, n in model["shared_params"].items() if held(n)}
        model["checkpoint_parallel_dimensions"] = {"pp_degree": 2, "tp_degree": 1}
        torchfile.write(out / "global_step3" / f"mp_rank_{p:02d}_model_states.pt", model)
        for d in range(4):
            content = torchfile.read(source / f"bf16_zero_pp_rank_{d}_mp_rank_00_optim_states.pt")
            state = content["optimizer_state_dict"]
            state["param_slice_mappings"] = state["param_alignment_paddings"] = []
            for g, group in enumerate(shapes):
                over, part = (4, d) if g < 2 else (2, d // 2)
                names = [experts.renumbered(n, 2 * (d % 2)) for n in group]
                for key in (MASTER, "exp_avg", "exp_avg_sq"):
                    flat = np.concatenate([whole(catalog, n, key).ravel() for n in names])
                    size = -(-flat.size // (2 * over)) * 2
                    moment = np.zeros(size * over, flat.dtype)
                    moment[: flat.size] = flat
                    cut = slice(part * size, (part + 1) * size)
                    if key == MASTER:
                        state["single_partition_of_fp32_groups"][g] = flat[cut]
                        state["group_paddings"][g] = size - flat[cut].size
                    else:
                        state["base_optimizer_state"]["state"][g][key] = moment[cut]
            torchfile.write(out / "global_step3" / f"bf16_zero_pp_rank_{d}_mp_rank_{p:02d}_optim_states.pt", content)
        for e in range(4):
            held_by = torchfile.read(source / f"layer_{p}_expert_{e}_mp_rank_00_model_states.pt")
            file = out / "global_step3" / f"layer_0_expert_{e}_mp_rank_{p:02d}_model_states.pt"
            torchfile.write(file, {numbered(n): t for n, t in held_by.items()})
    return out


def unlike_the_case(found: Any) -> list[str]:
    """`state/name` of what a catalog of the case, numbered as the pipeline engine does, has otherwise."""
    case = read(MOE)
    both = [(n, s) for n, tensor in case.tensors.items() for s in tensor.states if s in found[numbered(n)].states]
    return [f"{s}/{n}" for n, s in both if not same_bits(whole(case, n, s), whole(found, numbered(n), s))]


def test_experts_in_a_pipeline_are_read(tmp_path: Path) -> None:
    """As real DeepSpeed 0.19.8 writes them, of which a case was read bit for bit too."""
    found = ckptlab.open(staged(tmp_path / "run"))
    assert (found.mesh.pp, found.mesh["ep"], found.mesh["edp"]) == (2, 2, 2)
    assert len(found.catalog.tensors) == len(read(MOE).tensors)
    assert unlike_the_case(found.catalog) == []
    assert found[numbered(f"{LAYER}3.fc1.weight")].stages == (0,)
    assert found[numbered(f"{LAYER.replace('.1.', '.3.')}3.fc1.weight")].stages == (1,)
    assert ckptlab.check(found).verdict == "healthy"
    ckptlab.save_weights(found, tmp_path / "weights")
    (tmp_path / "run" / "global_step3" / "layer_0_expert_1_mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match="layer_0_expert_1_mp_rank_01_model_states"):
        ckptlab.open(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "asked",
    [{"pp": 1}, {"ep": 4}, {"dp": 2, "ep": 1}, {"pp": 1, "dp": 2}, {"zero_stage": 0, "dtype": "fp16", "ep": 1}],
    ids=str,
)
def test_experts_in_a_pipeline_are_written(asked: dict[str, Any], tmp_path: Path) -> None:
    """Each stage's model file has its part of the module, and numbers the layers of its experts; and back."""
    found = ckptlab.open(staged(tmp_path / "run"))
    there = found.reshape(**asked)
    there.save(tmp_path / "out" / "step")
    back = ckptlab.open(tmp_path / "out")
    asked = {"pp": 2, "dp": 4, "ep": 2} | asked
    assert (back.mesh.pp, back.mesh["dp"], back.mesh["ep"]) == (asked["pp"], asked["dp"], asked["ep"])
    states = [entry for entry in unlike_the_case(back.catalog) if "dtype" not in asked or not entry.startswith(PARAM)]
    assert states == []
    assert ckptlab.check(back).verdict == "healthy"
    layers = {0: [0, 1], 1: []} if asked["pp"] == 1 else {0: [0], 1: [0]}
    for p, numbers in layers.items():
        files = {f"layer_{i}_expert_{e}_mp_rank_{p:02d}_model_states.pt" for i in numbers for e in range(4)}
        assert {f.name for f in (tmp_path / "out" / "step").glob(f"layer_*_mp_rank_{p:02d}_*")} == files
        if numbers:
            model = torchfile.read(tmp_path / "out" / "step" / f"mp_rank_{p:02d}_model_states.pt")
            assert model["num_experts"] == [4] * len(numbers)
            of_stage = {n for n in read(MOE).tensors if p in back[numbered(n)].stages and not experts.layer_of(n)}
            assert {numbered(n) for n in of_stage} <= model["module"].keys()
            assert not any(experts.layer_of(n) for n in model["module"])
            assert model["buffer_names"] == (["0.seen"] if p == 0 else [])
    again = back.reshape(pp=2, dp=4, ep=2, zero_stage=1, dtype="bf16", pipeline=(0, 3))
    again.save(tmp_path / "again" / "step")
    assert [e for e in unlike_the_case(read(tmp_path / "again")) if "dtype" not in asked or PARAM not in e] == []


def test_a_pipeline_whose_model_files_list_no_shapes(tmp_path: Path) -> None:
    """As DeepSpeed 0.19.8 writes it in bfloat16 without ZeRO, and cannot load it: slice mappings tell how many experts
    a rank has, and expert files their shapes."""
    ckptlab.open(staged(tmp_path / "run")).reshape(zero_stage=1).save(tmp_path / "out" / "step")
    for file in (tmp_path / "out" / "step").glob("mp_rank_*"):
        content = torchfile.read(file) | {"param_shapes": None}
        torchfile.write(tmp_path / "new", content)
        (tmp_path / "new").replace(file)
    (tmp_path / "out" / "step" / MANIFEST).unlink()
    found = ckptlab.open(tmp_path / "out")
    assert (found.mesh["ep"], unlike_the_case(found.catalog)) == (2, [])


def test_the_plans_figures_are_what_happens_in_a_pipeline(tmp_path: Path) -> None:
    source = read(staged(tmp_path / "run"))
    figures_are_what_happens(source, Mesh(dp=2), tmp_path / "out", ep=1)
    figures_are_what_happens(source, Mesh(dp=2, pp=2), tmp_path / "whole", ep=2, zero_stage=0, dtype="fp16")


def test_each_stage_of_a_pipeline_needs_experts(tmp_path: Path) -> None:
    """DeepSpeed hangs where some ranks have experts and others none."""
    found = ckptlab.open(staged(tmp_path / "run"))
    with pytest.raises(ReshapeError, match="pp stage 0 of 2 would have no experts"):
        found.reshape(pipeline=(0, 2))


@pytest.mark.slow
def test_what_a_later_stage_alone_has_stays_there_by_way_of_a_universal_folder(tmp_path: Path) -> None:
    """Buffers and frozen tensors too: DeepSpeed loads each stage's part of the module strictly."""
    step = staged(tmp_path / "run") / "global_step3"
    model = torchfile.read(step / "mp_rank_01_model_states.pt")
    model["module"] |= {"5.mean": np.arange(3, dtype=np.float32)}
    model["buffer_names"] = ["5.mean"]
    torchfile.write(tmp_path / "new", model)
    (tmp_path / "new").replace(step / "mp_rank_01_model_states.pt")
    ckptlab.open(step).reshape(format="universal").save(tmp_path / "universal" / "step")
    found = ckptlab.open(tmp_path / "universal")
    assert found["5.mean"].stages == (1,)
    found.reshape(ep=1).save(tmp_path / "out" / "step")
    held = [torchfile.read(tmp_path / "out" / "step" / f"mp_rank_0{p}_model_states.pt")["module"] for p in (0, 1)]
    assert ["5.mean" in module for module in held] == [False, True]
    assert differences(read(step), read(tmp_path / "out")) == []


def test_how_many_experts_a_rank_has_counts_when_layers_are_dealt_by_parameters(tmp_path: Path) -> None:
    catalog = read(staged(tmp_path / "run"))
    layers = pipeline.describe(catalog, catalog.private.folder.experts.spread(4, None))
    assert [layers.counts[i] < alone for i, alone in enumerate(pipeline.describe(catalog).counts)] == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]


def of_two_degrees(out: Path) -> Path:
    """The case without ZeRO, the first layer's experts over two ranks and the second one's over four. One process put
    the degrees into another order than the others."""
    ckptlab.open(MOE).reshape(dp=4, ep=4, zero_stage=0).save(out / "global_step3")
    (out / "global_step3" / MANIFEST).unlink()
    files = [out / "global_step3" / f"expp_rank_{x}_mp_rank_00_optim_states.pt" for x in range(4)]
    for file in files:  # what is read lies in these, which are written anew
        file.with_suffix(".old").hardlink_to(file)
    contents = [torchfile.read(file.with_suffix(".old"))["optimizer"] for file in files]

    def parts(x: int, g: int, layer: int) -> list[tuple[Any, Any]]:
        """(master, states) of what ep rank x has in a group of one layer."""
        ids = contents[x]["optimizer_state_dict"]["param_groups"][g]["params"]
        held = [
            (m, contents[x]["optimizer_state_dict"]["state"][i])
            for m, i in zip(contents[x]["fp32_groups"][g], ids, strict=True)
        ]
        half = len(held) // 2
        return held[layer * half : (layer + 1) * half]

    for x, file in enumerate(files):
        base = contents[x]["optimizer_state_dict"]
        groups = [
            (
                base["param_groups"][g],
                list(
                    zip(
                        contents[x]["fp32_groups"][g],
                        [base["state"][i] for i in base["param_groups"][g]["params"]],
                        strict=True,
                    )
                ),
            )
            for g in (0, 1)
        ]
        apart = []
        for g in (2, 3):
            two = [one for e in (2 * (x % 2), 2 * (x % 2) + 1) for one in parts(e, g, 0)]
            apart += [
                ({**base["param_groups"][g], "name": "ep_size_2"}, two),
                (base["param_groups"][g], parts(x, g, 1)),
            ]
        order = [0, 1, 2, 3] if x != 2 else [1, 0, 3, 2]
        groups += [apart[i] for i in order]
        state = {i: one for i, (_, one) in enumerate(pair for _, held in groups for pair in held)}
        ids = iter(range(len(state)))
        listed = [{**options, "params": [next(ids) for _ in held]} for options, held in groups]
        made = {**contents[x], "fp32_groups": [[m for m, _ in held] for _, held in groups]}
        made["optimizer_state_dict"] = {"state": state, "param_groups": listed}
        torchfile.write(out / "new", {"optimizer": made})
        (out / "new").replace(file)
    for file in files:
        file.with_suffix(".old").unlink()
    return out


@pytest.mark.slow
def test_layers_over_different_numbers_of_ranks_without_zero(tmp_path: Path) -> None:
    found = ckptlab.open(of_two_degrees(tmp_path / "run"))
    assert (found.mesh["ep2"], found.mesh["ep4"]) == (2, 2)
    assert differences_from_truth(found.catalog, MOE / "truth.safetensors") == []
    assert ckptlab.check(found).verdict == "healthy"
    for asked in ({}, {"ep": 1, "dp": 2}, {"zero_stage": 2}):
        found.reshape(**asked).save(tmp_path / f"{len(asked)}{'ep' in asked}" / "step")
        there = ckptlab.open(tmp_path / f"{len(asked)}{'ep' in asked}")
        assert differences(found.catalog, there.catalog) == []
        assert ckptlab.check(there).verdict == "healthy"


@pytest.mark.slow
def test_each_process_may_have_the_degrees_in_another_order(tmp_path: Path) -> None:
    """DeepSpeed collects the names of groups in a set of strings."""
    ckptlab.open(of_two_degrees(tmp_path / "run")).reshape(zero_stage=2).save(tmp_path / "two" / "global_step3")
    (tmp_path / "two" / "global_step3" / MANIFEST).unlink()
    for file in (tmp_path / "two" / "global_step3").glob("*_rank_[23]_mp_*optim_states.pt"):
        content = torchfile.read(file)
        state = content["optimizer_state_dict"]
        order = [0, 1, 3, 2, 5, 4]
        for key in ("single_partition_of_fp32_groups", "group_paddings", "partition_count", "param_slice_mappings"):
            state[key] = [state[key][i] for i in order]
        base = state["base_optimizer_state"]
        base["state"] = {new: base["state"][old] for new, old in enumerate(order)}
        base["param_groups"] = [{**base["param_groups"][old], "params": [new]} for new, old in enumerate(order)]
        torchfile.write(tmp_path / "new", content)
        (tmp_path / "new").replace(file)
    found = ckptlab.open(tmp_path / "two")
    assert differences_from_truth(found.catalog, MOE / "truth.safetensors") == []
    assert ckptlab.check(found).verdict == "healthy"


def head(local: dict[str, int], first: bool = False) -> Any:
    """What is needed of a model file whose ranks have so many experts of each layer."""
    trained = {f"{layer}{e}.w": (2, 3) for layer, n in local.items() for e in range(n)}
    return SimpleNamespace(trained=trained, world=1, config=SimpleNamespace(data_before_experts=first))


A, B = (f"layers.{i}.deepspeed_moe.experts.deepspeed_experts." for i in (2, 10))


@pytest.mark.parametrize("first", [False, True])
def test_layers_may_be_spread_over_different_numbers_of_ranks(first: bool) -> None:
    """The ranks of each expert are those of DeepSpeed's groups (`utils/groups.py`): rank mod ep, or rank div edp."""
    files: dict[Any, Any] = {(1, e, 0): {f"{B}{e}.w": None} for e in range(8)}
    files |= {(0, e, 0): {f"{A}{e}.w": None} for e in range(4)}
    found = Experts.of([head({A: 2, B: 2}, first)], files, ep=1)
    assert (list(found.total), found.sizes) == ([A, B], (2, 4))
    mesh = found.on(Mesh(dp=8))
    for layer, ep in ((A, 2), (B, 4)):
        for rank, share in enumerate(found.shares([f"{layer}0.w"], mesh)):
            assert share.ranks == tuple(d for d in range(8) if (d // (8 // ep) if first else d % ep) == rank)
        assert found.globally([f"{layer}1.w"], 1) == (f"{layer}3.w",)
    assert found.everywhere([f"{A}0.w", f"{A}1.w"]) == [f"{A}{e}.w" for e in range(4)]
    with pytest.raises(CheckpointError, match="spread over ep"):
        found.shares([f"{A}0.w", f"{B}0.w"], mesh)


def test_layers_that_come_to_be_spread_alike_share_a_group() -> None:
    both = Experts({A: 2, B: 1}, {A: 4, B: 4})
    groups = [
        ParameterGroup({"name": "dense"}, ("x",)),
        ParameterGroup({"name": "ep_size_4", "moe": True}, tuple(f"{B}{e}.w" for e in range(4))),
        ParameterGroup({"name": "ep_size_2", "moe": True}, tuple(f"{A}{e}.w" for e in range(4))),
    ]
    sizes = {n: 6 for group in groups for n in group.tensors}
    stages = dict.fromkeys(sizes, 0)
    dense, spread = grouping.regrouped(groups, both, both.spread(1, None), sizes, stages, stages)
    assert (dense, spread.name) == (groups[0], "ep_size_1")
    assert spread.tensors == (*groups[2].tensors, *groups[1].tensors)  # in the order of the model


def test_large_groups_are_dealt_again_for_another_degree(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed splits an expert group by what a rank has of it: other ranks, other groups."""
    monkeypatch.setattr(grouping, "LARGEST", 12)
    four = Experts({A: 4}, {A: 8})  # ep 2: four experts a rank, two of which fit into a group
    names = [[f"{A}{e}.w" for e in (0, 1, 4, 5)], [f"{A}{e}.w" for e in (2, 3, 6, 7)]]
    groups = [ParameterGroup({"name": "ep_size_2", "moe": True}, tuple(n)) for n in names]
    sizes = dict.fromkeys((n for own in names for n in own), 6)
    stages = dict.fromkeys(sizes, 0)
    (one,) = grouping.regrouped(groups, four, four.spread(4, None), sizes, stages, stages)
    assert (one.name, one.tensors) == ("ep_size_4", tuple(f"{A}{e}.w" for e in range(8)))
    whole = grouping.regrouped([one], four.spread(4, None), four, sizes, stages, stages)
    assert [g.tensors for g in whole] == [g.tensors for g in groups]
    with pytest.raises(CheckpointError, match="not dealt as DeepSpeed does"):
        grouping.regrouped([groups[1], groups[0]], four, four.spread(4, None), sizes, stages, stages)


def test_each_stage_deals_its_own_experts_to_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two stages of one group each are, on one stage, two groups; and back."""
    monkeypatch.setattr(grouping, "LARGEST", 12)
    both = Experts({A: 2, B: 2}, {A: 2, B: 2})
    every = tuple(f"{layer}{e}.w" for layer in (A, B) for e in range(2))
    one = [ParameterGroup({"name": "ep_size_1", "moe": True}, every)]
    sizes, together = dict.fromkeys(every, 6), dict.fromkeys(every, 0)
    apart = {n: int(n.startswith(B)) for n in every}
    two = grouping.regrouped(one, both, both, sizes, apart, together)
    assert [g.tensors for g in two] == [every[:2], every[2:]]
    assert grouping.regrouped(two, both, both, sizes, together, apart)[0].tensors == every


def test_an_old_checkpoint_has_one_file_for_an_expert_of_all_layers(tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(MOE, run)
    step = run / "global_step3"
    for e in range(4):
        both = [step / f"layer_{i}_expert_{e}_mp_rank_00_model_states.pt" for i in range(2)]
        content = {n: t for file in both for n, t in torchfile.read_contents(str(file)).value.items()}
        fileplan.write(torchfile.plan("x", content), step / f"expert_{e}_mp_rank_00_model_states.pt")
        for file in both:
            file.unlink()
    model = step / "mp_rank_00_model_states.pt"
    content = torchfile.read_contents(str(model)).value
    content["num_experts"] = 4
    fileplan.write(torchfile.plan("x", content), tmp_path / "new")
    (tmp_path / "new").replace(model)
    found = ckptlab.open(run)
    assert differences_from_truth(found.catalog, MOE / "truth.safetensors") == []
    found.reshape(ep=4).save(tmp_path / "out")
    assert torchfile.read_contents(str(tmp_path / "out" / model.name)).value["num_experts"] == [4, 4]
    assert differences(found.catalog, read(tmp_path / "out")) == []


def test_check_and_open_agree_on_names_that_are_no_numbers(tmp_path: Path) -> None:
    """More experts than could be are not looked for one by one."""

    def change(content: Any) -> None:
        content["num_experts"] = [1 << 40]

    assert read_native_of(changed(tmp_path, change, "mp_rank*")).tensors.keys() == read(MOE).tensors.keys()


def read_native_of(run: Path) -> Any:
    from ckptlab.formats.deepspeed.read import read_native

    return read_native(str(run / "global_step3"), Strict())


# ------------------------------------------------------------------ real DeepSpeed


def judge(case: str | Path, tmp_path: Path, **asked: Any) -> None:
    ckptlab.open(DATA / case).reshape(**asked).save(tmp_path / "out" / "step")
    stage = {"zero": asked["zero_stage"]} if "zero_stage" in asked else {}
    report = resume(tmp_path / "out" / "step", case, dp=asked["dp"], ep=asked["ep"], **stage)
    assert report["status"] == "equal", report.get("error") or report["differences"]
    assert report["compared"]["exp_avg_sq"] > 20


def test_weights_of_experts_without_their_optimizer(tmp_path: Path) -> None:
    shutil.copytree(MOE, tmp_path / "run")
    for file in (tmp_path / "run").rglob("*optim_states.pt"):
        file.unlink()
    found = ckptlab.open(tmp_path / "run")
    assert found.catalog.states == (PARAM,)
    assert [f.code for f in found.findings] == ["weights-alone"]
    whole = ckptlab.open(MOE).full(PARAM, stack=False)
    assert all(
        np.array_equal(array.values, whole[name].values) for name, array in found.full(PARAM, stack=False).items()
    )
    assert f"{LAYER}3.fc1.weight" in found


@requires_deepspeed
@pytest.mark.parametrize("asked", [SPREAD[1], SPREAD[3], {"dp": 2, "ep": 2, "zero_stage": 0}], ids=str)
def test_deepspeed_resumes_experts_elsewhere(asked: dict[str, Any], tmp_path: Path) -> None:
    judge("moe_ep2_dp4", tmp_path, **asked)


@requires_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "asked"),
    [
        ("gpt_moe_pp2_ep2_dp2", {"pp": 1, "ep": 1}),
        ("gpt_moe_pp2_ep2_dp2_zero0_fp16", {"dp": 1, "ep": 1}),
    ],
)
def test_deepspeed_resumes_experts_in_a_pipeline(case: str, asked: dict[str, Any], tmp_path: Path) -> None:
    run = make_case(case, tmp_path / "run")
    found = ckptlab.open(run)
    assert differences_from_truth(found.catalog, run / "truth.safetensors") == []
    found.reshape(**asked).save(tmp_path / "out" / "step")
    report = resume(tmp_path / "out", run, **asked)
    assert report["status"] == "equal", report


@requires_deepspeed
@pytest.mark.slow
def test_deepspeed_resumes_experts_that_tp_ranks_share(tmp_path: Path) -> None:
    """Which it cannot of its own: it leaves out the files of all but the first of ranks with the same experts."""
    run = make_case("gpt_moe_tp2_dp2_ep4", tmp_path / "run")
    found = ckptlab.open(run, strategy="megatron")
    assert differences_from_truth(found.catalog, run / "truth.safetensors") == []
    first = {"config_extra": {"use_data_before_expert_parallelism": True}}
    for k, asked in enumerate([{"ep": 2, **first}, {"pp": 2, "dp": 1, "ep": 1}, {"dp": 3, "ep": 2}]):
        wanted = {key: value for key, value in asked.items() if key != "config_extra"}
        found.reshape(**wanted, data_before_experts="config_extra" in asked).save(tmp_path / str(k) / "step")
        report = resume(tmp_path / str(k) / "step", run, **asked)
        assert report["status"] == "equal", report.get("error") or report["differences"]
        assert report["compared"]["exp_avg_sq"] == 90


@requires_deepspeed
def test_deepspeed_resumes_a_universal_folder_at_ep_1(tmp_path: Path) -> None:
    """Which its own tools cannot make; at a higher ep it looks for experts by local numbers there, as one is told."""
    ckptlab.open(MOE).reshape(dp=2).save(tmp_path / "out" / "step", "universal")
    report = resume(tmp_path / "out" / "step", "moe_ep2_dp4", dp=2, ep=1, universal=True)
    assert report["status"] == "equal", report.get("error") or report["differences"]
    assert resume(tmp_path / "out" / "step", "moe_ep2_dp4", steps=0, universal=True)["status"] == "different"


def test_what_deepspeed_does_not_load_of_a_universal_folder_is_said() -> None:
    def told(case: Path, **asked: Any) -> dict[str, str]:
        return {f.code: f.text for f in ckptlab.open(case).reshape(format="universal", **asked).check()}

    assert told(MOE)["universal-experts"].startswith("ep 2: DeepSpeed looks for experts in a universal folder by")
    assert told(DATA / "autotp_tp2_dp2", zero_stage=3)["universal-whole"].startswith("tp 2: at ZeRO-3 DeepSpeed takes")
    for quiet in (
        told(MOE, ep=1),
        told(DATA / "autoep_ep2_dp4"),
        told(DATA / "autotp_tp2_dp2", zero_stage=3, tp=1),
        told(DATA / "autotp_tp2_dp2"),
    ):
        assert not quiet.keys() & {"universal-experts", "universal-whole"}


@requires_deepspeed
@pytest.mark.parametrize("case", ["moe_ep2_dp2_bf16_optimizer", "moe_ep2_dp2_zero0", "moe_ep2_dp4_data_first"])
def test_other_ways_to_train_experts(case: str, tmp_path: Path) -> None:
    folder = make_case(case, tmp_path)
    assert differences_from_truth(read(folder), folder / "truth.safetensors") == []
    judge(folder, tmp_path, dp=2, ep=1)
