"""Converting real checkpoints of about 1.4 GB, beside DeepSpeed's own tools and a plain copy of the same files.

`python benchmarks/bench_convert.py [--checkpoints FOLDER] [--rounds N]` makes the checkpoints in FOLDER if they are not
there (see large.py), runs every command in turn, N times over, page cache warm, and prints medians of whole processes:
seconds, the ratios to `cp -r` and to that with a `sync`, seconds of the processor, and the peak of resident memory (of
the largest process). What syncs is to be compared with the second, what does not (`--no-sync`, DeepSpeed) with the
first.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

PYTHON = sys.executable
ZERO_TO_FP32 = "deepspeed.utils.zero_to_fp32"
CKPTLAB = [PYTHON, "-m", "ckptlab", "convert", "--no-progress"]
ENVIRONMENT = dict(os.environ, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")


def commands(gpt: Path, zero3: Path, out: Path) -> dict[str, dict[str, list[str]]]:
    """For each checkpoint the commands by name; the first is the copy that the others are compared with."""
    to = str(out / "made")

    def synced(source: Path) -> list[str]:
        return ["sh", "-c", f"cp -r '{source}' '{to}' && sync -f '{to}'"]

    def ckptlab(source: Path, form: str, *options: str) -> list[str]:
        return [*CKPTLAB, str(source), to, "--to", form, *options]

    def ds_to_universal(source: Path) -> list[str]:
        module = [PYTHON, "-m", "deepspeed.checkpoint.ds_to_universal"]
        return [*module, "--input_folder", str(source), "--output_folder", to]

    return {
        "GPT, tp 2 · dp 2, ZeRO-1": {
            "cp -r": ["cp", "-r", str(gpt), to],
            "cp -r, sync": synced(gpt),
            "ckptlab → universal": ckptlab(gpt, "universal"),
            "ckptlab → universal, --no-sync": ckptlab(gpt, "universal", "--no-sync"),
            "ds_to_universal": ds_to_universal(gpt),
            "ckptlab → native, tp 4 · dp 1": ckptlab(gpt, "deepspeed", "--tp", "4", "--dp", "1"),
            "ckptlab → native, tp 1 · dp 4": ckptlab(gpt, "deepspeed", "--tp", "1", "--dp", "4"),
            "ckptlab → native, tp 1 · dp 4, --no-sync": ckptlab(
                gpt, "deepspeed", "--tp", "1", "--dp", "4", "--no-sync"
            ),
            "the same, --no-verify": ckptlab(gpt, "deepspeed", "--tp", "1", "--dp", "4", "--no-sync", "--no-verify"),
            "ckptlab → safetensors": ckptlab(gpt, "safetensors"),
        },
        "plain, dp 4, ZeRO-3": {
            "cp -r": ["cp", "-r", str(zero3), to],
            "cp -r, sync": synced(zero3),
            "ckptlab → universal": ckptlab(zero3, "universal"),
            "ckptlab → universal, --no-sync": ckptlab(zero3, "universal", "--no-sync"),
            "ds_to_universal": ds_to_universal(zero3),
            "ckptlab → native, dp 3": ckptlab(zero3, "deepspeed", "--dp", "3"),
            "ckptlab → safetensors": ckptlab(zero3, "safetensors"),
            **(
                {"zero_to_fp32 → pytorch_model.bin": [PYTHON, "-m", ZERO_TO_FP32, str(zero3.parent), to]}
                if find_spec("huggingface_hub")  # it insists
                else {}
            ),
        },
    }


def run(command: list[str], out: Path) -> tuple[float, float, float]:
    """Seconds, peak resident MiB and seconds of the processor of a command, its output folder made anew. RuntimeError
    if it fails."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    log = out / "log"
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        os.execvpe(command[0], command, ENVIRONMENT)
    _, status, usage = os.wait4(pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{' '.join(command)} failed:\n{log.read_text()[-2000:]}")
    return time.monotonic() - began, usage.ru_maxrss / 1024, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=Path, help="where the checkpoints are or shall be (default: temporary)")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.checkpoints or Path(scratch)).resolve()
        # made by a process of its own: what this one holds would count in the peaks of those that it starts
        subprocess.run([PYTHON, Path(__file__).with_name("large.py"), folder], check=True, stdout=subprocess.DEVNULL)
        tables = commands(
            folder / "gpt_tp2_pp1_dp2" / "global_step1",
            folder / "plain_zero3_dp4" / "global_step1",
            Path(scratch) / "out",
        )
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
        for _ in range(options.rounds):
            for case, by_name in tables.items():
                for name, command in by_name.items():
                    found.setdefault((case, name), []).append(run(command, Path(scratch) / "out"))
    print("| checkpoint | command | seconds, median (range) | × cp | × cp, sync | CPU s | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for (case, name), runs in found.items():
        seconds = [r[0] for r in runs]
        median = statistics.median(seconds)
        copies = (statistics.median(r[0] for r in found[case, base]) for base in ("cp -r", "cp -r, sync"))
        ratios = " | ".join(f"{median / copy:.1f}" for copy in copies)
        used, peak = statistics.median(r[2] for r in runs), max(r[1] for r in runs)
        spread = f"{median:.2f} ({min(seconds):.2f}–{max(seconds):.2f})"
        print(f"| {case} | {name} | {spread} | {ratios} | {used:.2f} | {peak:.0f} |")


if __name__ == "__main__":
    main()
