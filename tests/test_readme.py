"""What the README shows runs, and gives what it says."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


pytest.importorskip("torch")
pytest.importorskip("jax")


@pytest.mark.slow
def test_the_python_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(block.replace("/tmp/reshaped", str(tmp_path)), names)
    assert names["diff"].changed
    assert names["run"].steps == (2, 4, 5)
    assert names["cut"].shard_shape((0,)) == (16, 32)
    assert names["cut"].rows((1,))[0][:, [0, 2]].tolist() == [[8, 8], [36, 4], [52, 4]]
    gathered = names["reshaped"].shards()["mlp.dense_h_to_4h.weight"].master
    assert [type(array.data).__name__ for array in names["wider"].values()] == ["ndarray", "Duck", "Duck"]
    for array in names["wider"].values():
        assert (array.dims, array.values.tobytes()) == (gathered.dims, gathered.values.tobytes())
    curve = names["full"].std(["out", "in"])["mlp.dense_h_to_4h.weight"].master
    layers = [names["ckpt"].full("master", stack=False)[f"{i}.mlp.dense_h_to_4h.weight"].values for i in range(2, 6)]
    np.testing.assert_allclose(curve, [layer.std() for layer in layers], rtol=1e-5)
    assert (tmp_path / "latest").read_text() == "global_step3"


def test_the_python_of_the_page_on_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("scipy")
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plans.md").read_text(), re.DOTALL):
        exec(block, names)
    assert names["best"].saved > 0
    assert names["took"].seconds > 0


def test_the_python_of_the_page_on_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "families.md").read_text(), re.DOTALL):
        exec(block, names)
    assert names["seen"]["transformer.h.0.attn.c_attn.weight"].layout.text == "in (3 tp out)"


@pytest.mark.slow
def test_the_reference_is_up_to_date_and_its_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(ROOT)
    made = runpy.run_path(str(ROOT / "docs" / "reference.py"), run_name="reference")
    text = (ROOT / "docs" / "reference.md").read_text()
    assert text == made["page"](), "python docs/reference.py writes it anew"
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, names)
