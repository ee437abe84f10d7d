"""One line of the coverage benchmark: how often something held in simulated cases, and how often it should."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.measure import table

COVERAGE = (0.93, 0.98)  # What an interval at a nominal 0.95 should have.
UNIFORM = (0.03, 0.06)  # The share of null cases at p < 0.05.
_N_ERRORS = 3  # A line is wrong where it is further than so many standard errors from what is wanted.


@dataclass(frozen=True)
class Line:
    """A share of simulated cases.

    Attributes:
        what: What was simulated.
        n: How many values each case had.
        nominal: The share that the interval or the p-value promises.
        found: The share of the cases.
        cases: How many there were.
        wanted: The least and the most that `found` should be; None: it is stated, and nothing is asked of it.
    """

    what: str
    n: int | str
    nominal: float
    found: float
    cases: int
    wanted: tuple[float, float] | None = COVERAGE

    @property
    def error(self) -> float:
        """The standard error of `found` that comes from the number of cases."""
        return math.sqrt(self.found * (1 - self.found) / self.cases)

    @property
    def is_wrong(self) -> bool:
        """True where `found` is outside of what is wanted by more than chance explains."""
        if self.wanted is None:
            return False
        low, high = self.wanted
        return not low - _N_ERRORS * self.error <= self.found <= high + _N_ERRORS * self.error


def lines_table(lines: Sequence[Line]) -> str:
    """The lines as a Markdown table; what is wrong is in bold."""
    return table([_cells(line) for line in lines])


def _cells(line: Line) -> dict[str, str]:
    found = f"{line.found:.3f} ± {line.error:.3f}"
    return {
        "what": line.what,
        "n": f"{line.n:,}" if isinstance(line.n, int) else line.n,
        "nominal": f"{line.nominal:.2f}",
        "found": f"**{found}**" if line.is_wrong else found,
        "wanted": "" if line.wanted is None else f"{line.wanted[0]:.2f}–{line.wanted[1]:.2f}",
        "cases": f"{line.cases:,}",
    }
