"""Batches: which prompts of a block run together, and where its rows stand among their tokens. Knows no file and no model."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tl_latentlens.corpus.plan import Plan

# A prompt that is shorter than this share of the longest in its batch begins the next batch, ...
_MIN_LENGTH_RATIO = 0.9
# ... unless the batch would have fewer tokens than this, or than an eighth of the most.
_MIN_BATCH_TOKENS = 256


@dataclass(frozen=True)
class Batch:
    """Prompts to run together, right-padded, and the rows among their tokens.

    Attributes:
        tokens: Token ids, [batch, pos].
        attention_mask: True at tokens, False at padding.
        rows: Row numbers in the bank, [n].
        row_batch: Where each row stands in the batch, [n].
        row_pos: Its position, [n].
        block: The bank's block that these rows belong to.
        n_tokens: Tokens without padding.

    Where the plan repeats, `tokens` hold each text twice and `row_pos` points into the second copy.
    """

    tokens: Int[Tensor, "batch pos"]
    attention_mask: Bool[Tensor, "batch pos"]
    rows: Int[np.ndarray, " rows"]
    row_batch: Int[Tensor, " rows"]
    row_pos: Int[Tensor, " rows"]
    block: int
    n_tokens: int


@dataclass(frozen=True)
class BlockBatches:
    """The batches of each block.

    Attributes:
        plan: The rows.
        block_starts: First row of each block, and the end: [n_blocks + 1].
        batch_tokens: Most tokens of one batch, padding included.
    """

    plan: Plan
    block_starts: Int[np.ndarray, " blocks_and_end"]
    batch_tokens: int

    def n_tokens(self, block: int) -> int:
        """Tokens of the prompts that a block runs, without padding."""
        return int(self._run_lengths(self._prompts(block)).sum())

    def of(self, block: int, device: torch.device | str | None) -> Iterator[Batch]:
        """The batches of one block on `device`, longest prompts first.

        A batch ends early where the next prompts are much shorter: padding costs as much as tokens.
        """
        prompts = self._prompts(block)
        lengths = self._run_lengths(prompts)
        order = np.argsort(-lengths, kind="stable")
        prompts, lengths = prompts[order], lengths[order]
        first = 0
        while first < len(prompts):
            n_prompts = self._n_prompts_together(lengths[first:])
            yield self._batch(block, prompts[first : first + n_prompts], lengths[first : first + n_prompts], device)
            first += n_prompts

    def _prompts(self, block: int) -> Int[np.ndarray, " prompts"]:
        return np.unique(self.plan.row_prompts[self.block_starts[block] : self.block_starts[block + 1]])

    def _run_lengths(self, prompts: Int[np.ndarray, " prompts"]) -> Int[np.ndarray, " prompts"]:
        """The number of tokens to run of each prompt: a causal model need not run past a prompt's last row."""
        starts, ends = self.plan.prompt_starts[prompts], self.plan.prompt_starts[prompts + 1]
        if self.plan.settings.bidirectional:
            return ends - starts
        last_row_tokens = self.plan.row_tokens[np.searchsorted(self.plan.row_tokens, ends) - 1]
        return last_row_tokens + 1 - starts + self.plan.shifts(prompts)

    def _n_prompts_together(self, lengths: Int[np.ndarray, " prompts"]) -> int:
        """The number of next prompts that make one batch; their `lengths` descend."""
        longest = int(lengths[0])
        n_fitting = max(1, self.batch_tokens // longest)
        n_similar = int(np.searchsorted(-lengths, -_MIN_LENGTH_RATIO * longest, "right"))
        n_enough = -(-max(_MIN_BATCH_TOKENS, self.batch_tokens // 8) // longest)
        return min(n_fitting, max(n_similar, n_enough))

    def _batch(
        self,
        block: int,
        prompts: Int[np.ndarray, " prompts"],
        lengths: Int[np.ndarray, " prompts"],
        device: torch.device | str | None,
    ) -> Batch:
        plan = self.plan
        columns = np.arange(int(lengths.max()))
        mask = columns < lengths[:, None]
        starts, ends = plan.prompt_starts[prompts], plan.prompt_starts[prompts + 1]
        shifts = plan.shifts(prompts)
        in_second_copy = columns >= (ends - starts)[:, None]  # only where the plan repeats
        tokens = np.zeros(mask.shape, np.int64)
        tokens[mask] = plan.tokens[(starts[:, None] + columns - in_second_copy * shifts[:, None])[mask]]
        first_rows = np.searchsorted(plan.row_tokens, starts)
        n_rows = np.searchsorted(plan.row_tokens, ends) - first_rows
        row_batch = np.repeat(np.arange(len(prompts)), n_rows)
        # Rows of each prompt are consecutive: with 2 and 3 rows, 0 1 0 1 2 are added to the first row of each.
        rows = np.arange(len(row_batch)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows) + np.repeat(first_rows, n_rows)
        row_pos = plan.row_tokens[rows] - starts[row_batch] + shifts[row_batch]
        return Batch(
            _to_device(tokens, device),
            _to_device(mask, device),
            rows,
            _to_device(row_batch, device),
            _to_device(row_pos, device),
            block,
            int(lengths.sum()),
        )


def _to_device(array: np.ndarray, device: torch.device | str | None) -> Tensor:
    tensor = torch.from_numpy(array)
    if device is None or torch.device(device).type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # a copy from pageable memory would wait for the model
