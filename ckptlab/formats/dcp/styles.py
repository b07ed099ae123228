"""How programs nest what they save: the keys of weights, of an optimizer's states and of its groups, to be written.

The other direction, from whatever keys there are, is `keys`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ckptlab.errors import ReshapeError
from ckptlab.formats.dcp.keys import Keys, Path
from ckptlab.formats.dcp.marks import MODEL_FOLDER, OPTIMIZER_FOLDER


@dataclass(frozen=True)
class KeyStyle:
    """`model`, `optimizer`: what stands before a weight's name, and before `state` and `param_groups` (None: there is
    no optimizer). `flat`: as torch's `flatten_optimizer_state_dict=True` says it, options by parameter and not by
    group. `apart`: model and optimizer are in folders of their own, as accelerate's."""

    model: tuple[str, ...] = ("model",)
    optimizer: tuple[str, ...] | None = ("optimizer",)
    flat: bool = False
    apart: bool = False

    def weight(self, name: str) -> Path:
        return (*self.model, name)

    def state(self, name: str, state: str) -> Path:
        before = self.optimizer or ()
        return (*before, f"state.{name}.{state}") if self.flat else (*before, "state", name, state)

    def option(self, group: int, name: str, option: str) -> Path:
        """Of a group in the list form, of a parameter in the flat one."""
        before = self.optimizer or ()
        return (*before, f"param_groups.{name}.{option}") if self.flat else (*before, "param_groups", group, option)

    @property
    def folders(self) -> tuple[str, str]:
        """Those of the model and of the optimizer, with a slash behind; "" is the checkpoint's own."""
        return (f"{MODEL_FOLDER}0/", f"{OPTIMIZER_FOLDER}0/") if self.apart else ("", "")


STYLES: Mapping[str, KeyStyle] = {
    "torch": KeyStyle(),
    "torch-flat": KeyStyle(flat=True),
    "torchtitan": KeyStyle(model=(), flat=True),
    "accelerate": KeyStyle(apart=True),
    "weights": KeyStyle(model=(), optimizer=None),
}
"""By name: `{"model": …, "optimizer": …}` of get_state_dict, the same with flattened options, torchtitan's, the two
folders of accelerate, and `model.state_dict()` alone."""


def style(keys: str | None, model_key: str | None, optimizer_key: str | None, source: KeyStyle | None) -> KeyStyle:
    """The style of that name (None: the source's own, else torch's), with other prefixes (dotted; "" is none).
    ReshapeError for an unknown name."""
    if keys is not None and keys not in STYLES:
        raise ReshapeError(f"keys {keys!r}: expected one of {', '.join(STYLES)}")
    found = STYLES[keys] if keys is not None else source or STYLES["torch"]
    if model_key is not None:
        found = replace(found, model=tuple(model_key.split(".")) if model_key else ())
    if optimizer_key is not None:
        found = replace(found, optimizer=tuple(optimizer_key.split(".")) if optimizer_key else ())
    return found


def found_style(keys: Keys, paths: Mapping[str, Path | None], folders: int) -> KeyStyle | None:
    """In which style keys were written; None where they do not say. paths: what `planner_data` gives for each."""
    weight = next((paths.get(key) for key in keys.weights.values()), None)
    kept = next((key for states in keys.states.values() for key in states.values()), None)
    path = paths.get(kept) if kept is not None else None
    if weight is None or (kept is not None and path is None):
        return None
    at = next((i for i, part in enumerate(path or ()) if str(part).partition(".")[0] == "state"), None)
    before = None if path is None or at is None else tuple(map(str, path[:at]))
    flat = path is not None and at is not None and "." in str(path[at])
    return KeyStyle(tuple(map(str, weight[:-1])), before, flat, folders > 1)
