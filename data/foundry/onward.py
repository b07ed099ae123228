"""Does a program of torch's own go on from a folder of torch.distributed.checkpoint as the run itself does?

Ranks of FSDP2 (and tensor parallelism), with torch's AdamW and the run's next batch, load the folder by `dcp.load` and
train one step. What they hold after loading is compared bit by bit with the truth of the case, and their weights after
the step with those that the run had which saved it, DeepSpeed's or a Megatron's: computed in another order, hence
nearly. As a control the step is trained a second time, from the same weights and without the moments.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

# imported before ranks are forked, or each would take its seconds for them
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from foundry.gradients import CLIP, clipped, whole
from foundry.megatron import run_of
from foundry.models import TensorParallel, initialise_parallel, initialise_plain
from foundry.parallel import ColumnParallelLinear, ParallelLoss, ParallelTransformerLayer, pipeline_layers
from foundry.plain import PlainTransformer
from foundry.ranks import run_ranks
from foundry.train import Case, micro_batches, parameter_groups
from foundry.truth import MOMENTS, Truth, differences, load

SALT = 7  # of initial weights that are not those of the case


class Trained(Protocol):
    """A run that was saved, for a program that goes on with it. `truth`: what it held; `expected`: its `master/name`
    one step later; `low`: what the model computes in where that is not its weights' dtype."""

    truth: Truth
    expected: dict[str, Tensor]
    low: torch.dtype | None

    def model(self, tp: int, salt: int) -> nn.Module:
        """The model, whole, with other weights."""

    def blocks(self, model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        """What FSDP shards by itself, and how tensor parallelism cuts it."""

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The optimizer's parameter groups."""

    def losses(self, model: nn.Module, dp_rank: int, dp: int) -> Iterator[Tensor]:
        """The parts of a dp rank's loss at the next step."""

    def same(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor as the truth has it, without padding."""


def judge(folder: Path, case_folder: Path, programs: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """Load `folder` into FSDP2 on so many ranks, of which `tp` cut layers, for each (ranks, tp); compare.

    `differences`: what is not as saved. `apart`: how far the element that is furthest from the run's after the step is,
    as a part of the longest way that the run moved any; `rms`: the same of all elements, root mean square. (Not of that
    tensor: biases of keys have no gradient but rounding.) `without`: `apart` of a step without moments.
    """
    if json.loads((case_folder / "truth.json").read_text()).get("kind") == "megatron":
        return judged(folder, run_of(case_folder), programs)
    return judged(folder, _deepspeed_run(case_folder), programs)


def judged(folder: Path, run: Trained, programs: Iterable[tuple[int, int]]) -> list[dict[str, Any]]:
    """`judge` of a run."""
    found = []
    for world, tp in programs:
        with tempfile.TemporaryDirectory(prefix="onward-") as scratch:
            report = Path(scratch, "report.json")
            run_ranks(_go_on, world, run, folder, tp, report)
            found.append(json.loads(report.read_text()))
    return found


@dataclass(frozen=True)
class DeepSpeedRun:
    """A run of `make.py` in float32."""

    case: Case
    truth: Truth
    expected: dict[str, Tensor]
    low: torch.dtype | None = None

    def model(self, tp: int, salt: int) -> nn.Module:
        config = self.case.config
        if not self.case.parallel:
            plain = PlainTransformer(config)
            initialise_plain(plain, config, salt=salt)
            return plain
        from deepspeed.pipe import PipelineModule

        alone = TensorParallel()
        layers = pipeline_layers(config, alone)
        model = PipelineModule(layers, num_stages=1, loss_fn=ParallelLoss(config, alone), seed_layers=False)
        initialise_parallel(model, config, alone, salt=salt)
        for layer in self._layers(model) if tp > 1 else ():  # torch cuts layers of its own alone
            for part in (layer.self_attention, layer.mlp):
                for name, old in part.named_children():
                    part.register_module(name, _linear(old))
        return model

    def _layers(self, model: nn.Module) -> list[Any]:
        return [m for m in model.modules() if isinstance(m, ParallelTransformerLayer)]

    def blocks(self, model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
        if isinstance(model, PlainTransformer):  # of odd widths, which only DTensors know of
            for block in model.blocks:
                yield block, {"fc1": ColwiseParallel(use_local_output=False), "fc2": RowwiseParallel()}
            return
        for layer in self._layers(model):
            yield (
                layer,
                {
                    "self_attention.query_key_value": ColwiseParallel(),
                    "self_attention.dense": RowwiseParallel(),
                    "mlp.dense_h_to_4h": ColwiseParallel(),
                    "mlp.dense_4h_to_h": RowwiseParallel(),
                },
            )

    def groups(self, model: nn.Module) -> list[dict[str, Any]]:
        return parameter_groups(model)

    def losses(self, model: nn.Module, dp_rank: int, dp: int) -> Iterator[Tensor]:
        batches = list(micro_batches(replace(self.case, dp=dp), self.case.saved_step + 1, dp_rank))
        for tokens, labels in batches:
            loss = model.loss_fn(model(tokens), labels) if self.case.parallel else model(tokens, labels)
            yield loss / len(batches)

    def same(self, name: str, tensor: Tensor) -> Tensor:
        config = self.case.config
        padded = self.case.parallel and tensor.shape[:1] == (config.padded_vocab(1),)
        return tensor[: config.vocab] if padded else tensor


def _linear(old: Any) -> nn.Linear:
    """torch's own layer over the same parameters."""
    column = isinstance(old, ColumnParallelLinear)
    made = nn.Linear(old.weight.shape[1], old.weight.shape[0], old.bias is not None)
    made.weight, made.bias = old.weight, old.bias
    assert column or type(old).__name__ == "RowParallelLinear"
    return made


def _deepspeed_run(folder: Path) -> DeepSpeedRun:
    truth, description = load(folder)
    kept = ("master", *MOMENTS)
    trained = Truth({key: t for key, t in truth.tensors.items() if key.split("/", 1)[0] in kept})
    return DeepSpeedRun(Case(**description["case"]), trained, safetensors.torch.load_file(folder / "next.safetensors"))


def _go_on(rank: int, run: Trained, folder: Path, tp: int, report: Path) -> None:
    """One rank of the program. Rank 0 writes the report."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))
    model = run.model(tp, SALT)
    policy = MixedPrecisionPolicy(param_dtype=run.low, reduce_dtype=torch.float32)
    for block, plan in run.blocks(model):
        if tp > 1:
            parallelize_module(block, mesh["tp"], plan)
        fully_shard(block, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    optimizer = torch.optim.AdamW(run.groups(model), lr=1.0)
    weights, states = get_state_dict(model, optimizer)
    for group in states["param_groups"]:
        group.pop("name", None)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states)
    wrong = differences(_held(model, optimizer, run), run.truth)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = _step(model, optimizer, run, rank // tp, world // tp)
    told = _apart(model, before, run)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    optimizer.state.clear()
    _step(model, optimizer, run, rank // tp, world // tp)
    without = _apart(model, before, run)["apart"]
    if rank == 0:
        report.write_text(json.dumps({**told, "differences": wrong, "without": without, "loss": loss}))


def _apart(model: nn.Module, before: dict[str, Tensor], run: Trained) -> dict[str, Any]:
    """How far the weights are from the run's, of which tensor most, and how many were compared."""
    apart, moved = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            now, then = (run.same(name, whole(t)).double() for t in (parameter.detach(), before[name]))
            after = run.expected[f"master/{name}"].double()
            apart[name], moved[name] = (now - after).abs(), (after - then).abs()
    furthest = max(apart, key=lambda name: float(apart[name].max()))
    longest = max(float(way.max()) for way in moved.values())
    squares = [float(torch.cat([way.flatten() for way in ways.values()]).square().sum()) for ways in (apart, moved)]
    return {
        "tensor": furthest,
        "apart": float(apart[furthest].max()) / longest,
        "rms": (squares[0] / squares[1]) ** 0.5,
        "compared": len(apart),
    }


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, run: Trained, dp_rank: int, dp: int) -> float:
    """One step; returns this rank's loss."""
    total = 0.0
    for loss in run.losses(model, dp_rank, dp):
        loss.backward()
        total += float(loss.detach())
    clipped([p.grad for p in model.parameters() if p.grad is not None], CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return total


def _held(model: nn.Module, optimizer: torch.optim.Optimizer, run: Trained) -> Truth:
    """What a program holds, whole; vocabularies as the truth has them."""
    found = {}
    for name, parameter in model.named_parameters():
        states = {"master": parameter.detach(), **{m: optimizer.state.get(parameter, {}).get(m) for m in MOMENTS}}
        for state, value in states.items():
            if value is not None:
                found[f"{state}/{name}"] = run.same(name, whole(value))
    return Truth(found)
