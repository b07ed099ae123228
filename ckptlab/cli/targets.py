"""Commands that lay out and write another checkpoint: plan, convert."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from ckptlab.cli.given import opened, param_groups, reshaped, workers_of
from ckptlab.cli.group import main
from ckptlab.cli.options import (
    Size,
    as_json_option,
    family_option,
    layout_options,
    mesh_options,
    progress_option,
    scheduler_option,
    target_options,
)
from ckptlab.cli.out import note, print_json, say
from ckptlab.errors import CkptlabError

if TYPE_CHECKING:
    from ckptlab.checkpoint import Checkpoint
    from ckptlab.convert import Report
    from ckptlab.reshaping import Reshape

WEIGHTS = ("safetensors", "huggingface")  # formats that hold weights alone


@main.command(short_help="What a reshape to another mesh would do.")
@click.argument("source", metavar="SRC")
@mesh_options
@layout_options
@target_options
@as_json_option
def plan(source: str, as_json: bool, strategy: str | None, **options: Any) -> None:
    """What writing SRC for another mesh would do: what changes, what it costs, which rank gets what from which.

    An axis that is not named keeps SRC's degree, and so does everything else that is not said. Nothing is read or
    written. A mesh that cannot be is refused with the reasons, and the nearest meshes that can.

    \b
      ckptlab plan run --tp 4 --pp 1
      ckptlab plan run --dp 8 --zero-stage 1 --json
      ckptlab plan run --tp 8 --split tp:kv=2,rep=4 --to-strategy '.*k_proj.weight=(kv out) in'
    """
    reshape = reshaped(opened(source, strategy), options)
    if as_json:
        from ckptlab.describe import plan as plan_facts

        print_json(plan_facts(reshape))
        return
    from ckptlab.describe import plan_text

    say(plan_text(reshape, findings=False))
    note(n.text for n in reshape.check())


@main.command(short_help="Write a checkpoint for another mesh or in another format.")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST")
@click.option(
    "--to",
    "form",
    required=True,
    metavar="FORMAT",
    help="deepspeed: files that a plain load_checkpoint on the new mesh reads. universal: DeepSpeed's universal "
    "checkpoint. dcp: torch Distributed Checkpoint, for FSDP and others. safetensors: the weights alone, whole. "
    "huggingface: the same under transformers' names, with a config.json. `ckptlab formats` lists those that are "
    "registered.",
)
@click.option(
    "--from", "origin", type=click.Choice(["huggingface"]), help="SRC has transformers' names: to those of --family."
)
@family_option
@click.option(
    "--weights",
    metavar="PATH",
    help="Begin with these weights, a Hugging Face folder's, instead of SRC's own: what the optimizer keeps is 0.",
)
@click.option(
    "--config", type=click.Path(dir_okay=False, exists=True), help="What config.json is to say, with --to huggingface."
)
@click.option(
    "--adapter",
    type=click.Choice(["alone", "merged"]),
    help="Of a run with a low-rank adapter, with --to huggingface: its weights alone, or the base with them added.",
)
@click.option("--lora-alpha", type=float, metavar="N", help="The adapter's alpha, where nothing beside SRC says it.")
@mesh_options
@layout_options
@target_options
@click.option("--max-shard-size", type=Size(), help="Safetensors are cut into files of at most this (5GB if not said).")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads that read and write.")
@scheduler_option
@click.option("--no-verify", is_flag=True, help="Do not compare what is read with the checksums that it carries.")
@click.option("--no-sync", is_flag=True, help="Do not wait until all is on the disk.")
@progress_option
@as_json_option
def convert(
    source: str,
    destination: str,
    form: str,
    origin: str | None,
    family: str | None,
    weights: str | None,
    config: str | None,
    adapter: str | None,
    lora_alpha: float | None,
    max_shard_size: int | None,
    workers: int | None,
    scheduler: str | None,
    no_verify: bool,
    no_sync: bool,
    progress: bool,
    as_json: bool,
    strategy: str | None,
    **options: Any,
) -> None:
    """Write SRC for another mesh, or in another format, as DST.

    DST is the step folder to make; `latest` (or `latest_universal`) is written beside it. DST appears when it is
    complete. A conversion that was interrupted goes on where it stopped when the command is repeated. An axis that is
    not named keeps SRC's degree.

    What is read is compared with the checksums that torch wrote beside it: a damaged file stops the conversion. Sizes
    and checksums of what is written go into ckptlab-manifest.json, for `ckptlab check` to find bits that flip later.

    With --to safetensors, --dtype is that of the weights; if it is not said, the master weights are written as they are
    (fp32) and what has none (frozen tensors, buffers) in its own.

    With --to huggingface they get transformers' names and shapes, and a config.json made from shapes and from what the
    run says of itself, so that from_pretrained opens DST. --family is then whose names SRC has, where those do not
    tell. With --from huggingface, --family is whose names and shapes DST is to have (if not said, transformers'), and
    --to deepspeed, universal or dcp makes the start of a run: step 0, moments of 0, hyperparameters by --param-groups.
    With --weights, SRC is a run that its program saved at its first step, say, and DST the same with the weights of a
    published model.

    \b
      ckptlab convert run out/global_step1000 --to deepspeed --tp 4 --pp 1 --dp 2
      ckptlab convert run out/universal --to universal
      ckptlab convert run out/weights --to safetensors --dtype bf16
      ckptlab convert run out/hf --to huggingface --dtype bf16
      ckptlab convert hf out/core --from huggingface --family llama-megatron-core --to safetensors
      ckptlab convert hf out/universal --from huggingface --to universal --tp 2 --dp 4
      ckptlab convert run/global_step0 out/global_step0 --weights hf --to deepspeed --tp 4
    """
    began = time.monotonic()
    if max_shard_size is not None and form not in WEIGHTS:
        raise click.UsageError(f"--max-shard-size goes with --to safetensors and huggingface, not with {form}")
    for option, given in (("config", config), ("adapter", adapter), ("lora-alpha", lora_alpha)):
        if given is not None and form != "huggingface":
            raise click.UsageError(f"--{option} goes with --to huggingface, not with {form}")
    if origin is not None and (form == "huggingface" or (family is None and form == "safetensors")):
        raise click.UsageError("--from huggingface needs --family, whose names DST is to have, and another --to")
    _writes(form)
    ckpt = opened(source, strategy)
    if weights is not None:
        from ckptlab.pretrained import with_weights

        numbers = {k: options[k] for k in ("heads", "kv_heads") if options[k] is not None}
        ckpt = with_weights(ckpt, opened(weights, None), family, **numbers)
    elif origin is not None and form != "safetensors":
        ckpt = _begun(ckpt, family, strategy, options)
    elif family is not None and form != "huggingface":
        ckpt = _renamed(ckpt, family, options)
    if form == "huggingface":
        reshape = _pretrained(ckpt, family, config, adapter, lora_alpha, options, max_shard_size)
    elif form == "safetensors":
        _weights_only(options, form)
        weights_alone = {"dtype": options["dtype"], "max_shard_bytes": max_shard_size}
        reshape = ckpt.reshape(format=form, **{k: v for k, v in weights_alone.items() if v is not None})
    else:
        reshape = reshaped(ckpt, options, form)
    with workers_of(scheduler, workers) as on:
        report = reshape.save(destination, on=on, progress=progress, verify=not no_verify, sync=not no_sync)
    said = _told(ckpt, reshape, report, form, options["dtype"])
    if as_json:
        print_json({**vars(report), **said, "seconds": round(time.monotonic() - began, 3)})
        return
    from ckptlab.words import number_of, size, some

    note(n["text"] for n in said["findings"])
    if report.not_finite:
        count, names = sum(report.not_finite.values()), list(report.not_finite)
        note(
            [
                f"{number_of(count, 'element')} of what was written {'is' if count == 1 else 'are'} NaN or infinite: "
                f"{some(names, 4)}"
            ]
        )
    resumed = f" ({report.resumed:,} of them before)" if report.resumed else ""
    say(
        f"{report.destination}: {number_of(report.files, 'file')}{resumed}, {size(report.bytes_written)} of tensors "
        f"written in {time.monotonic() - began:.1f} s"
    )
    if said["latest"]:
        say(f"{said['latest']} names it")


def _writes(form: str) -> None:
    """Whether that is a format to write; a UsageError that lists those that are, if not."""
    from ckptlab.formats import every

    known = [format.name for format in every() if format.writes]
    if form not in known:
        raise click.UsageError(f"--to {form}: expected one of {', '.join(known)}")


def _told(ckpt: Checkpoint, reshape: Reshape, report: Report, form: str, dtype: str | None) -> dict[str, Any]:
    """What is to be said of what was written, beside the report: of a run, and of weights alone."""
    from ckptlab.describe.facts import briefly

    findings = briefly(reshape.check())
    if form in WEIGHTS:
        findings += _left_out(ckpt)
        return {"format": form, "dtype": dtype, "latest": None, "findings": findings}
    if report.latest is None and reshape.format.pointed:
        tag = os.path.basename(report.destination)
        text = f"`latest` beside it is the source run's and was left alone: load it with tag={tag!r}"
        findings.append({"code": "latest-left-alone", "severity": "info", "text": text})
    target = {"mesh": reshape.mesh.degrees, "zero_stage": reshape.zero_stage, "dtype": reshape.target.training.dtype}
    return {"format": form, **target, "latest": report.latest, "findings": findings}


def _begun(ckpt: Checkpoint, family: str | None, strategy: str | None, options: dict[str, Any]) -> Checkpoint:
    """The start of a run out of weights alone; of a family's names, or of transformers' own."""
    from ckptlab.beginning import begin, transformers_module

    said = {name: options.pop(name) for name in ("heads", "kv_heads", "param_groups")}
    numbers = {name: n for name, n in said.items() if n is not None and name != "param_groups"}
    groups = None if said["param_groups"] is None else param_groups(said["param_groups"])
    module = transformers_module(ckpt) if family is None else None
    named: dict[str, Any] = {"family": family, "strategy": strategy, "tp": options["tp"] or 1, "param_groups": groups}
    return begin(ckpt, module, dtype=options["dtype"] or "bf16", **named, **numbers)


def _renamed(ckpt: Checkpoint, family: str, options: dict[str, Any]) -> Checkpoint:
    """A checkpoint under the other names of a family; heads are numbers of it."""
    from ckptlab.sharding import families

    numbers = {name: options.pop(name, None) for name in ("heads", "kv_heads")}
    return families.resolve(family, ckpt).onto(ckpt, **numbers)


def _pretrained(
    ckpt: Checkpoint,
    family: str | None,
    config: str | None,
    adapter: str | None,
    lora_alpha: float | None,
    options: Mapping[str, Any],
    max_shard_bytes: int | None,
) -> Reshape:
    """A folder that transformers opens."""
    from ckptlab.pretrained import pretrained

    numbers = {k: options[k] for k in ("heads", "kv_heads")}
    _weights_only({k: v for k, v in options.items() if k not in numbers}, "huggingface")
    said = None
    if config is not None:
        with open(config, encoding="utf-8") as file:
            try:
                said = json.load(file)
            except ValueError as error:
                raise CkptlabError(f"{config}: expected a JSON object: {error}") from None
        if not isinstance(said, dict):
            raise CkptlabError(f"{config}: expected a JSON object, found a {type(said).__name__}")
    return pretrained(ckpt, family, options["dtype"], max_shard_bytes, said, adapter, lora_alpha, **numbers)


def _weights_only(options: Mapping[str, Any], form: str) -> None:
    """A UsageError for an option that means nothing where weights alone are written."""
    named = [k for k, v in options.items() if v is not None and v != () and k != "dtype"]
    if named:
        option = f"--{named[0].replace('_', '-')}"
        raise click.UsageError(f"{option} has no meaning with --to {form}, which holds whole weights")


def _left_out(ckpt: Checkpoint) -> list[dict[str, Any]]:
    """A finding on states that weights alone do not have."""
    from ckptlab.catalog import MASTER, PARAM

    lost = [s for s in ckpt.states if s not in (MASTER, PARAM)]
    text = f"safetensors hold weights: {', '.join(lost)} are left out"
    return [{"code": "states-left-out", "severity": "info", "text": text}] if lost else []
