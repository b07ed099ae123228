"""What one notch of the widget costs the kernel, in seconds of the processor: a new mesh, all parts of the tab.

python benchmarks/bench_explore.py            # models on paper, in growing sizes
"""

from __future__ import annotations

import time

import ckptlab
from ckptlab import Mesh
from ckptlab.widgets import explorer as widget

NOTCHES = (2, 3, 5)  # times which dp is slid to
CASES = (
    ("GPT-2, 8 ranks", {"layers": 12, "hidden": 768, "heads": 12, "vocab": 50257}, Mesh(tp=2, pp=2, dp=2)),
    ("Llama 2 7B, 64 ranks", {"layers": 32, "hidden": 4096, "heads": 32, "vocab": 32000}, Mesh(tp=4, pp=2, dp=8)),
    ("GPT-3, 512 ranks", {"layers": 96, "hidden": 12288, "heads": 96, "vocab": 50257}, Mesh(tp=8, pp=8, dp=8)),
    ("1,000 tensors, 512 ranks", {"layers": 166, "hidden": 8192, "heads": 64, "vocab": 50000}, Mesh(tp=8, pp=8, dp=8)),
)


def seconds(explorer: widget.Explorer, **changes: object) -> float:
    """Of the processor, for the answer to a change; which degrees work is found out beside, and not in it."""
    start = time.thread_time()
    explorer.choose(**changes)
    return time.thread_time() - start


def main() -> None:
    widget.AT_ONCE = 10**12  # large models too, so that it is this thread that works
    print("| model | tensors | tab | ms of CPU a notch |\n|---|---|---|---|")
    for name, numbers, mesh in CASES:
        explorer = ckptlab.explore(ckptlab.paper_model(mesh, 1, **numbers))
        explorer.tab = "Reshape"
        spent = []
        for dp in NOTCHES:
            explorer.settled()
            spent.append(seconds(explorer, mesh=mesh.replace(dp=mesh.dp * dp)))
        print(f"| {name} | {len(explorer.subject.catalog.tensors)} | Reshape | {1000 * sorted(spent)[1]:.0f} |")


if __name__ == "__main__":
    main()
