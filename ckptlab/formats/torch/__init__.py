"""torch's files without torch: zips of pickles and records, read without executing anything, and planned.

Read placeholders.py and pickles.py (what is pickled), directory.py and torchzip.py (records),
torchfile.py (whole files) in this order;
foreign_code.py says what other programs would run.
"""
