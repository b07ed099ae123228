"""Grids of chunks, by tensor and state → `Catalog`: the same for whatever wrote them."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from ckptlab.catalog import (
    DTYPES,
    MASTER,
    PARAM,
    Catalog,
    Extents,
    Fragment,
    ParameterGroup,
    Tensor,
    Training,
)
from ckptlab.errors import CheckpointError, LayoutError
from ckptlab.formats.dcp.axes import (
    Axes,
    Laid,
    degrees_of,
    lay,
    lay_alone,
    lay_as,
    neutral_axes,
)
from ckptlab.formats.dcp.boxes import Grid
from ckptlab.formats.dcp.said import Said
from ckptlab.layout import Layout
from ckptlab.layout.notation import names
from ckptlab.mesh import Mesh
from ckptlab.plan import Holder, Placement
from ckptlab.sharding.strategies import Strategy

MOST_STEPS = 1 << 53  # which a float64 can count
MASTERS = ("master_param", "fp32_param", "main_param", "master", "master_weight", "master_weights", "fp32_master")
"""What optimizers that keep a weight of their own call it."""


@dataclass
class Found:
    """What a reader found. `weights`: name → grid. `states`: name → state → grid, of the weight's shape or not.

    `axes`: the mesh axes that may cut tensors, where that is known (then `mesh` is the run's); `parts`: in how many
    equal parts a dim may be cut first. `stages`: the pp stage of a tensor. `layouts`: how tensors are said to be cut by
    the files themselves. `kinds`: what tensors are, where that is said. `aliases`: further names of a weight. `shapes`:
    those of tensors that are padded in the files. `untold`: of which nobody knows how tensor parallelism cuts them.
    """

    path: str
    weights: dict[str, Grid] = field(default_factory=dict)
    states: dict[str, dict[str, Grid]] = field(default_factory=dict)
    groups: tuple[ParameterGroup, ...] = ()
    client: Mapping[str, Any] = field(default_factory=dict)
    mesh: Mesh | None = None
    axes: Axes | None = None
    parts: tuple[int, ...] = (1,)
    stages: Mapping[str, int] = field(default_factory=dict)
    layouts: Mapping[str, Layout] = field(default_factory=dict)
    kinds: Mapping[str, str] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    untold: frozenset[str] = frozenset()
    dtype: str | None = None
    step: int | None = None
    files: tuple[str, ...] = ()
    private: Any = None
    heads: int | None = None
    kv_heads: int | None = None
    optimizer: bool = False


def step_of(groups: Sequence[ParameterGroup]) -> int | None:
    """How many steps an optimizer took, by its counters."""
    steps = (group.scalars.get("step") for group in groups)
    counted = [step for step in steps if isinstance(step, int | float) and 0 <= step < MOST_STEPS]
    return int(max(counted)) if counted else None


class Held(Mapping[Holder, tuple[Fragment, ...]]):
    """Where the shards of one state lie, looked up when one is asked for. Iterates over one holder of each shard:
    chunks that several ranks held were stored once."""

    def __init__(self, grid: Grid, placement: Placement) -> None:
        self.grid, self.placement = grid, placement

    def __getitem__(self, holder: Holder) -> tuple[Fragment, ...]:
        cut = self.placement.cut
        try:
            rows = cut.rows(cut.coordinate(holder))
        except LayoutError:
            raise KeyError(holder) from None
        return self.grid.fragments([[(start, n) for start, _, n, _, _ in dim.tolist()] for dim in rows])

    def __iter__(self) -> Iterator[Holder]:
        seen = set()
        for holder in self.placement.holders:
            if (at := self.placement.coordinate(holder)) not in seen:
                seen.add(at)
                yield holder

    def __len__(self) -> int:
        return sum(1 for _ in self)


def assemble(found: Found, said: Said, strategy: Strategy | None, mesh: Mesh | None) -> Catalog:
    """The catalog of what was found.

    The weight is the state `param` where the optimizer keeps another (a master), where it is of 16 bits, and where the
    optimizer does not step it (frozen tensors and buffers); else what the optimizer steps is the weight itself, and it
    is the master: float32 weights, also where no optimizer was stored.
    """
    fused, parts = _fused(found)
    states = _states(found, parts)
    grids = {name: next(iter(by_state.values())) for name, by_state in states.items()}
    given = mesh
    layouts = _layouts(grids, strategy) or (dict(found.layouts) if given in (None, found.mesh) else {})
    mesh, axes, neutral = _mesh(found, grids, layouts, strategy, given)
    tensors: dict[str, Tensor] = {}
    placements: dict[tuple[str, str], tuple[Placement, ...]] = {}
    pieces: dict[tuple[str, str], Held] = {}
    group_of = {name: i for i, group in enumerate(found.groups) for name in group.tensors}
    for name, by_state in states.items():
        stage = found.stages.get(name, 0)
        laid = {
            state: _laid(found, name, grid, mesh, axes, layouts.get(name), strategy) for state, grid in by_state.items()
        }
        for state, (one, _) in laid.items():
            placement = Placement(one.cut, (stage if one.cut.mesh == mesh and stage < mesh.pp else 0,))
            placements[name, state] = (placement,)
            pieces[name, state] = Held(by_state[state], placement)
        first, known = next(iter(laid.values()))[0], all(known for _, known in laid.values())
        tensors[name] = Tensor(
            name,
            first.cut.logical,
            first.layout.replace(stages=(stage,)) if mesh.pp > 1 else first.layout,
            first.cut,
            found.kinds.get(name) or _kind(name, found, grids[name].dtype, group_of, parts),
            {state: grid.dtype for state, grid in by_state.items()},
            None if name in fused else group_of.get(name),
            (stage if stage < mesh.pp else 0,),
            tuple(found.aliases.get(name, ())),
            known and first.cut.mesh == mesh and not (neutral and first.cut.axes) and name not in found.untold,
        )
    if given is not None:
        _refuse(found.path, given, grids, tensors)
    _say_axes(found.path, [t for t in tensors.values() if t.name not in found.untold], neutral, axes, said)
    return Catalog(
        found.path,
        "dcp",
        mesh,
        tensors,
        placements,
        Extents(pieces),
        (),
        Training(
            mesh=None if neutral else mesh,
            step=found.step,
            dtype=found.dtype or _dtype(states),
            groups=found.groups,
            heads=found.heads,
            kv_heads=found.kv_heads,
            layouts_told=bool(found.layouts) and strategy is None,
        ),
        found.client,
        found.private,
        tuple(said.faults.findings),
        found.files,
    )


def _laid(
    found: Found, name: str, grid: Grid, mesh: Mesh, axes: Axes, layout: Layout | None, strategy: Strategy | None
) -> tuple[Laid, bool]:
    """How a grid lies on the mesh, by its layout or by the axes that may cut it, and whether it does: else on axes of
    its own."""
    try:
        laid = lay_as(grid, mesh, layout, f"{found.path}: {name}") if layout else lay(grid, mesh, axes, found.parts)
    except LayoutError as error:
        raise (CheckpointError(str(error)) if strategy is None else error) from None
    return (laid or lay_alone(grid)).within(found.shapes.get(name, grid.shape)), laid is not None


def _states(found: Found, parts: Collection[str]) -> dict[str, dict[str, Grid]]:
    """Name → state → grid, `master` first and `param` last; a state of another shape is a tensor of its
    own. parts: see `_fused`."""
    states: dict[str, dict[str, Grid]] = {}
    odd: dict[str, Grid] = {}
    trained = {name for group in found.groups for name in group.tensors}
    other = _of_other_shapes(found)
    for name in dict.fromkeys([*found.weights, *found.states]):
        weight, its = found.weights.get(name), dict(found.states.get(name, {}))
        shape = weight.shape if weight is not None else next(iter(its.values())).shape
        apart = {state for state, grid in its.items() if grid.shape != shape or state in other}
        odd |= {f"{name}.{state}": its[state] for state in its if state in apart}
        its = {state: grid for state, grid in its.items() if state not in apart}
        master = next((state for state in its if state in MASTERS), None)
        made: dict[str, Grid] = {} if master is None else {MASTER: its.pop(master)}
        stepped = bool(its) or not found.optimizer or name in trained or name in parts
        if weight is not None and not made and weight.dtype == np.float32 and stepped:
            made[MASTER] = weight
            weight = None
        made |= its
        if weight is not None:
            made[PARAM] = weight
        states[name] = made
    for name, grid in odd.items():
        states.setdefault(name, {PARAM: grid})
    return states


def _of_other_shapes(found: Found) -> set[str]:
    """States that most tensors have in another shape than their own, as Adafactor's rows and columns: that of a tensor
    which is one row itself is one of them."""
    alike: dict[str, int] = {}
    for name, its in found.states.items():
        for state, grid in its.items() if name in found.weights else ():
            alike[state] = alike.get(state, 0) + (1 if grid.shape == found.weights[name].shape else -1)
    return {state for state, count in alike.items() if count < 0}


def _fused(found: Found) -> tuple[set[str], set[str]]:
    """(names of which the optimizer has states and the model parts, those parts): the moments of
    `….qkv_linear.wqkv.weight`, and the weights `….qkv_linear.wq.weight`, `….wk.weight`, `….wv.weight` of as many
    elements."""
    parts: dict[tuple[str, str], list[str]] = {}
    for name in found.weights:
        if name not in found.states:
            parts.setdefault(_module(name), []).append(name)
    wholes, held = set(), set()
    for name, its in found.states.items():
        own = parts.get(_module(name), []) if name not in found.weights else []
        count = sum(math.prod(found.weights[part].shape) for part in own)
        if count and count == math.prod(next(iter(its.values())).shape):
            wholes.add(name)
            held |= set(own)
    return wholes, held


def _module(name: str) -> tuple[str, str]:
    """The module above the one that has a tensor, and what that calls it: ("….qkv_linear", "weight")."""
    above, _, own = name.rpartition(".")
    return above.rpartition(".")[0], own


def _kind(name: str, found: Found, dtype: np.dtype, group_of: Mapping[str, int], parts: Collection[str]) -> str:
    if dtype.kind in "iub":
        return "buffer"
    stepped = name in found.states or name in group_of or name in parts
    return "parameter" if stepped or not found.optimizer else "frozen"


def _layouts(grids: Mapping[str, Grid], strategy: Strategy | None) -> dict[str, Layout]:
    if strategy is None:
        return {}
    found = {name: strategy.layout(name, _shards(grid)) for name, grid in grids.items()}
    # one that cuts nothing names no axes; the chunks of a whole tensor may be parts of it (gate and up projection)
    said = {name: layout for name, layout in found.items() if layout is not None}
    return {name: a for name, a in said.items() if {n for node in a.tree for n in names(node)} - set(a.names)}


def _shards(grid: Grid) -> list[tuple[int, ...]]:
    """The shapes of a tensor's chunks."""
    lengths = [[length for _, length in grid.spans(d)] for d in range(len(grid.shape))]
    return [tuple(lengths[d][k] for d, k in enumerate(cell)) for cell in np.ndindex(*grid.counts)]


def _mesh(
    found: Found,
    grids: Mapping[str, Grid],
    layouts: Mapping[str, Layout],
    strategy: Strategy | None,
    given: Mesh | None,
) -> tuple[Mesh, Axes, bool]:
    """(mesh, axes that may cut tensors, whether these are neutral)."""
    known = given or found.mesh
    if known is None and layouts and strategy is not None:
        try:
            known = Mesh(**degrees_of(layouts, grids))
        except LayoutError as error:
            raise LayoutError(f"{found.path}: {error}") from None
    if known is not None:
        if given is None and found.axes is not None:
            return known, found.axes, False
        stages = known.leaves("pp")
        return known, tuple((axis, n) for axis, n in known.degrees.items() if n > 1 and axis not in stages), False
    axes = neutral_axes(grids.values())
    return Mesh(**dict(axes)), axes, True


def _refuse(path: str, mesh: Mesh, grids: Mapping[str, Grid], tensors: Mapping[str, Tensor]) -> None:
    """LayoutError where no tensor at all is cut as a mesh would cut it."""
    cut = [name for name, grid in grids.items() if max(grid.counts, default=1) > 1]
    if cut and not any(tensors[name].cut.mesh == mesh for name in cut):
        counts = " × ".join(map(str, grids[cut[0]].counts))
        raise LayoutError(f"{path}: on {mesh} no tensor is cut as its chunks are: {cut[0]} lies in {counts} of them")


def _dtype(states: Mapping[str, Mapping[str, Grid]]) -> str | None:
    """What the model computes in: the dtype of most of its floating-point weights."""
    found: dict[str, int] = {}
    for by_state in states.values():
        grid = by_state.get(PARAM) or by_state.get(MASTER)
        name = next((n for n, d in DTYPES.items() if grid is not None and d == grid.dtype), None)
        if name is not None and grid is not None:
            found[name] = found.get(name, 0) + int(np.prod(grid.shape, dtype=np.int64))
    return max(found, key=lambda name: found[name]) if found else None


def _say_axes(path: str, tensors: Sequence[Tensor], neutral: bool, axes: Axes, said: Said) -> None:
    unnamed = [t.name for t in tensors if not t.layout_known]
    if not unnamed:
        return
    which = ", ".join(f"{name} ({n})" for name, n in axes) if neutral else "of its own"
    said.remark(
        "dcp-axes",
        f"{path}: {len(unnamed)} tensors are cut ({unnamed[0]}, …); the files do not say over which mesh axes: they "
        f"are called {which}. Name them by the run's mesh, ckptlab.open(path, mesh=Mesh(dp=2, tp=2)), or with layouts, "
        'strategy={".*wq.*": "(tp dp out) in"}',
    )


Lazy = Callable[[], Any]


class Client(Mapping[str, Any]):
    """What the program put in, nested as it was, read when it is asked for."""

    def __init__(self, entries: Mapping[tuple[str | int, ...], Lazy]) -> None:
        self._roots: dict[str, dict[tuple[str | int, ...], Lazy]] = {}
        for path, read in entries.items():
            self._roots.setdefault(str(path[0]), {})[path[1:]] = read
        self._known: dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._known:
            self._known[key] = _nested(self._roots[key])
        return self._known[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._roots)

    def __len__(self) -> int:
        return len(self._roots)


def kept(value: Any) -> Lazy:
    """A value that was read already."""
    return partial(_same, value)


def _same(value: Any) -> Any:
    return value


def _nested(entries: Mapping[tuple[str | int, ...], Lazy]) -> Any:
    if () in entries:
        return entries[()]()
    below: dict[str | int, dict[tuple[str | int, ...], Lazy]] = {}
    for path, read in entries.items():
        below.setdefault(path[0], {})[path[1:]] = read
    return {key: _nested(inner) for key, inner in below.items()}
