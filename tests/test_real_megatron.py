"""Megatron-core's own forward pass as the judge of families: its checkpoints under transformers' names, and back.

Needs megatron-core (`pip install --no-deps megatron-core`; without CUDA, see real_megatron.py), which CI has not.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import real_megatron
from safetensors.numpy import save_file

import ckptlab
from ckptlab.sharding import families

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers")
missing = importlib.util.find_spec("megatron") is None
pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing, reason="megatron-core is not installed")]
TP = ("gpt2", "llama", "qwen2", "mixtral")  # of which it also answers on two ranks
RUNS = [*((1, case) for case in real_megatron.CASES), *((2, case) for case in TP)]


def megatron(tp: int, folder: Path, cases: tuple[str, ...]) -> None:
    """Run it in a session of its own, and end what it leaves running."""
    script = [sys.executable, real_megatron.__file__, str(tp), str(folder), *cases]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(script, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        status = process.wait()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        assert status == 0, log.read()[-4000:]


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What Megatron-core makes of every case, and transformers' folder of each: {tp}/{case}/iter_0000001, hf."""
    root = tmp_path_factory.mktemp("megatron")
    for tp, cases in ((1, tuple(real_megatron.CASES)), (2, TP)):
        (root / str(tp)).mkdir()
        megatron(tp, root / str(tp), cases)
        for case in cases:
            ckptlab.save_pretrained(root / str(tp) / case / "iter_0000001", root / str(tp) / case / "hf")
    return root


def answer(folder: Path) -> Any:
    """The model of a folder, of which nothing is missing and nothing left, and its logits."""
    import torch

    model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not any(loaded[f"{what}_keys"] for what in ("missing", "unexpected", "mismatched")), loaded
    with torch.no_grad():
        return model, model(torch.tensor(real_megatron.TOKENS)).logits.numpy()


@pytest.mark.parametrize(("tp", "case"), RUNS)
def test_transformers_computes_what_megatron_computes(tp: int, case: str, there: Path) -> None:
    folder = there / str(tp) / case
    model, logits = answer(folder / "hf")
    assert model.config.model_type == case.split("-")[0]
    np.testing.assert_allclose(logits, np.load(folder / "logits.npy"), rtol=1e-5, atol=1e-5)


def test_megatron_computes_what_transformers_computed(there: Path, tmp_path: Path) -> None:
    """Weights of transformers' folders, back under Megatron's names: the same bits, through its own forward pass."""
    for case in real_megatron.CASES:
        folder, place = there / "1" / case, tmp_path / case
        run = ckptlab.open(folder / "iter_0000001")
        family = families.resolve(_family(case))
        back = family.onto(ckptlab.open(folder / "hf"), "left")
        weights = {name: np.asarray(array) for name, array in back.state_dict(backend="numpy").items()}
        held = run.state_dict(backend="numpy")
        assert weights.keys() == held.keys() - ({"output_layer.weight"} if "tied" in case or case == "gpt2" else set())
        assert all(np.array_equal(weights[name], held[name]) for name in weights)
        place.mkdir()
        tied = {"output_layer.weight": weights["embedding.word_embeddings.weight"]} if len(weights) < len(held) else {}
        save_file({n: np.ascontiguousarray(a) for n, a in (weights | tied).items()}, place / "weights.safetensors")
    megatron(1, tmp_path, tuple(real_megatron.CASES))
    for case in real_megatron.CASES:
        _, logits = answer(there / "1" / case / "hf")
        np.testing.assert_allclose(np.load(tmp_path / case / "logits.npy"), logits, rtol=1e-5, atol=1e-5)


def _family(case: str) -> str:
    kind = {"mistral": "llama", "qwen2": "llama", "qwen3": "llama", "qwen2_moe": "qwen-moe", "qwen3_moe": "qwen-moe"}
    interleaved = "-interleaved" * case.endswith("-interleaved")
    return f"{kind.get(case, case.split('-')[0])}{interleaved}-megatron-core"
