"""Opening, planning and costing a checkpoint of 384 ranks: 720 files, 2.5 TB apparent, all holes (see holes.py); and
writing one of its optimizer files for another mesh.

`python benchmarks/bench_open.py [--checkpoint FOLDER]` prints seconds and the peak of resident memory of one process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from holes import make, sizes

MEASURED = """
import resource, sys, time
began = time.monotonic()
import ckptlab
def said(what, since):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"| {what} | {time.monotonic() - since:.2f} | {peak:.0f} |", flush=True)
    return time.monotonic()
ckpt = ckptlab.open(sys.argv[1])
began = said(f"import and open ({len(ckpt.tensors)} tensors)", began)
reshaped = ckpt.reshape(ckptlab.Mesh(tp=8, pp=6, dp=16))
began = said("reshape to tp 8 · pp 6 · dp 16", began)
plan = reshaped.plan
began = said(f"plan ({plan.rows:,} rows)", began)
cost = reshaped.cost()
began = said(f"cost ({cost.moved / 1e12:.2f} of {cost.read / 1e12:.2f} TB change rank)", began)
ckpt._repr_html_()
began = said("HTML repr", began)
files = reshaped.files
began = said(f"plans of all {len(files):,} files", began)
from ckptlab.formats import fileplan
one = next(f for f in files if f.name.endswith("mp_rank_00_optim_states.pt"))
fileplan.write(one, sys.argv[2])
said(f"write one optimizer file ({one.nbytes / 1e9:.1f} GB)", began)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="where it is or shall be (default: temporary)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.checkpoint or Path(scratch) / "holes").resolve()
        if not folder.exists():
            make(folder)
        count, apparent, held = sizes(folder)
        print(f"{count} files, {apparent / 1e12:.2f} TB apparent, {held / 1e6:.0f} MB on disk\n")
        print("| step | seconds | peak MiB so far |\n|---|---|---|", flush=True)
        subprocess.run([sys.executable, "-c", MEASURED, str(folder), str(Path(scratch) / "one.pt")], check=True)
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "ckptlab", "info", str(folder)], check=True, stdout=subprocess.DEVNULL)
        print(f"| `ckptlab info`, whole process | {time.monotonic() - began:.2f} | |")


if __name__ == "__main__":
    main()
