"""Lines that views draw hold what `Neighbor` holds."""

import tl_latentlens as tll


def test_lines_of_neighbors_are_the_neighbors(index: tll.ContextualIndex) -> None:
    vectors = index.banks[0].vectors(index.hook_names[0])[:4].astype("float32")
    for calibrate in (False, True):
        found = index.search(vectors, 5, calibrate=calibrate)
        for query in range(4):
            neighbors, lines = found.neighbors_of(query), found.neighbor_lines(query)
            assert found.neighbor_lines(query, 2) == lines[:2]
            shown = [(str(line.context), line.similarity, line.chance, line.hook_name, line.row) for line in lines]
            assert shown == [(near.context, near.similarity, near.chance, near.hook_name, near.row) for near in neighbors]
    assert found.with_chances() is found
