"""Limits of the process, `ulimit`: a command ends in one line that says which, or is slower."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from compare import GPT, digest

import ckptlab

MIB = 1 << 20


def limited(kind: int, to: int, *arguments: str | Path) -> tuple[int, str]:
    """The status and stderr of a command in a process that has a limit."""
    program = (
        f"import resource; resource.setrlimit({kind}, ({to}, {to})); "
        "import sys; sys.argv[0] = 'ckptlab'; from ckptlab.__main__ import run; run()"
    )
    ran = subprocess.run([sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, ran.stderr


def test_more_files_than_may_be_open(tmp_path: Path) -> None:
    ckptlab.open(GPT).reshape(ckptlab.Mesh(dp=24)).save(tmp_path / "many", sync=False)
    assert len(list((tmp_path / "many").glob("*optim_states.pt"))) == 24
    assert limited(resource.RLIMIT_NOFILE, 20, "info", tmp_path / "many")[0] == 0
    status, said = limited(resource.RLIMIT_NOFILE, 10, "check", tmp_path / "many")
    assert (status, said.count("\n")) == (2, 1)
    assert "too few files may be open at a time (ulimit -n)" in said


@pytest.mark.parametrize("form", ["deepspeed", "universal"])
def test_files_that_may_not_grow(form: str, tmp_path: Path) -> None:
    before = digest(GPT)
    convert = ["convert", GPT / "global_step3", tmp_path / "out", "--to", form, "--no-progress", "--no-sync"]
    status, said = limited(resource.RLIMIT_FSIZE, 1 << 15, *convert)
    assert (status, said.splitlines()[-1].startswith(f"ckptlab: {tmp_path}/out.partial/")) == (2, True), said
    assert "(ulimit -f, or the file system's limit)" in said
    assert not (tmp_path / "out").exists()
    assert digest(GPT) == before


@pytest.mark.slow
def test_address_space(tmp_path: Path) -> None:
    step, convert = GPT / "global_step3", ["convert", "--to", "universal", "--no-progress"]
    commands = [["info", step], ["check", step], [*convert, step, tmp_path / "120"], [*convert, step, tmp_path / "180"]]
    for size, command in zip((120, 120, 120, 180), commands, strict=True):
        status, said = limited(resource.RLIMIT_AS, size * MIB, *command)
        assert status == 0 or (status == 2 and "(ulimit -v)" in said), said
