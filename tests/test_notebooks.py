"""Every notebook runs, its hidden answers too, and is saved with outputs that name no machine."""

from __future__ import annotations

import copy
import json
import re
import runpy
from pathlib import Path

import kernels
import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
RUN = runpy.run_path(str(ROOT / "notebooks" / "run.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MACHINE = re.compile(rf"{re.escape(str(ROOT))}|/(?:root|home|tmp)/|/(?:root|home|tmp)\b(?=[\"'\s])")
LARGEST = 400_000  # bytes of a saved notebook


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.mark.slow
def test_a_notebook_runs_and_so_do_its_answers(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.spec(tmp_path)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    saved = RUN["read"](path)
    notebook = copy.deepcopy(saved)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in RUN["answers"](notebook)]
    RUN["execute"](notebook)  # CellExecutionError has the cell's source and the traceback
    for before, now in zip(saved.cells, notebook.cells[: len(saved.cells)], strict=True):
        shows = [bool(cell.get("outputs")) for cell in (before, now)]
        assert shows[0] == shows[1], f"saved without what it shows now: run `make notebooks`\n{now.source}"


def test_a_notebook_is_saved_as_it_ran(path: Path) -> None:
    notebook = RUN["read"](path)
    nbformat.validate(notebook)
    assert notebook.metadata.get("kernelspec", {}).get("name") == "python3", "run `make notebooks`"
    cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    assert cells, "a notebook without code"
    not_run = [c.source for c in cells if c.execution_count is None]
    assert not not_run, "cells that were not run before the notebook was saved: run `make notebooks`"
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), "not run from top to bottom"
    assert any(c.outputs for c in cells), "saved without outputs: run `make notebooks`"
    errors = [o.evalue for c in cells for o in c.outputs if o.output_type == "error"]
    assert not errors, errors


@pytest.mark.parametrize(
    "taught", [path for path in NOTEBOOKS if not path.stem.startswith("0")], ids=lambda path: path.stem
)
def test_a_lesson_asks_before_it_shows_and_gives_its_answers(taught: Path) -> None:
    """At least two predictions, each before a cell; a widget; tasks at the end, with tested answers; of those on
    parallelism also papers."""
    cells = RUN["read"](taught).cells
    asked = [i for i, cell in enumerate(cells) if cell.cell_type == "markdown" and "**Predict**" in cell.source]
    assert len(asked) >= 2
    assert all(cells[i + 1].cell_type == "code" and cells[i + 1].outputs for i in asked)
    shown = [cell for cell in cells if cell.cell_type == "code" and re.search(r"\.(explore|playground)\(", cell.source)]
    assert any("ckptlab-text" in str(output) for cell in shown for output in cell.outputs), "no widget, seen as a page"
    ends = [cell.source for cell in cells[-2:]]
    assert any("## Exercises" in source or "**To try.**" in source for source in ends)
    assert any("assert" in code for code in RUN["answers"](RUN["read"](taught))), "answers that nothing tests"
    if taught.stem.startswith("1"):
        assert any(re.search(r"arXiv|et al\.", cell.source) for cell in cells), "no paper is named"


def test_a_notebook_names_no_machine_and_is_small(path: Path) -> None:
    text = path.read_text()
    pictures = re.compile(r'"image/png": "[^"]*"')
    found = MACHINE.search(pictures.sub("", text))
    assert found is None, f"a path of a machine: {text[max(found.start() - 200, 0) : found.end() + 100]!r}"
    assert len(text) < LARGEST


def test_what_is_saved_does_not_depend_on_the_run() -> None:
    """Paths, identifiers, times and addresses become the same text; what is to be read stays."""
    kernel = "/run/user/ipykernel_4711/123456.py:3: UserWarning: differ"
    uuid = "3f2b1c9a-1111-2222-3333-444455556666"
    said = f"{ROOT}/data/x <object at 0x7f00aa> {kernel} id={uuid} for={uuid}"
    outputs = [nbformat.v4.new_output("stream", text=said)]
    cell = nbformat.v4.new_code_cell("1", outputs=outputs, metadata={"execution": {"iopub.status.busy": "now"}})
    notebook = RUN["cleaned"](nbformat.v4.new_notebook(cells=[cell]))
    text = notebook.cells[0].outputs[0].text
    assert text.startswith("../data/x <object> cell:3: UserWarning: differ id=00000000-")
    assert len(set(re.findall(r"=(\S+)", text))) == 1
    assert notebook.cells[0].metadata == {}
    assert notebook.cells[0].id == "c01"
    assert json.dumps(RUN["cleaned"](copy.deepcopy(notebook))) == json.dumps(notebook)


def test_answers_are_the_python_of_hidden_blocks() -> None:
    text = "```python\nshown\n```\n<details><summary>Answer</summary>\n\n```python\nhidden = 1\n```\n\n</details>"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(text)])
    assert RUN["answers"](notebook) == ["hidden = 1\n"]
