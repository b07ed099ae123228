"""Plans: how to get from one checkpoint's cuts to another's, known without reading any data.

Read flat.py (ZeRO's flat buffers), placement.py (who has which shard), boxes.py, compose.py in this order.
"""

from ckptlab.plan.compose import Plan, between, compose, plan_tensor
from ckptlab.plan.flat import FlatBuffer
from ckptlab.plan.placement import Holder, Placement, Shard

__all__ = [
    "FlatBuffer",
    "Holder",
    "Placement",
    "Plan",
    "Shard",
    "between",
    "compose",
    "plan_tensor",
]
