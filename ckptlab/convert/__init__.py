"""From files to files: a destination appears whole or not at all, and an interrupted conversion goes on where it
stopped.

A format gives `FilePlan`s. execute.py carries them out, upload.py (parts.py) towards a URL, and report.py is what comes
of it; journal.py keeps what is done, sources.py checks what is read against the checksums beside it, names.py is about
names of files, disk.py about disks, manifest.py says what was written, for whoever checks it later.
"""

from ckptlab.convert.execute import run
from ckptlab.convert.journal import JOURNAL
from ckptlab.convert.manifest import MANIFEST
from ckptlab.convert.report import Report
from ckptlab.convert.sources import Source

__all__ = ["JOURNAL", "MANIFEST", "Report", "Source", "run"]
