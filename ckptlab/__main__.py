"""`python -m ckptlab`, and the command `ckptlab`: the command line as a process of its own."""

from __future__ import annotations

import atexit
import gc
import os
import sys
import warnings

_GARBAGE = 100_000  # objects that are made before circles are looked for: hardly any are, and imports make many


def run() -> None:
    """Run the command line, and end the process at once: to take down what was imported takes half as long as to
    import numpy."""
    gc.set_threshold(_GARBAGE)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy starts as many as there are cores; ours keep them busy
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    from ckptlab.cli import main

    status = 0
    try:
        main(prog_name="ckptlab")
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except OSError as error:  # of what runs outside of a command: help that cannot be printed
        print(f"ckptlab: {error.strerror}", file=sys.stderr)
        status = 2
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None where it was closed
        try:
            stream.flush()
        except OSError:
            status = status or 2
    os._exit(status)


if __name__ == "__main__":
    run()
