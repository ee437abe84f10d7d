"""Sentences for features from a language model: asked for, scored on held-out contexts, shown where they beat the labels."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.directions.features.detection import N_TENTHS
from tl_latentlens.directions.features.label_line import LabelLine, label_line
from tl_latentlens.directions.features.result import FeatureResult
from tl_latentlens.directions.features.sentences.drawn_contexts import (
    DrawnContexts,
    context_text,
    draw_contexts,
)
from tl_latentlens.directions.features.sentences.questions import (
    VERSION,
    detection_messages,
    read_active,
    read_sentence,
    sentence_messages,
)
from tl_latentlens.endpoint.chat import ANSWER, ChatEndpoint, Messages
from tl_latentlens.endpoint.keyed_lines import read_lines
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.views.files import output_path

_LEVEL = 0.05


@dataclass(frozen=True)
class _Sentence:
    """A feature's sentence as far as it is known.

    Attributes:
        written: The sentence; empty where there is none.
        detection: Balanced accuracy on held-out contexts; NaN where it is not known.
        why_not: Why it is not shown; empty where it is.
    """

    written: str = ""
    detection: float = math.nan
    why_not: str = ""


def describe_features(
    result: FeatureResult,
    endpoint: ChatEndpoint | str,
    answers: str | Path,
    *,
    features: Sequence[int] | None = None,
    contexts: int = 10,
    held_out: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> FeatureResult:
    """The result with a sentence for each feature, written by a language model and shown where it beats the plain label.

    Two requests a feature. The first gives the label, what it rests on, and max-activating contexts with the token marked, and
    asks for one sentence. The second gives the sentence and shuffled contexts of held-out prompts, half of them active, and
    asks which activate the feature. Nothing is paid twice: `answers` keeps what was answered, as it does for `Judge`.

    New columns of the table:

    - `sentence`: the sentence, where it tells held-out contexts apart better than the label's rule does (`detection`), or,
      where that is not known, better than chance (Fisher's exact test, p < 0.05); else empty, and `sentence_why_not` says why.
    - `sentence_written`: the sentence, shown or not.
    - `sentence_detection`: its balanced accuracy, in [0, 1], each tenth of activation counting the same; NaN where it was not
      scored.

    Args:
        result: Labelled features, with an encoder.
        endpoint: A model behind an OpenAI-compatible endpoint; a name is that of a model of OpenAI's, or of OPENAI_BASE_URL.
        answers: A file of JSON lines; made where there is none.
        features: Feature numbers; None: all. A feature whose label tells all held-out contexts is not asked about.
        contexts: Most contexts that a sentence is written from.
        held_out: Most held-out contexts that it is scored on.
        seed: Seed of the held-out contexts and of their order.
        progress: Show progress bars.

    Raises:
        InvalidInputError: No encoder, a feature that is not in the result; or what the endpoint refuses (`ChatEndpoint.ask`).
        MissingExtraError: openai is not installed.
    """
    if contexts < 1 or held_out < 2:
        raise InvalidInputError(f"got contexts={contexts}, held_out={held_out}; expected at least 1 and 2")
    endpoint = ChatEndpoint(endpoint) if isinstance(endpoint, str) else endpoint
    lines = _lines_to_describe(result, features)
    run = _SentenceRun(result, endpoint, output_path(absolute_path(answers)), lines, seed, progress)
    found = run.sentences(contexts, held_out)
    table = result.table.copy()
    of_features = [found.get(feature, _Sentence(why_not="not asked")) for feature in table["feature"].tolist()]
    table["sentence"] = [one.written if not one.why_not else "" for one in of_features]
    table["sentence_written"] = [one.written for one in of_features]
    table["sentence_detection"] = np.array([one.detection for one in of_features], float)
    table["sentence_why_not"] = [one.why_not for one in of_features]
    return replace(result, table=table)


def _lines_to_describe(result: FeatureResult, features: Sequence[int] | None) -> dict[int, LabelLine]:
    """Feature → its line, for the features that have a direction."""
    if result.activity is None:
        raise InvalidInputError(
            "got a result without an encoder, or rows that it reads; sentences are written from activations"
        )
    lines = {int(record["feature"]): label_line(record) for record in result.table.to_dict("records")}
    unknown = [feature for feature in features or () if feature not in lines]
    if unknown:
        raise InvalidInputError(f"feature {unknown[0]} is not among the {len(lines)} that were labelled")
    return {feature: lines[feature] for feature in features or lines if feature in result.places}


class _SentenceRun:
    """The questions of one call, and their answers."""

    def __init__(
        self,
        result: FeatureResult,
        endpoint: ChatEndpoint,
        answers: Path,
        lines: Mapping[int, LabelLine],
        seed: int,
        progress: bool,
    ) -> None:
        self._result, self._endpoint, self._answers, self._lines = result, endpoint, answers, lines
        self._seed, self._progress = seed, progress

    def sentences(self, n_shown: int, n_held_out: int) -> dict[int, _Sentence]:
        """Feature → its sentence, written and scored."""
        assert self._result.activity is not None
        features = list(self._lines)
        places, sizes = self._result.places, (n_shown, n_held_out, self._seed)
        drawn = {feature: draw_contexts(self._result.activity, feature, places[feature], *sizes) for feature in features}
        found = {feature: _Sentence(why_not=self._not_worth_asking(feature, drawn[feature])) for feature in features}
        asked = [feature for feature in features if not found[feature].why_not]
        written = self._ask({feature: self._sentence_question(feature, drawn[feature]) for feature in asked}, "describing")
        for feature, (answer, problem) in written.items():
            sentence = read_sentence(answer)
            found[feature] = _Sentence(sentence, why_not="" if sentence else problem or "an answer without a sentence")
        scored = {feature: _Trial(drawn[feature], (self._seed, feature)) for feature in asked if not found[feature].why_not}
        questions = {
            feature: detection_messages(found[feature].written, self._texts(trial.rows, marked=False))
            for feature, trial in scored.items()
        }
        for feature, (answer, problem) in self._ask(questions, "scoring").items():
            named = read_active(answer, len(scored[feature].rows))
            why_not, score = problem or "an answer that names no texts", math.nan
            if named is not None:
                score = scored[feature].balanced_accuracy(named)
                why_not = _why_not_shown(self._lines[feature].detection, score, scored[feature].p(named))
            found[feature] = _Sentence(found[feature].written, score, why_not)
        return found

    def _not_worth_asking(self, feature: int, drawn: DrawnContexts) -> str:
        if not len(drawn.shown):
            return "no context to write it from"
        if not len(drawn.active) or not len(drawn.silent):
            return "no held-out contexts to score it on"
        return "the label tells all held-out contexts" if self._lines[feature].detection >= 1 else ""

    def _sentence_question(self, feature: int, drawn: DrawnContexts) -> Messages:
        return sentence_messages(self._lines[feature], self._texts(drawn.shown, marked=True))

    def _texts(self, rows: np.ndarray, *, marked: bool) -> list[str]:
        bank_rows = self._result.positive.index.bank_rows
        return [context_text(bank_rows.row(row), marked=marked) for row in rows.tolist()]

    def _ask(self, questions: dict[int, Messages], task: str) -> dict[int, tuple[str, str]]:
        """Feature → the answer to its question, or an empty text and the problem."""
        keys = {feature: self._key(messages) for feature, messages in questions.items()}
        by_key = {keys[feature]: messages for feature, messages in questions.items()}
        problems = (
            self._endpoint.ask(self._answers, by_key, lambda one: one, task=task, progress=self._progress) if by_key else {}
        )
        stored = read_lines(self._answers, ANSWER).by_key
        return {
            feature: (stored[key]["answer"], "") if key in stored else ("", problems.get(key, "not answered"))
            for feature, key in keys.items()
        }

    def _key(self, messages: Messages) -> str:
        parts = [VERSION, self._endpoint.model, dict(self._endpoint.options), messages]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class _Trial:
    """Held-out contexts of a feature, shuffled, and which are active."""

    def __init__(self, drawn: DrawnContexts, seed: tuple[int, int]) -> None:
        rows = np.concatenate([drawn.active, drawn.silent])
        tenths = np.concatenate([drawn.tenths, np.full(len(drawn.silent), -1)])
        order = np.random.default_rng(seed).permutation(len(rows))
        self.rows, self._tenths = rows[order], tenths[order]

    def p(self, named: set[int]) -> float:
        """The chance that as many contexts drawn blindly hold at least as many active ones (Fisher's exact test)."""
        is_named, is_active = self._is_named(named), self._tenths >= 0
        n_hits = int((is_named & is_active).sum())
        return float(stats.hypergeom.sf(n_hits - 1, len(self.rows), int(is_active.sum()), int(is_named.sum())))

    def balanced_accuracy(self, named: set[int]) -> float:
        """The mean of two shares: of active contexts that are named, by tenth, and of silent ones that are not."""
        is_named = self._is_named(named)
        recalls = [is_named[self._tenths == tenth].mean() for tenth in range(N_TENTHS) if (self._tenths == tenth).any()]
        return float((np.mean(recalls) + (~is_named[self._tenths < 0]).mean()) / 2)

    def _is_named(self, named: set[int]) -> np.ndarray:
        return np.isin(np.arange(len(self.rows)), list(named))


def _why_not_shown(of_label: float, score: float, p: float) -> str:
    """Why a sentence is not shown; empty where it beats the label, or chance where the label's score is not known."""
    if not math.isnan(of_label):
        return "" if score > of_label else f"no better than the label: {score:.2f} beside {of_label:.2f}"
    return "" if p < _LEVEL else f"no better than chance: {score:.2f} (p = {p:.2g})"
