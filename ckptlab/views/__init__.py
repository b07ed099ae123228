"""The labelled views of a checkpoint: full tensors, shards, flat buffers, and tensors placed on devices."""

from ckptlab.views.flat import Flat
from ckptlab.views.placed import Placed
from ckptlab.views.tensors import ByName, Full, Shards, View

__all__ = ["ByName", "Flat", "Full", "Placed", "Shards", "View"]
