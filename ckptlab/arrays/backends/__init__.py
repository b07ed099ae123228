"""Backends: the array libraries that views and operations run on. Read base.py first: it knows them by name.

Each is imported when it is asked for.
"""

from ckptlab.arrays.backends.base import BACKENDS, Backend, of, resolve

__all__ = ["BACKENDS", "Backend", "of", "resolve"]
