"""Work in the background: one thread that runs tasks in the order in which they were submitted."""

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Any


class BackgroundWrites:
    """A thread that stores rows or writes blocks while the model runs.

    A task that failed stays among the pending ones, so every later call raises its error too.
    """

    def __init__(self, name: str, max_pending: int) -> None:
        """Start no thread yet; the first task does.

        Args:
            name: Of the thread.
            max_pending: Most tasks that wait or run at a time.
        """
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._max_pending = max_pending
        self._pending: deque[Future[None]] = deque()
        self._lock = Lock()  # One thread may submit while another looks for errors.

    def submit(self, task: Callable[..., None], *arguments: Any) -> None:
        """Run a task after those submitted before; wait while as many as `max_pending` are not done.

        Raises:
            Exception: The error of an earlier task.
        """
        while len(self._pending) >= self._max_pending:
            self._pending[0].result()
            with self._lock:
                self._pending.popleft()
        with self._lock:
            self._pending.append(self._thread.submit(task, *arguments))

    def raise_finished_errors(self) -> None:
        """Raise the error of the first task that has failed so far; waits for none."""
        with self._lock:
            pending = list(self._pending)
        for future in pending:
            if future.done():
                future.result()

    def close(self) -> None:
        """Wait for all tasks and end the thread; raises none of their errors."""
        self._thread.shutdown()
