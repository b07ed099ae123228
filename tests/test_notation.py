"""The grammar of layouts, and errors that point at the place."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptlab.errors import NotationError
from ckptlab.layout.notation import Name, Number, Product, Sum, names, parse, show

a, b, c = Name("a"), Name("b"), Name("c")


@pytest.mark.parametrize(
    ("text", "dims"),
    [
        ("", ()),
        ("a b", (a, b)),
        ("(a b) c", (Product((a, b)), c)),
        ("(3 a)b", (Product((Number(3), a)), b)),
        ("(a + b c)", (Sum((a, Product((b, c)))),)),
        ("((a b) + (a c))", (Sum((Product((a, b)), Product((a, c)))),)),
        ("(a (b + c))", (Product((a, Sum((b, c)))),)),
        ("((a)) (3)", (a, Number(3))),
        ("(a (b c))", (Product((a, b, c)),)),
    ],
)
def test_parse(text, dims):
    assert parse(text) == dims
    assert parse(text) is parse(text)


@st.composite
def trees(draw):
    """A tuple of dims in which every name stands once (Sum terms may share one more)."""
    fresh = (Name(f"n{i}") for i in range(10_000))

    def node(depth):
        kind = draw(st.sampled_from(["name", "number", "product", "sum"] if depth else ["name", "number"]))
        if kind == "name":
            return next(fresh)
        if kind == "number":
            return Number(draw(st.integers(1, 99)))
        children = [node(depth - 1) for _ in range(draw(st.integers(2, 3)))]
        if kind == "sum":
            return Sum(tuple(children))
        flat = [f for child in children for f in (child.factors if isinstance(child, Product) else (child,))]
        return Product(tuple(flat))

    return tuple(node(2) for _ in range(draw(st.integers(0, 3))))


@settings(deadline=None)
@given(trees())
def test_show_and_parse_are_inverse(dims):
    assert parse(show(dims)) == dims


def test_names():
    assert list(names(parse("((tp q) + (tp k) + 3)")[0])) == ["tp", "q", "tp", "k"]


@pytest.mark.parametrize(
    ("text", "caret", "message"),
    [
        ("(tp out in", 0, r"expected a '\)' for this '\(', found the end"),
        ("tp out) in", 6, r"expected a name or '\(', found '\)'"),
        ("q + k", 2, r"a sum needs parentheses around it, found '\+'"),
        ("(tp out) ()", 10, r"expected a name, an integer or '\(', found '\)'"),
        ("(q + ) in", 5, r"expected a name, an integer or '\(', found '\)'"),
        ("3 in", 0, r"a plain length is written \(3\)"),
        ("(0 q)", 1, "expected an integer from 1, found '0'"),
        ("(a * b)", 3, "expected .* found '\\*'"),
        ("(a 3b)", 3, "expected .* found '3b'"),
        ("(tp 3 tp)", 6, "'tp' stands twice in one term"),
        ("(tp ((tp q) + k))", 6, "'tp' stands twice in one term"),
        ("(((tp q) + k) tp)", 14, "'tp' stands twice in one term"),
        ("(tp out) (tp in)", 10, "'tp' stands in two dims"),
    ],
)
def test_errors_point_at_the_place(text, caret, message):
    with pytest.raises(NotationError, match=message) as caught:
        parse(text)
    line, pointer = str(caught.value).splitlines()[1:]
    assert line == f"    {text}"
    assert pointer == f"    {' ' * caret}^"


def test_an_axis_may_stand_in_every_term():
    assert parse("((tp q) + (tp k) + (tp v)) in")
