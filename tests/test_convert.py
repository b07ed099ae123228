"""A destination appears whole or not at all; a conversion that was killed goes on where it stopped."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from compare import GPT, ZERO2, differences, digest

from ckptlab import convert
from ckptlab.checkpoint import Reshape
from ckptlab.errors import CkptlabError, DestinationError
from ckptlab.formats import read
from ckptlab.mesh import Mesh


def job(name: str, content: bytes = b"data", fails: bool = False) -> convert.FileJob:
    def write(path: str) -> int:
        Path(path).write_bytes(content)
        if fails:
            raise OSError("no space left on device")
        return len(content)

    return convert.FileJob(name, write, len(content))


def test_all_files_then_the_name(tmp_path: Path) -> None:
    report = convert.run([job("a"), job("deep/b", b"more")], str(tmp_path / "out"), {"of": "x"}, latest="latest")
    assert (report.files, report.resumed, report.bytes_written) == (2, 0, 8)
    assert digest(tmp_path).keys() == {"out/a", "out/deep/b", "latest"}
    assert (tmp_path / "latest").read_text() == "out"


def test_a_failure_leaves_no_destination_and_the_repeat_goes_on(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(OSError, match="no space"):
        convert.run([job("a"), job("b", fails=True)], out, {"of": "x"}, workers=1)
    assert not os.path.exists(out)
    assert not (tmp_path / "out.partial" / "b").exists()
    report = convert.run([job("a"), job("b")], out, {"of": "x"}, workers=1)
    assert report.resumed == 1
    assert digest(tmp_path).keys() == {"out/a", "out/b"}


def test_a_file_that_was_cut_since_is_written_again(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(OSError, match="no space"):
        convert.run([job("a"), job("b", fails=True)], out, {"of": "x"}, workers=1)
    (tmp_path / "out.partial" / "a").write_bytes(b"d")
    convert.run([job("a"), job("b")], out, {"of": "x"}, workers=1)
    assert (tmp_path / "out" / "a").read_bytes() == b"data"


def test_another_conversion_does_not_go_on_with_it(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(OSError, match="no space"):
        convert.run([job("a", fails=True)], out, {"of": "x"})
    with pytest.raises(DestinationError, match=r"out\.partial is left from another conversion"):
        convert.run([job("a")], out, {"of": "y"})


def test_two_processes_do_not_write_one_destination(tmp_path: Path) -> None:
    def again(path: str) -> None:
        Path(path).write_bytes(b"first")
        with pytest.raises(DestinationError, match="another process is writing"):
            convert.run([job("a")], str(tmp_path / "out"), {"of": "x"})

    convert.run([convert.FileJob("a", again)], str(tmp_path / "out"), {"of": "x"})
    assert (tmp_path / "out" / "a").read_bytes() == b"first"


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(DestinationError, match="out exists already"):
        convert.run([job("a")], str(tmp_path / "out"), {})
    assert digest(tmp_path).keys() == {"out/mine"}


def test_the_source_runs_own_latest_is_left_alone(tmp_path: Path) -> None:
    shutil.copytree(ZERO2, tmp_path / "run")
    before = digest(tmp_path)
    report = Reshape.of(read(tmp_path / "run"), Mesh(dp=3)).save(tmp_path / "run" / "step_dp3")
    assert report.latest is None
    report = Reshape.of(read(tmp_path / "run"), Mesh(dp=3)).save(tmp_path / "run" / "step_universal", "universal")
    assert report.latest == str(tmp_path / "run" / "latest_universal")
    after = digest(tmp_path)
    assert {name: after[name] for name in before} == before


def test_what_is_checked_and_found_wrong_does_not_appear(tmp_path: Path) -> None:
    def check(folder: str) -> None:
        assert os.path.exists(os.path.join(folder, "a"))
        raise CkptlabError("it is wrong")

    with pytest.raises(CkptlabError, match="it is wrong"):
        convert.run([job("a")], str(tmp_path / "out"), {}, check=check)
    assert not (tmp_path / "out").exists()


SLOW = """
import sys, time
from ckptlab import convert
from ckptlab.checkpoint import Reshape
from ckptlab.formats import read
from ckptlab.mesh import Mesh
run = convert.run
def slowly(jobs, *args, **kwargs):
    def wait(job):
        return convert.FileJob(job.name, lambda path: (time.sleep(0.05), job.write(path))[1], job.nbytes)
    return run([wait(j) for j in jobs], *args, **kwargs)
convert.run = slowly
Reshape.of(read(sys.argv[1]), Mesh(tp=4)).save(sys.argv[2], workers=1)
"""


def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "run" / "step"
    out.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(GPT), str(out)])
    journal = tmp_path / "run" / "step.partial" / convert.JOURNAL
    while not (journal.exists() and len(journal.read_text().splitlines()) > 4):
        assert process.poll() is None, "it finished before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert not (tmp_path / "run" / "latest").exists()
    report = Reshape.of(read(GPT), Mesh(tp=4)).save(out)
    assert 3 < report.resumed < report.files
    assert differences(read(GPT), read(tmp_path / "run")) == []
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_what_is_written_is_read_back_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptlab.formats.deepspeed.write import NativeWriter

    reshaped = Reshape.of(read(ZERO2), Mesh(dp=3))
    monkeypatch.setattr(NativeWriter, "_shape", lambda self, tensor, tp: (1, 1))
    with pytest.raises(CkptlabError):
        reshaped.save(tmp_path / "step")
    assert not (tmp_path / "step").exists()
