"""torch Distributed Checkpoints, by torch on the spot or by hand as several ranks write them, read without it."""

from __future__ import annotations

import io
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from compare import DATA

import ckptlab
from ckptlab.arrays import reader
from ckptlab.catalog import MASTER, PARAM, Catalog
from ckptlab.errors import CheckpointError, LayoutError, UnsafeFileError, UnsupportedError
from ckptlab.findings import Collecting
from ckptlab.formats.dcp.read import read_dcp
from ckptlab.formats.torch import pickles, torchfile
from ckptlab.formats.torch.pickles import Size, foreign, named
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Rules

META = "torch.distributed.checkpoint.metadata"
BF16 = np.dtype(ml_dtypes.bfloat16)

Box = tuple[int, tuple[int, ...], tuple[int, ...]]  # rank, where it begins, its size


def item(value: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "item.pt")
        torchfile.write(path, value)
        return path.read_bytes()


class Folder:
    """A DCP folder as several ranks write it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: dict[str, bytearray] = {}
        self.entries: dict[str, Any] = {}
        self.places: dict[Any, Any] = {}
        self.planner: dict[str, Any] = {}
        self.extra: dict[str, Any] = {}

    def tensor(self, key: str, whole: np.ndarray, boxes: Sequence[Box] | None = None, path: Any = None) -> None:
        boxes = boxes or [(0, (0,) * whole.ndim, whole.shape)]
        chunks = []
        for rank, start, size in boxes:
            window = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            self.stored(key, rank, start, size, item(np.array(whole[window], order="C")), chunks)
        self.entry(key, whole.shape, whole.dtype, chunks, path)

    def entry(self, key: str, shape: Any, dtype: np.dtype, chunks: list[Any], path: Any = None) -> None:
        properties = foreign(
            META, "TensorProperties", new=True, state=(named("torch", dtype.name), None, False, None, False)
        )
        state = {"properties": properties, "size": Size(shape), "chunks": chunks}
        self.entries[key] = foreign(META, "TensorStorageMetadata", new=True, state=state)
        self.planner[key] = path or tuple(key.split(".", 1))

    def stored(self, key: str, rank: int, start: Any, size: Any, data: bytes, chunks: list[Any]) -> None:
        state = {"offsets": Size(start), "sizes": Size(size)}
        chunks.append(foreign(META, "ChunkStorageMetadata", new=True, state=state))
        self.place(key, rank, data, offset=Size(start))

    def place(self, key: str, rank: int, data: bytes, **offset: Any) -> None:
        name = f"__{rank}_0.distcp"
        file = self.files.setdefault(name, bytearray())
        index = foreign(META, "MetadataIndex", new=True, state={"fqn": key, "index": None, **offset})
        info = {"relative_path": name, "offset": len(file), "length": len(data)}
        self.places[index] = foreign("torch.distributed.checkpoint.filesystem", "_StorageInfo", new=True, state=info)
        file += data

    def object(self, key: str, value: Any, path: Any, rank: int = 0) -> None:
        self.entries[key] = foreign(META, "BytesStorageMetadata", new=True)
        self.planner[key] = path
        self.place(key, rank, item(value))

    def metadata(self) -> Any:
        state = {"state_dict_metadata": self.entries, "planner_data": self.planner, "storage_data": self.places}
        return foreign(META, "Metadata", new=True, state={**state, **self.extra})

    def write(self, name: str = ".metadata") -> str:
        self.path.mkdir(exist_ok=True, parents=True)
        for file, data in self.files.items():
            (self.path / file).write_bytes(data)
        (self.path / name).write_bytes(pickles.dumps(self.metadata()))
        return str(self.path)


def array(*shape: int, dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def whole(catalog: Catalog, name: str, state: str) -> np.ndarray:
    return reader(catalog, name, state).shard(Cut.whole(catalog[name].shape), ())


def same(catalog: Catalog, name: str, state: str, expected: np.ndarray) -> None:
    found = whole(catalog, name, state)
    assert found.shape == expected.shape
    assert found.tobytes() == expected.tobytes(), (name, state)


def rows(count: int, edges: Sequence[int], width: int | None = None, ranks: Sequence[int] | None = None) -> list[Box]:
    ends = [*edges[1:], count]
    tail = () if width is None else (width,)
    pairs = zip(edges, ends, strict=True)
    return [((ranks or range(99))[i], (a, *(0 for _ in tail)), (b - a, *tail)) for i, (a, b) in enumerate(pairs)]


COLUMN = [(0, (0, 0), (4, 8)), (1, (8, 0), (4, 8)), (2, (4, 0), (4, 8)), (3, (12, 0), (4, 8))]
ROW = [(0, (0, 0), (8, 4)), (1, (0, 4), (8, 4)), (2, (8, 0), (8, 4)), (3, (8, 4), (8, 4))]
NORM = [(0, (0,), (8,)), (3, (8,), (8,))]


def parallel(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """FSDP 2 × tensor parallel 2, as torch writes it: mesh (dp, tp)."""
    folder = Folder(path)
    arrays = {"column.weight": array(16, 8), "row.weight": array(16, 8, seed=1), "norm.weight": array(16)}
    for (name, values), boxes in zip(arrays.items(), (COLUMN, ROW, NORM), strict=True):
        folder.tensor(f"model.{name}", values, boxes)
    return folder.write(), arrays


# What torch writes.


def saved(path: Path, flat: bool) -> tuple[str, Any, Any]:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25, weight_decay=0.5)
    for _ in range(2):
        model(torch.ones(2, 6)).sum().backward()
        optimizer.step()
    names = [n for n, _ in model.named_parameters()]
    states = {n: optimizer.state[p] for n, p in model.named_parameters()}
    options = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
    if flat:
        kept: Any = {f"state.{n}.{k}": v for n, s in states.items() for k, v in s.items()}
        kept |= {f"param_groups.{n}.{k}": v for n in names for k, v in options.items()}
    else:
        kept = {"state": states, "param_groups": [{**options, "params": names}]}
    train = {"step": 7, "strided": torch.arange(12.0).view(3, 4).t(), "note": {"a": [1, "b"]}}
    content = {"model": model.state_dict(), "optimizer": kept, "train_state": train}
    dcp.save(content, checkpoint_id=str(path), no_dist=True)
    return str(path), model, states


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.filterwarnings("ignore")
def test_what_torch_saves_is_read_to_the_bit(tmp_path: Path, flat: bool) -> None:
    path, model, states = saved(tmp_path / "dcp", flat)
    ckpt = ckptlab.open(path)
    assert ckpt.format == "dcp"
    assert ckpt.iteration == 7
    assert set(ckpt) == {"0.weight", "0.bias", "1.weight", "1.bias"}
    for name, parameter in model.named_parameters():
        same(ckpt.catalog, name, MASTER, parameter.detach().numpy())
        for state in ("exp_avg", "exp_avg_sq"):
            same(ckpt.catalog, name, state, states[name][state].numpy())
    (group,) = ckpt.catalog.groups
    assert sorted(group.tensors) == sorted(ckpt)
    assert (group.options["lr"], group.options["betas"], group.scalars["step"]) == (0.25, (0.9, 0.999), 2.0)
    strided = ckpt.client_state["train_state"]["strided"]
    assert strided.strides == (1, 4)
    np.testing.assert_array_equal(strided.map(), np.arange(12.0).reshape(3, 4).T)
    assert ckpt.client_state["train_state"]["note"] == {"a": [1, "b"]}


# What several ranks write.


def test_axes_are_neutral_until_somebody_names_them(tmp_path: Path) -> None:
    path, arrays = parallel(tmp_path / "dcp")
    found = read_dcp(path)
    assert found.mesh == Mesh(shard0=2, shard1=2)
    layouts = {name: t.layout.text for name, t in found.tensors.items()}
    assert layouts == {
        "column.weight": "(shard1 shard0 out) in",
        "row.weight": "(shard0 out) (shard1 in)",
        "norm.weight": "(shard0 out)",
    }
    assert not any(t.layout_known for t in found.tensors.values())
    assert [n.code for n in found.findings] == ["dcp-axes"]
    for name, values in arrays.items():
        same(found, name, MASTER, values)


@pytest.mark.parametrize("by", ["mesh", "strategy"])
def test_axes_named_by_a_mesh_or_by_layouts(tmp_path: Path, by: str) -> None:
    path, arrays = parallel(tmp_path / "dcp")
    said = {"column.*": "(tp dp out) in", "row.*": "(dp out) (tp in)", "norm.*": "(dp out)"}
    found = read_dcp(path, mesh=Mesh(dp=2, tp=2)) if by == "mesh" else read_dcp(path, Rules.of(said))
    assert (found.mesh.dp, found.mesh.tp) == (2, 2)
    assert found["column.weight"].layout.text == "(tp dp out) in"
    assert found["row.weight"].layout.text == "(dp out) (tp in)"
    assert found["norm.weight"].layout.text == "(dp out)"
    assert found.training.mesh == found.mesh
    assert not found.findings
    placement = found.placement("column.weight", MASTER)
    for holder in placement.holders:
        (fragment,) = found.fragments("column.weight", MASTER, holder)
        start = holder["tp"] * 8 + holder["dp"] * 4
        np.testing.assert_array_equal(fragment.stored.map(), arrays["column.weight"][start : start + 4])
        rank = int(placement.ranks(holder)[0])
        assert os.path.basename(fragment.stored.path) == f"__{rank}_0.distcp"


def test_the_mesh_of_a_run_is_said_when_it_is_opened(tmp_path: Path) -> None:
    path, _ = parallel(tmp_path / "dcp")
    assert "mesh=Mesh(dp=2, tp=2)" in ckptlab.open(path).findings[0].text
    for mesh in (Mesh(dp=2, tp=2), {"dp": 2, "tp": 2}):
        ckpt = ckptlab.open(path, mesh=mesh)
        assert (ckpt.mesh, ckpt.findings) == (Mesh(dp=2, tp=2), ())
        assert ckpt["column.weight"].layout.text == "(tp dp out) in"
    with pytest.raises(LayoutError, match=r"no tensor is cut as its chunks are: column.weight lies in 4 × 1 of them"):
        ckptlab.open(path, mesh=Mesh(dp=3))
    with pytest.raises(CheckpointError, match=r"says itself on which mesh it lies: leave mesh= out"):
        ckptlab.open(DATA / "plain_zero2_dp2", mesh=Mesh(dp=2))


def test_layouts_that_the_chunks_contradict_are_refused(tmp_path: Path) -> None:
    path, _ = parallel(tmp_path / "dcp")
    with pytest.raises(
        LayoutError, match=r"column.weight: dim 0 .* would be cut at 0, its chunks begin at 0, 4, 8, 12"
    ):
        read_dcp(path, Rules.of({"column.*": "out (dp tp in)", "row.*": "(dp out) (tp in)"}))


@pytest.mark.parametrize(("count", "edges"), [(103, [0, 26, 52, 78]), (7, [0, 2, 4, 6]), (5, [0, 2, 4]), (1, [0])])
def test_uneven_and_empty_chunks(tmp_path: Path, count: int, edges: list[int]) -> None:
    folder = Folder(tmp_path)
    values = array(count, 3)
    boxes = rows(count, edges, 3)
    if len(edges) < 4:  # the ranks without anything write one empty chunk
        boxes.append((3, (count, 0), (0, 3)))
    folder.tensor("model.w", values, boxes)
    folder.tensor("model.even", array(8), rows(8, [0, 2, 4, 6]))
    found = read_dcp(folder.write())
    assert found.mesh == Mesh(shard0=4)
    assert found["w"].layout.text == "(shard0 out) in"
    widths = [found.placement("w", MASTER).shape(h)[0] for h in found.placement("w", MASTER).holders]
    assert widths == [b - a for a, b in zip(edges, [*edges[1:], count], strict=True)] + [0] * (4 - len(edges))
    same(found, "w", MASTER, values)
    shards = ckptlab.open(tmp_path).shards()
    np.testing.assert_array_equal(shards["w"].out_extent.values.ravel(), widths)


def test_strided_and_uneven_together(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    values = array(61, 2)
    starts = [(0, 16), (31, 15), (16, 15), (46, 15)]  # tp halves of 31 and 30, each over dp
    folder.tensor("model.column", values, [(r, (a, 0), (n, 2)) for r, (a, n) in enumerate(starts)])
    folder.tensor("model.row", array(4, 4), [(r, (2 * (r // 2), 2 * (r % 2)), (2, 2)) for r in range(4)])
    found = read_dcp(folder.write(), mesh=Mesh(dp=2, tp=2))
    assert found["column"].layout.text == "(tp dp out) in"
    same(found, "column", MASTER, values)


def test_boxes_that_are_no_grid_are_read_as_parts(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    values = array(6, 6)
    folder.tensor("model.w", values, [(0, (0, 0), (6, 2)), (1, (0, 2), (3, 4)), (2, (3, 2), (3, 4))])
    found = read_dcp(folder.write())
    assert found.placement("w", MASTER).mesh.size == 4
    same(found, "w", MASTER, values)


def test_opening_reads_no_item(tmp_path: Path) -> None:
    path, _ = parallel(tmp_path / "dcp")
    for file in Path(path).glob("*.distcp"):
        file.write_bytes(b"x" * file.stat().st_size)
    found = read_dcp(path)
    with pytest.raises(CheckpointError, match=r"column.weight: .*__0_0.distcp is not a file of torch.save"):
        whole(found, "column.weight", MASTER)


def test_names_with_dots_and_states_of_every_kind(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    weight, frozen, master = array(4, 2, dtype=BF16), array(3), array(4, 2, seed=5)
    folder.tensor("app.model.state.a.w", weight, path=("app", "model", "state.a.w"))
    folder.tensor("app.model.frozen", frozen, path=("app", "model", "frozen"))
    folder.tensor("app.model.ids", np.arange(3), path=("app", "model", "ids"))
    for state, values in (("master_param", master), ("exp_avg", master + 1)):
        key = ("app", "optim", "state", "state.a.w", state)
        folder.tensor(".".join(key), values, path=key)
    folder.tensor(
        "app.optim.state.state.a.w.step", np.array(3.0, np.float32), path=("app", "optim", "state", "state.a.w", "step")
    )
    folder.tensor("app.optim.state.state.a.w.row", array(4), path=("app", "optim", "state", "state.a.w", "row"))
    folder.object("app.optim.param_groups.0.params", ["state.a.w"], ("app", "optim", "param_groups", 0, "params"))
    found = read_dcp(folder.write())
    assert list(found["state.a.w"].states) == [MASTER, "exp_avg", PARAM]
    same(found, "state.a.w", PARAM, weight)
    same(found, "state.a.w", MASTER, master)
    assert (found["frozen"].kind, found["ids"].kind) == ("frozen", "buffer")
    assert list(found["frozen"].states) == [PARAM]
    assert found["state.a.w.row"].shape == (4,)
    assert found.training.step == 3
    assert found.training.dtype == "bf16"


def test_accelerates_two_folders_are_one_checkpoint(tmp_path: Path) -> None:
    model, optimizer = Folder(tmp_path / "pytorch_model_fsdp_0"), Folder(tmp_path / "optimizer_0")
    values = array(4, 2)
    model.tensor("model.model.w", values, path=("model", "model.w"))
    key = ("optimizer", "state", "model.w", "exp_avg")
    optimizer.tensor(".".join(key), values + 1, path=key)
    model.write()
    optimizer.write()
    ckpt = ckptlab.open(tmp_path)
    same(ckpt.catalog, "model.w", MASTER, values)
    same(ckpt.catalog, "model.w", "exp_avg", values + 1)
    (tmp_path / "pytorch_model_fsdp_1").mkdir()
    with pytest.raises(UnsupportedError, match="holds 2 models"):
        ckptlab.open(tmp_path)


def test_metadata_of_each_rank_is_merged(tmp_path: Path) -> None:
    values = array(4, 2)
    for rank in range(2):
        folder = Folder(tmp_path)
        folder.tensor("model.w", values, [(rank, (2 * rank, 0), (2, 2))])
        folder.write(f"__{rank}.metadata")
    same(read_dcp(str(tmp_path)), "w", MASTER, values)
    (tmp_path / "__0.metadata").unlink()
    with pytest.raises(CheckpointError, match=r"the metadata of rank 0 is missing"):
        read_dcp(str(tmp_path))


def test_what_every_rank_stored_of_its_own_is_no_copy(tmp_path: Path) -> None:
    """Replicas of ranks that saved without a word to each other (use_collectives=False)."""
    values = array(4, 2)
    for rank in range(2):
        folder = Folder(tmp_path)
        folder.tensor("model.w", values, [(rank, (0, 0), (4, 2))])
        folder.write(f"__{rank}.metadata")
    assert (tmp_path / "__0_0.distcp").read_bytes() == (tmp_path / "__1_0.distcp").read_bytes()
    ckpt = ckptlab.open(tmp_path)
    assert (ckptlab.check(ckpt).findings, ckpt.findings) == ((), ())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("told", [True, False])
def test_parameters_that_go_by_numbers_get_their_names(tmp_path: Path, told: bool) -> None:
    """`optimizer.state_dict()` as it is, of two groups, beside frozen tensors and buffers; where frozen and trained
    tensors have the same shapes, nobody can say which is which."""
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    torch.manual_seed(0)
    sizes = (6, 5, 4, 3) if told else (4, 4, 4, 4)
    model = torch.nn.Sequential(*(torch.nn.Linear(a, b) for a, b in pairwise(sizes)))
    model[1].requires_grad_(False)
    model.register_buffer("seen", torch.arange(2))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    first, last = ([p for n, p in trained.items() if n[0] == layer] for layer in "02")
    optimizer = torch.optim.AdamW([{"params": first}, {"params": last, "lr": 0.5}], lr=0.25)
    model(torch.ones(2, sizes[0])).square().sum().backward()
    optimizer.step()
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    dcp.save(content, checkpoint_id=str(tmp_path), no_dist=True)
    ckpt = ckptlab.open(tmp_path)
    if not told:
        assert [f.code for f in ckpt.findings] == ["dcp-no-names"]
        assert {"0", "1", "2", "3"} <= set(ckpt)
        return
    assert set(ckpt) == set(model.state_dict())
    for name, parameter in trained.items():
        same(ckpt.catalog, name, MASTER, parameter.detach().numpy())
        same(ckpt.catalog, name, "exp_avg", optimizer.state[parameter]["exp_avg"].numpy())
    assert [(g.tensors, g.options["lr"], g.scalars["step"]) for g in ckpt.catalog.groups] == [
        (("0.weight", "0.bias"), 0.25, 1.0),
        (("2.weight", "2.bias"), 0.5, 1.0),
    ]
    assert {name: t.kind for name, t in ckpt.items() if name not in trained} == {
        "1.weight": "frozen",
        "1.bias": "frozen",
        "seen": "buffer",
    }
    assert ckptlab.check(ckpt).healthy


@pytest.mark.filterwarnings("ignore")
def test_states_of_rows_and_columns_are_tensors_and_lack_nothing(tmp_path: Path) -> None:
    """Adafactor's, of which that of a tensor of one row has the tensor's own shape."""
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 3), torch.nn.Linear(3, 1))
    optimizer = torch.optim.Adafactor(model.parameters())
    model(torch.ones(2, 6)).square().sum().backward()
    optimizer.step()
    names = {p: name for name, p in model.named_parameters()}
    state = {names[p]: {k: v for k, v in its.items() if v is not None} for p, its in optimizer.state.items()}
    groups = [{"lr": 0.5, "params": list(state)}]
    content = {"model": model.state_dict(), "optimizer": {"state": state, "param_groups": groups}}
    dcp.save(content, checkpoint_id=str(tmp_path), no_dist=True)
    ckpt = ckptlab.open(tmp_path)
    assert list(ckpt["2.weight"].states) == [MASTER]
    assert list(ckpt["2.bias"].states) == [MASTER, "variance"]
    same(ckpt.catalog, "2.weight.col_var", PARAM, state["2.weight"]["col_var"].numpy())
    assert ckptlab.check(ckpt).healthy


@pytest.mark.parametrize("step", [1.0, 2.0])
def test_moments_that_torch_made_before_the_first_step_are_not_dead(tmp_path: Path, step: float) -> None:
    """get_optimizer_state_dict of an optimizer that never stepped: one step without gradients."""
    folder = Folder(tmp_path)
    folder.tensor("model.w", array(4, 2))
    for state, values in {"exp_avg": np.zeros((4, 2)), "exp_avg_sq": np.zeros((4, 2)), "step": np.array(step)}.items():
        key = ("optimizer", "state", "w", state)
        folder.tensor(".".join(key), values.astype(np.float32), path=key)
    folder.object("optimizer.param_groups.0.params", ["w"], ("optimizer", "param_groups", 0, "params"))
    found = [f.code for f in ckptlab.check(folder.write()).findings]
    assert found == ([] if step == 1 else ["dead-moments"])


def test_moments_of_a_weight_that_lies_in_parts_lack_no_weight(tmp_path: Path) -> None:
    """torchtitan's: q, k, v one by one, the moments of the fused weight."""
    folder = Folder(tmp_path / "dcp")
    for part, rows in {"wq": 4, "wk": 2, "wv": 2}.items():
        folder.tensor(f"layers.0.qkv.{part}.weight", array(rows, 4, seed=rows), path=(f"layers.0.qkv.{part}.weight",))
    for name in ("layers.0.qkv.wqkv.weight", "layers.0.out.weight"):
        for state in ("exp_avg", "exp_avg_sq"):
            key = ("optimizer", f"state.{name}.{state}")
            folder.tensor(".".join(key), np.abs(array(8, 4, seed=len(name + state))), path=key)
        folder.object(f"optimizer.param_groups.{name}.lr", 0.5, ("optimizer", f"param_groups.{name}.lr"))
    folder.tensor("layers.0.out.weight", array(8, 4), path=("layers.0.out.weight",))
    ckpt = ckptlab.open(folder.write())
    assert list(ckpt["layers.0.qkv.wqkv.weight"].states) == ["exp_avg", "exp_avg_sq"]
    assert {name: list(t.states)[:1] for name, t in ckpt.items() if "wqkv" not in name} == {
        f"layers.0.{name}.weight": [MASTER] for name in ("qkv.wq", "qkv.wk", "qkv.wv", "out")
    }
    assert ckptlab.check(ckpt).healthy
    del folder.entries["layers.0.qkv.wk.weight"]
    (finding,) = (f for f in ckptlab.check(folder.write()).findings if f.severity == "error")
    assert (finding.code, finding.where.tensors) == ("missing-state", ("layers.0.qkv.wqkv.weight",))


@pytest.mark.filterwarnings("ignore")
def test_items_in_a_file_each_may_be_alike_and_are_no_copies(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    path, *_ = saved(tmp_path / "one", False)
    held = dcp.FileSystemReader(path).read_metadata()
    content = {
        key: torch.zeros(entry.size) for key, entry in held.state_dict_metadata.items() if hasattr(entry, "size")
    }
    dcp.load(content, checkpoint_id=path)
    content["model.norm.weight"] = content["model.norm.bias"] = torch.ones(9)
    writer = dcp.FileSystemWriter(str(tmp_path / "each"), single_file_per_rank=False)
    dcp.save(content, storage_writer=writer, no_dist=True)
    assert ckptlab.check(tmp_path / "each").healthy
    places = dcp.FileSystemReader(tmp_path / "each").read_metadata().storage_data.items()
    files = {index.fqn: tmp_path / "each" / info.relative_path for index, info in places}
    moments = (files[f"optimizer.state.0.weight.{state}"] for state in ("exp_avg", "exp_avg_sq"))
    next(moments).write_bytes(next(moments).read_bytes())
    (finding,) = (f for f in ckptlab.check(tmp_path / "each").findings if f.severity == "error")
    assert finding.code == "doubled-data"


# Megatron-core.


def megatron(path: Path, **extra: Any) -> Folder:
    folder = Folder(path)
    folder.extra = {"all_local_plans": [None] * 4, **extra}
    path.mkdir()
    (path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    args = foreign("argparse", "Namespace", state=sizes)
    torchfile.write(path / "common.pt", {"args": args, "iteration": 5})
    return folder


def test_megatrons_stacked_layers_and_swiglu_halves(tmp_path: Path) -> None:
    folder = megatron(tmp_path / "iter_0000005")
    fc1 = array(2, 8, 3, dtype=BF16)
    key = "decoder.layers.mlp.linear_fc1.weight"
    boxes = [
        (2 * layer + tp, (layer, 4 * half + 2 * tp, 0), (1, 2, 3))
        for layer in (0, 1)
        for tp in (0, 1)
        for half in (0, 1)
    ]
    folder.tensor(key, fc1, boxes)
    folder.tensor(f"optimizer.state.param.{key}", fc1.astype(np.float32), boxes)
    folder.object("decoder.layers.mlp._extra_state/shard_0_2", [None], None)
    folder.planner = {}
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5\n")
    folder.write()
    found = ckptlab.open(tmp_path).catalog
    assert list(found.tensors) == [f"decoder.layers.{i}.mlp.linear_fc1.weight" for i in (0, 1)]
    for i, tensor in enumerate(found.tensors.values()):
        assert tensor.layout.text == "(2 tp out) in"
        assert tensor.stages == (i,)
        same(found, tensor.name, PARAM, fc1[i])
        same(found, tensor.name, MASTER, fc1[i].astype(np.float32))
        for holder in found.placement(tensor.name, PARAM).holders:
            parts = found.fragments(tensor.name, PARAM, holder)
            tp = holder["tp"]
            mine = np.concatenate([fc1[i][2 * tp : 2 * tp + 2], fc1[i][4 + 2 * tp : 6 + 2 * tp]])
            assert np.concatenate([p.stored.flat for p in parts]).tobytes() == mine.tobytes()
    assert found.training.step == 5
    assert found.mesh == Mesh(pp=2, tp=2)
    assert list(found.client["decoder.layers.mlp._extra_state/shard_0_2"]) == [None]


def test_states_gathered_in_an_object_for_each_group_are_said_and_are_no_tensors(tmp_path: Path) -> None:
    """`dp_zero_gather_scatter`: flat buffers in a dict, whose map is not stored."""
    folder = megatron(tmp_path / "it")
    folder.tensor("decoder.layers.norm.weight", array(2, 3), [(i, (i, 0), (1, 3)) for i in (0, 1)])
    key = "optimizer.distributed.dp_group_idx_0.param_state/shard_0_1"
    folder.object(key, {0: {"exp_avg": array(6)}}, None)
    folder.planner = {}
    ckpt = ckptlab.open(folder.write())
    assert [(f.code, "dp_zero_gather_scatter" in f.text) for f in ckpt.findings] == [("dcp-no-map", True)]
    assert {state for t in ckpt.values() for state in t.states} == {PARAM}
    assert ckpt.client_state[key][0]["exp_avg"].numel == 6


@pytest.mark.parametrize("fault", [False, True])
def test_megatrons_flattened_ranges(tmp_path: Path, fault: bool) -> None:
    """0.12's: a row-parallel tensor (2 layers, 4, 6) as a grid (2, 1, 2) of flat pieces of 12, each in two ranges."""
    key = "decoder.layers.linear.weight"
    state = f"optimizer.state.exp_avg.{key}"
    folder = megatron(tmp_path / "it", mcore_data={state: {"nd_reformulated_orig_global_shape": (2, 4, 6)}})
    values, chunks = array(2, 4, 6), []
    for layer in (0, 1):
        for tp in (0, 1):
            flat = np.ascontiguousarray(values[layer, :, 3 * tp : 3 * tp + 3]).reshape(-1)
            for a, b in ((0, 5), (5, 11 if fault else 12)):
                folder.stored(
                    state, tp, (layer, 0, tp, a), (1, 1, 1, b - a), item(flat[a:b].reshape(1, 1, 1, -1)), chunks
                )
    folder.entry(state, (2, 1, 2, 12), values.dtype, chunks)
    folder.tensor(key, values.astype(BF16), [(2 * i + t, (i, 0, 3 * t), (1, 4, 3)) for i in (0, 1) for t in (0, 1)])
    folder.planner = {}
    path = folder.write()
    if fault:
        with pytest.raises(CheckpointError, match=r"exp_avg.*ranges of piece \(0, 0, 0\) do not make up its 12"):
            read_dcp(path)
        return
    found = read_dcp(path)
    for layer in (0, 1):
        assert found[f"decoder.layers.{layer}.linear.weight"].layout.text == "out (tp in)"
        same(found, f"decoder.layers.{layer}.linear.weight", "exp_avg", values[layer])


def test_buffers_without_a_map_are_said_to_be_none_of_tensors(tmp_path: Path) -> None:
    folder = megatron(tmp_path / "it")
    folder.tensor("output_layer.weight", array(4, 2, dtype=BF16))
    key = "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.param"
    folder.tensor(key, array(8), rows(8, [0, 5]))
    folder.planner = {}
    found = read_dcp(folder.write())
    assert list(found.tensors) == ["output_layer.weight"]
    assert [p.shape for p in found.client[key]] == [(5,), (3,)]
    assert [n.code for n in found.findings] == ["dcp-no-map"]


# Other files of torch's.


def dtensor(
    local: np.ndarray,
    shape: tuple[int, ...],
    mesh: Mapping[str, int],
    placements: list[Any],
    strides: Sequence[int] | None = None,
) -> Any:
    """As torch 2.13 pickles one. strides: how far apart the ranks of each axis are, on a part of a mesh."""
    flat, degrees = "torch.distributed._mesh_layout", list(mesh.values())
    apart = strides or [math.prod(degrees[i + 1 :]) for i in range(len(degrees))]
    axes = tuple(
        foreign(flat, "_FlatLayout", new=True, state={"shape": (n,), "stride": (step,)})
        for n, step in zip(degrees, apart, strict=True)
    )
    about = {"_mesh_dim_names": tuple(mesh), "_layout": foreign(flat, "_MeshLayout", new=True, state={"axes": axes})}
    device_mesh = foreign("torch.distributed.device_mesh", "DeviceMesh", new=True, state=about)
    spec = {"mesh": device_mesh, "placements": tuple(placements)}
    its = {
        "_local_tensor": local,
        "_spec": foreign("torch.distributed.tensor._dtensor_spec", "DTensorSpec", state=spec),
    }
    kind = named("torch.distributed.tensor", "DTensor")
    made = (kind, named("torch", "float32"), shape, (1,) * len(shape), 0)
    return foreign(
        "torch._tensor",
        "_rebuild_from_type_v2",
        named("torch._utils", "_rebuild_wrapper_subclass"),
        kind,
        made,
        (None, its),
    )


def placed(kind: str, **state: int) -> Any:
    return foreign("torch.distributed.tensor.placement_types", kind, state=state or None)


@pytest.mark.parametrize("numbered", [False, True])
def test_fsdps_files_of_ranks_tell_their_mesh(tmp_path: Path, numbered: bool) -> None:
    mesh = {"dp": 2, "tp": 2}
    column, row, norm = array(16, 3), array(5, 8), array(3)
    strided = [placed("_StridedShard", dim=0, split_factor=2), placed("Shard", dim=0)]
    for rank in range(4):
        dp, tp = divmod(rank, 2)
        mine = column[8 * tp + 4 * dp :][:4]
        part = np.ascontiguousarray(row[3 * dp : 3 * dp + 3, 4 * tp : 4 * tp + 4])
        model = {
            "column": dtensor(mine, (16, 3), mesh, strided),
            "row": dtensor(part, (5, 8), mesh, [placed("Shard", dim=0), placed("Shard", dim=1)]),
            "norm": dtensor(norm, (3,), mesh, [placed("Replicate"), placed("Replicate")]),
        }
        keys = [0, 1, 2] if numbered else list(model)
        state = {keys[0]: {"exp_avg": dtensor(mine + 1, (16, 3), mesh, strided), "step": np.array(9.0, np.float32)}}
        torchfile.write(tmp_path / f"model_world_size_4_rank_{rank}.pt", model)
        optim = {"state": state, "param_groups": [{"lr": 0.5, "params": keys}]}
        torchfile.write(tmp_path / f"optim_world_size_4_rank_{rank}.pt", optim)
    found = ckptlab.open(tmp_path).catalog
    layouts = {name: t.layout.text for name, t in found.tensors.items()}
    assert layouts == {"column": "(tp dp out) in", "row": "(dp out) (tp in)", "norm": "out"}
    assert (found.mesh, found.training.step, found.findings) == (Mesh(dp=2, tp=2), 9, ())
    for name, values in (("column", column), ("row", row), ("norm", norm)):
        same(found, name, MASTER, values)
    same(found, "column", "exp_avg", column + 1)
    assert found.groups[0].tensors == ("column", "row", "norm")
    (tmp_path / "model_world_size_4_rank_2.pt").unlink()
    with pytest.raises(CheckpointError, match=r"model_world_size_4_rank_2.pt is missing"):
        ckptlab.open(tmp_path)


def test_tensors_on_a_part_of_the_mesh_and_numbers_of_some_tensors(tmp_path: Path) -> None:
    """What only fully_shard cut lies on the part `dp` of a mesh (dp, tp), whose ranks are two apart; frozen tensors and
    buffers have no number in the optimizer."""
    mesh, column, norm = {"dp": 2, "tp": 2}, array(8, 3), array(5)
    strided = [placed("_StridedShard", dim=0, split_factor=2), placed("Shard", dim=0)]
    for rank in range(4):
        dp, tp = divmod(rank, 2)
        mine, part = column[4 * tp + 2 * dp :][:2], norm[3 * dp :][:3]
        model = {
            "frozen": array(2),
            "norm": dtensor(part, (5,), {"dp": 2}, [placed("Shard", dim=0)], [2]),
            "column": dtensor(mine, (8, 3), mesh, strided),
            "seen": array(1),
        }
        state = {
            0: {"exp_avg": dtensor(part + 1, (5,), {"dp": 2}, [placed("Shard", dim=0)], [2])},
            1: {"exp_avg": dtensor(mine + 1, (8, 3), mesh, strided)},
        }
        torchfile.write(tmp_path / f"model_world_size_4_rank_{rank}.pt", model)
        optim = {"state": state, "param_groups": [{"lr": 0.5, "params": [0, 1]}]}
        torchfile.write(tmp_path / f"optim_world_size_4_rank_{rank}.pt", optim)
    found = ckptlab.open(tmp_path).catalog
    assert (found.mesh, found.findings) == (Mesh(dp=2, tp=2), ())
    assert found["norm"].layout.text == "(dp out)"
    same(found, "norm", MASTER, norm)
    same(found, "norm", "exp_avg", norm + 1)
    same(found, "column", "exp_avg", column + 1)
    assert found.groups[0].tensors == ("norm", "column")
    assert found["frozen"].kind == "frozen"


# What is wrong with a folder.


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([(0, (0, 0), (3, 2)), (1, (2, 0), (2, 2))], r"\(1, 2\) elements at \(2, 0\) are held by two chunks"),
        ([(0, (0, 0), (1, 2)), (1, (2, 0), (2, 2))], r"\(1, 2\) elements at \(1, 0\) are held by no chunk"),
    ],
    ids=["overlap", "gap"],
)
def test_chunks_that_do_not_tile_are_refused(tmp_path: Path, boxes: list[Box], says: str) -> None:
    folder = Folder(tmp_path)
    folder.tensor("model.w", array(4, 2), boxes)
    folder.tensor("model.good", array(4))
    path = folder.write()
    with pytest.raises(CheckpointError, match=says):
        read_dcp(path)
    kept = Collecting(path)
    assert list(read_dcp(path, faults=kept).tensors) == ["good"]
    assert [f.code for f in kept.findings] == ["dcp-chunks"]


def test_files_missing_cut_longer_or_left_over(tmp_path: Path) -> None:
    path, _ = parallel(tmp_path / "dcp")
    file = Path(path) / "__1_0.distcp"
    data = file.read_bytes()
    for content, code in ((None, "dcp-missing-file"), (data[:-1], "dcp-short-file")):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"__1_0.distcp"):
            read_dcp(path)
        kept = Collecting(path)
        read_dcp(path, faults=kept)
        assert [f.code for f in kept.findings if f.severity == "error"] == [code]
    file.write_bytes(data + b"more")
    (Path(path) / "__9_0.distcp").write_bytes(b"old")
    assert [n.code for n in read_dcp(path).findings] == ["dcp-longer-file", "dcp-extra-file", "dcp-axes"]
    (Path(path) / ".metadata").unlink()
    with pytest.raises(CheckpointError, match=r"\.metadata is missing, which is written last"):
        ckptlab.open(path)


def test_metadata_that_is_older_than_its_data_is_said(tmp_path: Path) -> None:
    path, _ = parallel(tmp_path / "dcp")
    written = os.stat(os.path.join(path, ".metadata")).st_mtime
    for seconds, codes in ((30, ["dcp-axes"]), (3600, ["dcp-older-metadata", "dcp-axes"])):
        os.utime(os.path.join(path, "__1_0.distcp"), (written + seconds, written + seconds))
        found = read_dcp(path).findings
        assert [n.code for n in found] == codes
    assert "older than __1_0.distcp, by 3,600 seconds" in found[0].text


@pytest.mark.parametrize("steps", [(3, 3), (3, 4)])
def test_files_of_different_saves_are_told_by_their_steps(tmp_path: Path, steps: tuple[int, int]) -> None:
    folder = Folder(tmp_path)
    for rank, step in enumerate(steps):
        name = f"layers.{rank}.w"
        folder.tensor(f"model.{name}", array(2, 2), [(rank, (0, 0), (2, 2))], ("model", name))
        for state, values in (("exp_avg", array(2, 2)), ("step", np.array(step, np.float32))):
            key = ("optimizer", "state", name, state)
            folder.tensor(".".join(key), values, [(rank, (0,) * values.ndim, values.shape)], key)
    path = folder.write()
    found = [f for f in ckptlab.check(path).findings if f.code == "dcp-steps-apart"]
    assert len(found) == (steps[0] != steps[1])
    for one in found:
        assert one.severity == "warning"
        assert "step is 3 in __0_0.distcp and 4 in __1_0.distcp" in one.text


def test_an_item_of_another_shape_is_refused_when_it_is_read(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    chunks: list[Any] = []
    folder.stored("model.w", 0, (0, 0), (2, 2), item(array(4, 1)), chunks)
    folder.entry("model.w", (2, 2), np.dtype(np.float32), chunks)
    with pytest.raises(CheckpointError, match=r"holds float32 of shape \(4, 1\), .metadata says float32 of \(2, 2\)"):
        whole(read_dcp(folder.write()), "w", MASTER)


def test_compressed_streams_are_refused_by_name(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.tensor("model.w", array(2, 2))
    for info in folder.places.values():
        info.state["transform_descriptors"] = ["stream.zstd/1"]
    with pytest.raises(UnsupportedError, match=r"model.w: its items went through stream.zstd/1"):
        whole(read_dcp(folder.write()), "w", MASTER)


# What a stranger may have written.


def hostile(path: Path, root: Any) -> str:
    path.mkdir(exist_ok=True)
    (path / "__0_0.distcp").write_bytes(b"")
    (path / ".metadata").write_bytes(root if isinstance(root, bytes) else pickles.dumps(root))
    return str(path)


def test_nothing_that_metadata_names_is_called(tmp_path: Path) -> None:
    bait = tmp_path / "executed"
    folder = Folder(tmp_path / "dcp")
    folder.tensor("model.w", array(2, 2))
    folder.extra = {"storage_meta": foreign("os", "system", f"touch {bait}")}
    folder.object("rng", foreign("os", "system", f"touch {bait}"), ("rng", "state"))
    found = read_dcp(folder.write())
    assert found.client["rng"]["state"].name == "system"
    assert not bait.exists()


@pytest.mark.parametrize("name", ["/etc/passwd", "../__0_0.distcp", "a/../../b", "..\\b"])
def test_files_outside_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path)
    folder.tensor("model.w", array(2, 2))
    for info in folder.places.values():
        info.state["relative_path"] = name
    with pytest.raises(CheckpointError, match="outside of the folder"):
        read_dcp(folder.write())


def test_damaged_and_forged_metadata_is_refused_with_one_message(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "good")
    folder.tensor("model.w", array(4, 2), rows(4, [0, 2], 2))
    good = folder.metadata()
    chunk = foreign(META, "ChunkStorageMetadata", new=True, state={"offsets": Size((3, 0)), "sizes": Size((2, 2))})
    index = foreign(META, "MetadataIndex", new=True, state={"fqn": "model.w", "offset": Size((3, 0))})
    info = next(iter(folder.places.values()))
    entry = folder.entries["model.w"].with_attributes(chunks=[chunk])
    data = pickles.dumps(good)
    forged: list[Any] = [
        b"",
        b"no pickle",
        data[: len(data) // 2],
        {"state_dict_metadata": {}},
        good.with_attributes(storage_data=None),
        good.with_attributes(storage_data={1: 2}),
        good.with_attributes(state_dict_metadata={"model.w": 3}),
        good.with_attributes(state_dict_metadata={"model.w": entry}, storage_data={index: info}),
        good.with_attributes(state_dict_metadata={"model.w": entry.with_attributes(size=(-1, 2))}),
        good.with_attributes(state_dict_metadata={"model.w": entry.with_attributes(size="ab")}),
        good.with_attributes(state_dict_metadata={"model.w": entry.with_attributes(chunks=7)}),
        b"\x80\x02" + b")" + b"\x85" * 2_000_000 + b"}q\x00(h\x00h\x00u.",
    ]
    for i, root in enumerate(forged):
        with pytest.raises((CheckpointError, UnsafeFileError), match=r"\.metadata"):
            read_dcp(hostile(tmp_path / str(i), root))


def test_a_tuple_nested_deep_as_a_key_does_not_end_the_process(tmp_path: Path) -> None:
    deep = b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns."
    with pytest.raises(CheckpointError, match=r"expected a Metadata"):
        read_dcp(hostile(tmp_path / "deep", deep))


def test_an_item_that_claims_more_than_its_window_is_refused(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.tensor("model.w", array(2, 2))
    data = bytes(folder.files["__0_0.distcp"])
    size = zipfile.ZipFile(io.BytesIO(data)).getinfo("archive/data/0").file_size
    grown = data.replace(struct.pack("<I", size) * 2, struct.pack("<I", 1 << 20) * 2)
    assert grown != data
    folder.files["__0_0.distcp"] = bytearray(grown) + bytes(1 << 21)
    with pytest.raises(CheckpointError, match=r"model.w"):
        whole(read_dcp(folder.write()), "w", MASTER)


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_was_stored_with_strides(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import torch.distributed.checkpoint as dcp

    dcp.save({"model": {"w": torch.arange(12.0).view(3, 4).t()}}, checkpoint_id=str(tmp_path), no_dist=True)
    found = read_dcp(str(tmp_path))
    ((fragment,),) = found.stored.pieces["w", MASTER].values()
    assert fragment.stored.strides == (1, 4)
    same(found, "w", MASTER, np.ascontiguousarray(np.arange(12, dtype=np.float32).reshape(3, 4).T))


def test_a_layer_that_two_chunks_of_a_stack_hold_is_refused(tmp_path: Path) -> None:
    folder = megatron(tmp_path / "it")
    folder.tensor("decoder.layers.norm.weight", array(2, 3), [(0, (0, 0), (2, 3)), (1, (1, 0), (1, 3))])
    with pytest.raises(CheckpointError, match=r"\(3,\) elements at \(0,\) are held by two chunks"):
        read_dcp(folder.write())


def test_a_chunk_of_several_layers_is_windows_of_it(tmp_path: Path) -> None:
    folder = megatron(tmp_path / "it")
    values = array(3, 2, 2)
    folder.tensor("decoder.layers.w", values, [(0, (0, 0, 0), (2, 2, 2)), (1, (2, 0, 0), (1, 2, 2))])
    found = read_dcp(folder.write())
    for layer in range(3):
        same(found, f"decoder.layers.{layer}.w", MASTER, values[layer])


@pytest.mark.slow
def test_files_of_safetensors_say_byte_0_of_every_item(tmp_path: Path) -> None:
    """torch's own reader cannot read them back; tensors of one shape are no copies of each other."""
    torch, dcp = map(pytest.importorskip, ("torch", "torch.distributed.checkpoint"))
    weights = {f"layers.{i}.weight": torch.full((4, 3), float(i)) for i in range(3)}
    kind = dcp.filesystem.SerializationFormat.SAFETENSORS
    dcp.save(weights, storage_writer=dcp.FileSystemWriter(str(tmp_path / "run"), serialization_format=kind))
    ckpt = ckptlab.open(tmp_path / "run")
    assert list(ckpt) == list(weights)
    assert not any(tensor.aliases for tensor in ckpt.values())
    for name, array in ckpt.full(ckpt.states[0], stack=False).items():
        assert array.values.tolist() == weights[name].tolist()
