"""A destination appears whole or not at all; a conversion that was killed goes on where it stopped."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compare import DATA, GPT, ZERO2, ZERO3, differences, digest

from ckptlab import convert
from ckptlab.arrays import Partition
from ckptlab.convert import execute
from ckptlab.convert.journal import Journal
from ckptlab.errors import CkptlabError, DestinationError
from ckptlab.formats import fileplan, read
from ckptlab.formats.deepspeed.format import DeepSpeed
from ckptlab.formats.fileplan import Elements, FilePlan, Literal
from ckptlab.formats.safetensors.write import files as safetensors_files
from ckptlab.formats.torch import torchfile
from ckptlab.mesh import Mesh
from ckptlab.reshaping import Reshape
from ckptlab.sharding.strategies import resolve


@dataclass(frozen=True)
class Drawn:
    """Gives bytes, and does something else first."""

    content: bytes
    first: Callable[[], object] = bool

    def chunks(self, lo: int, hi: int) -> Iterator[np.ndarray]:
        self.first()
        yield np.frombuffer(self.content, np.uint8)[lo:hi]


def no_space() -> None:
    raise OSError("no space left on device")


def planned(name: str, content: bytes = b"data", first: Callable[[], object] = bool) -> FilePlan:
    drawn = Elements(Drawn(content, first), np.dtype(np.uint8), 0, len(content))
    return FilePlan(name, (drawn,), nbytes=len(content))


def test_all_files_then_the_name(tmp_path: Path) -> None:
    report = convert.run(
        [planned("a"), planned("deep/b", b"more")], str(tmp_path / "out"), {"of": "x"}, latest="latest"
    )
    assert (report.files, report.resumed, report.bytes_written) == (2, 0, 8)
    assert digest(tmp_path).keys() == {"out/a", "out/deep/b", "out/ckptlab-manifest.json", "latest"}
    assert (tmp_path / "latest").read_text() == "out"


def test_a_failure_leaves_no_destination_and_the_repeat_goes_on(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(OSError, match="no space"):
        convert.run([planned("a"), planned("b", first=no_space)], out, {"of": "x"}, on=1)
    assert not os.path.exists(out)
    assert not (tmp_path / "out.partial" / "b").exists()
    report = convert.run([planned("a"), planned("b")], out, {"of": "x"}, on=1)
    assert report.resumed == 1
    assert digest(tmp_path).keys() == {"out/a", "out/b", "out/ckptlab-manifest.json"}


def test_a_file_that_was_cut_since_is_written_again(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(OSError, match="no space"):
        convert.run([planned("a"), planned("b", first=no_space)], out, {"of": "x"}, on=1)
    (tmp_path / "out.partial" / "a").write_bytes(b"d")
    convert.run([planned("a"), planned("b")], out, {"of": "x"}, on=1)
    assert (tmp_path / "out" / "a").read_bytes() == b"data"


def test_another_conversion_does_not_go_on_with_it(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(OSError, match="no space"):
        convert.run([planned("a", first=no_space)], out, {"of": "x"})
    with pytest.raises(DestinationError, match=r"out\.partial is left from another conversion"):
        convert.run([planned("a")], out, {"of": "y"})


@pytest.mark.parametrize("options", [{"strategy": {r"2\..*dense\.weight": "(tp out) in"}}, {"dtype": "fp16"}], ids=str)
def test_a_conversion_to_other_layouts_or_dtypes_is_another(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first had written, of the same size, was once taken for the second's."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    source = read(GPT)
    with monkeypatch.context() as patched:
        patched.setattr(DeepSpeed, "verify", interrupted)
        with pytest.raises(KeyboardInterrupt):
            Reshape.of(source, Mesh(tp=2), "deepspeed").save(tmp_path / "step")
    with pytest.raises(DestinationError, match="is left from another conversion"):
        Reshape.of(source, Mesh(tp=2), "deepspeed", **options).save(tmp_path / "step")
    again = read(GPT, strategy=resolve({r"2\..*dense\.weight": "(tp out) in"}))
    with pytest.raises(DestinationError, match="is left from another conversion"):
        Reshape.of(again, Mesh(tp=2), "deepspeed").save(tmp_path / "step")
    report = Reshape.of(read(GPT), Mesh(tp=2), "deepspeed").save(tmp_path / "step")
    assert report.resumed == report.files


def test_two_processes_do_not_write_one_destination(tmp_path: Path) -> None:
    def again() -> None:
        with pytest.raises(DestinationError, match="another process is writing"):
            convert.run([planned("a")], str(tmp_path / "out"), {"of": "x"})

    convert.run([planned("a", b"first", again)], str(tmp_path / "out"), {"of": "x"})
    assert (tmp_path / "out" / "a").read_bytes() == b"first"


def test_an_existing_destination_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    with pytest.raises(DestinationError, match="out exists already"):
        convert.run([planned("a")], str(tmp_path / "out"), {})
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
        convert.run([planned("a")], str(tmp_path / "out"), {}, check=check)
    assert not (tmp_path / "out").exists()


SLOW = """
import sys, time
from ckptlab.reshaping import Reshape
from ckptlab.convert import execute
from ckptlab.formats import read
from ckptlab.formats.fileplan import Piece
from ckptlab.mesh import Mesh
execute.PIECE = 4096
write = Piece.write
Piece.write = lambda *args: (time.sleep(0.05), write(*args))[1]
Reshape.of(read(sys.argv[1]), Mesh(tp=4)).save(sys.argv[2], on=1)
"""


@pytest.mark.slow
def test_a_killed_conversion_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "run" / "step"
    out.parent.mkdir()
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(GPT), str(out)])
    journal = tmp_path / "run" / "step.partial" / convert.JOURNAL
    while not (journal.exists() and journal.read_text().count('"file"') > 3):
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


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path: Path) -> None:
    """A few; a hundred, of 1.2 GB, are run by hand."""
    script = Path(__file__).parents[1] / "benchmarks" / "kills.py"
    command = [sys.executable, str(script), str(GPT / "global_step3"), "--kills", "4"]
    done = subprocess.run(command, env={**os.environ, "TMPDIR": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_what_is_written_is_read_back_before_it_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptlab.formats.deepspeed.write import NativeWriter

    reshaped = Reshape.of(read(ZERO2), Mesh(dp=3))
    monkeypatch.setattr(NativeWriter, "_shape", lambda self, tensor, tp: (1, 1))
    with pytest.raises(CkptlabError):
        reshaped.save(tmp_path / "step")
    assert not (tmp_path / "step").exists()


CASES = [GPT, DATA / "plain_zero1_dp2_steps" / "global_step2", ZERO2, ZERO3]
FORMATS = ["deepspeed", "universal", "safetensors", "dcp"]


def plans_of(case: Path, form: str) -> list[FilePlan]:
    source = read(case)
    if form == "safetensors":
        return list(safetensors_files(source, None, 10_000))
    return list(Reshape.of(source, Mesh(tp=2 if case == GPT else 1, dp=3), form).files)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.relative_to(DATA)))
def test_every_plan_travels_is_small_and_says_what_is_written(case: Path, form: str, tmp_path: Path) -> None:
    for i, plan in enumerate(plans_of(case, form)):
        travelled = pickle.dumps(plan)
        drawn = [part.reader for part in plan.parts if isinstance(part, Elements)]
        tensors = sum(len(r.group.names) if isinstance(r, Partition) else 1 for r in drawn)
        literal = sum(part.nbytes for part in plan.parts if isinstance(part, Literal))
        assert len(travelled) < literal + 4096 + 512 * tensors, plan.name
        here, there = tmp_path / f"{i}", tmp_path / f"{i} again"
        fileplan.write(plan, here)
        fileplan.write(pickle.loads(travelled), there)
        assert here.stat().st_size == plan.size
        assert here.read_bytes() == there.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_whoever_writes_it_writes_the_same_bytes(
    form: str, tmp_path: Path, processes: Executor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker writes files whole; the others write them in pieces, whose checksums are put together."""
    made = {}
    for label, workers in {"1": 1, "2": 2, "8": 8, "processes": processes}.items():
        out = tmp_path / label
        Reshape.of(read(GPT), Mesh(tp=2, dp=3)).save(out / "step", form, on=workers)
        made[label] = digest(out)
        monkeypatch.setattr(execute, "PIECE", 4096)
    assert made["1"] == made["2"] == made["8"] == made["processes"]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["deepspeed", "universal", "dcp"])
def test_a_conversion_says_how_many_bytes_of_tensors_it_writes(form: str, tmp_path: Path) -> None:
    reshaped = Reshape.of(read(GPT), Mesh(tp=2, dp=3), form)
    report = reshaped.save(tmp_path / "step")
    assert report.bytes_written == sum(plan.nbytes for plan in plans_of(GPT, form)) == reshaped.cost().written


@pytest.mark.slow
def test_the_content_of_a_file_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    plan = torchfile.plan
    monkeypatch.setattr(torchfile, "plan", lambda name, content: (made.append(name), plan(name, content))[1])
    reshaped = Reshape.of(read(ZERO2), Mesh(dp=3))
    repr(reshaped)
    assert reshaped.file_sizes.keys() == {plan.name for plan in reshaped.files}
    report = reshaped.save(tmp_path / "step")
    assert len(made) == len(set(made)) == report.files


def test_what_a_worker_writes_too_late_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that ran twice may make the temporary file of one that is complete again."""
    complete = Journal.complete

    def late(self: Journal, name: str, done: Any) -> None:
        complete(self, name, done)
        (Path(self.partial) / f"{name}.tmp").write_bytes(b"late")

    monkeypatch.setattr(Journal, "complete", late)
    Reshape.of(read(GPT), Mesh(tp=4)).save(tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.tmp"))
