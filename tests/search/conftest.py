"""The ways that a search can take, and a small search."""

from collections.abc import Iterator

import pytest
import torch

from tl_latentlens.search.chunks import GROUP_ROWS
from tl_latentlens.search.settings import search_settings
from tl_latentlens.search.vectors import VectorSearch

WAYS = {
    "torch": {"use_cpu_kernels": False},
    "kernels": {"min_kernel_rows": 0, "first_chunk_rows": GROUP_ROWS},
    "shortlists": {"use_cpu_kernels": False, "synchronous_devices": frozenset()},
}


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """A test runs with torch alone, with compiled kernels for chunks of any size, and with shortlists, as on a GPU."""
    if request.param == "kernels":
        pytest.importorskip("numba")
    with search_settings(**WAYS[request.param]):
        yield request.param


@pytest.fixture(scope="module")
def search() -> VectorSearch:
    """120 unit vectors of width 6."""
    vectors = torch.randn(120, 6, generator=torch.Generator().manual_seed(8))
    return VectorSearch(torch.nn.functional.normalize(vectors, dim=-1), "cpu")
