"""What commands print."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import click

from ckptlab.words import escaped


def say(text: str, err: bool = False) -> None:
    """Print text, in which names may stand that files hold."""
    click.echo(escaped(text), err=err)


def print_json(content: Mapping[str, Any]) -> None:
    """Print one object, as --json asks for."""
    click.echo(json.dumps(content, indent=2, allow_nan=False))


def show(found: Any, as_json: bool) -> None:
    """Print what an analysis found, as one object or as text."""
    if as_json:
        print_json(found.to_dict())
    else:
        say(repr(found))


def note(texts: Iterable[str]) -> None:
    """Print remarks on stderr."""
    for text in texts:
        say(f"note: {text}", err=True)
