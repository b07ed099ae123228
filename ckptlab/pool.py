"""Running tasks: on threads of our own, or on any `concurrent.futures.Executor`, of processes or of a cluster.

What runs is a function of a module and a picklable value, and what comes back is a value: progress, journals and sums
stand where results arrive, and know nothing of threads.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from ckptlab import paths
from ckptlab.errors import CkptlabError, InputError
from ckptlab.stored import add_read, reading_apart

if TYPE_CHECKING:
    from tqdm import tqdm

T = TypeVar("T")
R = TypeVar("R")


@runtime_checkable
class Client(Protocol):
    """A client of dask.distributed."""

    @property
    def loop(self) -> Any: ...

    def submit(self, func: Callable[..., Any], *args: Any, pure: bool, **kwargs: Any) -> Any: ...

    def gather(self, futures: Any, *, asynchronous: bool) -> Awaitable[Any]: ...

    def nthreads(self) -> Mapping[str, int]: ...


# threads, or what runs tasks, here or on a cluster; None: as many threads as there are cores
Workers = int | Executor | Client | None

AHEAD = 8  # tasks for each worker that are begun, or done, and not yet asked for
_MOST = 1 << 12  # threads that are believed to be meant
_UNKNOWN = 16  # workers of an executor that does not say how many it has (a cluster's may grow)
_SENT = 4  # times that a cluster is given a task that it forgets


def run(
    work: Callable[[T], R],
    tasks: Iterable[T],
    *,
    on: Workers = None,
    size: Callable[[T], int] | None = None,
    bar: tqdm[Any] | None = None,
    ordered: bool = True,
) -> Iterator[R]:
    """The result of `work` on each task, as they arrive; in the order of the tasks if `ordered`.

    work, tasks: a function of a module (or a `functools.partial` of one) and picklable values, so that any executor can
    run them; `tasks` may be endless, few are taken at a time. on: how many threads (1: the caller's own), an executor
    or a client of dask.distributed, which stays open, or None for as many threads as there are cores. bar: a tqdm that
    moves on by `size` of the task (None: by one) as its result arrives. What tasks read from files counts for
    the caller's `reading`.

    The first failure, an interrupt, or a caller that wants no more, cancels what has not begun and waits for what has.
    If tasks fail, of ordered ones the first in order is raised.
    """
    options = paths.options_known()
    with _executor(on) as (executor, ahead):
        todo = iter(tasks)
        held: dict[Future[tuple[R, int]], T] = {}
        try:
            while True:
                for task in islice(todo, ahead - len(held)):
                    held[executor.submit(_metered, work, task, options)] = task
                if not held:
                    return
                arrived = [next(iter(held))] if ordered else wait(held, return_when=FIRST_COMPLETED).done
                for future in arrived:
                    result, nbytes = future.result()
                    task = held.pop(future)
                    add_read(nbytes)
                    if bar is not None:
                        bar.update(1 if size is None else size(task))
                    yield result
        finally:
            wait([future for future in held if not future.cancel()])


def _metered(work: Callable[[T], R], task: T, options: dict[str, dict[str, Any]]) -> tuple[R, int]:
    """The result, and the bytes that were read for it, which nobody else counts if this is another process. options: of
    far file systems."""
    paths.options_told(options)
    with reading_apart() as read:
        result = work(task)
    return result, read.bytes


def executor_of(on: Workers) -> Executor | int | None:
    """What `on` means: a client of dask.distributed stands for all of its workers."""
    if isinstance(on, int | np.integer):
        return int(on)
    if isinstance(on, Executor | None):
        return on
    return _Cluster(on)


@contextmanager
def _executor(on: Workers) -> Iterator[tuple[Executor, int]]:
    """What runs the tasks, and how many it is given at a time."""
    given = executor_of(on)
    if isinstance(given, Executor):
        known = sum(on.nthreads().values()) if isinstance(on, Client) else getattr(on, "_max_workers", None) or 0
        yield given, AHEAD * (known or _UNKNOWN)
        return
    count = os.cpu_count() or 1 if given is None else given
    if not 1 <= count <= _MOST:
        raise InputError(f"on={on}: expected how many threads, 1 to {_MOST}, or a concurrent.futures.Executor")
    if count == 1:
        yield _Here(), 1
        return
    with _Threads(count, "ckptlab") as threads:
        try:
            threads.submit(bool)
        except RuntimeError:  # not even one
            yield _Here(), 1
        else:
            yield threads, AHEAD * count


class _Threads(ThreadPoolExecutor):
    """Where the machine gives no further thread (memory, address space, ulimit -u), those that there are do it all."""

    def _adjust_thread_count(self) -> None:
        try:
            super()._adjust_thread_count()
        except RuntimeError:
            if not self._threads:
                raise


class _Cluster(Executor):
    """The workers of a client of dask.distributed, which take up what a worker that died had begun.

    A task whose worker dies after saying that it is done, and before its result is fetched, may be forgotten by the
    scheduler: the client calls it cancelled then, and its own executor raises or never answers. It is sent again.
    """

    def __init__(self, client: Client) -> None:
        self._client = client

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        future: Future[R] = Future()
        send = partial(self._client.submit, fn, *args, pure=False, **kwargs)
        self._client.loop.add_callback(self._answer, future, send(), send)
        return future

    async def _answer(self, future: Future[R], sent: Any, send: Callable[[], Any]) -> None:
        """Give `future` what comes of `sent`, on the client's loop."""
        try:
            for more in reversed(range(_SENT)):
                future.add_done_callback(partial(_no_more, sent))
                try:
                    result = await self._client.gather(sent, asynchronous=True)
                    break
                except CancelledError as error:
                    if future.cancelled() or not more:
                        told = f"dask.distributed gave up a task {_SENT} times ({error})"
                        raise CkptlabError(f"{told}: see whether its scheduler and its workers are up") from error
                    sent = send()
        except BaseException as error:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
        else:
            if future.set_running_or_notify_cancel():
                future.set_result(result)


def _no_more(sent: Any, future: Future[Any]) -> None:
    if future.cancelled():
        sent.cancel()


class _Here(Executor):
    """The caller's own thread: a task is run when it is handed in, and an interrupt is in the midst of it."""

    def submit(self, fn: Callable[..., R], /, *args: Any, **kwargs: Any) -> Future[R]:
        future: Future[R] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


@contextmanager
def progress(total: int, what: str, unit: str, shown: bool) -> Iterator[tqdm[Any] | None]:
    """A bar on stderr for `total` units (" elements", "B"), to be given to `run`; None if it is not to be shown."""
    if not shown:
        yield None
        return
    from tqdm.auto import tqdm  # slow to import

    with tqdm(total=total, unit=unit, unit_scale=True, desc=what, leave=False) as bar:
        yield bar
