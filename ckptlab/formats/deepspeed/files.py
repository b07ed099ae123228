"""A step folder's files, put in their places on the mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from ckptlab.findings import Faults
from ckptlab.formats.deepspeed import autoep, checks, missing, names
from ckptlab.formats.deepspeed.experts import Experts
from ckptlab.formats.deepspeed.found import Found
from ckptlab.formats.deepspeed.header import Content, Shape
from ckptlab.formats.deepspeed.modelfile import EngineConfig, ModelFile
from ckptlab.formats.deepspeed.names import FileName
from ckptlab.formats.deepspeed.optimfile import OptimizerFile, WholeOptimizer
from ckptlab.mesh import Mesh
from ckptlab.stored import Stored

K = TypeVar("K")
T = TypeVar("T")
Rank = tuple[int, int]  # (pp stage, tp rank)


@dataclass(frozen=True)
class StepFolder:
    """What `engine.save_checkpoint` wrote for one step.

    `heads[pp, tp]` are that rank's model files (at ZeRO-3 one for each dp rank, else one), `optims[pp, tp][dp]` the
    optimizer files (none where the model files hold the optimizer, or there are weights alone), `layers[layer][tp]` the
    tensors of the pipeline engine's layer files, whose names carry `-model_TT` if `layer_axis`, and `others[layer][tp]`
    what else is in them. `prefix` is that of the optimizer files ("bf16" or ""). Where there are experts, dp is split;
    `expert_optims[pp, tp]` are the ep ranks' optimizers where they train without ZeRO, each with its ep rank; the first
    is one of that tp rank. `left_out` are ranks without a model file, whose head is the one beside with its buffers
    alone.
    """

    path: str
    mesh: Mesh
    heads: Mapping[Rank, tuple[ModelFile, ...]]
    optims: Mapping[Rank, tuple[OptimizerFile, ...]] = field(default_factory=dict)
    layers: Mapping[int, tuple[Mapping[str, Stored], ...]] = field(default_factory=dict)
    others: Mapping[int, tuple[Mapping[str, Any], ...]] = field(default_factory=dict)
    layer_axis: bool = True
    prefix: str = ""
    is_zero3: bool = False
    files: tuple[str, ...] = ()
    experts: Experts = field(default_factory=Experts)
    expert_optims: Mapping[Rank, tuple[tuple[int, WholeOptimizer], ...]] = field(default_factory=dict)
    left_out: tuple[Rank, ...] = ()

    @cached_property
    def models(self) -> dict[Rank, Content]:
        """The content of each rank's model file, at ZeRO-3 that of dp rank 0."""
        return {rank: heads[0].content for rank, heads in self.heads.items()}

    @property
    def first(self) -> ModelFile:
        """The first rank's model file."""
        return self.heads[0, 0][0]

    @property
    def config(self) -> EngineConfig:
        """The run's ds_config, as far as it concerns a checkpoint."""
        return self.first.config

    @cached_property
    def trained(self) -> dict[Rank, dict[str, Shape]]:
        """Shard shapes of the tensors that each rank's optimizer knows, in memory order; of experts, those of all ep
        ranks."""
        found: dict[Rank, dict[str, Shape]] = {}
        for rank, (head, *_) in self.heads.items():
            local = head.trained
            of_ranks = self.experts.everywhere(list(local)) if self.experts else []
            found[rank] = {name: local[self.experts.locally(name)] for name in of_ranks} or dict(local)
        return found

    @cached_property
    def shards(self) -> dict[str, dict[int, Shape]]:
        """Of each tensor that an optimizer knows the shape of its shard on every tp rank."""
        found: dict[str, dict[int, Shape]] = {}
        for (_, tp), of_rank in self.trained.items():
            for name, shape in of_rank.items():
                found.setdefault(name, {})[tp] = shape
        return found

    @cached_property
    def stages(self) -> dict[str, tuple[int, ...]]:
        """Of each tensor that an optimizer knows the pp stages that hold it."""
        found: dict[str, tuple[int, ...]] = {}
        for (stage, _), of_rank in self.trained.items():
            for name in of_rank:
                if stage not in (held := found.get(name, ())):
                    found[name] = (*held, stage)
        return found

    @cached_property
    def buffers(self) -> frozenset[str]:
        """The buffers that are saved, of all ranks."""
        return frozenset().union(*(head.buffers for head, *_ in self.heads.values()))

    @property
    def is_pipeline(self) -> bool:
        """Written by the pipeline engine: no rank's model file holds the module, layer files do."""
        return self.first.module is None

    @cached_property
    def is_numbered(self) -> bool:
        """There are experts, and tensors go by the numbers of layers, as those of a pipeline do. Of such a model each
        stage has its part of the module in its model file."""
        named = (n for of_rank in self.heads.values() for n in of_rank[0].module or {})
        return bool(self.experts) and not self.is_pipeline and all(map(names.in_pipeline, named))


def read_step_folder(
    path: str, faults: Faults, *, optimizer: bool = True, also: Sequence[str] = ()
) -> StepFolder | None:
    """Parse every file of the step folder, and see that they are all there and of one run.

    also: folders that hold further files of the same step, those of other nodes. With `optimizer=False` no optimizer
    files are expected (a universal folder keeps the model files alone). None if that is not so, which `faults` is told
    of: files that are missing, unreadable or of another run.
    """
    found = Found((path, *also), faults, optimizer)
    found.parse("model", "zero3_model", "layer", "expert")
    found.parse("optim" if found.sets else "expert_optim")
    found.put_in_order()
    found.with_empty()
    for finding in (
        *missing.misplaced(found),
        *missing.notices(found),
        *found.experts.problems(path, found.mesh),
        *checks.agreement(path, found.heads, found.optims, found.mesh),
    ):
        faults.report(finding)
    return None if faults.failed else _folder(found)


def _folder(found: Found) -> StepFolder:
    """The files in their places, all of which are there."""
    tp, wanted, experts = found.mesh.tp, found.wanted, found.experts

    def rank(name: FileName) -> Rank:
        return divmod(name.mp, tp)

    def layer(name: FileName) -> int:
        return name.layer

    heads = _together(found.heads, wanted["model"], rank)
    left_out = tuple(divmod(mp, tp) for mp in found.left_out)
    for stage, t in left_out:
        head = heads[stage, 0][0]
        buffers = {n: stored for n, stored in (head.module or {}).items() if n in head.buffers}
        heads[stage, t] = (replace(head, module=buffers, shared={}),)
    heads = dict(sorted(heads.items()))
    if experts.fused:
        heads = {
            r: tuple(replace(h, shared={**h.shared, **autoep.aliases(experts.fused, h.module or {})}) for h in of_rank)
            for r, of_rank in heads.items()
        }
    of_experts: dict[Rank, tuple[tuple[int, WholeOptimizer], ...]] = {}
    held = [(name, one) for name in wanted.get("expert optimizer", ()) if (one := found.expert_optims[name])]
    for at in sorted({rank(name) for name, _ in held}):
        own = [(name.expert, one) for name, one in held if rank(name) == at]
        beside = [(name.expert, one) for name, one in held if rank(name) != at and rank(name)[0] == at[0]]
        of_experts[at] = (*own, *(beside if experts.over_tp else ()))
        heads[at] = tuple(replace(h, optimizer=own[0][1]) for h in heads[at])
    layers = wanted.get("layer", ())
    return StepFolder(
        found.path,
        experts.on(found.mesh),
        heads,
        _together(found.optims, wanted.get("optimizer", ()), rank),
        _together(found.layers, layers, layer),
        _together(found.others, layers, layer),
        found.axis,
        found.prefix,
        found.head == "zero3_model",
        tuple(sorted(found.names[n] for needed in wanted.values() for n in needed)),
        experts,
        of_experts,
        left_out,
    )


def _together(
    parsed: Mapping[FileName, T], names: Iterable[FileName], place: Callable[[FileName], K]
) -> dict[K, tuple[T, ...]]:
    """What was parsed of these files, by the place that each has."""
    found: dict[K, list[T]] = {}
    for name in names:
        found.setdefault(place(name), []).append(parsed[name])
    return {at: tuple(those) for at, those in found.items()}
