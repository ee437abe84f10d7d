"""Quantized codes: how far their scores can be off, and how many candidates they leave."""

import numpy as np
import pytest
import torch
from support.vectors import KINDS, check, compared_rows, every_way, make_queries, make_rows, unit

from tl_latentlens.search.backend import byte_code_dtype
from tl_latentlens.search.chunks import GROUP_ROWS, Chunk, ScratchMemory
from tl_latentlens.search.codes import QuantizedRows
from tl_latentlens.search.scorer import PairScorer
from tl_latentlens.search.vectors import VectorSearch


@every_way
@pytest.mark.parametrize("kind", [*KINDS, "outliers"])
@pytest.mark.parametrize("away", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("q", [1, 9])
def test_scores_of_codes_are_off_by_no_more_than_they_say(kind: str, away: float, dtype: torch.dtype, q: int) -> None:
    if dtype == torch.uint8 and byte_code_dtype(torch.device("cpu"), 500) != dtype:
        pytest.skip("int8 is multiplied here")
    rng = np.random.default_rng(31)
    rows = make_rows(kind, 500, 40, rng) + away
    if kind == "outliers":  # dimensions that are as large as all others together, as some models have
        rows[:, 7] *= 40
        rows[::3, 21] *= -25
    rows, queries = (torch.from_numpy(unit(part)).float() for part in (rows, make_queries(q, rows, rng).numpy()))
    codes = QuantizedRows(500, rows[:90].mean(0), dtype)
    codes.encode_rows(0, rows[:304])
    codes.encode_rows(304, rows[304:])
    query_codes, chunk = codes.encode_queries(queries), Chunk(16, 500)
    bound = codes.error_bound(query_codes, chunk)
    exact = (rows[16:].double() @ queries.double().T).float()
    group, query = (torch.arange(484) // GROUP_ROWS)[:, None].expand(-1, q), torch.arange(q).expand(484, -1)
    raw = codes.raw_scores(query_codes, chunk, ScratchMemory(torch.device("cpu")))[:484, :q]
    estimate, error = bound.estimate(raw.flatten(), group.flatten(), query.flatten())
    estimate, error = estimate.view_as(exact), error.view_as(exact)
    assert ((exact - estimate).abs() <= error + 1e-6).all()
    for threshold in (0.3, 0.9):
        min_raw = bound.min_raw_score(torch.full((q,), threshold)).expand(31, q)[group, query]
        assert (raw >= min_raw)[exact >= threshold].all()
    outliers, others = (0.35, 0.04) if dtype == torch.uint8 else (0.25, 0.03)  # its queries have 7 bits
    assert float(error.max()) < (0.015 if dtype == torch.bfloat16 else outliers if kind == "outliers" else others)


@every_way
@pytest.mark.parametrize(("dtype", "share"), [("int8", 0.02), ("bfloat16", 0.005)])
def test_codes_leave_few_rows_to_score(monkeypatch: pytest.MonkeyPatch, dtype: str, share: float) -> None:
    rng = np.random.default_rng(32)
    vectors = torch.from_numpy(unit(rng.standard_normal((20_000, 64)))).half()
    scored = []
    score = PairScorer.score
    monkeypatch.setattr(PairScorer, "score", lambda self, rows, *rest: scored.append(len(rows)) or score(self, rows, *rest))
    queries = make_queries(8, vectors.double().numpy(), rng)
    found = VectorSearch(vectors, "cpu", dtype).top_k(queries, 10)
    assert 80 <= sum(scored) < share * 8 * 20_000
    check(found, compared_rows(vectors), queries, 10)
