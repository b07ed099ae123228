"""torch's files without torch: zips of pickles and records, read without executing anything, and planned.

Read placeholders.py and pickles.py (what is pickled), directory.py and torchzip.py (records), torchfile.py (whole
files) in this order; budget.py says what a pickle may cost, foreign_code.py what other programs would run. format.py
and read.py are a format of their own: whole weights in such files.
"""
