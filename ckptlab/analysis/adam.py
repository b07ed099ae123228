"""What Adam last did to every tensor, worked out from its moments: how large the update was, beside the weight.

Kingma and Ba, "Adam: a method for stochastic optimization" (2015), algorithm 1: after step t the optimizer holds
m_t (`exp_avg`) and v_t (`exp_avg_sq`), and the step that it took was

    lr · m̂ / (sqrt(v̂) + eps)      with m̂ = m_t / (1 - beta1^t), v̂ = v_t / (1 - beta2^t).

Decoupled weight decay (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019) is no part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ckptlab import pool
from ckptlab.analysis import accessor  # noqa: F401  (what the Dataset can say of itself)
from ckptlab.analysis.accumulate import BLOCK
from ckptlab.analysis.elements import joined
from ckptlab.arguments import explained
from ckptlab.arrays import Reader, reader
from ckptlab.catalog import MASTER, PARAM, Catalog, ParameterGroup, Tensor
from ckptlab.catalog.stacks import places
from ckptlab.checkpoint import Checkpoint, Source, opened
from ckptlab.errors import CheckpointError
from ckptlab.layout import Cut
from ckptlab.pool import Workers
from ckptlab.stored import Stored
from ckptlab.words import shape_text

FIRST, SECOND = "exp_avg", "exp_avg_sq"
_SPAN = 128  # windows that a task goes through


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
    def of(group: ParameterGroup, iteration: int | None) -> Settings:
        """A group's own step, or the checkpoint's where it has none."""
        told = group.options
        betas = told.get("betas")
        beta1, beta2 = betas if isinstance(betas, tuple | list) and len(betas) == 2 else (math.nan, math.nan)
        step = _number(group.scalars.get("step", told.get("step")))
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
        """What the first and the second moment are divided by."""
        if not self.bias_correction:
            return 1.0, 1.0
        return 1.0 - self.beta1**self.step, 1.0 - self.beta2**self.step


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


def update(first: NDArray[Any], second: NDArray[Any], given: Settings) -> NDArray[np.float64]:
    """The step that Adam took (in float64, of the moments' shape), to be subtracted from the weight."""
    correct1, correct2 = given.corrections
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.sqrt(np.asarray(second, np.float64) / correct2)
        size += given.eps
        return np.asarray(first, np.float64) * (given.lr / correct1) / size


def moved(weight: NDArray[Any], first: NDArray[Any], second: NDArray[Any], given: Settings) -> Moved:
    """What these elements tell of their last update."""
    if not weight.size:
        return Moved()
    step = update(first, second, given).reshape(-1)
    v, w = np.asarray(second, np.float64).reshape(-1), np.asarray(weight, np.float64).reshape(-1)
    alive = v[v != 0]
    return Moved(
        w.size,
        float(np.square(step).sum()),
        float(np.square(w).sum()),
        float(np.abs(step).max()),
        float(alive.min(initial=math.inf)),
        float(alive.max(initial=0.0)),
        w.size - alive.size,
    )


_FIGURES = {
    "weight_norm": "Euclidean norm of the master weight",
    "update_norm": "Euclidean norm of the last update at the saved learning rate (lr), without weight decay",
    "update_ratio": "update_norm / weight_norm",
    "update_rms": "root mean square of the last update",
    "update_max": "largest element of the last update",
    "second_moment_low": "smallest element of exp_avg_sq that is not 0",
    "second_moment_high": "largest element of exp_avg_sq",
    "dead_share": "share of elements whose exp_avg_sq is exactly 0",
}


@explained
def updates(
    ckpt: Source,
    *,
    progress: bool = False,
    workers: Workers = None,
    window: int = BLOCK,
) -> xr.Dataset:
    """What Adam last did to every tensor that it trains, as one Dataset with the dim `tensor`.

    Variables: elements, weight_norm, update_norm, update_ratio (about 1e-3 in a healthy run), update_rms (of the order
    of lr), update_max, second_moment_low, second_moment_high, dead (elements), dead_share; step, lr, beta1, beta2,
    eps, weight_decay as the checkpoint has them. Coordinates: stack, layer, group, pp, shape, numel (see `stats`).

    The learning rate is the one that was saved: DeepSpeed moves the schedule on before it saves, so it is the next
    step's. Without a learning rate, betas, eps or step, updates are NaN. For Adam's relatives that keep the same two
    moments (AdamW, Lamb) it is what Adam would have done. Streams like `stats`, in float64. workers: how many threads
    (None: as many as there are cores), an executor or a dask client. window: elements of each of the three states
    that a worker holds at a time.

    CheckpointError where no tensor has both moments.
    """
    catalog = opened(ckpt).catalog
    trained = [t for t in catalog.tensors.values() if _is_adams(catalog, t)]
    if not trained:
        raise CheckpointError(
            f"{catalog.path}: no tensor has both {FIRST} and {SECOND} (there are {', '.join(catalog.states)}): "
            "this was not trained with Adam, or holds weights alone"
        )
    settings = _settings(catalog)
    found = _all_moved(catalog, trained, settings, window, workers, progress)
    return _dataset(catalog, trained, settings, found)


def _weight(tensor: Tensor) -> str:
    return MASTER if MASTER in tensor.states else PARAM


def _is_adams(catalog: Catalog, tensor: Tensor) -> bool:
    states = (FIRST, SECOND, _weight(tensor))
    return all((tensor.name, s) in catalog.placements for s in states)


def _settings(catalog: Catalog) -> Mapping[int | None, Settings]:
    iteration = Checkpoint(catalog).iteration
    return {None: Settings(), **{i: Settings.of(group, iteration) for i, group in enumerate(catalog.groups)}}


@dataclass(frozen=True)
class _Task:
    """Elements lo … hi-1 of one shard of a tensor, in the three states that are read together."""

    index: int
    gathers: tuple[Reader, ...]
    cut: Cut
    at: tuple[int, ...]
    lo: int
    hi: int
    settings: Settings
    window: int

    def run(self) -> tuple[int, Moved]:
        total = Moved()
        for start in range(self.lo, self.hi, self.window):
            stop = min(start + self.window, self.hi)
            weight, first, second = (joined(g, self.cut, self.at, start, stop) for g in self.gathers)
            total = total.merge(moved(weight, first, second, self.settings))
        return self.index, total


def _tasks(
    catalog: Catalog, trained: list[Tensor], settings: Mapping[int | None, Settings], window: int
) -> Iterator[_Task]:
    size = _SPAN * window
    for index, tensor in enumerate(trained):
        states = (_weight(tensor), FIRST, SECOND)
        gathers = tuple(reader(catalog, tensor.name, state) for state in states)
        for cut, at in gathers[0].unordered(Cut.whole(tensor.shape), ()):
            numel = math.prod(cut.shard_shape(at))
            for lo in range(0, numel, size):
                yield _Task(index, gathers, cut, at, lo, min(lo + size, numel), settings[tensor.group], window)


def _all_moved(
    catalog: Catalog,
    trained: list[Tensor],
    settings: Mapping[int | None, Settings],
    window: int,
    workers: Workers,
    progress: bool,
) -> list[Moved]:
    found = [Moved() for _ in trained]
    tasks = _tasks(catalog, trained, settings, window)
    with pool.progress(sum(t.numel for t in trained), "updates", " elements", progress) as bar:
        for index, part in pool.run(_Task.run, tasks, on=workers, size=lambda task: task.hi - task.lo, bar=bar):
            found[index] = found[index].merge(part)
    return found


def _dataset(
    catalog: Catalog, trained: list[Tensor], settings: Mapping[int | None, Settings], found: list[Moved]
) -> xr.Dataset:
    place = places(catalog.tensors.values())
    figures = {name: np.array([getattr(_Figures(one), name) for one in found]) for name in _FIGURES}
    variables: dict[str, Any] = {"elements": ("tensor", [one.elements for one in found])}
    variables |= {name: ("tensor", figures[name], {"long_name": meaning}) for name, meaning in _FIGURES.items()}
    variables["dead"] = "tensor", [one.dead for one in found]
    meant = {"lr": "learning rate as saved: the schedule had been moved on, so it is the next step's"}
    for name in ("step", "lr", "beta1", "beta2", "eps", "weight_decay"):
        said = {"long_name": meant[name]} if name in meant else {}
        variables[name] = "tensor", [getattr(settings[t.group], name) for t in trained], said
    names: dict[int | None, str] = {i: str(group.name or i) for i, group in enumerate(catalog.groups)}
    coordinates: dict[str, Any] = {
        "tensor": [t.name for t in trained],
        "stack": ("tensor", [place[t.name][0] for t in trained]),
        "layer": ("tensor", [place[t.name][1] for t in trained]),
        "group": ("tensor", [names.get(t.group, "") for t in trained]),
        "pp": ("tensor", [t.stages[0] for t in trained]),
        "shape": ("tensor", [shape_text(t.shape) for t in trained]),
        "numel": ("tensor", [t.numel for t in trained]),
    }
    return xr.Dataset(variables, coordinates, {"by": "tensor", "path": catalog.path})


class _Figures:
    """The figures of a tensor out of its sums."""

    def __init__(self, sums: Moved) -> None:
        self.weight_norm, self.update_norm = math.sqrt(sums.weight_sq), math.sqrt(sums.update_sq)
        self.update_ratio = self.update_norm / self.weight_norm if self.weight_norm else math.nan
        self.update_rms = self.update_norm / math.sqrt(sums.elements) if sums.elements else math.nan
        self.update_max = sums.update_max
        self.second_moment_low = sums.low if sums.low < math.inf else math.nan
        self.second_moment_high = sums.high if sums.low < math.inf else math.nan
        self.dead_share = sums.dead / sums.elements if sums.elements else math.nan
