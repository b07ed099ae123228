"""Hypothesis strategies for property tests: meshes, layouts that fit them, cuts.

@given(strategies.cuts(), strategies.cuts())       # two cuts of one tensor
def test_there_and_back(a, b): ...
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptlab.errors import LayoutError, UnsupportedError
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh

try:
    from hypothesis import strategies as st
except ModuleNotFoundError:
    raise UnsupportedError("ckptlab.testing.strategies needs hypothesis: pip install hypothesis") from None

SHAPE = (48, 12)  # what cuts are of, if nothing is said: many degrees divide it


@st.composite
def meshes(draw: st.DrawFn, axes: Sequence[str] = ("pp", "dp", "tp"), most: int = 4) -> Mesh:
    """A mesh of these axes, each of degree 1 to `most`."""
    return Mesh(**{axis: draw(st.integers(1, most)) for axis in axes})


@st.composite
def layouts(
    draw: st.DrawFn, shape: Sequence[int] = SHAPE, mesh: Mesh | None = None, axes: Sequence[str] | None = None
) -> Layout:
    """A layout that fits a shape on a mesh (None: any of `meshes()`), cut over some of `axes` (None: all but pp's):
    plain, cyclic, fused, in unequal parts, partly replicated, uneven, padded; in one dim or in two."""
    mesh = draw(meshes()) if mesh is None else mesh
    names = [axis for axis in mesh.axes if axis not in mesh.leaves("pp")] if axes is None else list(axes)
    if not shape or not names:
        return Layout(" ".join(f"dim{i}" for i in range(len(shape))))
    a, *others = draw(st.permutations(names))
    dim = draw(st.integers(0, len(shape) - 1))
    term, fields = draw(st.sampled_from(_fitting(shape, dim, mesh, a, others[0] if others else None)))
    if uneven := fields.pop("uneven", None):
        scale, rest = uneven
        total, cut = (shape[dim] - rest) // scale, mesh[a] - 1
        edges = sorted(draw(st.lists(st.integers(0, total), min_size=cut, max_size=cut)))
        widths = [hi - lo for lo, hi in zip([0, *edges], [*edges, total], strict=True)]
        fields["sizes"] = {"out": widths}
    if fields.pop("padded", False):
        fields["padded"] = {dim: -(-shape[dim] // mesh[a]) * mesh[a] + mesh[a] * draw(st.integers(0, 3))}
    lines = [term if i == dim else f"dim{i}" for i in range(len(shape))]
    free = [axis for axis in names if axis not in term.replace("(", " ").replace(")", " ").split()]
    for i in range(len(shape)):
        if i != dim and free and draw(st.booleans()):
            axis = free.pop()
            if shape[i] % mesh[axis] == 0:
                lines[i] = draw(st.sampled_from([f"({axis} dim{i})", f"(dim{i} {axis})"]))
    return Layout(" ".join(lines), dims=[f"dim{i}" for i in range(len(shape))], **fields)


@st.composite
def cuts(
    draw: st.DrawFn, shape: Sequence[int] = SHAPE, mesh: Mesh | None = None, axes: Sequence[str] | None = None
) -> Cut:
    """A cut of a tensor of that shape; see `layouts`."""
    mesh = draw(meshes()) if mesh is None else mesh
    return draw(layouts(shape, mesh, axes)).resolve(shape, mesh)


def _fitting(shape: Sequence[int], dim: int, mesh: Mesh, a: str, b: str | None) -> list[tuple[str, dict[str, Any]]]:
    """The ways to compose one dim over axis a (and b) that fit its length: terms, and the fields beside them. "uneven":
    how often the widths to be drawn stand in it, and what else does."""
    n = shape[dim]
    ways: list[tuple[str, dict[str, Any]]] = [
        ("out", {}),
        (f"({a} out)", {}),
        (f"(out {a})", {}),
        (f"(2 {a} out)", {}),
        (f"({a} head 2 d)", {"sizes": {"d": 2}}),
        (f"(head {a} d)", {"sizes": {"d": 2}}),
        (f"(({a} q) + ({a} k) + ({a} v))", {"totals": {"q": n // 2, "k": n // 4}}),
        (f"(({a} q) + k + v)", {"totals": {"q": n // 4 * 3, "k": n // 10}}),
        (f"(4 (({a} q) + k))", {"sizes": {"k": n // 4 - n // 4 // 2 // mesh[a] * mesh[a]}}),
        (f"((3 {a} out) + k)", {"sizes": {"k": n // 4}}),
        (f"(k + (3 {a} out))", {"sizes": {"k": n // 4}}),
    ]
    if b is not None:
        ways += [
            (f"({a} p {b} q)", {"sizes": {"q": 2}}),
            (f"(out {b} {a})", {}),
            (f"(({a} q) + ({b} k) + v)", {"totals": {"q": n // 2, "k": n // 4}}),
            (f"(({a} {b} q) + ({a} k))", {"totals": {"k": n // 2}}),
        ]
    fitting = [way for way in ways if _fits(Layout(way[0], **way[1]), n, mesh)]
    free: list[tuple[str, dict[str, Any]]] = [
        (f"({a} out)", {"uneven": (1, 0)}),
        (f"({a} out)", {"padded": True}),
    ]
    free += [(f"(2 {a} out)", {"uneven": (2, 0)})] * (n % 2 == 0)
    free += [(f"({a} 3 out)", {"uneven": (3, 0)})] * (n % 3 == 0)
    free += [(f"(({a} out) + k)", {"uneven": (1, 2)})] * (n > 2)
    return fitting + free


def _fits(layout: Layout, n: int, mesh: Mesh) -> bool:
    try:
        layout.resolve((n,), mesh)
    except LayoutError:
        return False
    return True
