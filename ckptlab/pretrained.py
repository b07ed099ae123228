"""A run as a folder that `transformers.AutoModel.from_pretrained` opens, and such a folder under a program's names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ckptlab import adapters, convert
from ckptlab.arguments import explained, only_said
from ckptlab.checkpoint import Checkpoint, Source, opened
from ckptlab.errors import LayoutError, ReshapeError
from ckptlab.findings import Finding, Where
from ckptlab.reshaping import Reshape
from ckptlab.sharding import families
from ckptlab.sharding.families import Family
from ckptlab.sharding.families.config import CLASSES
from ckptlab.words import number_of, some

Said = Mapping[str, Any]
Numbers = Mapping[str, int]


def as_pretrained(source: Source, family: Family | str | None = None, **numbers: Any) -> Checkpoint:
    """A checkpoint under transformers' names, nothing read yet.

    family: which program's names it has, as `families.resolve` takes it (None: found by its names). numbers: heads,
    kv_heads, … where the checkpoint does not say them. LayoutError where no family takes its names, and as `onto`.
    """
    catalog = opened(source).catalog
    return Checkpoint(families.towards(catalog, "right", family, **numbers))


@explained
def save_pretrained(
    source: Source,
    destination: str | os.PathLike[str],
    *,
    family: Family | str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    config: Said | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    numbers: Numbers | None = None,
    adapter: str | None = None,
    lora_alpha: float | None = None,
    **running: Any,
) -> convert.Report:
    """Write the weights as a folder that transformers opens: safetensors under its names, tied ones once, and a
    config.json made from shapes and from what the run says of itself.

    family: which program's names they have now ("llama", "gpt2", a registered one's, a Family; None: found by the
    names). dtype: "bf16", "fp16", "fp32"; None keeps the master's. Files are cut at `max_shard_bytes` (None: 5 GB).
    config: what config.json is to say, where it is known. heads, kv_heads, numbers: where the run does not say them.
    adapter: of a run with a low-rank adapter, "alone" writes that, as PEFT reads it, "merged" the base with it added,
    in float32, rounded once; lora_alpha: where no adapter_config.json beside the run says it. running: on,
    progress, verify, sync; see `Reshape.save`.
    """
    given = {"heads": heads, "kv_heads": kv_heads, **(numbers or {})}
    made = pretrained(source, family, dtype, max_shard_bytes, config, adapter, lora_alpha, **given)
    return made.save(destination, **running)


def pretrained(
    source: Source,
    family: Family | str | None = None,
    dtype: str | None = None,
    max_shard_bytes: int | None = None,
    config: Said | None = None,
    adapter: str | None = None,
    lora_alpha: float | None = None,
    **numbers: Any,
) -> Reshape:
    """What `save_pretrained` writes, worked out: see `Reshape.check` for what has to be heard of it."""
    source = opened(source).catalog
    weights = only_said(dtype=dtype, max_shard_bytes=max_shard_bytes)
    if adapter not in (None, "alone", "merged"):
        raise ReshapeError(f"adapter {adapter!r}: expected alone or merged")
    if adapter is not None:
        one = adapters.find(source)
        if adapter == "alone":
            alone = adapters.config(source, one, lora_alpha)
            return Reshape.of(adapters.alone(source, one), None, "huggingface", adapter=alone, **weights)
        source = adapters.merged(source, one, lora_alpha)
    elif adapters.has_adapter(source.tensors):
        raise ReshapeError(f"{source.path}: holds a low-rank adapter: say adapter= alone or merged")
    seen = as_pretrained(source, family, **numbers)
    kind = family.lower().replace("-", "_") if isinstance(family, str) else None
    heads = only_said(heads=numbers.get("heads"), kv_heads=numbers.get("kv_heads"))
    options = only_said(config=config, model_type=kind if kind in CLASSES else None)
    return Reshape.of(seen.catalog, None, "huggingface", **options, **heads, **weights)


@explained
def with_weights(
    run: Source,
    weights: Source,
    family: Family | str | None = None,
    **numbers: Any,
) -> Checkpoint:
    """A run with the weights of another checkpoint, a published model's: what training begins with.

    run: one that its program saved, at its first step say: from it come names, layouts, mesh, parameter groups and the
    program's own state; what its optimizer keeps of tensors is 0. Reshape and save the result as any checkpoint.
    family: whose names the run has, where the weights have transformers' (None: found by the names). numbers: heads,
    kv_heads, … where neither says them. LayoutError where a tensor of the run has no weights, or others of another
    shape.
    """
    mine, theirs = opened(run).catalog, opened(weights).catalog
    needed = {name: t for name, t in mine.tensors.items() if t.kind != "buffer"}
    if not needed.keys() <= theirs.tensors.keys():
        told = {**families.told_numbers(theirs), **families.told_numbers(mine), **numbers}
        theirs = families.like(theirs, mine, family, **told)
    if lacking := [name for name in needed if name not in theirs.tensors]:
        raise LayoutError(
            f"{theirs.path}: no weights for {number_of(len(lacking), 'tensor')} of {mine.path}: {some(lacking, 4)}"
        )
    for name, tensor in needed.items():
        if tensor.shape != (there := theirs.tensors[name].shape):
            raise LayoutError(f"{theirs.path}: {name} has shape {there}, in {mine.path} it has {tensor.shape}")
    kept = {name: theirs.tensors[name] for name in needed}
    filled = replace(theirs, tensors=kept, findings=())
    left = [name for name in theirs.tensors if name not in needed]
    findings = [*mine.findings, *theirs.findings]
    if left:
        found = f"{number_of(len(left), 'tensor')} of {theirs.path} that the run has not: {some(left, 4)}"
        findings.append(Finding("weights-left", "warning", Where(tensors=tuple(left)), "", found, "", "target"))
    return Checkpoint(replace(mine, filled=filled, findings=tuple(findings)))
