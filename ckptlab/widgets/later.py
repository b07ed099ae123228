"""Work that takes seconds, done beside the kernel's own so that sliders and clicks go on answering."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Later:
    """One piece of work at a time; what still waits when newer work comes is never begun."""

    def __init__(self) -> None:
        self._worker = ThreadPoolExecutor(1, "ckptlab-later")
        self.last: Future[None] | None = None

    def do(self, work: Callable[[], None]) -> None:
        if self.last is not None:
            self.last.cancel()
        self.last = self._worker.submit(work)
