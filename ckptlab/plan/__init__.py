"""Plans: how to get from one checkpoint's cuts to another's, known without reading any data.

Read flat.py (ZeRO's flat buffers), placement.py (who has which shard), spread.py (the same of many tensors at once),
boxes.py, compose.py in this order; then made.py (tensors put together from others), grid.py (cuts that no layout
explains) and what a plan is good for besides: moves.py (between live ranks), ranks.py (the best numbering), time.py.
"""

from ckptlab.plan.compose import Plan, between, compose, plan_tensor
from ckptlab.plan.flat import FlatBuffer
from ckptlab.plan.made import Made
from ckptlab.plan.moves import Move, held_by
from ckptlab.plan.placement import Holder, Placement, Shard
from ckptlab.plan.ranks import Ranks
from ckptlab.plan.time import Cluster, Times

__all__ = [
    "Cluster",
    "FlatBuffer",
    "Holder",
    "Made",
    "Move",
    "Placement",
    "Plan",
    "Ranks",
    "Shard",
    "Times",
    "between",
    "compose",
    "held_by",
    "plan_tensor",
]


def __dir__() -> list[str]:
    return sorted(__all__)
