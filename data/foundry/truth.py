"""The truth about a checkpoint: whole tensors, gathered inside the training ranks, and their comparison.

Tensors go by `state/name`: the states `master`, `exp_avg`, `exp_avg_sq` and `param` (in the training dtype) of
each trained tensor, `frozen` and `buffer` for the rest. Vocabularies are cut to their true size.
`truth.safetensors` beside a checkpoint holds them, and `truth.json` all else that was true.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from foundry.autoep import EXPERTS
from foundry.autotp import cut_dim
from foundry.models import cut_of, global_name, is_vocabulary, unshard
from foundry.train import Case, Run

MOMENTS = ("exp_avg", "exp_avg_sq")
Gathered = tuple[dict[str, int], dict[str, Tensor], dict[str, str]]
"""A rank's coordinate, tensors and settings."""


def tied_names(module: nn.Module) -> dict[str, str]:
    """Alias → first name, of parameters that have several."""
    first: dict[int, str] = {}
    ties = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            ties[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return ties


@dataclass
class Truth:
    """What an engine held: whole tensors by `state/name`, the optimizer's settings for each trained tensor,
    and the `state/name` whose copies on several tp ranks or pp stages were not equal."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    settings: dict[str, str] = field(default_factory=dict)
    copies_differ: list[str] = field(default_factory=list)


def gather(run: Run) -> Truth | None:
    """The truth about a running engine, from all its ranks; None but on rank 0. Of pipeline copies the first stage's is
    taken."""
    mine, settings = _over_dp(run)
    if run.coordinate["dp"]:  # where all is as on the first dp rank, but experts
        mine = {key: tensor for key, tensor in mine.items() if "experts" in key}
    every = _on_rank_0(run, mine, settings)
    if every is None:
        return None
    if run.case.autoep:
        _over_ep([tensors for _, tensors, _ in every], run.case.ep)  # in the order of their numbers, whatever tp is
    held = {(c["pp"], c["tp"]): tensors for c, tensors, _ in every if c["dp"] == 0}
    for c, tensors, _ in every:  # other dp ranks have other experts
        held[c["pp"], c["tp"]] = tensors | held[c["pp"], c["tp"]]
    truth = Truth()
    for stage in range(run.case.pp):
        of_stage = [held[stage, tp] for tp in range(run.case.tp)]
        for key in dict.fromkeys(key for tensors in of_stage for key in tensors):  # tp ranks may have other experts
            tensor, equal = _over_tp(key, [tensors[key] for tensors in of_stage if key in tensors], run.case)
            first = truth.tensors.setdefault(key, tensor)
            if not equal or not same_bits(first, tensor):
                truth.copies_differ.append(key)
    names = dict.fromkeys(name for _, _, theirs in every for name in theirs)
    for name in names:
        on_ranks = {theirs[name] for _, _, theirs in every if name in theirs}
        truth.settings[name] = " or, on other ranks, ".join(sorted(on_ranks))
    return truth


def _on_rank_0(run: Run, tensors: dict[str, Tensor], settings: dict[str, str]) -> list[Gathered] | None:
    """What all ranks have, on rank 0. As files in memory: tensors pickled one by one take ten times as long."""
    every: list[Any] | None = [None] * run.case.world if torch.distributed.get_rank() == 0 else None
    mine = run.coordinate, [*tensors], safetensors.torch.save(tensors), settings
    torch.distributed.gather_object(mine, every)
    if every is None:
        return None
    files = [safetensors.torch.load(file) for _, _, file, _ in every]
    return [(c, {key: held[key] for key in keys}, s) for (c, keys, _, s), held in zip(every, files, strict=True)]


def _over_ep(ranks: list[dict[str, Tensor]], ep: int) -> None:
    """Put all experts of a layer into every rank's tensors; ranks that follow one another have what follows."""
    for key in ranks[0]:
        if EXPERTS.fullmatch(key):
            groups = [ranks[first : first + ep] for first in range(0, len(ranks), ep)]
            for group in groups:
                whole = torch.cat([tensors[key] for tensors in group])
                for tensors in group:
                    tensors[key] = whole


def _over_tp(key: str, shards: list[Tensor], case: Case) -> tuple[Tensor, bool]:
    """One tensor of one stage, and whether its tensor-parallel replicas are equal."""
    name = key.split("/", 1)[1]
    if (case.autotp or case.autoep) and (dim := cut_dim(name)) is not None:
        return torch.cat(shards, dim), True
    cut = cut_of(name, case.config, case.tp) if case.parallel else None
    tensor = unshard(shards, cut)
    if case.parallel and is_vocabulary(name):
        tensor = tensor[: case.config.vocab]
    return tensor, cut is not None or all(same_bits(copy, shards[0]) for copy in shards)


def _over_dp(run: Run) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What this (pp, tp) coordinate holds, whole over dp, and the settings of its trained tensors."""
    import deepspeed

    module = run.engine.module
    masters = {id(parameter): (states, setting) for parameter, states, setting in _masters(run)}
    tensors, settings = {}, {}
    for local, parameter in module.named_parameters():
        name = global_name(local, run.case.config, run.expert_rank)
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            weight = parameter.detach().clone()
        if not parameter.requires_grad:
            tensors[f"frozen/{name}"] = weight
            continue
        if not weight.numel():  # of which AutoTP leaves this rank nothing: no optimizer has it
            tensors |= {f"{state}/{name}": weight.float() for state in ("master", *MOMENTS)}
            tensors[f"param/{name}"] = weight
            continue
        states, settings[name] = masters[id(parameter)]
        tensors |= {f"{state}/{name}": flat.reshape(weight.shape) for state, flat in states.items()}
        tensors[f"param/{name}"] = weight
    saved = {} if run.case.parallel else module.state_dict()
    tensors |= {f"buffer/{name}": b.clone() for name, b in module.named_buffers() if name in saved}
    return tensors, settings


def _masters(run: Run) -> Iterator[tuple[nn.Parameter, dict[str, Tensor], str]]:
    """Each trained parameter of this (pp, tp) coordinate, its whole flat master states, and its settings.

    Stages up to 2 are read from the optimizer's flat buffers: DeepSpeed's own safe_get_full_* misplaces
    parameters under round_robin_gradients, misses moments after the first step, and turns -0.0 into 0.0.
    """
    optimizer = run.engine.optimizer
    if run.case.zero == 3:
        yield from _sharded_masters(run)
        return
    if run.case.zero == 0 and not hasattr(optimizer, "bf16_groups"):
        yield from _whole_masters(optimizer)
        return
    for group, (parameters, offsets) in enumerate(_flat_groups(optimizer)):
        settings = optimizer.optimizer.param_groups[group]
        master = settings["params"][0].detach()
        kept = optimizer.optimizer.state[settings["params"][0]]
        # A moment that a load left out or cut short is to be reported, not to stop this rank alone.
        lost = torch.full_like(master, torch.nan)
        states = {m: kept[m] if m in kept and kept[m].shape == master.shape else lost for m in MOMENTS}
        process_group = optimizer.real_dp_process_group[group]
        flat = {state: _all_gather(t, process_group) for state, t in ({"master": master} | states).items()}
        for parameter, start in zip(parameters, offsets, strict=True):
            mine = {state: t[start : start + parameter.numel()].clone() for state, t in flat.items()}
            yield parameter, mine, _setting(kept, settings)


def _whole_masters(optimizer: Any) -> Iterator[tuple[nn.Parameter, dict[str, Tensor], str]]:
    """`_masters` without ZeRO: of DeepSpeed's FP16_UnfusedOptimizer, or torch's own in float32."""
    inner = getattr(optimizer, "optimizer", optimizer)
    own = [group["params"] for group in inner.param_groups]
    for group, masters, parameters in zip(
        inner.param_groups, getattr(optimizer, "fp32_groups", own), getattr(optimizer, "fp16_groups", own), strict=True
    ):
        for master, parameter in zip(masters, parameters, strict=True):
            kept = inner.state[master]
            lost = torch.full_like(master, torch.nan)
            states = {m: kept[m] if m in kept and kept[m].shape == master.shape else lost for m in MOMENTS}
            flat = {state: t.detach().flatten().clone() for state, t in ({"master": master} | states).items()}
            yield parameter, flat, _setting(kept, group)


def _sharded_masters(run: Run) -> Iterator[tuple[nn.Parameter, dict[str, Tensor], str]]:
    """`_masters` for ZeRO-3."""
    optimizer = run.engine.optimizer
    for parameter in run.engine.module.parameters():
        if not parameter.requires_grad:
            continue
        states = {"master": optimizer.get_full_hp_param(parameter)}
        states |= {moment: optimizer.get_full_hp_param(parameter, moment) for moment in MOMENTS}
        sub_group = optimizer.grad_position[optimizer.get_param_id(parameter)][0]
        kept = optimizer.optimizer.state[optimizer.fp32_partitioned_groups_flat[sub_group]]
        settings = optimizer.optimizer.param_groups[optimizer.sub_group_to_group_id[sub_group]]
        flat = {state: tensor.detach().flatten().clone() for state, tensor in states.items()}
        yield parameter, flat, _setting(kept, settings)


def _setting(kept: dict[str, Any], group: dict[str, Any]) -> str:
    step = float(kept.get("step", torch.nan))
    return f"step {step:g}, lr {float(group['lr']):g}, weight decay {group['weight_decay']:g}"


def _flat_groups(optimizer: Any) -> Iterator[tuple[list[nn.Parameter], list[int]]]:
    """The parameters of each flat buffer in the order they lie there, and where each one starts."""
    if hasattr(optimizer, "round_robin_bit16_groups"):
        yield from zip(optimizer.round_robin_bit16_groups, optimizer.round_robin_bit16_offsets, strict=True)
        return
    for parameters in optimizer.bf16_groups:
        starts = [0]
        for parameter in parameters:
            starts.append(starts[-1] + parameter.numel())
        yield parameters, starts[:-1]


def _all_gather(part: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(part) for _ in range(torch.distributed.get_world_size(group))]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def _elements(tensor: Tensor) -> Tensor:
    """Bits, as (element, byte)."""
    return tensor.contiguous().reshape(-1, 1).view(torch.uint8)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether dtype, shape and every bit are equal (NaN equals the same NaN, 0.0 does not equal -0.0)."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_elements(a), _elements(b))


def differences(got: Truth, want: Truth) -> dict[str, str]:
    """What is wrong with each `state/name` of `want` that `got` does not hold bit by bit.

    Settings that are not the same go by `settings/name`, copies that disagree in `got` alone by
    `copies of state/name`.
    """
    found = {}
    for key, tensor in want.tensors.items():
        have = got.tensors.get(key)
        if have is None:
            found[key] = "missing"
        elif have.dtype != tensor.dtype or have.shape != tensor.shape:
            expected, found_instead = (f"{t.dtype} {tuple(t.shape)}" for t in (tensor, have))
            found[key] = f"expected {expected}, found {found_instead}"
        elif not same_bits(have, tensor):
            wrong = int((_elements(have) != _elements(tensor)).any(1).sum())
            largest = float((have.double() - tensor.double()).abs().max())
            found[key] = f"{wrong} of {tensor.numel()} elements differ, by up to {largest:.3g}"
    for name, setting in want.settings.items():
        if got.settings.get(name) != setting:
            found[f"settings/{name}"] = f"expected {setting}; found {got.settings.get(name)}"
    for key in set(got.copies_differ) - set(want.copies_differ):
        found[f"copies of {key}"] = "differ between tp ranks or pp stages"
    return found


def save(truth: Truth, folder: Path, description: dict[str, Any]) -> None:
    """Write `truth.safetensors` and `truth.json` (with the `description`) into `folder`."""
    tensors = {key: tensor.contiguous() for key, tensor in sorted(truth.tensors.items())}
    safetensors.torch.save_file(tensors, folder / "truth.safetensors")
    whole = description | {"copies_differ": truth.copies_differ, "settings": truth.settings}
    (folder / "truth.json").write_text(json.dumps(whole, indent=1) + "\n")


def load(folder: Path) -> tuple[Truth, dict[str, Any]]:
    """What `save` wrote: the truth, and the whole of `truth.json`."""
    description = json.loads((folder / "truth.json").read_text())
    tensors = safetensors.torch.load_file(folder / "truth.safetensors")
    return Truth(tensors, description["settings"], description["copies_differ"]), description


def in_dtype(truth: Truth, dtype: torch.dtype) -> Truth:
    """The truth as a run in another dtype has it: module weights are rounded from the master weights."""
    tensors = dict(truth.tensors)
    for key, tensor in truth.tensors.items():
        state, name = key.split("/", 1)
        if state == "param":
            tensors[key] = truth.tensors[f"master/{name}"].to(dtype)
        elif state in ("frozen", "buffer") and tensor.is_floating_point():
            tensors[key] = tensor.to(dtype)
    return Truth(tensors, truth.settings, truth.copies_differ)
