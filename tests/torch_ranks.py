"""Ranks of torch.distributed, for tests: they load a DCP folder as FSDP2 and tensor parallelism do, save one, or run a
script of their own.

They are forked from a process that has imported what they need: importing it takes longer than all that they do.
"""

from __future__ import annotations

import multiprocessing
import runpy
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from compare import same_bits, whole
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckptlab
from ckptlab.catalog import MASTER

IMPORTED = (
    *("torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict"),
    *("xarray", "dask.array", "ckptlab.checkpoint", "ckptlab.views.placed", "ckptlab.arrays.live"),
)
"""Of these multiprocessing leaves out what is not installed."""


def small_model() -> Any:
    """Widths that no number of ranks divides."""
    return torch.nn.Sequential(OrderedDict(up=torch.nn.Linear(6, 10), down=torch.nn.Linear(10, 7)))


def run(script: Path, ranks: int) -> None:
    """Run a script as so many ranks, `script RANK STORE`: STORE is a path for a rendezvous. An error where one fails,
    with the rank's."""
    _start(_script, ranks, str(script), f"{script}.store")


def load(folder: Path, source: Path, ranks: int, tp: int, scratch: Path) -> None:
    """Load `folder` on so many ranks. An error where a state of one is not that of `source`, bit for bit."""
    _start(_load, ranks, ranks, tp, str(folder), str(source), str(scratch / "rendezvous"))


def save_distributed(folder: Path, scratch: Path) -> None:
    """Two ranks save with torch's HuggingFaceStorageWriter, each its own boxes."""
    _start(_save_distributed, 2, str(folder), str(scratch / "rendezvous"))


def _start(work: Callable[..., None], ranks: int, *arguments: Any) -> None:
    multiprocessing.set_forkserver_preload([*IMPORTED])
    torch.multiprocessing.start_processes(work, arguments, nprocs=ranks, start_method="forkserver")


def _script(rank: int, *command: str) -> None:
    torch.set_num_threads(1)
    sys.argv = [command[0], str(rank), *command[1:]]
    runpy.run_path(command[0], run_name="__main__")


def _load(rank: int, ranks: int, tp: int, folder: str, source: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, init_method=f"file://{rendezvous}")
    try:
        torch.manual_seed(rank + 5)
        model = small_model()
        mesh = init_device_mesh("cpu", (ranks // tp, tp), mesh_dim_names=("dp", "tp"))
        if tp > 1:
            parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
        weights, states = get_state_dict(model, optimizer)
        dcp.load({"model": weights, "optimizer": states}, checkpoint_id=folder)
        ckpt = ckptlab.open(source)
        for name in ckpt:
            for state in (MASTER, "exp_avg", "exp_avg_sq"):
                found = weights[name] if state == MASTER else states["state"][name][state]
                found = found.full_tensor() if isinstance(found, DTensor) else found
                assert same_bits(found.detach().numpy(), whole(ckpt.catalog, name, state)), f"{name}: {state}"
        assert states["param_groups"][0]["lr"] == 0.25
        assert all(float(s["step"]) == 2 for s in states["state"].values())
    finally:
        dist.destroy_process_group()


def _save_distributed(rank: int, folder: str, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{rendezvous}")
    try:
        mesh = init_device_mesh("cpu", (2,))
        table = torch.arange(35.0).reshape(7, 5)
        state = {
            "rows": distribute_tensor(table, mesh, [Shard(0)]),
            "columns": distribute_tensor(table, mesh, [Shard(1)]),
            "whole": distribute_tensor(torch.arange(3.0), mesh, [Replicate()]),
        }
        dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(folder, save_distributed=True))
    finally:
        dist.destroy_process_group()
