"""The facts in words, the same for text and HTML: short phrases and rows of cells, nothing set or escaped yet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ckptlab.describe.fold import Line, usual_states
from ckptlab.mesh import spoken
from ckptlab.words import count, elements, number_of, place_text, ranges, size, some

About = Mapping[str, Any]
Column = tuple[str, str, Callable[[Line], str]]  # title, side ("l" or "r"), the cell of a line


def mesh(degrees: Mapping[str, int]) -> str:
    """`tp 2 · pp 2 · dp 2 (8 ranks)`."""
    return f"{_on_axes(degrees)} ({number_of(math.prod(degrees.values()), 'rank')})"


def _on_axes(places: Mapping[str, int]) -> str:
    """`tp 1 · pp 1 · dp 0`: degrees or a coordinate, its axes in the order in which people name them."""
    return place_text({axis: places[axis] for axis in spoken(places)})


def _place(rank: int, degrees: Mapping[str, int]) -> str:
    """Where a rank stands on a mesh of these degrees, slowest first."""
    found: dict[str, int] = {}
    for axis, degree in reversed(list(degrees.items())):
        rank, found[axis] = divmod(rank, degree)
    return _on_axes({axis: found[axis] for axis in degrees})


def title(about: About) -> str:
    if about["ranks"] > 1 or about["sharded"]:
        return f"ckptlab · {about['format']} checkpoint · {mesh(about['mesh'])}"
    trained = f", from {mesh(about['trained_on'])}" if about["trained_on"] else ""
    return f"ckptlab · {about['format']} checkpoint · whole tensors{trained}"


def stage(side: About) -> str:
    """`ZeRO-1 (BF16_Optimizer) · bf16`."""
    zero = "no word of ZeRO" if side["zero_stage"] is None else f"ZeRO-{side['zero_stage']}"
    wrapper = f" ({side['optimizer']})" if side["optimizer"] not in (None, zero, "ZeRO-1/2") else ""
    return " · ".join(filter(None, [zero + wrapper, side["dtype"]]))


def training(about: About) -> str:
    if about["zero_stage"] is None:
        return ""
    if not about["files"]["count"]:
        return stage(about)  # a model on paper has no step
    step = f"step {about['step']:,}" if about["step"] is not None else "step unknown"
    return f"{step} · {stage(about)}"


def extent(about: About) -> str:
    counts, files = about["counts"], about["files"]
    others = [
        *([f"{counts['frozen']:,} frozen"] if counts["frozen"] else []),
        *([number_of(counts["buffers"], "buffer")] if counts["buffers"] else []),
    ]
    apart = f" ({', '.join(others)})" if others else ""
    held = "not there any more" if files["bytes"] is None else f"{size(files['bytes'])} on disk"
    tensors = number_of(counts["tensors"], "tensor")
    stored = f" · {number_of(files['count'], 'file')}, {held}" if files["count"] else ""
    return f"{count(counts['parameters'])} parameters in {tensors}{apart}{stored}"


def states(about: About) -> list[list[str]]:
    """Rows (state, dtype, size, tensors)."""
    return [
        [s["name"], ", ".join(s["dtypes"]), size(s["bytes"]), number_of(s["tensors"], "tensor")]
        for s in about["states"]
    ]


def groups(about: About) -> list[list[str]]:
    """Rows (name, learning rate, weight decay, tensors, elements) of parameter groups."""
    rows = []
    for i, group in enumerate(about["groups"]):
        options = group["options"]
        told = [_setting(word, options.get(key)) for key, word in (("lr", "lr"), ("weight_decay", "weight decay"))]
        name = group["name"] or f"group {i}"
        rows.append([name, *told, number_of(group["tensors"], "tensor"), number_of(group["elements"], "element")])
    return rows


def _setting(word: str, value: Any) -> str:
    if value is None:
        return ""
    return f"{word} {value:g}" if isinstance(value, (int, float)) else f"{word} {value}"


def ties(about: About) -> list[str]:
    """`lm_head.weight is wte.weight` for each alias, the first few."""
    pairs = [f"{alias} is {name}" for alias, name in about["aliases"].items()]
    return pairs[:4] + ([f"and {len(pairs) - 4:,} more"] if len(pairs) > 4 else [])


def client(about: About) -> str:
    state = about["client_state"]
    if not state["keys"]:
        return ""
    foreign = f"; not imported: {some(state['not_imported'], 6)}" if state["not_imported"] else ""
    return some(state["keys"], 12) + foreign


def columns(lines: Sequence[Line]) -> list[Column]:
    """The columns that have something to tell of these tensors."""
    shown: list[Column] = [("tensor", "l", lambda n: n.name), ("shape", "l", lambda n: n.shape)]
    if any(line.is_cut for line in lines):
        shown.append(("layout", "l", lambda n: n.layout))
    if any(line.stages != ((0,),) for line in lines):
        shown.append(("pp", "l", lambda n: n.pp))
    usual = usual_states(lines)
    if any(line.kind(usual) != "parameter" for line in lines):
        shown.append(("kind", "l", lambda n: n.kind(usual)))
    if any(line.count > 1 for line in lines):
        shown.append(("", "r", lambda n: f"{n.count:,} ×" if n.count > 1 else ""))
    return [*shown, ("elements", "r", lambda n: elements(n.elements))]


def legend(shown_columns: Sequence[Column], lines: Sequence[Line]) -> list[str]:
    """What signs in a table of these columns mean, of those that are in it."""
    shown = {title for title, *_ in shown_columns}
    said = []
    if "layout" in shown and any(line.layout == "?" for line in lines):
        said.append("? nothing in the checkpoint says how this tensor is cut over tp")
    if "pp" in shown and any(len(s) > 1 for line in lines for s in line.stages):
        said.append("0+1 copies on both pp stages")
    return said


# ---------------------------------------------------------------- plans


def plan_title(about: About) -> str:
    source, target = about["source"]["mesh"], about["target"]["mesh"]
    ranks = f"{math.prod(source.values()):,} → {number_of(math.prod(target.values()), 'rank')}"
    return f"ckptlab · plan · {_on_axes(source)}  →  {_on_axes(target)} ({ranks})"


def target(about: About) -> str:
    return " · ".join([stage(about["target"]), *([number_of(about["files"], "file")] if about["files"] else [])])


def changes(about: About) -> list[list[str]]:
    """Rows (what, from → to) of everything that the target has otherwise."""
    source, wanted = about["source"], about["target"]
    rows = []
    before, after = source["mesh"], wanted["mesh"]
    if before != after:
        told = []
        split = wanted["split"]
        parts = {part for leaves in split.values() for part in leaves}
        for axis in spoken((*before, *split, *after)):
            if axis in parts and axis in before and before[axis] != after[axis]:
                told.append(f"{axis} {before[axis]} → {after[axis]}")
            if axis in parts or (axis in split and all(leaf in before for leaf in split[axis])):
                continue
            a, b = before.get(axis, 1), math.prod(after.get(leaf, 1) for leaf in split.get(axis, [axis]))
            made = f" as {_on_axes({leaf: after[leaf] for leaf in split[axis]})}" if axis in split else ""
            if a != b or made:
                told.append((f"{axis} {a} → {b}" if axis in before and a != b else f"{axis} {b}") + made)
        rows.append(["mesh", ", ".join(told)])
    if own := about["arranged"]:
        rows.append(["experts", ", ".join(f"{axis} {a} → {b}" for axis, (a, b) in own.items())])
    if stage(source) != stage(wanted):
        rows.append(["training", f"{stage(source)} → {stage(wanted)}"])
    if relaid := about["layouts"]:
        first = f"{relaid[0]['name']} {relaid[0]['source']} → {relaid[0]['target']}"
        rows.append(["layouts", first + (f", and of {len(relaid) - 1:,} more tensors" if relaid[1:] else "")])
    layers = about["layers"]
    if layers["source"] != layers["target"]:
        rows.append(["layers", f"{_dealt(layers['source'])}  →  {_dealt(layers['target'])}"])
    vocabulary = about["vocabulary"]
    if vocabulary and vocabulary["source"] != vocabulary["target"]:
        rows.append(
            ["vocabulary", f"{vocabulary['true']:,} rows, padded {vocabulary['source']:,} → {vocabulary['target']:,}"]
        )
    return rows


def _dealt(stages: Sequence[Sequence[int]]) -> str:
    """`1–3 | 4–6`: the layers of each stage."""
    if len(stages) > 8:
        sizes = {len(s) for s in stages}
        return f"{len(stages)} stages of {ranges(sizes)} layers"
    return " | ".join(ranges(s) for s in stages)


def costs(about: About) -> list[list[str]]:
    """Rows (figure, size, what it is)."""
    nbytes = about["bytes"]
    return [
        ["read", size(nbytes["read"]), "from the source, once for every rank that needs it"],
        ["written", size(nbytes["written"]), "into the new files, padding included"],
        ["moved", size(nbytes["moved"]), "of what is read, lies on another rank than the one that needs it"],
        ["largest", size(about["largest_tensor"]), "the biggest tensor: memory stays near it"],
    ]


def receivers(about: About, limit: int) -> list[list[str]]:
    """Rows (rank, coordinate, received, own, number of source ranks), those that receive most first."""
    degrees = about["target"]["mesh"]
    most = sorted(about["moves"]["by_target"], key=lambda m: -m["received"])[:limit]
    return [
        [
            str(m["rank"]),
            _place(m["rank"], degrees),
            size(m["received"]),
            size(m["own"]),
            f"{m['sources']:,}",
        ]
        for m in most
    ]
