"""The group of all commands, and how they end when the input, the machine or the user is at fault."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from typing import Any, NoReturn

import click

from ckptlab.cli.out import say
from ckptlab.errors import CkptlabError

TROUBLE, INTERRUPTED, TERMINATED = 2, 130, 143
_NO_MEMORY = "there is not enough memory or address space (ulimit -v): --workers 1 needs the least"


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
        except click.NoSuchOption as error:
            raise self._elsewhere(error) from None
        except (KeyboardInterrupt, _Terminated) as stopped:
            _stopped(stopped, ctx)
        except RuntimeError as error:  # what a signal becomes that comes while Python waits for a lock
            if isinstance(error.__context__, KeyboardInterrupt | _Terminated):
                _stopped(error.__context__, ctx)
            if str(error) == "can't start new thread":
                _fail(_NO_MEMORY)
            raise
        except MemoryError:
            _fail(_NO_MEMORY)
        except BrokenPipeError:
            raise
        except OSError as error:
            _fail(_reason(error))

    def _elsewhere(self, error: click.NoSuchOption) -> click.UsageError:
        """An option that other commands have, said so."""
        name = error.option_name
        found = [command.name for command in self.commands.values() if any(name in p.opts for p in command.params)]
        if not found:
            return error
        return click.UsageError(f"No such option {name!r} here: it is one of {', '.join(map(str, found))}", error.ctx)


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
    say(f"ckptlab: {message}", err=True)
    raise click.exceptions.Exit(status)


def _reason(error: OSError) -> str:
    what = error.strerror or str(error)
    named = f"{error.filename}: {what}" if error.filename else what
    if error.errno == errno.ENOMEM:
        return f"{named}; {_NO_MEMORY}"
    if error.errno == errno.EMFILE:
        named += ": too few files may be open at a time (ulimit -n)"
    if error.errno == errno.EFBIG:
        named += ": a file may not become that large (ulimit -f, or the file system's limit)"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        named += "; what is complete is kept: make room and repeat the command to go on"
    return named


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96})
@click.version_option(package_name="ckptlab", message="ckptlab %(version)s")
def main() -> None:
    """Look into checkpoints of 3D-parallel training runs (of DeepSpeed, FSDP, torchtitan, Megatron-core, …), and write
    them for another mesh.

    PATH is a step folder, the folder that holds `latest`, a universal folder, a folder of torch's Distributed
    Checkpoint, weights as safetensors or pytorch_model.bin, or a folder with one of these below it; or a URL of one
    (s3://, gs://, http://, …). Reading takes headers only and executes nothing; a source is never changed.

    \b
      ckptlab info run/global_step1000
      ckptlab ls run "*.mlp.*"
      ckptlab plan run --tp 4 --pp 1
      ckptlab convert run out/global_step1000 --to deepspeed --tp 4 --pp 1
      ckptlab check run
      ckptlab stats run --by stack
      ckptlab diff run out
    """
