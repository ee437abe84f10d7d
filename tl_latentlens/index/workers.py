"""Workers: processes that each hold some files of an index and rank their rows; what they find is ranked together here.

A worker's answer is the exact top k of its rows, and a row's similarity does not depend on the rows beside it. So the best of
all answers are those of one index that holds every row.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tl_latentlens.bank.bank import Bank, reopen_bank
from tl_latentlens.index.cross_layer import nearest_of_labels, nearest_rows
from tl_latentlens.index.found_rows import FoundRows
from tl_latentlens.index.placed_rows import PlacedRows, SearchOptions
from tl_latentlens.index.questions import LabelQuestion, RowQuestion
from tl_latentlens.index.rows import BankRows
from tl_latentlens.model.heads import hook_point
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.device import as_device
from tl_latentlens.search.geometry import RowGeometry

_Question = TypeVar("_Question", RowQuestion, LabelQuestion)


@dataclass(frozen=True)
class WorkerFile:
    """A file that a worker holds.

    Attributes:
        path: Of the bank file.
        digest: Of the file that is meant.
        first_row: The row of the index that is its row 0.
        hook_names: Those of its hook names that the worker ranks.
        n_rows: Its rows.
    """

    path: str
    digest: str
    first_row: int
    hook_names: tuple[str, ...]
    n_rows: int


def files_of(bank_rows: BankRows, hook_names: Sequence[str]) -> list[WorkerFile]:
    """The files of the loaded hook names, in row order."""
    names: dict[tuple[int, str], list[str]] = defaultdict(list)
    files: dict[tuple[int, str], tuple[str, int]] = {}
    for name in hook_names:
        for first_row, bank in bank_rows.of(name):
            for offset, file in bank.file.parts_of(hook_point(name)):
                key = first_row + offset, str(file.path)
                names[key].append(name)
                files[key] = file.digest, file.plan.n_rows
    return [
        WorkerFile(path, digest, first, tuple(names[first, path]), n) for (first, path), (digest, n) in sorted(files.items())
    ]


def dealt_out(files: Sequence[WorkerFile], n: int) -> list[list[WorkerFile]]:
    """The files of each of n workers, of about as many vectors each; as many workers as there are files at most."""
    n, sizes = min(n, len(files)), np.array([file.n_rows * len(file.hook_names) for file in files])
    ends = np.searchsorted(np.cumsum(sizes), sizes.sum() * np.arange(1, n + 1) / n) + 1
    places = np.arange(1, n + 1)
    ends = np.maximum.accumulate(np.maximum(ends, places) - places) + places  # each has a file
    ends = np.minimum(ends, len(files) - n + places)
    return [list(files[first:end]) for first, end in pairwise([0, *ends.tolist()])]


class RowWorker:
    """The rows of some files, ranked as one of several workers."""

    def __init__(
        self, files: Sequence[WorkerFile], hook_names: Sequence[str], options: Mapping[str, Any], verify: bool
    ) -> None:
        """Open nothing yet.

        Args:
            files: Those that it holds.
            hook_names: All of the index, in its order.
            options: `device`, `dtype` and `memory_budget` of the search.
            verify: Check every block of the files when they are opened.
        """
        self._given, self._hook_names, self._options, self._verify = files, list(hook_names), dict(options), verify
        self._rows: dict[str, dict[str, PlacedRows]] = {}

    def open(self) -> int:
        """Open the files; returns the number of the process.

        Raises:
            BankError: A file is not there, or another stands in its place.
            BankCorruptError: A block does not match its checksum.
        """
        _ = self._files
        return os.getpid()

    @cached_property
    def _files(self) -> list[tuple[WorkerFile, Bank]]:
        """The files, opened in the process that answers, which may have been started again."""
        files = [(file, reopen_bank(file.path, file.digest)) for file in self._given]
        for file, bank in files if self._verify else ():
            bank.verify(sorted({hook_point(name) for name in file.hook_names}))
        return files

    @own_arithmetic()
    def rank_rows(self, transform: str, geometries: Mapping[str, RowGeometry], question: RowQuestion) -> FoundRows:
        """The nearest of its rows.

        Args:
            transform: What the geometries are of; rows are loaded once for each.
            geometries: Hook name → how its rows are compared.
            question: What is searched.
        """
        rows = self._rows_of(transform, geometries)
        return nearest_rows(self._here(question), rows, self._hook_names).to(torch.device("cpu"))

    @own_arithmetic()
    def rank_labels(
        self,
        transform: str,
        geometries: Mapping[str, RowGeometry],
        question: LabelQuestion,
        labels: Mapping[int, Int[Tensor, " rows"]],
    ) -> FoundRows:
        """The nearest of its rows of each label.

        Args:
            transform: As `rank_rows` takes it.
            geometries: As `rank_rows` takes them.
            question: What is searched.
            labels: First row of each of its files → the labels of its rows.
        """
        rows, device = self._rows_of(transform, geometries), self._device
        found = nearest_of_labels(
            self._here(question), rows, self._hook_names, lambda first_row, _: labels[first_row].to(device)
        )
        return found.to(torch.device("cpu"))

    @property
    def _device(self) -> torch.device:
        return as_device(self._options["device"])

    def _here(self, question: _Question) -> _Question:
        return question.to(self._device)

    def _rows_of(self, transform: str, geometries: Mapping[str, RowGeometry]) -> dict[str, PlacedRows]:
        """Hook name → its rows, loaded at the first question under a transform."""
        if transform not in self._rows:
            loaded, parts = self._loaded(), defaultdict(list)
            for file, bank in self._files:
                for name in file.hook_names:
                    vectors = loaded.get((name, file.first_row))
                    parts[name].append((file.first_row, bank.vectors(name) if vectors is None else vectors))
            options = SearchOptions(transform, self._device, self._options["dtype"], False, self._options["memory_budget"])
            self._rows[transform] = {
                name: PlacedRows(geometries[name].to(self._device), of_name, options) for name, of_name in parts.items()
            }
        return self._rows[transform]

    def _loaded(self) -> dict[tuple[str, int], Tensor]:
        """Vectors that another transform has on the device already."""
        return {
            (name, first): search.rows.vectors
            for rows in self._rows.values()
            for name, placed in rows.items()
            for first, search in placed.parts
        }
