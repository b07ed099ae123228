"""Toy checkpoints from arrays, as toy's own training program would write them: without ckptlab's readers and plans."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ckptlab.layout import Layout
from ckptlab.mesh import Mesh


def write(folder: Path, mesh: Mesh, tensors: Mapping[str, tuple[Layout, Mapping[str, np.ndarray]]], step: int) -> None:
    """tensors: name → layout, and state → the whole."""
    folder.mkdir(parents=True)
    header: dict = {"mesh": {"ring": mesh["ring"], "tp": mesh.tp}, "step": step, "tensors": {}}
    for name, (layout, states) in tensors.items():
        fields = ("text", "dims", "sizes", "totals", "units", "padded")
        header["tensors"][name] = {
            "shape": next(iter(states.values())).shape,
            "kind": "parameter",
            "states": {state: array.dtype.name for state, array in states.items()},
            "layout": {field: getattr(layout, field) for field in fields},
        }
    (folder / "toy.json").write_text(json.dumps(header))
    for ring in range(mesh["ring"]):
        for tp in range(mesh.tp):
            held = []
            for layout, states in tensors.values():
                for array in states.values():
                    cut = layout.resolve(array.shape, mesh)
                    padded = np.pad(array, [(0, b - a) for a, b in zip(array.shape, cut.shape, strict=True)])
                    held.append(cut.take(padded, cut.coordinate({"ring": ring, "tp": tp})).tobytes())
            np.save(folder / f"ring{ring}_tp{tp}.npy", np.frombuffer(b"".join(held), np.uint8))
