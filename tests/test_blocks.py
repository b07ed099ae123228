"""Layouts in jax's and torch's words: what their shards are is what our cuts say (jax in a process with 8 devices)."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest

from ckptlab import Layout, LayoutError, Mesh

pytest.importorskip("torch")
pytest.importorskip("jax")

SAID = [
    (Layout("(tp out) in"), (8, 6)),
    (Layout("out (tp in)"), (3, 8)),
    (Layout("out in"), (3, 5)),
    (Layout("(tp head qkv d) in", sizes={"head": 2, "qkv": 3}), (24, 2)),
    (Layout("(dp tp out) in"), (16, 3)),
    (Layout("(tp out) (dp in)"), (4, 6)),
    (Layout("(tp (q + k))", sizes={"k": 2}), (12,)),
    (Layout("(tp out) in", padded={0: 8}), (7, 6)),
    (Layout("(tp out)", sizes={"out": (2, 2, 2, 2)}), (8,)),
]


JAX = """
import os, pickle, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, numpy as np
from jax.sharding import Mesh as Devices, NamedSharding
from ckptlab import Mesh

devices = Devices(np.array(jax.devices()).reshape(2, 4), ("dp", "tp"))
mesh = Mesh.from_device_mesh(devices)
assert mesh == Mesh(dp=2, tp=4)
for layout, shape in pickle.load(sys.stdin.buffer):
    cut = layout.resolve(shape, mesh)
    whole = np.arange(np.prod(cut.shape)).reshape(cut.shape)
    for spec in (layout.partition_spec(), layout.partition_spec(mesh)):
        placed = jax.device_put(whole, NamedSharding(devices, spec))
        for piece in placed.addressable_shards:
            coordinate = mesh.coordinate(piece.device.id)
            rows = [dim.owned[tuple(coordinate[a] for a in dim.axes)] for dim in cut.dims]
            at = [np.concatenate([np.arange(r[0], r[0] + r[2]) for r in one.tolist()]) for one in rows]
            assert (np.asarray(piece.data) == whole[np.ix_(*at)]).all(), (layout, piece.device)
"""


@pytest.mark.slow
def test_jax_cuts_as_the_layout_does() -> None:
    command = [sys.executable, "-c", JAX]
    done = subprocess.run(command, input=pickle.dumps(SAID), capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr.decode()[-3000:]


@pytest.mark.slow
def test_torch_cuts_as_the_layout_does() -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    for rank in range(8):  # a process group that sends nothing: each rank asks what it would hold
        dist.init_process_group("fake", rank=rank, world_size=8, store=FakeStore())
        try:
            devices = init_device_mesh("cpu", (2, 4), mesh_dim_names=("dp", "tp"))
            mesh = Mesh.from_device_mesh(devices)
            for layout, shape in SAID:
                cut = layout.resolve(shape, mesh)
                whole = torch.arange(torch.Size(cut.shape).numel()).reshape(cut.shape)
                assert layout.placements(mesh)[1:] == layout.placements(devices)  # ours has pp first
                local = distribute_tensor(whole, devices, layout.placements(devices), src_data_rank=None).to_local()
                coordinate = mesh.coordinate(rank)
                expected = whole
                for i, dim in enumerate(cut.dims):
                    rows = dim.owned[tuple(coordinate[a] for a in dim.axes)].tolist()
                    at = torch.cat([torch.arange(r[0], r[0] + r[2]) for r in rows])
                    expected = expected.index_select(i, at)
                assert torch.equal(local, expected), (layout, rank)
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (Layout("(3 tp out) in"), "part by part"),
        (Layout("(head tp d) in"), "part by part"),
        (Layout("((tp q) + k) in"), "part by part"),
        (Layout("(tp ((dp q) + k)) in"), "part by part"),
        (Layout("(tp out) in", sizes={"out": (3, 2)}), "unevenly"),
    ],
    ids=str,
)
def test_what_no_blocks_say_is_refused(layout: Layout, says: str) -> None:
    for of_library in (layout.partition_spec, layout.placements):
        with pytest.raises(LayoutError, match=says):
            of_library(Mesh(tp=2, dp=2))


def test_an_axis_of_degree_1_cuts_nothing() -> None:
    from jax.sharding import PartitionSpec
    from torch.distributed.tensor import Replicate, Shard

    fused = Layout("(3 tp out) (dp in)")
    assert fused.partition_spec(Mesh(dp=2)) == PartitionSpec(None, "dp")
    assert fused.placements(Mesh(dp=2)) == (Replicate(), Shard(1), Replicate())
    experts = Layout("(ep expert) (edp out)")
    assert experts.partition_spec() == PartitionSpec("ep", None)  # edp is a length until a mesh has it
    assert experts.partition_spec(Mesh(ep=2, edp=2)) == PartitionSpec("ep", "edp")
    parted = Mesh(tp=4).split("tp", kv=2, rep=2)
    assert Layout("(tp q)").partition_spec(parted) == PartitionSpec(("kv", "rep"))
    assert Layout("(kv k)").partition_spec(parted) == PartitionSpec("kv")


def test_what_torch_alone_cannot_say() -> None:
    with pytest.raises(LayoutError, match="in the order of the mesh"):
        Layout("(tp dp out)").placements(Mesh(tp=2, dp=2))
    with pytest.raises(LayoutError, match="mesh of one stage"):
        Layout("(tp out)").placements(Mesh(tp=2, pp=2))


def test_parts_of_a_sum_are_partial_and_no_copies() -> None:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh = Mesh(dp=2, tp=2)
    assert Layout("out", replicas="sum").placements(mesh) == (Replicate(), Replicate(), Partial("sum"))
    assert Layout("out", replicas="mean").placements(mesh) == (Replicate(), Replicate(), Partial("avg"))
    assert Layout("(tp out)", replicas="sum").placements(mesh) == (Replicate(), Replicate(), Shard(0))
    with pytest.raises(LayoutError, match="parts of a sum"):
        Layout("out", replicas="sum").partition_spec(mesh)
