"""A model of four tensors as any run's checkpoint, for what is tried many times over; families take its names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import ckptlab

SHAPES = {f"{i}.mlp.dense_h_to_4h.{n}": s for i in (2, 3) for n, s in {"weight": (8, 4), "bias": (8,)}.items()}


def small(folder: Path, step: int = 3, **target: Any) -> Path:
    """Written as a step of DeepSpeed's on two ranks, or as `reshape` is told."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    weights = folder.with_name(f"{folder.name}.safetensors")
    save_file({name: np.ones(shape, np.float32) for name, shape in SHAPES.items()}, weights)
    begun = ckptlab.begin(weights).catalog
    begun = replace(begun, training=replace(begun.training, step=step))
    ckptlab.Checkpoint(begun).reshape(**{"format": "deepspeed", "dp": 2, **target}).save(folder)
    weights.unlink()
    return folder
