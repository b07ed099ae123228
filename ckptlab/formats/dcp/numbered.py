"""Whose the states of an optimizer are that calls parameters by number, as torch's own `state_dict()` does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptlab.aliases import Shape


def by_number(
    numbers: Sequence[int], shapes: Mapping[int, Shape], weights: Mapping[str, Shape]
) -> dict[int, str] | None:
    """Number → name. Parameters are numbered in the model's order (that of `weights`), and some of its tensors (frozen
    ones, buffers) have no number: told where there is one way alone to give names to the numbered shapes, in order."""
    numbers, names = sorted(numbers), list(weights)
    if len(numbers) == len(names):
        fits = all(shapes.get(key, weights[name]) == weights[name] for key, name in zip(numbers, names, strict=True))
        return dict(zip(numbers, names, strict=True)) if fits else None
    first = _in_order(numbers, shapes, names, weights)
    last = _in_order(numbers[::-1], shapes, names[::-1], weights)
    return first if first == last else None


def _in_order(
    numbers: Sequence[int], shapes: Mapping[int, Shape], names: Sequence[str], weights: Mapping[str, Shape]
) -> dict[int, str] | None:
    """Each number the first name that is left and has its shape; None where one gets none. (From either end the same:
    there is no other way.)"""
    left, made = iter(names), {}
    for number in numbers:
        name = next((n for n in left if number in shapes and weights[n] == shapes[number]), None)
        if name is None:
            return None
        made[number] = name
    return made
