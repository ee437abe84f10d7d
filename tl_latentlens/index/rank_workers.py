"""Workers as the processes of torch.distributed: each ranks its share of the files, and all learn what all have found."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.found_rows import FoundRows
from tl_latentlens.index.questions import LabelQuestion, RowQuestion
from tl_latentlens.index.workers import RowWorker, WorkerFile, dealt_out
from tl_latentlens.search.geometry import RowGeometry


class RankWorkers:
    """The processes that torchrun started. Every one makes the index and asks it the same, and gets the same answer."""

    def __init__(
        self, files: Sequence[WorkerFile], hook_names: Sequence[str], options: Mapping[str, Any], *, verify: bool
    ) -> None:
        """Open the files of this process.

        Args:
            files: All files of the index.
            hook_names: The hook names of the index, in its order.
            options: `device`, `dtype` and `memory_budget` of the search.
            verify: Check every block first.

        Raises:
            InvalidInputError: There is no group of processes.
            BankCorruptError: A block does not match its checksum.
        """
        if not dist.is_initialized():
            raise InvalidInputError(
                "got on='distributed' and no group of processes; start them with torchrun, and call "
                "torch.distributed.init_process_group('gloo') first"
            )
        dealt = dealt_out(files, dist.get_world_size())
        self._files = dealt[dist.get_rank()] if dist.get_rank() < len(dealt) else []
        self._worker = RowWorker(self._files, hook_names, options, verify)
        self._worker.open()

    def __str__(self) -> str:
        return f"{dist.get_world_size()} processes"

    def rank_rows(self, transform: str, geometries: Mapping[str, RowGeometry], question: RowQuestion) -> list[FoundRows]:
        """The answer of each process."""
        return self._gathered(question, lambda: self._worker.rank_rows(transform, geometries, question))

    def rank_labels(
        self, transform: str, geometries: Mapping[str, RowGeometry], question: LabelQuestion, labels: Int[Tensor, " rows"]
    ) -> list[FoundRows]:
        """The answer of each process."""
        own = {file.first_row: labels[file.first_row : file.first_row + file.n_rows] for file in self._files}
        return self._gathered(question, lambda: self._worker.rank_labels(transform, geometries, question, own))

    def _gathered(self, question: RowQuestion | LabelQuestion, answer: Callable[[], FoundRows]) -> list[FoundRows]:
        """The answers of all processes, the same everywhere.

        Raises:
            InvalidInputError: Another process asked something else.
            RuntimeError: Another process failed.
        """
        found: FoundRows | None = None
        error: Exception | None = None
        try:
            found = answer()
        except Exception as failure:  # the others wait, so they are told before it is raised
            error = failure
        of_all: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(of_all, (_digest(question), found, error and f"{type(error).__name__}: {error}"))
        if error is not None:
            raise error
        for rank, (digest, _, failure) in enumerate(of_all):
            if failure is not None:
                raise RuntimeError(f"process {rank} failed: {failure}")
            if digest != of_all[dist.get_rank()][0]:
                raise InvalidInputError(
                    f"processes {dist.get_rank()} and {rank} searched for different vectors; with on='distributed' every "
                    "process asks the same, in the same order"
                )
        return [found for _, found, _ in of_all]


def _digest(question: RowQuestion | LabelQuestion) -> str:
    """Of what is asked: the same in two processes that ask the same."""
    digest = hashlib.sha256(f"{type(question).__name__} {question.top_k} {list(question.queries)}".encode())
    for units in question.queries.values():
        digest.update(units.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
