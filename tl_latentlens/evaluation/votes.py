"""The sense of a use of an ambiguous word, by a vote of the labelled uses that are most similar to it."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from tl_latentlens.evaluation.labelled_uses import Uses

_TIE_MARGIN = 1e-6  # Similarities no further apart than this are equal.


@dataclass(frozen=True, eq=False)
class Questions:
    """The uses that are asked for their sense, and who may answer.

    Attributes:
        use_ids: The uses that are asked.
        is_candidate: For each of them, True at the uses whose sense is known: of the same word, labelled, another use.
    """

    use_ids: Int[np.ndarray, " questions"]
    is_candidate: Bool[np.ndarray, "questions uses"]


def vote_of_nearest(
    uses: Uses, similarities: Float[np.ndarray, "uses uses"], top_k: int, above: float = -np.inf
) -> Int[np.ma.MaskedArray, " questions"]:
    """The sense of each question by its `top_k` nearest candidates and those as near as the last of them.

    Masked where no candidate has a similarity above `above`.
    """
    questions = questions_of(uses)
    is_candidate = questions.is_candidate
    scores = np.where(is_candidate, similarities[questions.use_ids], -np.inf)
    ordered = -np.sort(-scores, axis=1)
    kth, next_after = ordered[:, [min(top_k, scores.shape[1]) - 1]], ordered[:, [min(top_k, scores.shape[1] - 1)]]
    is_voter = is_candidate & (scores >= kth - _TIE_MARGIN) & (scores > above)
    lowest = np.where(is_candidate, scores, np.inf).min(1, keepdims=True)
    baseline = np.where(np.isfinite(next_after), next_after, lowest)
    weights = np.where(is_voter, np.maximum(np.where(is_voter, scores, 0) - baseline, 0) + _TIE_MARGIN, 0)
    return np.ma.array(_heaviest_sense(uses, weights), mask=~is_voter.any(1))


def most_frequent_sense(uses: Uses) -> Int[np.ma.MaskedArray, " questions"]:
    """The sense that most labelled uses of each question's word have, the first of equally frequent ones."""
    questions = questions_of(uses)
    is_counted = questions.is_candidate
    # Where each use is asked in turn, it is counted too: without it another sense would be the most frequent one.
    is_counted[np.arange(len(questions.use_ids)), questions.use_ids] = ~uses.held_out[questions.use_ids]
    return np.ma.array(_heaviest_sense(uses, is_counted), mask=np.zeros(len(questions.use_ids), bool))


def _heaviest_sense(uses: Uses, weights: Float[np.ndarray, "questions uses"]) -> Int[np.ndarray, " questions"]:
    """The sense with the largest sum of weights, the first of equal ones."""
    return (weights @ np.eye(uses.senses.max() + 1)[uses.senses]).argmax(1)


def questions_of(uses: Uses) -> Questions:
    """The uses that are asked: those held out, or each in turn where none is."""
    use_ids = np.flatnonzero(uses.held_out) if uses.held_out.any() else np.arange(len(uses.words))
    is_candidate = (uses.words[use_ids][:, None] == uses.words) & ~uses.held_out
    is_candidate[np.arange(len(use_ids)), use_ids] = False
    return Questions(use_ids, is_candidate)
