"""Is a checkpoint whole, of one run, and are its numbers what training leaves?

finding.py says what a finding is. files.py, headers.py, swaps.py and pickled.py look at headers; rows.py says what is
to be read, reading.py reads it once, windows.py and data.py look at it (partial.py at replicas inside of shards),
verdicts.py puts what was seen into findings; check.py is the whole. The words are in `ckptlab.describe.health`.

What no file tells cannot be found: ZeRO-3 optimizer files of two dp ranks that were swapped (they name neither rank nor
tensor), and bits of a moment, or low bits of a master, that flipped where no other rank holds a copy.
"""

from ckptlab.analysis.checkup.check import health
from ckptlab.analysis.checkup.finding import Checked, Finding, Health, Where

__all__ = ["Checked", "Finding", "Health", "Where", "health"]
