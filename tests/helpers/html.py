"""Reading what is shown in a notebook."""

from __future__ import annotations

from html.parser import HTMLParser


class _Balanced(HTMLParser):
    """Tags in order, every one closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list) -> None:
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def assert_well_formed(page: str) -> None:
    """Every tag is closed, in order, and no script is among them."""
    parser = _Balanced()
    parser.feed(page)
    assert parser.open == []
    assert "<script" not in page
