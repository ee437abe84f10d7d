"""Sense accuracy: do the nearest uses of an ambiguous word have the sense that it has here?"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from tl_latentlens.corpus.plan import PlanSettings
from tl_latentlens.corpus.texts import demo_labels
from tl_latentlens.corpus.words import positions_of_word
from tl_latentlens.errors import CorpusError, InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex
from tl_latentlens.lens.lenses import embedding_lens, logit_lens
from tl_latentlens.lens.result import TokenReading
from tl_latentlens.model.activations import prompts_as_run
from tl_latentlens.model.describe import is_bidirectional, model_device
from tl_latentlens.model.hook_points import in_residual_stream
from tl_latentlens.model.token_strings import token_bytes
from tl_latentlens.model.tokenize import tokenize
from tl_latentlens.statistics.intervals import Measure

_READ = 10  # tokens of a lens that stand for its reading
_TIED = 1e-6  # similarities that are no further apart are the same
COLUMNS = ("text", "word", "sense")


@dataclass(frozen=True, eq=False)
class Uses:
    """Labelled uses of ambiguous words.

    Attributes:
        prompts: Token ids of each text.
        positions: Where the word ends in each.
        words, senses: Numbers of the word and of its sense (two words never share a sense's number).
        held_out: True for the uses that are asked for their sense; the others are the labelled ones. All False: each use is
            asked in turn, and all others are labelled ones.
    """

    prompts: list[list[int]]
    positions: Int[np.ndarray, " uses"]
    words: Int[np.ndarray, " uses"]
    senses: Int[np.ndarray, " uses"]
    held_out: Bool[np.ndarray, " uses"]


def load_senses(source: str | Path | pd.DataFrame = "demo") -> pd.DataFrame:
    """Labelled uses of ambiguous words: columns text, word, sense, and held_out (bool) where there is one.

    Args:
        source: "demo" (65 words, 137 senses of ten sentences, from the embedded corpus), a .csv or .jsonl file, or a table.

    Raises:
        CorpusError: No such file, or a column is missing.
    """
    if isinstance(source, pd.DataFrame):
        table = source
    elif str(source) == "demo":
        labels = demo_labels()
        table = labels[labels["kind"] == "sense"].assign(word=labels["concept"])
    else:
        path = Path(source).expanduser()
        if path.suffix not in (".csv", ".jsonl") or not path.is_file():
            raise CorpusError(f"got {path}; expected a .csv or .jsonl file that exists, with columns {', '.join(COLUMNS)}")
        table = pd.read_json(path, lines=True) if path.suffix == ".jsonl" else pd.read_csv(path, keep_default_na=False)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise CorpusError(f"the labelled uses have no column {missing[0]!r}; expected {', '.join(COLUMNS)}, got {list(table)}")
    if not len(table) or not all(isinstance(text, str) for text in table["text"]):
        raise CorpusError("the labelled uses have no lines, or lines without a text; expected a text in each")
    if "held_out" in table:
        table = table.assign(held_out=_as_bool(list(table["held_out"])))
    kept = [*COLUMNS, *(["held_out"] if "held_out" in table else [])]
    return table.reindex(columns=kept).reset_index(drop=True)


def _as_bool(column: list[Any]) -> Bool[np.ndarray, " uses"]:
    known = {
        "true": True,
        "yes": True,
        "1": True,
        "1.0": True,
        "false": False,
        "no": False,
        "0": False,
        "0.0": False,
        "": False,
    }
    values = [known.get(str(value).strip().lower()) for value in column]
    if None in values:
        wrong = column[values.index(None)]
        raise CorpusError(f"got held_out={wrong!r} in line {values.index(None)} of the labelled uses; expected true or false")
    return np.array(values, bool)


def find_uses(model: Any, table: pd.DataFrame, settings: PlanSettings) -> Uses:
    """Tokenise labelled uses and find each word; uses that cannot be asked are left out.

    Those are uses of a word with a single sense or without a labelled use, and words that are cut off at n_ctx. Where a text
    has its word twice, the first one counts.

    Args:
        model: The bank's model.
        table: What `load_senses` returns.
        settings: Of the bank's plan: whether texts are read twice.

    Raises:
        InvalidInputError: Nothing is left.
    """
    prompts = tokenize(model, table["text"], repeat=settings.repeat)
    ids = prompts.as_lists()
    special = set() if model.tokenizer is None else set(model.tokenizer.all_special_ids)
    strings = {
        i: b.decode("utf-8", errors="replace") for i, b in token_bytes(model, np.unique(prompts.tokens).tolist()).items()
    }
    strings |= dict.fromkeys(special, "")
    places = [positions_of_word([strings[i] for i in one], word) for one, word in zip(ids, table["word"], strict=True)]
    words, senses = (
        pd.factorize(table["word"])[0],
        pd.factorize(table["word"].astype(str) + "\t" + table["sense"].astype(str))[0],
    )
    senses_of_word = np.bincount(words[np.unique(senses, return_index=True)[1]])
    held_out = table["held_out"].to_numpy(bool) if "held_out" in table else np.zeros(len(table), bool)
    found = np.array([bool(one) for one in places])
    labelled = np.bincount(words, found & ~held_out, minlength=words.max() + 1) > 0
    kept = np.flatnonzero((senses_of_word[words] > 1) & found & labelled[words])
    if not len(kept):
        raise InvalidInputError(
            "no use is left: expected texts that hold their word, of words with two senses at least, some of them not held out"
        )
    return Uses(
        *prompts_as_run([ids[i] for i in kept], np.array([places[i][0] for i in kept]), settings),
        pd.factorize(words[kept])[0],
        pd.factorize(senses[kept])[0],
        held_out[kept],
    )


def votes(
    index: ContextualIndex, uses: Uses, activations: dict[str, Float[Tensor, "uses d"]], top_k: int
) -> dict[tuple[str, str], Int[np.ndarray, " asked"]]:
    """The sense of each asked use by its k nearest labelled ones, at each hook name of an index, under (transform, hook name).

    Votes count by similarity above that of the k + 1st; -1 is no answer.
    """
    found = {}
    for name in index.hook_names:
        units, offsets = index.compared(name, activations[name])
        found[index.transform, name] = _votes(uses, (units @ units.T - offsets).cpu().numpy(), top_k)
    return found


def other_votes(
    model: Any, uses: Uses, activations: dict[str, Float[Tensor, "uses d"]], top_k: int
) -> dict[tuple[str, str], Int[np.ndarray, " asked"]]:
    """The sense of each asked use by readers that need no bank.

    "most frequent sense" always says the same. "layer 0" compares what enters the first block: embedding and position. The
    logit lens and the embedding lens compare uses by what their ten first tokens have in common: no answer where that is
    nothing.
    """
    found = {("most frequent sense", ""): _most_frequent(uses)}
    for name, vectors in activations.items():
        if name == layer_0(model):
            units = torch.nn.functional.normalize(vectors, dim=-1)
            found["layer 0", ""] = _votes(uses, (units @ units.T).numpy(), top_k)
        elif not is_bidirectional(model) and in_residual_stream(name):
            for reader, lens in (("logit lens", logit_lens), ("embedding lens", embedding_lens)):
                reading = lens(model, vectors.to(model_device(model)), _READ)
                found[reader, name] = _votes(uses, _shared(reading), top_k, above=0)
    return found


def layer_0(model: Any) -> str | None:
    """The hook name of what enters the first block."""
    return next((name for name in ("blocks.0.hook_resid_pre", "blocks.0.hook_in") if name in model.hook_dict), None)


def sense_accuracy(uses: Uses, answers: dict[tuple[str, str], Int[np.ndarray, " asked"]]) -> Measure:
    """Recall of each sense, in [0, 1], by each reader; their mean is the macro recall."""
    asked, of = np.unique(uses.senses[_labelled(uses)[0]], return_inverse=True)
    recall = {key: np.bincount(of, answer == asked[of]) / np.bincount(of) for key, answer in answers.items()}
    return Measure("sense accuracy", recall, "senses")


def _shared(reading: TokenReading) -> Float[np.ndarray, "uses uses"]:
    """Cosine of two readings as vectors of scores over the vocabulary."""
    _, place = np.unique(reading.token_ids, return_inverse=True)
    place = place.reshape(reading.token_ids.shape)
    dense = np.zeros((len(place), place.max() + 1), np.float32)
    np.put_along_axis(dense, place, reading.scores.clip(0), 1)
    dense /= np.maximum(np.linalg.norm(dense, axis=1, keepdims=True), 1e-12)
    return dense @ dense.T


def _labelled(uses: Uses) -> tuple[Int[np.ndarray, " asked"], Bool[np.ndarray, "asked uses"]]:
    """Which uses are asked, and for each the uses whose sense may be known: of the same word, labelled, not itself."""
    asked = np.flatnonzero(uses.held_out) if uses.held_out.any() else np.arange(len(uses.words))
    known = (uses.words[asked][:, None] == uses.words) & ~uses.held_out
    known[np.arange(len(asked)), asked] = False
    return asked, known


def _votes(
    uses: Uses, similarity: Float[np.ndarray, "uses uses"], top_k: int, above: float = -np.inf
) -> Int[np.ndarray, " asked"]:
    """The sense of each asked use by its nearest labelled ones, all that are as near as the k-th; -1 where none is above."""
    asked, known = _labelled(uses)
    scores = np.where(known, similarity[asked], -np.inf)
    ordered = -np.sort(-scores, axis=1)
    kth, beyond = ordered[:, [min(top_k, scores.shape[1]) - 1]], ordered[:, [min(top_k, scores.shape[1] - 1)]]
    voting = known & (scores >= kth - _TIED) & (scores > above)
    lowest = np.where(np.isfinite(beyond), beyond, np.where(known, scores, np.inf).min(1, keepdims=True))
    weights = np.where(voting, np.maximum(np.where(voting, scores, 0) - lowest, 0) + _TIED, 0)
    tally = weights @ np.eye(uses.senses.max() + 1)[uses.senses]
    return np.where(voting.any(1), tally.argmax(1), -1)


def _most_frequent(uses: Uses) -> Int[np.ndarray, " asked"]:
    """The sense that most labelled uses of the word have, the first of equally frequent ones."""
    asked, known = _labelled(uses)
    known[np.arange(len(asked)), asked] = ~uses.held_out[asked]  # to leave it out would give its sense away
    return (known @ np.eye(uses.senses.max() + 1)[uses.senses]).argmax(1)
