"""Layouts: how one tensor lies on a mesh, as a line of notation and the fields beside it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, TypeVar

from ckptlab.arguments import explained, whole_number
from ckptlab.errors import LayoutError
from ckptlab.layout.blocks import dims_of_axes, equal_blocks
from ckptlab.layout.cut import Cut, DimCut
from ckptlab.layout.laws import Laws, laws
from ckptlab.layout.notation import Name, Node, Number, Product, Sum, names, parse, rebuilt
from ckptlab.layout.solve import RESERVED, Geometry
from ckptlab.mesh import Mesh
from ckptlab.shown import Shown

if TYPE_CHECKING:
    from jax.sharding import PartitionSpec
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import Placement

REPLICAS = ("equal", "mean", "first", "sum")

Length = int | tuple[int, ...]
V = TypeVar("V")


@explained
@dataclass(frozen=True, init=False, repr=False)
class Layout(Shown):
    """How the whole of a tensor is composed of what the ranks hold: `Layout("(tp out) in")`.

    - text: the notation; names that are axes of the mesh (and pp, dp, tp, ep always) are mesh axes, others
      lengths.
    - dims: names of the whole's dims. Default: "out" for `out`, `(tp out)` and `(3 tp out)`, otherwise
      "dim0", "dim1", …
    - sizes: name → its length on each rank, or a tuple of widths, one for each coordinate of the nearest
      mesh axis that stands before the name in its term (an uneven cut).
    - totals: name → length of the whole term in which the name stands, mesh axes included: what does not
      change with the mesh.
    - units: name → its length on every rank must be a multiple of this (a head, where a cut must fall
      between heads).
    - padded: dim index → padded size; the text then describes the padded whole.
    - stages: the pp stages on which the tensor lives, the first canonical (None: not said).
    - replicas: copies are "equal", to be averaged ("mean"), the "first" is right, or they are parts of a "sum" (a bias
      that every rank adds; what is whole is then divided evenly again, and moments, which are equal, are averaged).

    Mappings are kept as sorted tuples of pairs, so that a layout is hashable. Raises NotationError and
    LayoutError.
    """

    text: str
    dims: tuple[str, ...]
    sizes: tuple[tuple[str, Length], ...]
    totals: tuple[tuple[str, int], ...]
    units: tuple[tuple[str, int], ...]
    padded: tuple[tuple[int, int], ...]
    stages: tuple[int, ...] | None
    replicas: str

    def __init__(
        self,
        text: str,
        *,
        dims: Sequence[str] = (),
        sizes: Mapping[str, int | Sequence[int]] | Iterable[tuple[str, int | Sequence[int]]] = (),
        totals: Mapping[str, int] | Iterable[tuple[str, int]] = (),
        units: Mapping[str, int] | Iterable[tuple[str, int]] = (),
        padded: Mapping[int, int] | Iterable[tuple[int, int]] = (),
        stages: Sequence[int] | None = None,
        replicas: str = "equal",
    ) -> None:
        lengths = {name: _length(n) for name, n in dict(sizes).items()}
        fields = {
            "text": text,
            "dims": tuple(dims) or _dim_names(parse(text)),
            "sizes": _pairs(lengths),
            "totals": _pairs({name: whole_number(n) for name, n in dict(totals).items()}),
            "units": _pairs({name: whole_number(n) for name, n in dict(units).items()}),
            "padded": _pairs({whole_number(dim): whole_number(n) for dim, n in dict(padded).items()}),
            "stages": None if stages is None else tuple(map(whole_number, stages)),
            "replicas": replicas,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        tree, known = parse(self.text), _names_in(self.text)
        for what in ("sizes", "totals", "units"):
            unknown = [name for name, _ in getattr(self, what) if name not in known]
            if unknown:
                raise LayoutError(f"{what} names {unknown[0]!r}, which does not stand in {self.text!r}")
        lengths = [n for _, given in self.sizes for n in (given if isinstance(given, tuple) else (given,))]
        if any(n < 0 for n in (*lengths, *dict(self.totals).values())):
            raise LayoutError(f"lengths are from 0: sizes {dict(self.sizes)}, totals {dict(self.totals)}")
        if any(unit < 1 for _, unit in self.units):
            raise LayoutError(f"a unit is at least 1, not {dict(self.units)} in {self.text!r}")
        if len(self.dims) != len(tree) or len(set(self.dims)) != len(tree):
            raise LayoutError(
                f"{self.text!r} has {len(tree)} dims, which need as many different names, not {self.dims}"
            )
        if any(i not in range(len(tree)) for i, _ in self.padded):
            raise LayoutError(f"padded {dict(self.padded)} names a dim that {self.text!r} lacks: it has {len(tree)}")
        if self.stages is not None and (not self.stages or len(set(self.stages)) != len(self.stages)):
            raise LayoutError(f"stages are different pp stages, at least one, not {self.stages}")
        if self.replicas not in REPLICAS:
            raise LayoutError(f"replicas are {' or '.join(map(repr, REPLICAS))}, not {self.replicas!r}")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the whole's dims; the same as `dims`."""
        return self.dims

    @property
    def tree(self) -> tuple[Node, ...]:
        """The notation parsed, one node a dim."""
        return parse(self.text)

    def replace(self, **fields: Any) -> Layout:
        """The layout with other fields; dim names that were derived are derived again."""
        kept = {name: getattr(self, name) for name in _FIELDS if name not in fields}
        if self.dims == _dim_names(self.tree):
            kept.pop("dims", None)
        return Layout(**(kept | fields))

    def on_stages(self, stages: tuple[int, ...] | None) -> Layout:
        """The layout on these pp stages. Cached: of many layers it is the same few."""
        return self if self.stages == stages else _on_stages(self, stages)

    def resolve(self, shape: Sequence[int], mesh: Mesh) -> Cut:
        """The cut for a true shape on a mesh. Raises LayoutError, with text, shape and mesh. Cached."""
        shape = tuple(int(n) for n in shape)
        return _resolve(self._on_any_stage, shape, mesh)

    @cached_property
    def _on_any_stage(self) -> Layout:
        """The same, whatever stages hold it: they make no other cut."""
        return self.on_stages(None)

    def check(
        self, shape: Sequence[int], mesh: Mesh, there: Layout | None = None, mesh_there: Mesh | None = None
    ) -> Laws:
        """Try the laws on it, element by element, for a small shape on a mesh; true if all hold.

        there, mesh_there: another layout of the same tensor (None: this one) on another mesh (None: the same), to go to
        and come back from. LayoutError where it does not fit.
        """
        if there is None and mesh_there is None:
            return laws(self.resolve(shape, mesh))
        return laws(self.resolve(shape, mesh), (there or self).resolve(shape, mesh_there or mesh))

    def parts(self, shape: Sequence[int], mesh: Mesh) -> list[list[tuple[str, int]]]:
        """For each dim (name, length) of what lies one after the other in it and is cut on its own: q, k, v.

        Empty for a dim that is one thing. Raises LayoutError as `resolve` does.
        """
        cut = self.resolve(shape, mesh)
        geometry = _geometry(self, cut.shape, mesh)
        return [geometry.parts(i) for i in range(len(self.tree))]

    def blocks(self, shape: Sequence[int], mesh: Mesh) -> list[list[tuple[int, str, int, int]]]:
        """For each dim (depth, name, start, length) of the blocks that lie in what a rank holds: heads, q, k, v in
        each.

        Empty for a dim that has none. Raises LayoutError as `resolve` does.
        """
        cut = self.resolve(shape, mesh)
        geometry = _geometry(self, cut.shape, mesh)
        return [geometry.blocks(i) for i in range(len(self.tree))]

    def einx(self, shape: Sequence[int], mesh: Mesh) -> tuple[str, dict[str, int]] | None:
        """The same in einx: a pattern `axes… shard -> whole` for the stacked shards, and the lengths to pass.

        None where einx cannot say it: uneven cuts, parts that are replicated, axes that are split. For a
        check of the geometry by someone else's code; too slow and too narrow to execute with.
        """
        cut = self.resolve(shape, mesh)
        geometry = _geometry(self, cut.shape, mesh)
        if any(isinstance(n, tuple) for n in geometry.lengths.values()) or _leaves_out_an_axis(self.tree, cut):
            return None
        numbers = itertools.count()
        named = [_name_numbers(dim, geometry.lengths, numbers) for dim in self.tree]
        absent = {axis for dim in named for axis in names(dim) if axis in RESERVED and axis not in cut.axes}
        shard = " ".join(_without(dim, {*cut.axes, *absent}) for dim in named)
        whole = " ".join(_without(dim, absent) for dim in named)
        lengths = {n: size for n, size in geometry.lengths.items() if isinstance(size, int)}
        return f"{' '.join(cut.axes)} {shard} -> {whole}", lengths | {axis: mesh[axis] for axis in cut.axes}

    def partition_spec(self, mesh: Mesh | None = None) -> PartitionSpec:
        """The layout as jax says it: for each dim of the (padded) whole the mesh axes that cut it, or None.

        mesh: ours; axes of degree 1 then cut nothing, and names that notation does not reserve (cp, edp) are known.
        LayoutError for what blocks of equal size cannot say: uneven, fused or interleaved; and for parts of a sum.
        """
        from jax.sharding import PartitionSpec

        if self.replicas == "sum":
            raise LayoutError(f"{self!r}: ranks hold parts of a sum, and a PartitionSpec says that they hold copies")
        cuts = equal_blocks(self, mesh)
        return PartitionSpec(*(None if not axes else axes[0] if len(axes) == 1 else axes for axes in cuts))

    def placements(self, mesh: Mesh | DeviceMesh) -> tuple[Placement, ...]:
        """The layout as torch's DTensor says it: `Shard(dim)` or `Replicate()` for each axis of the mesh, in its order;
        `Partial` for one other than dp over which replicas are to be summed or averaged.

        mesh: ours, or a torch DeviceMesh with names. LayoutError for what blocks of equal size cannot say, and for a
        mesh with several pp stages, since a tensor is on its own.
        """
        from torch.distributed.tensor import Partial, Replicate, Shard

        combined = {"sum": "sum", "mean": "avg"}.get(self.replicas)
        return tuple(
            Shard(dim) if dim is not None else Partial(combined) if combined and not data else Replicate()
            for dim, data in dims_of_axes(self, mesh)
        )

    def __repr__(self) -> str:
        parts = [repr(self.text)]
        if self.dims != _dim_names(self.tree):
            parts.append(f"dims={self.dims}")
        for name in ("sizes", "totals", "units", "padded"):
            if getattr(self, name):
                parts.append(f"{name}={dict(getattr(self, name))}")
        if self.stages is not None:
            parts.append(f"stages={self.stages}")
        if self.replicas != "equal":
            parts.append(f"replicas={self.replicas!r}")
        return f"Layout({', '.join(parts)})"


_FIELDS = ("text", "dims", "sizes", "totals", "units", "padded", "stages", "replicas")


@lru_cache(maxsize=4096)
def _on_stages(layout: Layout, stages: tuple[int, ...] | None) -> Layout:
    return layout.replace(stages=stages)


@lru_cache(maxsize=4096)
def _resolve(layout: Layout, shape: tuple[int, ...], mesh: Mesh) -> Cut:
    padded = dict(layout.padded)
    try:
        if len(shape) != len(layout.dims):
            raise LayoutError(f"the notation has {len(layout.dims)} dims, the shape {len(shape)}")
        for i, n in padded.items():
            if n < shape[i]:
                raise LayoutError(f"dim {i} is padded to {n}, less than its {shape[i]}")
        geometry = _geometry(layout, tuple(padded.get(i, n) for i, n in enumerate(shape)), mesh)
    except LayoutError as error:
        named = f"({', '.join(f'{d} {n}' for d, n in zip(layout.dims, shape, strict=False))})"
        named = named if len(shape) == len(layout.dims) else str(shape)
        raise LayoutError(f"{error}\n  {layout!r}, shape {named}, mesh {mesh}") from None
    dims = []
    for i, size in enumerate(geometry.sizes):
        rows = geometry.rows(i)
        widths = {at: int((held[:, 2] * held[:, 3]).sum()) for at, held in rows.items()}
        dims.append(DimCut(size, geometry.axes(i), rows, widths))
    return Cut(shape, mesh, tuple(dims))


def _geometry(layout: Layout, sizes: tuple[int, ...], mesh: Mesh) -> Geometry:
    return Geometry(layout.tree, sizes, mesh, dict(layout.sizes), dict(layout.totals), dict(layout.units))


@lru_cache(maxsize=4096)
def _names_in(text: str) -> frozenset[str]:
    return frozenset(name for dim in parse(text) for name in names(dim))


def _dim_names(tree: tuple[Node, ...]) -> tuple[str, ...]:
    """What the dims are called by default: by the one named length beside mesh axes and numbers, if there is one."""
    found: list[str] = []
    for i, dim in enumerate(tree):
        factors = dim.factors if isinstance(dim, Product) else (dim,)
        lengths = [f for f in factors if not isinstance(f, Number) and not (isinstance(f, Name) and f.text in RESERVED)]
        only = lengths[0] if len(lengths) == 1 else None
        found.append(only.text if isinstance(only, Name) and only.text not in found else f"dim{i}")
    return tuple(found)


def _pairs(values: Mapping[Any, V] | Iterable[tuple[Any, V]]) -> tuple[tuple[Any, V], ...]:
    return tuple(sorted(dict(values).items()))


def _length(value: int | Sequence[int]) -> Length:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return tuple(map(whole_number, value))
    return whole_number(value)


def _leaves_out_an_axis(tree: tuple[Node, ...], cut: Cut) -> bool:
    """Some term of a sum lacks an axis that another has, or names an axis that was split."""
    return any(not set(dim_cut.axes) <= _common(node) for node, dim_cut in zip(tree, cut.dims, strict=True))


def _common(node: Node) -> set[str]:
    """The names that stand in every term."""
    if isinstance(node, Sum):
        return set.intersection(*(_common(term) for term in node.terms))
    if isinstance(node, Product):
        return set().union(*(_common(factor) for factor in node.factors))
    return {node.text} if isinstance(node, Name) else set()


def _name_numbers(node: Node, lengths: dict[str, Length], numbers: Iterable[int]) -> Node:
    """einx wants a name for a length that stands on both sides of the arrow."""
    if isinstance(node, Number):
        name = f"n{next(iter(numbers))}"
        lengths[name] = node.value
        return Name(name)
    return rebuilt(node, lambda inside: _name_numbers(inside, lengths, numbers))


def _without(node: Node, left_out: set[str]) -> str:
    """The text of a node without some names."""
    if isinstance(node, Sum):
        return f"({' + '.join(_without(term, left_out) for term in node.terms)})"
    if isinstance(node, Product):
        parts = [text for factor in node.factors if (text := _without(factor, left_out)) != "1"]
        return f"({' '.join(parts)})" if parts else "1"
    return "1" if isinstance(node, Name) and node.text in left_out else str(node)
