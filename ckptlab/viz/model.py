"""The model over pp stages: which layers each has, and the tensors that several share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ckptlab.catalog import Catalog, Tensor
from ckptlab.draw import Box, Drawing, pipeline
from ckptlab.draw.blocks import blocks, span, told
from ckptlab.draw.words import number_of

if TYPE_CHECKING:
    from ckptlab.checkpoint import Checkpoint, Reshape

COLUMNS = 8  # stages that are drawn one by one
BOXES = 12  # boxes of a stage that are drawn


def stages(model: Catalog | Checkpoint | Reshape) -> Drawing:
    """The layers of each pp stage, in order; like layers next to one another as one; of a reshape, the target's.

    Tensors that live on several stages have a dashed box in each, joined by a line. The bar in a box is proportional to
    its elements. Cells: class `layer` (`tied`), data-pp, data-tensors, data-elements, data-tensor (the first's name).
    """
    catalog = catalog_of(model)
    columns = []
    folds = blocks(catalog.mesh.pp, COLUMNS)
    for block in folds:
        mine = [t for t in catalog.tensors.values() if t.stages[0] in block]
        # copies come last: a head that is tied to the embedding stands behind the layers
        mine += [t for t in catalog.tensors.values() if t.stages[0] not in block and set(block) & set(t.stages)]
        boxes = _few(list(_boxes(mine, told(block))), told(block))
        columns.append((f"pp {span(block)}" if catalog.mesh.pp > 1 else "one stage", boxes))
    notes = [f"{catalog.mesh.pp} stages in {len(folds)} columns"] if len(folds) < catalog.mesh.pp else []
    if any(len(t.stages) > 1 for t in catalog.tensors.values()):
        notes.append("dashed and joined: one tensor, of which each of these stages holds a copy")
    title = f"{number_of(len(catalog.tensors), 'tensor')} over {number_of(catalog.mesh.pp, 'pp stage')}"
    return pipeline(columns, title=title, notes=notes)


def _few(boxes: list[Box], pp: str) -> list[Box]:
    """At most BOXES: of the untied the last ones together."""
    tied = [box for box in boxes if box.link]
    plain = [box for box in boxes if not box.link]
    keep = max(BOXES - len(tied), 2)
    if len(plain) <= keep:
        return boxes
    left = plain[keep - 1 :]
    count = sum(int(str(box.data["tensors"])) for box in left)
    elements = sum(box.size for box in left)
    data = {"pp": pp, "tensors": count, "elements": elements}
    rest = Box(f"… {len(left):,} more", elements, f"{number_of(count, 'tensor')}, drawn together", "", data)
    return [*(box for box in boxes if box.link or box in plain[: keep - 1]), rest]


def catalog_of(model: Catalog | Checkpoint | Reshape) -> Catalog:
    """The catalog of what is drawn: a checkpoint's, of a reshape the target's."""
    if isinstance(model, Catalog):
        return model
    return model.target if hasattr(model, "target") else model.catalog


def _boxes(tensors: Sequence[Tensor], pp: str) -> Iterator[Box]:
    """A box for each run of layers that are alike, for each tensor without a layer's number, for each tied tensor."""
    layers: dict[tuple[str, int | None, bool], list[Tensor]] = {}
    for tensor in tensors:
        prefix, number, _ = _split(tensor.name)
        tied = len(tensor.stages) > 1
        layers.setdefault((tensor.name if tied else prefix, None if tied else number, tied), []).append(tensor)
    run: list[tuple[tuple[str, int | None, bool], list[Tensor]]] = []
    for key, members in layers.items():
        if run and not _alike(run[-1], (key, members)):
            yield _box(run, pp)
            run = []
        run.append((key, members))
    if run:
        yield _box(run, pp)


_Layer = tuple[tuple[str, int | None, bool], list[Tensor]]


def _alike(a: _Layer, b: _Layer) -> bool:
    (prefix_a, number_a, _), (prefix_b, number_b, _) = a[0], b[0]
    if number_a is None or number_b is None or prefix_a != prefix_b:
        return False
    return [(_split(t.name)[2], t.shape) for t in a[1]] == [(_split(t.name)[2], t.shape) for t in b[1]]


def _split(name: str) -> tuple[str, int | None, str]:
    """(before, number, after) the first number in a name; without one, what is before the last dot."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isdecimal()), None)
    if place is None or place == len(parts) - 1:
        return ".".join(parts[:-1]) or name, None, parts[-1]
    return ".".join(parts[:place]), int(parts[place]), ".".join(parts[place + 1 :])


def _box(run: Sequence[_Layer], pp: str) -> Box:
    tensors = [t for _, members in run for t in members]
    (prefix, number, tied), _ = run[0]
    label = prefix
    if number is not None:
        numbers = [key[1] for key, _ in run if key[1] is not None]
        word = f"{prefix} " if prefix else "layer " if len(run) == 1 else "layers "
        label = f"{word}{number}" if len(run) == 1 else f"{word}{numbers[0]}–{numbers[-1]}"
    detail = number_of(len(run[0][1]), "tensor") + (f" each, {len(run)} layers alike" if len(run) > 1 else "")
    if tied:
        detail = f"tied: pp {', '.join(map(str, tensors[0].stages))}"
    elements = sum(t.numel for t in tensors)
    data = {"pp": pp, "tensor": tensors[0].name, "tensors": len(tensors), "elements": elements}
    return Box(label, elements, detail, tensors[0].name if tied else "", data)
