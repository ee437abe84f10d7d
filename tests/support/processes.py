"""Other users, and tests in a process of their own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

NOBODY = 65534


def run_tests(*arguments: str) -> None:
    """Run pytest here, and end as it does."""
    raise SystemExit(int(pytest.main(list(arguments))))


@contextmanager
def as_nobody(folder: Path) -> Iterator[None]:
    """To root every file is open, so be somebody else."""
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
            if not os.access(folder, os.R_OK | os.X_OK, effective_ids=True):
                pytest.skip(f"only root may enter {folder}")
        yield
    finally:
        if root:
            os.seteuid(0)
