"""The endpoint that the tests of the judge ask."""

from collections.abc import Iterator
from typing import Any

import pytest

from tl_latentlens.endpoint import retry


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A running endpoint; attempts follow one another at once."""
    pytest.importorskip("openai")
    pytest.importorskip("PIL")
    from support.judge_endpoint import Stub

    monkeypatch.setattr(retry, "_FIRST_BACKOFF", 0.01)
    endpoint = Stub()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()
