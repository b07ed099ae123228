"""What headers tell of a checkpoint: read tensor.py, extents.py, training.py, seen.py, catalog.py in this order."""

from ckptlab.catalog.catalog import Catalog
from ckptlab.catalog.extents import ALONE, Extents, FlatGroup, Fragment, placements_of, whole_placements
from ckptlab.catalog.seen import LowRank, Piece
from ckptlab.catalog.tensor import MASTER, PARAM, ParameterGroup, Tensor, asked, drawn_from
from ckptlab.catalog.training import DTYPES, ZERO_STAGES, Gradients, Training

__all__ = [
    "ALONE",
    "DTYPES",
    "MASTER",
    "PARAM",
    "ZERO_STAGES",
    "Catalog",
    "Extents",
    "FlatGroup",
    "Fragment",
    "Gradients",
    "LowRank",
    "ParameterGroup",
    "Piece",
    "Tensor",
    "Training",
    "asked",
    "drawn_from",
    "placements_of",
    "whole_placements",
]
