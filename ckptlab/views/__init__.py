"""The labelled views of a checkpoint: full tensors, shards, flat buffers, and tensors placed on devices.

Read tensors.py (full, shards) first, then flat.py and placed.py; tree.py is what they stand in, chunks.py makes arrays
of dask, saved.py keeps them in files, engine.py gives them to xarray, accessor.py is `.ckptlab` of xarray's own.
"""

from ckptlab.views.flat import Flat
from ckptlab.views.placed import Placed
from ckptlab.views.tensors import ByName, Full, Shards, View

__all__ = ["ByName", "Flat", "Full", "Placed", "Shards", "View"]
