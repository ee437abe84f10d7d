"""The plan says which tokens become rows. It is computed from the tokens alone, before any model runs.

A causal model gives the same activation for the same tokens up to a position, so each distinct token prefix gets exactly one
row. Where a token is seen in its whole prompt, each token of each distinct prompt gets one. Then a seeded uniform sample caps
the rows of each token id. `texts` gives the texts and `model` the tokens; `bank` stores what is planned here.
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
    """The settings that decide which tokens of which prompts become rows.

    Attributes:
        max_rows_per_token: Most rows of one token id; None for no cap.
        seed: Seed of the sample that a cap draws.
        bidirectional: True for encoders: a token is seen in its whole prompt, so only equal prompts share their rows.
        repeat: True where a causal model runs each text twice, BOS text text, and rows are read in the second copy, whose
            tokens know what comes after them (echo embeddings, arXiv 2402.15449): only equal prompts share their rows.
        text_start: With repeat, the tokens before the text (BOS), which are not run again. `make_plan` finds them.
        keep_special_tokens: True where special tokens of the texts, such as those of a chat template, become rows.
    """

    max_rows_per_token: int | None = 50
    seed: int = 0
    bidirectional: bool = False
    repeat: bool = False
    text_start: int = 0
    keep_special_tokens: bool = False


# The first banks had no such fields. They are not recorded where they are 0 or empty, so that digests stay the same.
OPTIONAL_FIELDS = (
    "repeat",
    "text_start",
    "keep_special_tokens",
    "n_heads",
    "source",
    "quantization",
    "dropped_space",
    "hooked",
    "shard",
)


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
        special: True where a token is no text, such as BOS, padding and the marks of a chat template: never a row.
        n_truncated: How many texts were longer than the model's n_ctx and were cut.
        text_start: How many tokens stand before each text (BOS); None: as many as are special at the start of every prompt.
        n_own_bos: How many texts brought their own BOS, so that none was put before them.
    """

    tokens: Int[np.ndarray, " tokens"]
    starts: Int[np.ndarray, " prompts_and_end"]
    special: Bool[np.ndarray, " tokens"]
    n_truncated: int = 0
    text_start: int | None = None
    n_own_bos: int = 0

    def as_lists(self) -> list[list[int]]:
        """The token ids of each prompt."""
        return [token_ids.tolist() for token_ids in np.split(self.tokens, self.starts[1:-1])]


@dataclass(frozen=True)
class Plan:
    """The rows of a bank.

    Attributes:
        tokens: Token ids of all prompts, back to back, int32.
        prompt_starts: Where each prompt begins in `tokens`, and the end: [n_prompts + 1], int64.
        row_tokens: Where each row stands in `tokens`, ascending, int64.
        settings: The settings that decided the rows.
        n_truncated: Prompts cut at n_ctx.
        n_own_bos: Texts that brought their own BOS; not stored in a bank.
    """

    tokens: Int[np.ndarray, " tokens"]
    prompt_starts: Int[np.ndarray, " prompts_and_end"]
    row_tokens: Int[np.ndarray, " rows"]
    settings: PlanSettings
    n_truncated: int = 0
    n_own_bos: int = 0

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
        """The distance from a row's position in its prompt to the position where a run reads it.

        With repeat it is the length of the text, else 0. A prompt BOS a b is run as BOS a b a b: with a shift of 2, the b at
        position 2 is read at position 4.
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
    is_row = ~prompts.special
    settings = replace(settings, text_start=_text_start(prompts) if settings.repeat else 0)
    if settings.bidirectional or settings.repeat:
        is_row &= ~_in_repeated_prompt(prompts)
    else:
        is_row &= ~_repeats_prefix(prompts)
    row_tokens = np.flatnonzero(is_row)
    if not len(row_tokens):
        raise CorpusError(
            f"nothing to bank: the corpus's {len(prompts.starts) - 1} texts hold no token besides BOS and padding, or other "
            "special tokens (keep_special_tokens=True makes these rows)"
        )
    if cap is not None:
        row_tokens = _sample_per_token(row_tokens, prompts.tokens, cap, settings.seed)
    return Plan(prompts.tokens, prompts.starts, row_tokens, settings, prompts.n_truncated, prompts.n_own_bos)


def _text_start(prompts: Prompts) -> int:
    """The tokens before each text; where the prompts do not say, the special ones that all begin with, empty ones aside."""
    if prompts.text_start is not None:
        return prompts.text_start
    starts, ends = prompts.starts[:-1], prompts.starts[1:]
    text_tokens = np.flatnonzero(~prompts.special)
    first_text_tokens = np.append(text_tokens, len(prompts.tokens))[np.searchsorted(text_tokens, starts)]
    return int((np.minimum(first_text_tokens, ends) - starts)[ends > starts].min(initial=len(prompts.tokens)))


def _repeats_prefix(prompts: Prompts) -> Bool[np.ndarray, " tokens"]:
    """True at each token whose prefix (itself included) an earlier prompt has too.

    Walks down the trie of all prompts, one depth a step. A prompt is dropped as soon as no other prompt shares its prefix, so
    only shared prefixes cost work.
    """
    repeats_prefix = np.zeros(len(prompts.tokens), bool)
    lengths = np.diff(prompts.starts)
    n_ids = int(prompts.tokens.max(initial=0)) + 1
    active_prompts = np.arange(len(lengths))
    parent_nodes = np.zeros(len(lengths), np.int64)
    for depth in range(int(lengths.max(initial=0))):
        is_longer = lengths[active_prompts] > depth
        active_prompts, parent_nodes = active_prompts[is_longer], parent_nodes[is_longer]
        places = prompts.starts[active_prompts] + depth
        _, first_of_node, nodes, n_of_node = np.unique(
            parent_nodes * n_ids + prompts.tokens[places], return_index=True, return_inverse=True, return_counts=True
        )
        is_repeat = np.ones(len(active_prompts), bool)
        is_repeat[first_of_node] = False
        repeats_prefix[places[is_repeat]] = True
        is_shared = n_of_node[nodes] > 1
        active_prompts, parent_nodes = active_prompts[is_shared], nodes[is_shared]
        if not len(active_prompts):
            break
    return repeats_prefix


def _in_repeated_prompt(prompts: Prompts) -> Bool[np.ndarray, " tokens"]:
    """True at each token of a prompt that equals an earlier one."""
    spans = zip(prompts.starts[:-1], prompts.starts[1:], strict=True)
    repeated = pd.Series([prompts.tokens[start:end].tobytes() for start, end in spans], dtype=object).duplicated()
    return np.repeat(repeated.to_numpy(bool), np.diff(prompts.starts))


def _sample_per_token(
    row_tokens: Int[np.ndarray, " candidates"], tokens: Int[np.ndarray, " tokens"], cap: int, seed: int
) -> Int[np.ndarray, " rows"]:
    """The first `cap` rows of each token id in a random order, sorted; shuffles `row_tokens` itself."""
    np.random.default_rng(seed).shuffle(row_tokens)
    row_tokens = row_tokens[np.argsort(tokens[row_tokens], kind="stable")]
    token_ids = tokens[row_tokens]
    is_kept = np.ones(len(token_ids), bool)
    # The ids are sorted: where the one `cap` places before is the same, so are all between.
    is_kept[cap:] = token_ids[cap:] != token_ids[:-cap]
    return np.sort(row_tokens[is_kept])


def block_starts(plan: Plan, target_tokens: int, max_rows: int) -> Int[np.ndarray, " blocks_and_end"]:
    """Cut the rows into blocks at prompt boundaries: [n_blocks + 1] row numbers.

    A block closes with the prompt that brings it to `target_tokens` tokens to run or `max_rows` rows; a long prompt may
    exceed either on its own. Where a block begins, the cut does not depend on what was before: a part of a plan that begins and
    ends with a block is cut as it is in the whole.
    """
    rows_up_to, tokens_up_to = _up_to_prompts(plan)
    starts, tokens_before, rows_before = [0], 0, 0
    while rows_before < plan.n_rows:
        by_tokens = np.searchsorted(tokens_up_to, tokens_before + target_tokens)
        by_rows = np.searchsorted(rows_up_to, rows_before + max_rows)
        closing = min(int(by_tokens), int(by_rows), len(rows_up_to) - 1)
        tokens_before, rows_before = int(tokens_up_to[closing]), int(rows_up_to[closing])
        starts.append(rows_before)
    return np.array(starts, np.int64)


def tokens_up_to(plan: Plan, ends: Int[np.ndarray, " ends"]) -> Int[np.ndarray, " ends"]:
    """Tokens that are run for the rows before each of some row numbers, at which a prompt's rows end."""
    rows_up_to_prompts, tokens_up_to_prompts = _up_to_prompts(plan)
    return np.r_[0, tokens_up_to_prompts][np.searchsorted(rows_up_to_prompts, ends, side="right")]


def _up_to_prompts(plan: Plan) -> tuple[Int[np.ndarray, " prompts"], Int[np.ndarray, " prompts"]]:
    """Rows, and tokens to run for them, up to the end of each prompt that has rows."""
    last_rows = np.flatnonzero(np.r_[np.diff(plan.row_prompts) > 0, plan.n_rows > 0])
    prompts = plan.row_prompts[last_rows]
    return last_rows + 1, np.cumsum(plan.row_tokens[last_rows] + 1 - plan.prompt_starts[prompts] + plan.shifts(prompts))


def part_of_plan(plan: Plan, prompts: tuple[int, int]) -> Plan:
    """The rows and tokens of some prompts, counted from the first of them.

    Args:
        plan: The whole.
        prompts: The first, and the end.
    """
    starts = plan.prompt_starts[prompts[0] : prompts[1] + 1]
    rows = slice(*np.searchsorted(plan.row_tokens, (starts[0], starts[-1])))
    return replace(
        plan,
        tokens=plan.tokens[starts[0] : starts[-1]],
        prompt_starts=starts - starts[0],
        row_tokens=plan.row_tokens[rows] - starts[0],
    )


def prompts_from_lists(token_lists: Sequence[Sequence[int]], special: Sequence[Sequence[bool]] | None = None) -> Prompts:
    """Prompts from lists of token ids, for instance from your own tokeniser.

    Args:
        token_lists: One list of token ids a prompt, BOS included where the model wants it, no padding.
        special: True at BOS, in the same shape; None: no token is BOS.
    """
    lengths = np.fromiter(map(len, token_lists), np.int64, len(token_lists))
    starts = np.r_[0, np.cumsum(lengths)].astype(np.int64)
    tokens = np.fromiter((token for token_ids in token_lists for token in token_ids), np.int32, int(starts[-1]))
    is_special = np.zeros(len(tokens), bool)
    if special is not None:
        is_special = np.fromiter((flag for flags in special for flag in flags), bool, len(tokens))
    return Prompts(tokens, starts, is_special)
