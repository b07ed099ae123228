"""Options that several commands have, and what their values look like."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from typing import Any

import click

_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


class Size(click.ParamType):
    """Bytes: 5GB, 500MB, 1GiB, 1000000."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", value.strip(), re.IGNORECASE)
        if not found or float(found[1]) == 0:
            self.fail(f"{value!r} is no size: write 5GB, 500MB, 1GiB or a number of bytes", param, ctx)
        unit = _UNITS[found[2].upper()]
        return round(float(found[1]) * (1024 ** (len(str(unit)) // 3) if found[3] else unit))


class Dealing(click.ParamType):
    """How layers are dealt to pp stages: a method, or the first layer of each stage."""

    name = "METHOD|0,4,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        if re.fullmatch(r"\d+(\s*,\s*\d+)*", value):
            return tuple(int(n) for n in value.split(","))
        if value not in ("blocks", "parameters", "uniform"):
            self.fail(f"{value!r}: expected blocks, parameters, uniform, or first layers such as 0,4", param, ctx)
        return str(value)


class Parts(click.ParamType):
    """A mesh axis as sub-axes, tp:kv=2,rep=4."""

    name = "AXIS:NAME=N,…"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, dict[str, int]]:
        if isinstance(value, tuple):
            return value
        found = re.fullmatch(r"(\w+):(\w+=\d+(?:,\w+=\d+)*)", value)
        if not found:
            self.fail(f"{value!r}: expected an axis and what it is split into, such as tp:kv=2,rep=4", param, ctx)
        return found[1], {name: int(n) for name, n in (part.split("=") for part in found[2].split(","))}


class Layouts(click.ParamType):
    """A strategy, or a line of one."""

    name = "NAME|FILE.json|REGEX=NOTATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | tuple[str, str]:
        if isinstance(value, tuple) or value.endswith(".json") or "=" not in value:
            return value
        pattern, _, notation = value.rpartition("=")
        return pattern, notation


def listed(ctx: click.Context, param: click.Parameter, value: str | None) -> list[str] | None:
    """Names with commas between them, of an option that has this as its callback."""
    return None if value is None else [name.strip() for name in value.split(",") if name.strip()]


def together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order in which --help lists them."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


as_json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
strategy_option = click.option(
    "--strategy",
    metavar="NAME|FILE.json",
    help="Layouts where the checkpoint does not tell them: megatron, megatron-swiglu, gpt-neox, hf, another "
    "registered strategy, or a JSON file of {pattern: notation}.",
)
scheduler_option = click.option(
    "--scheduler",
    metavar="tcp://HOST:PORT",
    help="Run on the workers of this dask.distributed scheduler, which must see the same files.",
)
progress_option = click.option(
    "--no-progress",
    "progress",
    is_flag=True,
    callback=lambda ctx, param, off: sys.stderr.isatty() and not off,
    help="No bar, even in a terminal.",
)
family_option = click.option(
    "--family",
    metavar="NAME",
    help="Whose names the tensors have, of a model (llama, gpt2, mixtral, …) or of a registered family: see `ckptlab "
    "formats`.",
)
mesh_options = together(
    click.option("--tp", type=click.IntRange(1), metavar="N", help="Tensor-parallel degree."),
    click.option("--pp", type=click.IntRange(1), metavar="N", help="Pipeline-parallel degree."),
    click.option("--dp", type=click.IntRange(1), metavar="N", help="Data-parallel degree."),
    click.option("--ep", type=click.IntRange(1), metavar="N", help="Expert-parallel degree, a part of dp."),
)
layout_options = together(
    click.option(
        "--split", multiple=True, type=Parts(), help="Sub-axes for layouts of your own: tp:kv=2,rep=4 splits tp 8."
    ),
    click.option(
        "--to-strategy",
        multiple=True,
        type=Layouts(),
        help="Layouts of the target, over any axes: a registered strategy, a JSON file, or lines such as "
        "'.*mlp.*=(tp out) (dp in)', the first that matches. Without a format the target is laid out on paper.",
    ),
)
target_options = together(
    click.option("--zero-stage", type=click.IntRange(0, 3), metavar="0|1|2|3", help="ZeRO stage; 0 is without ZeRO."),
    click.option("--dtype", type=click.Choice(["bf16", "fp16", "fp32"]), help="What the target trains in."),
    click.option(
        "--pipeline",
        type=Dealing(),
        help="Dealing of layers to stages: blocks, parameters, uniform, or the first layer of each stage.",
    ),
    click.option("--padded-vocab", type=click.IntRange(1), metavar="N", help="Rows of the padded vocabulary."),
    click.option(
        "--heads", type=click.IntRange(1), metavar="N", help="Attention heads, where the checkpoint does not tell."
    ),
    click.option("--kv-heads", type=click.IntRange(1), metavar="N", help="Key/value heads, likewise."),
    click.option("--sub-group-size", type=click.IntRange(1), metavar="N", help="ZeRO-3's sub_group_size, in elements."),
    click.option(
        "--param-groups",
        type=click.Path(dir_okay=False),
        metavar="FILE.json",
        help="Hyperparameters of each parameter group: a JSON list of objects with lr, weight_decay, …",
    ),
    click.option("--keys", metavar="STYLE", help="DCP: torch, torch-flat, torchtitan, accelerate, weights."),
    click.option("--model-key", metavar="KEY", help="DCP: what stands before a weight's name, dotted, or ''."),
    click.option("--optimizer-key", metavar="KEY", help="DCP: what stands before state and param_groups."),
    click.option("--chunks", metavar="HOW", help="DCP: fsdp (dim 0 over dp), layouts (these alone), whole (one file)."),
    click.option(
        "--rename", multiple=True, metavar="REGEX=TEXT", help="DCP: rules for names of tensors, one after the other."
    ),
    strategy_option,
)
