"""Commands that show what there is: info, ls, explore, formats."""

from __future__ import annotations

import os
from typing import Any

import click

from ckptlab.cli.given import opened
from ckptlab.cli.group import main
from ckptlab.cli.options import as_json_option, mesh_options, strategy_option
from ckptlab.cli.out import note, print_json, say


@main.command(short_help="What a checkpoint holds.")
@click.argument("path", nargs=-1, required=True, metavar="PATH...")
@click.option(
    "--all", "everything", is_flag=True, help="A line for every tensor: layers are not folded, names not cut."
)
@strategy_option
@as_json_option
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
    ckpt = opened(path[0] if len(path) == 1 else path, strategy)
    if as_json:
        from ckptlab.describe import summary

        print_json(summary(ckpt.catalog))
        return
    from ckptlab.describe import summary_text

    say(summary_text(ckpt.catalog, findings=False, everything=everything))
    note(n.text for n in ckpt.findings)


@main.command("ls", short_help="Its tensors, one a line.")
@click.argument("path")
@click.argument("pattern", required=False)
@click.option("-E", "--regex", is_flag=True, help="PATTERN is a regular expression, found anywhere in a name.")
@strategy_option
@as_json_option
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

    ckpt = opened(path, strategy)
    found = listed(ckpt, pattern, regex)
    if as_json:
        print_json({"path": ckpt.path, "tensors": found})
    else:
        say(listing(found))


@main.command(short_help="A page to look into a checkpoint and its reshapes.")
@click.argument("path")
@click.argument("destination", metavar="DST.html")
@mesh_options
@strategy_option
def explore(path: str, destination: str, strategy: str | None, **degrees: int | None) -> None:
    """Write what `ckptlab.explore` shows in a notebook as one page, DST.html, that opens from disk and answers to
    hover, click and keyboard: tensors and how they are cut, ranks, files, target meshes, memory, cost.

    An axis that is not named has the target keep PATH's degree. Needs the extra `widgets`.

    \b
      ckptlab explore run page.html --tp 4
    """
    from ckptlab.errors import DestinationError
    from ckptlab.widgets import explore as look

    ckpt = opened(path, strategy)
    if os.path.lexists(destination):
        raise DestinationError(f"{destination} exists already: remove it, or name another destination")
    named: dict[str, Any] = {axis: degree for axis, degree in degrees.items() if degree is not None}
    look(ckpt.reshape(**named) if named else ckpt).to_html(destination)
    say(destination)


@main.command(short_help="What is registered: formats, strategies, families, …")
@as_json_option
def formats(as_json: bool) -> None:
    """What is registered here: formats that open, strategies for layouts, families of names, array libraries, plots of
    statistics. Packages may add to each."""
    from ckptlab.arrays.backends import BACKENDS
    from ckptlab.formats import every
    from ckptlab.sharding.families import FAMILIES
    from ckptlab.sharding.strategies import REGISTRY
    from ckptlab.views.accessor import PLOTS

    known = every()
    others = {
        "strategies": list(REGISTRY.names()),
        "families": list(FAMILIES.names()),
        "backends": list(BACKENDS.names()),
        "plots": list(PLOTS.names()),
    }
    if as_json:
        listed = [{"name": f.name, "title": f.title, "reads": f.reads, "writes": f.writes} for f in known]
        print_json({"formats": listed, **others})
        return
    width = max(len(format.name) for format in known)
    for format in known:
        does = [verb for verb, can in (("reads", format.reads), ("writes", format.writes)) if can]
        otherwise = "planned, never stored" if format.home == format.name else "named, not read yet"
        say(f"{format.name:<{width}}  {format.title} ({', '.join(does) or otherwise})")
    for what, names in others.items():
        say(f"{what:<{width}}  {', '.join(names)}")
