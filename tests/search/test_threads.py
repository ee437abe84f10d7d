"""Parts of a search in several threads, torch's own or Python's."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tl_latentlens.search import threads
from tl_latentlens.search.vectors import VectorSearch


@pytest.fixture(params=["OpenMP", "threads of Python"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if request.param != "OpenMP":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch is built with another OpenMP, or none")
    return request.param


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("n", [0, 1, 2, 50])
def test_parts_are_done_in_threads(n: int) -> None:
    meet = threading.Barrier(min(3, max(n, 1)))
    seen = set()

    def call(part: int) -> int:
        if part < meet.parties:
            meet.wait(timeout=20)  # so many at once
        seen.add(threading.get_ident())
        return part * part

    assert threads.in_threads(call, range(n)) == [part * part for part in range(n)]
    assert len(seen) >= min(n, 3)


@pytest.mark.usefixtures("kind")
def test_errors_come_out_of_threads() -> None:
    done = []

    def call(part: int) -> None:
        if part == 3:
            raise ValueError("three")
        done.append(part)

    with pytest.raises(ValueError, match="three"):
        threads.in_threads(call, range(9))
    assert 3 not in done


def test_an_interrupt_between_two_lines_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Ctrl-C comes when OpenMP has called, but no line that could catch it has begun."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(threads, "_openmp", lambda: lambda work, *_: None)
    with pytest.raises(KeyboardInterrupt):
        threads.in_threads(abs, range(9))


@pytest.mark.usefixtures("kind")
def test_searches_at_once() -> None:
    generator = torch.Generator().manual_seed(4)
    search = VectorSearch(torch.nn.functional.normalize(torch.randn(9000, 24, generator=generator), dim=-1).half(), "cpu")
    queries = torch.randn(40, 24, generator=generator)
    alone = [search.top_k(some, 5).rows for some in queries.split(4)]
    with ThreadPoolExecutor(5) as pool:
        together = list(pool.map(lambda some: search.top_k(some, 5).rows, queries.split(4)))
    assert all(map(torch.equal, alone, together))
