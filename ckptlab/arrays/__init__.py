"""Tensors out of what is stored: gathered from fragments and boxes into any other cut, and as lazy labelled arrays.

Readers (readers.py, gather.py) come first; `lazy` (xarray) and `dtypes` are loaded by the views alone.
"""

from ckptlab.arrays.gather import Gather, Tally, reader
from ckptlab.arrays.held import Drawn, Partition, shard_reader
from ckptlab.arrays.readers import Cast, Mean, Reader

__all__ = ["Cast", "Drawn", "Gather", "Mean", "Partition", "Reader", "Tally", "reader", "shard_reader"]
