"""The command line, a function for each command, which imports what it needs when it runs."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

import click

from ckptlab.errors import CkptlabError
from ckptlab.words import escaped

if TYPE_CHECKING:
    from ckptlab.checkpoint import Checkpoint, Reshape
    from ckptlab.convert import Report
    from ckptlab.formats import Paths
    from ckptlab.pool import Workers

TROUBLE, INTERRUPTED, TERMINATED = 2, 130, 143
_NO_MEMORY = "there is not enough memory or address space (ulimit -v): --workers 1 needs the least"
_PATIENCE = 10  # seconds in which a scheduler must answer
_UNITS = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "T": 1000**4}


class Commands(click.Group):
    """A group whose commands end in one message on stderr, not in a traceback, when the input is at fault."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)  # in the order in which one uses them

    def invoke(self, ctx: click.Context) -> Any:
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):  # an arrow that the terminal cannot show is no reason to stop
                stream.reconfigure(errors="replace")
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, _terminate)
        try:
            return super().invoke(ctx)
        except CkptlabError as error:
            _fail(str(error))
        except (KeyboardInterrupt, _Terminated) as stopped:
            _stopped(stopped, ctx)
        except RuntimeError as error:  # what a signal becomes that comes while Python waits for a lock
            if isinstance(error.__context__, KeyboardInterrupt | _Terminated):
                _stopped(error.__context__, ctx)
            raise
        except MemoryError:
            _fail(_NO_MEMORY)
        except BrokenPipeError:
            raise
        except OSError as error:
            _fail(_reason(error))


class _Terminated(BaseException):
    """SIGTERM: a batch system wants its machine back."""


def _terminate(*_: object) -> NoReturn:
    raise _Terminated


def _stopped(by: BaseException, ctx: click.Context) -> NoReturn:
    if isinstance(by, _Terminated):
        _fail(f"terminated{_kept(ctx)}", TERMINATED)
    _fail(f"interrupted{_kept(ctx)}", INTERRUPTED)


def _kept(ctx: click.Context) -> str:
    return "; what is complete is kept: repeat the command to go on" if ctx.invoked_subcommand == "convert" else ""


def _fail(message: str, status: int = TROUBLE) -> NoReturn:
    _say(f"ckptlab: {message}", err=True)
    raise click.exceptions.Exit(status)


def _reason(error: OSError) -> str:
    what = error.strerror or str(error)
    named = f"{error.filename}: {what}" if error.filename else what
    if error.errno == errno.ENOMEM:
        return f"{named}; {_NO_MEMORY}"
    if error.errno == errno.EMFILE:
        named += ": too few files may be open at a time (ulimit -n)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        named += "; what is complete is kept: make room and repeat the command to go on"
    return named


def _say(text: str, err: bool = False) -> None:
    """Print text, in which names may stand that files hold."""
    click.echo(escaped(text), err=err)


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


def _options(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Several options as one decorator, in the order in which --help lists them."""

    def decorate(command: Any) -> Any:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
_strategy = click.option(
    "--strategy",
    metavar="NAME|FILE.json",
    help="Layouts where the checkpoint does not tell them: a registered strategy (megatron), or a JSON file of "
    "{pattern: notation}.",
)
_scheduler = click.option(
    "--scheduler",
    metavar="tcp://HOST:PORT",
    help="Run on the workers of this dask.distributed scheduler, which must see the same files.",
)
_family = click.option(
    "--family",
    metavar="NAME",
    help="Whose names the tensors have, of a model (llama, gpt2, mixtral, …) or of a registered family: see `ckptlab "
    "formats`.",
)
_mesh = _options(
    click.option("--tp", type=click.IntRange(1), metavar="N", help="Tensor-parallel degree."),
    click.option("--pp", type=click.IntRange(1), metavar="N", help="Pipeline-parallel degree."),
    click.option("--dp", type=click.IntRange(1), metavar="N", help="Data-parallel degree."),
    click.option("--ep", type=click.IntRange(1), metavar="N", help="Expert-parallel degree, a part of dp."),
)
_own = _options(
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
_target = _options(
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
    _strategy,
)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96})
@click.version_option(package_name="ckptlab", message="ckptlab %(version)s")
def main() -> None:
    """Look into checkpoints of 3D-parallel training runs (DeepSpeed), and write them for another mesh.

    PATH is a step folder, the folder that holds `latest`, a universal folder, safetensors, or a folder with one of
    these below it; or a URL of one (s3://, gs://, http://, …). Reading takes headers only and executes nothing; a
    source is never changed.

    \b
      ckptlab info run/global_step1000
      ckptlab ls run "*.mlp.*"
      ckptlab plan run --tp 4 --pp 1
      ckptlab convert run out/global_step1000 --to deepspeed --tp 4 --pp 1
      ckptlab check run
      ckptlab stats run --by stack
      ckptlab diff run out
    """


@main.command(short_help="What a checkpoint holds.")
@click.argument("path", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--all", "everything", is_flag=True, help="A line for every tensor: layers are not folded, names not cut."
)
@_strategy
@_json
def info(path: tuple[str, ...], everything: bool, strategy: str | None, as_json: bool) -> None:
    """What a checkpoint holds: mesh, tensors with their layouts, states, parameter groups, client state.

    Same-shaped layers share a line: {2..5}.mlp.weight stands for four tensors. Layouts are lines of notation: in
    "(tp out) in" the rows are cut over tp, in "out (tp in)" the columns, "out in" is whole on every rank. Several
    folders are parts of one checkpoint, those that each node kept for itself.

    \b
      ckptlab info run
      ckptlab info node0/global_step1000 node1/global_step1000
      ckptlab info run --json | jq .counts.parameters
    """
    ckpt = _open(path[0] if len(path) == 1 else path, strategy)
    if as_json:
        from ckptlab.describe import summary

        _print(summary(ckpt.catalog))
        return
    from ckptlab.describe import summary_text

    _say(summary_text(ckpt.catalog, notices=False, everything=everything))
    _note(n.text for n in ckpt.findings)


@main.command("ls", short_help="Its tensors, one a line.")
@click.argument("path")
@click.argument("pattern", required=False)
@click.option("-E", "--regex", is_flag=True, help="PATTERN is a regular expression, found anywhere in a name.")
@_strategy
@_json
def list_tensors(path: str, pattern: str | None, regex: bool, strategy: str | None, as_json: bool) -> None:
    """The tensors of a checkpoint one a line: name, shape, layout, states with their dtypes.

    PATTERN is a glob that takes the whole name, or text that stands somewhere in it. A layout that a checkpoint of tp 1
    does not tell is a question mark.

    \b
      ckptlab ls run
      ckptlab ls run "*.mlp.*.weight"
      ckptlab ls run -E "^[0-3]\\." --json | jq -r .tensors[].name
    """
    from ckptlab.describe.listing import listed, listing

    ckpt = _open(path, strategy)
    found = listed(ckpt, pattern, regex)
    if as_json:
        _print({"path": ckpt.path, "tensors": found})
    else:
        _say(listing(found))


@main.command(short_help="What a reshape to another mesh would do.")
@click.argument("source", metavar="SRC")
@_mesh
@_own
@_target
@_json
def plan(source: str, as_json: bool, strategy: str | None, **options: Any) -> None:
    """What writing SRC for another mesh would do: what changes, what it costs, which rank gets what from which.

    An axis that is not named keeps SRC's degree, and so does everything else that is not said. Nothing is read or
    written. A mesh that cannot be is refused with the reasons, and the nearest meshes that can.

    \b
      ckptlab plan run --tp 4 --pp 1
      ckptlab plan run --dp 8 --zero-stage 1 --json
      ckptlab plan run --tp 8 --split tp:kv=2,rep=4 --to-strategy '.*k_proj.weight=(kv out) in'
    """
    reshape = _reshape(_open(source, strategy), options)
    if as_json:
        from ckptlab.describe import plan as plan_facts

        _print(plan_facts(reshape))
        return
    from ckptlab.describe import plan_text

    _say(plan_text(reshape, notices=False))
    _note(n.text for n in reshape.check())


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
@_family
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
@_mesh
@_own
@_target
@click.option("--max-shard-size", type=Size(), help="Safetensors are cut into files of at most this (5GB if not said).")
@click.option("--workers", type=click.IntRange(1), metavar="N", help="Threads that read and write.")
@_scheduler
@click.option("--no-verify", is_flag=True, help="Do not compare what is read with the checksums that it carries.")
@click.option("--no-sync", is_flag=True, help="Do not wait until all is on the disk.")
@click.option("--no-progress", is_flag=True, help="No bar, even in a terminal.")
@_json
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
    no_progress: bool,
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
    if max_shard_size is not None and form not in ("safetensors", "huggingface"):
        raise click.UsageError(f"--max-shard-size goes with --to safetensors and huggingface, not with {form}")
    for option, given in (("config", config), ("adapter", adapter), ("lora-alpha", lora_alpha)):
        if given is not None and form != "huggingface":
            raise click.UsageError(f"--{option} goes with --to huggingface, not with {form}")
    if origin is not None and (form == "huggingface" or (family is None and form == "safetensors")):
        raise click.UsageError("--from huggingface needs --family, whose names DST is to have, and another --to")
    _writes(form)
    ckpt = _open(source, strategy)
    if weights is not None:
        from ckptlab.pretrained import with_weights

        numbers = {k: options[k] for k in ("heads", "kv_heads") if options[k] is not None}
        ckpt = with_weights(ckpt, _open(weights, None), family, **numbers)
    elif origin is not None and form != "safetensors":
        ckpt = _begun(ckpt, family, strategy, options)
    elif family is not None and form != "huggingface":
        ckpt = _renamed(ckpt, family, options)
    progress = sys.stderr.isatty() and not no_progress
    with _workers(scheduler, workers) as on:
        running = {"workers": on, "progress": progress, "verify": not no_verify, "sync": not no_sync}
        if form == "huggingface":
            lora = {"adapter": adapter, "lora_alpha": lora_alpha}
            said, report = _write_pretrained(ckpt, destination, family, config, lora, options, max_shard_size, running)
        elif form == "safetensors":
            said, report = _write_weights(ckpt, destination, options, max_shard_size, running)
        else:
            said, report = _write_run(ckpt, destination, form, options, running)
    if as_json:
        _print({**vars(report), **said, "seconds": round(time.monotonic() - began, 3)})
        return
    from ckptlab.words import number_of, size, some

    _note(n["text"] for n in said["notices"])
    if report.not_finite:
        count, names = sum(report.not_finite.values()), list(report.not_finite)
        _note(
            [
                f"{number_of(count, 'element')} of what was written {'is' if count == 1 else 'are'} NaN or infinite: "
                f"{some(names, 4)}"
            ]
        )
    resumed = f" ({report.resumed:,} of them before)" if report.resumed else ""
    _say(
        f"{report.destination}: {number_of(report.files, 'file')}{resumed}, {size(report.bytes_written)} of tensors "
        f"written in {time.monotonic() - began:.1f} s"
    )
    if said["latest"]:
        _say(f"{said['latest']} names it")


@main.command(short_help="Whether a checkpoint is whole and its numbers are sound.")
@click.argument("path")
@click.option("--no-data", is_flag=True, help="Look at files and headers alone; read no tensor.")
@click.option("--checksums", is_flag=True, help="Also compare every file with the checksums that torch wrote into it.")
@_scheduler
@click.option("--no-progress", is_flag=True, help="No bar, even in a terminal.")
@_strategy
@_json
@click.pass_context
def check(
    ctx: click.Context,
    path: str,
    no_data: bool,
    checksums: bool,
    scheduler: str | None,
    no_progress: bool,
    strategy: str | None,
    as_json: bool,
) -> None:
    """Whether a checkpoint is whole, of one run and step, and its numbers are what training leaves.

    Missing, cut, extra and foreign files; steps, settings and shapes that disagree; classes that a loader would have
    run; NaN and infinity; replicas and tied tensors that drifted; masters that do not round to the weights; moments
    that are negative or dead; padding that is not empty. Each byte of data is read once. The checkpoint need not open.

    Exit status: 0 healthy (remarks, which are harmless, do not count), 1 errors or warnings, 2 no checkpoint.

    \b
      ckptlab check run/global_step1000
      ckptlab check run --no-data --json | jq '.findings[].code'
    """
    from ckptlab.analysis import check as check_all

    progress = sys.stderr.isatty() and not no_progress
    with _workers(scheduler) as on:
        asked: dict[str, Any] = {"data": not no_data, "checksums": checksums, "strategy": strategy}
        found = check_all(path, progress=progress, workers=on, **asked)
    if as_json:
        _print(found.to_dict())
    else:
        _say(repr(found))
    ctx.exit(0 if found.healthy else 1)


@main.command(short_help="Compare two checkpoints, of any formats and meshes.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--states", metavar="master,exp_avg,…", help="Compare these states alone.")
@_scheduler
@_family
@click.option("--heads", type=click.IntRange(1), metavar="N", help="Attention heads, where neither side tells.")
@click.option("--kv-heads", type=click.IntRange(1), metavar="N", help="Key/value heads, likewise.")
@click.option("--no-progress", is_flag=True, help="No bar, even in a terminal.")
@_strategy
@_json
@click.pass_context
def diff(
    ctx: click.Context,
    a: str,
    b: str,
    states: str | None,
    scheduler: str | None,
    family: str | None,
    heads: int | None,
    kv_heads: int | None,
    no_progress: bool,
    strategy: str | None,
    as_json: bool,
) -> None:
    """Compare two checkpoints tensor by tensor, state by state, bit for bit, whatever format and mesh each has.

    Every state and hyperparameter that both have is compared; a state that one side alone has is named, and makes no
    difference. A run and what it became under transformers' names are compared under those; --family says whose names
    the other side has, where they do not tell.

    Exit status: 0 the same, 1 different, 2 trouble.

    \b
      ckptlab diff run/global_step1000 out/global_step1000
      ckptlab diff run out --states master
    """
    from ckptlab.analysis import diff as compare

    wanted = [s.strip() for s in states.split(",") if s.strip()] if states is not None else None
    progress = sys.stderr.isatty() and not no_progress
    numbers: dict[str, Any] = {name: n for name, n in (("heads", heads), ("kv_heads", kv_heads)) if n is not None}
    sides = _open(a, strategy), _open(b, strategy)
    with _workers(scheduler) as on:
        found = compare(*sides, states=wanted, family=family, progress=progress, workers=on, **numbers)
    if as_json:
        _print(found.to_dict())
    else:
        _say(repr(found))
    ctx.exit(0 if found.equal else 1)


@main.command(short_help="A page to look into a checkpoint and its reshapes.")
@click.argument("path")
@click.argument("destination", metavar="DST.html")
@_mesh
@_strategy
def explore(path: str, destination: str, strategy: str | None, **degrees: int | None) -> None:
    """Write what `ckptlab.explore` shows in a notebook as one page, DST.html, that opens from disk and answers to
    hover, click and keyboard: tensors and how they are cut, ranks, files, target meshes, memory, cost.

    An axis that is not named has the target keep PATH's degree. Needs the extra `widgets`.

    \b
      ckptlab explore run page.html --tp 4
    """
    from ckptlab.errors import DestinationError
    from ckptlab.widgets import explore as look

    ckpt = _open(path, strategy)
    if os.path.lexists(destination):
        raise DestinationError(f"{destination} exists already: remove it, or name another destination")
    named: dict[str, Any] = {axis: degree for axis, degree in degrees.items() if degree is not None}
    look(ckpt.reshape(**named) if named else ckpt).to_html(destination)
    _say(destination)


@main.command(short_help="What is registered: formats, strategies, families, backends.")
@_json
def formats(as_json: bool) -> None:
    """What is registered here: formats that open, strategies for layouts, families of names, array libraries. Packages
    may add to each."""
    from ckptlab.arrays.backends import BACKENDS
    from ckptlab.formats import every
    from ckptlab.sharding.families import FAMILIES
    from ckptlab.sharding.strategies import REGISTRY

    known = every()
    others = {
        "strategies": list(REGISTRY.names()),
        "families": list(FAMILIES.names()),
        "backends": list(BACKENDS.names()),
    }
    if as_json:
        listed = [{"name": f.name, "title": f.title, "reads": f.reads, "writes": f.writes} for f in known]
        _print({"formats": listed, **others})
        return
    width = max(len(format.name) for format in known)
    for format in known:
        does = [verb for verb, can in (("reads", format.reads), ("writes", format.writes)) if can]
        otherwise = "planned, never stored" if format.home == format.name else "named, not read yet"
        _say(f"{format.name:<{width}}  {format.title} ({', '.join(does) or otherwise})")
    for what, names in others.items():
        _say(f"{what:<{width}}  {', '.join(names)}")


# ------------------------------------------------------------------ what the commands share


def _open(path: Paths, strategy: str | None) -> Checkpoint:
    from ckptlab.checkpoint import open as open_checkpoint

    return open_checkpoint(path, strategy)


@contextmanager
def _workers(scheduler: str | None, threads: int | None = None) -> Iterator[Workers]:
    """What runs tasks: threads, or the workers of a scheduler."""
    if scheduler is None:
        yield threads
        return
    if threads is not None:
        raise click.UsageError("--workers and --scheduler exclude each other")
    try:
        from distributed import Client
    except ImportError:
        raise CkptlabError("--scheduler needs dask.distributed: pip install distributed") from None
    try:
        client = Client(scheduler, timeout=_PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise CkptlabError(f"{scheduler}: no scheduler of dask.distributed answers there ({error})") from None
    try:
        with client:
            yield client
    except Exception as error:  # workers that die again and again, a scheduler that is lost
        if not (isinstance(error, CancelledError) or type(error).__module__.startswith("distributed")):
            raise
        said = str(error) or type(error).__name__
        raise CkptlabError(f"{scheduler}: the cluster gave up: {said}; repeat the command when it is back") from None


def _writes(form: str) -> None:
    """Whether that is a format to write; a UsageError that lists those that are, if not."""
    from ckptlab.formats import every

    known = [format.name for format in every() if format.writes]
    if form not in known:
        raise click.UsageError(f"--to {form}: expected one of {', '.join(known)}")


def _reshape(ckpt: Checkpoint, options: Mapping[str, Any], form: str | None = None) -> Reshape:
    """The target that the options say; axes that they do not name keep the degree that the run had."""
    given = {k: v for k, v in options.items() if v is not None and v != ()}
    if "param_groups" in given:
        given["param_groups"] = _param_groups(given["param_groups"])
    given["strategy"] = _target_strategy(given.pop("to_strategy", ()))
    if split := given.pop("split", ()):
        mesh = (ckpt.catalog.training.mesh or ckpt.mesh).joined()
        mesh = mesh.replace(**{axis: given.pop(axis) for axis in ("tp", "pp", "dp", "ep") if axis in given})
        for axis, parts in split:
            mesh = mesh.split(axis, **parts)
        given["mesh"] = mesh
    return ckpt.reshape(format=form, **given)


def _target_strategy(said: Sequence[str | tuple[str, str]]) -> Mapping[str, str] | str | None:
    """What --to-strategy says: one strategy, or lines of one."""
    lines = dict(line for line in said if isinstance(line, tuple))
    others = [line for line in said if isinstance(line, str)]
    if len(others) > 1 or (others and lines):
        raise click.UsageError("--to-strategy: one strategy or JSON file, or any number of lines REGEX=NOTATION")
    return others[0] if others else lines or None


def _param_groups(path: str) -> tuple[Mapping[str, Any], ...]:
    try:
        with open(path, encoding="utf-8") as file:
            groups = json.load(file)
    except ValueError as error:
        raise CkptlabError(f"{path}: expected a JSON list of objects, one for each parameter group: {error}") from None
    if not isinstance(groups, list) or not all(isinstance(g, dict) for g in groups):
        raise CkptlabError(f"{path}: expected a JSON list of objects, one for each parameter group")
    return tuple(groups)


def _write_run(
    ckpt: Checkpoint, destination: str, form: str, options: Mapping[str, Any], running: Mapping[str, Any]
) -> tuple[dict[str, Any], Report]:
    """Write a native or universal checkpoint: what is to be said of it, and the report."""
    reshape = _reshape(ckpt, options, form)
    report = reshape.save(destination, **running)
    notices = [{"code": n.code, "text": n.text} for n in reshape.check()]
    if report.latest is None and reshape.format.pointed:
        tag = os.path.basename(report.destination)
        text = f"`latest` beside it is the source run's and was left alone: load it with tag={tag!r}"
        notices.append({"code": "latest-left-alone", "text": text})
    target = {"mesh": reshape.mesh.degrees, "zero_stage": reshape.zero_stage, "dtype": reshape.target.training.dtype}
    return {"format": form, **target, "latest": report.latest, "notices": notices}, report


def _write_weights(
    ckpt: Checkpoint,
    destination: str,
    options: Mapping[str, Any],
    max_shard_bytes: int | None,
    running: Mapping[str, Any],
) -> tuple[dict[str, Any], Report]:
    """Write safetensors: what is to be said of them, and the report."""
    from ckptlab.checkpoint import save_weights

    _weights_only(options, "safetensors")
    dtype = options["dtype"]
    report = save_weights(ckpt, destination, dtype=dtype, max_shard_bytes=max_shard_bytes, **running)
    notices = [{"code": n.code, "text": n.text} for n in ckpt.findings] + _left_out(ckpt)
    return {"format": "safetensors", "dtype": dtype, "latest": None, "notices": notices}, report


def _begun(ckpt: Checkpoint, family: str | None, strategy: str | None, options: dict[str, Any]) -> Checkpoint:
    """The start of a run out of weights alone; of a family's names, or of transformers' own."""
    from ckptlab.beginning import begin, transformers_module

    said = {name: options.pop(name) for name in ("heads", "kv_heads", "param_groups")}
    numbers = {name: n for name, n in said.items() if n is not None and name != "param_groups"}
    groups = None if said["param_groups"] is None else _param_groups(said["param_groups"])
    module = transformers_module(ckpt) if family is None else None
    named: dict[str, Any] = {"family": family, "strategy": strategy, "tp": options["tp"] or 1, "param_groups": groups}
    return begin(ckpt, module, dtype=options["dtype"] or "bf16", **named, **numbers)


def _renamed(ckpt: Checkpoint, family: str, options: dict[str, Any]) -> Checkpoint:
    """A checkpoint under the other names of a family; heads are numbers of it."""
    from ckptlab.sharding import families

    numbers = {name: options.pop(name, None) for name in ("heads", "kv_heads")}
    return families.resolve(family, ckpt).onto(ckpt, **numbers)


def _write_pretrained(
    ckpt: Checkpoint,
    destination: str,
    family: str | None,
    config: str | None,
    lora: Mapping[str, Any],
    options: Mapping[str, Any],
    max_shard_bytes: int | None,
    running: Mapping[str, Any],
) -> tuple[dict[str, Any], Report]:
    """Write a folder that transformers opens: what is to be said of it, and the report."""
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
    dtype = options["dtype"]
    reshape = pretrained(ckpt, family, dtype, max_shard_bytes, said, **lora, **numbers)
    report = reshape.save(destination, **running)
    notices = [{"code": n.code, "text": n.text} for n in reshape.check()]
    return {"format": "huggingface", "dtype": dtype, "latest": None, "notices": [*notices, *_left_out(ckpt)]}, report


def _weights_only(options: Mapping[str, Any], form: str) -> None:
    """A UsageError for an option that means nothing where weights alone are written."""
    named = [k for k, v in options.items() if v is not None and v != () and k != "dtype"]
    if named:
        option = f"--{named[0].replace('_', '-')}"
        raise click.UsageError(f"{option} has no meaning with --to {form}, which holds whole weights")


def _left_out(ckpt: Checkpoint) -> list[dict[str, Any]]:
    """A notice of states that weights alone do not have."""
    from ckptlab.catalog import MASTER, PARAM

    lost = [s for s in ckpt.states if s not in (MASTER, PARAM)]
    return (
        [{"code": "states-left-out", "text": f"safetensors hold weights: {', '.join(lost)} are left out"}]
        if lost
        else []
    )


def _print(content: Mapping[str, Any]) -> None:
    click.echo(json.dumps(content, indent=2, allow_nan=False))


def _note(texts: Iterable[str]) -> None:
    for text in texts:
        _say(f"note: {text}", err=True)


# ------------------------------------------------------------------ statistics


@main.command(short_help="What the numbers of every tensor are like.")
@click.argument("path")
@click.option(
    "--by", type=click.Choice(["tensor", "layer", "stack", "kind", "model"]), default="tensor", help="What a row is."
)
@click.option("--states", metavar="master,exp_avg,…", help="These states alone.")
@click.option("--shards", "by_rank", is_flag=True, help="Each tp rank's shard by itself, instead of whole tensors.")
@click.option("--steps", "whole_run", is_flag=True, help="Every step of the run whose step folders stand in PATH.")
@click.option("--updates", "updates", is_flag=True, help="Instead: how large Adam's last update was.")
@click.option("--spectrum", is_flag=True, help="Effective and stable rank of every matrix too (slower).")
@click.option("--all", "everything", is_flag=True, help="Every row, no name cut.")
@_scheduler
@click.option("--no-progress", is_flag=True, help="No bar, even in a terminal.")
@_strategy
@_json
def stats(
    path: str,
    by: str,
    states: str | None,
    by_rank: bool,
    whole_run: bool,
    updates: bool,
    spectrum: bool,
    everything: bool,
    scheduler: str | None,
    no_progress: bool,
    strategy: str | None,
    as_json: bool,
) -> None:
    """What the numbers of every tensor are like: norm, mean, standard deviation, extremes, zeros, NaN and Inf.

    One pass over the data, in little memory whatever the size. Mean, norm and extremes are those of the finite
    elements. With --json histograms by powers of two are told too.

    \b
      ckptlab stats run/global_step1000
      ckptlab stats run --by stack --states master,exp_avg_sq
      ckptlab stats run --steps --by model
      ckptlab stats run --updates
    """
    if whole_run and (by_rank or updates):
        raise click.UsageError("--steps and --shards or --updates exclude each other")
    if updates and (states or spectrum or by not in ("tensor", "layer", "stack")):
        raise click.UsageError("--updates has a table of its own, --by tensor, layer or stack, without other options")
    from ckptlab.describe.statistics import statistics_text

    progress = sys.stderr.isatty() and not no_progress
    with _workers(scheduler) as on:
        if updates:
            from ckptlab.analysis import updates as next_update

            found = next_update(_open(path, strategy), by=by, shards=by_rank, progress=progress, workers=on)
        else:
            from ckptlab.analysis import open_run
            from ckptlab.analysis import stats as statistics

            view: Any = open_run(path, strategy) if whole_run else _open(path, strategy)
            _note(str(one) for one in (view.skipped if whole_run else ()))
            wanted = [s.strip() for s in states.split(",") if s.strip()] if states is not None else None
            view = view.shards() if by_rank else view
            asked: dict[str, Any] = {"by": by, "states": wanted, "spectrum": spectrum, "histogram": as_json}
            found = statistics(view, progress=progress, workers=on, **asked)
    if as_json:
        _print(found.ckptlab.table.to_dict())
    else:
        _say(statistics_text(found, everything=everything))
