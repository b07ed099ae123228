"""The site's links: those of pages and of notebooks lead somewhere, and one that does not is told."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SITE = runpy.run_path(str(ROOT / "docs" / "site.py"))


def test_links_are_those_of_the_site() -> None:
    site, tour = SITE["places"](), ROOT / "notebooks" / "00_tour.ipynb"
    said = "[a](20_reshape.ipynb), [b](../docs/check.md#codes), [c](../data/README.md), [d](https://x.y)"
    assert SITE["relinked"](said, tour, site) == "[a](20_reshape.ipynb), [b](../check.md#codes), c, [d](https://x.y)"
    built = SITE["as_built"](site)
    assert SITE["relinked"](said, tour, built) == "[a](20_reshape.html), [b](../check.html#codes), c, [d](https://x.y)"
    with pytest.raises(SystemExit, match="00_tour.ipynb: a link leads nowhere: 99_more.ipynb"):
        SITE["relinked"]("[a](99_more.ipynb)", tour, site)


def test_a_link_of_the_built_site_that_leads_nowhere_is_told(tmp_path: Path) -> None:
    (tmp_path / "there.png").touch()
    (tmp_path / "page.html").write_text(
        '<a class="x" href="page.html#here">a</a><img src="there.png"><a href="https://x.y">b</a>'
        '<a href="lost.md">c</a><source srcset="lost.png">'
    )
    assert SITE["dead_links"](tmp_path) == ["page.html: lost.md", "page.html: lost.png"]
