"""Do intervals cover, and are p-values uniform under their null? Simulations whose truth is known, one module a subject."""

from benchmarks.coverage import aurocs, components, directions, features, kappas, known, measures, shares
from benchmarks.coverage.lines import lines_table
from benchmarks.measure import Settings, WrongResultError

# Each has a TITLE, and a function `lines(settings)` that gives its lines.
SUBJECTS = (shares, measures, kappas, components, aurocs, directions, features, known)


def run(settings: Settings) -> str:
    """A table for each subject, `settings.draws` simulated cases a line.

    Raises:
        WrongResultError: A share is further from what is wanted than chance explains; the message has all tables.
    """
    parts, is_wrong = ["## Coverage of intervals and p-values"], False
    for subject in SUBJECTS:
        lines = subject.lines(settings)
        parts += [f"{subject.TITLE}:", lines_table(lines)]
        is_wrong |= any(line.is_wrong for line in lines)
    text = "\n\n".join(parts)
    if is_wrong:
        raise WrongResultError(f"lines in bold are not as wanted\n\n{text}")
    return text
