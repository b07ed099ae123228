"""The notation of layouts: text in, immutable tree out.

    layout := dim*     dim := name | "(" term ("+" term)* ")"     term := (name | integer | dim)+

The tree is the text with needless parentheses taken away: a product in a product is one product, a product
or sum of one thing is that thing. Which names are mesh axes is not known here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NoReturn

from ckptlab.errors import NotationError


@dataclass(frozen=True)
class Name:
    """A mesh axis, or a length by name."""

    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Number:
    """A length that is written out: the 3 of `(3 tp out)`."""

    value: int

    def __str__(self) -> str:
        return str(self.value)


@dataclass(frozen=True)
class Product:
    """A term of two or more factors, the last running fastest."""

    factors: tuple[Node, ...]

    def __str__(self) -> str:
        return f"({' '.join(str(factor) for factor in self.factors)})"


@dataclass(frozen=True)
class Sum:
    """Two or more terms, one after the other."""

    terms: tuple[Node, ...]

    def __str__(self) -> str:
        return f"({' + '.join(_bare(term) for term in self.terms)})"


Node = Name | Number | Product | Sum


def below(node: Node) -> tuple[Node, ...]:
    """What a product or a sum is made of."""
    return node.factors if isinstance(node, Product) else node.terms if isinstance(node, Sum) else ()


def rebuilt(node: Node, change: Callable[[Node], Node]) -> Node:
    """The node with what it is made of changed."""
    if isinstance(node, Product | Sum):
        return type(node)(tuple(map(change, below(node))))
    return node


def names(node: Node) -> Iterator[str]:
    """Every name in a tree, in order, as often as it stands there."""
    if isinstance(node, Name):
        yield node.text
    for child in below(node):
        yield from names(child)


def show(dims: tuple[Node, ...]) -> str:
    """The text of a layout; `parse(show(dims)) == dims`."""
    return " ".join(f"({dim})" if isinstance(dim, Number) else str(dim) for dim in dims)


def _bare(term: Node) -> str:
    return str(term)[1:-1] if isinstance(term, Product) else str(term)


@lru_cache(maxsize=4096)
def parse(text: str) -> tuple[Node, ...]:
    """One tree for each dim of the whole. Raises NotationError, with a caret under the place."""
    return _Parser(text).layout()


@dataclass(frozen=True)
class _Token:
    text: str
    at: int


_Places = dict[str, int]  # name → where in the text it first stands


class _Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = [_Token(m[0], m.start()) for m in re.finditer(r"[A-Za-z_]\w*|\w+|\S", text)]
        self.tokens.append(_Token("", len(text)))
        self.next = 0

    def layout(self) -> tuple[Node, ...]:
        dims: list[Node] = []
        seen: _Places = {}
        while self.tokens[self.next].text:
            node, places = self.dim()
            self.add(seen, places, "stands in two dims; an axis cuts at most one dim, and a length has one place")
            dims.append(node)
        return tuple(dims)

    def dim(self) -> tuple[Node, _Places]:
        token = self.tokens[self.next]
        if token.text == "(":
            return self.group()
        if token.text == "+":
            self.fail(token, "a name or '(': a sum needs parentheses around it")
        if token.text.isdecimal():
            self.fail(token, f"a name or '(': a dim that is a plain length is written ({token.text})")
        if not token.text.isidentifier():
            self.fail(token, "a name or '('")
        self.next += 1
        return Name(token.text), {token.text: token.at}

    def group(self) -> tuple[Node, _Places]:
        opening = self.tokens[self.next]
        terms: list[Node] = []
        places: _Places = {}
        while not terms or self.tokens[self.next].text == "+":
            self.next += 1
            term, inside = self.term(opening)
            terms.append(term)
            places |= inside
        self.next += 1
        return (terms[0] if len(terms) == 1 else Sum(tuple(terms))), places

    def term(self, opening: _Token) -> tuple[Node, _Places]:
        factors: list[Node] = []
        places: _Places = {}
        while (token := self.tokens[self.next]).text not in (")", "+"):
            if not token.text:
                self.fail(opening, "a ')' for this '('", found="the end")
            node, inside = self.factor(token)
            self.add(places, inside, "stands twice in one term; an axis cuts a term at most once")
            factors.extend(node.factors if isinstance(node, Product) else [node])
        if not factors:
            self.fail(token, "a name, an integer or '('")
        return (factors[0] if len(factors) == 1 else Product(tuple(factors))), places

    def factor(self, token: _Token) -> tuple[Node, _Places]:
        if not token.text.isdecimal():
            return self.dim() if token.text == "(" or token.text.isidentifier() else self.no_factor(token)
        if int(token.text) == 0:
            self.fail(token, "an integer from 1")
        self.next += 1
        return Number(int(token.text)), {}

    def no_factor(self, token: _Token) -> NoReturn:
        self.fail(token, "a name, an integer, '(', '+' or ')'")

    def add(self, seen: _Places, more: _Places, complaint: str) -> None:
        for name, at in more.items():
            if name in seen:
                raise NotationError(f"{name!r} {complaint}\n{self.caret(at)}")
        seen |= more

    def fail(self, token: _Token, expected: str, found: str = "") -> NoReturn:
        found = found or (repr(token.text) if token.text else "the end")
        raise NotationError(f"expected {expected}, found {found}\n{self.caret(token.at)}")

    def caret(self, at: int) -> str:
        line = re.sub(r"\s", " ", self.text)
        return f"    {line}\n    {' ' * at}^"
