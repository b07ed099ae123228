"""Layouts: notation, layouts, cuts. Read notation.py, layout.py, cut.py, laws.py, describe.py in this order."""

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
