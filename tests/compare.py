"""What tests compare catalogs by: every element of every state, bit for bit."""

from __future__ import annotations

import hashlib
from pathlib import Path

import ml_dtypes  # noqa: F401  (teaches numpy the name bfloat16)
import numpy as np
from safetensors.numpy import load_file

from ckptlab.arrays import reader
from ckptlab.catalog import PARAM, Catalog
from ckptlab.layout import Cut

DATA = Path(__file__).resolve().parents[1] / "data"
GPT, ZERO2, ZERO3 = DATA / "gpt_tp2_pp2_dp2", DATA / "plain_zero2_dp2", DATA / "plain_zero3_dp2"

_KEPT_IN_MODULE = ("frozen", "buffer")  # what truth files call by kind, a catalog keeps as the module state


def whole(catalog: Catalog, name: str, state: str) -> np.ndarray:
    """A whole tensor, vocabulary padding cut off."""
    return reader(catalog, name, state).shard(Cut.whole(catalog[name].shape), ())


def differences_from_truth(catalog: Catalog, truth: Path) -> list[str]:
    """`state/name` of everything in a truth file that the catalog has otherwise or not at all."""
    wrong = []
    for key, expected in load_file(truth).items():
        state, name = key.split("/", 1)
        state = PARAM if state in _KEPT_IN_MODULE else state
        if state == PARAM and catalog.zero_stage == 3 and catalog[name].kind == "parameter":
            continue  # ZeRO-3 stores no module weights
        if state not in catalog[name].states or not same_bits(whole(catalog, name, state), expected):
            wrong.append(key)
    return wrong


def differences(a: Catalog, b: Catalog) -> list[str]:
    """`state/name` of every state that both have and that is not the same, and of tensors that only one has."""
    wrong = [f"only one has {name}" for name in a.tensors.keys() ^ b.tensors.keys()]
    for name in a.tensors.keys() & b.tensors.keys():
        both = a[name].states.keys() & b[name].states.keys()
        wrong += [f"{s}/{name}" for s in both if not same_bits(whole(a, name, s), whole(b, name, s))]
    return wrong


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and a.tobytes() == b.tobytes()


def digest(folder: Path) -> dict[str, str]:
    """Every file below a folder and what it holds."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
