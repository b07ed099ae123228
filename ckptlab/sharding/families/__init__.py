"""The names and shapes that a model has in another program. A family is a list of lines, read both ways.

Read names.py, tables.py, lines.py, family.py, seen.py in this order; programs.py and models.py are those that are known
here.

    families.resolve("llama").onto(ckpt)        # its names and shapes are transformers'; nothing is read yet
"""

from ckptlab.sharding.families.family import Bound, Family, Taken
from ckptlab.sharding.families.lines import Join, Line, Permute, Rename, Side, Stack
from ckptlab.sharding.families.numbers import told_numbers
from ckptlab.sharding.families.registered import FAMILIES, found, like, resolve, towards
from ckptlab.sharding.families.start import Start, start

__all__ = [
    "FAMILIES",
    "Bound",
    "Family",
    "Join",
    "Line",
    "Permute",
    "Rename",
    "Side",
    "Stack",
    "Start",
    "Taken",
    "found",
    "like",
    "resolve",
    "start",
    "told_numbers",
    "towards",
]


def __dir__() -> list[str]:
    return sorted(__all__)
