"""Full disks: a clear error before the run, no file that is not whole, no lost work, and an interpreter that ends cleanly."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from support.banks import StopBuildError, activations, blocks_of, fill, give, make_record
from support.disk import (
    FAILED,
    NO_SPACE,
    PLAN,
    build,
    check_goes_on,
    failing,
    number,
)
from support.fresh import run_fresh
from support.limited_builds import LIMITS, build_within_a_limit

from tl_latentlens.bank import create as create_module
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.errors import BankError


@pytest.fixture(autouse=True)
def _small_blocks(small_blocks: None) -> None:
    """Every bank here has blocks of one batch."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that an undisturbed build makes."""
    path = tmp_path_factory.mktemp("whole") / "a.h5"
    with blocks_of(1):
        fill(path, PLAN, batch_tokens=16)
    return path.read_bytes()


class Ended(NamedTuple):
    """What became of a case."""

    home: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    command = [sys.executable, "-B", "-m", "support.limited_builds", tmp_path_factory.mktemp("cases")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return {name: Ended(Path(case.pop("home")), **case) for name, case in json.loads(done.stdout).items()}


@pytest.mark.parametrize("case", ["create", "create, nothing reserved"])
def test_full_disk_shows_before_the_run_and_leaves_nothing(ended: dict[str, Ended], whole: bytes, case: str) -> None:
    home, code, out, err = ended[case]
    assert (code, err) == (0, "")
    names = list(LIMITS)
    assert names.pop() == "enough"
    for name, line in zip(names, out.splitlines(), strict=True):
        message = re.match(NO_SPACE.format(r"a\.h5", "File too large"), line)
        assert message, line
        assert len(whole) <= number(message[1]) < len(whole) + 32_000
        assert message[2] == str(home / name)
        assert number(message[3]) > 0
        assert list((home / name).iterdir()) == []
    assert [p.name for p in (home / "enough").iterdir()] == ["a.h5"]
    assert (home / "enough" / "a.h5").read_bytes() == whole


def test_full_disk_in_mid_run_keeps_the_finished_blocks(ended: dict[str, Ended], whole: bytes) -> None:
    home, code, out, err = ended["resume"]
    assert (code, err) == (0, "")
    for name, line in zip(list(LIMITS)[:-1], out.splitlines(), strict=True):
        assert re.match(FAILED.format("File too large"), line), line
        assert {p.name for p in (home / name).iterdir()} - {"a.h5.partial.rows"} == {"a.h5.partial"}
        check_goes_on(home / name / "a.h5", whole)
    assert (home / "enough" / "a.h5").read_bytes() == whole


def test_full_disk_that_nobody_catches_is_a_plain_traceback(ended: dict[str, Ended]) -> None:
    home, code, out, err = ended["uncaught"]
    assert (code, out) == (1, "")
    assert err.startswith("Traceback")
    assert err.splitlines()[-1].startswith("tl_latentlens.errors.BankError: no space for a.h5: it needs ")
    assert "Exception ignored" not in err
    assert list(home.iterdir()) == []


@pytest.mark.parametrize(("case", "n"), [("much metadata", 1), ("many tokens", 4)])
def test_full_disk_within_a_large_plan(ended: dict[str, Ended], case: str, n: int) -> None:
    home, code, out, err = ended[case]
    assert (code, err) == (0, "")
    for line in out.splitlines():
        assert re.match(NO_SPACE.format(r"a\.h5", "File too large"), line), line
    assert len(out.splitlines()) == n
    assert list(home.iterdir()) == []


def test_full_disk_shows_before_the_corpus_is_run(tmp_path: Path) -> None:
    ended = run_fresh(build_within_a_limit, tmp_path)
    assert (ended.code, ended.err) == (0, "")
    message, runs = ended.out.splitlines()
    assert re.match(NO_SPACE.format(r"a\.h5", "File too large"), message), message
    assert runs == "0 batches of the corpus were run"
    assert list(tmp_path.iterdir()) == []


def test_interpreter_ends_cleanly_after_errors_in_mid_run(ended: dict[str, Ended]) -> None:
    assert ended["errors in mid-run"][1:] == (0, "", "")


# Space asked for and reserved


def test_space_is_looked_at_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes) -> None:
    def create() -> BankWriter:
        return BankWriter.create(tmp_path / "a.h5", PLAN, make_record(PLAN), batch_tokens=16)

    monkeypatch.setattr(create_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(BankError, match=NO_SPACE.format(r"a\.h5", "No space left on device")) as caught:
        create()
    message = re.match(NO_SPACE.format(r"a\.h5", ".*"), str(caught.value))
    assert message
    assert (message[2], message[3]) == (str(tmp_path), "1,000")
    needed = number(message[1])
    assert needed >= len(whole)
    monkeypatch.setattr(create_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(BankError, match=f"it needs {needed:,} bytes and .* has {needed - 1:,} free"):
        create()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(create_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    with create():
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5.partial"]


@pytest.mark.parametrize("n_hooks", [1, 40, 200])
def test_space_asked_for_is_not_less_than_the_file_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_hooks: int) -> None:
    record = make_record(PLAN, {f"blocks.{i}.hook_resid_post": 2 for i in range(n_hooks)})
    with BankWriter.create(tmp_path / "a.h5", PLAN, record):
        pass
    monkeypatch.setattr(create_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(BankError) as caught:
        BankWriter.create(tmp_path / "b.h5", PLAN, record)
    message = re.match(NO_SPACE.format(r"b\.h5", ".*"), str(caught.value))
    assert message
    size = partial_path(tmp_path / "a.h5").stat().st_size
    assert size <= number(message[1]) < 1.5 * size


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_space_that_cannot_be_reserved_shows_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    monkeypatch.setattr(create_module.os, "posix_fallocate", failing(error), raising=False)
    with pytest.raises(BankError, match=NO_SPACE.format(r"a\.h5", os.strerror(error))) as caught:
        build(tmp_path)
    assert isinstance(caught.value.__cause__, OSError)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, None])
def test_file_systems_that_reserve_no_space_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes, error: int | None
) -> None:
    if error is None:
        monkeypatch.delattr(create_module.os, "posix_fallocate", raising=False)  # as on macOS
    else:
        monkeypatch.setattr(create_module.os, "posix_fallocate", failing(error), raising=False)
    fill(tmp_path / "a.h5", PLAN, batch_tokens=16)
    assert (tmp_path / "a.h5").read_bytes() == whole


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many bytes."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("only root may mount a file system")
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(size: int) -> Path:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("honest", [True, False], ids=["free space is known", "free space is not known"])
@pytest.mark.parametrize("pages", [1, 2, 4, -1])
def test_small_disk(
    small_disk: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, whole: bytes, honest: bool, pages: int
) -> None:
    folder = small_disk((pages % -(-len(whole) // 4096)) * 4096)
    if not honest:
        monkeypatch.setattr(create_module.shutil, "disk_usage", lambda path: SimpleNamespace(free=10**12))
    with pytest.raises(BankError, match=NO_SPACE.format(r"a\.h5", "No space left on device")):
        build(folder)
    assert list(folder.iterdir()) == []


def test_a_disk_that_others_fill_does_not_stop_a_build(small_disk: Callable[[int], Path], whole: bytes) -> None:
    folder = small_disk(2**20)
    acts = activations(PLAN)
    with BankWriter.create(folder / "a.h5", PLAN, make_record(PLAN), batch_tokens=16) as writer:
        use_up(folder)
        for batch in writer.batches():
            give(writer, batch, acts)
    assert (folder / "a.h5").read_bytes() == whole


def test_a_build_is_resumed_on_a_full_disk(small_disk: Callable[[int], Path], whole: bytes) -> None:
    folder = small_disk(2**20)
    with pytest.raises(StopBuildError):
        fill(folder / "a.h5", PLAN, batch_tokens=16, stop_after=3)
    use_up(folder)
    fill(folder / "a.h5", PLAN, batch_tokens=16)
    assert (folder / "a.h5").read_bytes() == whole


def use_up(folder: Path) -> None:
    with open(folder / "filler", "wb", buffering=0) as file:
        for size in (4096, 1):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    with pytest.raises(OSError, match="No space left"):
        (folder / "more").write_bytes(b"1")
    (folder / "more").unlink()
