"""How long a plan's bytes take on a cluster that is described by four numbers; what this leaves out: docs/plans.md."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ckptlab.aliases import Int64
from ckptlab.arguments import explained
from ckptlab.errors import ReshapeError
from ckptlab.words import size

Float64 = NDArray[np.float64]


@explained
@dataclass(frozen=True)
class Cluster:
    """A cluster described by four numbers; the defaults are roughly those of eight H100 with 400 Gbit/s each.

    ranks_per_node: consecutive ranks are on one node. inside: bytes a second that a rank sends to others of its node
    (and receives at the same time). between: bytes a second that a node sends to all others, its ranks together.
    latency: seconds before a message arrives.
    """

    ranks_per_node: int = 8
    inside: float = 450e9
    between: float = 400e9
    latency: float = 10e-6

    def __post_init__(self) -> None:
        for name in ("ranks_per_node", "inside", "between", "latency"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not (value >= 0 if name == "latency" else value > 0):
                raise ReshapeError(f"a cluster's {name} is a number greater than 0, not {value!r}")
        if int(self.ranks_per_node) != self.ranks_per_node:
            raise ReshapeError(f"a cluster's ranks_per_node is a whole number, not {self.ranks_per_node!r}")


@dataclass(frozen=True, eq=False)
class Times:
    """How long a plan takes on a cluster.

    seconds: until the last link is done, all working at once. ranks: seconds of each rank's link inside its node,
    nodes: of each node's to the others. slowest: which link that is, with what it carries.
    """

    seconds: float
    ranks: Float64
    nodes: Float64
    slowest: str

    def __str__(self) -> str:
        return f"{self.seconds:.3g} s: {self.slowest}"


def time(matrix: Int64, cluster: Cluster) -> Times:
    """The times of a matrix (source ranks, target ranks) of bytes: see `Plan.time`."""
    if not isinstance(cluster, Cluster):
        raise ReshapeError(f"time is of a Cluster(ranks_per_node=8, …), not of {cluster!r}")
    count, width = max(matrix.shape), int(cluster.ranks_per_node)
    square = np.zeros((count, count), np.int64)
    square[: matrix.shape[0], : matrix.shape[1]] = matrix
    np.fill_diagonal(square, 0)
    node = np.arange(count) // width
    near = node[:, None] == node[None, :]
    inside, beyond = np.where(near, square, 0), np.where(near, 0, square)
    links = [("rank {} sends", "to its node", inside.sum(1), (inside > 0).sum(1), cluster.inside)]
    links += [("rank {} receives", "from its node", inside.sum(0), (inside > 0).sum(0), cluster.inside)]
    starts = np.arange(0, count, width)
    for what, where, axis in (("node {} sends", "to other nodes", 1), ("node {} receives", "from other nodes", 0)):
        carried = np.add.reduceat(beyond.sum(axis), starts)
        messages = np.maximum.reduceat((beyond > 0).sum(axis), starts)  # ranks of a node talk at the same time
        links.append((what, where, carried, messages, cluster.between))
    taken = [carried / rate + messages * cluster.latency for _, _, carried, messages, rate in links]
    worst = max(range(len(links)), key=lambda k: taken[k].max())
    what, where, carried, _, _ = links[worst]
    at = int(taken[worst].argmax())
    slowest = f"{what.format(at)} {size(carried[at])} {where}" if carried[at] else "nothing moves"
    seconds = float(taken[worst].max())
    return Times(seconds, np.maximum(taken[0], taken[1]), np.maximum(taken[2], taken[3]), slowest)
