"""Full disks and failing ones: a clear error, no file that is not whole, no lost work, and an interpreter that ends cleanly."""

import errno
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from support.banks import StopBuildError, activations, fill, give, journal, make_record, make_rows
from support.processes import NOBODY, as_nobody

import tl_latentlens as tll
from tl_latentlens.bank import build as build_module
from tl_latentlens.bank import create as create_module
from tl_latentlens.bank import partial_file as partial_module
from tl_latentlens.bank.bank import Bank
from tl_latentlens.bank.format import partial_path
from tl_latentlens.bank.head import read_head
from tl_latentlens.bank.writer import BankWriter
from tl_latentlens.corpus.plan import make_plan, prompts_from_lists
from tl_latentlens.errors import BankError

PLAN = make_rows(12)
LOWER_LIMIT = r"(; a limit on file sizes \(ulimit -f\) is lower)?"
NO_SPACE = rf"^no space for {{}}: it needs ([\d,]+) bytes and (.+) has ([\d,]+) free \({{}}{LOWER_LIMIT}\)$"
FAILED = r"^writing .+/a\.h5\.partial failed: .*{}.*; finished blocks are kept, the same call goes on with the rest$"


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(create_module, "BATCHES_PER_BLOCK", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file that an undisturbed build makes."""
    path = tmp_path_factory.mktemp("whole") / "a.h5"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(create_module, "BATCHES_PER_BLOCK", 1)
        fill(path, PLAN, batch_tokens=16)
    return path.read_bytes()


def failing(error: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    return fail


# A limit on the size of files, in processes of their own


class Sizes(NamedTuple):
    """Where things stand in the finished file."""

    block: int
    vectors: int
    vectors_end: int
    size: int


LIMITS: dict[str, Callable[[Sizes], int]] = {
    "nothing": lambda at: 0,
    "100 bytes": lambda at: 100,
    "one byte short of the user block": lambda at: at.block - 1,
    "the user block": lambda at: at.block,
    "the HDF5 superblock": lambda at: at.block + 50,
    "some of the HDF5 metadata": lambda at: (at.block + at.vectors) // 2,
    "some of the vectors": lambda at: (at.vectors + at.vectors_end) // 2,
    "one byte too few": lambda at: at.size - 1,
    "enough": lambda at: at.size + 32_000,  # what is asked for holds some bytes to spare for each dataset
}


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")


def limited(size: int) -> None:
    """From here on a longer file is 'File too large', as on a full disk, to this process."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def build(folder: Path) -> None:
    with BankWriter.create(folder / "a.h5", PLAN, make_record(PLAN), batch_tokens=16) as writer:
        for batch in writer.batches():
            give(writer, batch, activations(PLAN))


def case_create(folder: Path, at: Sizes) -> None:
    for name, limit in LIMITS.items():
        (folder / name).mkdir()
        limited(limit(at))
        try:
            build(folder / name)
        except BankError as error:
            say(error)
        limited(resource.RLIM_INFINITY)


def case_resume(folder: Path, at: Sizes) -> None:
    for name, limit in LIMITS.items():
        (folder / name).mkdir()
        with suppress(StopBuildError):
            fill(folder / name / "a.h5", PLAN, batch_tokens=16, stop_after=3)
        limited(limit(at))
        try:
            build(folder / name)
        except BankError as error:
            say(error)
        limited(resource.RLIM_INFINITY)


def case_create_unreserved(folder: Path, at: Sizes) -> None:
    """No space can be reserved, so that it is HDF5 which meets the limit."""
    vars(os).pop("posix_fallocate", None)
    case_create(folder, at)


def case_uncaught(folder: Path, at: Sizes) -> None:
    vars(os).pop("posix_fallocate", None)
    limited((at.block + at.vectors) // 2)
    build(folder)


def case_much_metadata(folder: Path, at: Sizes) -> None:
    """More than HDF5 keeps in memory: it reads back what it could not write."""
    vars(os).pop("posix_fallocate", None)
    plan = make_plan(prompts_from_lists([[1, 2, 3]]))
    record = make_record(plan, {f"blocks.{i}.hook_resid_post": 2 for i in range(800)})
    limited(1_000_000)
    try:
        BankWriter.create(folder / "a.h5", plan, record)
    except BankError as error:
        say(error)


def case_many_tokens(folder: Path, at: Sizes) -> None:
    """An array too long for HDF5's buffers, which it writes at once."""
    vars(os).pop("posix_fallocate", None)
    plan = make_plan(prompts_from_lists([[i % 100 for i in range(100_000)]]))
    for limit in (0, 10_000, 100_000, 400_000):
        limited(limit)
        try:
            BankWriter.create(folder / "a.h5", plan, make_record(plan))
        except BankError as error:
            say(error)


def case_errors_in_mid_run(folder: Path, at: Sizes) -> None:
    """The disk fails for good: at the first write, at a later one, and so on to the last; then at a sync."""
    for call, n_calls, step in (("pwrite", 200, 5), ("sync", 30, 1)):
        for n in range(0, n_calls, step):
            try:
                with breaking(call, n, errno.EIO):
                    fill(folder / "a.h5", PLAN, batch_tokens=16)
            except BankError:
                partial_path(folder / "a.h5").unlink()
                continue
            (folder / "a.h5").unlink()
            break
        else:
            say(f"{n_calls} calls of {call} were not enough")


def case_build_bank(folder: Path, at: Sizes) -> None:
    model = tll.load_demo_model()
    runs = []
    build_module.run_hooked = lambda *arguments: runs.append(arguments)
    limited(100_000)
    try:
        tll.build_bank(model, ["The river ran over its bank after the storm."] * 3, folder / "a.h5", progress=False)
    except BankError as error:
        say(error)
    say(f"{len(runs)} batches of the corpus were run")


CASES: dict[str, Callable[[Path, Sizes], None]] = {
    "create": case_create,
    "create, nothing reserved": case_create_unreserved,
    "resume": case_resume,
    "uncaught": case_uncaught,
    "much metadata": case_much_metadata,
    "many tokens": case_many_tokens,
    "errors in mid-run": case_errors_in_mid_run,
    "build_bank": case_build_bank,
}


def serve(folder: Path) -> None:
    """Run each case in a fork of its own, which then ends as interpreters end; print what became of them as JSON."""
    create_module.BATCHES_PER_BLOCK = 1
    (folder / "whole").mkdir()
    fill(folder / "whole" / "a.h5", PLAN, batch_tokens=16)
    with open(folder / "whole" / "a.h5", "rb") as file:
        head = read_head(file)
        vectors = head.datasets["hooks/blocks.0.hook_resid_post/vectors"]
        at = Sizes(head.size, vectors.offset, vectors.offset + vectors.n_bytes, file.seek(0, os.SEEK_END))
    ended = {}
    for name, case in CASES.items():
        home = folder / name
        home.mkdir()
        streams = [os.pipe(), os.pipe()]
        child = os.fork()
        if not child:
            for stream, (_, end) in enumerate(streams, 1):
                os.dup2(end, stream)
            case(home, at)
            return
        for _, end in streams:
            os.close(end)
        out, err = (os.fdopen(start).read() for start, _ in streams)
        ended[name] = {"home": str(home), "code": os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), "out": out, "err": err}
    say(json.dumps(ended))


class Ended(NamedTuple):
    """What became of a case."""

    home: Path
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    code = f"import sys, pathlib; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_disk as t; "
    code += "t.serve(pathlib.Path(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-B", "-c", code, tmp_path_factory.mktemp("cases")], capture_output=True, text=True, timeout=300
    )
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


def number(text: str) -> int:
    return int(text.replace(",", ""))


def test_full_disk_in_mid_run_keeps_the_finished_blocks(ended: dict[str, Ended], whole: bytes) -> None:
    home, code, out, err = ended["resume"]
    assert (code, err) == (0, "")
    for name, line in zip(list(LIMITS)[:-1], out.splitlines(), strict=True):
        assert re.match(FAILED.format("File too large"), line), line
        assert [p.name for p in (home / name).iterdir()] == ["a.h5.partial"]
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


def test_full_disk_shows_before_the_corpus_is_run(ended: dict[str, Ended]) -> None:
    home, code, out, err = ended["build_bank"]
    assert (code, err) == (0, "")
    message, runs = out.splitlines()
    assert re.match(NO_SPACE.format(r"a\.h5", "File too large"), message), message
    assert runs == "0 batches of the corpus were run"
    assert list(home.iterdir()) == []


def test_interpreter_ends_cleanly_after_errors_in_mid_run(ended: dict[str, Ended]) -> None:
    assert ended["errors in mid-run"][1:] == (0, "", "")


def check_goes_on(path: Path, whole: bytes) -> None:
    """The same call runs the blocks that the journal lacks, and ends with the file of an undisturbed build."""
    done = journal(path)
    assert {batch.block for batch in fill(path, PLAN, batch_tokens=16)} == set((~done).nonzero()[0].tolist())
    assert path.read_bytes() == whole
    assert [p.name for p in path.parent.iterdir()] == ["a.h5"]


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


@pytest.mark.parametrize("call", ["posix_fallocate", "fsync", "rename"])
def test_disk_that_fails_while_creating_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(create_module.os, call, failing(errno.EIO), raising=False)
    with pytest.raises(BankError, match=r"^a\.h5 cannot be created: .*Input/output error"):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []


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


# Errors in mid-run


@contextmanager
def breaking(call: str, n: int, error: int) -> Iterator[list[int]]:
    """After n calls, this call of the writer fails for good."""
    owner, name = (partial_module, "_fdatasync") if call == "sync" else (partial_module.os, call)
    before, calls = getattr(owner, name), []

    def count(*arguments: Any) -> Any:
        calls.append(len(calls))
        if len(calls) > n:
            raise OSError(error, os.strerror(error))
        return before(*arguments)

    setattr(owner, name, count)
    try:
        yield calls
    finally:
        setattr(owner, name, before)


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


def whole_file(folder: Path, whole: bytes) -> Path:
    (folder / "whole.h5").write_bytes(whole)
    return folder / "whole.h5"


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
    assert [p.name for p in user_folder.iterdir()] == ["a.h5.partial"]
