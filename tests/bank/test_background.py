import threading

import pytest

from tl_latentlens.bank.background import BackgroundWrites


def fail(message: str) -> None:
    raise ValueError(message)


def test_tasks_run_in_order_on_one_thread() -> None:
    writes, done = BackgroundWrites("writes", max_pending=2), []
    for number in range(20):
        writes.submit(lambda number: done.append((number, threading.current_thread().name)), number)
    writes.close()
    writes.raise_finished_errors()
    assert done == [(number, "writes_0") for number in range(20)]


def test_no_more_wait_than_are_allowed() -> None:
    writes, may_run = BackgroundWrites("writes", max_pending=2), threading.Event()
    for _ in range(2):
        writes.submit(may_run.wait)
    third = threading.Thread(target=writes.submit, args=(may_run.wait,))
    third.start()
    third.join(0.1)
    assert third.is_alive()
    writes.raise_finished_errors()  # waits for none
    may_run.set()
    third.join()
    writes.close()


def test_a_failed_task_fails_every_later_call() -> None:
    writes = BackgroundWrites("writes", max_pending=1)
    writes.submit(fail, "disk")
    for _ in range(2):
        with pytest.raises(ValueError, match="disk"):
            writes.submit(fail, "another")
    with pytest.raises(ValueError, match="disk"):
        writes.raise_finished_errors()
    writes.close()
    with pytest.raises(ValueError, match="disk"):
        writes.raise_finished_errors()
