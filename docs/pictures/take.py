"""Take the pictures of the widgets anew: `PYTHONPATH=tests python docs/pictures/take.py`. Needs chromium.

Each is the output of a cell in JupyterLab, in its light and its dark theme.
"""

from __future__ import annotations

import tempfile
from io import BytesIO
from pathlib import Path

import lab
from PIL import Image

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "data"
SHOTS = {
    "explore": """
import ckptlab
shown = ckptlab.explore(ckptlab.open("data/gpt_tp2_pp2_dp2"))
shown.choose(tensor="2.mlp.dense_h_to_4h.weight", rank=3)
shown""",
    "explore_reshape": """
import ckptlab
shown = ckptlab.explore(ckptlab.open("data/gpt_tp2_pp2_dp2"))
shown.pages.selected_index = 1
shown.python.value = True
shown.choose(mesh=ckptlab.Mesh(tp=4, dp=2), target_rank=5)
shown""",
    "explore_steps": """
import ckptlab
shown = ckptlab.explore(ckptlab.open("data/gpt_tp2_pp2_dp2"))
shown.pages.selected_index = 2
shown.choose(tensor="4.mlp.dense_h_to_4h.weight", mesh=ckptlab.Mesh(tp=4, dp=2), step=4)
shown""",
    "playground": """
import ckptlab
shown = ckptlab.playground(ckptlab.Mesh(tp=4, pp=2, dp=8), 1)
shown.numbers.preset.value = "Llama 2 7B"
shown""",
}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebooks, private = Path(folder, "notebooks"), Path(folder, "private")
        notebooks.mkdir()
        private.mkdir()
        (notebooks / "data").symlink_to(DATA)
        for name, source in SHOTS.items():
            lab.write_notebook(notebooks / f"{name}.ipynb", source.strip())
        with lab.server(notebooks, private) as address, lab.browser(private, 1240, 1900) as page:
            for name in SHOTS:
                lab.run_notebook(page, address, f"{name}.ipynb")
                output = page.locator(".jp-OutputArea-output:visible").first
                output.locator(".ckptlab-picture svg:visible").first.wait_for()
                if page.locator(".jp-FileBrowser:visible").count():
                    lab.command(page, "application:toggle-left-area")
                for theme in ("Light", "Dark"):
                    lab.command(page, "apputils:change-theme", theme=f"JupyterLab {theme}")
                    page.wait_for_function(
                        "light => document.body.dataset.jpThemeLight === light", arg=str(theme == "Light").lower()
                    )
                    page.wait_for_timeout(1500)  # the theme's style sheet
                    if name == "explore":
                        output.locator('[data-rank="3"]:visible').first.hover()
                        page.wait_for_timeout(500)
                    save(output.screenshot(), HERE / f"{name}_{theme.lower()}.png")


def save(png: bytes, path: Path) -> None:
    """In 256 colours: a third of the bytes, and nobody sees it."""
    Image.open(BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
