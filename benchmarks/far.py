"""What opening costs behind a URL: BLOOM-176B's 720 files (see holes.py) over HTTP, with latency added.

`python benchmarks/far.py FOLDER [SECONDS]` makes the holes in FOLDER (which must not exist) and removes them again.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

import holes

import ckptlab

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from far_server import Server


def main(folder: str, latency: str = "0.05") -> None:
    root = holes.make(Path(folder).resolve())
    files, apparent, _ = holes.sizes(root)
    server = Server("http", str(root))
    try:
        began = time.monotonic()
        ckptlab.open(root)
        near = time.monotonic() - began
        server.told(latency=latency)
        began = time.monotonic()
        ckptlab.open(server.url)
        distant = time.monotonic() - began
        told = server.told()
    finally:
        server.close()
        shutil.rmtree(root)
    asked, nbytes = len(told["requests"]), told["bytes"]
    print(f"{files} files of {apparent / 1e12:.1f} TB: near {near:.1f} s; far, {latency} s away, {distant:.1f} s")
    print(f"{asked} requests ({asked / files:.1f} a file), at most {told['most']} at a time; {nbytes / 1e6:.0f} MB")


if __name__ == "__main__":
    main(*sys.argv[1:])
