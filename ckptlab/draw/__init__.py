"""Pictures from plain numbers and names: SVG that follows the page's colours, no script, the same text every time.

Nothing here knows what a mesh or a checkpoint is. Read svg.py and colours.py first; then one picture a module: grid.py
and block.py with ranks.py, sheet.py with edge.py, shard.py and fragments.py (a tensor that is cut), heat.py (its
values), strips.py (buffers), pipeline.py (stages), bars.py (amounts), matrix.py and flow.py (who sends to whom),
parts.py (tensors beside one another). What one is drawn of, a checkpoint or a plan, is up to `ckptlab.viz`: a new
picture has a module here and one there.
"""

from ckptlab.draw.axes import Axes
from ckptlab.draw.bars import Stack, bars
from ckptlab.draw.block import block
from ckptlab.draw.edge import Edge
from ckptlab.draw.flow import flow
from ckptlab.draw.fragments import Fragment
from ckptlab.draw.grid import grid
from ckptlab.draw.matrix import Side, Traffic, matrix
from ckptlab.draw.pipeline import Box, pipeline
from ckptlab.draw.ranks import Ranks
from ckptlab.draw.sheet import sheet
from ckptlab.draw.strips import Bar, Piece, strips
from ckptlab.draw.svg import Drawing

__all__ = [
    "Axes",
    "Bar",
    "Box",
    "Drawing",
    "Edge",
    "Fragment",
    "Piece",
    "Ranks",
    "Side",
    "Stack",
    "Traffic",
    "bars",
    "block",
    "flow",
    "grid",
    "matrix",
    "pipeline",
    "sheet",
    "strips",
]
