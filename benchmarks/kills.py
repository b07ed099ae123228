"""Killing conversions at random moments, and letting their disks run full.

`python benchmarks/kills.py SOURCE [--kills 100] [--signal KILL TERM INT] [--full 10]`

Each conversion (native, universal, safetensors, DCP in turn) is begun, killed after a random part of the time that an
uninterrupted one takes, and repeated, until one gets to its end. After every kill the source must be as it was and the
destination absent or whole; at the end it must have the bytes of one that was never interrupted. --full: the same on a
disk (a tmpfs, which takes root to mount) that has room for a part only, of so many sizes, and is enlarged then.
"""

from __future__ import annotations

import argparse
import atexit
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
from multiprocessing import get_context
from pathlib import Path

import ckptlab.cli
from ckptlab.__main__ import run
from ckptlab.convert import manifest
from ckptlab.convert.sources import crc_of

FORMS = {
    "native": ["--to", "deepspeed", "--dp", "1"],
    "universal": ["--to", "universal"],
    "safetensors": ["--to", "safetensors"],
    "DCP": ["--to", "dcp", "--dp", "3"],
}


def command(source: Path, out: Path, form: str) -> list[str]:
    return [sys.executable, "-m", "ckptlab", "convert", str(source), str(out), *FORMS[form], "--json"]


class Forked:
    """A command that runs in a fork of this process, which has imported it: what is killed is a conversion, and no
    interpreter that starts."""

    def __init__(self, command: list[str]) -> None:
        self.said = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        self.process = get_context("fork").Process(target=self._run, args=(command,))
        self.process.start()

    def _run(self, command: list[str]) -> None:
        for number, file in enumerate(self.said, 1):
            os.dup2(file.fileno(), number)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # as a shell leaves it
        atexit._clear()  # to remove the folder of them all is for whoever made it
        sys.argv = command[2:]
        run()

    def end(self, within: float | None = None) -> tuple[int | None, bytes, bytes]:
        """The exit status, None where it runs on after so many seconds; what was printed, and on stderr."""
        self.process.join(within)
        texts = [os.pread(file.fileno(), 1 << 20, 0) for file in self.said]
        return self.process.exitcode, texts[0], texts[1]


def state(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file())


def whole(out: Path) -> bool:
    """Whether every file has the bytes that its manifest says."""
    listed = manifest.read(str(out)) or {}
    return bool(listed) and all(crc_of(str(out / n), 0, size) == crc for n, (size, crc) in listed.items())


def check(options: argparse.Namespace, before: list[tuple[str, int, int]], out: Path) -> bool:
    """Whether a destination has its name; AssertionError where it is not whole, or the source was touched."""
    assert state(options.source) == before, "the source was touched"
    assert not out.exists() or whole(out), "a destination that is not whole"
    return out.exists()


def killed(options: argparse.Namespace, out: Path, form: str, took: float, chance: random.Random) -> Counter[str]:
    """One conversion, killed and repeated until it ends."""
    counts, before = Counter[str](conversions=1), state(options.source)
    while True:
        running = Forked(command(options.source, out, form))
        status, told, said = running.end(chance.uniform(0, took) if counts["kills"] < 8 else None)
        if status is None:
            number = chance.choice(options.signal)
            os.kill(running.process.pid or 0, getattr(signal, f"SIG{number}"))
            said = running.end()[2]
            counts.update(["kills", f"by {number}"])
            counts["killed when it had its name"] += check(options, before, out)
            assert b"Traceback" not in said or b"__main__.py" not in said, said  # Python's own, before it began
            continue
        if status == 2 and out.exists() and b"exists already" in said:
            return counts  # killed after all was done
        assert status == 0, said.decode()
        counts["files kept"] += json.loads(told)["resumed"]
        return counts


def full(options: argparse.Namespace, folder: Path, form: str, part: float, size: int) -> None:
    """One conversion on a disk that has room for a part of it, repeated when there is room."""
    before, out = state(options.source), folder / form
    pages = max(int(size * part) >> 12, 16)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={pages << 12}", "tmpfs", folder], check=True)
    try:
        done = subprocess.run(command(options.source, out, form), capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        assert "make room" in done.stderr, done.stderr
        assert not check(options, before, out), "it has its name"
        subprocess.run(["mount", "-o", f"remount,size={2 * size + (64 << 20)}", folder], check=True)
        done = subprocess.run(command(options.source, out, form), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert check(options, before, out)
        options.made[form] = manifest.read(str(out))
    finally:
        subprocess.run(["umount", folder], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--signal", nargs="+", default=["KILL"])
    parser.add_argument("--full", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.made = {}
    ckptlab.open(options.source)  # what that imports, no fork has to
    chance, counts = random.Random(options.seed), Counter[str]()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as scratch:
        truth, took, sizes = {}, {}, {}
        for form in FORMS:
            out, began = Path(scratch) / f"{form} whole", time.monotonic()
            assert Forked(command(options.source, out, form)).end()[0] == 0
            truth[form], took[form] = manifest.read(str(out)), time.monotonic() - began
            sizes[form] = sum(size for _, size, _ in state(out))
            assert whole(out)
            shutil.rmtree(out)
        while counts["kills"] < options.kills:
            form = list(FORMS)[counts["conversions"] % len(FORMS)]
            out = Path(scratch) / form
            counts += killed(options, out, form, took[form], chance)
            assert manifest.read(str(out)) == truth[form], "other bytes than those never interrupted"
            assert whole(out)
            shutil.rmtree(out)
            print(dict(counts), flush=True)
        for i in range(options.full):
            form = list(FORMS)[i % len(FORMS)]
            folder = Path(scratch) / "disk"
            folder.mkdir(exist_ok=True)
            full(options, folder, form, 0.999 * i / max(options.full - 1, 1), sizes[form])
            assert options.made[form] == truth[form], "other bytes than those never interrupted"
            counts["disks full"] += 1
            print(dict(counts), flush=True)


if __name__ == "__main__":
    main()
