"""The command line: a module for each kind of command; what a command needs is imported when it runs."""

from ckptlab.cli import contents, numbers, targets  # each adds its commands
from ckptlab.cli.group import main

__all__ = ["contents", "main", "numbers", "targets"]
