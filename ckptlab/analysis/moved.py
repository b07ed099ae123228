"""What an optimizer's last step did to tensors, put together: sums of parts, and the table of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from ckptlab.arrays.coordinates import ranks
from ckptlab.catalog import Catalog, ParameterGroup, Tensor
from ckptlab.catalog.stacks import places
from ckptlab.layout import Cut
from ckptlab.stored import Stored
from ckptlab.words import shape_text

BY = ("tensor", "layer", "stack")
SETTINGS = ("step", "lr", "beta1", "beta2", "eps", "weight_decay")


FIGURES = {
    "weight_norm": "Euclidean norm of the master weight",
    "update_norm": "Euclidean norm of the last update at the saved learning rate (lr), without weight decay",
    "update_ratio": "update_norm / weight_norm",
    "update_rms": "root mean square of the last update",
    "update_max": "largest element of the last update",
    "second_moment_low": "smallest element of exp_avg_sq that is not 0",
    "second_moment_high": "largest element of exp_avg_sq",
    "dead_share": "share of elements whose exp_avg_sq is exactly 0",
}


@dataclass(frozen=True)
class Settings:
    """The hyperparameters of a tensor's group and the steps taken; NaN for what the checkpoint does not tell."""

    step: float = math.nan
    lr: float = math.nan
    beta1: float = math.nan
    beta2: float = math.nan
    eps: float = math.nan
    weight_decay: float = math.nan
    bias_correction: bool = True

    @staticmethod
    def of(group: ParameterGroup, tensor: str, iteration: int | None) -> Settings:
        """A tensor's own step, or the checkpoint's where it has none."""
        told = group.options
        betas = told.get("betas")
        beta1, beta2 = betas if isinstance(betas, tuple | list) and len(betas) == 2 else (math.nan, math.nan)
        step = _number(group.scalars_of(tensor).get("step", told.get("step")))
        return Settings(
            float(iteration) if math.isnan(step) and iteration is not None else step,
            _number(told.get("lr")),
            _number(beta1),
            _number(beta2),
            _number(told.get("eps")),
            _number(told.get("weight_decay")),
            bool(told.get("bias_correction", True)),
        )

    @property
    def corrections(self) -> tuple[float, float]:
        """What the first and the second moment are divided by; NaN before the first step."""
        if not self.bias_correction:
            return 1.0, 1.0
        return 1.0 - self.beta1**self.step or math.nan, 1.0 - self.beta2**self.step or math.nan


def _number(value: Any) -> float:
    if isinstance(value, Stored) and value.numel == 1:
        value = value.map().reshape(-1)[0]
    return float(value) if isinstance(value, int | float | np.number) else math.nan


@dataclass(frozen=True)
class Moved:
    """What some elements tell of their last update; parts add up with `merge`.

    update_sq, weight_sq: sums of squares of the update and the weight; update_max: the largest update. low, high: the
    extremes of the second moment where it is not 0 (inf, 0: nowhere). dead: elements whose second moment is exactly 0:
    no step has ever given them a gradient that did not vanish.
    """

    elements: int = 0
    update_sq: float = 0.0
    weight_sq: float = 0.0
    update_max: float = 0.0
    low: float = math.inf
    high: float = 0.0
    dead: int = 0

    def merge(self, other: Moved) -> Moved:
        """Both parts together."""
        return Moved(
            self.elements + other.elements,
            self.update_sq + other.update_sq,
            self.weight_sq + other.weight_sq,
            max(self.update_max, other.update_max) if other.update_max == other.update_max else other.update_max,
            min(self.low, other.low),
            max(self.high, other.high),
            self.dead + other.dead,
        )


@dataclass(frozen=True)
class Held:
    """A tensor, or one of its shards: at a coordinate of a cut."""

    tensor: Tensor
    cut: Cut
    at: tuple[int, ...]
    settings: Settings


def table(catalog: Catalog, held: Sequence[Held], found: Sequence[Moved], by: str) -> xr.Dataset:
    """The figures of what was held, along the dims tensor (the stack's name, of rows by layer or stack), layer, and an
    axis for each that cuts a shard."""
    stack_of = places(catalog.tensors.values())
    degrees = {axis: one.cut.mesh[axis] for one in held for axis in one.cut.axes}
    axes = sorted(degrees, key=[*dict.fromkeys((*catalog.mesh.axes, *degrees))].index)
    labels: dict[str, list[Any]] = {"tensor": list(dict.fromkeys(_row(one, by, stack_of) for one in held))}
    if by == "layer":
        labels["layer"] = sorted({stack_of[one.tensor.name][1] for one in held})
    labels |= {axis: list(range(degrees[axis])) for axis in axes}
    shape = tuple(map(len, labels.values()))
    index = {dim: {label: i for i, label in enumerate(labels[dim])} for dim in labels if dim not in axes}
    sums = np.full(shape, Moved(), object)
    settings = {name: np.full(shape, np.nan) for name in SETTINGS}
    present = np.zeros(shape, bool)
    for one, part in zip(held, found, strict=True):
        key = [index["tensor"][_row(one, by, stack_of)]]
        key += [index["layer"][stack_of[one.tensor.name][1]]] if by == "layer" else []
        own = dict(zip(one.cut.axes, one.at, strict=True))
        for rank in itertools.product(*([own[axis]] if axis in own else labels[axis] for axis in axes)):
            place = (*key, *rank)
            sums[place] = sums[place].merge(part)
            for name, values in settings.items():
                said = getattr(one.settings, name)
                values[place] = said if not present[place] or values[place] == said else math.nan
            present[place] = True
    dims = tuple(labels)
    variables: dict[str, Any] = {"present": (dims, present)}
    variables["elements"] = dims, np.vectorize(lambda one: one.elements, otypes=[np.int64])(sums)
    for name, meaning in FIGURES.items():
        figure = np.vectorize(lambda one, name=name: getattr(Figures(one), name), otypes=[np.float64])
        variables[name] = dims, figure(sums), {"long_name": meaning}
    variables["dead"] = dims, np.vectorize(lambda one: one.dead, otypes=[np.int64])(sums)
    meant = {"lr": "learning rate as saved: the schedule had been moved on, so it is the next step's"}
    for name, values in settings.items():
        variables[name] = dims, values, {"long_name": meant[name]} if name in meant else {}
    coordinates = {**labels, **ranks({axis: labels[axis] for axis in axes}), **_told(catalog, held, by, stack_of)}
    return xr.Dataset(variables, coordinates, {"by": by, "path": catalog.path})


def _row(one: Held, by: str, stack_of: dict[str, tuple[str, int]]) -> str:
    return one.tensor.name if by == "tensor" else stack_of[one.tensor.name][0]


def _told(catalog: Catalog, held: Sequence[Held], by: str, stack_of: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """What is known of each row's tensor, of rows of several the first."""
    firsts: dict[str, Tensor] = {}
    for one in held:
        firsts.setdefault(_row(one, by, stack_of), one.tensor)
    names: dict[int | None, str] = {i: str(group.name or i) for i, group in enumerate(catalog.groups)}
    tensors = list(firsts.values())
    told: dict[str, list[Any]] = {
        "group": [names.get(t.group, "") for t in tensors],
        "shape": [shape_text(t.shape) for t in tensors],
        "numel": [t.numel for t in tensors],
    }
    if by == "tensor":
        told["stack"], told["layer"] = ([stack_of[t.name][k] for t in tensors] for k in (0, 1))
        told["pp"] = [t.stages[0] for t in tensors]
    return {name: ("tensor", values) for name, values in told.items()}


class Figures:
    """The figures of a tensor out of its sums."""

    def __init__(self, sums: Moved) -> None:
        nothing = math.nan if not sums.elements else 0.0
        self.weight_norm, self.update_norm = (math.sqrt(n) + nothing for n in (sums.weight_sq, sums.update_sq))
        self.update_ratio = self.update_norm / self.weight_norm if self.weight_norm else math.nan
        self.update_rms = self.update_norm / math.sqrt(sums.elements) if sums.elements else math.nan
        self.update_max = sums.update_max if sums.elements else math.nan
        self.second_moment_low = sums.low if sums.low < math.inf else math.nan
        self.second_moment_high = sums.high if sums.low < math.inf else math.nan
        self.dead_share = sums.dead / sums.elements if sums.elements else math.nan
