"""Freed memory that is kept: seen in the page faults of a process of its own."""

import ctypes
import resource
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from support.fresh import run_fresh

from tl_latentlens.bank.allocator import freed_memory_kept


def count_faults(keep: bool, record: Path) -> None:
    """Write down the page faults of batches after the first ones."""
    libc = ctypes.CDLL(None)
    for setting in (-1, -3):  # as in a process that has freed nothing large yet
        libc.mallopt(setting, 2**17)
    with freed_memory_kept() if keep else nullcontext():
        for _ in range(2):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for batch in range(20):
                parts = [torch.ones((batch % 5 + 1) * 2**18) for _ in range(8)]
                del parts
            record.write_text(str(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before))


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_batches_use_the_memory_of_those_before(tmp_path: Path) -> None:
    def faults(keep: bool) -> int:
        record = tmp_path / f"{keep}.txt"
        ended = run_fresh(count_faults, keep, record)
        assert ended.code == 0, ended.err
        return int(record.read_text())

    assert faults(keep=True) < 0.1 * faults(keep=False)
