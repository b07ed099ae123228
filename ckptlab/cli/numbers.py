"""Commands that read every element: check, stats, diff."""

from __future__ import annotations

from typing import Any

import click

from ckptlab.cli.given import opened, workers_of
from ckptlab.cli.group import main
from ckptlab.cli.options import (
    as_json_option,
    family_option,
    listed,
    progress_option,
    scheduler_option,
    strategy_option,
)
from ckptlab.cli.out import note, print_json, say, show


@main.command(short_help="Whether a checkpoint is whole and its numbers are sound.")
@click.argument("path")
@click.option("--no-data", is_flag=True, help="Look at files and headers alone; read no tensor.")
@click.option("--checksums", is_flag=True, help="Also compare every file with the checksums that torch wrote into it.")
@scheduler_option
@progress_option
@strategy_option
@as_json_option
@click.pass_context
def check(
    ctx: click.Context,
    path: str,
    no_data: bool,
    checksums: bool,
    scheduler: str | None,
    progress: bool,
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

    with workers_of(scheduler) as on:
        asked: dict[str, Any] = {"data": not no_data, "checksums": checksums, "strategy": strategy}
        found = check_all(path, progress=progress, on=on, **asked)
    show(found, as_json)
    ctx.exit(0 if found.healthy else 1)


@main.command(short_help="What the numbers of every tensor are like.")
@click.argument("path")
@click.option(
    "--by", type=click.Choice(["tensor", "layer", "stack", "kind", "model"]), default="tensor", help="What a row is."
)
@click.option("--states", metavar="master,exp_avg,…", callback=listed, help="These states alone.")
@click.option("--shards", "by_rank", is_flag=True, help="Each tp rank's shard by itself, instead of whole tensors.")
@click.option("--steps", "whole_run", is_flag=True, help="Every step of the run whose step folders stand in PATH.")
@click.option("--updates", "updates", is_flag=True, help="Instead: how large Adam's last update was.")
@click.option("--spectrum", is_flag=True, help="Effective and stable rank of every matrix too (slower).")
@click.option("--all", "everything", is_flag=True, help="Every row, no name cut.")
@scheduler_option
@progress_option
@strategy_option
@as_json_option
def stats(
    path: str,
    by: str,
    states: list[str] | None,
    by_rank: bool,
    whole_run: bool,
    updates: bool,
    spectrum: bool,
    everything: bool,
    scheduler: str | None,
    progress: bool,
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

    with workers_of(scheduler) as on:
        if updates:
            from ckptlab.analysis import updates as next_update

            found = next_update(opened(path, strategy), by=by, shards=by_rank, progress=progress, on=on)
        else:
            from ckptlab.analysis import open_run
            from ckptlab.analysis import stats as statistics

            view: Any = open_run(path, strategy) if whole_run else opened(path, strategy)
            note(str(one) for one in (view.skipped if whole_run else ()))
            view = view.shards() if by_rank else view
            asked: dict[str, Any] = {"by": by, "states": states, "spectrum": spectrum, "histogram": as_json}
            found = statistics(view, progress=progress, on=on, **asked)
    if as_json:
        print_json(found.ckptlab.table.to_dict())
    else:
        say(statistics_text(found, everything=everything))


@main.command(short_help="Compare two checkpoints, of any formats and meshes.")
@click.argument("a", metavar="A")
@click.argument("b", metavar="B")
@click.option("--states", metavar="master,exp_avg,…", callback=listed, help="Compare these states alone.")
@scheduler_option
@family_option
@click.option("--heads", type=click.IntRange(1), metavar="N", help="Attention heads, where neither side tells.")
@click.option("--kv-heads", type=click.IntRange(1), metavar="N", help="Key/value heads, likewise.")
@progress_option
@strategy_option
@as_json_option
@click.pass_context
def diff(
    ctx: click.Context,
    a: str,
    b: str,
    states: list[str] | None,
    scheduler: str | None,
    family: str | None,
    heads: int | None,
    kv_heads: int | None,
    progress: bool,
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

    numbers: dict[str, Any] = {name: n for name, n in (("heads", heads), ("kv_heads", kv_heads)) if n is not None}
    sides = opened(a, strategy), opened(b, strategy)
    with workers_of(scheduler) as on:
        found = compare(*sides, states=states, family=family, progress=progress, on=on, **numbers)
    show(found, as_json)
    ctx.exit(0 if found.equal else 1)
