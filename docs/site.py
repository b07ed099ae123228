"""The documentation as a site: `python docs/site.py` builds `build/site`, which opens from disk.

The README, the pages of docs/, the notebooks as saved, and the widget in a page that answers without a kernel.
Links are rewritten to where things are in the site; what stays in the repository (code, data) is named, not linked.
A link that leads nowhere, in the repository or in the site, is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
PAGES, SITE = BUILD / "pages", BUILD / "site"
LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
HREF = re.compile(r"<(?:a|img|iframe|source|link|script)\b[^>]*?\b(?:href|src|srcset)=\"([^\"]+)\"")
TUTORIALS = "Tutorials"
HOW_TO = {
    "formats.md": "Formats, kind by kind",
    "plans.md": "Plans: ranks, time, live moves",
    "families.md": "Families of names",
    "far.md": "Buckets and clusters",
    "check.md": "What a check finds",
    "backends.md": "numpy, torch, jax",
    "drawings.md": "Drawings",
    "deepspeed_names.md": "DeepSpeed's own names",
}
WIDGETS = """# With your hands

The widget of `ckptlab.explore(ckpt)`, exported with `.to_html(path)`: hover, click, slide; arrows and Enter work too.
[A page of its own](explore.html).

<iframe src="explore.html" style="width:100%;height:1500px;border:0" title="ckptlab.explore"></iframe>
"""


def places() -> dict[Path, str]:
    """A file of the repository → where it is in the site."""
    found = {ROOT / "README.md": "index.md", ROOT / "CONTRIBUTING.md": "contributing.md"}
    found |= {path: path.name for path in sorted((ROOT / "docs").glob("*.md"))}
    found |= {path: f"notebooks/{path.name}" for path in sorted((ROOT / "notebooks").glob("*.ipynb"))}
    found[ROOT / "notebooks" / "README.md"] = "notebooks/index.md"
    found[ROOT / "benchmarks" / "README.md"] = "benchmarks.md"
    pictures = sorted(path for path in (ROOT / "docs" / "pictures").iterdir() if path.suffix in (".png", ".gif"))
    return found | {path: f"pictures/{path.name}" for path in pictures}


def as_built(site: dict[Path, str]) -> dict[Path, str]:
    """The same places once they are pages."""
    return {path: re.sub(r"\.(md|ipynb)$", ".html", place) for path, place in site.items()}


def relinked(text: str, source: Path, site: dict[Path, str]) -> str:
    """Markdown with its links as they are in the site. SystemExit for one that leads nowhere."""

    def new(found: re.Match[str]) -> str:
        mark, said, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        path, _, anchor = target.partition("#")
        there = (source.parent / path).resolve()
        if not there.exists():
            raise SystemExit(f"{source.relative_to(ROOT)}: a link leads nowhere: {target}")
        if there not in site:
            return said
        here = os.path.relpath(site[there], os.path.dirname(site[source]) or ".")
        return f"{mark}[{said}]({here}{'#' + anchor if anchor else ''})"

    blocks = re.split(r"(```.*?```)", text, flags=re.DOTALL)
    return "".join(block if block.startswith("```") else LINK.sub(new, block) for block in blocks)


def write_pages() -> list[str]:
    """All pages into `build/pages`; the notebooks' places, in order."""
    site = places()
    built = as_built(site)  # the build leaves the links of notebooks as they are
    for source, place in site.items():
        out = PAGES / place
        out.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".md":
            text = re.sub(r'((?:src|srcset)=")docs/', r"\1", source.read_text(encoding="utf-8"))
            out.write_text(relinked(text, source, site), encoding="utf-8")
        elif source.suffix == ".ipynb":
            book = json.loads(source.read_text(encoding="utf-8"))
            for cell in book["cells"]:
                if cell["cell_type"] == "markdown":
                    cell["source"] = relinked("".join(cell["source"]), source, built)
            out.write_text(json.dumps(book), encoding="utf-8")
        else:
            shutil.copyfile(source, out)
    (PAGES / "widget.md").write_text(WIDGETS, encoding="utf-8")
    shutil.copyfile(ROOT / "docs" / "site.css", PAGES / "site.css")
    return [place for place in site.values() if place.endswith(".ipynb")]


def write_widget() -> None:
    """The widget on the small GPT, as one page."""
    import ckptlab

    os.chdir(ROOT)
    explorer = ckptlab.explore(ckptlab.open("data/gpt_tp2_pp2_dp2"))
    explorer.choose(tensor="2.mlp.dense_h_to_4h.weight", rank=3)
    names = [name for name in explorer.subject.catalog.tensors if name.startswith(("2.", "5.", "tied"))]
    explorer.to_html(PAGES / "explore.html", tensors=names)


def config(notebooks: list[str]) -> str:
    """mkdocs.yml: nothing is fetched, by the build or by a reader; pages open from disk."""
    nav = [
        {"Home": "index.md"},
        {TUTORIALS: ["notebooks/index.md", *notebooks]},
        {"How to": [{title: page} for page, title in HOW_TO.items()]},
        {"Reference": "reference.md"},
        {"With your hands": "widget.md"},
        {"Benchmarks": "benchmarks.md"},
        {"Contributing": "contributing.md"},
    ]
    palette = [
        {
            "media": f"(prefers-color-scheme{scheme})",
            **({"scheme": name} if name else {}),
            "toggle": {"icon": icon, "name": "light or dark"},
        }
        for scheme, name, icon in (
            ("", "", "material/brightness-auto"),  # as the reader's screen, which the pictures follow too
            (": light", "default", "material/weather-night"),
            (": dark", "slate", "material/weather-sunny"),
        )
    ]
    return json.dumps(
        {
            "site_name": "ckptlab",
            "docs_dir": str(PAGES),
            "site_dir": str(SITE),
            "use_directory_urls": False,
            "theme": {
                "name": "material",
                "font": False,
                "palette": palette,
                "features": ["navigation.sections", "toc.integrate"],
            },
            "extra_css": ["site.css"],
            "plugins": ["search", {"mkdocs-jupyter": {"execute": False, "ignore_h1_titles": True}}],
            "markdown_extensions": ["tables", "fenced_code", "md_in_html", {"toc": {"permalink": True}}],
            "validation": {"links": {"not_found": "warn", "anchors": "warn", "unrecognized_links": "warn"}},
            "nav": nav,
        },
        indent=1,
    )


def dead_links(site: Path) -> list[str]:
    """`page: link` of each link and picture of a built site that leads to no file of it."""
    lost = []
    for page in sorted(site.rglob("*.html")):
        for link in dict.fromkeys(HREF.findall(page.read_text(encoding="utf-8"))):
            target = unquote(link.partition("#")[0].partition("?")[0])
            if target and not re.match(r"[a-z]+:|/", link) and not (page.parent / target).exists():
                lost.append(f"{page.relative_to(site)}: {link}")
    return lost


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    shutil.rmtree(PAGES, ignore_errors=True)
    notebooks = write_pages()
    write_widget()
    (BUILD / "mkdocs.yml").write_text(config(notebooks), encoding="utf-8")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--config-file", BUILD / "mkdocs.yml"]
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, check=False, env={**os.environ, **quiet})
    if done.returncode:
        raise SystemExit(done.returncode)
    if lost := dead_links(SITE):
        raise SystemExit("links that lead nowhere:\n" + "\n".join(lost))
    print(f"{SITE.relative_to(ROOT)}/index.html")


if __name__ == "__main__":
    main()
