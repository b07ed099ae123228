"""Real checkpoints of about 1.4 GB, saved by DeepSpeed: 103 million parameters after one training step.

`python benchmarks/large.py FOLDER [CASE ...]` makes them in FOLDER (some 40 s each on two cores, 7 GB of memory).
The truth that `data/foundry` keeps beside its small cases is left out: it would be as large again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))  # `foundry`

from foundry.client import client_state
from foundry.ranks import run_ranks
from foundry.train import Case, Run

CASES = {
    "gpt_tp2_pp1_dp2": Case("gpt_large", tp=2, dp=2, grad_accum_dtype="fp32"),
    "plain_zero3_dp4": Case("plain_large", dp=4, zero=3, zero_config={"stage3_param_persistence_threshold": 0}),
}


def train(rank: int, case: Case, folder: Path) -> None:
    """One rank: a step of training, then save."""
    run = Run(case, rank)
    run.step(1)
    run.engine.save_checkpoint(
        str(folder), tag="global_step1", client_state=client_state(case, 1) if case.parallel else {"iteration": 1}
    )


def make(name: str, out: Path) -> Path:
    """The step folder of case `name` in `out`, made unless it is there."""
    folder = out / name
    if not (folder / "latest").exists():
        folder.mkdir(parents=True, exist_ok=True)
        run_ranks(train, CASES[name].world, CASES[name], folder)
    return folder / "global_step1"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("cases", nargs="*", help=f"default: {', '.join(CASES)}")
    options = parser.parse_args()
    for name in options.cases or CASES:
        folder = make(name, options.out.resolve())
        size = sum(f.stat().st_size for f in folder.iterdir())
        print(f"{folder}: {size / 1e9:.2f} GB", flush=True)


if __name__ == "__main__":
    main()
