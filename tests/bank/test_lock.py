"""One builder a path: the others are refused by name, what dead ones left is taken over, and nobody overwrites anybody."""

import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
from support.banks import StopBuildError, activations, at_most, fill, give, make_record, make_rows
from support.processes import as_nobody

import tl_latentlens as tll
from tl_latentlens.bank import build as build_module
from tl_latentlens.bank import create as create_module
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.lock import build_lock
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.errors import BankError

PLAN = make_rows()
# The package's __init__ would import torch.
QUICK = f"""
import sys, types
package = types.ModuleType("tl_latentlens")
package.__path__ = [{str(Path(tll.__file__).parent)!r}]
sys.modules["tl_latentlens"] = package
from pathlib import Path
from tl_latentlens.errors import BankError
from tl_latentlens.bank.lock import build_lock
"""


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@contextmanager
def child(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another process; when its first line comes, it is where the test wants it. It is killed at the end."""
    with subprocess.Popen(
        [sys.executable, "-B", "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLD = (
    QUICK
    + """
with build_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.readline()
print("free", flush=True)
"""
)


# Who is refused, and why


def test_second_holder_in_one_process_is_refused_by_name(tmp_path: Path) -> None:
    with build_lock(tmp_path / "a.h5"):
        with pytest.raises(BankError) as caught, build_lock(tmp_path / "a.h5"):
            pass
        assert names(tmp_path) == ["a.h5.lock"]
        with pytest.raises(BankError), build_lock(tmp_path / "a.h5"):
            pass
    said = re.fullmatch(
        rf"{tmp_path}/a\.h5 is being built by process {os.getpid()} on {re.escape(socket.gethostname())} since (\S+ \S+); "
        "wait for it or choose another path",
        str(caught.value),
    )
    assert said, caught.value
    since = datetime.fromisoformat(said[1])
    assert timedelta(seconds=-2) < datetime.now().astimezone() - since < timedelta(minutes=1)
    assert names(tmp_path) == []


def test_holder_in_another_process_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    with child(HOLD, path) as other:
        assert first_line(other) == "held"
        with pytest.raises(BankError, match=rf"is being built by process {other.pid} on .* since \d{{4}}-"), build_lock(path):
            pass
        with pytest.raises(BankError, match=rf"a\.h5 is being built by process {other.pid} on "):
            fill(path, PLAN)
        assert names(tmp_path) == ["a.h5.lock"]
        other.communicate("go\n")
        assert other.returncode == 0
    assert names(tmp_path) == []
    fill(path, PLAN)
    assert names(tmp_path) == ["a.h5"]


def test_second_writer_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    path, acts = tmp_path / "a.h5", activations(PLAN)
    with BankWriter.create(path, PLAN, make_record(PLAN)) as writer:
        with pytest.raises(BankError, match=f"a\\.h5 is being built by process {os.getpid()} "):
            BankWriter.create(path, PLAN, make_record(PLAN))
        for batch in writer.batches():
            give(writer, batch, acts)
    Bank.open(path).verify()
    assert names(tmp_path) == ["a.h5"]


def test_a_holder_that_has_not_said_its_name_is_another_process(tmp_path: Path) -> None:
    descriptor = os.open(tmp_path / "a.h5.lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with pytest.raises(BankError, match="is being built by another process; wait"), build_lock(tmp_path / "a.h5"):
            pass
    finally:
        os.close(descriptor)


def test_builders_of_two_paths_do_not_meet(tmp_path: Path) -> None:
    with build_lock(tmp_path / "a.h5"), build_lock(tmp_path / "b.h5"):
        assert names(tmp_path) == ["a.h5.lock", "b.h5.lock"]
        fill(tmp_path / "c.h5", PLAN)
    assert names(tmp_path) == ["c.h5"]


def test_build_bank_is_refused_before_it_plans(any_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> NoReturn:
        raise AssertionError("the corpus was planned")

    def texts() -> Iterator[str]:
        pytest.fail("the corpus was read")
        yield "never"

    monkeypatch.setattr(build_module, "plan_corpus", fail)
    monkeypatch.setattr(build_module, "record_model", fail)
    with (
        build_lock(tmp_path / "a.h5"),
        pytest.raises(BankError, match=rf"a\.h5 is being built by process {os.getpid()} on .* wait for it"),
    ):
        tll.build_bank(any_model, texts(), tmp_path / "a.h5", progress=False)
    assert names(tmp_path) == []


# What is left behind, and by whom


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, BankError])
def test_lock_goes_with_its_holder(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with build_lock(tmp_path / "a.h5"):
            assert names(tmp_path) == ["a.h5.lock"]
            raise error("stop")

    for _ in range(2):
        with pytest.raises(error, match="stop"):
            interrupted()
        assert names(tmp_path) == []


def test_lock_goes_with_every_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.h5"
    path.write_text("mine")
    with pytest.raises(BankError, match="exists already"):
        fill(path, PLAN)
    assert names(tmp_path) == ["a.h5"]
    path.unlink()
    with pytest.raises(StopBuildError):
        fill(path, PLAN, stop_after=0)
    with pytest.raises(BankError, match="cannot be resumed"):
        fill(path, PLAN, dtype="float32")
    assert names(tmp_path) == ["a.h5.partial"]
    partial_path(path).unlink()
    monkeypatch.setattr(create_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(BankError, match="no space"):
        fill(path, PLAN)
    assert names(tmp_path) == []


@pytest.mark.parametrize("text", ["process 999999999 on elsewhere since 2001-01-01 00:00:00+00:00", "", "x" * 5000, "\0\xff"])
def test_stale_lock_file_is_taken_over(tmp_path: Path, text: str) -> None:
    lock = tmp_path / "a.h5.lock"
    lock.write_text(text, encoding="latin-1")
    with build_lock(tmp_path / "a.h5"):
        assert re.fullmatch(rf"process {os.getpid()} on \S+ since \S+ [\d:]{{8}}[+-][\d:]{{5}}", lock.read_text())
    assert names(tmp_path) == []


def test_lock_of_a_killed_process_is_taken_over_though_its_children_live(tmp_path: Path) -> None:
    path = tmp_path / "a.h5"
    code = HOLD.replace(
        'print("held"', 'import subprocess; print(subprocess.Popen(["sleep", "100"], close_fds=False, stdout=2).pid'
    )
    with child(code, path) as other:
        sleeper = int(first_line(other))
        try:
            with pytest.raises(BankError, match=f"process {other.pid} "), build_lock(path):
                pass
            other.kill()
            assert other.wait() == -signal.SIGKILL
            assert (tmp_path / "a.h5.lock").read_text().startswith(f"process {other.pid} on ")
            fill(path, PLAN)
        finally:
            os.kill(sleeper, signal.SIGKILL)
    assert names(tmp_path) == ["a.h5"]


# Races


COUNT = (
    QUICK
    + """
import os, time
folder = Path(sys.argv[1])
(folder / f"ready {os.getpid()}").touch()
while len(list(folder.glob("ready *"))) < 2:
    pass
rounds = 0
while rounds < 200:
    try:
        with build_lock(folder / "a.h5"):
            count = int((folder / "count").read_text())
            os.sched_yield()
            (folder / "new").write_text(str(count + 1))
            (folder / "new").rename(folder / "count")
            rounds += 1
    except BankError as error:
        if "is being built by" not in str(error):
            raise
"""
)


def test_one_at_a_time_whoever_comes_and_goes(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    with at_most(60), child(COUNT, tmp_path) as one, child(COUNT, tmp_path) as two:
        assert [one.wait(), two.wait()] == [0, 0]
    assert (tmp_path / "count").read_text() == "400"
    assert names(tmp_path) == ["count", *sorted([f"ready {one.pid}", f"ready {two.pid}"])]


@pytest.mark.parametrize("n", range(4))
def test_a_holder_that_leaves_while_the_next_one_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Its lock file is gone at the n-th look at it; who comes then must not hold a file that nobody else can see."""
    lock, stat, looks = tmp_path / "a.h5.lock", os.stat, []

    def leave(path: Any, *arguments: Any, **kwargs: Any) -> os.stat_result:
        if path == lock and len(looks) <= n:
            looks.append(path)
            if len(looks) > n:
                lock.unlink(missing_ok=True)
        return stat(path, *arguments, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", leave)
        check_held(tmp_path / "a.h5")


def test_a_holder_that_leaves_before_the_next_one_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, flock, calls = tmp_path / "a.h5.lock", fcntl.flock, []

    def leave(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) < 3:
            lock.unlink()
        flock(*arguments)

    monkeypatch.setattr(fcntl, "flock", leave)
    check_held(tmp_path / "a.h5")
    assert len(calls) == 4


def check_held(path: Path) -> None:
    with build_lock(path):
        assert names(path.parent) == ["a.h5.lock"]
        with pytest.raises(BankError, match=f"is being built by process {os.getpid()}"), build_lock(path):
            pass
    assert names(path.parent) == []


def test_a_lock_file_that_was_deleted_by_hand_does_no_harm_in_the_end(tmp_path: Path) -> None:
    with build_lock(tmp_path / "a.h5"):
        (tmp_path / "a.h5.lock").unlink()
    assert names(tmp_path) == []


@pytest.mark.usefixtures("small_blocks")
def test_builders_in_many_threads_make_one_bank(tmp_path: Path) -> None:
    fill(tmp_path / "whole.h5", PLAN, batch_tokens=16)
    path, ends, start = tmp_path / "a.h5", [], threading.Barrier(4)

    def build() -> None:
        start.wait()
        for turn in range(50):
            try:
                fill(path, PLAN, batch_tokens=16, stop_after=turn // 2)
                ends.append("built")
            except StopBuildError:
                pass
            except BankError as error:
                ends.append(re.sub(r"^\S+ (is being built by|exists already).*", r"\1", str(error)))
            except Exception as error:
                ends.append(repr(error))

    threads = [threading.Thread(target=build) for _ in range(4)]
    with at_most(60):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert ends.count("built") == 1
    assert set(ends) == {"built", "is being built by", "exists already"}
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert names(tmp_path) == ["a.h5", "whole.h5"]


# Others' files


BUILD = """
import sys, time
from support.banks import activations, blocks_of, give, make_record, make_rows
from tl_latentlens.bank.writer import BankWriter
PLAN = make_rows()
print("ready", flush=True)
for i in range(int(sys.argv[2])):
    with blocks_of(1), BankWriter.create(f"{sys.argv[1]}/{i}.h5", PLAN, make_record(PLAN), batch_tokens=16) as writer:
        for batch in writer.batches():
            give(writer, batch, activations(PLAN))
            time.sleep(0.002)
"""


@pytest.mark.usefixtures("small_blocks")
def test_a_reader_sees_no_bank_or_a_whole_one(tmp_path: Path) -> None:
    n_banks, hints = 10, 0
    with at_most(100), child(BUILD, tmp_path, n_banks) as builder:
        assert first_line(builder) == "ready"
        for i in range(n_banks):
            path = tmp_path / f"{i}.h5"
            while True:
                ended = builder.poll() is not None
                try:
                    bank = Bank.open(path)
                    break
                except BankError as error:
                    said = str(error).removeprefix(f"no bank file at {path}")
                if ended or said not in ("", f"; {i}.h5.partial is there: the same build call resumes it"):
                    pytest.fail(said)
                hints += said != ""
            bank.verify()
            assert bank.n_rows == PLAN.n_rows
        assert builder.wait() == 0
    assert hints > n_banks
    fill(tmp_path / "whole.h5", PLAN, batch_tokens=16)
    assert len({(tmp_path / name).read_bytes() for name in names(tmp_path)}) == 1


def a_file(path: Path) -> None:
    path.write_text("mine")


def a_folder(path: Path) -> None:
    path.mkdir()


def another_bank(path: Path) -> None:
    aside = path.with_name("aside.h5")
    fill(aside, PLAN, dtype="float32")
    aside.rename(path)


def an_unfinished_bank(path: Path) -> None:
    with pytest.raises(StopBuildError):
        fill(path.with_name("aside.h5"), PLAN, stop_after=0)
    path.with_name("aside.h5.partial").rename(path)


@pytest.mark.parametrize("appear", [a_file, a_folder, another_bank, an_unfinished_bank])
def test_what_appears_at_the_path_during_a_build_is_kept(tmp_path: Path, appear: Callable[[Path], None]) -> None:
    path, acts = tmp_path / "a.h5", activations(PLAN)
    fill(tmp_path / "whole.h5", PLAN, batch_tokens=16)

    def build() -> None:
        with BankWriter.create(path, PLAN, make_record(PLAN), batch_tokens=16) as writer:
            for batch in writer.batches():
                give(writer, batch, acts)
            appear(path)
            kept.append(None if path.is_dir() else path.read_bytes())

    kept: list[bytes | None] = []
    with pytest.raises(BankError, match=r"a\.h5 appeared while it was being built; .* complete in \S+/a\.h5\.partial$"):
        build()
    assert kept == [None if path.is_dir() else path.read_bytes()]
    assert partial_path(path).read_bytes() == (tmp_path / "whole.h5").read_bytes()
    with pytest.raises(BankError, match="exists already"):
        fill(path, PLAN, batch_tokens=16)
    path.rename(tmp_path / "mine")
    assert fill(path, PLAN, batch_tokens=16) == []
    assert path.read_bytes() == (tmp_path / "whole.h5").read_bytes()
    assert names(tmp_path) == ["a.h5", "mine", "whole.h5"]


@pytest.mark.parametrize("appear", [a_file, a_folder, another_bank, an_unfinished_bank])
def test_what_stands_at_the_path_is_left_alone(tmp_path: Path, appear: Callable[[Path], None]) -> None:
    path = tmp_path / "a.h5"
    appear(path)
    before = None if path.is_dir() else path.read_bytes()
    with pytest.raises(BankError, match=r"a\.h5 exists already; open it with Bank\.open, or choose another path"):
        fill(path, PLAN)
    assert before == (None if path.is_dir() else path.read_bytes())
    assert names(tmp_path) == ["a.h5"]


# Folders that cannot be written to


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that others may enter, which pytest's own is not, and only root may write to."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)
        Path(folder).chmod(0o755)


def test_folder_that_cannot_be_written_to_is_named(open_folder: Path) -> None:
    open_folder.chmod(0o555)
    with (
        as_nobody(open_folder),
        pytest.raises(BankError, match=r"a\.h5\.lock cannot be locked: .*Permission denied.*; build on"),
    ):
        fill(open_folder / "a.h5", PLAN)
    assert names(open_folder) == []


def test_finished_bank_in_a_folder_that_cannot_be_written_to_is_opened(any_model: Any, open_folder: Path) -> None:
    texts = ["The river ran over its bank after the storm."]
    tll.build_bank(any_model, texts, open_folder / "a.h5", progress=False)
    open_folder.chmod(0o555)
    with as_nobody(open_folder):
        bank = tll.build_bank(any_model, texts, open_folder / "a.h5", progress=False)
    bank.verify()
    assert names(open_folder) == ["a.h5"]


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOTSUP, errno.EIO])
def test_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(*_: object) -> NoReturn:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BankError, match=rf"a\.h5\.lock cannot be locked: .*{os.strerror(error)}; build on a local disk"):
        fill(tmp_path / "a.h5", PLAN)
    assert [name for name in names(tmp_path) if name != "a.h5.lock"] == []
