"""Which tensors of a model are one tensor of its layers: same but for a number in the name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
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


def kind_and_layer(name: str) -> tuple[str, int | None]:
    """A tensor's name without its first number, and that number: ("mlp.weight", 3) of `3.mlp.weight`."""
    parts = name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if place is None or len(parts) == 1:
        return name, None
    return ".".join((*parts[:place], *parts[place + 1 :])), int(parts[place])


def _told_apart(stack: Stack) -> Stack:
    return stack if stack.numbers is None else replace(stack, name=f"{stack.name}[{stack.numbers[0]}…]")


def _key(tensor: Tensor) -> tuple[Any, int]:
    """What the tensors of a stack share, and the number in which they differ."""
    parts = tensor.name.split(".")
    place = next((i for i, part in enumerate(parts) if part.isascii() and part.isdigit()), None)
    if place is None or len(parts) == 1 or len(tensor.stages) > 1 or parts[place] != str(int(parts[place])):
        return tensor.name, 0
    name = (tuple(parts[:place]), tuple(parts[place + 1 :]))
    alike = (tensor.shape, tensor.layout.text, tensor.dims, tensor.kind, tuple(tensor.states.items()))
    return (name, alike, tensor.cut.dims), int(parts[place])


def _stack(key: Any, members: list[tuple[int, Tensor]]) -> Stack:
    (before, after), *_ = key
    members = sorted(members, key=lambda member: member[0])
    return Stack(
        ".".join((*before, *after)),
        ".".join((*before, "{layer}", *after)),
        tuple(tensor for _, tensor in members),
        tuple(number for number, _ in members),
    )
