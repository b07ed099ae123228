"""Make real checkpoints: `python data/foundry/make.py [CASE ...] [--out DIR]` (`--list` shows the cases)."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `foundry`, from wherever the script is run

import safetensors.torch
import torch

from foundry import megatron
from foundry.client import client_state
from foundry.ranks import run_ranks
from foundry.train import DATA_FIRST, Case, Run
from foundry.truth import gather, save, tied_names

DATA = Path(__file__).resolve().parents[1]
SHARDED = {"stage3_param_persistence_threshold": 0}

COMMITTED = {
    "gpt_tp2_pp2_dp2": Case("gpt", tp=2, pp=2, dp=2, grad_accum_dtype="fp32"),
    "plain_zero2_dp2": Case("plain", dp=2, zero=2),
    "plain_zero2_dp2_round_robin": Case("plain", dp=2, zero=2, zero_config={"round_robin_gradients": True}),
    "plain_zero3_dp2": Case("plain", dp=2, zero=3, zero_config=SHARDED | {"sub_group_size": 900}),
    "plain_zero1_dp2_steps": Case("plain", dp=2, saved_step=5, further_steps=0, earlier_steps=(2, 4)),
    "moe_ep2_dp4": Case("plain_moe", dp=4, ep=2, zero=2),
    "autoep_ep2_dp4": Case("plain_autoep", dp=4, ep=2, zero=2),
    "autotp_tp2_dp2": Case("plain_autotp", tp=2, dp=2, grad_accum_dtype="fp32"),
}
OTHERS = {
    "gpt_tp1_pp2_dp2": Case("gpt", pp=2, dp=2, grad_accum_dtype="fp32"),
    "gpt_tp2_pp1_dp2": Case("gpt", tp=2, dp=2, grad_accum_dtype="fp32"),
    "gpt_tp2_pp1_dp2_fp32": Case("gpt", tp=2, dp=2, dtype="fp32"),
    "gpt_tp2_pp1_dp2_fp16": Case("gpt", tp=2, dp=2, dtype="fp16"),
    "gpt_tp1_pp2_dp2_zero0": Case("gpt", pp=2, dp=2, zero=0),
    "gpt_tp2_pp2_dp1_zero0_fp16": Case("gpt", tp=2, pp=2, zero=0, dtype="fp16"),
    "gpt_tp1_pp2_dp2_round_robin": Case("gpt", pp=2, dp=2, dtype="fp16", zero_config={"round_robin_gradients": True}),
    "gpt_tp4_pp1_dp1": Case("gpt", tp=4, grad_accum_dtype="fp32"),
    "llama_tp2_pp1_dp2": Case("llama", tp=2, dp=2, grad_accum_dtype="fp32"),
    "gqa_tp2_pp1_dp2": Case("gqa", tp=2, dp=2, grad_accum_dtype="fp32"),
    "plain_zero0_dp2": Case("plain", dp=2, zero=0),
    "plain_zero0_dp2_fp16": Case("plain", dp=2, zero=0, dtype="fp16"),
    "plain_zero0_dp2_fp32": Case("plain", dp=2, zero=0, dtype="fp32"),
    "plain_zero1_dp2": Case("plain", dp=2),
    "plain_zero1_dp2_bf16_optimizer": Case("plain", dp=2, grad_accum_dtype="fp32"),
    "plain_zero1_dp2_fp16": Case("plain", dp=2, dtype="fp16"),
    "plain_zero1_dp2_fp32": Case("plain", dp=2, dtype="fp32"),
    "plain_zero3_dp2_fp32": Case("plain", dp=2, zero=3, dtype="fp32", zero_config=SHARDED),
    "plain_zero2_dp4": Case("plain", dp=4, zero=2),
    "moe_ep2_dp2_bf16_optimizer": Case("plain_moe", dp=2, ep=2, grad_accum_dtype="fp32"),
    "moe_ep2_dp2_zero0": Case("plain_moe", dp=2, ep=2, zero=0),
    "moe_ep2_dp4_data_first": Case("plain_moe", dp=4, ep=2, zero=1, config_extra={DATA_FIRST: True}),
    "moe_ep2_dp4_round_robin": Case("plain_moe", dp=4, ep=2, zero=2, zero_config={"round_robin_gradients": True}),
    "autoep_ep2_dp2_zero0": Case("plain_autoep", dp=2, ep=2, zero=0),
    "autoep_ep2_dp4_zero3": Case("plain_autoep", dp=4, ep=2, zero=3, zero_config=SHARDED),
    "autoep_ep2_dp2_bf16_optimizer": Case("plain_autoep", dp=2, ep=2, grad_accum_dtype="fp32"),
    # of ranks that have the same experts at one tp rank, DeepSpeed has all write one file at once: here there are none
    "autoep_tp2_ep4_dp2": Case("plain_autoep", tp=2, dp=2, ep=4, zero=2),
    "autoep_tp2_ep4_dp2_zero3": Case("plain_autoep", tp=2, dp=2, ep=4, zero=3, zero_config=SHARDED),
    "autoep_tp2_ep4_dp2_zero0": Case("plain_autoep", tp=2, dp=2, ep=4, zero=0),
    "autoep_tp4_ep2": Case("plain_autoep_wide", tp=4, ep=2, zero=2),
    "autoep_tp4_ep2_zero0": Case("plain_autoep", tp=4, ep=2, zero=0),
    "autotp_tp4": Case("plain_autotp", tp=4),
    "autotp_tp4_zero0": Case("plain_autotp", tp=4, zero=0),
    "autotp_tp3_zero2": Case("plain_autotp", tp=3, zero=2),
    "gpt_moe_tp2_dp2_ep4": Case("gpt_moe", tp=2, dp=2, ep=4, grad_accum_dtype="fp32"),
    "gpt_moe_pp2_ep2_dp2": Case("gpt_moe", pp=2, dp=2, ep=2, grad_accum_dtype="fp32"),
    "gpt_moe_pp2_ep2_dp2_zero0_fp16": Case("gpt_moe", pp=2, dp=2, ep=2, zero=0, dtype="fp16"),
    "moe_ep4_dp4": Case("plain_moe", dp=4, ep=4, zero=2),
    "plain_zero3_dp3": Case("plain", dp=3, zero=3, zero_config=SHARDED),
}
CASES = COMMITTED | {name: replace(case, further_steps=1) for name, case in OTHERS.items()}


def train(rank: int, name: str, case: Case, folder: Path) -> None:
    """One rank: train, save the checkpoint and its truth into `folder`, train on without a break."""
    import deepspeed

    run = Run(case, rank)
    losses = {}
    for step in range(1, case.saved_step + 1):
        losses[step] = run.step(step)
        if step in (*case.earlier_steps, case.saved_step):
            client = client_state(case, step) if case.parallel else {"iteration": step}
            if case.config.experts:  # then DeepSpeed keeps that name to itself
                client.pop("universal_checkpoint_info", None)
            run.engine.save_checkpoint(str(folder), tag=f"global_step{step}", client_state=client)
    truth = gather(run)
    last = case.saved_step + case.further_steps
    for step in range(case.saved_step + 1, last + 1):
        losses[step] = run.step(step)
        if case.dtype == "fp32" and step == case.saved_step + 1:  # which a program of another kind can come near to
            after = gather(run)
            if after is not None:
                masters = {key: t.contiguous() for key, t in after.tensors.items() if key.startswith("master/")}
                safetensors.torch.save_file(masters, folder / "next.safetensors")
    if truth is not None:
        description = {
            "name": name,
            "case": {key: value for key, value in asdict(case).items() if value != ()},
            "tag": f"global_step{case.saved_step}",
            "losses": losses,
            "tied": tied_names(run.engine.module),
            "optimizer": type(run.engine.optimizer).__name__,
            "versions": {"deepspeed": deepspeed.__version__, "torch": torch.__version__},
        }
        save(truth, folder, description)


def make(name: str, out: Path, universal: bool) -> Path:
    """Make the case `name` in `out`, anew; with DeepSpeed's own conversion in `universal/` if asked for."""
    if name == megatron.CASE:
        return megatron.make(out)
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run_ranks(train, CASES[name].world, name, CASES[name], folder)
    for script in folder.glob("zero_to_*.py"):  # copies of DeepSpeed's own scripts, not data
        script.unlink()
    if universal:
        convert_to_universal(folder, missing_info=not CASES[name].parallel)
    return folder


def convert_to_universal(folder: Path, missing_info: bool) -> None:
    """Run DeepSpeed's ds_to_universal on the latest step in `folder`."""
    tag = (folder / "latest").read_text().strip()
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal"]
    command += ["--input_folder", tag, "--output_folder", f"universal/{tag}_universal"]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command += ["--inject_missing_state"] if missing_info else []
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(f"ds_to_universal failed on {folder}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", metavar="CASE", help="default: those that are committed")
    parser.add_argument("--out", type=Path, default=DATA, help="where case folders go (default: data/)")
    parser.add_argument("--universal", action="store_true", help="also run DeepSpeed's ds_to_universal")
    parser.add_argument("--list", action="store_true", help="list the cases")
    options = parser.parse_args()
    if options.list:
        print("\n".join([*CASES, megatron.CASE]))
        return
    if unknown := sorted(set(options.cases) - {*CASES, megatron.CASE}):
        parser.error(f"no such case: {', '.join(unknown)} (--list shows them)")
    for name in options.cases or COMMITTED:
        began = time.monotonic()
        universal = options.universal or name == "gpt_tp2_pp2_dp2"
        folder = make(name, options.out.resolve(), universal)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        print(f"{name}: {size / 1e3:.0f} kB in {time.monotonic() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
