"""Plans: how to get from one checkpoint's cuts to another's, known without reading any data.

Read flat.py (ZeRO's flat buffers), boxes.py, compose.py in this order.
"""

from ckptlab.plan.compose import Placement, Plan, Shard, between, compose, plan_tensor
from ckptlab.plan.flat import FlatBuffer

__all__ = ["FlatBuffer", "Placement", "Plan", "Shard", "between", "compose", "plan_tensor"]
