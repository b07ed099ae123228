"""What ckptlab's own writer says in `.metadata` beside what torch has words for: mesh, layouts, stages, kinds.

torch keeps the attribute and never looks at it. Whoever opens the folder here needs no strategy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptlab.catalog import DTYPES, Catalog
from ckptlab.errors import CheckpointError, CkptlabError
from ckptlab.formats.dcp.assemble import Found
from ckptlab.formats.dcp.metadata import MOST_RANKS
from ckptlab.layout import Layout
from ckptlab.mesh import Mesh

KINDS = ("parameter", "frozen", "buffer")


def put(found: Found, told: Mapping[str, Any], path: str) -> None:
    """Put what the labels of a folder tell into what was found there. CheckpointError where they are no labels."""
    try:
        mesh = Mesh(**told["mesh"])
        if mesh.size > MOST_RANKS or not all(axis.isidentifier() for axis in mesh.axes):
            raise ValueError(f"a mesh of {mesh.size} ranks: {mesh}")
        layouts = {name: _layout(fields) for name, fields in told["layouts"].items() if name in found.weights}
        stages = {name: stage for name, stage in told["stages"].items() if 0 <= stage < mesh.pp}
        shapes = {name: _inside(shape, found, name) for name, shape in told["shapes"].items() if name in found.weights}
        kinds = {name: kind for name, kind in told["kinds"].items() if kind in KINDS}
        untold = frozenset(name for name in told["untold"] if type(name) is str)
        run = told["run"]
        step, heads, kv_heads = (_natural(run[key]) for key in ("step", "heads", "kv_heads"))
    except (CkptlabError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{path}: the labels in it are not what ckptlab writes ({type(error).__name__}: {error}): damaged or "
            "forged; copy it again"
        ) from None
    found.mesh, found.layouts, found.stages, found.kinds = mesh, layouts, stages, kinds
    found.shapes, found.untold = shapes, untold
    found.dtype = run["dtype"] if run["dtype"] in (*DTYPES, None) else None
    found.step = found.step if step is None else step
    found.heads, found.kv_heads = heads, kv_heads


def _layout(fields: Mapping[str, Any]) -> Layout:
    return Layout(fields["layout"], dims=fields["dims"], sizes=fields["sizes"], totals=fields.get("totals", {}))


def _inside(shape: Sequence[int], found: Found, name: str) -> tuple[int, ...]:
    """The shape of a tensor that lies in the files with padding behind."""
    stored = found.weights[name].shape
    if len(shape) != len(stored) or any(not 0 <= _natural(n) <= size for n, size in zip(shape, stored, strict=True)):
        raise ValueError(f"{name} of shape {shape} in {stored}")
    return tuple(shape)


def _natural(value: Any) -> Any:
    if value is not None and (type(value) is not int or value < 0):
        raise ValueError(f"{value!r}, expected a number")
    return value


def of(target: Catalog, names: Mapping[str, str]) -> dict[str, Any]:
    """The labels of a target. names: what its tensors are called in the folder."""
    tensors, run = {names[name]: tensor for name, tensor in target.tensors.items()}, target.training
    return {
        "mesh": target.mesh.degrees,
        "layouts": {name: _fields(t.layout) for name, t in tensors.items()},
        "untold": [name for name, t in tensors.items() if not t.layout_known],
        "stages": {name: t.stages[0] for name, t in tensors.items() if t.stages[0]},
        "kinds": {name: t.kind for name, t in tensors.items() if t.kind != "parameter"},
        "shapes": {name: list(t.shape) for name, t in tensors.items() if t.cut.shape != t.shape},
        "run": {"step": run.step, "dtype": run.dtype, "heads": run.heads, "kv_heads": run.kv_heads},
    }


def _fields(layout: Layout) -> dict[str, Any]:
    sizes = {name: list(n) if isinstance(n, tuple) else n for name, n in layout.sizes}
    return {"layout": layout.text, "dims": list(layout.dims), "sizes": sizes, "totals": dict(layout.totals)}
