"""`python -m ckptlab` is the command line."""

from ckptlab.cli import main

main(prog_name="ckptlab")
