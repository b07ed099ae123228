"""The laws of a strategy: whatever rank asks, every tensor has one layout, and that layout is a good one."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.arguments import explained
from ckptlab.arrays.operations import merge, split
from ckptlab.errors import LayoutError
from ckptlab.layout import Cut, Layout, whole_shape
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import Strategy, resolve
from ckptlab.testing.suite import hold

MESHES = (Mesh(), Mesh(tp=2), Mesh(tp=4), Mesh(tp=2, dp=2))


@explained
def check_strategy(
    strategy: Strategy | Mapping[str, str | Layout] | str,
    shapes: Mapping[str, Sequence[int]],
    meshes: Sequence[Mesh] = MESHES,
) -> tuple[str, ...]:
    """Hold a strategy to the laws, on tensors of these names and (whole, small) shapes, on these meshes.

    strategy: what `ckptlab.open` takes. Every tensor must have a layout, and fit at least one of the meshes; where one
    does not fit, a LayoutError says so. Returns the names of the laws; LawError if one is broken.
    """
    given = resolve(strategy)
    if given is None:
        raise LayoutError("no strategy is given: expected a name, a mapping of patterns, or an object with layout()")
    case = _Case(given, {name: tuple(shape) for name, shape in shapes.items()}, tuple(meshes))
    laws = {
        "every name gets a layout of as many dims": case.layouts_given,
        "every tensor fits one of the meshes": case.fits,
        "the laws of a layout hold": case.laws_hold,
        "split and merge undo each other, and copies are equal": case.arrays_agree,
        "what a mesh's shards are given is the same cut": case.shards_agree,
        "it is a value: pickled, it says the same": case.is_a_value,
    }
    return hold(f"strategy {getattr(given, 'name', type(given).__name__)}", laws)


@dataclass(frozen=True)
class _Case:
    strategy: Strategy
    shapes: Mapping[str, tuple[int, ...]]
    meshes: tuple[Mesh, ...]

    def layout(self, name: str) -> Any:
        """The layout of a tensor that one rank has whole."""
        return self.strategy.layout(name, [self.shapes[name]])

    def cuts(self) -> Iterator[tuple[str, Layout, Mesh, Cut]]:
        """Every tensor on every mesh that it fits."""
        for name, shape in self.shapes.items():
            layout = self.layout(name)
            for mesh in self.meshes if isinstance(layout, Layout) else ():
                try:
                    yield name, layout, mesh, layout.resolve(shape, mesh)
                except LayoutError:
                    continue

    def layouts_given(self) -> Iterator[str]:
        for name, shape in self.shapes.items():
            layout = self.layout(name)
            if not isinstance(layout, Layout):
                yield f"{name} {shape}: expected a Layout, found {layout!r}"
            elif len(layout.dims) != len(shape):
                yield f"{name} {shape}: {layout!r} has {len(layout.dims)} dims"

    def fits(self) -> Iterator[str]:
        fitting = {name for name, *_ in self.cuts()}
        yield from (f"{name} {shape} fits none of them" for name, shape in self.shapes.items() if name not in fitting)

    def laws_hold(self) -> Iterator[str]:
        for name, layout, mesh, cut in self.cuts():
            if cut.logical != self.shapes[name]:
                yield f"{name} on {mesh!r}: {layout!r} makes {cut.logical} of {self.shapes[name]}"
            elif not (found := layout.check(self.shapes[name], mesh)):
                yield f"{name} on {mesh!r}: {layout!r}: {found}"

    def arrays_agree(self) -> Iterator[str]:
        for name, layout, mesh, cut in self.cuts():
            shape = self.shapes[name]
            whole = xr.DataArray(np.arange(float(np.prod(shape))).reshape(shape), dims=layout.dims)  # with equal parts
            shards = split(whole, layout, mesh)
            if not merge(shards, layout, shape=shape, on=mesh).equals(whole):
                yield f"{name} on {mesh!r}: {layout!r}"
            others = [axis for axis in shards.dims if axis in mesh and axis not in cut.axes]
            if others and not (shards == shards.isel(dict.fromkeys(others, 0))).all():
                yield f"{name} on {mesh!r}: copies over {', '.join(map(str, others))} differ"

    def shards_agree(self) -> Iterator[str]:
        """Asked with the shards of a tp group, as one opens what was saved, it describes the same whole and cut."""
        for name, layout, mesh, cut in self.cuts():
            if set(cut.axes) - {"tp"} or layout.padded:
                continue  # shards alone do not tell
            shards = [cut.shard_shape(cut.coordinate({"tp": tp})) for tp in range(mesh.tp)]
            again = self.strategy.layout(name, shards)
            if again is None:
                yield f"{name}: no layout for shards {shards}, but one for the whole"
                continue
            found = whole_shape(again, shards)
            if found != self.shapes[name]:
                yield f"{name} on {mesh!r}: from shards {shards} {again!r} makes {found}, not {self.shapes[name]}"
            elif again.resolve(found, mesh) != cut:
                yield f"{name} on {mesh!r}: {again!r} from shards, {layout!r} from the whole: other cuts"

    def is_a_value(self) -> Iterator[str]:
        again = pickle.loads(pickle.dumps(self.strategy))
        for name, shape in self.shapes.items():
            if again.layout(name, [shape]) != self.layout(name):
                yield f"{name}: another layout after pickling"
