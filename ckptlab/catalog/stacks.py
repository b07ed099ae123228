"""Which tensors of a model are one tensor of its layers: same but for a number in the name.

The layer of a tensor is the first part of its name that is a number: 10 in `transformer.h.10.attn.0.weight`. Everybody
asks here, so that a tensor is in the same stack in every view and table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from ckptlab.catalog.tensor import Tensor


@dataclass(frozen=True)
class Stack:
    """Tensors shown as one: same-shaped layers with their `numbers`, ascending, or one tensor alone (None).

    `name` is the tensors' without the number, `pattern` with `{layer}` in its place.
    """

    name: str
    pattern: str
    tensors: tuple[Tensor, ...]
    numbers: tuple[int, ...] | None = None

    @staticmethod
    def lone(tensor: Tensor) -> Stack:
        """A tensor by itself."""
        return Stack(tensor.name, tensor.name, (tensor,))


def stacks(tensors: Iterable[Tensor]) -> list[Stack]:
    """Tensors whose names differ only in their first number, at least two of one shape, cut, kind and states, together.

    In the order in which they begin. Tensors that several pp stages hold stay alone. Where stacks would share a name
    (layers of two shapes, say), each has its first number behind it: `mlp.weight[0…]`.
    """
    together: dict[Any, list[tuple[int, Tensor]]] = {}
    for tensor in tensors:
        key, number = _key(tensor)
        together.setdefault(key, []).append((number, tensor))
    found = [_stack(key, alike) if len(alike) > 1 else Stack.lone(alike[0][1]) for key, alike in together.items()]
    count = Counter(stack.name for stack in found)
    return [_told_apart(stack) if count[stack.name] > 1 else stack for stack in found]


def places(tensors: Iterable[Tensor]) -> dict[str, tuple[str, int]]:
    """Name → its stack's name and its number in there, -1 where it stands alone."""
    return {
        tensor.name: (stack.name, -1 if stack.numbers is None else stack.numbers[i])
        for stack in stacks(tensors)
        for i, tensor in enumerate(stack.tensors)
    }


def is_number(part: str) -> bool:
    """Whether a part of a name between dots is a number: `10`, not `01` (another name than `1`); int64 at most."""
    return part.isascii() and part.isdigit() and len(part) <= 18 and (part == "0" or part[0] != "0")


@lru_cache(maxsize=1 << 16)
def split(name: str) -> tuple[str, int | None, str]:
    """What is before the layer's number, the number, and what is behind: `layers.`, 1, `.mlp.w1` of `layers.1.mlp.w1`.
    Without one, or where the number is all of the name: the name, None and nothing."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if is_number(part)), None)
    if place is None or len(parts) == 1:
        return name, None, ""
    before = sum(len(part) + 1 for part in parts[:place])
    return name[:before], int(parts[place]), name[before + len(parts[place]) :]


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """A tensor's name without its layer's number, and that number: ("mlp.weight", 3) of `3.mlp.weight`."""
    before, number, after = split(name)
    return (name if number is None else without_number(before, after)), number


def without_number(before: str, after: str) -> str:
    """The name of a stack: what is before and behind the number in the names of its tensors."""
    return before + after[1:] if after else before.removesuffix(".")


def _told_apart(stack: Stack) -> Stack:
    return stack if stack.numbers is None else replace(stack, name=f"{stack.name}[{stack.numbers[0]}…]")


def _key(tensor: Tensor) -> tuple[Any, int]:
    """What the tensors of a stack share, and the number in which they differ."""
    before, number, after = split(tensor.name)
    if number is None or len(tensor.stages) > 1:
        return tensor.name, 0
    alike = (tensor.shape, tensor.layout.text, tensor.dims, tensor.kind, tuple(tensor.states.items()))
    return ((before, after), alike, tensor.cut.dims), number


def _stack(key: Any, members: list[tuple[int, Tensor]]) -> Stack:
    (before, after), *_ = key
    members = sorted(members, key=lambda member: member[0])
    return Stack(
        without_number(before, after),
        f"{before}{{layer}}{after}",
        tuple(tensor for _, tensor in members),
        tuple(number for number, _ in members),
    )
