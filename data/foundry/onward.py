"""Does a program of torch's own go on from a folder of torch.distributed.checkpoint as DeepSpeed does from its files?

DeepSpeed resumes the checkpoint that it saved itself and trains one step; ranks of FSDP2, with torch's AdamW and the
same batch, load the folder by `dcp.load` and train that step too. What the latter hold after loading is compared bit by
bit with the truth of the case, and their weights after the step with DeepSpeed's: computed in another order, hence
nearly.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from foundry.models import TensorParallel, initialise_parallel, initialise_plain
from foundry.parallel import ParallelLoss, pipeline_layers
from foundry.plain import PlainTransformer
from foundry.ranks import run_ranks
from foundry.train import Case, Run, micro_batches, parameter_groups
from foundry.truth import MOMENTS, Truth, differences, gather, load

SALT = 7  # of initial weights that are not those of the case
CLIP = 1.0  # of the gradient's norm, as DeepSpeed is told


def judge(folder: Path, case_folder: Path, world: int, tp: int, forget: bool) -> dict[str, Any]:
    """Load `folder` into FSDP2 on `world` ranks, of which `tp` cut the feed-forward layers, and compare.

    forget: throw the moments away after loading, to see that they matter. `differences`: what is not as saved;
    `apart`: how far the tensor that is furthest from DeepSpeed's after the step is, as a part of the longest way that
    DeepSpeed moved any element. (Not of that tensor: biases of keys have no gradient but rounding.)
    """
    truth, description = load(case_folder)
    case = Case(**description["case"])
    with tempfile.TemporaryDirectory(prefix="onward-") as scratch:
        known, report = case_folder / "next.safetensors", Path(scratch, "report.json")
        if not known.exists():
            run_ranks(_deepspeed, case.world, case, case_folder, known)
        expected = safetensors.torch.load_file(known)
        run_ranks(_fsdp, world, case, folder, tp, forget, truth, expected, report)
        return json.loads(report.read_text())


def _deepspeed(rank: int, case: Case, folder: Path, out: Path) -> None:
    """DeepSpeed's weights one step after those that it saved."""
    run = Run(case, rank, salt=SALT)
    path, _ = run.engine.load_checkpoint(str(folder))
    assert path is not None
    run.step(run.engine.global_steps + 1)
    weights = gather(run).tensors
    if rank == 0:
        held = {key: t.contiguous() for key, t in weights.items() if key.startswith("master/")}
        safetensors.torch.save_file(held, out)


def _fsdp(
    rank: int,
    case: Case,
    folder: Path,
    tp: int,
    forget: bool,
    truth: Truth,
    expected: dict[str, Tensor],
    report: Path,
) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))
    model = _model(case)
    for block in model.blocks if isinstance(model, PlainTransformer) else ():
        if tp > 1:  # of odd widths, which only DTensors know of
            plan = {"fc1": ColwiseParallel(use_local_output=False), "fc2": RowwiseParallel()}
            parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=1.0)
    weights, states = get_state_dict(model, optimizer)
    for group in states["param_groups"]:
        group.pop("name")
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    wrong = differences(_held(model, optimizer, case), _trained(truth))
    if forget:
        optimizer.state.clear()
    before = {name: _whole(p.detach()) for name, p in model.named_parameters()}
    loss = _step(model, optimizer, case, rank // tp, world // tp)
    apart, moved = {}, 0.0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            after = expected[f"master/{name}"].double()
            now, then = (t[: len(after)].double() for t in (_whole(parameter.detach()), before[name]))
            apart[name] = float((now - after).abs().max())
            moved = max(moved, float((after - then).abs().max()))
    furthest = max(apart, key=lambda name: apart[name])
    if rank == 0:
        result = {"differences": wrong, "tensor": furthest, "apart": apart[furthest] / moved, "loss": loss}
        report.write_text(json.dumps(result | {"compared": len(apart)}))


def _model(case: Case) -> nn.Module:
    """The case's model, whole, with other weights."""
    if case.parallel:
        from deepspeed.pipe import PipelineModule

        tp = TensorParallel()
        loss = ParallelLoss(case.config, tp)
        layers = pipeline_layers(case.config, tp)
        model = PipelineModule(layers, num_stages=1, loss_fn=loss, seed_layers=False)
        initialise_parallel(model, case.config, tp, SALT)
        return model
    model = PlainTransformer(case.config)
    initialise_plain(model, case.config, salt=SALT)
    return model


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case, dp_rank: int, dp: int) -> float:
    """One step as DeepSpeed's engine takes it; returns this rank's loss."""
    batches = list(micro_batches(replace(case, dp=dp), case.saved_step + 1, dp_rank))
    losses = []
    for tokens, labels in batches:
        loss = model.loss_fn(model(tokens), labels) if case.parallel else model(tokens, labels)
        (loss / len(batches)).backward()
        losses.append(float(loss.detach()))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = torch.stack([_whole(grad).norm() for grad in grads]).norm()
    for grad in grads:
        grad.mul_(min(1.0, CLIP / (float(norm) + 1e-6)))
    optimizer.step()
    return sum(losses) / len(losses)


def _trained(truth: Truth) -> Truth:
    kept = ("master", *MOMENTS)
    return Truth({key: t for key, t in truth.tensors.items() if key.split("/", 1)[0] in kept})


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, case: Case) -> Truth:
    """What a program holds, whole; vocabularies without their padding."""
    found = {}
    for name, parameter in model.named_parameters():
        states = {"master": parameter.detach(), **{m: optimizer.state.get(parameter, {}).get(m) for m in MOMENTS}}
        for state, value in states.items():
            if value is not None:
                found[f"{state}/{name}"] = _unpadded(_whole(value), case)
    return Truth(found)


def _unpadded(tensor: Tensor, case: Case) -> Tensor:
    padded = case.parallel and tensor.shape[:1] == (case.config.padded_vocab(1),)
    return tensor[: case.config.vocab] if padded else tensor


def _whole(value: Any) -> Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value
