"""Labelled uses of ambiguous words, read from a file and found in their texts; `senses` asks readers for their senses."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.corpus.texts import demo_labels
from tl_latentlens.corpus.unicode import require_unicode
from tl_latentlens.corpus.words import positions_of_word
from tl_latentlens.errors import CorpusError, InvalidInputError
from tl_latentlens.model.activations import prompts_as_run
from tl_latentlens.model.special_tokens import special_token_ids
from tl_latentlens.model.token_strings import token_strings
from tl_latentlens.model.tokenize import tokenize

_REQUIRED_COLUMNS = ("text", "word", "sense")
_BOOLEANS = {
    **dict.fromkeys(("true", "yes", "1", "1.0"), True),
    **dict.fromkeys(("false", "no", "0", "0.0", ""), False),
}


@dataclass(frozen=True, eq=False)
class Uses:
    """Labelled uses of ambiguous words.

    Attributes:
        prompts: Token ids of each text.
        positions: The position of the token that ends the word.
        words, senses: Numbers of the word and of its sense. Two words never share a sense's number.
        held_out: True for the uses whose sense is asked for; the others are the labelled ones. If all are False, each use is
            asked in turn, and all others are labelled ones.
        word_texts: The word of each.
    """

    prompts: list[list[int]]
    positions: Int[np.ndarray, " uses"]
    words: Int[np.ndarray, " uses"]
    senses: Int[np.ndarray, " uses"]
    held_out: Bool[np.ndarray, " uses"]
    word_texts: list[str] = field(default_factory=list)


def load_senses(source: str | Path | pd.DataFrame = "demo") -> pd.DataFrame:
    """Labelled uses of ambiguous words: columns text, word, sense, and held_out (bool) if the source has it.

    Args:
        source: "demo" (65 words, 137 senses of ten sentences, from the embedded corpus), a .csv or .jsonl file, or a table.

    Raises:
        CorpusError: No such file, a column that is missing, or a line without a text.
    """
    table = _read_table(source)
    missing = [name for name in _REQUIRED_COLUMNS if name not in table]
    if missing:
        expected = ", ".join(_REQUIRED_COLUMNS)
        raise CorpusError(f"the labelled uses have no column {missing[0]!r}; expected {expected}, got {list(table)}")
    if not len(table) or not all(isinstance(text, str) for text in table["text"]):
        raise CorpusError("the labelled uses have no lines, or lines without a text; expected a text in each")
    require_unicode(table["text"], error=CorpusError)
    if "held_out" in table:
        table = table.assign(held_out=_as_bool(list(table["held_out"])))
    columns = [*_REQUIRED_COLUMNS, *(["held_out"] if "held_out" in table else [])]
    return table.reindex(columns=columns).reset_index(drop=True)


def _read_table(source: str | Path | pd.DataFrame) -> pd.DataFrame:
    if isinstance(source, pd.DataFrame):
        return source
    if str(source) == "demo":
        labels = demo_labels()
        return labels[labels["kind"] == "sense"].assign(word=labels["concept"])
    path = Path(source).expanduser()
    if path.suffix not in (".csv", ".jsonl") or not path.is_file():
        expected = ", ".join(_REQUIRED_COLUMNS)
        raise CorpusError(f"got {path}; expected a .csv or .jsonl file that exists, with columns {expected}")
    return pd.read_json(path, lines=True) if path.suffix == ".jsonl" else pd.read_csv(path, keep_default_na=False)


def _as_bool(column: list[Any]) -> Bool[np.ndarray, " uses"]:
    values = [_BOOLEANS.get(str(value).strip().lower()) for value in column]
    if None in values:
        line = values.index(None)
        raise CorpusError(f"got held_out={column[line]!r} in line {line} of the labelled uses; expected true or false")
    return np.array(values, bool)


def find_uses(model: Any, table: pd.DataFrame, settings: PlanSettings) -> Uses:
    """The tokens of labelled uses and the position of each word. Uses that cannot be asked are left out.

    These are uses of a word with a single sense or without a labelled use, and words that are cut off at n_ctx. In a text that
    has its word twice, the first one counts.

    Args:
        model: The bank's model.
        table: The table that `load_senses` returns.
        settings: Settings of the bank's plan: whether texts are read twice.

    Raises:
        InvalidInputError: No use is left.
    """
    prompts = tokenize(model, table["text"], repeat=settings.repeat)
    prompt_ids = prompts.as_lists()
    strings = token_strings(model, np.unique(prompts.tokens).tolist()) | dict.fromkeys(special_token_ids(model.tokenizer), "")
    positions = [
        positions_of_word([strings[i] for i in ids], word) for ids, word in zip(prompt_ids, table["word"], strict=True)
    ]
    words = pd.factorize(table["word"])[0]
    senses = pd.factorize(table["word"].astype(str) + "\t" + table["sense"].astype(str))[0]
    held_out = table["held_out"].to_numpy(bool) if "held_out" in table else np.zeros(len(table), bool)
    has_word = np.array([bool(in_text) for in_text in positions])
    n_senses_of_word = np.bincount(words[np.unique(senses, return_index=True)[1]])
    has_labelled_use = np.bincount(words, has_word & ~held_out, minlength=words.max() + 1) > 0
    kept = np.flatnonzero((n_senses_of_word[words] > 1) & has_word & has_labelled_use[words])
    if not len(kept):
        raise InvalidInputError(
            "no use is left: expected texts that hold their word, of words with two senses at least, some of them not held out"
        )
    return Uses(
        *prompts_as_run([prompt_ids[i] for i in kept], np.array([positions[i][0] for i in kept]), settings),
        pd.factorize(words[kept])[0],
        pd.factorize(senses[kept])[0],
        held_out[kept],
        [str(word) for word in table["word"].iloc[kept]],
    )
