"""Functions that run in a process of their own, forked from one that has imported what they need, so it starts at once."""

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

process_context = multiprocessing.get_context("forkserver")
process_context.set_forkserver_preload(["support.preloaded"])


class Ended(NamedTuple):
    """What became of a process.

    Attributes:
        code: Its exit code; negative: the signal that ended it.
        out: What it printed.
        err: What it printed as errors.
    """

    code: int
    out: str
    err: str


def run_fresh(
    function: Callable[..., None],
    *arguments: Any,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout: float = 300,
) -> Ended:
    """Call a function of a module in a process that nothing else has run in, and wait for its end.

    Args:
        function: Importable by name, with arguments that can be pickled.
        arguments: For it.
        env: Environment variables to set beside those of the tests.
        cwd: Where to run.
        timeout: Seconds after which it is killed.
    """
    with start_fresh(function, *arguments, env=env, cwd=cwd) as process:
        return process.end(timeout)


class Started(NamedTuple):
    """A process that runs.

    Attributes:
        process: The process itself.
        streams: The files of what it prints, and of what it prints as errors.
    """

    process: Any
    streams: list[Path]

    @property
    def pid(self) -> int:
        """Its number."""
        return self.process.pid

    @property
    def is_alive(self) -> bool:
        """True while it runs."""
        return self.process.is_alive()

    def end(self, timeout: float = 300) -> Ended:
        """Wait for its end, which comes after so many seconds at the latest."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        return Ended(self.process.exitcode, *(stream.read_text() for stream in self.streams))


@contextmanager
def start_fresh(
    function: Callable[..., None], *arguments: Any, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Iterator[Started]:
    """As `run_fresh`, while the process runs."""
    with TemporaryDirectory() as folder:
        streams = [Path(folder) / "out", Path(folder) / "err"]
        process = process_context.Process(
            target=_enter, args=(function, arguments, {**os.environ, **(env or {})}, cwd, streams)
        )
        process.start()
        yield Started(process, streams)


def _enter(
    function: Callable[..., None], arguments: tuple[Any, ...], env: dict[str, str], cwd: Path | None, streams: list[Path]
) -> None:
    for descriptor, stream in zip((1, 2), streams, strict=True):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ.clear()
    os.environ.update(env)
    if cwd is not None:
        os.chdir(cwd)
    code = 0
    try:
        function(*arguments)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
