"""The command line, in this process."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result

from ckptlab.cli import main


def run(*arguments: str | Path) -> Result:
    """What a command does; an exception of its own is raised."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def refused(*arguments: str | Path) -> str:
    """What stderr says when the command ends in trouble."""
    result = run(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("ckptlab: ")
    assert "Traceback" not in result.stderr
    return result.stderr
