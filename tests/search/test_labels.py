"""The nearest row of each of the nearest labels against a brute force, over parts, precisions, transforms and ties."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.vectors import KINDS, compared_rows, make_rows, quick, to_float64, unit

from tl_latentlens.search import VectorSearch
from tl_latentlens.search.labels import LabelQuery, top_k_labels_of_parts


def expected_rows(scores: np.ndarray, labels: np.ndarray, excluded: np.ndarray, k: int) -> list[int]:
    """The best row of each label in turn, ties by row; scores are rounded as similarities are."""
    best: dict[int, int] = {}
    for row in np.argsort(-scores.round(15).astype(np.float32), kind="stable").tolist():
        if labels[row] >= 0 and labels[row] not in excluded:
            best.setdefault(int(labels[row]), row)
    return list(best.values())[:k]


@quick
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(KINDS),
    n_labels=st.sampled_from([1, 3, 40]),
    k=st.integers(1, 6),
    dtype=st.sampled_from(["auto", "float32", "bfloat16", "int8"]),
    stored=st.sampled_from([torch.float32, torch.float16]),
    is_centered=st.booleans(),
    knows_floor=st.booleans(),
)
def test_labels_are_those_of_a_brute_force(
    seed: int, kind: str, n_labels: int, k: int, dtype: str, stored: torch.dtype, is_centered: bool, knows_floor: bool
) -> None:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 120, 3).tolist()
    rows = [torch.from_numpy(make_rows(kind, n, 16, rng)).to(stored) for n in sizes]
    center = torch.from_numpy(rng.standard_normal(16) / 4) if is_centered else None
    queries = torch.from_numpy(unit(rng.standard_normal((5, 16)))).float()
    queries[1] = torch.nn.functional.normalize(rows[0][0].float(), dim=-1)
    labels, excluded = rng.integers(-1, n_labels, sum(sizes)), rng.integers(-2, n_labels, (5, 2))
    scores = to_float64(queries) @ np.concatenate([compared_rows(part, center) for part in rows]).T
    wanted = [expected_rows(of_query, labels, left_out, k) for of_query, left_out in zip(scores, excluded, strict=True)]
    floor = torch.full((5,), -torch.inf)
    if knows_floor:
        known = [scores[i, wanted[i][-1]] - 1e-5 if len(wanted[i]) == k else -np.inf for i in range(5)]
        floor = torch.tensor(known, dtype=torch.float32)
    searches = [VectorSearch(part, "cpu", dtype, center=center) for part in rows]
    query = LabelQuery(torch.from_numpy(labels), torch.from_numpy(excluded), floor)
    found = top_k_labels_of_parts([search.part(queries) for search in searches], k, query)
    for i, of_query in enumerate(wanted):
        n = len(of_query)
        assert found.rows[i, :n].tolist() == of_query or np.allclose(
            scores[i, found.rows[i, :n]], scores[i, of_query], atol=2e-7
        ), "another order only where similarities are equal up to rounding"
        np.testing.assert_allclose(found.similarities[i, :n], scores[i, of_query], atol=1e-6)
        assert (found.similarities[i, n:] == -torch.inf).all()


@pytest.mark.parametrize("budget", [2**16, 2**28])
def test_one_label_in_nearly_every_row(budget: int) -> None:
    """Rows of the query's own label are passed over, however many are nearer; little memory holds few candidates."""
    rng = np.random.default_rng(0)
    rows = unit(rng.standard_normal((3000, 32))).astype(np.float32)
    labels = np.where(np.arange(3000) % 250 == 7, np.arange(3000), 0)
    queries = torch.from_numpy(rows[:60])
    search = VectorSearch(torch.from_numpy(rows), "cpu", memory_budget=budget)
    query = LabelQuery(torch.from_numpy(labels), torch.zeros(60, 1, dtype=torch.int64), torch.full((60,), -torch.inf))
    found = top_k_labels_of_parts([search.part(search.normalize_queries(queries))], 3, query)
    scores = rows[:60].astype(np.float64) @ rows.T.astype(np.float64)
    assert found.rows.tolist() == [expected_rows(line, labels, np.zeros(1), 3) for line in scores]
