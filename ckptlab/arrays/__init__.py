"""Tensors out of what is stored: gathered from fragments and boxes into any other cut, and as lazy labelled arrays.

`lazy` (xarray) and `narrow` (dtypes of 16 bits and fewer) are loaded by the views alone.
"""

from ckptlab.arrays.gather import Gather, Tally
from ckptlab.arrays.held import Partition, Shard, shard_gathers

__all__ = ["Gather", "Partition", "Shard", "Tally", "shard_gathers"]
