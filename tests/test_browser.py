"""The tour in a real browser: JupyterLab runs it, a slider is moved, a rank is clicked, pictures change."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lab
import pytest
from compare import DATA

HANGS = 600  # seconds after which a page that waits for nothing is closed: no bound on how long a machine may take
TOUR = DATA.parent / "notebooks" / "00_tour.ipynb"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(lab.missing()), reason=f"no {lab.missing()} here"),
]


@contextmanager
def time_out(seconds: int) -> Iterator[None]:
    """TimeoutError after so many seconds, whatever is being waited for; everything opened inside is closed."""

    def ring(*_: Any) -> None:
        raise TimeoutError(f"the browser test took longer than {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_slider_and_a_click_change_the_picture(tmp_path: Path) -> None:
    import nbformat

    notebooks, private = tmp_path / "notebooks", tmp_path / "private"
    notebooks.mkdir()
    private.mkdir()
    (tmp_path / "data").symlink_to(DATA)
    tour = nbformat.read(TOUR, as_version=4)
    for cell in tour.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(tour, notebooks / "tour.ipynb")
    with time_out(HANGS), lab.server(notebooks, private) as address, lab.browser(private) as page:
        page.set_default_timeout(HANGS * 1000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        lab.run_notebook(page, address, "tour.ipynb")
        output = page.locator(".jp-OutputArea-output:has(.ckptlab-picture)").last
        output.locator(".ckptlab-picture svg").first.wait_for()

        # hover: the file and the bytes; click: all that the rank holds
        mesh = output.locator(".ckptlab-picture:visible").first
        before = mesh.inner_html()
        mesh.locator('[data-rank="2"]').first.hover()
        output.get_by_text("zero_pp_rank_1_mp_rank_00_optim_states.pt, bytes").or_(
            output.get_by_text("holds nothing of master")
        ).first.wait_for()
        mesh.locator('[data-rank="5"]').first.click()
        output.get_by_text("rank 5: tp 1 · pp 1 · dp 0 holds").wait_for()
        assert mesh.inner_html() != before

        # the slider: tp 2 → 3, which cannot be, → 4
        output.get_by_role("tab", name="Reshape").click()
        tensor = output.locator(".ckptlab-picture:visible").nth(1)
        tensor.locator("svg").wait_for()
        before = tensor.inner_html()
        output.locator(".noUi-handle:visible").first.press("ArrowRight")
        output.get_by_text("4 attention heads are not divisible by it").wait_for()
        output.locator(".noUi-handle:visible").first.press("ArrowRight")
        output.get_by_text("→ tp 4 · pp 2 · dp 2").first.wait_for()
        tensor.locator('[data-tp="3"]').first.wait_for()
        assert tensor.inner_html() != before

        # the tree: search, choose; step by step
        output.get_by_placeholder("search tensors").fill("5 4h_to_h weight")
        output.get_by_role("button", name="5.mlp.dense_4h_to_h.weight").click()
        output.get_by_role("tab", name="Step by step").click()
        output.get_by_text("ZeRO lays the tensors of a group").wait_for()
        output.locator("button:has(.fa-arrow-right)").click()
        output.get_by_text("Merge dp: the fragments").wait_for()
        assert "5.mlp.dense_4h_to_h.weight" in output.locator(".ckptlab-picture:visible").first.inner_html()
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
