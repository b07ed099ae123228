"""Take the pictures of the widgets anew: `PYTHONPATH=tests python docs/pictures/take.py [NAME …]`. Needs chromium.

Each is the output of a cell in JupyterLab, in its light and its dark theme, at three widths of the window.
"""

from __future__ import annotations

import sys
import tempfile
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any

import lab
from PIL import Image

HERE = Path(__file__).resolve().parent
DATA = HERE.parents[1] / "data"
OPEN = 'import ckptlab\nshown = ckptlab.explore(ckptlab.open("data/gpt_tp2_pp2_dp2"))\n'
SHOTS = {
    "explore": f'{OPEN}shown.choose(tensor="2.mlp.dense_h_to_4h.weight", rank=3)\nshown',
    "explore_values": f"""{OPEN}shown.choose(tab="Values", tensor="2.mlp.dense_h_to_4h.weight", rank=3)
shown""",
    "explore_reshape": f'{OPEN}shown.choose(tab="Reshape", mesh=ckptlab.Mesh(tp=4, dp=2), target_rank=5)\nshown',
    "explore_steps": f"""{OPEN}shown.choose(tab="Steps", mesh=ckptlab.Mesh(tp=4, dp=2), step=4)
shown.tensor = "4.mlp.dense_h_to_4h.weight"
shown""",
    "playground": """
import ckptlab
shown = ckptlab.playground(ckptlab.Mesh(tp=4, pp=2, dp=8), 1)
shown.model = shown.presets["Llama 3 70B"]["model"]
shown""",
}
TALL = 2600  # of the window, in pixels: what is taken is all in it, above the status bar
WIDTHS = (900, 1200, 1600)  # of the browser, in pixels; the middle one is what the docs show


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        notebooks, private = Path(folder, "notebooks"), Path(folder, "private")
        notebooks.mkdir()
        private.mkdir()
        (notebooks / "data").symlink_to(DATA)
        for name, source in SHOTS.items():
            lab.write_notebook(notebooks / f"{name}.ipynb", source.strip())
        with lab.server(notebooks, private) as address, lab.browser(private, WIDTHS[1], TALL, scale=2) as page:
            for name in sys.argv[1:] or SHOTS:
                lab.run_notebook(page, address, f"{name}.ipynb")
                lab.shown(page, ".ckptlab-explorer figure svg")
                output = page.locator(".ckptlab-explorer").first
                if page.locator(".jp-FileBrowser:visible").count():
                    lab.command(page, "application:toggle-left-area")
                for theme, width in product(("Light", "Dark"), WIDTHS):
                    page.set_viewport_size({"width": width, "height": TALL})
                    lab.command(page, "apputils:change-theme", theme=f"JupyterLab {theme}")
                    page.wait_for_function(
                        "light => document.body.dataset.jpThemeLight === light", arg=str(theme == "Light").lower()
                    )
                    page.wait_for_timeout(2500)  # the theme's style sheet, and pictures drawn for the width
                    output.locator("xpath=self::*[@aria-busy='false']").wait_for()
                    if name == "explore":
                        output.locator('figure[data-slot="look.mesh"] [data-rank="3"]').hover()
                        page.wait_for_timeout(500)
                    if name == "explore_values":
                        box = output.locator("svg .heat").bounding_box()
                        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.52 * box["height"])
                        page.wait_for_timeout(500)
                    place = "" if width == WIDTHS[1] else f"_{width}"
                    if name == "explore_steps" and width == WIDTHS[1]:
                        animate(page, output, theme.lower())
                    save(output.screenshot(), HERE / f"{name}{place}_{theme.lower()}.png")


def animate(page: Any, output: Any, theme: str) -> None:
    """All steps of a reshape as one moving picture, two seconds each."""
    before = int(
        output.locator('.steps [aria-pressed="true"]').evaluate("one => [...one.parentNode.children].indexOf(one)")
    )
    frames = []
    for step in range(output.locator(".steps button").count()):
        go(page, output, step)
        frames.append(Image.open(BytesIO(output.screenshot(scale="css"))).convert("RGB"))
    size = frames[0].width, max(frame.height for frame in frames)
    padded = [Image.new("RGB", size, frame.getpixel((frame.width - 1, frame.height - 1))) for frame in frames]
    for whole, frame in zip(padded, frames, strict=True):
        whole.paste(frame)
    first, *others = (whole.quantize(96, dither=Image.Dither.NONE) for whole in padded)
    first.save(HERE / f"steps_{theme}.gif", save_all=True, append_images=others, duration=2200, loop=0, optimize=True)
    go(page, output, before)


def go(page: Any, output: Any, step: int) -> None:
    button = output.locator(".steps button").nth(step)
    button.click()
    output.locator(f'.steps button:nth-child({step + 1})[aria-pressed="true"]').wait_for()
    output.locator("xpath=self::*[@aria-busy='false']").wait_for()
    page.mouse.move(2, 2)
    page.wait_for_timeout(300)


def save(png: bytes, path: Path) -> None:
    """In few colours: a third of the bytes, and nobody sees it."""
    Image.open(BytesIO(png)).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main()
