"""Jumps in lists of neighbors."""

import numpy as np
import pytest

from tl_latentlens.views.jumps import is_jump
from tl_latentlens.views.text import also_at


@pytest.mark.parametrize(
    ("cosines", "jumps"),
    [
        ([0.9, 0.84, 0.83], [0]),
        ([0.9, 0.86, 0.84], []),
        ([1.0, 0.9, 0.8], [0, 1]),
        ([1.0, 1.0, 1.0], []),
        ([0.5], []),
        ([], []),
        ([0.99995, 0.9996, 0.9991], []),
        ([0.1, -0.4, -0.45], [0]),
    ],
)
def test_a_jump_is_where_the_next_is_half_as_far_again(cosines: list[float], jumps: list[int]) -> None:
    assert np.flatnonzero(is_jump(np.array(cosines))).tolist() == jumps


def test_jumps_do_not_depend_on_a_direction_that_all_rows_share() -> None:
    rng = np.random.default_rng(0)
    rows, query = rng.normal(size=(6, 40)), rng.normal(size=40)
    rows[0] = query + 0.1 * rng.normal(size=40)

    def marked(shared: float) -> list[bool]:
        units = [vector / np.linalg.norm(vector) for vector in (query + shared, *(rows + shared))]
        return is_jump(np.sort(np.array(units[1:]) @ units[0])[::-1]).tolist()

    assert marked(0.0) == marked(3.0) == [True, *[False] * 5]


def test_lists_of_many_queries() -> None:
    cosines = np.array([[[0.9, 0.84, 0.83], [0.9, 0.89, 0.88]]], np.float32)
    assert is_jump(cosines).tolist() == [[[True, False, False], [False, False, False]]]


def test_places_where_else_a_row_was_found() -> None:
    names = [f"blocks.{i}.hook_resid_post" for i in (5, 3, 7)]
    assert also_at(names) == "also at layers 3, 7"
    assert also_at(names[:2]) == "also at layer 3"
    assert also_at([*names[:2], "blocks.2.attn.hook_z[1]"]) == "also at 3, 2 attn.z[1]"
    assert also_at(names[:1]) == also_at(()) == ""
