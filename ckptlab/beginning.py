"""The start of a run out of weights alone: step 0, master weights in float32, moments of 0."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptlab.arguments import explained, kind_of
from ckptlab.catalog import DTYPES, MASTER, PARAM, Catalog, ParameterGroup, Tensor, Training, placements_of
from ckptlab.checkpoint import Checkpoint, Source, opened
from ckptlab.errors import InputError, LayoutError, ReshapeError
from ckptlab.findings import Finding, Where
from ckptlab.layout import Layout, on_degree
from ckptlab.mesh import Mesh
from ckptlab.sharding import families
from ckptlab.sharding.families import Family
from ckptlab.sharding.families.numbers import said_beside
from ckptlab.sharding.families.order import ordered
from ckptlab.sharding.strategies import HuggingFace, Strategy, replicated, resolve
from ckptlab.words import number_of, some

if TYPE_CHECKING:
    import torch

MOMENTS = ("exp_avg", "exp_avg_sq")
ADAMW: Mapping[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
"""torch.optim.AdamW's defaults."""


@explained
def begin(
    weights: Source,
    module: torch.nn.Module | None = None,
    *,
    family: Family | str | None = None,
    strategy: Strategy | Mapping[str, str | Layout] | str | None = None,
    tp: int = 1,
    dtype: str = "bf16",
    param_groups: Sequence[Mapping[str, Any]] | None = None,
    **numbers: Any,
) -> Checkpoint:
    """Weights alone, of a Hugging Face folder say, as the start of a run, nothing read yet: step 0, master weights in
    float32, Adam's moments 0. Reshape it to a mesh in a format and save it, as any checkpoint.

    module: the model that the run trains (on torch's meta device will do): the order of its parameters, which of them
    train, its buffers and ties. DeepSpeed's native files go by that order, so they need it, but for models without
    experts whose order is known by their names (transformers' Llamas, GPT-2 and BLOOM, pipelines of Megatron-DeepSpeed
    and GPT-NeoX); universal folders and DCP go by names. family: whose names and shapes the run has, as
    `families.resolve` takes it (None: the weights' own). strategy: its layouts (None: the family's, or those that
    transformers' names and config.json tell). tp: for how many tensor-parallel ranks a family pads its vocabulary.
    dtype: what the model computes in. param_groups: hyperparameters of one group of all parameters, or of two, of those
    with two dims and more and of the others (None: torch's AdamW's, and a finding says so). numbers: heads, kv_heads, …
    where config.json does not say them.
    LayoutError where a parameter of the module has no weights, or others of another shape.
    """
    if module is not None and not hasattr(module, "named_parameters"):
        raise InputError(f"begin takes module=torch.nn.Module or None, not {kind_of(module)}")
    if dtype not in DTYPES:
        raise ReshapeError(f"dtype {dtype!r}: expected one of {', '.join(DTYPES)}")
    given = opened(weights).catalog
    config = said_beside(given, "config.json") or {}
    told = {**families.told_numbers(given), **numbers}
    theirs, rules = given, resolve(strategy)
    if family is not None:
        chosen = families.resolve(family, given.tensors, "right")
        theirs = chosen.onto(given, "left", **numbers)
        rules = rules or (families.start(chosen, tp, told) if chosen.strategy is not None else None)
    rules = rules or HuggingFace.of(config)
    known = ordered(theirs.tensors)
    parts = list(_of_module(module, theirs) if module is not None else _of_names(theirs, known))
    made = {part.name: _tensor(part, rules, dtype) for part in parts}
    filled = replace(theirs, tensors={part.name: part.stored for part in parts}, findings=())
    groups, findings = _groups(made, param_groups)
    group_of = {name: i for i, group in enumerate(groups) for name in group.tensors}
    tensors = {name: replace(t, group=group_of.get(name)) for name, t in made.items()}
    left = [name for name in theirs.tensors if name not in {part.stored.name for part in parts}]
    if left:
        found = f"{number_of(len(left), 'tensor')} that the module has not: {some(left, 4)}"
        findings.append(Finding("weights-left", "warning", Where(tensors=tuple(left)), "", found, "", "target"))
    if module is None and known is None:
        findings.append(
            Finding(
                "order-unknown",
                "info",
                expected="the order of the model's parameters",
                found="nothing says in which order the model has its parameters, nor which it trains: all, as assumed",
                todo="give the module",
                about="target",
            )
        )
    heads, kv_heads = told.get("heads"), told.get("kv_heads")
    training = Training(Mesh(), step=0, dtype=dtype, groups=tuple(groups), heads=heads, kv_heads=kv_heads)
    outside = {(name, state): (0,) for name, tensor in tensors.items() for state in tensor.states}
    return Checkpoint(
        Catalog(
            given.path,
            given.format,
            Mesh(),
            tensors,
            placements_of(tensors, (), outside),
            given.as_stored.extents,
            training=training,
            findings=(*theirs.findings, *findings),
            files=given.files,
            filled=filled,
        )
    )


@dataclass(frozen=True)
class _Part:
    """A tensor that the run is to have: what it is stored as, its kind, and the module's further names of it."""

    name: str
    stored: Tensor
    kind: str
    aliases: tuple[str, ...] = ()


def _of_names(weights: Catalog, known: tuple[list[str], dict[str, str]] | None) -> Iterator[_Part]:
    """All of them, in their model's order where that is known, with what it ties: what has fractions is trained."""
    order, tied = known or ([*weights.tensors], {})
    for name in order:
        tensor = weights.tensors[name]
        whole = next(iter(tensor.states.values())).kind in "iub"
        others = tuple(alias for alias, of in tied.items() if of == name and alias not in tensor.aliases)
        yield _Part(name, tensor, "buffer" if whole else "parameter", (*tensor.aliases, *others))


def _of_module(module: torch.nn.Module, weights: Catalog) -> Iterator[_Part]:
    """What a module has, in its order."""
    every: dict[int, list[str]] = {}
    for name, value in module.named_parameters(remove_duplicate=False):
        every.setdefault(id(value), []).append(name)
    lacking = []
    kept = module.state_dict()
    buffers = {name: value for name, value in module.named_buffers() if name in kept}
    every_one: list[tuple[str, Any]] = [*module.named_parameters(), *buffers.items()]
    for name, value in every_one:
        called = every.get(id(value), [name])
        stored = next((weights.tensors[n] for n in called if n in weights.tensors), None)
        if stored is None:
            lacking.append(name)
            continue
        if stored.shape != tuple(value.shape):
            raise LayoutError(f"{weights.path}: {name} has shape {stored.shape}, in the module {tuple(value.shape)}")
        kind = "buffer" if name in buffers else "parameter" if value.requires_grad else "frozen"
        yield _Part(name, stored, kind, tuple(n for n in called if n != name))
    if lacking:
        raise LayoutError(
            f"{weights.path}: no weights for {number_of(len(lacking), 'tensor')} of the module: {some(lacking, 4)}"
        )


def _tensor(part: _Part, rules: Strategy, dtype: str) -> Tensor:
    stored, shape = part.stored, part.stored.shape
    said = rules.layout(part.name, [shape]) if part.kind != "buffer" else None
    layout = (said or replicated(len(shape), replicas="first" if part.kind == "buffer" else "equal")).replace(
        stages=(0,)
    )
    states: dict[str, np.dtype] = {}
    if part.kind == "parameter":
        states = dict.fromkeys((MASTER, *MOMENTS), np.dtype(np.float32))
    own = next(iter(stored.states.values()))
    states[PARAM] = own if part.kind == "buffer" else DTYPES[dtype]
    try:
        cut = on_degree(layout, "tp", 1).resolve(shape, Mesh())
    except LayoutError as error:
        raise LayoutError(f"{part.name}: {error}") from None
    known = said is not None or part.kind == "buffer"
    return Tensor(part.name, shape, layout, cut, part.kind, states, aliases=part.aliases, layout_known=known)


def _groups(
    tensors: Mapping[str, Tensor], said: Sequence[Mapping[str, Any]] | None
) -> tuple[list[ParameterGroup], list[Finding]]:
    """The parameter groups, and what must be heard of them."""
    trained = [t for t in tensors.values() if t.kind == "parameter"]
    findings = []
    if said is None:
        said = [ADAMW]
        findings.append(
            Finding(
                "hyperparameters-assumed",
                "warning",
                expected="hyperparameters of the optimizer",
                found="nobody says the optimizer's hyperparameters: torch's AdamW's, lr 0.001, weight_decay 0.01",
                todo="say param_groups=, or have the program set its own",
                about="target",
            )
        )
    if len(said) not in (1, 2):
        raise ReshapeError(f"param_groups: expected one or two, of matrices and of the rest, not {len(said)}")
    deep, flat = ([t for t in trained if (len(t.shape) > 1) == matrix] for matrix in (True, False))
    members = [deep, flat] if len(said) == 2 else [trained]
    groups = []
    for options, mine in zip(said, members, strict=True):
        told = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
        groups.append(ParameterGroup({**ADAMW, **told}, tuple(t.name for t in mine), {"step": 0}))
    return groups, findings


def transformers_module(weights: Source) -> torch.nn.Module | None:
    """The model of transformers' own that the config.json beside weights describes, on torch's meta device, without its
    weights; None where transformers or the class is not there. Nothing of the folder is run."""
    catalog = opened(weights).catalog
    config = said_beside(catalog, "config.json")
    if not config or "auto_map" in config:
        return None
    try:
        import torch
        import transformers
    except ImportError:
        return None
    try:
        known = transformers.AutoConfig.for_model(**config)
        named = [getattr(transformers, n, None) for n in config.get("architectures") or () if isinstance(n, str)]
        with torch.device("meta"):
            cls = next((c for c in named if isinstance(c, type) and issubclass(c, transformers.PreTrainedModel)), None)
            made: torch.nn.Module = (
                transformers.AutoModelForCausalLM.from_config(known) if cls is None else cls._from_config(known)
            )
    except (ValueError, KeyError, TypeError):
        return None
    return made
