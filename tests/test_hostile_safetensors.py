"""Safetensors whose headers, indices and configurations are damaged or forged, one value or a few bytes at a time:
whatever is wrong, `open` raises exactly where `check` has an error, in one message that names the file."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from test_hostile_dcp import Way, changed, told, ways

from ckptlab.formats.safefile import SHARDING

INDEX = "model.safetensors.index.json"
ODD: list[Any] = [
    *(None, True, 0, 3, -1, 10**12, 1 << 62, 1 << 70, 0.5, float("nan"), float("inf"), "", "..", "a\0b", "\ud800"),
    *("F32", "F4", "I64", "c.safetensors", "../c", "x" * 5000, "{}", '{"w": {"saved_offsets": [1, 1]}}', [], {}, [7]),
    *([[7]], [-1, 4], [0, 1 << 63], [10**12] * 3, [4, 0], [0, 0], [0.5, 1], [True, False], {"a": [None]}, {"": ""}),
    *({"saved_offsets": [1 << 70, 0]}, {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}, {"weight_map": {}}),
]
EXAMPLES = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))

WHOLE = np.arange(24, dtype=np.float32).reshape(6, 4)


def one_file(path: Path) -> Path:
    """All dtypes that matter, and metadata of a program."""
    path.mkdir()
    tensors = {"a.w": WHOLE, "b": np.ones(3, ml_dtypes.bfloat16), "n": np.array(7), "empty": np.zeros((0, 4), np.int8)}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def in_shards(path: Path) -> Path:
    """Two files and their index, with the configuration of a model."""
    path.mkdir()
    save_file({"model.layers.0.w": WHOLE}, path / "a.safetensors")
    save_file({"model.layers.1.w": WHOLE + 1, "model.norm": WHOLE[0]}, path / "b.safetensors")
    files = {"model.layers.0.w": "a.safetensors", "model.layers.1.w": "b.safetensors", "model.norm": "b.safetensors"}
    (path / INDEX).write_text(json.dumps({"metadata": {"total_size": 208}, "weight_map": files}))
    config = {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 8, "tie_word_embeddings": True}
    (path / "config.json").write_text(json.dumps(config))
    return path


def in_boxes(path: Path) -> Path:
    """What two ranks of torch's distributed writer leave."""
    path.mkdir()
    for rank, rows in enumerate(((0, 4), (4, 6))):
        told_of = {SHARDING: json.dumps({"w": {"saved_offsets": [rows[0], 0]}, "b": {"saved_offsets": [0]}})}
        held = {"w": WHOLE[slice(*rows)]} | ({} if rank else {"b": WHOLE[0]})
        save_file(held, path / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", metadata=told_of)
    return path


KINDS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "one file": (one_file, "model.safetensors"),
    "a shard": (in_shards, "b.safetensors"),
    "an index": (in_shards, INDEX),
    "a configuration": (in_shards, "config.json"),
    "a box": (in_boxes, "shard-00002-model-00001-of-00001.safetensors"),
}


class Target:
    """A file that holds JSON, as it is written again with another content; of safetensors the header."""

    def __init__(self, file: Path) -> None:
        self.file, self.raw = file, file.read_bytes()
        self.begin = 8 + struct.unpack("<Q", self.raw[:8])[0] if file.suffix == ".safetensors" else None
        self.content = json.loads(self.raw if self.begin is None else self.raw[8 : self.begin])
        inside = (self.content.get("__metadata__") or {}).get(SHARDING) if self.begin else None
        if inside:  # an object in a text: its values count too
            self.content["__metadata__"][SHARDING] = json.loads(inside)

    def write(self, content: Any) -> None:
        meta = content.get("__metadata__") if isinstance(content, dict) else None
        if isinstance(meta, dict) and isinstance(meta.get(SHARDING), dict):
            content = {**content, "__metadata__": {**meta, SHARDING: json.dumps(meta[SHARDING])}}
        text = json.dumps(content).encode()
        rest = b"" if self.begin is None else self.raw[self.begin :]
        self.file.write_bytes(text if self.begin is None else struct.pack("<Q", len(text)) + text + rest)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_odd_values(kind: str, tmp_path: Path) -> None:
    make, name = KINDS[kind]
    folder = make(tmp_path / "run")
    target = Target(folder / name)
    every = list(ways(target.content))
    refused = []

    @EXAMPLES
    @given(st.sampled_from(every), st.sampled_from(ODD))
    @example((), [])
    def one(way: Way, value: Any) -> None:
        if way and way[-1][0] == "key" and not isinstance(value, str):
            value = repr(value)
        target.write(changed(target.content, way, value))
        refused.append(told(folder))

    one()
    assert any(refused) or kind == "a configuration"
    assert not all(refused)


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes(kind: str, tmp_path: Path) -> None:
    make, name = KINDS[kind]
    folder = make(tmp_path / "run")
    raw = (folder / name).read_bytes()

    @EXAMPLES
    @given(
        changes=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=4),
        cut=st.none() | st.integers(0, len(raw)),
        more=st.binary(max_size=4),
    )
    def damage(changes: list[tuple[int, int]], cut: int | None, more: bytes) -> None:
        damaged = bytearray(raw)
        for at, byte in changes:
            damaged[at % len(damaged)] = byte
        (folder / name).write_bytes(bytes(damaged[:cut]) + more)
        told(folder)

    damage()
