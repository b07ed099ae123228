"""Is a checkpoint whole, of one run, and are its numbers what training leaves?

What files and headers say is the business of their format's reader, which reports it to a `Faults`. Here are numbers:
jobs.py says what is to be read, reading.py reads it once, data.py looks at it (replicas.py at replicas inside of
shards), verdicts.py puts what was seen into findings; checksums.py is apart; survey.py is the whole, health.py what it
comes to. The words are in `ckptlab.describe.health`.

What no file tells cannot be found: ZeRO-3 optimizer files of two dp ranks that were swapped (they name neither rank
nor tensor). Bits that flipped in a moment, or low in a master, without a copy on another rank show in checksums alone.
"""

from ckptlab.analysis.checkup.health import Checked, Health
from ckptlab.analysis.checkup.survey import check

__all__ = ["Checked", "Health", "check"]
