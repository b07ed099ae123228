"""Parameters that load their fragment from a universal folder: `deepspeed.checkpoint.enable_universal_checkpoint`.

A state file (`zero/<tensor>/<state>.pt`) says itself how the whole is to be cut over tp: `cat_dim`,
`param_n_sub_params`, `sub_param_shape`, `vocab_tensor`. That is put into a layout, and only the wanted elements are
read from the file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MethodType
from typing import TYPE_CHECKING, Any

import numpy as np

from ckptlab.arguments import explained, kind_of
from ckptlab.arrays import reader
from ckptlab.catalog import ALONE, Catalog, Extents, Fragment, Tensor, whole_placements
from ckptlab.deepspeed.constants import (
    CAT_DIM,
    EP_IS_EXPERT_PARAM,
    FP32_WEIGHT_KEY,
    PARAM,
    PARAM_N_SUB_PARAMS,
    SUB_PARAM_SHAPE,
    VOCAB_TENSOR,
)
from ckptlab.deepspeed.laid_out import Held, by_autoep, by_autotp, even
from ckptlab.deepspeed.sub_parameters import SubparamShape
from ckptlab.deepspeed.tensors import as_torch, tensor_of
from ckptlab.errors import InputError, LayoutError
from ckptlab.formats.deepspeed.rows import in_parts
from ckptlab.formats.torch import torchfile
from ckptlab.layout import Cut
from ckptlab.mesh import Mesh
from ckptlab.sharding.strategies import cut as cut_along
from ckptlab.sharding.strategies import replicated
from ckptlab.stored import Stored

if TYPE_CHECKING:
    import torch

STEP = "step"


@dataclass
class FragmentAddress:
    """Where a fragment begins in its flattened shard, and how many elements it has."""

    numel: int
    start: int = 0


@dataclass
class HpMapping:
    """What DeepSpeed's engine attaches to a parameter, for one that no engine has: the fragment is the whole shard.

    `optim_fragment` holds the optimizer's states of it (1-D) once they are loaded.
    """

    hp_fragment: torch.Tensor
    lp_fragment_address: FragmentAddress
    optim_fragment: dict[str, torch.Tensor] = field(default_factory=dict)

    def get_hp_fragment(self) -> torch.Tensor:
        """The memory that the master weight is loaded into."""
        return self.hp_fragment


@explained
def enable_universal_checkpoint(param_list: Iterable[torch.nn.Parameter] | torch.nn.Module) -> None:
    """Give each parameter (of a list, or of a module) a method `load_hp_checkpoint_state`: see the function of that
    name."""
    listed: Any = param_list  # a parameter of torch's does not declare the method
    try:
        parameters = list(getattr(listed, "parameters", lambda: listed)())
    except TypeError:
        parameters = [None]
    if any(not hasattr(parameter, "requires_grad") for parameter in parameters):
        raise InputError(f"enable_universal_checkpoint takes a module or its parameters, not {kind_of(param_list)}")
    for parameter in parameters:
        parameter.load_hp_checkpoint_state = MethodType(load_hp_checkpoint_state, parameter)


def load_hp_checkpoint_state(
    self: Any, folder: str, tp_rank: int, tp_world_size: int, ep_rank: int = 0, ep_size: int = 1
) -> Any:
    """Load a parameter's fragment of every state from its folder in a universal checkpoint; returns the optimizer's
    step.

    The master weight goes where the parameter's `_hp_mapping` says (the engine sets that), other states into its
    `optim_fragment`. A parameter without one takes its whole shard itself. Of experts (dim 0) the rank's share is
    loaded; of what AutoTP or AutoEP has laid out, what they attached to the parameter. LayoutError if what is stored
    does not fit the parameter, UnsupportedError for one of which AutoTP cannot say how it is cut.
    """
    if not hasattr(self, "_hp_mapping"):
        self._hp_mapping = HpMapping(self.data.view(-1), FragmentAddress(self.numel()))
    mapping, step = self._hp_mapping, None
    mapping.optim_fragment = {}
    for name in sorted(os.listdir(folder)):
        state, extension = os.path.splitext(name)
        if extension != ".pt":
            continue
        path = os.path.join(folder, name)
        content = torchfile.read(path)
        if state == STEP:
            step = as_torch(content)
            continue
        address = mapping.lp_fragment_address
        fragment = _fragment(path, content, self, (tp_rank, tp_world_size), (ep_rank, ep_size), address)
        if state == FP32_WEIGHT_KEY:
            mapping.get_hp_fragment().data.view(-1).copy_(fragment)
        else:
            mapping.optim_fragment[state] = fragment
    return step


def _fragment(
    path: str, content: Any, parameter: Any, tp: tuple[int, int], ep: tuple[int, int], address: Any
) -> torch.Tensor:
    """The elements of one state that a fragment of a parameter, a shard, holds (1-D)."""
    says = content if isinstance(content, Mapping) else {}
    stored = says.get(PARAM, content)
    if not isinstance(stored, Stored):
        raise LayoutError(f"{path}: holds no tensor under {PARAM!r}: it is no state of a universal checkpoint")
    whole, cut, at = _held(path, stored, says, parameter, tp, ep)
    shape = tuple(parameter.shape)
    held = int(np.prod(cut.shard_shape(at)))
    if held != int(np.prod(shape)) or address.start + address.numel > held:
        raise LayoutError(
            f"{path}: a tensor of shape {stored.shape} over tp {tp[1]} gives tp rank {tp[0]} {held} elements; the "
            f"parameter has {shape}, its fragment elements {address.start} to {address.start + address.numel}"
        )
    name = os.path.basename(os.path.dirname(path))
    tensor = Tensor(
        name,
        whole.shape,
        replicated(len(whole.shape)),
        Cut.whole(whole.shape),
        "parameter",
        {PARAM: whole.dtype},
    )
    one = Catalog(
        path,
        "universal",
        Mesh(),
        {name: tensor},
        whole_placements({name: tensor}, [(name, PARAM)]),
        Extents({(name, PARAM): {ALONE: (Fragment(0, whole),)}}),
    )
    out = np.empty(address.numel, whole.dtype)
    done = 0
    for chunk in reader(one, name, PARAM).chunks(cut, at, address.start, address.start + address.numel):
        out[done : done + chunk.size] = chunk
        done += chunk.size
    return tensor_of(out)


def _held(
    path: str, stored: Stored, says: Mapping[str, Any], parameter: Any, tp: tuple[int, int], ep: tuple[int, int]
) -> Held:
    """What a rank's parameter holds of the stored whole: as AutoTP or AutoEP attached to it, else as the file says."""
    if says.get(EP_IS_EXPERT_PARAM):
        if found := by_autoep(path, parameter, stored, ep[0]):
            return found
        stored = _experts(path, stored, *ep)
    try:
        if found := by_autotp(path, parameter, stored, *tp):
            return found
    except LayoutError as error:
        raise LayoutError(f"{path}: AutoTP's cut of it over tp {tp[1]}: {error}") from None
    whole, cut = _cut(path, stored, says, tuple(parameter.shape), tp[1])
    return whole, cut, cut.coordinate({"tp": tp[0]})


def _experts(path: str, stored: Stored, rank: int, degree: int) -> Stored:
    """The share of dim 0, which counts experts, that an ep rank holds."""
    if stored.shape[0] % degree:
        raise LayoutError(f"{path}: {stored.shape[0]} experts cannot be dealt to ep {degree}")
    local, inner = stored.shape[0] // degree, int(np.prod(stored.shape[1:]))
    return stored.elements(rank * local * inner, local * inner).reshape((local, *stored.shape[1:]))


def _cut(path: str, stored: Stored, says: Mapping[str, Any], shape: tuple[int, ...], tp: int) -> tuple[Stored, Cut]:
    """The stored whole (seen in the shape that its sub-parameters are told in) and how tp cuts it."""
    mesh = Mesh(tp=tp)
    if stored.shape == shape or stored.numel == int(np.prod(shape)):  # replicated, or averaged when it was merged
        return stored, Cut.whole(stored.shape, mesh)
    try:
        if (sub := says.get(SUB_PARAM_SHAPE)) is not None:
            return _sub_parameters(stored, as_torch(sub), mesh)
        parts = says.get(PARAM_N_SUB_PARAMS, 1)
        term = f"{parts} tp {{}}" if parts > 1 else "tp {}"
        layout = cut_along(len(stored.shape), says.get(CAT_DIM, 0), term)
        if says.get(VOCAB_TENSOR):
            layout = layout.replace(padded={0: shape[0] * tp})
        return stored, layout.resolve(stored.shape, mesh)
    except LayoutError as error:
        raise LayoutError(f"{path}: cannot be cut over tp {tp} for a parameter of shape {shape}: {error}") from None


def _sub_parameters(stored: Stored, sub: SubparamShape, mesh: Mesh) -> tuple[Stored, Cut]:
    """Each sub-parameter cut on its own."""
    sizes = sub.shape[sub.partition_dim]
    sizes = tuple(sizes) if isinstance(sizes, (tuple, list)) else (sizes,)
    seen = tuple(sum(d) if isinstance(d, (tuple, list)) else d for d in sub.shape)
    parts = [tuple(even(int(n), mesh.tp)) for n in sizes]
    return stored.reshape(seen), in_parts(len(seen), sub.partition_dim, parts).resolve(seen, mesh)
