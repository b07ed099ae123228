"""Whole tensors as a program wants them: a dict of a library's own arrays, or put into a torch module."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ckptlab.arguments import kind_of
from ckptlab.catalog import MASTER, PARAM, Tensor
from ckptlab.errors import CheckpointError, InputError

if TYPE_CHECKING:
    import torch

    from ckptlab.viewed import Viewed

MANY = 5  # names that an error tells


class Loaded(NamedTuple):
    """What a module had no value for, and what it had no place for: named as torch's `load_state_dict` does."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def state_dict(
    ckpt: Viewed, state: str | None = None, backend: Any = "torch", device: Any = None, dtype: Any = None
) -> dict[str, Any]:
    """See `Checkpoint.state_dict`."""
    whole = _whole(ckpt, state, backend, device, dtype)
    return {
        name: array
        for tensor, held in _held(ckpt, state)
        for array in (_array(whole, tensor, held),)
        for name in (tensor.name, *tensor.aliases)
    }


def load_into(ckpt: Viewed, module: torch.nn.Module, strict: bool = True, state: str | None = None) -> Loaded:
    """See `Checkpoint.load_into`."""
    import torch

    if not isinstance(module, torch.nn.Module):
        raise InputError(f"load_into takes a torch.nn.Module, not {kind_of(module)}")
    targets = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, torch.Tensor)}
    held = list(_held(ckpt, state))
    places = [(t, s, [targets[n] for n in (t.name, *t.aliases) if n in targets]) for t, s in held]
    known = {name for tensor, _ in held for name in (tensor.name, *tensor.aliases)}
    found = Loaded([n for n in targets if n not in known], [t.name for t, _, there in places if not there])
    _check(ckpt.source.path, found if strict else Loaded([], []), places)
    whole = _whole(ckpt, state, "torch", None, None)
    with torch.no_grad():
        for tensor, of_state, there in places:
            value = _array(whole, tensor, of_state) if there else torch.empty(0)
            for target in there:
                if target.shape != tensor.shape:
                    target.zero_()
                target[tuple(slice(n) for n in tensor.shape)].copy_(value)
    return found


def _whole(ckpt: Viewed, state: str | None, backend: Any, device: Any, dtype: Any) -> Mapping[str, Any]:
    by_name: Mapping[str, Any] = ckpt.full(state, stack=False, dtype=dtype, backend=backend, device=device)
    return by_name


def _held(ckpt: Viewed, state: str | None) -> Iterator[tuple[Tensor, str]]:
    """Every tensor that has the state, with it."""
    choices = (MASTER, PARAM) if state is None else (state,)
    for tensor in ckpt.source.tensors.values():
        found = next((s for s in choices if s in tensor.states), None)
        if found is not None:
            yield tensor, found


def _array(whole: Mapping[str, Any], tensor: Tensor, state: str) -> Any:
    """The library's own array."""
    found = whole[tensor.name]
    data = (found[state] if state in getattr(found, "data_vars", ()) else found).data
    return getattr(data, "array", data)


def _check(path: str, names: Loaded, places: Iterable[tuple[Tensor, str, list[torch.Tensor]]]) -> None:
    """CheckpointError, with everything that does not fit."""
    wrong = []
    for what, left in (
        ("the module wants, and the checkpoint lacks, ", names.missing_keys),
        ("the checkpoint holds, and the module lacks, ", names.unexpected_keys),
    ):
        if left:
            wrong.append(f"{what}{_several(left)} (strict=False leaves them out)")
    shapes = [
        f"{tensor.name} is {_shape(tensor.shape)}, in the module {_shape(target.shape)}"
        for tensor, _, there in places
        for target in there
        if not _fits(tensor, tuple(target.shape))
    ]
    wrong += [_several(shapes)] if shapes else []
    unmade = [tensor.name for tensor, _, there in places if any(target.is_meta for target in there)]
    if unmade:
        wrong.append(f"{_several(unmade)} on the meta device: module.to_empty(device=…) first")
    if wrong:
        raise CheckpointError(f"{path}: does not fit the module: " + "; ".join(wrong))


def _fits(tensor: Tensor, shape: tuple[int, ...]) -> bool:
    """The tensor's own shape; of padded dims longer ones too."""
    padded = {i for i, _ in tensor.layout.padded}
    return len(shape) == len(tensor.shape) and all(
        n == m or (i in padded and n > m) for i, (n, m) in enumerate(zip(shape, tensor.shape, strict=True))
    )


def _several(texts: list[str]) -> str:
    more = len(texts) - MANY
    return ", ".join(texts[:MANY]) + (f", … and {more:,} more" if more > 0 else "")


def _shape(shape: Iterable[int]) -> str:
    return " × ".join(map(str, shape)) or "a scalar"
