"""Disks that fail and files that may not be read or written: the error names them, and finished blocks are kept."""

import errno
import os
import resource
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.banks import StopBuildError, blocks_of, fill, journal
from support.disk import (
    FAILED,
    PLAN,
    breaking,
    build,
    check_goes_on,
    failing,
    limited,
    whole_file,
)
from support.processes import NOBODY, as_nobody

from tl_latentlens.bank import create as create_module
from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.format import partial_path
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


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "rename"])
def test_disk_that_fails_while_creating_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(create_module.os, call, failing(errno.EIO), raising=False)
    with pytest.raises(BankError, match=r"^a\.h5 cannot be created: .*Input/output error"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("call", ["pwrite", "sync"])
def test_disk_that_fails_at_any_write_keeps_the_finished_blocks(tmp_path: Path, whole: bytes, call: str, error: int) -> None:
    path = tmp_path / "a.h5"
    with breaking(call, 10**9, error) as calls:
        fill(path, PLAN, batch_tokens=16)
    path.unlink()
    n_blocks = len(Bank.open(whole_file(tmp_path, whole)).blocks())
    (tmp_path / "whole.h5").unlink()
    a_block = 7 if call == "pwrite" else 1  # two hooks of three parts, and the journal; one sync
    assert len(calls) == a_block * n_blocks + (4 + 2 if call == "pwrite" else 3)
    for n in range(len(calls)):
        with breaking(call, n, error), pytest.raises(BankError, match=FAILED.format(os.strerror(error))) as caught:
            fill(path, PLAN, batch_tokens=16)
        assert isinstance(caught.value.__cause__, OSError)
        assert [p.name for p in tmp_path.iterdir()] == ["a.h5.partial"]
        assert journal(path).sum() == min(n // a_block, n_blocks)
        check_goes_on(path, whole)
        path.unlink()


@pytest.mark.parametrize("error", [errno.EIO, errno.EACCES, errno.EXDEV])
def test_a_rename_that_fails_is_done_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes, error: int
) -> None:
    path, rename = tmp_path / "a.h5", os.rename

    def refuse(old: Any, new: Any, **kwargs: Any) -> None:
        if Path(new) == path:
            raise OSError(error, os.strerror(error))
        rename(old, new, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        with pytest.raises(BankError, match=FAILED.format(os.strerror(error))):
            fill(path, PLAN, batch_tokens=16)
    assert partial_path(path).read_bytes() == whole
    check_goes_on(path, whole)


def test_a_folder_that_cannot_be_synced_leaves_a_whole_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes
) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(StopBuildError):
        fill(path, PLAN, batch_tokens=16, stop_after=3)
    monkeypatch.setattr(partial_module.os, "fsync", failing(errno.EIO))
    with pytest.raises(BankError, match="Input/output error"):
        fill(path, PLAN, batch_tokens=16)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    assert path.read_bytes() == whole


@pytest.mark.parametrize("full", [False, True], ids=["a disk that fails", "a full disk"])
def test_disk_that_fails_while_the_head_is_mended(tmp_path: Path, whole: bytes, full: bool) -> None:
    path = tmp_path / "a.h5"
    with pytest.raises(StopBuildError):
        fill(path, PLAN, batch_tokens=16, stop_after=3)
    with partial_path(path).open("r+b") as file:
        file.seek(200)
        file.write(b"torn")
    try:
        if full:
            limited(1000)
        with breaking("fsync", 0, errno.EIO), pytest.raises(BankError, match=r"a\.h5\.partial .*(File too large|error)$"):
            fill(path, PLAN, batch_tokens=16)
    finally:
        limited(resource.RLIM_INFINITY)
    check_goes_on(path, whole)


# Files that may not be read or written


@pytest.fixture
def user_folder() -> Iterator[Path]:
    """A folder of a user who is not root."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY if os.geteuid() == 0 else -1, -1)
        with as_nobody(Path(folder)):
            yield Path(folder)


def test_bank_that_may_not_be_read_is_named(user_folder: Path, whole: bytes) -> None:
    path = whole_file(user_folder, whole)
    path.chmod(0)
    with pytest.raises(BankError, match=r"whole\.h5 cannot be read: .*Permission denied"):
        Bank.open(path)


@pytest.mark.parametrize("mode", [0, 0o400])
def test_partial_file_that_may_not_be_written_is_named(user_folder: Path, mode: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create_module, "version", str)  # this user may not be allowed to look up packages
    path = user_folder / "a.h5"
    with pytest.raises(StopBuildError):
        fill(path, PLAN, batch_tokens=16, stop_after=3)
    partial_path(path).chmod(mode)
    with pytest.raises(BankError, match=r"a\.h5\.partial cannot be written: .*Permission denied"):
        fill(path, PLAN, batch_tokens=16)
    assert {p.name for p in user_folder.iterdir()} - {"a.h5.partial.rows"} == {"a.h5.partial"}
