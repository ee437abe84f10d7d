"""Numbers of a key are uniform, and do not depend on the other keys."""

import numpy as np
from scipy import stats

from tl_latentlens.statistics.keyed_random import keyed_uniform


def test_numbers_hang_on_seed_and_key_alone() -> None:
    whole = keyed_uniform(0, np.arange(1000), 20)
    np.testing.assert_array_equal(keyed_uniform(0, np.array([17, 3]), 20), whole[[17, 3]])
    np.testing.assert_array_equal(keyed_uniform(0, np.array([17]), 5), whole[[17], :5])
    assert keyed_uniform(0, np.zeros(0, np.int64), 4).shape == (0, 4)
    for other in (1, (0, 1), (1, 0), 2**40):
        assert not np.isin(keyed_uniform(other, np.arange(1000), 20), whole).any()


def test_numbers_are_uniform_and_unrelated() -> None:
    drawn = keyed_uniform((5, 2), np.arange(2000), 50)
    assert (drawn.min(), drawn.max()) >= (0, 0)
    assert drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 1e-3
    for first, second in ((drawn[:-1], drawn[1:]), (drawn[:, :-1], drawn[:, 1:])):
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    spread = np.sqrt(1 / 12 / 50)
    assert stats.kstest((drawn.mean(1) - 0.5) / spread, "norm").pvalue > 1e-3
