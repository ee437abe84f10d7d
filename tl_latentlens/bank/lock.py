"""One builder a path: a lock file beside the bank that names its holder, and that the system frees when the holder ends."""

import contextlib
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from tl_latentlens.errors import BankError


@contextlib.contextmanager
def build_lock(path: Path) -> Iterator[None]:
    """Hold `path.lock` while building `path`; a lock file left by a dead process is taken over.

    Raises:
        BankError: Another process holds it (the message says which), or the folder cannot be written to.
    """
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = _acquire(lock, path)
    except OSError as error:
        if isinstance(error, BankError):
            raise
        raise BankError(f"{lock} cannot be locked: {error}; build on a local disk that can be written to") from error
    try:
        yield
    finally:
        try:
            with contextlib.suppress(OSError):  # a lock file that stays is taken over by the next build
                lock.unlink()
        finally:
            os.close(descriptor)


def _acquire(lock: Path, path: Path) -> int:
    import fcntl  # Windows has none; banks can be read there all the same

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(lock, descriptor):
                since = datetime.now().astimezone().isoformat(" ", "seconds")
                with contextlib.suppress(OSError):  # on a full disk the lock holds without the holder's name
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since}".encode())
                return descriptor
        except BlockingIOError as error:
            holder = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise BankError(f"{path} is being built by {holder}; wait for it or choose another path") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its last holder took it away between our opening and our locking it


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
