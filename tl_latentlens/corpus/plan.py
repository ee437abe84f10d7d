"""Which tokens become rows: computed from the tokens alone, before any model runs.

A causal model gives the same activation for the same tokens up to a position, so exactly one row stands for each distinct
token prefix; where a token is seen in its whole prompt, one for each token of each distinct prompt. Then a seeded uniform
sample caps the rows of each token id. `corpus` gives the texts and `model` the tokens; `bank` stores what is planned here.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from tl_latentlens.errors import CorpusError, InvalidInputError


@dataclass(frozen=True)
class PlanSettings:
    """What decides which tokens of which prompts become rows.

    Attributes:
        max_rows_per_token: Most rows of one token id; None for no cap.
        seed: Seed of the sample that a cap draws.
        bidirectional: True for encoders: a token is seen in its whole prompt, so only equal prompts share their rows.
        repeat: True where a causal model runs each text twice, BOS text text, and rows are read in the second copy, whose
            tokens know what comes after them (echo embeddings, arXiv 2402.15449): only equal prompts share their rows.
        text_start: With repeat, the tokens before the text (BOS), which are not run again. `make_plan` finds them.
    """

    max_rows_per_token: int | None = 50
    seed: int = 0
    bidirectional: bool = False
    repeat: bool = False
    text_start: int = 0


# The first banks had no such fields. They are not recorded where they are 0 or empty, so that digests stay the same.
OPTIONAL_FIELDS = ("repeat", "text_start", "n_heads")


def to_json_dict(data: Any) -> dict[str, Any]:
    """The fields of a dataclass as they are stored and hashed, in JSON."""
    return asdict(
        data, dict_factory=lambda pairs: {name: value for name, value in pairs if name not in OPTIONAL_FIELDS or value}
    )


@dataclass(frozen=True)
class Prompts:
    """Tokenised texts, back to back.

    Attributes:
        tokens: Token ids of all prompts, int32.
        starts: Where each prompt begins in `tokens`, and the end: [n_prompts + 1], int64.
        special: True where a token is BOS or padding: never a row.
        n_truncated: How many texts were longer than the model's n_ctx and were cut.
    """

    tokens: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " prompts_and_end"]
    special: Bool[np.ndarray, " tokens"]
    n_truncated: int = 0

    def as_lists(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [one.tolist() for one in np.split(self.tokens, self.starts[1:-1])]


@dataclass(frozen=True)
class Plan:
    """The rows of a bank.

    Attributes:
        tokens: Token ids of all prompts, back to back, int32.
        prompt_starts: Where each prompt begins in `tokens`, and the end: [n_prompts + 1], int64.
        row_tokens: Where each row stands in `tokens`, ascending, int64.
        settings: What decided the rows.
        n_truncated: Prompts cut at n_ctx.
    """

    tokens: Int[np.ndarray, " tokens"]
    prompt_starts: Int[np.ndarray, " prompts_and_end"]
    row_tokens: Int[np.ndarray, " rows"]
    settings: PlanSettings
    n_truncated: int = 0

    @property
    def n_rows(self) -> int:
        """Rows of the bank."""
        return len(self.row_tokens)

    @property
    def n_prompts(self) -> int:
        """Prompts of the corpus, blank ones included, so that prompt_index counts the user's texts."""
        return len(self.prompt_starts) - 1

    @cached_property
    def row_prompts(self) -> Int[np.ndarray, " rows"]:
        """The prompt of each row."""
        return np.searchsorted(self.prompt_starts, self.row_tokens, side="right") - 1

    def shifts(self, prompts: Int[np.ndarray, " prompts"]) -> Int[np.ndarray, " prompts"]:
        """How far on in a run a row is read than it stands in its prompt: with repeat the length of the text, else 0.

        A prompt BOS a b is run as BOS a b a b: with a shift of 2, b is read at position 4.
        """
        if not self.settings.repeat:
            return np.zeros(len(prompts), np.int64)
        return self.prompt_starts[prompts + 1] - self.prompt_starts[prompts] - self.settings.text_start

    @cached_property
    def digest(self) -> str:
        """sha256 over everything that decides the rows, as hex."""
        sha = hashlib.sha256(json.dumps(to_json_dict(self.settings), sort_keys=True).encode())
        for array in (self.tokens, self.prompt_starts, self.row_tokens):
            sha.update(memoryview(np.ascontiguousarray(array)))
        return sha.hexdigest()


def make_plan(prompts: Prompts, settings: PlanSettings | None = None) -> Plan:
    """Choose the rows: one for each distinct prefix (or prompt), at most max_rows_per_token for each token id.

    Where several prompts share a prefix, the first prompt holds its row.

    Raises:
        CorpusError: Not one token could become a row.
        InvalidInputError: `max_rows_per_token` is below 1, or both `bidirectional` and `repeat` are True.
    """
    settings = settings or PlanSettings()
    cap = settings.max_rows_per_token
    if cap is not None and cap < 1:
        raise InvalidInputError(f"got max_rows_per_token={cap}; expected at least 1, or None for no cap")
    if settings.bidirectional and settings.repeat:
        raise InvalidInputError(
            "got repeat=True for a bidirectional model, which sees the whole text anyway; expected a causal one: leave it out"
        )
    kept = ~prompts.special
    settings = replace(settings, text_start=_text_start(prompts) if settings.repeat else 0)
    if settings.bidirectional or settings.repeat:
        kept &= ~_in_repeated_prompt(prompts)
    else:
        kept &= ~_repeats_prefix(prompts)
    rows = np.flatnonzero(kept)
    if not len(rows):
        raise CorpusError(
            f"nothing to bank: the corpus's {len(prompts.starts) - 1} texts hold no token besides BOS and padding"
        )
    if cap is not None:
        rows = _sample_per_token(rows, prompts.tokens, cap, settings.seed)
    return Plan(prompts.tokens, prompts.starts, rows, settings, prompts.n_truncated)


def _text_start(prompts: Prompts) -> int:
    """How many special tokens every prompt that is not empty begins with."""
    starts, ends = prompts.starts[:-1], prompts.starts[1:]
    text = np.flatnonzero(~prompts.special)
    first = np.append(text, len(prompts.tokens))[np.searchsorted(text, starts)]
    return int((np.minimum(first, ends) - starts)[ends > starts].min(initial=len(prompts.tokens)))


def _repeats_prefix(prompts: Prompts) -> Bool[np.ndarray, " tokens"]:
    """True at each token whose prefix (itself included) an earlier prompt has too.

    Walks down the trie of all prompts, one depth a step, and drops prompts as soon as their prefix is their own, so the
    work is that of the shared prefixes alone.
    """
    repeats = np.zeros(len(prompts.tokens), bool)
    lengths = np.diff(prompts.starts)
    n_ids = int(prompts.tokens.max(initial=0)) + 1
    active = np.arange(len(lengths))
    group = np.zeros(len(lengths), np.int64)
    for depth in range(int(lengths.max(initial=0))):
        longer = lengths[active] > depth
        active, group = active[longer], group[longer]
        at = prompts.starts[active] + depth
        _, first, node, count = np.unique(
            group * n_ids + prompts.tokens[at], return_index=True, return_inverse=True, return_counts=True
        )
        repeat = np.ones(len(active), bool)
        repeat[first] = False
        repeats[at[repeat]] = True
        shared = count[node] > 1
        active, group = active[shared], node[shared]
        if not len(active):
            break
    return repeats


def _in_repeated_prompt(prompts: Prompts) -> Bool[np.ndarray, " tokens"]:
    spans = zip(prompts.starts[:-1], prompts.starts[1:], strict=True)
    repeated = pd.Series([prompts.tokens[start:end].tobytes() for start, end in spans], dtype=object).duplicated()
    return np.repeat(repeated.to_numpy(bool), np.diff(prompts.starts))


def _sample_per_token(
    rows: Int[np.ndarray, " candidates"], tokens: Int[np.ndarray, " tokens"], cap: int, seed: int
) -> Int[np.ndarray, " rows"]:
    """The first `cap` rows of each token id in a random order; shuffles `rows` itself."""
    np.random.default_rng(seed).shuffle(rows)
    rows = rows[np.argsort(tokens[rows], kind="stable")]
    ids = tokens[rows]
    kept = np.ones(len(ids), bool)
    kept[cap:] = (
        ids[cap:] != ids[:-cap]
    )  # the ids are sorted: where the one `cap` places before is the same, so are all between
    return np.sort(rows[kept])


def block_starts(plan: Plan, target_tokens: int, max_rows: int) -> Int[np.ndarray, " blocks_and_end"]:
    """Cut the rows into blocks at prompt boundaries: [n_blocks + 1] row numbers.

    A block closes with the prompt that brings it to `target_tokens` tokens to run or `max_rows` rows; a long prompt may
    exceed either on its own.
    """
    last_row = np.flatnonzero(np.r_[np.diff(plan.row_prompts) > 0, True])
    prompts = plan.row_prompts[last_row]
    tokens_run = np.cumsum(plan.row_tokens[last_row] + 1 - plan.prompt_starts[prompts] + plan.shifts(prompts))
    rows_kept = last_row + 1
    starts, tokens_before, rows_before = [0], 0, 0
    while rows_before < plan.n_rows:
        by_tokens = np.searchsorted(tokens_run, tokens_before + target_tokens)
        by_rows = np.searchsorted(rows_kept, rows_before + max_rows)
        last = min(int(by_tokens), int(by_rows), len(last_row) - 1)
        tokens_before, rows_before = int(tokens_run[last]), int(rows_kept[last])
        starts.append(rows_before)
    return np.array(starts, np.int64)


def prompts_from_lists(token_lists: Sequence[Sequence[int]], special: Sequence[Sequence[bool]] | None = None) -> Prompts:
    """Prompts from token ids at hand, for instance from one's own tokeniser.

    Args:
        token_lists: One list of token ids a prompt, BOS included where the model wants it, no padding.
        special: True at BOS, in the same shape; None: no token is BOS.
    """
    lengths = np.fromiter(map(len, token_lists), np.int64, len(token_lists))
    starts = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    tokens = np.fromiter((t for tokens in token_lists for t in tokens), np.int32, int(starts[-1]))
    flags = np.zeros(len(tokens), bool)
    if special is not None:
        flags = np.fromiter((s for row in special for s in row), bool, len(tokens))
    return Prompts(tokens, starts, flags)
