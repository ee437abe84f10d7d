"""The workers that an index asks for."""

from collections.abc import Mapping, Sequence
from typing import Any

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.questions import Workers
from tl_latentlens.index.rank_workers import RankWorkers
from tl_latentlens.index.ray_workers import RayWorkers
from tl_latentlens.index.rows import BankRows
from tl_latentlens.index.workers import files_of


def start_workers(
    on: str | None,
    n_workers: int | None,
    bank_rows: BankRows,
    hook_names: Sequence[str],
    options: Mapping[str, Any],
    approximate: bool | str,
    verify: bool,
) -> Workers | None:
    """The workers of an index; None where its own process searches. See `ContextualIndex` for the arguments.

    Raises:
        InvalidInputError: Unknown or contradictory settings.
        MissingExtraError: Ray is not installed.
    """
    if on not in (None, "ray", "distributed"):
        raise InvalidInputError(f"got on={on!r}; expected None, 'ray' or 'distributed'")
    if n_workers is not None and (on != "ray" or n_workers < 1):
        raise InvalidInputError(f"got n_workers={n_workers!r} with on={on!r}; expected at least 1, with on='ray'")
    if on is None:
        return None
    if approximate:
        raise InvalidInputError(
            f"got approximate={approximate!r} with on={on!r}; workers search exactly: leave one of them out"
        )
    files = files_of(bank_rows, hook_names)
    if on == "ray":
        return RayWorkers(files, hook_names, options, n_workers, verify=verify)
    return RankWorkers(files, hook_names, options, verify=verify)
