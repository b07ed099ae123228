"""Arrays to try: one tensor in flat buffers, cut in any way; and what xarray can do with an array."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr
from hypothesis import strategies as st

from ckptlab.catalog import Catalog, Extents, FlatGroup, ParameterGroup, Tensor, Training, placements_of
from ckptlab.layout import Cut, Layout
from ckptlab.mesh import Mesh
from ckptlab.plan import FlatBuffer, Holder
from ckptlab.stored import Stored

SHAPE = (24, 6)


@st.composite
def layouts(draw: st.DrawFn, tp: int) -> Layout:
    """A layout of a (24, 6) tensor over tp."""
    kind = draw(st.sampled_from(["column", "row", "whole", "fused", "parts", "partly", "cyclic", "uneven"]))
    if kind == "row" and 6 % tp == 0:
        return Layout("out (tp in)")
    if kind == "fused" and 8 % tp == 0:
        return Layout("(3 tp out) in")
    if kind == "parts" and tp in (1, 2, 4):
        return Layout("((tp q) + (tp k)) in", totals={"q": 16, "k": 8})
    if kind == "partly" and 12 % tp == 0:
        return Layout("((tp q) + k) in", totals={"k": 12})
    if kind == "cyclic" and 24 % tp == 0:
        return Layout("(out tp) in")
    if kind == "uneven":
        cuts = sorted(draw(st.lists(st.integers(0, 24), min_size=tp - 1, max_size=tp - 1)))
        widths = tuple(b - a for a, b in zip([0, *cuts], [*cuts, 24], strict=True))
        return Layout("(tp out) in", sizes={"out": widths})
    if kind == "column" and 24 % tp == 0:
        return Layout("(tp out) in")
    return Layout("out in")


@st.composite
def cut(draw: st.DrawFn) -> Cut:
    tp = draw(st.sampled_from([1, 2, 3, 4]))
    padded = {0: 24 + draw(st.sampled_from([0, 12]))} if draw(st.booleans()) else {}
    layout = draw(layouts(tp))
    if layout.text in ("(tp out) in", "out in") and not layout.sizes:
        layout = layout.replace(padded=padded)
    return layout.resolve(SHAPE, Mesh(tp=tp, dp=draw(st.sampled_from([1, 2, 3, 5]))))


def store(folder: Path, cut: Cut, whole: np.ndarray, zero3: bool, before: int) -> Catalog:
    """A catalog of one tensor "w", cut as said, in flat buffers of which `before` elements are another tensor's."""
    mesh = cut.mesh
    flats, partitions = {}, {}
    for tp in range(mesh.tp):
        shard = cut.take(whole, cut.coordinate({"tp": tp}))
        names, counts = ("other", "w"), (before, shard.size)
        flat = (FlatBuffer.per_tensor if zero3 else FlatBuffer.contiguous)(names, counts, mesh.dp)
        row = []
        for d in range(mesh.dp):
            buffer = np.full(flat.size(d), 7).astype(whole.dtype)
            for index, start, at, count in flat.within(d):
                if index == 1:
                    buffer[at : at + count] = shard.reshape(-1)[start : start + count]
            file = folder / f"{tp}_{d}.bin"
            file.write_bytes(b"head" + buffer.tobytes())
            row.append(Stored(str(file), 4, whole.dtype, buffer.shape, (1,)))
        holder = Holder(pp=0, tp=tp)
        flats[holder], partitions[holder] = flat, tuple(row)
    states = {"master": whole.dtype}
    tensor = Tensor("w", cut.logical, Layout("out in"), cut, "parameter", states, 0)
    group = FlatGroup(Holder(pp=0), 0, flats, states)
    extents = Extents(partitions={(group.key, "master"): partitions})
    tensors, training = {"w": tensor}, Training(mesh, groups=(ParameterGroup({}, ("w",)),))
    return Catalog("", "test", mesh, tensors, placements_of(tensors, [group], {}), extents, (group,), training)


EXPERTS = Mesh(dp=4, tp=2).split("dp", edp=2, ep=2)
MIXTURE: dict[str, tuple[str, tuple[int, ...], Holder]] = {
    "gate": ("(tp out) in", (8, 3), Holder(pp=0)),  # every dp rank has a part of it
    "expert.1": ("out (tp in)", (5, 6), Holder(pp=0, ep=1)),  # those of ep rank 1 do
    "experts": ("(ep expert) out in", (4, 3, 5), Holder(pp=0)),
}


def mixture(
    folder: Path, mesh: Mesh = EXPERTS, *, zero_stage: int = 1, apart: float = 0
) -> tuple[Catalog, dict[str, np.ndarray]]:
    """A catalog of the tensors of MIXTURE, each in flat buffers of its own, and the wholes. tp ranks' copies of what
    is replicated are `apart` from each other."""
    states = {"fp32": np.dtype(np.float32)}
    wholes, tensors, groups, partitions = {}, {}, [], {}
    for i, (name, (text, shape, at)) in enumerate(MIXTURE.items()):
        layout = Layout(text)
        cut = layout.resolve(shape, mesh)
        whole = wholes[name] = 1000 * (i + 1) + np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
        tensors[name] = Tensor(name, shape, layout, cut, "parameter", states, i)
        group = FlatGroup.laid_out(at, i, [name], tensors, mesh, zero_stage)
        groups.append(group)
        rows = {}
        for holder, flat in group.flats.items():
            shard = cut.take(whole, cut.coordinate(holder)).reshape(-1)
            shard = shard if "tp" in cut.axes else shard + apart * holder["tp"]
            for d in range(flat.dp):
                buffer = np.zeros(flat.size(d), np.float32)
                for _, start, place, count in flat.within(d).tolist():
                    buffer[place : place + count] = shard[start : start + count]
                file = folder / f"{name} {holder} {d}.bin"
                file.write_bytes(buffer.tobytes())
                rows.setdefault(holder, []).append(Stored(str(file), 0, buffer.dtype, buffer.shape, (1,)))
        partitions[group.key, "fp32"] = {holder: tuple(row) for holder, row in rows.items()}
    training = Training(mesh, groups=tuple(ParameterGroup({}, (name,)) for name in MIXTURE))
    lies = placements_of(tensors, groups, {})
    extents = Extents(partitions=partitions)
    return Catalog("", "test", mesh, tensors, lies, extents, tuple(groups), training), wholes


_REDUCTIONS = ["sum", "mean", "std", "var", "min", "max", "median", "prod", "cumsum", "count"]
OPERATIONS: dict[str, Callable[[xr.DataArray], xr.DataArray]] = {
    **{f"{r} of all": lambda a, r=r: getattr(a, r)() for r in _REDUCTIONS},
    **{f"{r} of a dim": lambda a, r=r: getattr(a, r)("out") for r in _REDUCTIONS},
    **{f"{r} with NaN": lambda a, r=r: getattr(a, r)("in", skipna=False) for r in _REDUCTIONS[:-1]},
    "argmax": lambda a: a.argmax("in"),
    "quantile": lambda a: a.quantile([0.1, 0.5], "in"),
    "isnull": lambda a: a.isnull(),
    "where": lambda a: a.where(a > 1),
    "fillna": lambda a: a.fillna(7),
    "groupby": lambda a: a.groupby("pp").mean(),
    "weighted": lambda a: a.weighted(xr.DataArray([1.0, 2, 3], dims="layer")).mean("layer"),
    "coarsen": lambda a: a.coarsen(out=4).mean(),
    "rolling": lambda a: a.rolling(out=3).mean(),
    "transpose": lambda a: a.transpose("in", "layer", "out"),
    "stack": lambda a: a.stack(place=("out", "in")).unstack("place"),
    "concat": lambda a: xr.concat([a, a], "layer"),
    "reindex": lambda a: a.reindex(layer=[1, 5]),
    "shift": lambda a: a.shift(out=1),
    "arithmetic": lambda a: (a * 2 - a.mean()) / 3 + abs(a) ** 2,
    "einsum": lambda a: xr.dot(a.fillna(0), a.fillna(0), dim="in"),
}
