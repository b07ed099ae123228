"""What `diff` found: which states differ and where, what one side alone has, and how far apart all of it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ckptlab.analysis.measure import Measure, Summary, summed
from ckptlab.analysis.renames import Renamed
from ckptlab.arguments import explained
from ckptlab.errors import CheckpointError
from ckptlab.plain import plain
from ckptlab.shown import Shown, plot
from ckptlab.words import number_of


@dataclass(frozen=True)
class Difference:
    """One state of one tensor that is not the same, bit for bit.

    count: elements that differ, of `elements`. max_abs: the largest |a - b|, inf where only one side is NaN or
    infinite. max_rel: the largest |a - b| / max(|a|, |b|). at: index of the largest |a - b| in the whole tensor, a and
    b the values there. dtypes: those of both sides; where they differ values were compared as float64, and count may
    be 0. relative: |a - b| / |a| of the whole tensors (norms); cosine: of the angle between them. permuted: both have
    the same elements, in another order.
    """

    name: str
    state: str
    dtypes: tuple[str, str]
    elements: int
    count: int = 0
    max_abs: float = 0.0
    max_rel: float = 0.0
    at: tuple[int, ...] = ()
    a: float = 0.0
    b: float = 0.0
    relative: float = 0.0
    cosine: float = 1.0
    permuted: bool = False

    @property
    def reason(self) -> str:
        """What is not the same: "values", "dtype", "values and dtype", or the "order" of the values alone."""
        if self.permuted:
            return "order"
        if self.dtypes[0] == self.dtypes[1]:
            return "values"
        return "values and dtype" if self.count else "dtype"


@dataclass(frozen=True)
class OnlyIn:
    """A state that one side alone has: of `tensors`, or of every tensor that both sides have (`everywhere`)."""

    state: str
    tensors: tuple[str, ...]
    everywhere: bool


@dataclass(frozen=True)
class Compared:
    """How many tensors (and elements of them) were compared in one state, and how many of the tensors differ."""

    state: str
    tensors: int
    elements: int
    differ: int


@dataclass(frozen=True)
class Setting:
    """A hyperparameter or step that both sides have, with another value: `where` names the group or "step"."""

    where: str
    key: str
    a: Any
    b: Any


@explained
@dataclass(frozen=True, repr=False)
class Diff(Shown):
    """What `diff` found. `a` and `b` are the paths, `tensors` how many were compared in some state; differences come in
    the order of the tensors of a.

    `renamed` are tensors that b has under another name, compared under a's; `only_a` and `only_b` those that one side
    alone has; `measures` say of every state that was compared, equal or not, how far apart it is.
    """

    a: str
    b: str
    tensors: int
    compared: tuple[Compared, ...]
    differences: tuple[Difference, ...]
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...] = ()
    states_only_a: tuple[OnlyIn, ...] = ()
    states_only_b: tuple[OnlyIn, ...] = ()
    settings: tuple[Setting, ...] = ()
    renamed: tuple[Renamed, ...] = ()
    measures: tuple[Measure, ...] = ()

    @property
    def equal(self) -> bool:
        """Both have the same tensors under the same names; every state and setting that both have is the same, bit for
        bit and in dtype."""
        return not (self.differences or self.only_a or self.only_b or self.shapes or self.settings or self.renamed)

    @property
    def verdict(self) -> str:
        """One line: `different: 3 tensors with other values, 1 setting with another value`."""
        if self.equal:
            states = ", ".join(self.states)
            return f"equal: {number_of(self.tensors, 'tensor')}, bit for bit, in every state that both have ({states})"
        counts = (
            (len(self.changed) - len(self.permuted), "tensor", "with other values"),
            (len(self.permuted), "tensor", "with the same values in another order"),
            (len(self.only_a) + len(self.only_b), "tensor", "on one side only"),
            (len(self.renamed), "tensor", "under another name"),
            (len(self.shapes), "tensor", "of another shape"),
            (len(self.settings), "setting", "with another value"),
        )
        return f"different: {', '.join(f'{number_of(n, thing)} {how}' for n, thing, how in counts if n)}"

    @property
    def states(self) -> tuple[str, ...]:
        """The states that were compared."""
        return tuple(c.state for c in self.compared)

    @property
    def differing(self) -> tuple[str, ...]:
        """The states in which some tensor differs."""
        return tuple(c.state for c in self.compared if c.differ)

    @property
    def changed(self) -> tuple[str, ...]:
        """The tensors (names of a) that differ in some state that both have."""
        return tuple(dict.fromkeys(d.name for d in self.differences))

    @property
    def permuted(self) -> tuple[str, ...]:
        """The tensors that differ in the order of their elements alone, in every state that differs."""
        others = {d.name for d in self.differences if not d.permuted}
        return tuple(name for name in self.changed if name not in others)

    @property
    def unchanged(self) -> tuple[str, ...]:
        """The tensors that are the same, bit for bit, in every state that both have."""
        changed = set(self.changed)
        return tuple(dict.fromkeys(m.name for m in self.measures if m.name not in changed))

    def by_layer(self, state: str | None = None) -> tuple[Summary, ...]:
        """How far apart each layer is in one state (default: the first that was compared), in order of depth; tensors
        outside layers come together last, as "other". `pandas.DataFrame(diff.by_layer())` is the same as a table."""
        found = [m for m in self.measures if m.state == self._state(state)]
        found.sort(key=lambda m: math.inf if m.layer is None else m.layer)
        return summed(found, lambda m: m.layer, lambda layer: "other" if layer is None else str(layer))

    def by_kind(self, state: str | None = None) -> tuple[Summary, ...]:
        """How far apart the tensors of each kind are, those of all layers together."""
        return summed((m for m in self.measures if m.state == self._state(state)), lambda m: m.kind, str)

    def _state(self, state: str | None) -> str:
        if state is None:
            return self.states[0] if self.states else ""
        if state not in self.states:
            raise CheckpointError(f"state {state!r} was not compared: there are {', '.join(self.states) or 'none'}")
        return state

    def plot(self, state: str | None = None, ax: Any = None) -> Any:
        """Draw the relative change over depth, a line for each kind of tensor, and return matplotlib's Axes.

        state: default the first that was compared. ax: where to draw (default: a new figure). ImportError without
        matplotlib, which comes with the extra `plots`.
        """
        return plot(self, self._state(state), ax)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `ckptlab diff --json` prints them; what is infinite or NaN is text.

        Keys: equal, a, b (paths), tensors (compared), compared [{state, tensors, elements, differ}], differences
        [{name, state, dtypes, elements, count, max_abs, max_rel, at, a, b, relative, cosine, permuted,
        reason}], only_a, only_b
        (names), renamed [{a, b, same, distance}], shapes [{name, a, b}], states_only_a, states_only_b [{state, tensors,
        everywhere}], settings [{where, key, a, b}], unchanged (names), layers and kinds {state: [{label, tensors,
        differ, max_abs, relative, cosine}]}, of states in which something differs.
        """
        return {
            "equal": self.equal,
            "a": self.a,
            "b": self.b,
            "tensors": self.tensors,
            "compared": [vars(c) for c in self.compared],
            "differences": [plain({**vars(d), "reason": d.reason}) for d in self.differences],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "shapes": [{"name": n, "a": list(a), "b": list(b)} for n, a, b in self.shapes],
            "states_only_a": [plain(vars(s)) for s in self.states_only_a],
            "states_only_b": [plain(vars(s)) for s in self.states_only_b],
            "settings": [plain(vars(s)) for s in self.settings],
            "renamed": [vars(r) for r in self.renamed],
            "unchanged": list(self.unchanged),
            "layers": {s: [plain(vars(x)) for x in self.by_layer(s)] for s in self.differing},
            "kinds": {s: [plain(vars(x)) for x in self.by_kind(s)] for s in self.differing},
        }
