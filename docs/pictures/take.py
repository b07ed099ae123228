"""Take the pictures of the widgets anew: `PYTHONPATH=tests python docs/pictures/take.py [NAME …]`. Needs chromium.

The widget on a page of its own, light and dark, at three widths of the window; what JupyterLab makes of it is tested,
and its frame is in no picture.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import lab
from PIL import Image

import ckptlab
from ckptlab import Mesh

HERE = Path(__file__).resolve().parent
few = runpy.run_path(str(HERE.parent / "gallery.py"))["few"]
TALL = 2600  # of the window, in pixels: what is taken is all in it
WIDTHS = (900, 1200, 1600)  # of the browser, in pixels; the middle one is what the docs show
SIDE = 80  # of them at the sides of a notebook's output
UP = "2.mlp.dense_h_to_4h.weight"


def explorer(**chosen: Any) -> Any:
    """The GPT of data/, with what is chosen."""
    found = ckptlab.explore(ckptlab.open("data/gpt_tp2_pp2_dp2"))
    found.choose(**chosen)
    return found


def playground() -> Any:
    found = ckptlab.playground(Mesh(tp=4, pp=2, dp=8), 1)
    preset = found.presets["Llama 3 70B"]
    found.choose(activations=preset["activations"], model=preset["model"])
    return found


SHOTS: dict[str, Callable[[], Any]] = {
    "explore": lambda: explorer(tensor=UP, rank=3),
    "explore_values": lambda: explorer(tab="Values", tensor=UP, rank=3),
    "explore_reshape": lambda: explorer(tab="Reshape", mesh=Mesh(tp=4, dp=2), target_rank=5),
    "explore_steps": lambda: explorer(tab="Steps", mesh=Mesh(tp=4, dp=2), step=4, tensor="4.mlp.dense_h_to_4h.weight"),
    "playground": playground,
}


def main() -> None:
    os.chdir(HERE.parents[1])  # the line of Python names a path from here
    with tempfile.TemporaryDirectory() as private, lab.browser(Path(private), WIDTHS[1], TALL, scale=2) as page:
        for name in sys.argv[1:] or SHOTS:
            for theme in ("light", "dark"):
                lab.put_widget(page, SHOTS[name](), theme == "dark")
                for width in WIDTHS:
                    take(page, name, theme, width)


def take(page: Any, name: str, theme: str, width: int) -> None:
    output = page.locator(".ckptlab-explorer")
    page.set_viewport_size({"width": width - SIDE, "height": TALL})
    page.wait_for_timeout(700)  # pictures are drawn for the width
    output.locator("xpath=self::*[@aria-busy='false']").wait_for()
    page.mouse.move(2, 2)
    if name == "explore":
        output.locator('figure[data-slot="look.mesh"] [data-rank="3"]').hover()
    if name == "explore_values":
        box = output.locator("svg .heat").bounding_box()
        page.mouse.move(box["x"] + 0.4 * box["width"], box["y"] + 0.52 * box["height"])
    page.wait_for_timeout(400)
    place = "" if width == WIDTHS[1] else f"_{width}"
    if name == "explore_steps" and width == WIDTHS[1]:
        animate(page, output, theme)
    save(output.screenshot(), HERE / f"{name}{place}_{theme}.png")


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
    first, *others = (few(whole) for whole in padded)
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
    few(Image.open(BytesIO(png))).save(path, optimize=True)


if __name__ == "__main__":
    main()
