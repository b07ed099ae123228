"""Putting the states of several ranks together by their structure alone, as `deepspeed.checkpoint.merge_state`
does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from ckptlab.arguments import explained
from ckptlab.errors import MismatchError


@explained
def merge_state(state_a: Any, state_b: Any, key_list: Sequence[str] = ()) -> Any:
    """Tensors one after the other along dim 0, in dicts, lists and tuples alike; of anything else, state_a's.

    A key that only one side has is kept (DeepSpeed 0.19.8 loses state_a's), a tensor without dims is state_a's (there
    it stops). `key_list` is the way to here, printed if the two do not fit together. MismatchError (a ValueError) if
    types or lengths of lists differ.
    """
    import torch

    where = ".".join(key_list)
    if type(state_a) is not type(state_b):
        print(f"key_list = {where}")
        raise MismatchError(
            f"Cannot merge two states of types {type(state_a)} and {type(state_b)}, at {where or 'the top'}"
        )
    if type(state_a) in (dict, OrderedDict):
        both = {
            key: merge_state(state_a[key], state_b[key], [*key_list, str(key)]) for key in state_a if key in state_b
        }
        return type(state_a)({**state_a, **state_b, **both})
    if type(state_a) in (list, tuple):
        if len(state_a) != len(state_b):
            print(where)
            raise MismatchError(
                f"Cannot merge lists of different lengths, {len(state_a)} and {len(state_b)}, at {where or 'the top'}"
            )
        return type(state_a)(merge_state(a, b, key_list) for a, b in zip(state_a, state_b, strict=True))
    if torch.is_tensor(state_a):
        return torch.cat([state_a, state_b], 0) if state_a.dim() else state_a
    return state_a
