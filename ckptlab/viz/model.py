"""The model over pp stages: which layers each has, and the tensors that several share."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckptlab.arguments import explained
from ckptlab.catalog import Catalog, Tensor
from ckptlab.catalog.stacks import split
from ckptlab.draw import Box, Drawing, pipeline
from ckptlab.draw.blocks import blocks, span, told
from ckptlab.viewed import Viewed
from ckptlab.words import number_of, ranges

COLUMNS = 8  # stages that are drawn one by one
BOXES = 12  # boxes of a stage that are drawn


@explained
def stages(model: Viewed | Catalog, *, width: float | None = None) -> Drawing:
    """The layers of each pp stage, in order; like layers next to one another as one. width: of the page, in pixels.

    Tensors that live on several stages have a dashed box in each, joined by a line. The bar in a box is proportional to
    its elements. Cells: class `layer` (`tied`), data-pp, data-tensors, data-elements, data-tensor (the first's name).
    """
    catalog = model.held if isinstance(model, Viewed) else model
    columns = []
    by_stages: dict[tuple[int, ...], list[Tensor]] = {}
    for tensor in catalog.tensors.values():
        by_stages.setdefault(tensor.stages, []).append(tensor)
    pp = max([catalog.mesh.pp, *(s + 1 for held in by_stages for s in held)])  # whole tensors know their run's stages
    folds = blocks(pp, COLUMNS if width is None else min(max(int(width // 250), 1), COLUMNS))
    for block in folds:
        mine = (t for held, tensors in by_stages.items() if set(held).intersection(block) for t in tensors)
        columns.append((f"pp {span(block)}" if pp > 1 else "one stage", _boxes(mine, block)))
    notes = [f"{pp} stages in {len(folds)} columns"] if len(folds) < pp else []
    if any(len(held) > 1 for held in by_stages):
        notes.append("dashed and joined: one tensor, of which each of these stages holds a copy")
    title = f"{number_of(len(catalog.tensors), 'tensor')} over {number_of(pp, 'pp stage')}"
    return pipeline(columns, title=title, notes=notes, width=width)


_Key = tuple[str, int | None]  # what comes before the first number in a name, and the number
_Layer = tuple[_Key, list[tuple[str, Tensor]]]  # its tensors with what comes behind the number


def _boxes(tensors: Iterable[Tensor], block: range) -> list[Box]:
    """A box for each run of layers that are alike, for each tensor without a layer's number, for each tied tensor.

    At most BOXES: of those that are not tied the last are one. Copies of tied tensors come last: a head that is tied to
    the embedding stands behind the layers.
    """
    pp = told(block)
    layers: dict[_Key, list[tuple[str, Tensor]]] = {}
    tied: list[Tensor] = []
    for tensor in tensors:
        if len(tensor.stages) > 1:
            tied.append(tensor)
        else:
            prefix, number, rest = split(tensor.name)
            if number is None:  # what is before the last dot
                prefix, _, rest = tensor.name.rpartition(".")
                prefix = prefix or tensor.name
            layers.setdefault((prefix, number), []).append((rest, tensor))
    keep = max(BOXES - len(tied), 2)
    runs: list[list[_Layer]] = []
    left: list[Tensor] = []
    for key, members in layers.items():
        if len(runs) <= keep and runs and _alike(runs[-1][-1], (key, members)):
            runs[-1].append((key, members))
        elif len(runs) < keep:
            runs.append([(key, members)])
        else:
            left += [t for _, t in members]
    if left:
        left = [t for _, members in runs.pop() for _, t in members] + left
    plain = [_box(run, pp) for run in runs] + ([_rest(left, pp)] if left else [])
    own = [_tied(t, pp) for t in tied if t.stages[0] in block]
    return [*own, *plain, *(_tied(t, pp) for t in tied if t.stages[0] not in block)]


def _alike(a: _Layer, b: _Layer) -> bool:
    """Whether two layers are the same but for their number."""
    (prefix, number), others = b[0], a[0]
    if number is None or prefix != others[0] or len(a[1]) != len(b[1]):
        return False
    pairs = zip(a[1], b[1], strict=True)
    return all(rest_a == rest_b and s.shape == t.shape for (rest_a, s), (rest_b, t) in pairs)


def _box(run: Sequence[_Layer], pp: str) -> Box:
    (prefix, number), first = run[0]
    tensors = [t for _, members in run for _, t in members]
    label, detail = prefix.removesuffix("."), number_of(len(first), "tensor")
    if number is not None:
        word = f"{label} " if label else "layer " if len(run) == 1 else "layers "
        label = f"{word}{ranges(n for (_, n), _ in run if n is not None)}"
    if len(run) > 1:
        detail += f" each, {len(run)} alike"
    return _boxed(label, detail, tensors, pp)


def _tied(tensor: Tensor, pp: str) -> Box:
    """The box of a tensor that several stages hold."""
    box = _boxed(tensor.name, f"tied: pp {', '.join(map(str, tensor.stages))}", [tensor], pp)
    return replace(box, link=tensor.name)


def _rest(tensors: Sequence[Tensor], pp: str) -> Box:
    """One box for those that a stage has no room for."""
    return _boxed(f"… {number_of(len(tensors), 'tensor')} more", "too many to be drawn", tensors, pp)


def _boxed(label: str, detail: str, tensors: Sequence[Tensor], pp: str) -> Box:
    elements = sum(t.numel for t in tensors)
    data = {"pp": pp, "tensor": tensors[0].name, "tensors": len(tensors), "elements": elements}
    return Box(label, elements, detail, "", data)
