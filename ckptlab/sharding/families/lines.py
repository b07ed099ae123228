"""Lines of a family: which tensors of one program are which of another's. Each is read both ways.

`Rename` and `Permute` say it of one tensor, `Join` and `Stack` of several that are one on the other side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ckptlab.arguments import explained
from ckptlab.catalog.seen import Piece, identity
from ckptlab.errors import LayoutError, NotationError
from ckptlab.sharding.families.names import Template
from ckptlab.sharding.families.tables import Lengths, Shape, piece, shape_of, solved, term_names, terms

Side = Literal["left", "right"]
SIDES: tuple[Side, Side] = ("left", "right")
_INDEX = "e"  # the place in names that is an index of a dim on the other side


def other(side: Side) -> Side:
    """The other side."""
    return "right" if side == "left" else "left"


@dataclass(frozen=True)
class Line:
    """One tensor, `whole`, on the side `joined`, and on the other side its `parts`.

    `text` says in notation how the parts make up the whole, term by term in their order; None: there is one, and it is
    the whole as it is. A part with no notation of its own has the names of its term in the same order and dims. A name
    that stands at a place of a part's name, `{e}`, is no dim of it: there is one for each index. `lengths` are those
    that are always the same. NotationError where terms and parts do not fit.
    """

    whole: str
    parts: tuple[tuple[str, str | None], ...]
    text: str | None = None
    joined: Side = "left"
    lengths: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.text is None:
            if len(self.parts) != 1:
                raise NotationError(f"{self.whole}: {len(self.parts)} parts, and no notation that says how they join")
            return
        told = term_names(self.text)
        if _INDEX in self.known and len({bool(_indices(name)) for name, _ in self.parts}) > 1:
            raise NotationError(f"{self.whole}: some parts have {{e}} in their names, and some have not")
        if len(told) != len(self.parts):
            raise NotationError(f"{self.whole}: {self.text!r} has {len(told)} terms, there are {len(self.parts)} parts")
        for (name, text), term in zip(self.parts, told, strict=True):
            ours = sorted(n for dim in term for n in dim if n not in _indices(name))
            if (theirs := sorted(n for dim in term_names(_text(name, text, term))[0] for n in dim)) != ours:
                raise NotationError(f"{name}: {text!r} has the names {theirs}, its term in {self.text!r} has {ours}")

    def names(self, side: Side) -> tuple[str, ...]:
        """The names on one side, with places in them."""
        return (self.whole,) if side == self.joined else tuple(name for name, _ in self.parts)

    @cached_property
    def templates(self) -> Mapping[Side, tuple[Template, ...]]:
        return {side: tuple(map(Template, self.names(side))) for side in SIDES}

    @property
    def keeps(self) -> bool:
        """Whether the tensor is called the same on both sides, and is the same."""
        return self.text is None and self.parts == ((self.whole, None),)

    @cached_property
    def stacks(self) -> bool:
        """Whether there is a part for each index of a dim of the whole."""
        return _INDEX in self.known and any(_indices(name) for name, _ in self.parts)

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The notation of each part."""
        assert self.text is not None
        told = term_names(self.text)
        return tuple(_text(name, text, term) for (name, text), term in zip(self.parts, told, strict=True))

    @cached_property
    def known(self) -> frozenset[str]:
        """The names of all lengths in its notation."""
        return frozenset() if self.text is None else frozenset(n for t in term_names(self.text) for d in t for n in d)

    def shapes(
        self, towards: Side, names: Sequence[str], given: Sequence[Shape], numbers: Lengths, count: int = 1
    ) -> tuple[tuple[Shape, ...], dict[str, int]]:
        """The shapes on the side `towards` of tensors `names` that have the shapes `given` on the other, in the order
        of the line's names (of a stack one for all its `count` parts); and every length. LayoutError where they do not
        fit the line."""
        if self.text is None:
            return (given[0],), {}
        lengths: dict[str, int] = {**{k: n for k, n in numbers.items() if k in self.known}, **dict(self.lengths)}
        if towards != self.joined:
            lengths = solved(self.text, given[0], lengths, names[0])
            return tuple(shape_of(text, lengths) for text in self.texts), lengths
        if self.stacks:
            lengths[_INDEX] = count
        for name, text, shape in zip(names, self.texts, given, strict=True):
            lengths |= solved(text, shape, lengths, name)
        return (shape_of(self.text, lengths),), lengths

    def pieces(self, names: Sequence[Sequence[str]], shape: Shape, lengths: Lengths) -> list[Piece]:
        """What the whole, of that shape, is made of: names[k] are the tensors that are its k-th part, those of a stack
        in the order of their indices."""
        if self.text is None:
            return [identity(names[0][0], shape)]
        found = []
        for term, text, stored in zip(terms(self.text, lengths), self.texts, names, strict=True):
            there = terms(text, lengths)[0]
            for index, name in enumerate(stored):
                seen = tuple(steps.fixed({_INDEX: index} if self.stacks else {}) for steps in term)
                found.append(piece(name, seen, there, lengths))
        return found

    def piece_of(self, part: int, whole: str, shape: Shape, lengths: Lengths, index: int = 0) -> Piece:
        """What the part of that number (of a stack: at that index), of that shape, is of the whole."""
        if self.text is None:
            return identity(whole, shape)
        there = terms(self.text, lengths)[part]
        fixed = tuple(steps.fixed({_INDEX: index} if self.stacks else {}) for steps in there)
        return piece(whole, terms(self.texts[part], lengths)[0], fixed, lengths)


def _indices(name: str) -> frozenset[str]:
    """The index of a stack, if it stands in a name."""
    return Template(name).counters & {_INDEX}


def _text(name: str, text: str | None, term: tuple[tuple[str, ...], ...]) -> str:
    """The notation of a part: its own, or that of its term."""
    if text is not None:
        return text
    dims = [[n for n in dim if n not in _indices(name)] for dim in term]
    return " ".join(dim[0] if len(dim) == 1 else f"({' '.join(dim)})" for dim in dims if dim)


@explained
def Rename(left: str, right: str) -> Line:  # noqa: N802 (a kind of line)
    """The same tensor under another name."""
    return Line(left, ((right, None),))


@explained
def Permute(left: str, right: str, text: str, **lengths: int) -> Line:  # noqa: N802 (a kind of line)
    """The same elements in another order: `"(h p two) in -> (h two p) in"`, or with dims exchanged: `"out in -> in
    out"`. lengths: those that are always the same."""
    here, arrow, there = text.partition("->")
    if not arrow:
        raise NotationError(f"{left}: {text!r} says one order: expected 'this -> that'")
    return Line(left, ((right, there.strip()),), here.strip(), lengths=tuple(sorted(lengths.items())))


@explained
def Join(whole: str, text: str, parts: Sequence[str | tuple[str, str]], joined: Side = "left") -> Line:  # noqa: N802 (a kind of line)
    """Parts of one tensor: `Join("qkv.weight", "(kv (q d + d + d)) in", ("q.weight", "k.weight", "v.weight"))`. A part
    may have a notation of its own beside its name."""
    told = tuple((part, None) if isinstance(part, str) else part for part in parts)
    return Line(whole, told, text, joined)


@explained
def Stack(whole: str, text: str, parts: Sequence[str | tuple[str, str]], joined: Side = "left") -> Line:  # noqa: N802 (a kind of line)
    """Tensors of several experts in one, `e` in the notation being their index, `{e}` in a part's name: `Stack("w1", "e
    out in", ("experts.{e}.w1",))`. LayoutError where neither has it."""
    line = Join(whole, text, parts, joined)
    if not line.stacks or _INDEX not in line.known:
        raise LayoutError(f"{whole}: a stack has {{e}} in the names of its parts, and e in {text!r}")
    return line
