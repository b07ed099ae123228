"""torch's files without torch: zips of pickles and records, read without executing anything, and planned.

placeholders.py and pickles.py (what is pickled), torchzip.py (records), torchfile.py (whole files), foreign_code.py (what
other programs would run).
"""
