"""Many machines: workers of dask.distributed, here processes, one of them killed in the middle; views of dask."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptlab
from ckptlab import pool
from ckptlab.convert import execute
from ckptlab.convert.journal import Journal
from ckptlab.formats.torch import torchfile

distributed = pytest.importorskip("distributed")
GPT = Path(__file__).parent.parent / "data/gpt_tp2_pp2_dp2"
QKV = "self_attention.query_key_value.weight"


@pytest.fixture(scope="module")
def client() -> Iterator[Any]:
    cluster = distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1"
    )
    with cluster, distributed.Client(cluster, set_as_default=False) as found:
        yield found


def _die(number: int) -> None:
    os.kill(os.getpid(), number)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.slow
def test_a_worker_that_is_killed_in_the_middle_changes_nothing(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reshape = ckptlab.open(GPT).reshape(tp=4, pp=1, dp=2)
    reshape.save(tmp_path / "here")
    monkeypatch.setattr(execute, "PIECE", 4096)
    before = client.run(os.getpid)
    arrived: list[str] = []
    note = Journal.piece

    def noted(self: Journal, name: str, *told: Any) -> None:
        if not arrived:
            os.kill(next(iter(before.values())), signal.SIGKILL)
        arrived.append(name)
        note(self, name, *told)

    monkeypatch.setattr(Journal, "piece", noted)
    report = reshape.save(tmp_path / "there", on=client)
    assert report.verified > 0
    assert len(arrived) > 100
    client.wait_for_workers(2)
    assert set(client.run(os.getpid).values()) != set(before.values())  # it was killed, and another took its place
    assert contents(tmp_path / "here") == contents(tmp_path / "there")


@pytest.mark.slow
@pytest.mark.parametrize("forgotten", [1, 3, 4])
def test_a_task_that_the_scheduler_forgets_is_sent_again_and_given_up_with_one_error(
    client: Any, monkeypatch: pytest.MonkeyPatch, forgotten: int
) -> None:
    from distributed.client import FutureCancelledError

    gather, asked = client.gather, []

    def gathered(futures: Any, **options: Any) -> Any:
        asked.append(futures.key)
        if len(asked) <= forgotten:
            raise FutureCancelledError(futures.key, None)
        return gather(futures, **options)

    monkeypatch.setattr(client, "gather", gathered)
    if forgotten < 4:
        assert list(pool.run(abs, [-5], on=client)) == [5]
    else:
        with pytest.raises(ckptlab.CkptlabError, match=r"gave up a task 4 times \(.* cancelled.*scheduler"):
            list(pool.run(abs, [-5], on=client))
    assert len(set(asked)) == min(forgotten + 1, 4)


@pytest.mark.slow
def test_data_never_passes_through_the_client(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    submit, gather = client.submit, client.gather

    def submitted(work: Any, *args: Any, **options: Any) -> Any:
        sizes.append(len(pickle.dumps((work, args))))
        return submit(work, *args, **options)

    async def gathered(futures: Any, **options: Any) -> Any:
        result = await gather(futures, **options)
        sizes.append(len(pickle.dumps(result)))
        return result

    monkeypatch.setattr(client, "submit", submitted)
    monkeypatch.setattr(client, "gather", gathered)
    (tmp_path / "source").mkdir()
    large = {f"{i}.weight": np.random.default_rng(i).normal(size=(512, 512)).astype(np.float32) for i in range(8)}
    torchfile.write(tmp_path / "source/pytorch_model.bin", large)
    ckptlab.save_weights(ckptlab.open(tmp_path / "source"), tmp_path / "new", on=client)
    assert len(sizes) > 0
    assert sum(sizes) < 100_000  # of 8 MiB
    found = ckptlab.open(tmp_path / "new").full(stack=False)
    assert all(np.array_equal(found[name].master, array) for name, array in large.items())


@pytest.mark.slow
def test_what_is_found_is_the_same_on_a_cluster(client: Any) -> None:
    here, there = (ckptlab.stats(GPT, on=on) for on in (1, client))
    assert here.drop_attrs().equals(there.drop_attrs())
    assert ckptlab.check(GPT, checksums=True, on=client).verdict == ckptlab.check(GPT, checksums=True).verdict
    assert ckptlab.diff(GPT, GPT / "universal", on=client).equal
    ckpt = ckptlab.open(GPT)
    assert ckptlab.updates(ckpt, on=client).drop_attrs().equals(ckptlab.updates(ckpt).drop_attrs())
    with ckptlab.reading() as read:
        ckptlab.stats(GPT, on=client)
    with ckptlab.reading() as alone:
        ckptlab.stats(GPT, on=1)
    assert read.bytes == alone.bytes > 0


@pytest.mark.slow
def test_the_command_line_takes_a_scheduler(client: Any, tmp_path: Path) -> None:
    address = client.scheduler.address

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ckptlab", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    found = run("convert", str(GPT), str(tmp_path / "there"), "--to", "deepspeed", "--tp", "4", "--scheduler", address)
    assert found.returncode == 0, found.stderr
    ckptlab.open(GPT).reshape(tp=4).save(tmp_path / "here")
    assert contents(tmp_path / "here") == contents(tmp_path / "there")
    none = run("check", str(GPT), "--scheduler", "tcp://127.0.0.1:1")
    assert none.returncode == 2
    assert "ckptlab: tcp://127.0.0.1:1: no scheduler of dask.distributed answers there" in none.stderr


@pytest.mark.slow
def test_a_cluster_that_gives_up_is_said_so(client: Any) -> None:
    from ckptlab import pool
    from ckptlab.cli.given import workers_of

    client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 0))
    gives_up = pytest.raises(ckptlab.CkptlabError, match=r"^tcp://.*: the cluster gave up: .*repeat the command")
    with gives_up, workers_of(client.scheduler.address) as on:
        list(pool.run(_die, [signal.SIGKILL], on=on))
    client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, "allowed_failures", 3))


@pytest.mark.slow
def test_views_are_read_by_the_workers(client: Any) -> None:
    ckpt = ckptlab.open(GPT)
    tree = ckpt.full(["master", "exp_avg"], chunks={})
    assert tree[QKV].master.chunks == ((1, 1, 1, 1), (48,), (16,))
    with ckptlab.reading() as read:
        means = client.compute(tree[QKV].to_dataset().mean(["out", "in"])).result()
    assert read.bytes == 0
    np.testing.assert_allclose(means.master, ckpt.full()[QKV].master.mean(["out", "in"]), rtol=1e-6)


@pytest.mark.slow
def test_views_in_chunks_give_the_same_or_are_refused() -> None:
    pytest.importorskip("dask")
    ckpt = ckptlab.open(GPT)
    for view in (ckpt.full, ckpt.shards, ckpt.reshape(tp=4).shards):
        mine, theirs = view("master"), view("master", chunks={"layer": 2, "tp": 1})
        for node in mine.leaves:
            other = theirs[node.path]
            assert other.master.chunks is not None
            assert other.attrs == node.attrs
            np.testing.assert_array_equal(other.master, node.master)
    assert theirs.attrs == mine.attrs
    flat = ckpt.flat(dtype="float32", chunks={"flat": 100})["pp0/group0"]
    assert flat.master.chunks[-1][0] == 100
    np.testing.assert_array_equal(flat.master, ckpt.flat()["pp0/group0"].master)
    by_name = ckpt.full("master", stack=False, chunks="auto")
    assert by_name[f"4.{QKV}"].chunks == ((48,), (16,))
    with pytest.raises(
        TypeError,
        match=r'^tied_modules.*: param: dask would add up bfloat16 .* dtype="float32"$',
    ):
        ckpt.full("param", chunks={})
    with pytest.raises(TypeError, match=r'backend="numpy"$'):
        ckpt.full("master", backend="torch", chunks={})
    wide = ckpt.full("param", dtype="float32", chunks={})[QKV].param
    np.testing.assert_array_equal(wide, ckpt.full("param", dtype="float32")[QKV].param)
