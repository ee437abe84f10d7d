"""Freed memory that is kept: seen in the page faults of a process of its own."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from contextlib import nullcontext
import torch
from tl_latentlens.bank.allocator import freed_memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for batch in range(20):
        parts = [torch.ones((batch % 5 + 1) * 2**18) for _ in range(8)]
        del parts
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

torch.set_num_threads(1)
with freed_memory_kept() if sys.argv[1] == "kept" else nullcontext():
    faults()
    print(faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc")
def test_batches_use_the_memory_of_those_before() -> None:
    kept, plain = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("kept", "plain")
    )
    assert kept < 0.1 * plain
