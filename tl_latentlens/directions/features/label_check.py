"""Labels on another bank: do the words that they name carry the features' activation there too?"""

from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool

from tl_latentlens.directions.features.activity import bank_activity
from tl_latentlens.directions.features.row_texts import AFTER, BEFORE, LANGUAGE, POSITION, TOKEN, WORD, RowTexts, row_texts
from tl_latentlens.errors import UnknownHookError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.index.word_table import stems_of


def shares_on(table: pd.DataFrame, sae: Any, index: ContextualIndex, hook_name: str, *, progress: bool = True) -> pd.DataFrame:
    """How much of each labelled feature's activation the texts of its label carry on the rows of an index.

    Args:
        table: The table of a `FeatureResult`.
        sae: What the features were labelled with, with an encoder.
        index: Rows of the same model, such as those of another corpus.
        hook_name: The activation that the SAE reads.
        progress: Show a progress bar.

    Returns:
        A line for each feature whose label names something: feature, label, `share` of (activation)⁵, as labels give it,
        `share_of_activation`, and `n_contexts` in which the feature is active, 256 at most. NaN where it never is.

    Raises:
        InvalidInputError: Something that is not an index.
        UnknownHookError: The index lacks the activation.
    """
    require_index(index)
    if hook_name not in index.hook_names:
        raise UnknownHookError(
            f"the index has no rows of {hook_name!r}, which the SAE reads; it has {list(index.hook_names)}: bank that too"
        )
    labelled = pd.DataFrame(table[table["label_kind"].isin([TOKEN, BEFORE, AFTER, POSITION])])
    features = labelled["feature"].tolist()
    evidence = bank_activity(sae, index, hook_name, features, progress=progress).evidence
    texts, rows = row_texts(index.bank_rows), evidence.rows
    columns: dict[str, list[float]] = {"share": [], "share_of_activation": []}
    for place, line in enumerate(labelled.to_dict("records")):
        n = int((rows.rows[place] >= 0).sum())
        holds = rows_of_label(line["label_kind"], [text for text, _ in line["label_parts"]], texts)[rows.rows[place, :n]]
        weights = {"share": rows.weights[place, :n], "share_of_activation": (rows.counts * rows.activations)[place, :n]}
        for name, of_rows in weights.items():
            columns[name].append(float(of_rows[holds].sum() / of_rows.sum()) if n else np.nan)
    n_contexts = [(drawn.rows >= 0).sum(-1) for drawn in (evidence.fitted, evidence.held_out)]
    return pd.DataFrame(labelled[["feature", "label"]]).reset_index(drop=True).assign(**columns, n_contexts=sum(n_contexts))


def rows_of_label(kind: str, parts: list[str], texts: RowTexts) -> Bool[np.ndarray, " rows"]:
    """The rows that hold what a label names.

    Args:
        kind: The label's kind.
        parts: Its texts.
        texts: Of the rows.
    """
    if kind == POSITION:
        numbers = [int("".join(sign for sign in text if sign.isdigit())) for text in parts]
        return np.isin(texts.by_kind[POSITION].ids, numbers)
    of_kind, words = texts.by_kind[kind], texts.by_kind[WORD]
    whole = set(of_kind.texts)  # A "/" joins two forms of a text, or is a sign of it.
    forms = [form for text in parts for form in ([text] if (text.strip("…") or text) in whole else text.split("/"))]
    named = {form.strip("…") or form for form in forms} if kind == TOKEN else set(parts)
    holds = np.isin(of_kind.ids, [i for i, text in enumerate(of_kind.texts) if text in named])
    if kind == TOKEN:
        stems = set(stems_of([form for form in forms if "…" not in form], LANGUAGE))
        holds |= np.isin(words.ids, [i for i, stem in enumerate(words.texts) if stem in stems])
    return holds
