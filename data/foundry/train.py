"""One training run of a tiny model: its case, its engine, its data and its steps.

The whole batch of a step is the same on every mesh, so runs of one case on different meshes differ only in
rounding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from foundry import autoep, autotp
from foundry.models import CONFIGS, ModelConfig, TensorParallel, initialise_parallel, initialise_plain

BATCH = 24
LEARNING_RATE = 1e-2
DATA_FIRST = "use_data_before_expert_parallelism"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Case:
    """What is trained (a key of `models.CONFIGS`), on which mesh and how DeepSpeed keeps the optimizer.

    `grad_accum_dtype` "fp32" makes DeepSpeed take its BF16_Optimizer for ZeRO-1 in bf16. `zero_config` is added to
    DeepSpeed's `zero_optimization`, `config_extra` to its configuration. Experts are spread over `ep` of the dp ranks.
    At `earlier_steps` the run is saved too (its truth is of `saved_step`).
    """

    model: str
    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: int = 1
    zero: int = 1
    dtype: str = "bf16"
    grad_accum_dtype: str | None = None
    zero_config: dict[str, Any] = field(default_factory=dict)
    config_extra: dict[str, Any] = field(default_factory=dict)
    saved_step: int = 3
    further_steps: int = 2
    earlier_steps: tuple[int, ...] = ()

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp

    @property
    def mesh(self) -> dict[str, int]:
        return {"tp": self.tp, "pp": self.pp, "dp": self.dp}

    @property
    def parallel(self) -> bool:
        """Whether the model can be cut over tp and pp."""
        return not self.model.startswith("plain")

    @property
    def autotp(self) -> bool:
        """Whether DeepSpeed's AutoTP cuts the model."""
        return self.model == "plain_autotp"

    @property
    def autoep(self) -> bool:
        """Whether DeepSpeed's AutoEP spreads the model's experts."""
        return self.model.startswith("plain_autoep")

    @property
    def config(self) -> ModelConfig:
        return CONFIGS[self.model]


class Run:
    """One rank's part of a training run."""

    def __init__(self, case: Case, rank: int, salt: int = 0, universal: bool = False):
        """Build the model (another `salt`: other initial weights) and its engine, which loads checkpoints in
        DeepSpeed's universal format if `universal`. Every rank must do it."""
        import deepspeed

        if case.dtype == "fp16":
            _allow_fp16()
        # The client state holds these generators' states: they must not differ from one making of data/ to
        # the next.
        random.seed(rank)
        np.random.seed(rank)
        torch.manual_seed(rank)
        self.case = case
        # PipeModelDataParallelTopology's order of ranks: pp, then dp, then tp.
        self.coordinate = {
            "pp": rank // (case.dp * case.tp),
            "dp": rank // case.tp % case.dp,
            "tp": rank % case.tp,
        }
        model = self._parallel_model(salt) if case.parallel else self._plain_model(salt)
        self.engine, *_ = deepspeed.initialize(
            model=model, model_parameters=parameter_groups(model), config=_ds_config(case, universal)
        )

    def _parallel_model(self, salt: int) -> nn.Module:
        from deepspeed.pipe import PipelineModule
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        from foundry.parallel import ParallelLoss, gather_tokens_on_gloo, pipeline_layers

        case = self.case
        tp = TensorParallel(self.coordinate["tp"], case.tp, self._tensor_parallel_group())
        if case.config.experts and case.tp > 1:
            gather_tokens_on_gloo(tp)
        model = PipelineModule(
            layers=pipeline_layers(case.config, tp, case.ep),
            topology=PipeModelDataParallelTopology(num_pp=case.pp, num_mp=case.tp, num_dp=case.dp),
            loss_fn=ParallelLoss(case.config, tp),
            seed_layers=False,
            partition_method="type:transformer",
        )
        initialise_parallel(model, case.config, tp, self.expert_rank, salt)
        return model

    def _plain_model(self, salt: int) -> nn.Module:
        from foundry.plain import PlainTransformer

        case = self.case
        if case.autoep:
            model: nn.Module = autoep.AutoEPTransformer(case.config)
            initialise_plain(model, case.config, salt=salt)
            return model
        if case.config.experts:  # the groups must be there before experts have values
            from deepspeed.utils import groups

            groups._create_expert_and_data_parallel(
                case.ep, use_data_before_expert_parallel_=case.config_extra.get(DATA_FIRST, False)
            )
        model = autotp.AutoTPTransformer(case.config) if case.autotp else PlainTransformer(case.config, case.ep)
        initialise_plain(model, case.config, self.expert_rank, salt)
        return model

    @property
    def expert_rank(self) -> tuple[int, int]:
        """The rank in its expert-parallel group, and the group's size."""
        from deepspeed.utils import groups

        case = self.case
        if case.parallel:  # whose groups the engine makes, of ranks of dp and tp alike
            rank, ranks = self.coordinate["dp"] * case.tp + self.coordinate["tp"], case.dp * case.tp
            first = case.config_extra.get("use_data_before_expert_parallelism")
            return rank // (ranks // case.ep) if first else rank % case.ep, case.ep
        return (groups._get_expert_parallel_rank(f"ep_size_{case.ep}"), case.ep) if case.config.experts else (0, 1)

    def _tensor_parallel_group(self) -> Any:
        mine = None
        for first in range(0, self.case.world, self.case.tp):
            members = list(range(first, first + self.case.tp))
            group = torch.distributed.new_group(members)
            if torch.distributed.get_rank() in members:
                mine = group
        return mine

    def step(self, number: int) -> float:
        """Train step `number` (from 1); returns the loss, averaged over the whole batch."""
        batches = micro_batches(self.case, number, self.coordinate["dp"])
        if self.case.parallel:
            return float(self.engine.train_batch(data_iter=batches).mean())
        losses = []
        for tokens, labels in batches:
            loss = self.engine(tokens, labels)
            self.engine.backward(loss)
            self.engine.step()
            losses.append(loss.detach().double())
        mean = torch.stack(losses).mean()
        torch.distributed.all_reduce(mean)
        return float(mean / self.case.world)


def _allow_fp16() -> None:
    """DeepSpeed refuses fp16 on CPUs without fast fp16 kernels; torch computes it all the same, slowly."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    accelerator.is_fp16_supported = lambda: True
    accelerator.supported_dtypes = lambda: [torch.float, torch.bfloat16, torch.float16]


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"name": "decay", "weight_decay": 0.1, "params": [p for p in trained if p.dim() > 1]},
        {"name": "no_decay", "weight_decay": 0.0, "params": [p for p in trained if p.dim() <= 1]},
    ]
    return split_params_into_different_moe_groups_for_optimizer(groups)


def _accumulation(dp: int) -> int:
    """Micro batches in a step: two, where the batch allows it."""
    return 2 if BATCH % (2 * dp) == 0 else 1


def _ds_config(case: Case, universal: bool) -> dict[str, Any]:
    config: dict[str, Any] = {
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": _accumulation(case.dp),
        "steps_per_print": 10**9,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": LEARNING_RATE, "betas": [0.9, 0.95], "eps": 1e-8, "torch_adam": True},
        },
        "scheduler": {
            "type": "WarmupLR",
            "params": {"warmup_max_lr": LEARNING_RATE, "warmup_num_steps": 2, "warmup_type": "linear"},
        },
        "zero_optimization": {"stage": case.zero, **case.zero_config},
        **case.config_extra,
    }
    if case.dtype == "bf16":
        config["bf16"] = {"enabled": True}
    elif case.dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 10}
    if case.grad_accum_dtype is not None:
        config["data_types"] = {"grad_accum_dtype": case.grad_accum_dtype}
    if (case.autotp or case.autoep) and case.tp > 1:
        config["tensor_parallel"] = autotp.setting(case.tp)
        del config["train_batch_size"]  # DeepSpeed would count every rank as one of dp
        config["train_micro_batch_size_per_gpu"] = BATCH // case.dp // _accumulation(case.dp)
    if case.autoep:
        config["expert_parallel"] = autoep.setting(case.ep, case.config.shared_expert)
    if case.parallel:
        config["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False}
    if universal:
        config["checkpoint"] = {"load_universal": True}
    return config


def micro_batches(case: Case, step: int, dp_rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This dp rank's (tokens, labels) at `step`: a noisy sequence that can be learnt."""
    config = case.config
    generator = torch.Generator().manual_seed(step)
    noise = torch.randint(0, 3, (BATCH, config.seq + 1), generator=generator)
    columns = [torch.randint(0, config.vocab, (BATCH,), generator=generator)]
    for position in range(config.seq):
        columns.append((5 * columns[-1] + 7 + noise[:, position]) % config.vocab)
    text = torch.stack(columns, 1)
    for micro in text.chunk(_accumulation(case.dp)):
        mine = micro.chunk(case.dp)[dp_rank]
        yield mine[:, :-1].contiguous(), mine[:, 1:].contiguous()
