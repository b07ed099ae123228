"""Kernels of notebooks that are forks of a process which has imported what notebooks import, but for ckptlab.

As a server of forks it is one; as what a kernelspec starts (`kernels.py -f FILE …`), it asks for a fork and lasts as
long as that does.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TextIO

import forks

IMPORTED = (
    *("ipykernel.kernelapp", "ipykernel.debugger", "anywidget", "xarray", "dask.array"),
    *("scipy.fftpack", "scipy.special", "matplotlib.pyplot", "matplotlib.backends.backend_agg"),
    *("torch", "transformers.cache_utils"),
)


def spec(folder: Path) -> None:
    """Write a kernelspec `python3` into a folder that JUPYTER_PATH is to name."""
    (folder / "kernels" / "python3").mkdir(parents=True)
    command = [sys.executable, "-S", __file__, "-f", "{connection_file}"]
    text = json.dumps({"argv": command, "display_name": "Python 3", "language": "python"})
    (folder / "kernels" / "python3" / "kernel.json").write_text(text)


def _run(lines: TextIO) -> None:
    """A kernel, in a fork; as if it had been started with this environment, in this folder."""
    arguments, environment, folder = json.loads(lines.readline())
    os.environ.clear()
    os.environ.update(environment)
    os.environ.pop("JPY_PARENT_PID", None)  # which is not its parent
    os.chdir(folder)
    sys.path[:1] = os.environ["PYTHONPATH"].split(os.pathsep)
    sys.argv[1:] = arguments
    sys.modules["ipykernel.kernelapp"].launch_new_instance(argv=arguments)
    atexit._run_exitfuncs()


def _ask() -> None:
    with forks.connect(Path(__file__)) as connection, connection.makefile("rw") as lines:
        print(json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]), file=lines, flush=True)
        lines.read()  # until it ends


if __name__ == "__main__":
    if sys.argv[1] == "-f":
        _ask()
    else:
        os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
        for name in IMPORTED:
            with suppress(ImportError):
                importlib.import_module(name)
        forks.serve(_run)
