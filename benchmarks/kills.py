"""Killing conversions at random moments: `python benchmarks/kills.py SOURCE [--kills 100] [--signal KILL]`.

Each conversion (native, universal, safetensors in turn) is begun, killed after a random part of the time that an
uninterrupted one takes, and repeated, until one gets to its end. After every kill the source must be as it was and the
destination absent or whole; at the end it must have the bytes of one that was never interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from ckptlab.convert import manifest
from ckptlab.convert.journal import crc_of

FORMS = {
    "native": ["--to", "deepspeed", "--dp", "1"],
    "universal": ["--to", "universal"],
    "safetensors": ["--to", "safetensors"],
}


def command(source: Path, out: Path, form: str) -> list[str]:
    return [sys.executable, "-m", "ckptlab", "convert", str(source), str(out), *FORMS[form], "--json"]


def state(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())


def whole(out: Path) -> bool:
    """Whether every file has the bytes that its manifest says."""
    listed = manifest.read(str(out)) or {}
    return bool(listed) and all(crc_of(str(out / n), 0, size) == crc for n, (size, crc) in listed.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", default="KILL")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance, counts = random.Random(options.seed), Counter[str]()
    before = state(options.source)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        truth, took = {}, {}
        for form in FORMS:
            out, began = Path(scratch) / f"{form} whole", time.monotonic()
            subprocess.run(command(options.source, out, form), check=True, capture_output=True)
            truth[form], took[form] = manifest.read(str(out)), time.monotonic() - began
            assert whole(out)
            shutil.rmtree(out)
        while counts["kills"] < options.kills:
            form = list(FORMS)[counts["conversions"] % len(FORMS)]
            out = Path(scratch) / form
            killed = 0
            while True:
                running = subprocess.Popen(
                    command(options.source, out, form), stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
                try:
                    told = running.communicate(timeout=chance.uniform(0.1, took[form]) if killed < 8 else None)
                except subprocess.TimeoutExpired:
                    running.send_signal(getattr(signal, f"SIG{options.signal}"))
                    running.communicate()
                    killed += 1
                    assert state(options.source) == before, "the source was touched"
                    if out.exists():
                        counts["killed when it had its name"] += 1
                        assert whole(out), "a destination that is not whole"
                    continue
                if running.returncode == 2 and out.exists() and b"exists already" in told[1]:
                    break  # killed after all was done
                assert running.returncode == 0, told[1].decode()
                counts["files kept"] += json.loads(told[0])["resumed"]
                break
            assert manifest.read(str(out)) == truth[form], "other bytes than those never interrupted"
            assert whole(out)
            shutil.rmtree(out)
            counts["kills"] += killed
            counts["conversions"] += 1
            print(dict(counts), flush=True)


if __name__ == "__main__":
    main()
