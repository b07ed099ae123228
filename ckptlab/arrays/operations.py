"""Merging, splitting and reshaping as operations on labelled arrays in memory, alike on every backend.

    whole = merge(shards, "(3 tp out) in")               # dims (tp, out, in) → (out, in)
    shards = split(whole, "(3 tp out) in", Mesh(tp=4))   # and back, for any mesh
    shards = reshape(shards, "(3 tp out) in", Mesh(tp=8))

Arrays are xarray's, on whatever backend they are or on the one that is asked for. Dims that the layout does not know
(`layer`, `step`) are kept. Nothing here reads files: what the views give goes in, and what the views give comes out.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.arguments import explained
from ckptlab.arrays.backends import Backend, of, resolve
from ckptlab.arrays.coordinates import plain, ranks
from ckptlab.arrays.duck import duck
from ckptlab.arrays.moves import held_shape, moves
from ckptlab.arrays.taught import teach
from ckptlab.errors import LayoutError, MeshError
from ckptlab.layout import Cut, Layout, whole_shape
from ckptlab.layout.notation import Name, Product, names
from ckptlab.layout.solve import RESERVED
from ckptlab.mesh import Mesh

teach()


class ReplicaWarning(UserWarning):
    """Copies that should be equal and are not: the first was taken."""


@explained
def to(array: xr.DataArray, backend: Backend | str | None = None, device: Any = None) -> xr.DataArray:
    """The array on a backend and device, labels and bits as they are: `to(array, "torch", "cuda")`.

    Nothing is copied where it is there already. BackendError where that cannot be.
    """
    there, place = _on(array, backend, device)
    held = raw(there, place)
    return there if place.is_safe(held) or held is not there.data else there.copy(data=duck(held, place))


@explained
def merge(
    shards: xr.DataArray,
    layout: Layout | str,
    *,
    shape: Sequence[int] | None = None,
    on: Mesh | None = None,
    backend: Backend | str | None = None,
    device: Any = None,
    out: Any = None,
) -> xr.DataArray:
    """The whole that shards make: dims ([others,] mesh axes, *tensor dims) → ([others,] *tensor dims).

    The mesh is read off the dims that are called as its axes. An axis that the layout does not name holds replicas: the
    first is taken, or their mean or (but over pp and dp) sum if the layout says so; ReplicaWarning where they, or
    copies of a part that the layout gives to several, should be equal and are not.

    shape: the true shape of the whole; where the layout pads a dim the padding is then cut off (default: what the
    shards imply, padding included). on: the mesh that they are on, where one of its axes is split into sub-axes; shape
    is then needed. Shards of unequal width stand in the corner of the widest; their widths are the layout's, or, of a
    dim `(tp out)`, the coordinates `<dim>_extent`. backend, device: move the shards there first. out: the array of the
    whole's shape that is written to and returned inside (not on jax).

    LayoutError where shards, layout and shape do not fit.
    """
    layout = _layout(layout)
    array, place = _on(shards, backend, device)
    axes, mesh = _mesh_of(array, layout, on)
    cut = _cut_of(array, layout, mesh, shape)
    array = _first_replicas(array, [a for a in axes if a not in cut.axes], layout, mesh)
    others = [d for d in array.dims if d not in (*layout.dims, *axes)]
    _compare_parts(array, cut, layout, others, place)
    return _moved(array, cut, Cut.whole(cut.logical), layout, others, place, out)


@explained
def split(
    whole: xr.DataArray,
    layout: Layout | str,
    mesh: Mesh,
    *,
    backend: Backend | str | None = None,
    device: Any = None,
    out: Any = None,
) -> xr.DataArray:
    """The shards of a whole on a mesh: dims ([others,] *tensor dims) → ([others,] mesh axes, *tensor dims).

    The new dims are the axes that the layout names, and `tp`: what is replicated over it stands there once for each
    coordinate (without a copy in memory). Shards of unequal width are padded with 0 to the widest; `<dim>_extent` are
    their widths. backend, device, out: as in `merge`. LayoutError where layout, shape and mesh do not fit.
    """
    layout = _layout(layout)
    array, place = _on(whole, backend, device)
    missing = [d for d in layout.dims if d not in array.dims]
    if missing:
        hint = f"say what the layout's dims are called, Layout({layout.text!r}, dims={array.dims[-len(layout.dims) :]})"
        raise LayoutError(f"{layout.text!r} has dims {layout.dims}, the array {array.dims}: no {missing[0]!r}: {hint}")
    cut = layout.resolve(tuple(array.sizes[d] for d in layout.dims), mesh)
    others = [d for d in array.dims if d not in layout.dims]
    if again := [axis for axis in (*cut.axes, "tp") if axis in others]:
        raise LayoutError(
            f"the array has a dim {again[0]} already: these are shards; merge them first, or reshape them"
        )
    shards = _moved(array, Cut.whole(cut.logical), cut, layout, others, place, out)
    return _with_replicas(shards, cut, layout)


@explained
def reshape(
    shards: xr.DataArray,
    layout: Layout | str,
    mesh: Mesh,
    *,
    to: Layout | str | None = None,
    shape: Sequence[int] | None = None,
    on: Mesh | None = None,
    backend: Backend | str | None = None,
    device: Any = None,
    out: Any = None,
) -> xr.DataArray:
    """Shards on another mesh, without the whole between: as `split` of `merge`.

    The layout is told in what does not change with the mesh (`totals`, heads as `units`); uneven widths are recut
    evenly. to: the layout on that mesh where it is another one, over other axes; lengths of parts that it leaves open
    are the first one's, and the dims are called as it calls them. shape, on: as in `merge`. LayoutError where shards,
    layouts, shape and mesh do not fit.
    """
    from ckptlab.layout import on_degree, with_lengths

    layout = _layout(layout)
    array, place = _on(shards, backend, device)
    axes, before = _mesh_of(array, layout, on)
    source = _cut_of(array, layout, before, shape)
    if to is None:
        recut = layout
        for axis in source.axes:
            recut = on_degree(recut, axis, mesh[axis]) if axis in mesh else recut
    else:
        recut = _layout(to)
        if len(recut.dims) != len(layout.dims):
            raise LayoutError(f"{recut.text!r} has {len(recut.dims)} dims, {layout.text!r} {len(layout.dims)}")
        recut = with_lengths(recut, layout, source.shape, before)
        taken = [d for d in recut.dims if d in array.dims and d not in layout.dims]
        if taken:
            raise LayoutError(f"{recut.text!r} calls a dim {taken[0]!r}, and the shards have another dim of that name")
        array = array.rename({a: b for a, b in zip(layout.dims, recut.dims, strict=True) if a != b})
        layout = layout.replace(dims=recut.dims, replicas=layout.replicas)
    target = recut.resolve(source.logical, mesh)
    array = _first_replicas(array, [a for a in axes if a not in source.axes], layout, before)
    others = [d for d in array.dims if d not in (*layout.dims, *axes)]
    _compare_parts(array, source, layout, others, place)
    moved = _moved(array, source, target, recut, others, place, out)
    return _with_replicas(moved, target, recut)


# ------------------------------------------------------------------------------------------------ labels


def _layout(layout: Layout | str) -> Layout:
    return layout if isinstance(layout, Layout) else Layout(layout)


def _on(array: xr.DataArray, backend: Backend | str | None, device: Any) -> tuple[xr.DataArray, Backend]:
    """The array on the backend that is asked for (None: its own), and that backend."""
    own = of(array.data)
    if backend is None and device is None:
        return array, own
    wanted = resolve(own.name if backend is None else backend, device)
    if wanted is own:
        return array, own
    return array.copy(data=duck(wanted.from_numpy(own.to_numpy(raw(array, own))), wanted)), wanted


def raw(array: Any, backend: Backend) -> Any:
    """The library's own array inside a DataArray, a Duck, or itself."""
    data = array.data if isinstance(array, xr.DataArray) else array
    return getattr(data, "array", data) if not backend.is_array(data) else data


def _mesh_of(array: xr.DataArray, layout: Layout, told: Mesh | None) -> tuple[list[str], Mesh]:
    """The dims of an array that are mesh axes and the mesh: as told, or what the layout names and what is called so.

    LayoutError where a dim has not its axis' degree.
    """
    free = [str(d) for d in array.dims if d not in layout.dims]
    if told is None:
        named = {name for dim in layout.tree for name in names(dim)}
        axes = [d for d in free if d in RESERVED or d in named]
        return axes, Mesh(**{axis: array.sizes[axis] for axis in axes})
    axes = [d for d in free if d in told.axes]
    wrong = [axis for axis in axes if array.sizes[axis] != told[axis]]
    if wrong:
        raise LayoutError(f"dim {wrong[0]} is {array.sizes[wrong[0]]} long, on {told} it has degree {told[wrong[0]]}")
    return axes, told


def _cut_of(array: xr.DataArray, layout: Layout, mesh: Mesh, shape: Sequence[int] | None) -> Cut:
    """The cut of the shards in an array. LayoutError if their widths are not the layout's."""
    missing = [d for d in layout.dims if d not in array.dims]
    if missing:
        raise LayoutError(f"{layout.text!r} has dims {layout.dims}, the array {array.dims}: no {missing[0]!r}")
    widest, layout = tuple(array.sizes[d] for d in layout.dims), _with_widths(array, layout)
    if shape is None:
        if any(mesh.leaves(axis) != (axis,) for axis in ("pp", "dp", "tp")):
            raise LayoutError(f"an axis of {mesh} is split: the shards do not tell the whole's shape; give it, shape=")
        shape = widest
        for axis in (a for a in mesh if a in array.dims):
            widths = [_widths(array, d, axis, n) for d, n in zip(layout.dims, shape, strict=True)]
            shape = whole_shape(layout, [tuple(w[k] for w in widths) for k in range(mesh[axis])], axis)
        layout = layout.replace(padded={})
    try:
        cut = layout.resolve(tuple(shape), mesh)
    except LayoutError as error:
        missing = [a for a in RESERVED if a not in array.dims and any(a in names(node) for node in layout.tree)]
        if not missing or any(mesh[a] > 1 for a in missing if a in mesh):
            raise
        raise LayoutError(
            f"{error}\n  the layout names {missing[0]}, the shards have dims {array.dims}: where {missing[0]} is split "
            f'into sub-axes say the mesh, on=Mesh({missing[0]}=…).split("{missing[0]}", …), and the shape of the whole'
        ) from None
    expected = held_shape(cut)[len(cut.axes) :]
    if widest != expected:
        raise LayoutError(
            f"shards of ({', '.join(layout.dims)}) {widest}, but {layout.text!r} on {mesh} cuts {tuple(shape)} into "
            f"{expected}: give the shape of the whole, or the widths of its shards in the layout"
        )
    return cut


def _with_widths(array: xr.DataArray, layout: Layout) -> Layout:
    """The layout with the widths that coordinates `<dim>_extent` say of dims that one axis cuts, `(tp out)`, where it
    has none of its own."""
    found: dict[str, tuple[int, ...]] = {}
    for dim, node in zip(layout.dims, layout.tree, strict=True):
        match node:
            case Product((Name(axis), Name(name))) if name not in (*dict(layout.sizes), *dict(layout.totals)):
                told = array.coords.get(f"{dim}_extent")
                if told is not None and told.dims == (axis,):
                    found[name] = tuple(int(n) for n in told.values)
    return layout.replace(sizes={**dict(layout.sizes), **found}) if found else layout


def _widths(array: xr.DataArray, dim: str, axis: str, size: int) -> list[int]:
    """Widths of a dim's shards along an axis: those of `<dim>_extent`, or all of one size."""
    told = array.coords.get(f"{dim}_extent")
    if told is not None and told.dims == (axis,):
        return [int(n) for n in told.values]
    return [size] * array.sizes[axis]


def _first_replicas(array: xr.DataArray, axes: Sequence[str], layout: Layout, mesh: Mesh) -> xr.DataArray:
    """The array without axes that hold replicas. Parts of a sum are of other axes than pp and dp: these have copies."""
    copied = {*mesh.leaves("pp"), *mesh.leaves("dp")}
    for axis in axes:
        first = array.isel({axis: 0}, drop=True)
        if (layout.replicas == "sum" and axis not in copied) or (layout.replicas == "mean" and array.sizes[axis] > 1):
            wide = array.astype("float32") if array.dtype.itemsize < 4 else array
            made = wide.sum(axis, skipna=False) if layout.replicas == "sum" else wide.mean(axis, skipna=False)
            array = made.astype(array.dtype)
            continue
        if layout.replicas in ("equal", "sum"):
            apart = [k for k in range(1, array.sizes[axis]) if not _same(first, array.isel({axis: k}, drop=True))]
            if apart:
                warnings.warn(
                    f"{array.name or 'replicas'}: {axis} {', '.join(map(str, apart))} differ from {axis} 0, whose copy "
                    f'is taken; a layout with replicas="mean" averages them, "first" takes the first in silence',
                    ReplicaWarning,
                    stacklevel=4,
                )
        array = first
    return array


def _compare_parts(array: xr.DataArray, cut: Cut, layout: Layout, others: Sequence[Any], place: Backend) -> None:
    """ReplicaWarning where copies inside of shards, the k of `((tp q) + k)`, should be equal and are not. LayoutError
    where they are to be averaged or summed."""
    if not cut.repeats or layout.replicas == "first":
        return
    if layout.replicas != "equal":
        raise LayoutError(
            f'{layout.text!r}: replicas="{layout.replicas}" is for tensors that ranks have copies of as a whole, and '
            'here they have copies of a part: say "equal" or "first", and merge the parts by themselves'
        )
    if not _same(array, _moved(array, cut, cut, layout, others, place, None).transpose(*array.dims)):
        warnings.warn(
            f"{array.name or 'replicas'}: parts that several coordinates of {', '.join(cut.axes)} hold are not the "
            'same on all, and the lowest one\'s are taken; a layout with replicas="first" takes them in silence',
            ReplicaWarning,
            stacklevel=4,
        )


def _same(a: xr.DataArray, b: xr.DataArray) -> bool:
    """Equal, NaN being equal to NaN."""
    x, y = a.data, b.data
    return bool(((x == y) | ((x != x) & (y != y))).all())


def _moved(
    array: xr.DataArray, source: Cut, target: Cut, layout: Layout, others: Sequence[Any], place: Backend, out: Any
) -> xr.DataArray:
    sizes = [array.sizes[d] for d in others]
    planned = moves(source.beneath(sizes), target.beneath(sizes))
    missing = [axis for axis in source.axes if axis not in array.dims]
    if missing:
        raise LayoutError(f"{layout.text!r} is cut over {missing[0]}, and the array has dims {array.dims}: no shards")
    held = raw(array.transpose(*source.axes, *others, *layout.dims), place)
    dims = (*target.axes, *others, *layout.dims)
    target_array = None
    if out is not None:
        if not place.is_array(raw(out, place)):
            raise LayoutError(f"out is an array of {place.name}, or a DataArray of one, not a {type(out).__name__}")
        if set(map(str, getattr(out, "dims", dims))) != set(map(str, dims)) or np.ndim(raw(out, place)) != len(dims):
            raise LayoutError(f"out has not the dims {dims}: give an array of {tuple(planned.shape)} in that order")
        given = (
            out
            if isinstance(out, xr.DataArray)
            else xr.DataArray(duck(raw(out, place), place), dims=_order(dims, others))
        )
        target_array = raw(given.transpose(*dims), place)
        if tuple(target_array.shape) != planned.shape or place.dtype_of(target_array) != place.dtype_of(held):
            raise LayoutError(
                f"out has shape {tuple(given.shape)}, dtype {place.dtype_of(target_array)}; expected "
                f"{tuple(planned.shape)} as {dims}, {place.dtype_of(held)}"
            )
    moved = xr.DataArray(duck(place.move(planned, [held], target_array), place), dims=dims).transpose(
        *_order(dims, others)
    )
    kept = {
        name: coord
        for name, coord in array.coords.items()
        if set(coord.dims) <= set(others) and not str(name).endswith("_extent") and name not in dims
    }
    index = {d: array.coords[d] for d in others if d in array.coords}
    widths = extents(target, layout)
    coords = {**kept, **index, **ranks({a: target.mesh[a] for a in target.axes}), **widths}
    result = moved.assign_coords(coords)
    result.name, result.attrs = array.name, dict(array.attrs)
    return result


def _order(dims: Sequence[Any], others: Sequence[Any]) -> list[Any]:
    """The dims with the others first, as views have them."""
    return [*others, *(d for d in dims if d not in others)]


def extents(cut: Cut, layout: Layout) -> dict[str, xr.Variable]:
    """Widths of a dim's shards where they differ, on the axes that cut it."""
    found = {}
    for name, dim in zip(layout.dims, cut.dims, strict=True):
        if len(set(dim.widths.values())) > 1:
            widths = [dim.widths[at] for at in sorted(dim.widths)]
            found[f"{name}_extent"] = plain(dim.axes, np.reshape(widths, [cut.mesh[a] for a in dim.axes]))
    return found


def _with_replicas(array: xr.DataArray, cut: Cut, layout: Layout) -> xr.DataArray:
    """The array with a dim before the tensor's own for each part of tp that it is replicated over, nothing copied. Of a
    sum each has an equal part; LayoutError for integers."""
    over = [axis for axis in cut.mesh.leaves("tp") if axis not in cut.axes]
    count = math.prod(cut.mesh[axis] for axis in over)
    if layout.replicas == "sum" and count > 1:
        if array.dtype.kind in "iub":
            raise LayoutError(f'{layout.text!r}: replicas="sum" of {array.dtype}: integers have no {count} equal parts')
        wide = array.astype("float32") if array.dtype.itemsize < 4 else array
        array = (wide / count).astype(array.dtype)
    for axis in over:
        array = array.expand_dims({axis: cut.mesh[axis]}, array.ndim - len(layout.dims))
        array = array.assign_coords(ranks({axis: cut.mesh[axis]}))
    return array


# ------------------------------------------------------------------------------------------------ on the array itself


@explained
@xr.register_dataarray_accessor("ckptlab")
class Accessor:
    """`.ckptlab` of every DataArray: the operations above, the layout being the array's own where none is given."""

    def __init__(self, array: xr.DataArray) -> None:
        self._array = array

    @property
    def layout(self) -> Layout:
        """The layout that a view noted in `attrs`: the notation, and what replicas are where they are to be averaged or
        summed; without widths, totals and padding.

        LayoutError where there is none, or where the array's dims are called otherwise.
        """
        text = self._array.attrs.get("layout")
        if text is None:
            raise LayoutError(f'{self._array.name or "the array"}: attrs tell no layout: give one, "(tp out) in"')
        found = Layout(text, replicas=self._array.attrs.get("replicas", "equal"))
        if not set(found.dims) <= set(self._array.dims):
            raise LayoutError(
                f"{self._array.name or 'the array'}: its layout {text!r} has dims {found.dims}, the array "
                f"{self._array.dims}: give a layout whose dims are the array's, Layout({text!r}, dims=…)"
            )
        return found

    def merge(self, layout: Layout | str | None = None, **options: Any) -> xr.DataArray:
        """The whole that these shards make: `ckptlab.merge`, with its options."""
        return merge(self._array, layout or self.layout, **options)

    def split(
        self, layout: Layout | str | Mesh | None = None, mesh: Mesh | None = None, **options: Any
    ) -> xr.DataArray:
        """The shards of this whole on a mesh: `ckptlab.split`, with its options; the mesh alone does where the array
        has a layout. MeshError where no mesh is given."""
        if isinstance(layout, Mesh) and mesh is None:
            layout, mesh = None, layout
        if mesh is None or isinstance(layout, Mesh):
            raise MeshError("split needs a mesh to split over: mesh=Mesh(tp=4)")
        return split(self._array, layout or self.layout, mesh, **options)

    def to(self, backend: Backend | str | None = None, device: Any = None) -> xr.DataArray:
        """The array on a backend and device: `ckptlab.to`."""
        return to(self._array, backend, device)
