"""What it costs to read a file that was made to cost much: each is read in a process of its own, forked from one that
has imported the readers, since importing them takes longer than nearly all that they refuse."""

from __future__ import annotations

import atexit
import json
import select
import subprocess
import sys
from functools import cache
from pathlib import Path

HANGS = 600.0  # seconds after which what does not end is a fault: no bound on how long a machine may take
_SERVER = """
import json, os, resource, sys
from ckptlab.errors import CkptlabError
from ckptlab.formats.dcp.read import read_dcp
from ckptlab.formats.torch import torchfile

READERS = {"dcp": read_dcp, "pt": torchfile.read}

def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

for line in sys.stdin:
    kind, path = json.loads(line)
    child = os.fork()
    if not child:
        before, said = most(), ""
        try:
            READERS[kind](path)
        except CkptlabError as error:
            said = str(error)
        print(json.dumps([said, most() - before]), flush=True)
        os._exit(0)
    if status := os.waitpid(child, 0)[1]:
        print(json.dumps(status), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    command = [sys.executable, "-c", _SERVER]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.kill)
    return server


def cost(kind: str, path: Path) -> tuple[str, int]:
    """(what a reader, "pt" or "dcp", refuses a path with, KiB of memory that it took). AssertionError where it ended
    otherwise."""
    server = _server()
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([kind, str(path)]), file=server.stdin, flush=True)
    assert select.select([server.stdout], [], [], HANGS)[0], f"the reader of {path} does not end"
    answer = json.loads(server.stdout.readline())
    assert isinstance(answer, list), f"the reader of {path} ended with {answer}"
    said, memory = answer
    return said, memory
