"""What a bank would cost, and which words it would have, before it is built."""

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.bank.batches import Batch, BlockBatches
from tl_latentlens.bank.build import default_batch_tokens, record_model
from tl_latentlens.bank.create import bytes_of_bank, cut_blocks
from tl_latentlens.bank.format import DTYPES
from tl_latentlens.bank.planning import origin_of, plan_corpus, plan_notes
from tl_latentlens.bank.record import bank_hooks
from tl_latentlens.bank.settings import require_settings
from tl_latentlens.corpus.plan import Plan, tokens_up_to
from tl_latentlens.corpus.plan_file import PlanOrigin, save_plan
from tl_latentlens.index.word_coverage import word_coverage
from tl_latentlens.model.describe import model_device, parameters_of, require_model
from tl_latentlens.model.hook_names import expand_hook_names
from tl_latentlens.model.running import run_hooked

_MEASURED_BATCHES, _MEASURED_SECONDS = 8, 20.0  # so many batches are run, or for so long
_CARD_GB = (8, 16, 24, 40, 48, 80, 141)
_USABLE_SHARE = 0.9  # of a card's memory; the rest is for the working memory of a search, and for others
_SCALE_BYTES = 4  # what brings a row to length 1


@dataclass(frozen=True)
class BankPlan:
    """The plan of a bank, what it would cost, and the words it would have.

    Attributes:
        plan: Its rows.
        origin: The model for which the corpus was planned.
        widths: Hook name → width of its vectors.
        dtype: How they would be stored.
        tokens_to_run: Tokens that the model runs; fewer than the corpus has, since a text is run up to its last row.
        bytes_on_disk: Most bytes of the bank file.
        bytes_of_model: Of the weights.
        seconds: Estimated for one process as this one; NaN where no batch was measured.
        tokens_per_second: Of each measured batch.
        coverage: The rows of each wanted word (see `word_coverage`); None where none was asked for.
    """

    plan: Plan = field(repr=False)
    origin: PlanOrigin
    widths: dict[str, int]
    dtype: str
    tokens_to_run: int
    bytes_on_disk: int
    bytes_of_model: int
    seconds: float
    tokens_per_second: tuple[float, ...] = field(repr=False)
    coverage: pd.DataFrame | None = field(default=None, repr=False)

    @property
    def n_rows(self) -> int:
        """Rows of the bank."""
        return self.plan.n_rows

    @property
    def n_tokens(self) -> int:
        """Tokens of the corpus, with those before and after each text."""
        return len(self.plan.tokens)

    @property
    def bytes_on_gpu(self) -> int:
        """Bytes of the vectors of all hook names on a GPU, as an index holds them."""
        return sum(map(self._bytes_on_gpu, self.widths))

    def _bytes_on_gpu(self, hook_name: str) -> int:
        return self.n_rows * (self.widths[hook_name] * np.dtype(DTYPES[self.dtype][1]).itemsize + _SCALE_BYTES)

    def cards(self, sizes_gb: Sequence[float] = _CARD_GB) -> pd.DataFrame:
        """What fits which GPU, one line a size of memory.

        A search takes vectors of which a card holds no more than their codes, a byte a number, and reads the rows from the
        computer's memory. Of a card's memory, 90 % is counted.

        Columns: memory_gb; index ("all hook names", "their codes", "n hook names" or "no hook name"); n_cards (that hold all
        hook names); model ("fits", or the number of cards that its weights need).
        """
        n_numbers = self.n_rows * sum(self.widths.values())
        lines = []
        for size in sizes_gb:
            usable = size * 1e9 * _USABLE_SHARE
            smallest = sorted(map(self._bytes_on_gpu, self.widths))
            n_names = int(np.searchsorted(np.cumsum(smallest), usable, "right"))
            index = "all hook names" if n_names == len(self.widths) else f"{n_names} hook names" if n_names else "no hook name"
            index = "their codes" if n_names < len(self.widths) and n_numbers <= usable else index
            n_model = math.ceil(self.bytes_of_model / usable)
            model = "fits" if n_model <= 1 else f"{n_model} cards"
            lines.append((size, index, max(1, math.ceil(self.bytes_on_gpu / usable)), model))
        return pd.DataFrame(lines, columns=["memory_gb", "index", "n_cards", "model"])

    def save(self, path: str | Path) -> Path:
        """Write the plan (.plan), from which any number of processes build; returns the path.

        Raises:
            CorpusError: It cannot be written, or the name does not end in .plan.
        """
        return save_plan(self.plan, path, self.origin)


def plan_bank(
    model: Any,
    texts: Any,
    *,
    hook_names: int | str | Iterable[int | str] | Callable[[str], bool] | None = None,
    max_rows_per_token: int | None = 50,
    dtype: str = "float16",
    seed: int = 0,
    repeat: bool = False,
    keep_special_tokens: bool = False,
    batch_tokens: int | None = None,
    words: Sequence[str] | None = None,
    language: str | None = "english",
    measure: bool = True,
    progress: bool = True,
) -> BankPlan:
    """Plan a bank: its rows, bytes and estimated time, and the rows that wanted words would get.

    It takes the tokenizing of the corpus, and a few batches of it through the model.

    Args:
        model: The model of the bank.
        texts: As `build_bank` takes them, as all arguments up to `batch_tokens`.
        hook_names: Which activations.
        max_rows_per_token: Most rows of one token id.
        dtype: How vectors would be stored.
        seed: Of the sample.
        repeat: Run each text twice.
        keep_special_tokens: Make rows of special tokens of the texts too.
        batch_tokens: Most tokens of one batch.
        words: Wanted words: whole words of three letters or more.
        language: Of the stemmer that tells which words are inflections of one, as Snowball names it; None: no inflections.
        measure: Run up to eight batches, for 20 seconds at most, to estimate the time.
        progress: Show a progress bar, and notes.

    Raises:
        UnknownHookError, CorpusError, InvalidInputError: As `build_bank`; a wanted word that is no whole word.
    """
    require_model(model)
    names = expand_hook_names(model, hook_names)
    require_settings(dtype, batch_tokens)
    batch_tokens = batch_tokens or default_batch_tokens(model)
    plan = plan_corpus(
        model,
        texts,
        hook_names=names,
        max_rows_per_token=max_rows_per_token,
        seed=seed,
        repeat=repeat,
        keep_special_tokens=keep_special_tokens,
    )
    for note in plan_notes(model, plan) if progress else ():
        tqdm.write(note, file=sys.stderr)
    record = record_model(model, plan, names)
    coverage = None
    if words is not None:
        coverage = word_coverage(plan, words, record.token_bytes, record.special_ids, language)
    batches = BlockBatches(plan, cut_blocks(plan, record.widths, dtype, batch_tokens), batch_tokens)
    rates = tuple(_rates(model, batches, record.widths, dtype, progress)) if measure else ()
    tokens_to_run = int(tokens_up_to(plan, np.array([plan.n_rows]))[0])
    return BankPlan(
        plan=plan,
        origin=origin_of(model),
        widths=dict(record.widths),
        dtype=dtype,
        tokens_to_run=tokens_to_run,
        bytes_on_disk=bytes_of_bank(plan, record, dtype, batch_tokens),
        bytes_of_model=sum(parameter.numel() * parameter.element_size() for parameter in parameters_of(model)),
        seconds=tokens_to_run * float(np.mean([1 / rate for rate in rates])) if rates else math.nan,
        tokens_per_second=rates,
        coverage=coverage,
    )


@dataclass(frozen=True)
class _Unwritten:
    """Takes rows and stores none: what a build computes of a batch is computed."""

    hook_names: tuple[str, ...]
    dtype: str

    def write(self, hook_name: str, batch: Batch, vectors: Float[Tensor, "rows d"], norms: Float[Tensor, " rows"]) -> None:
        """Store nothing."""


def _rates(model: Any, batches: BlockBatches, widths: dict[str, int], dtype: str, progress: bool) -> Iterator[float]:
    """Tokens a second of a few batches, from long prompts to short ones, after one that is not counted."""
    device, writer, began = model_device(model), _Unwritten(tuple(widths), dtype), time.perf_counter()
    chosen = _spread(list(batches.of(len(batches.block_starts) // 2 - 1, device)))
    for number, batch in enumerate(tqdm([chosen[0], *chosen], desc="measuring", unit=" batches", disable=not progress)):
        started = time.perf_counter()
        run_hooked(model, batch.tokens, batch.attention_mask, bank_hooks(writer, batch))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if number:
            yield batch.n_tokens / (time.perf_counter() - started)
        if number and time.perf_counter() - began > _MEASURED_SECONDS:
            break


def _spread(batches: list[Batch]) -> list[Batch]:
    """Up to eight, evenly spread; in an order in which the first few are spread too."""
    places = np.unique(np.linspace(0, len(batches) - 1, _MEASURED_BATCHES).round().astype(int)).tolist()
    return [batches[place] for place in [*places[1::2], *places[::2]]]
