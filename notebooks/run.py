"""Executes notebooks in place and saves them with outputs that are the same on every machine.

    python notebooks/run.py                              # all of them
    python notebooks/run.py notebooks/12_zero.ipynb      # these

A notebook runs in this folder, with the repository first on the path. What is saved names no path of the machine
(`../data/…` instead), no time and no process: run twice, a notebook that computes the same is the same file.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIMEOUT = 1800  # seconds after which a cell hangs: no bound on how long a machine may take
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}

# What differs between machines and runs → what is saved. Paths of the repository stay true, seen from this folder.
_REPLACED = [
    (re.compile(re.escape(str(ROOT))), ".."),
    (re.compile(re.escape(sys.prefix)), "python"),
    (re.compile(re.escape(sys.base_prefix)), "python"),
    (re.compile(r"\S*/ipykernel_\d+/\d+\.py"), "cell"),
    (re.compile(r" at 0x[0-9a-f]+"), ""),
]
_UUID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")


def read(path: Path) -> NotebookNode:
    """A notebook in the newest minor format."""
    return nbformat.read(path, as_version=4)


def execute(notebook: NotebookNode) -> NotebookNode:
    """Run all cells in a fresh kernel, in this folder. CellExecutionError (source and traceback) where one fails."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    inline = "module://matplotlib_inline.backend_inline"
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        startup_timeout=TIMEOUT,
        kernel_name=KERNEL["name"],
        resources={"metadata": {"path": str(HERE)}},
        coalesce_streams=True,
        record_timing=False,
        extra_arguments=["--HistoryManager.enabled=False"],
    )
    client.execute(
        env={**os.environ, "PYTHONPATH": path, "MPLBACKEND": inline, "COLUMNS": "100", "PYTHONHASHSEED": "0"}
    )
    return notebook


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is saved: cells numbered, no timestamps, no versions, no names of this machine."""
    notebook.metadata = NotebookNode({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    seen: dict[str, str] = {}
    for number, cell in enumerate(notebook.cells, 1):
        cell["id"] = f"c{number:02d}"
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in ("tags", "jupyter")})
        if cell.cell_type == "code":
            cell.outputs = _strings([_still(o) for o in cell.outputs], lambda text: _cleaned_text(text, seen))
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    return notebook


def _still(output: NotebookNode) -> NotebookNode:
    """An output without the widget that needs a kernel, where it has a still page of it: what a web page then shows."""
    if "text/html" in output.get("data", {}):
        output.data.pop("application/vnd.jupyter.widget-view+json", None)
    return output


def answers(notebook: NotebookNode) -> list[str]:
    """The code of exercises' answers: the Python blocks inside <details> of markdown cells, in order."""
    hidden = (
        block
        for cell in notebook.cells
        if cell.cell_type == "markdown"
        for block in re.findall(r"<details.*?</details>", cell.source, re.DOTALL)
    )
    return [code for block in hidden for code in re.findall(r"```python\n(.*?)```", block, re.DOTALL)]


def main(paths: Sequence[str]) -> None:
    for path in [Path(p).resolve() for p in paths] or sorted(HERE.glob("*.ipynb")):
        start = time.perf_counter()
        notebook = cleaned(execute(read(path)))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {time.perf_counter() - start:.1f} s, {path.stat().st_size / 1e3:.0f} kB")


def _cleaned_text(text: str, seen: dict[str, str]) -> str:
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return _UUID.sub(lambda found: seen.setdefault(found[0], f"00000000-0000-4000-8000-{len(seen):012d}"), text)


def _strings(value: Any, change: Callable[[str], str]) -> Any:
    """A nested value with every string in it changed; what is base64 (pictures) has nothing to change."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return NotebookNode(
            {change(k): v if k.startswith("image/png") else _strings(v, change) for k, v in value.items()}
        )
    return [_strings(v, change) for v in value] if isinstance(value, list) else value


if __name__ == "__main__":
    main(sys.argv[1:])
