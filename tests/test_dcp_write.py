"""DCP folders that ckptlab wrote, loaded by torch itself and read again by ckptlab."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from click.testing import CliRunner
from compare import DATA, GPT, ZERO2, ZERO3, whole
from real_deepspeed import make_case, onward, requires_deepspeed, resume

import ckptlab
from ckptlab import Mesh
from ckptlab.catalog import MASTER, PARAM, Catalog, ParameterGroup
from ckptlab.checkpoint import Checkpoint, save_weights
from ckptlab.cli import main
from ckptlab.errors import CheckpointError, CkptlabError, ReshapeError
from ckptlab.formats.dcp.metadata import read_metadata
from ckptlab.layout import Layout
from ckptlab.testing import check_format

torch: Any = pytest.importorskip("torch")
dcp: Any = pytest.importorskip("torch.distributed.checkpoint")
torch_ranks: Any = pytest.importorskip("torch_ranks")

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")
MOE = DATA / "moe_ep2_dp4"
HYPER = ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable")


def written(source: Any, path: Path, **options: Any) -> tuple[Checkpoint, Checkpoint]:
    """A source as a DCP folder: both opened."""
    ckpt = source if isinstance(source, Checkpoint) else ckptlab.open(source)
    ckpt.reshape(format="dcp", **options).save(path)
    return ckpt, ckptlab.open(path)


def wanted(ckpt: Checkpoint, dtype: Any = None) -> dict[str, Any]:
    """What a program with the model of a checkpoint loads into: {"model": …, "optimizer": …} of get_state_dict."""
    names = [n for n, t in ckpt.items() if t.kind == "parameter"]

    def empty(name: str, state: str) -> Any:
        kind = ckpt[name].states[state].name
        return torch.full(ckpt[name].cut.shape, 7, dtype=getattr(torch, kind))

    model = {}
    for name, tensor in ckpt.items():
        for alias in (name, *tensor.aliases):
            model[alias] = empty(name, MASTER if MASTER in tensor.states else PARAM)
    state = {n: {s: empty(n, s) for s in ckpt[n].states if s not in (MASTER, PARAM)} for n in names}
    state = {n: {**its, "step": torch.tensor(-1.0)} for n, its in state.items()}
    groups = [{**dict.fromkeys(HYPER), "params": None} for _ in ckpt.catalog.groups]
    return {"model": model, "optimizer": {"state": state, "param_groups": groups}}


def judge(loaded: Mapping[str, Any], ckpt: Checkpoint) -> None:
    """Every tensor, state and hyperparameter that torch loaded is the checkpoint's."""
    for name, tensor in ckpt.items():
        state = MASTER if MASTER in tensor.states else PARAM
        for alias in (name, *tensor.aliases):
            equal(loaded["model"][alias], whole(ckpt.catalog, name, state), alias)
    optimizer = loaded["optimizer"]
    for group, found in zip(ckpt.catalog.groups, optimizer["param_groups"], strict=True):
        assert found["params"] == list(group.tensors)
        assert {k: found[k] for k in ("lr", "betas", "eps", "weight_decay")} == {
            k: group.options[k] for k in ("lr", "betas", "eps", "weight_decay")
        }
        for name in group.tensors:
            assert float(optimizer["state"][name]["step"]) == ckpt.iteration
            for state in ("exp_avg", "exp_avg_sq"):
                equal(optimizer["state"][name][state], whole(ckpt.catalog, name, state), f"{name}: {state}")


def equal(found: Any, expected: np.ndarray, what: str) -> None:
    raw = found.detach()[tuple(map(slice, expected.shape))].contiguous()
    held = raw.view(torch.uint8).numpy() if raw.ndim else raw.reshape(1).view(torch.uint8).numpy()
    assert held.tobytes() == np.ascontiguousarray(expected).tobytes(), what


@pytest.mark.slow
@pytest.mark.parametrize("chunks", ["fsdp", "layouts", "whole"])
@pytest.mark.parametrize("case", [GPT, ZERO2, ZERO3], ids=lambda c: c.name)
def test_torch_loads_what_a_deepspeed_run_held(case: Path, chunks: str, tmp_path: Path) -> None:
    ckpt, again = written(case, tmp_path / "dcp", chunks=chunks)
    loaded = wanted(ckpt)
    dcp.load(loaded, checkpoint_id=tmp_path / "dcp")
    judge(loaded, ckpt)
    assert ckptlab.diff(ckpt, again).equal
    assert ckptlab.check(again).healthy
    files = sorted(p.name for p in (tmp_path / "dcp").glob("*.distcp"))
    world = 1 if chunks == "whole" else ckpt.reshape(format="dcp").mesh.size
    assert files == sorted(f"__{rank}_0.distcp" for rank in range(world))


@pytest.mark.slow
def test_there_and_back_to_the_bit_with_the_runs_own_labels(tmp_path: Path) -> None:
    ckpt, there = written(GPT, tmp_path / "there", mesh=Mesh(dp=4), dtype="bf16")
    assert there.mesh == Mesh(dp=4)
    assert there["3.self_attention.query_key_value.weight"].layout.text == "(tp dp out) in"
    assert there["tied_modules.embed.word_embeddings.weight"].shape[0] == 101  # and 112 rows are stored
    _, back = written(there, tmp_path / "back", mesh=Mesh(tp=2, pp=2, dp=2))
    assert back["3.self_attention.query_key_value.weight"].layout.text == "(tp dp out) in"
    assert (back.iteration, back.catalog.training.dtype) == (3, "bf16")
    found = ckptlab.diff(ckpt, back)
    assert found.equal
    assert {s for t in back.values() for s in t.states} == {MASTER, "exp_avg", "exp_avg_sq", PARAM}
    assert {n: (t.kind, t.aliases) for n, t in back.items()} == {n: (t.kind, t.aliases) for n, t in ckpt.items()}
    assert [dict(g.options) | {"name": None} for g in back.catalog.groups] == [
        dict(g.options) | {"name": None} for g in ckpt.catalog.groups
    ]


@pytest.mark.slow
def test_the_laws_of_formats(tmp_path: Path) -> None:
    _, there = written(ZERO2, tmp_path / "dcp", mesh=Mesh(dp=2))
    laws = check_format("dcp", there.path, meshes=[Mesh(dp=3)], most_files=3)
    assert "to another mesh and back is the identity" in laws


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ("torch", {"model.wpe.weight", "optimizer.state.wpe.weight.step", "optimizer.param_groups.0.params"}),
        ("torch-flat", {"model.wpe.weight", "optimizer.state.wpe.weight.step", "optimizer.param_groups.wpe.weight.lr"}),
        ("torchtitan", {"wpe.weight", "optimizer.state.wpe.weight.step", "train_state.step"}),
        ("weights", {"wpe.weight", "train_state.step"}),
    ],
)
def test_keys_are_those_of_a_program(keys: str, expected: set[str], tmp_path: Path) -> None:
    ckpt, again = written(ZERO2, tmp_path / "dcp", keys=keys)
    found = dcp.FileSystemReader(tmp_path / "dcp").read_metadata()
    assert expected <= set(found.state_dict_metadata)
    assert all(".".join(map(str, path)) == key for key, path in found.planner_data.items())
    assert ckptlab.diff(ckpt, again, states=[MASTER, PARAM]).equal
    _, third = written(again, tmp_path / "third")  # keeps them
    assert set(dcp.FileSystemReader(third.path).read_metadata().state_dict_metadata) == set(found.state_dict_metadata)


def test_accelerates_two_folders(tmp_path: Path) -> None:
    ckpt, again = written(ZERO2, tmp_path / "dcp", keys="accelerate")
    assert {p.name for p in (tmp_path / "dcp").iterdir() if p.is_dir()} == {"pytorch_model_fsdp_0", "optimizer_0"}
    assert ckptlab.diff(ckpt, again).equal
    loaded = wanted(ckpt)
    dcp.load({"model": loaded["model"]}, checkpoint_id=tmp_path / "dcp" / "pytorch_model_fsdp_0")
    dcp.load({"optimizer": loaded["optimizer"]}, checkpoint_id=tmp_path / "dcp" / "optimizer_0")
    judge(loaded, ckpt)


def test_names_and_prefixes_of_ones_own(tmp_path: Path) -> None:
    options = {
        "rename": (r"^blocks\.(\d+)\.=layers.\1.", "^wte=embed"),
        "model_key": "app.model",
        "optimizer_key": "app.optim",
    }
    ckpt, again = written(ZERO2, tmp_path / "dcp", **options)
    assert "layers.0.ln1.weight" in again
    assert "embed.weight" in again
    assert "wte.weight" not in again
    assert again["embed.weight"].aliases == ("lm_head.weight",)
    np.testing.assert_array_equal(
        whole(again.catalog, "layers.0.ln1.weight", "exp_avg"), whole(ckpt.catalog, "blocks.0.ln1.weight", "exp_avg")
    )
    found = dcp.FileSystemReader(again.path).read_metadata().state_dict_metadata
    assert {"app.model.embed.weight", "app.optim.state.embed.weight.exp_avg"} <= set(found)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"keys": "fsdp"}, "keys 'fsdp': expected one of torch"),
        ({"chunks": "some"}, "chunks 'some': expected one of fsdp"),
        ({"dtype": "int8"}, "dtype 'int8': expected one of bf16"),
        ({"rename": ("no rule",)}, "rename 'no rule': expected regex=replacement"),
        ({"rename": ("(=x",)}, "expected regex=replacement: missing"),
        ({"rename": (r"a=\7",)}, "invalid group reference 7"),
        ({"rename": (r"^blocks\.\d+=block",)}, "names must differ"),
        ({"param_groups": ({}, {}, {})}, "param_groups: 3 given"),
        ({"padded_vocab": 5}, None),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(options: dict[str, Any], says: str | None, tmp_path: Path) -> None:
    case, says = (GPT, "padded_vocab 5: .* has 101 rows that are used") if says is None else (ZERO2, says)
    with pytest.raises(ReshapeError, match=says):
        ckptlab.open(case).reshape(format="dcp", **options)


def test_weights_of_sixteen_bits_beside_their_masters(tmp_path: Path) -> None:
    ckpt, again = written(ZERO2, tmp_path / "dcp", dtype="bf16")
    keys = dcp.FileSystemReader(again.path).read_metadata().state_dict_metadata
    assert keys["model.wpe.weight"].properties.dtype == torch.bfloat16
    assert keys["optimizer.state.wpe.weight.master_param"].properties.dtype == torch.float32
    assert ckptlab.diff(ckpt, again).equal
    assert PARAM in again["wpe.weight"].states
    assert again["wpe.weight"].states[PARAM] == np.dtype(ml_dtypes.bfloat16)


def test_whole_weights_become_a_models_state_dict(tmp_path: Path) -> None:
    save_weights(ckptlab.open(ZERO2), tmp_path / "weights")
    weights, again = written(tmp_path / "weights", tmp_path / "dcp", mesh=Mesh(dp=3))
    loaded = {
        "model": {
            n: torch.zeros(t.shape, dtype=getattr(torch, t.states[s].name))
            for n, t in weights.items()
            for s in t.states
        }
    }
    dcp.load(loaded, checkpoint_id=again.path)
    for name, tensor in weights.items():
        equal(loaded["model"][name], whole(weights.catalog, name, next(iter(tensor.states))), name)


def test_what_a_dcp_source_put_in_comes_along(tmp_path: Path) -> None:
    put = {"train_state": {"step": 9, "seen": torch.arange(3)}, "loader": {"at": {"epoch": 2}, "rank": [1, "a"]}}
    dcp.save({"model": {"w": torch.ones(4, 2)}, **put}, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    _, again = written(tmp_path / "a", tmp_path / "b", mesh=Mesh(dp=2))
    loaded: Any = {
        "model": {"w": torch.zeros(4, 2)},
        "train_state": {"step": 0, "seen": torch.zeros(3, dtype=torch.int64)},
    }
    loaded["loader"] = {"at": {"epoch": 0}, "rank": None}
    dcp.load(loaded, checkpoint_id=again.path)
    assert loaded["train_state"]["step"] == 9
    assert loaded["loader"] == put["loader"]
    assert loaded["train_state"]["seen"].tolist() == [0, 1, 2]
    assert again.iteration == 9


def test_an_uneven_tensor_has_a_chunk_for_each_rank_and_one_that_is_empty(tmp_path: Path) -> None:
    dcp.save(
        {"model": {"w": torch.arange(10.0).view(5, 2), "one": torch.ones(1)}},
        checkpoint_id=str(tmp_path / "a"),
        no_dist=True,
    )
    _, again = written(tmp_path / "a", tmp_path / "b", mesh=Mesh(dp=4))
    found = dcp.FileSystemReader(again.path).read_metadata().state_dict_metadata["model.w"].chunks
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in found] == [
        ((0, 0), (2, 2)), ((2, 0), (2, 2)), ((4, 0), (1, 2)), ((5, 0), (0, 2)),
    ]  # fmt: skip
    of_one = dcp.FileSystemReader(again.path).read_metadata().state_dict_metadata["model.one"].chunks
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in of_one] == [((0,), (1,)), ((1,), (0,))]
    loaded = {"model": {"w": torch.zeros(5, 2), "one": torch.zeros(1)}}
    dcp.load(loaded, checkpoint_id=again.path)
    assert loaded["model"]["w"].flatten().tolist() == list(range(10))
    assert again["one"].layout.text == "(dp out)"


def test_missing_hyperparameters_are_torchs_defaults_and_said(tmp_path: Path) -> None:
    reshape = ckptlab.open(ZERO2).reshape(
        format="dcp", param_groups=({"lr": 0.5},) * len(ckptlab.open(ZERO2).catalog.groups)
    )
    assert [g.options["lr"] for g in reshape.target.groups] == [0.5] * len(reshape.target.groups)
    source = ckptlab.open(ZERO2).catalog
    bare = [{k: v for k, v in g.options.items() if k != "amsgrad"} for g in source.groups]
    for group, options in zip(source.groups, bare, strict=True):
        group.options.pop("amsgrad")  # type: ignore[attr-defined]
        assert group.options == options
    again = Checkpoint(source).reshape(format="dcp")
    assert [f.code for f in again.check() if f.code == "hyperparameters-assumed"] == ["hyperparameters-assumed"]
    assert all(g.options["amsgrad"] is False for g in again.target.groups)


@pytest.mark.slow
def test_equal_values_lie_once_and_the_same_conversion_has_the_same_bytes(tmp_path: Path) -> None:
    first, second = (ckptlab.open(ZERO2).reshape(format="dcp", keys="torch-flat") for _ in range(2))
    for a, b in zip(first.files, second.files, strict=True):
        assert pickle.dumps(a.parts[-1]) == pickle.dumps(b.parts[-1]) if a.parts else not b.parts
    first.save(tmp_path / "dcp")
    metadata = read_metadata(str(tmp_path / "dcp"), [".metadata"])
    rates = [b for key, b in metadata.blobs.items() if key.endswith(".lr")]
    assert len(rates) > 30
    assert len({(b.file, b.offset) for b in rates}) == len({g.options["lr"] for g in first.target.groups})
    steps = [e for key, e in metadata.tensors.items() if key.endswith(".step")]
    assert len({tuple(e.offset) for e in steps}) == 1


def test_labels_that_are_forged_are_refused(tmp_path: Path) -> None:
    _, again = written(ZERO2, tmp_path / "dcp", mesh=Mesh(dp=2))
    file = Path(again.path, ".metadata")
    data = file.read_bytes()
    assert data.count(b"(dp out) in") >= 1
    faults = {b"(dp out) i)": "labels in it are not what ckptlab writes", b"out (dp in)": "its chunks begin at"}
    for fault, says in faults.items():
        file.write_bytes(data.replace(b"(dp out) in", fault))
        with pytest.raises(CkptlabError, match=says):
            ckptlab.open(again.path)
        assert not ckptlab.check(again.path, data=False).healthy


def test_the_command_line_writes_it(tmp_path: Path) -> None:
    arguments = ["convert", str(ZERO2), str(tmp_path / "dcp"), "--to", "dcp", "--dp", "3", "--keys", "torchtitan"]
    ran = CliRunner().invoke(main, [*arguments, "--rename", "wpe=position", "--rename", "wte=token", "--no-sync"])
    assert ran.exit_code == 0, ran.output
    assert "3 files" not in ran.output
    assert "4 files" in ran.output
    assert "latest" not in ran.output
    assert {"position.weight", "token.weight"} <= set(ckptlab.open(tmp_path / "dcp"))


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 7, -1])
def test_a_damaged_item_is_not_copied_on(which: int, tmp_path: Path) -> None:
    _, there = written(ZERO2, tmp_path / "dcp", mesh=Mesh(dp=2))
    fragments = [f for by in there.catalog.stored.pieces.values() for held in by.values() for f in held]
    inside = sorted((f.stored for f in fragments if "__1_0" in f.stored.path), key=lambda stored: stored.offset)
    spoilt = inside[which]
    data = bytearray(Path(spoilt.path).read_bytes())
    data[spoilt.offset] ^= 1
    Path(spoilt.path).write_bytes(data)
    names = list(there.catalog.lying_in(spoilt.path, spoilt.offset, spoilt.offset + 1))
    again = ckptlab.open(there.path).reshape(format="dcp", mesh=Mesh(dp=3))
    with pytest.raises(CheckpointError, match=rf"record 'data/0', which holds {re.escape(names[0])}, has other bytes"):
        again.save(tmp_path / "out")
    again.save(tmp_path / "taken", verify=False)


def test_replicas_of_shards_and_layouts_of_ones_own(tmp_path: Path) -> None:
    """HSDP: two replicas of two shards, of which the first replica writes; 61 rows are cut as torch cuts them."""
    source = ckptlab.open(DATA / "fsdp2_tp2_dp2" / "step-3", mesh=Mesh(dp=2, tp=2))
    mesh = Mesh(dp=4).split("dp", replicate=2, shard=2)
    told = {".*(norm|bias).*": "(shard out)", ".*": "(shard out) in"}
    _, again = written(source, tmp_path / "dcp", mesh=mesh, strategy=told)
    assert again["embed.weight"].layout.text == "(shard out) in"
    assert again.mesh == Mesh(replicate=2, shard=2)
    assert ckptlab.diff(source, again).equal
    sizes = {p.name: p.stat().st_size > 0 for p in (tmp_path / "dcp").glob("*.distcp")}
    assert sizes == {"__0_0.distcp": True, "__1_0.distcp": True, "__2_0.distcp": False, "__3_0.distcp": False}
    chunks = dcp.FileSystemReader(again.path).read_metadata().state_dict_metadata["model.embed.weight"].chunks
    assert [(tuple(c.offsets), tuple(c.sizes)) for c in chunks] == [((0, 0), (31, 12)), ((31, 0), (30, 12))]


@pytest.mark.parametrize(("mesh", "chunks"), [(Mesh(tp=5), 15), (Mesh(tp=1), 3)], ids=str)
def test_parts_that_are_cut_on_their_own_are_a_chunk_each(mesh: Mesh, chunks: int, tmp_path: Path) -> None:
    ckpt, again = written(ZERO2, tmp_path / "dcp", mesh=mesh, strategy={r".*fc2\.weight": "(3 tp out) in"})
    found = dcp.FileSystemReader(again.path).read_metadata().state_dict_metadata["model.blocks.0.fc2.weight"]
    assert len(found.chunks) == chunks
    loaded = wanted(ckpt)
    dcp.load(loaded, checkpoint_id=again.path)
    judge(loaded, ckpt)
    assert again["blocks.0.fc2.weight"].layout.text == "(3 tp out) in"
    assert ckptlab.diff(ckpt, again).equal


@pytest.mark.slow
def test_parts_of_unequal_size_stay_parts(tmp_path: Path) -> None:
    """Grouped queries: q, k and v are each cut on their own, over dp within, and DeepSpeed's ranks have them so again.
    Where some are whole on every rank chunks do not tell it, and nobody takes them all for whole."""
    fused = Layout("((tp q) + (tp k) + (tp v)) in", totals={"q": 21, "k": 12, "v": 12})
    told = {r".*qkv\.weight": fused, r".*fc2\.weight": "(tp out) in"}
    ckpt, again = written(ZERO2, tmp_path / "dcp", mesh=Mesh(tp=3, dp=2), strategy=told)
    name = "blocks.0.qkv.weight"
    assert again[name].layout.text == "((tp dp out0) + (tp dp out1) + (tp dp out2)) in"
    chunks = dcp.FileSystemReader(again.path).read_metadata().state_dict_metadata[f"model.{name}"].chunks
    assert sorted(c.offsets[0] for c in chunks) == [0, 4, 7, 11, 14, 18, *range(21, 45, 2)]
    loaded = wanted(ckpt)
    dcp.load(loaded, checkpoint_id=again.path)
    judge(loaded, ckpt)
    for tp in (3, 1):
        reshape = again.reshape(format="deepspeed", mesh=Mesh(tp=tp, dp=2), zero_stage=1, dtype="bf16")
        reshape.save(tmp_path / str(tp) / "step")
        back = ckptlab.open(tmp_path / str(tp) / "step")
        assert ckptlab.diff(again, back, states=[MASTER, "exp_avg", "exp_avg_sq"]).equal
    cut = reshape_of(again, Mesh(tp=3, dp=2))[name]
    assert cut.cut.rows(cut.cut.coordinate({"tp": 1}))[0][:, [0, 2]].tolist() == [[7, 7], [25, 4], [37, 4]]
    one = {**told, r".*qkv\.weight": Layout("((tp q) + k + v) in", totals={"q": 21, "k": 12, "v": 12})}
    _, whole_parts = written(ZERO2, tmp_path / "mqa", mesh=Mesh(tp=3, dp=2), strategy=one)
    with pytest.raises(ReshapeError, match=r"nothing says how blocks.0.qkv.weight and 2 more tensors are cut"):
        reshape_of(whole_parts, Mesh(tp=3, dp=2))


def reshape_of(ckpt: Checkpoint, mesh: Mesh) -> Catalog:
    return ckpt.reshape(format="deepspeed", mesh=mesh, zero_stage=1, dtype="bf16").target


# Real ranks.


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "tp"), [(2, 1), (4, 2)])
def test_fsdp_and_tensor_parallel_ranks_load_it(ranks: int, tp: int, tmp_path: Path) -> None:
    model = torch_ranks.small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    for _ in range(2):
        model(torch.ones(2, 6)).square().sum().backward()
        optimizer.step()
    names = [n for n, _ in model.named_parameters()]
    group = {**{k: v for k, v in optimizer.param_groups[0].items() if k != "params"}, "params": names}
    state = {n: optimizer.state[p] for n, p in model.named_parameters()}
    content = {"model": model.state_dict(), "optimizer": {"state": state, "param_groups": [group]}}
    dcp.save(content, checkpoint_id=str(tmp_path / "source"), no_dist=True)
    written(tmp_path / "source", tmp_path / "dcp", mesh=Mesh(dp=4))
    torch_ranks.load(tmp_path / "dcp", tmp_path / "source", ranks, tp, tmp_path)


@pytest.mark.slow
@requires_deepspeed
@pytest.mark.parametrize(
    ("case", "rows", "program"),
    [
        ("gpt_tp2_pp1_dp2_fp32", 104, (4, 2)),  # ZeRO-1
        ("plain_zero3_dp2_fp32", None, (2, 1)),
        ("megatron_tp2", None, (2, 1)),
    ],
)
def test_the_next_step_is_that_of_the_run(
    case: str, rows: int | None, program: tuple[int, int], tmp_path: Path
) -> None:
    """FSDP2 and tensor parallelism, with torch's AdamW, from what real DeepSpeed or a Megatron saved and went on from:
    the weights after one more step are those of the run; without the moments they are not."""
    source = make_case(case, tmp_path)
    written(source, tmp_path / "dcp", mesh=Mesh(dp=3), padded_vocab=rows)
    (report,) = onward(tmp_path / "dcp", source, program)
    assert report["differences"] == {}
    assert report["compared"] > 20
    assert report["apart"] < 0.03, report
    assert report["without"] > 1, report


# Back to DeepSpeed.


def through_dcp(case: Path, path: Path, **options: Any) -> tuple[Checkpoint, Checkpoint]:
    return written(case, path / "dcp", mesh=Mesh(dp=4), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "stage", "dp"),
    [("deepspeed", 0, 2), ("deepspeed", 1, 4), ("deepspeed", 3, 4), ("universal", 2, 2), ("universal", 3, 2)],
)
def test_deepspeeds_files_are_made_of_it(form: str, stage: int, dp: int, tmp_path: Path) -> None:
    """On the source's own dp too, where each rank has a part of the buffers that it is to have whole."""
    ckpt, there = through_dcp(ZERO2, tmp_path)
    reshape = there.reshape(format=form, dp=dp, zero_stage=stage, dtype="bf16")
    reshape.save(tmp_path / "out" / "step")
    back = ckptlab.open(tmp_path / "out" / "step")
    found = ckptlab.diff(ckpt, back)
    assert found.equal
    assert {n: t.aliases for n, t in back.items()} == {n: t.aliases for n, t in ckpt.items()}
    assert (back.iteration, back.catalog.training.dtype) == (3, "bf16")
    assert [g.options["weight_decay"] for g in back.catalog.groups] == [
        g.options["weight_decay"] for g in ckpt.catalog.groups
    ]
    assert ckptlab.check(back).healthy


def test_amsgrads_greatest_moment_is_no_copy_of_the_last(tmp_path: Path) -> None:
    model = torch_ranks.small_model()
    optimizer = torch.optim.AdamW(model.parameters(), amsgrad=True)
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(content, checkpoint_id=str(tmp_path / "dcp"), no_dist=True)
    source = ckptlab.open(tmp_path / "dcp")
    source.reshape(format="deepspeed", dp=2, zero_stage=1).save(tmp_path / "out" / "step")
    back = ckptlab.open(tmp_path / "out" / "step")
    assert "max_exp_avg_sq" in back.states
    assert ckptlab.diff(source, back).equal
    assert ckptlab.check(back).healthy


@pytest.mark.slow
def test_tensor_parallel_layouts_come_back_from_labels_or_a_strategy(tmp_path: Path) -> None:
    ckpt, there = through_dcp(GPT, tmp_path)
    there.reshape(format="deepspeed", tp=2, dp=2, zero_stage=1, dtype="bf16").save(tmp_path / "out" / "step")
    back = ckptlab.open(tmp_path / "out" / "step")
    name = "3.self_attention.query_key_value.weight"
    assert back[name].layout.text == ckpt[name].layout.text
    assert ckptlab.diff(ckpt, back, states=[MASTER, "exp_avg", "exp_avg_sq"]).equal
    bare, plain = written(ZERO2, tmp_path / "bare", mesh=Mesh(dp=2))
    with pytest.raises(ReshapeError, match="nothing says how"):
        plain.reshape(format="deepspeed", tp=2)
    told = {r".*fc1\.weight": "out (tp in)", r".*fc2\.weight": "(tp out) in"}
    reshape = plain.reshape(format="deepspeed", mesh=Mesh(tp=3, dp=2), zero_stage=1, strategy=told)
    assert reshape.target["blocks.0.fc1.weight"].layout.text == "out (tp in)"
    reshape.save(tmp_path / "cut" / "step")
    assert ckptlab.diff(bare, ckptlab.open(tmp_path / "cut"), states=[MASTER, "exp_avg"]).equal


def test_axes_that_nobody_named_are_not_kept_beside_those_that_are(tmp_path: Path) -> None:
    _, there = through_dcp(ZERO2, tmp_path)
    metadata = Path(there.path, ".metadata")
    metadata.write_bytes(metadata.read_bytes().replace(b"X\x07\x00\x00\x00ckptlab", b"X\x07\x00\x00\x00unknown"))
    plain = ckptlab.open(there.path)
    assert plain.mesh == Mesh(shard0=4)
    reshape = plain.reshape(format="deepspeed", dp=2)
    assert (reshape.mesh, reshape.zero_stage) == (Mesh(dp=2), 1)
    assert [f.code for f in reshape.target.findings] == ["zero-stage-assumed"]
    reshape.save(tmp_path / "out" / "step")
    assert ckptlab.diff(plain, tmp_path / "out" / "step").equal
    with pytest.raises(ReshapeError, match="has no axis 'shard0'"):
        plain.reshape(format="deepspeed")
    with pytest.raises(ReshapeError, match="nothing says how"):  # of tp a folder that is cut over dp says nothing
        ckptlab.open(there.path, mesh=Mesh(dp=4)).reshape(format="deepspeed", tp=3, dp=1)


def test_what_deepspeed_cannot_resume_from_is_refused_with_every_reason(tmp_path: Path) -> None:
    kept = {"w": torch.ones(4, 2), "v": torch.ones(4), "free": torch.ones(2)}
    state = {n: {"exp_avg": torch.ones_like(kept[n]).bfloat16()} for n in ("w", "v")}
    state["v"]["exp_avg_sq"] = torch.ones(4)
    groups = [{"lr": 0.5, "params": ["w", "v", "gone"]}]
    content = {"model": kept, "optimizer": {"state": state | {"free": {"m": torch.ones(2)}}, "param_groups": groups}}
    dcp.save(content, checkpoint_id=str(tmp_path / "a"), no_dist=True)
    with pytest.raises(ReshapeError) as refused:
        ckptlab.open(tmp_path / "a").reshape(format="deepspeed", dp=2)
    for reason in (
        "does not hold: gone",
        "in no parameter group: free",
        "keeps exp_avg of bfloat16",
        "different states",
    ):
        assert reason in str(refused.value)
    dcp.save({"model": kept}, checkpoint_id=str(tmp_path / "b"), no_dist=True)
    with pytest.raises(ReshapeError, match="holds weights alone, and no optimizer"):
        ckptlab.open(tmp_path / "b").reshape(format="universal", dp=2)


@pytest.mark.slow
def test_experts_become_those_of_deepspeed_on_any_ep(tmp_path: Path) -> None:
    """Over as many ranks as their groups are called by; a program that trains all in one group calls them by none."""
    _, there = through_dcp(MOE, tmp_path)
    groups = there.catalog.groups
    every = tuple(name for group in groups for name in group.tensors)
    options = {key: value for key, value in groups[0].options.items() if key != "name"}
    together = replace(there.catalog.training, groups=(ParameterGroup(options, every, groups[0].scalars),))
    tensors = {n: t if t.group is None else replace(t, group=0) for n, t in there.catalog.tensors.items()}
    one = Checkpoint(replace(there.catalog, tensors=tensors, training=together))
    for i, (source, asked, degree) in enumerate([(there, {}, 2), (there, {"ep": 4}, 4), (one, {}, 1)]):
        reshape = source.reshape(format="deepspeed", dp=4, zero_stage=2, dtype="bf16", **asked)
        reshape.save(tmp_path / str(i) / "step")
        back = ckptlab.open(tmp_path / str(i) / "step")
        assert back.mesh == Mesh(dp=4).split("dp", edp=4 // degree, ep=degree)
        assert ckptlab.diff(source, back, states=[MASTER, "exp_avg", "exp_avg_sq"]).equal
        called = [group.name for group in back.catalog.groups]
        assert called == ([None, "ep_size_1"] if source is one else ["decay", "no_decay", *[f"ep_size_{degree}"] * 2])
        assert all(("moe" in g.options) == (str(g.name)[:2] == "ep") for g in back.catalog.groups)
        assert ckptlab.check(back, data=False).healthy
    lost = {name: tensor for name, tensor in there.catalog.tensors.items() if "experts.1." not in name}
    kept = tuple(replace(g, tensors=tuple(n for n in g.tensors if n in lost)) for g in groups)
    training = replace(there.catalog.training, groups=kept)
    with pytest.raises(ReshapeError, match=r"expert 1 of blocks\.1\..*, of which there are 4 by their numbers"):
        Checkpoint(replace(there.catalog, tensors=lost, training=training)).reshape(format="deepspeed", dp=2)


@pytest.mark.slow
@requires_deepspeed
@pytest.mark.parametrize(
    ("case", "form", "options"),
    [
        (ZERO2, "deepspeed", {"dp": 3, "zero_stage": 2}),
        (ZERO2, "deepspeed", {"dp": 2, "zero_stage": 3}),
        (ZERO2, "universal", {"dp": 3}),
        (MOE, "deepspeed", {"dp": 4, "ep": 4, "zero_stage": 2}),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_real_deepspeed_resumes_what_came_from_dcp(
    case: Path, form: str, options: dict[str, int], tmp_path: Path
) -> None:
    _, there = through_dcp(case, tmp_path)
    there.reshape(format=form, dtype="bf16", **{"zero_stage": 2, **options}).save(tmp_path / "out" / "step")
    changes = {key.removesuffix("_stage"): value for key, value in options.items()}
    report = resume(tmp_path / "out" / "step", case.name, universal=form == "universal", **changes)
    assert report["status"] == "equal", report.get("error") or report["differences"]
    assert report["compared"]["exp_avg_sq"] > 20


@pytest.mark.slow
@requires_deepspeed
@pytest.mark.parametrize("form", ["deepspeed", "universal"])
def test_real_deepspeeds_pipeline_resumes_what_came_from_dcp(form: str, tmp_path: Path) -> None:
    ckpt, there = through_dcp(GPT, tmp_path)
    reshape = there.reshape(format=form, pp=2, tp=2, dp=1, zero_stage=1, dtype="bf16")
    assert "pipeline-inferred" in [f.code for f in reshape.target.findings]
    reshape.save(tmp_path / "out" / "step")
    assert ckptlab.diff(ckpt, ckptlab.open(tmp_path / "out" / "step")).equal
    universal = form == "universal"
    report = resume(tmp_path / "out" / "step", GPT.name, universal=universal, pp=2, tp=2, dp=1)
    assert report["status"] == "equal", report.get("error") or report["differences"]
    assert report["compared"]["exp_avg_sq"] > 20


def test_a_pipeline_is_made_of_numbered_layers_alone(tmp_path: Path) -> None:
    _, there = through_dcp(ZERO2, tmp_path)
    with pytest.raises(ReshapeError, match=r"scale, gains and 44 more are in no layer of a pipeline"):
        there.reshape(format="deepspeed", pp=2, dp=2)


def _late(path: Path) -> dict[str, Any]:
    """A folder of a program in which one tensor of the parameter group was not trained until the last of three steps;
    and what it held."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for step in range(3):
        for name, parameter in model.named_parameters():
            parameter.grad = None if name == "1.weight" and step < 2 else torch.randn(parameter.shape)
        optimizer.step()
    named = dict(zip(range(4), dict(model.named_parameters()), strict=True))
    held = optimizer.state_dict()
    state = {named[i]: its for i, its in held["state"].items()}
    groups = [{**g, "params": [named[i] for i in g["params"]]} for g in held["param_groups"]]
    program = {"model": model.state_dict(), "optimizer": {"state": state, "param_groups": groups}}
    dcp.save(program, checkpoint_id=str(path), no_dist=True)
    return program


@pytest.mark.parametrize("hop", [None, "deepspeed"])
def test_a_tensor_that_was_not_trained_in_every_step_keeps_its_own(hop: str | None, tmp_path: Path) -> None:
    program = _late(tmp_path / "program")
    ckpt = ckptlab.open(tmp_path / "program")
    if hop is not None:  # without ZeRO the optimizer counts tensor by tensor
        ckpt.reshape(format="deepspeed", zero_stage=0).save(tmp_path / "global_step3")
        model = torch.load(tmp_path / "global_step3" / "mp_rank_00_model_states.pt", weights_only=False)
        steps = [float(its["step"]) for _, its in sorted(model["optimizer"]["state"].items())]
        assert steps == [3, 3, 1, 3]
        return
    assert ckpt.catalog.groups[0].apart == {"1.weight": {"step": 1}}
    ckpt.reshape(format="dcp").save(tmp_path / "again")
    fresh = {name: {**its, "step": torch.tensor(-1.0)} for name, its in program["optimizer"]["state"].items()}
    loaded = {"optimizer": {"state": fresh}}
    dcp.load(loaded, checkpoint_id=str(tmp_path / "again"), no_dist=True)
    for name, its in program["optimizer"]["state"].items():
        assert float(loaded["optimizer"]["state"][name]["step"]) == float(its["step"]), name
    found = ckptlab.updates(ckpt)
    assert found["step"].sel(tensor=["0.weight", "1.weight"]).values.tolist() == [3, 1]
    assert ckptlab.diff(ckpt, tmp_path / "again").equal


def test_steps_that_differ_have_no_place_in_a_flat_buffer_and_that_is_said(tmp_path: Path) -> None:
    _late(tmp_path / "program")
    ckpt = ckptlab.open(tmp_path / "program")
    made = ckpt.reshape(format="deepspeed", zero_stage=1)
    assert "1.weight: 1" in next(f.found for f in made.check() if f.code == "steps-apart")
    made.save(tmp_path / "global_step3")
    again = ckptlab.open(tmp_path / "global_step3")
    differing = [(s.where, s.a, s.b) for s in ckptlab.diff(ckpt, again).settings if s.key == "step"]
    assert differing == [("1.weight", 1, 3.0)]


def _trained(seed: int, rate: float) -> tuple[Any, dict[str, Any]]:
    """A small model, and its optimizer's state by names."""
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    return model, _stepped(model, dict(model.named_parameters()), rate)


def _stepped(model: Any, named: Mapping[str, Any], rate: float) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(named.values(), lr=rate)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape)
    optimizer.step()
    held, names = optimizer.state_dict(), list(named)
    groups = [{**g, "params": [names[i] for i in g["params"]]} for g in held["param_groups"]]
    return {"state": {names[i]: its for i, its in held["state"].items()}, "param_groups": groups}


@pytest.mark.parametrize("nested", [False, True])
def test_each_of_two_models_has_the_moments_of_its_own_optimizer(nested: bool, tmp_path: Path) -> None:
    """A generator and a discriminator whose parameters are called alike."""
    (g, g_states), (d, d_states) = _trained(0, 1e-3), _trained(1, 2e-3)
    flat = {"generator": g.state_dict(), "discriminator": d.state_dict(), "optimizer_d": d_states}
    deep = {"g": {"model": g.state_dict(), "optim": g_states}, "d": {"model": d.state_dict(), "optim": d_states}}
    dcp.save(deep if nested else flat | {"optimizer_g": g_states}, checkpoint_id=str(tmp_path), no_dist=True)
    ckpt = ckptlab.open(tmp_path)
    assert not {"dcp-models", "dcp-optimizers"} & {f.code for f in ckpt.findings}
    rates = {n: group.options["lr"] for group in ckpt.catalog.groups for n in group.tensors}
    for model, states, rate in ((g, g_states, 1e-3), (d, d_states, 2e-3)):
        for name, weight in model.state_dict().items():
            mine = [n for n in ckpt if n.endswith(name) and np.array_equal(whole(ckpt.catalog, n, MASTER), weight)]
            assert len(mine) == 1
            equal(states["state"][name]["exp_avg"], whole(ckpt.catalog, mine[0], "exp_avg"), mine[0])
            assert rates[mine[0]] == rate


@pytest.mark.parametrize(
    ("copy", "trained", "optimizer", "told"),
    [
        ("ema", "model", "optimizer", True),
        ("", "app.net", "app.optim", True),
        ("averaged", "student", "optimizer", True),
        ("first", "second", "second_optim", True),
        ("model_ema", "", "optimizer", True),
        ("first", "second", "optimizer", False),
    ],
)
def test_a_copy_of_the_model_that_comes_first_is_not_taken_for_it(
    copy: str, trained: str, optimizer: str, told: bool, tmp_path: Path
) -> None:
    """An average, say: the moments are those of the weights that are trained."""
    model, states = _trained(0, 1e-3)
    average = {name: torch.full_like(weight, 7) for name, weight in model.state_dict().items()}
    program: dict[str, Any] = {}
    for at, its in ((copy or "app.ema", average), (trained, model.state_dict()), (optimizer, states)):
        inside = program
        for part in at.split(".") if at else ():
            inside = inside.setdefault(part, {})
        inside.update(its)
    dcp.save(program, checkpoint_id=str(tmp_path), no_dist=True)
    ckpt = ckptlab.open(tmp_path)
    assert ("dcp-models" not in [f.code for f in ckpt.findings]) is told
    for name, weight in model.state_dict().items():
        equal(states["state"][name]["exp_avg"], whole(ckpt.catalog, name, "exp_avg"), name)
        if told:
            equal(weight, whole(ckpt.catalog, name, MASTER), name)


def test_an_optimizer_that_may_be_of_either_model_is_nobodys(tmp_path: Path) -> None:
    (a, a_states), (b, b_states) = _trained(0, 1e-3), _trained(1, 2e-3)
    told = {"first": a.state_dict(), "second": b.state_dict(), "optim0": a_states, "optim1": b_states}
    dcp.save(told, checkpoint_id=str(tmp_path), no_dist=True)
    ckpt = ckptlab.open(tmp_path)
    assert "optim0 and optim1" in next(f.found for f in ckpt.findings if f.code == "dcp-optimizers")
    assert {state for tensor in ckpt.values() for state in tensor.states} <= {MASTER, PARAM}
    held = ckpt.client_state["optim1"]["state"]["0.weight"]["exp_avg"]
    equal(b_states["state"]["0.weight"]["exp_avg"], held.map(), "0.weight")


def test_two_optimizers_of_one_model_are_its_groups(tmp_path: Path) -> None:
    """As Muon for matrices and AdamW for the rest."""
    model, _ = _trained(0, 1e-3)
    named = dict(model.named_parameters())
    matrices = _stepped(model, {n: p for n, p in named.items() if p.ndim > 1}, 3e-3)
    others = _stepped(model, {n: p for n, p in named.items() if p.ndim < 2}, 4e-3)
    program = {"model": model.state_dict(), "optimizer": {"muon_optim": matrices, "adam_optim": others}}
    dcp.save(program, checkpoint_id=str(tmp_path), no_dist=True)
    ckpt = ckptlab.open(tmp_path)
    assert {g.tensors: g.options["lr"] for g in ckpt.catalog.groups} == {
        ("0.weight", "1.weight"): 3e-3,
        ("0.bias", "1.bias"): 4e-3,
    }
    for name, its in {**matrices["state"], **others["state"]}.items():
        equal(its["exp_avg"], whole(ckpt.catalog, name, "exp_avg"), name)
