"""The ranks of a training job as processes of this machine: CPU, gloo, one thread each."""

from __future__ import annotations

import gc
import importlib
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

# DeepSpeed and the thread pools read these when they are imported.
os.environ |= {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}

import torch
import torch.multiprocessing
from torch.multiprocessing.spawn import ProcessException

IMPORTED_LATE = (
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "numpy.ctypeslib",
    "torch._dynamo",
    "torch.utils.cpp_extension",
    "torch.utils.serialization.config",
    "transformers.cache_utils",
)
"""What engines import as they are made and trained, where it is installed."""
PATIENCE = timedelta(minutes=20)
"""How long a rank waits for another one."""


class RankError(Exception):
    """A rank failed; the message is the last of what it printed."""


def preload() -> None:
    """Import what ranks would import, each for itself: some seconds, once for all that are forked from here."""
    import deepspeed

    for late in IMPORTED_LATE:
        with suppress(ImportError):
            importlib.import_module(late)
    # Else DeepSpeed compiles an all-reduce in shared memory, and each rank leaves 66 MiB in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_printoptions(threshold=1, edgeitems=1)  # ZeRO-3 formats every parameter for what it does not print
    gc.freeze()  # DeepSpeed collects garbage often: not in what all ranks share, which would then be copied


def run_ranks(work: Callable[..., None], world: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in `world` processes that have joined one process group, forked from this one.

    Raises RankError when a rank fails; the others are then ended.
    """
    preload()
    with tempfile.TemporaryDirectory(prefix="foundry-") as scratch:
        try:
            torch.multiprocessing.start_processes(
                _rank,
                args=(work, world, Path(scratch), arguments),
                nprocs=world,
                daemon=True,
                start_method="fork",
            )
        except ProcessException as error:
            log = Path(scratch, f"rank{error.error_index}.log")
            tail = log.read_text(errors="replace").splitlines()[-30:] if log.exists() else []
            raise RankError("\n".join([f"rank {error.error_index} of {world} failed", *tail, str(error)])) from error


def _rank(rank: int, work: Callable[..., None], world: int, scratch: Path, arguments: tuple[Any, ...]) -> None:
    with open(scratch / f"rank{rank}.log", "w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
    }
    torch.set_num_threads(1)
    import deepspeed

    deepspeed.init_distributed(
        "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=PATIENCE,
        init_method=f"file://{scratch}/rendezvous",
        rank=rank,
        world_size=world,
    )
    work(rank, *arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
