"""Tasks run on threads, processes or anybody's executor: in order, few at a time, and none after a failure."""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import pytest

from ckptlab.errors import CheckpointError, InputError
from ckptlab.pool import AHEAD, Workers, progress, run
from ckptlab.stored import add_read, reading

KINDS = ("here", "threads", "default", "pool", "processes")


@pytest.fixture(params=KINDS)
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    if request.param == "pool":
        with ThreadPoolExecutor(2) as executor:
            yield executor
    elif request.param == "processes":
        yield request.getfixturevalue("processes")
    else:
        yield {"here": 1, "threads": 3, "default": None}[request.param]


def square(x: int) -> int:
    time.sleep(0.01 if x % 3 == 0 else 0)  # those that come first are not done first
    return x * x


def fails_at_seven(x: int) -> int:
    if x == 7:
        raise CheckpointError(f"a.pt: task {x} failed: copy the file again")
    return x


def reads(x: int) -> int:
    add_read(x)
    return x


@pytest.mark.slow
def test_results_come_in_the_order_of_tasks(workers: Workers) -> None:
    assert list(run(square, range(100), on=workers)) == [x * x for x in range(100)]


@pytest.mark.slow
def test_results_come_as_they_arrive_each_once(workers: Workers) -> None:
    assert sorted(run(square, range(100), on=workers, ordered=False)) == [x * x for x in range(100)]


def test_whoever_is_ready_first_comes_first_if_order_is_not_asked_for() -> None:
    first_may_end = threading.Event()

    def work(x: int) -> int:
        assert x or first_may_end.wait(10)
        return x

    results = run(work, range(5), on=2, ordered=False)
    found = [next(results) for _ in range(4)]
    first_may_end.set()
    assert sorted(found) == [1, 2, 3, 4]
    assert list(results) == [0]


def test_no_tasks_no_results() -> None:
    assert list(run(square, [], on=2)) == []


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False])
def test_a_failure_is_raised_as_it_is(workers: Workers, ordered: bool) -> None:
    with pytest.raises(CheckpointError, match=r"a\.pt: task 7 failed"):
        list(run(fails_at_seven, range(1000), on=workers, ordered=ordered))


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("on", [1, 2])
def test_after_a_failure_nothing_begins(on: int, ordered: bool) -> None:
    begun = []

    def work(x: int) -> int:
        begun.append(x)
        time.sleep(0.002)
        return fails_at_seven(x)

    with pytest.raises(CheckpointError):
        list(run(work, range(1000), on=on, ordered=ordered))
    assert len(begun) <= 8 + AHEAD * on
    count = len(begun)
    time.sleep(0.05)
    assert len(begun) == count, "what had begun was waited for"


def test_of_ordered_failures_the_first_in_order_is_raised() -> None:
    second_failed = threading.Event()

    def work(x: int) -> None:
        if x == 0:
            assert second_failed.wait(10)
        else:
            second_failed.set()
        raise CheckpointError(f"task {x}")

    with pytest.raises(CheckpointError, match="task 0"):
        list(run(work, range(20), on=2))


def test_another_s_executor_stays_open_and_its_waiting_tasks_are_cancelled() -> None:
    class Slow(Executor):
        def __init__(self) -> None:
            self.futures: list[Future[Any]] = []

        def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
            self.futures.append(Future())
            if len(self.futures) == 1:
                self.futures[0].set_exception(CheckpointError("the first"))
            return self.futures[-1]

    slow = Slow()
    with pytest.raises(CheckpointError, match="the first"):
        list(run(square, range(1000), on=slow))
    assert 1 < len(slow.futures) < 1000
    assert all(future.cancelled() for future in slow.futures[1:])
    with ThreadPoolExecutor(1) as threads:
        assert list(run(square, [2], on=threads)) == [4]
        assert threads.submit(square, 3).result() == 9


def test_an_interrupt_cancels_the_rest() -> None:
    begun = []

    def work(x: int) -> int:
        begun.append(x)
        if x == 3:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        time.sleep(0.01)
        return x

    # a shell's background jobs ignore it, and so would Python
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run(work, itertools.count(), on=2))
    finally:
        signal.signal(signal.SIGINT, before)
    assert 4 <= len(begun) < 40
    assert not [t for t in threading.enumerate() if t.name.startswith("ckptlab_")]


def test_a_caller_that_wants_no_more_ends_it() -> None:
    begun = []
    results = run(lambda x: begun.append(x), itertools.count(), on=2)
    assert next(results) is None
    results.close()  # type: ignore[attr-defined]
    count = len(begun)
    time.sleep(0.02)
    assert len(begun) == count
    assert not [t for t in threading.enumerate() if t.name.startswith("ckptlab_")]


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [True, False])
def test_few_tasks_are_taken_before_results_are_asked_for(workers: Workers, ordered: bool) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for x in range(1 << 20):
            taken += 1
            yield x

    results = run(square, tasks(), on=workers, ordered=ordered)
    for asked in range(1, 30):
        next(results)
        assert taken <= asked + AHEAD * max(3, os.cpu_count() or 1)
    results.close()  # type: ignore[attr-defined]


def test_what_tasks_read_is_counted_by_whoever_asked_for_it(workers: Workers) -> None:
    with reading() as outer:
        with reading() as read:
            list(run(reads, range(100), on=workers))
        assert read.bytes == sum(range(100))
        add_read(1)
    assert outer.bytes == sum(range(100)) + 1
    assert read.bytes == sum(range(100))


def test_other_threads_reading_is_not_counted() -> None:
    with reading() as read:
        thread = threading.Thread(target=add_read, args=(5,))
        thread.start()
        thread.join()
    assert read.bytes == 0


@pytest.mark.parametrize("on", [1, 2])
def test_the_bar_stands_where_results_arrive(on: int) -> None:
    class Bar:
        n = 0

        def update(self, size: int) -> None:
            assert threading.current_thread() is threading.main_thread()
            self.n += size

    by_size, by_one = Bar(), Bar()
    for done, _ in enumerate(run(square, range(10), on=on, bar=by_size, size=lambda x: 2 * x)):  # type: ignore[arg-type]
        assert by_size.n == done * (done + 1)
    list(run(square, range(10), on=on, bar=by_one))  # type: ignore[arg-type]
    assert by_one.n == 10


def test_a_bar_is_shown_on_stderr_if_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    for shown in (False, True):
        with progress(10, "squaring", " elements", shown) as bar:
            list(run(square, range(10), on=1, bar=bar))
        out, err = capfd.readouterr()
        assert not out
        assert ("squaring" in err) is shown


@pytest.mark.parametrize("count", [0, -1])
def test_fewer_than_one_worker_is_refused(count: int) -> None:
    with pytest.raises(InputError, match=f"on={count}: expected how many threads, 1 to 4096"):
        list(run(square, [1], on=count))


@pytest.mark.parametrize("most", [0, 1, 2])
def test_threads_that_cannot_be_started_are_done_without(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    started, real = [0], threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if started[0] >= most:
            raise RuntimeError("can't start new thread")
        started[0] += 1
        real(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    assert list(run(square, range(40), on=8)) == [x * x for x in range(40)]
    assert started[0] == most
