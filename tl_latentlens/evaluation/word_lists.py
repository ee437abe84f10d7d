"""Sense accuracy of lists of words: do the uses that share most words with a use have its sense?"""

import numpy as np
from jaxtyping import Float, Int
from scipy.sparse import csr_array
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.bank.bank import Bank
from tl_latentlens.evaluation.labelled_uses import Uses
from tl_latentlens.evaluation.votes import vote_of_nearest
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.other_words import other_words, words_around
from tl_latentlens.statistics.measures import ReaderKey

N_WORDS = 20  # Words, or tokens of a lens, by which two uses are compared.
_N_FOUND = 2 * N_WORDS  # Words that are looked for; those that stand in the use's own text are left out.
_NONE = -1


def votes_of_words(
    index: ContextualIndex, uses: Uses, activations: dict[str, Float[Tensor, "uses d"]], top_k: int, progress: bool = False
) -> dict[ReaderKey, Int[np.ma.MaskedArray, " questions"]]:
    """The sense of each question by the uses whose words are its own, at each hook name that has words; masked: no answer.

    "other words": the twenty nearest other words of each use. Words whose nearest row is of the use's own text are left out.
    "around": the words around its nearest uses, of which many uses have none.
    """
    votes = {}
    is_visual = np.zeros(len(uses.words), bool)
    own_prompts = _own_prompts(uses, index.banks[0])
    for name in tqdm(index.hook_names, "other words", unit=" hook names", delay=2, disable=not progress):
        found = other_words(activations[name], name, index, _N_FOUND, uses.word_texts, is_visual, calibrate=False)
        rows = found.rows.cpu().numpy()
        if not (rows >= 0).any():  # The first layers have no words.
            continue
        is_other = (rows >= 0) & (index.bank_rows.prompts[rows] != own_prompts[:, None])
        lists = {"other words": _first(np.where(is_other, found.table.stem_ids[rows], _NONE), N_WORDS)}
        lists["around"] = _numbered(words_around(activations[name], name, index, uses.word_texts))
        votes |= {
            ReaderKey(reader, name): vote_of_nearest(uses, shared_words(ids), top_k, above=0) for reader, ids in lists.items()
        }
    return votes


def shared_words(ids: Int[np.ndarray, "uses k"]) -> Float[np.ndarray, "uses uses"]:
    """How many words each pair of lists shares, over the geometric mean of their lengths; 0 for an empty list.

    Args:
        ids: The number of each word, each once in a list; -1: none.
    """
    lines, places = (ids >= 0).nonzero()
    names, columns = np.unique(ids[lines, places], return_inverse=True)
    counts = np.maximum((ids >= 0).sum(1), 1)
    is_in = csr_array((1 / np.sqrt(counts[lines]), (lines, columns)), shape=(len(ids), max(1, len(names))))
    return (is_in @ is_in.T).toarray()


def _first(ids: Int[np.ndarray, "uses found"], n: int) -> Int[np.ndarray, "uses n"]:
    """The first n words of each list, those that are left out passed over."""
    order = np.argsort(ids < 0, axis=1, kind="stable")
    return np.take_along_axis(ids, order, 1)[:, :n]


def _numbered(lists: list[list[str]]) -> Int[np.ndarray, "uses k"]:
    """Lists of words as numbers of the words, padded with -1."""
    numbers: dict[str, int] = {}
    width = max(map(len, lists), default=0)
    padded = [[numbers.setdefault(word, len(numbers)) for word in words] + [_NONE] * (width - len(words)) for words in lists]
    return np.array(padded, np.int64).reshape(len(lists), width)


def _own_prompts(uses: Uses, bank: Bank) -> Int[np.ndarray, " uses"]:
    """The prompt of the bank that is the text of each use; -1 where the bank does not have it."""
    plan = bank.plan
    texts = np.split(plan.tokens, plan.prompt_starts[1:-1])
    number_of = {tokens.astype(np.int64).tobytes(): number for number, tokens in enumerate(texts)}
    return np.array([number_of.get(np.array(prompt, np.int64).tobytes(), _NONE) for prompt in uses.prompts])
