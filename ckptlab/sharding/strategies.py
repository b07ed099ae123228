"""Strategies: rules that give every tensor a layout.

A strategy is a small immutable value that works on metadata alone: a tensor's name and the shapes of its shards in, a
`Layout` out (None: it says nothing about that tensor). Wherever ckptlab infers layouts, a user can give a strategy
instead: a registered name (`"megatron"`), a mapping from regular expressions to lines of notation, or an object with
`layout`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from ckptlab.arguments import explained
from ckptlab.errors import LayoutError
from ckptlab.layout import Layout
from ckptlab.registry import Registry

Shape = tuple[int, ...]


@runtime_checkable
class Strategy(Protocol):
    """Anything with this method is a strategy."""

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        """The layout of tensor `name`, whose shard on tp rank i has shape `shards[i]`; None if it has no say."""


def dim_names(ndim: int) -> tuple[str, ...]:
    """What ckptlab calls the dims of a tensor that nobody named: out, in, then k2, k3, …"""
    return ("out", "in", *(f"k{i}" for i in range(2, ndim)))[:ndim]


def replicated(ndim: int, **fields: Any) -> Layout:
    """Every rank holds the whole."""
    return Layout(" ".join(dim_names(ndim)), **fields)


def cut(ndim: int, dim: int, term: str = "tp {}", **fields: Any) -> Layout:
    """Dim `dim` is composed as `term` says (`{}` stands for the dim's name); the others are whole."""
    names = dim_names(ndim)
    return Layout(" ".join(f"({term.format(n)})" if i == dim else n for i, n in enumerate(names)), dims=names, **fields)


def column(shards: Sequence[Shape], dim: int = 0) -> Layout:
    """Cut along `dim` over tp, each rank as wide as its shard is (even or not)."""
    widths = tuple(s[dim] for s in shards)
    ndim = len(shards[0])
    if len(set(widths)) == 1:
        return cut(ndim, dim)
    return cut(ndim, dim, sizes={dim_names(ndim)[dim]: widths})


@dataclass(frozen=True)
class Rules:
    """Regular expressions (the whole name must match) and what they mean; the first that matches wins."""

    rules: tuple[tuple[str, Layout], ...]
    name: str = "rules"

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        return next((layout for pattern, layout in self.rules if re.fullmatch(pattern, name)), None)

    @staticmethod
    def of(mapping: Mapping[str, str | Layout], name: str = "rules") -> Rules:
        """From {pattern: line of notation or Layout}. NotationError for a bad line, LayoutError for a bad pattern."""
        rules = []
        for pattern, layout in mapping.items():
            try:
                re.compile(pattern)
            except re.error as e:
                raise LayoutError(f"strategy {name}: {pattern!r} is no regular expression: {e}") from None
            rules.append((pattern, layout if isinstance(layout, Layout) else Layout(layout)))
        return Rules(tuple(rules), name)


@explained
@dataclass(frozen=True)
class Megatron:
    """Megatron-LM's names: embeddings and output layer cut by vocabulary, query_key_value and dense_h_to_4h column
    parallel, attention's dense and dense_4h_to_h row parallel, the rest replicated. `swiglu`: dense_h_to_4h holds gate
    and up projection, each cut on its own."""

    swiglu: bool = False

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        ndim = len(shards[0])
        if re.search(r"(word_embeddings|lm_head|output_layer)\.weight$", name):
            return cut(ndim, 0)
        if re.search(r"dense_h_to_4h\.(weight|bias)$", name):
            return cut(ndim, 0, "2 tp {}" if self.swiglu else "tp {}")
        if re.search(r"query_key_value\.(weight|bias)$", name):
            return cut(ndim, 0)
        if re.search(r"(attention\.dense|dense_4h_to_h)\.weight$", name):
            return cut(ndim, 1)
        return replicated(ndim)


REGISTRY = Registry[Strategy](
    "strategy",
    "ckptlab.strategies",
    LayoutError,
    {"megatron": Megatron(), "megatron-swiglu": Megatron(swiglu=True)},
    hint=", or a .json file of pattern: notation",
)


def resolve(strategy: Strategy | Mapping[str, str | Layout] | str | None) -> Strategy | None:
    """A strategy from whatever a user may give: an object, a mapping, a registered name, or the path of a JSON one."""
    if strategy is None or isinstance(strategy, Strategy):
        return strategy
    if isinstance(strategy, Mapping):
        return Rules.of(strategy)
    if strategy.endswith(".json"):
        try:
            with open(strategy) as f:
                return Rules.of(json.load(f), strategy)
        except (OSError, json.JSONDecodeError, AttributeError) as e:
            raise LayoutError(f"strategy file {strategy}: expected a JSON object of pattern: notation: {e}") from None
    return REGISTRY.get(strategy)


@dataclass(frozen=True)
class LayoutsOf:
    """The strategy that gives each tensor the layout that it is known to have; one that is padded says it by its
    checkpoint's own word."""

    layouts: Mapping[str, Layout]

    def layout(self, name: str, shards: Sequence[Shape]) -> Layout | None:
        found = self.layouts.get(name)
        return None if found is None or found.padded else found
