"""Make the checkpoint that FSDP2 saves: `python data/foundry/fsdp.py [--out DIR]`. Neither DeepSpeed nor ckptlab.

A small network on two dp ranks (FSDP2) times two tp ranks (tensor parallel), three steps of AdamW with two parameter
groups, saved by torch.distributed.checkpoint; the truth is gathered inside the ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

CASE = "fsdp2_tp2_dp2"
DP, TP, STEPS, LR = 2, 2, 3, 1e-2
VOCABULARY, HIDDEN, FFN, LAYERS = 61, 12, 28, 3


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(HIDDEN)
        self.up = torch.nn.Linear(HIDDEN, FFN)
        self.down = torch.nn.Linear(FFN, HIDDEN, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = torch.nn.ModuleList(Block() for _ in range(LAYERS))
        self.head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def work(rank: int, scratch: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{scratch}/rendezvous", rank=rank, world_size=DP * TP)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Network()
    mesh = init_device_mesh("cpu", (DP, TP), mesh_dim_names=("dp", "tp"))
    for layer in model.layers:
        parallelize_module(layer, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    named = dict(model.named_parameters())
    groups = [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    data = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (DP, 8), generator=data)[mesh.get_local_rank("dp")]
        loss = functional.cross_entropy(model(tokens[:-1]), tokens[1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    weights, states = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": states, "train_state": {"step": STEPS}}, checkpoint_id=out)
    truth = {f"master/{name}": _whole(value) for name, value in weights.items()}
    truth |= {f"{s}/{n}": _whole(its[s]) for n, its in states["state"].items() for s in ("exp_avg", "exp_avg_sq")}
    if rank == 0:
        save_file(truth, f"{out}/../truth.safetensors")
        placements = {name: str(value.placements) for name, value in weights.items()}
        about = {"name": CASE, "torch": torch.__version__, "mesh": {"dp": DP, "tp": TP}, "step": STEPS, "lr": LR}
        text = json.dumps({**about, "losses": losses, "placements": placements}, indent=1, sort_keys=True)
        Path(out, "../truth.json").write_text(text + "\n")
    dist.destroy_process_group()


def _whole(value: Any) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone().contiguous()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1])
    folder = parser.parse_args().out
    (folder / CASE).mkdir(parents=True)
    os.chdir(folder)  # torch writes the path that it is given into .metadata
    with tempfile.TemporaryDirectory() as scratch:
        torch.multiprocessing.spawn(work, (scratch, f"{CASE}/step-{STEPS}"), nprocs=DP * TP)


if __name__ == "__main__":
    main()
