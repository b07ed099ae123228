"""The pictures of docs/pictures: every drawing, on light and on dark, from data/ and from layouts that exist on paper.

`python docs/gallery.py [--chromium PATH]` writes them anew; it needs ckptlab, Pillow and chromium, nothing else.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

import ckptlab
from ckptlab import Layout, Mesh, viz

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "pictures"
SCALE = 2  # points of the screen to a pixel
PAGES = {"light": ("#ffffff", "#1f2328"), "dark": ("#0d1117", "#e6edf3")}
QKV = Layout("((tp q) + (tp k) + (tp v)) in", totals={"q": 4096, "k": 1024, "v": 1024}, dims=("out", "in"))
HEADS = Layout("(tp head qkv d) in", sizes={"qkv": 3, "d": 16}, dims=("out", "in"))
STRIPS = Layout("(head tp d) in", sizes={"head": 64}, dims=("out", "in"))
MQA = Layout("((tp q) + k + v) in", totals={"q": 4096, "k": 128, "v": 128}, dims=("out", "in"))
BIG = Mesh(tp=4, pp=4, dp=32)
EXPERTS = Mesh(tp=2, dp=4).split("dp", edp=2, ep=2)


def gpt() -> ckptlab.Checkpoint:
    return ckptlab.open(ROOT / "data" / "gpt_tp2_pp2_dp2")


def zero3() -> ckptlab.Checkpoint:
    return ckptlab.open(ROOT / "data" / "plain_zero3_dp2")


def line(family: str, ending: str) -> ckptlab.families.Line:
    """The line of a family that takes names of this ending."""
    return next(one for one in ckptlab.families.FAMILIES.get(family).lines if one.whole.endswith(ending))


def row(*drawings: viz.Drawing) -> str:
    """Drawings beside one another."""
    shown = "".join(d._repr_html_() for d in drawings)
    return f"<div style='display:flex;gap:3em;align-items:flex-start'>{shown}</div>"


def column(*drawings: viz.Drawing) -> str:
    return "<div style='height:1.4em'></div>".join(d._repr_html_() for d in drawings)


PICTURES: dict[str, Callable[[], str]] = {
    "mesh": lambda: column(*(viz.mesh(Mesh(tp=4, pp=2, dp=3), group=axis) for axis in ("tp", "dp", "pp"))),
    "mesh_512": lambda: column(viz.mesh(Mesh(tp=8, pp=8, dp=8), highlight=77)),
    "mesh_block": lambda: row(
        viz.mesh(Mesh(tp=4, pp=4, dp=4), oblique=True, node=8, highlight={"tp": 1}),
        viz.mesh(Mesh(tp=8, pp=8, dp=8), oblique=True, node=8),
    ),
    "tensor_column_and_row": lambda: row(
        viz.tensor("(tp out) in", (4096, 4096), Mesh(tp=4, dp=2), name="column parallel"),
        viz.tensor("out (tp in)", (4096, 4096), Mesh(tp=4, dp=2), name="row parallel"),
    ),
    "tensor_parts": lambda: row(
        viz.tensor(QKV, (6144, 4096), Mesh(tp=4), rank={"tp": 1}, name="grouped-query attention: q, k, v"),
        viz.tensor(MQA, (4352, 4096), Mesh(tp=4), name="multi-query: k and v on all"),
    ),
    "tensor_padded_uneven_replicated": lambda: row(
        viz.tensor(Layout("(tp out) in", padded={0: 112}), (101, 64), Mesh(tp=2, dp=2), name="a padded vocabulary"),
        viz.tensor(Layout("(tp out) in", sizes={"out": (3, 3, 2, 2)}), (10, 8), Mesh(tp=4), name="an uneven cut"),
        viz.tensor("out in", (64, 64), Mesh(tp=4), name="replicated"),
    ),
    "tensor_experts_and_heads": lambda: row(
        viz.tensor("(ep expert) (tp out) in", (8, 64, 32), EXPERTS, name="experts"),
        viz.tensor(HEADS, (384, 128), Mesh(tp=4), name="by heads, q, k and v interleaved"),
        viz.tensor(STRIPS, (4096, 1024), Mesh(tp=4), name="256 strips"),
    ),
    "family": lambda: column(viz.family(line("llama-megatron-core", "linear_qkv.weight"), q=3)),
    "flat": lambda: column(viz.flat(gpt().catalog.flat_groups[0]), viz.flat(zero3().catalog.flat_groups[0])),
    "stages": lambda: row(viz.stages(gpt().catalog), viz.stages(zero3().catalog)),
    "memory": lambda: column(
        viz.memory(gpt().catalog),
        viz.memory(gpt().reshape(Mesh(tp=4, pp=2, dp=64)).target),
        viz.memory(gpt(), activations=viz.Activations(sequence=64, flash=False, dropout=True)),
    ),
    "plan": lambda: column(viz.plan(gpt().reshape(Mesh(tp=4, dp=2)).plan)),
    "flow": lambda: row(
        viz.flow(gpt().reshape(Mesh(tp=4, dp=2)).plan), viz.flow(gpt().reshape(BIG).plan, gpt().mesh, BIG)
    ),
    "values": lambda: row(
        viz.values(gpt(), "2.mlp.dense_h_to_4h.weight", "master", width=430),
        viz.values(gpt(), "2.mlp.dense_h_to_4h.weight", "master", where={"out": slice(24, 40), "in": slice(8)}),
    ),
    "plan_512": lambda: column(viz.plan(gpt().reshape(BIG).plan, gpt().mesh, BIG)),
    "layout": lambda: QKV._repr_html_(),
    "checkpoint": lambda: gpt()._repr_html_().replace("<details open><summary>52", "<details><summary>52"),
    "reshape": lambda: gpt().reshape(Mesh(tp=4, dp=2))._repr_html_(),
}


def page(body: str, theme: str) -> str:
    ground, letters = PAGES[theme]
    style = f"margin:18px;background:{ground};color:{letters};width:max-content;max-width:1240px;position:absolute"
    return f"<!doctype html><meta charset=utf-8><body style='{style}'>{body}"


def photograph(chromium: str, html: str, out: Path) -> None:
    """A screenshot of a page that is as large as what is on it: the page is measured first."""
    measured = "<script>document.title = [document.body.scrollWidth, document.body.scrollHeight].join(' ')</script>"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "page.html"
        source.write_text(html + measured, encoding="utf-8")
        said = run(chromium, scratch, "--dump-dom", "--window-size=1200,900", source.as_uri())
        found = re.search(r"<title>(\d+) (\d+)</title>", said)
        assert found, said[:500]
        width, height = (int(n) + 36 for n in found.groups())
        source.write_text(html, encoding="utf-8")
        sharp = f"--force-device-scale-factor={SCALE}"
        run(chromium, scratch, sharp, f"--screenshot={out}", f"--window-size={width},{height}", source.as_uri())
    few(Image.open(out)).save(out, optimize=True)


def few(image: Image.Image, count: int = 160) -> Image.Image:
    """The picture in its most frequent colours, each exactly as it was: what is filled keeps its colour, and edges of
    letters take the nearest. (Ways that mix colours gave two ranks one.)"""
    rgb = image.convert("RGB")
    found = sorted(rgb.getcolors(rgb.width * rgb.height) or [], reverse=True)[:count]
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for _, colour in found for part in colour])
    return rgb.quantize(palette=palette, dither=Image.Dither.NONE)


def run(chromium: str, scratch: str, *arguments: str) -> str:
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --disable-quic --disable-sync"
    flags += " --disable-background-networking --disable-component-update"
    command = [chromium, *flags.split(), f"--user-data-dir={scratch}/profile", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chromium", default=shutil.which("chromium") or "chromium")
    parser.add_argument("names", nargs="*", help=f"some of {', '.join(PICTURES)} (default: all)")
    options = parser.parse_args()
    os.chdir(ROOT)
    OUT.mkdir(exist_ok=True)
    for name in options.names or PICTURES:
        body = PICTURES[name]()
        for theme in PAGES:
            out = OUT / f"{name}_{theme}.png"
            photograph(options.chromium, page(body.replace(f"{ROOT}/", ""), theme), out)
            print(f"{out.relative_to(ROOT)}  {out.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main()
