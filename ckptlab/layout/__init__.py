"""How a tensor lies on a mesh: a line of notation, the layout that it says, the cut that this is of one shape.

Read notation.py, layout.py, solve.py (the lengths that are left open), cut.py, laws.py, describe.py in this order.
Below them is arithmetic: rows.py (indices along one dim), boxes.py (of all dims); blocks.py says layouts in jax's and
torch's words.
"""

from ckptlab.layout.cut import Coordinate, Cut, DimCut, overlap
from ckptlab.layout.describe import cut_dim, equal_parts, on_degree, sub_parameters, whole_shape, with_lengths, without
from ckptlab.layout.laws import Laws, laws
from ckptlab.layout.layout import Layout

__all__ = [
    "Coordinate",
    "Cut",
    "DimCut",
    "Laws",
    "Layout",
    "cut_dim",
    "equal_parts",
    "laws",
    "on_degree",
    "overlap",
    "sub_parameters",
    "whole_shape",
    "with_lengths",
    "without",
]
