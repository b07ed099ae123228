"""Tensors out of what is stored: gathered from fragments and boxes into any other cut, and as lazy labelled arrays."""

from ckptlab.arrays.gather import Gather, Tally

__all__ = ["Gather", "Tally"]
