"""A process that forks: what takes seconds to import is imported once a session of pytest, and shared by its workers.

A server is a script that calls `serve`. The first who connects starts it, and it ends with the session. Each connection
has a fork of it, in a process group of its own, whose number it sends as the first line.
"""

from __future__ import annotations

import fcntl
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TextIO


def connect(script: Path) -> socket.socket:
    """A connection to a fork of a server."""
    session = os.environ["PYTEST_SESSION"]
    folder = Path(tempfile.gettempdir(), f"ckptlab-forks-{session}")
    folder.mkdir(exist_ok=True)
    address, log = folder / f"{script.stem}.socket", folder / f"{script.stem}.log"
    with (folder / f"{script.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not address.exists():
            with log.open("w") as said:
                command = [sys.executable, str(script), str(address), session]
                server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=said, stderr=said)
            while not address.exists():
                if server.poll() is not None:
                    raise RuntimeError(f"{script} ended:\n{log.read_text()[-2000:]}")
                time.sleep(0.05)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(str(address))
    return connection


def serve(handle: Callable[[TextIO], None]) -> None:
    """Call `handle` with each connection, in a fork; return when the session has ended, and its forks with it."""
    address, session = Path(sys.argv[1]), int(sys.argv[2])
    os.setsid()  # what is typed at the terminal is for the session
    forked: set[int] = set()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}~")
        listener.listen(64)
        os.rename(f"{address}~", address)
        while _lives(session):
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                    forked.discard(ended)
            if not select.select([listener], [], [], 1.0)[0]:
                continue
            connection, _ = listener.accept()
            if child := os.fork():
                forked.add(child)
                connection.close()
                continue
            with connection, connection.makefile("rw") as lines:
                os.setsid()
                print(os.getpid(), file=lines, flush=True)
                handle(lines)
            os._exit(0)
    for child in forked:
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    for path in address.parent.glob(f"{address.stem}.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    with suppress(OSError):  # another server's are there
        address.parent.rmdir()


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
