"""What Adam last did to every tensor, worked out from its moments: how large the update was, beside the weight.

Kingma and Ba, "Adam: a method for stochastic optimization" (2015), algorithm 1: after step t the optimizer holds
m_t (`exp_avg`) and v_t (`exp_avg_sq`), and the step that it took was

    lr · m̂ / (sqrt(v̂) + eps)      with m̂ = m_t / (1 - beta1^t), v̂ = v_t / (1 - beta2^t).

Decoupled weight decay (Loshchilov and Hutter, "Decoupled weight decay regularization", 2019) is no part of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from ckptlab import pool
from ckptlab.analysis.accumulate import BLOCK
from ckptlab.analysis.elements import joined, runs
from ckptlab.analysis.moved import BY, Held, Moved, Settings, table
from ckptlab.arguments import explained, positive
from ckptlab.arrays import Reader, reader
from ckptlab.catalog import Catalog, Tensor
from ckptlab.checkpoint import Source, opened
from ckptlab.errors import CheckpointError
from ckptlab.layout import Cut
from ckptlab.pool import Workers
from ckptlab.views import accessor  # noqa: F401  (what the Dataset can say of itself)

FIRST, SECOND = "exp_avg", "exp_avg_sq"
_SPAN = 128  # windows that a task goes through


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


@explained
def updates(
    ckpt: Source,
    *,
    by: str = "tensor",
    shards: bool = False,
    progress: bool = False,
    on: Workers = None,
    window: int = BLOCK,
) -> xr.Dataset:
    """What Adam last did to every tensor that it trains, as one Dataset with the dim `tensor`.

    by: "layer" has the dims (tensor: the stack, layer), -1 for tensors that are no layer's; "stack" takes all layers of
    one together. shards: each model-parallel rank's shard by itself, padding included, with a dim for each axis (`tp`);
    what is not cut over it is the same on all. Of rows of several tensors, settings that differ are NaN. `present` says
    where there is something.

    Variables: present, elements, weight_norm, update_norm, update_ratio (about 1e-3 in a healthy run), update_rms (of
    the order of lr), update_max, second_moment_low, second_moment_high, dead (elements), dead_share; step, lr, beta1,
    beta2, eps, weight_decay as the checkpoint has them. Coordinates: stack, layer, group, pp, shape, numel (see
    `stats`).

    The learning rate is the one that was saved: DeepSpeed moves the schedule on before it saves, so it is the next
    step's. Without a learning rate, betas, eps or step, and before the first step, updates are NaN. For Adam's
    relatives that keep the same two moments (AdamW, Lamb) it is what Adam would have done. Streams like `stats`, in
    float64. on: how many threads (None: as many as there are cores), an executor or a dask client. window: elements of
    each of the three states that a worker holds at a time.

    CheckpointError where no tensor has both moments.
    """
    if by not in BY:
        raise CheckpointError(f"by={by!r}: expected one of {', '.join(BY)}")
    window = positive("window", window)
    catalog = opened(ckpt).catalog
    trained = [t for t in catalog.tensors.values() if _is_adams(catalog, t)]
    if not trained:
        raise CheckpointError(
            f"{catalog.path}: no tensor has both {FIRST} and {SECOND} (there are {', '.join(catalog.states)}): "
            "this was not trained with Adam, or holds weights alone"
        )
    held = [Held(t, cut, at, _settings(catalog, t)) for t in trained for cut, at in _parts(t, shards)]
    found = _all_moved(catalog, held, window, on, progress)
    return table(catalog, held, found, by)


def _parts(tensor: Tensor, shards: bool) -> Iterator[tuple[Cut, tuple[int, ...]]]:
    """The whole of a tensor, or each of its shards."""
    if not shards:
        yield Cut.whole(tensor.shape), ()
    else:
        yield from ((tensor.cut, at) for at in tensor.cut.coordinates())


def _is_adams(catalog: Catalog, tensor: Tensor) -> bool:
    states = (FIRST, SECOND, tensor.weight)
    return all((tensor.name, s) in catalog.placements for s in states)


def _settings(catalog: Catalog, tensor: Tensor) -> Settings:
    if tensor.group is None:
        return Settings()
    return Settings.of(catalog.groups[tensor.group], tensor.name, catalog.training.step)


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


def _tasks(catalog: Catalog, held: Sequence[Held], window: int) -> Iterator[_Task]:
    size = _SPAN * window
    for index, one in enumerate(held):
        states = (one.tensor.weight, FIRST, SECOND)
        gathers = tuple(reader(catalog, one.tensor.name, state) for state in states)
        for run in runs(gathers[0], one.cut, one.at, size):
            yield _Task(index, gathers, *run, one.settings, window)


def _all_moved(catalog: Catalog, held: Sequence[Held], window: int, on: Workers, progress: bool) -> list[Moved]:
    found = [Moved() for _ in held]
    tasks = _tasks(catalog, held, window)
    total = sum(math.prod(one.cut.shard_shape(one.at)) for one in held)
    with pool.progress(total, "updates", " elements", progress) as bar:
        for index, part in pool.run(_Task.run, tasks, on=on, size=lambda task: task.hi - task.lo, bar=bar):
            found[index] = found[index].merge(part)
    return found
