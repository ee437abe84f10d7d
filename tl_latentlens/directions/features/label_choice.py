"""The label of each feature: the rule that carries half of its activation and tells its contexts from silent ones."""

from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from tl_latentlens.corpus.words import letters_of
from tl_latentlens.directions.features.detection import ContextRules, Detection, detect
from tl_latentlens.directions.features.evidence import Evidence
from tl_latentlens.directions.features.label_rule import MAX_PARTS, Rules, find_rules, is_among, rule_precision, text_shares
from tl_latentlens.directions.features.row_texts import AFTER, BEFORE, LANGUAGE, POSITION, TOKEN, WORD, RowTexts
from tl_latentlens.directions.features.samples import DrawnRows
from tl_latentlens.index.word_table import stems_of
from tl_latentlens.views.label_kinds import MIXED, part_name

MIN_CONTEXTS = 3
"""A feature that is active in fewer contexts gets no label."""
MIN_DETECTION = 0.65
"""A rule must tell the contexts that it was found on apart so well."""
MIN_PRECISION = 0.1
"""What a label names must activate the feature in so large a share of the contexts that hold it."""
_BETTER = 0.02  # Words are named in place of tokens, unless tokens are better by this and no more of them.
_BESIDE = 0.1  # What stands beside a token, or its place, is named where no token is, or where it is better by this.
_MIN_FORM = 0.25  # A form is named beside another where it has this part of its share.
_FORMS = {BEFORE: "after {}", AFTER: "before {}", POSITION: "{} of the text"}


@dataclass(frozen=True)
class Label:
    """What a feature is called.

    Attributes:
        text: What people read; empty where there is none.
        kind: "token", "before", "after", "position" or "mixed"; empty where there is none.
        parts: Texts, with the share of (activation)⁵ that each carries.
    """

    text: str = ""
    kind: str = ""
    parts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, eq=False)
class ChosenLabels:
    """The labels of some features.

    Attributes:
        labels: One a feature.
        detection: Of the labels, on held-out contexts; NaN where a feature has none, or a mixed one.
        null: Detection of labels on the contexts of other features.
        precision: The share of the contexts that hold what a label names in which that activates the feature most; NaN where
            there is no label.
        stems: For each feature the stems of words at its rows and in its label.
    """

    labels: list[Label]
    detection: Detection
    null: Float[np.ndarray, " nulls"]
    precision: Float[np.ndarray, " f"]
    stems: list[frozenset[str]]


class LabelChooser:
    """Chooses among the kinds of rules."""

    def __init__(self, evidence: Evidence, texts: RowTexts, largest: Float[np.ndarray, " f"]) -> None:
        """Find the rules of each kind, and how well they tell contexts apart.

        Args:
            evidence: Of the features.
            texts: Of the rows.
            largest: The largest activation of each feature.
        """
        self._evidence, self._texts, self._largest = evidence, texts, largest
        silent = evidence.silent.contexts
        self._rules = {kind: find_rules(evidence.rows, of_kind) for kind, of_kind in texts.by_kind.items()}
        self._context_rules = {
            kind: ContextRules(evidence.contexts, of_kind, silent) for kind, of_kind in texts.by_kind.items()
        }
        self._kinds = self._choose()

    def choose(self, own: Int[np.ndarray, " f"], nulls: Int[np.ndarray, " nulls"]) -> ChosenLabels:
        """The labels of some features, and how those of others do on contexts that are not theirs.

        Args:
            own: Places of features.
            nulls: Places of features whose labels are held against the contexts of the next one's.
        """
        scores = {name: np.full(len(own), np.nan) for name in ("score", "low", "high", "top")}
        precision = np.full(len(own), np.nan)
        null = []
        for kind in self._rules:
            of_kind = np.flatnonzero(self._kinds[own] == kind)
            if len(of_kind):
                found = self._detect(kind, own[of_kind], own[of_kind])
                for name, values in scores.items():
                    values[of_kind] = getattr(found, name)
                precision[of_kind] = self._precision(kind)[own[of_kind]]
            null_places = nulls[self._kinds[nulls] == kind]
            if len(null_places) > 1:
                scored = self._detect(kind, null_places, np.roll(null_places, 1)).score
                null.append(scored[null_places != np.roll(null_places, 1)])
        rows = self._evidence.rows.select(own)
        forms = {kind: _Forms(rows, self._texts, kind, self._rules[kind].select(own)) for kind in (WORD, TOKEN)}
        labels = [
            self._label(place, {kind: of_kind.of(i) for kind, of_kind in forms.items()}) for i, place in enumerate(own.tolist())
        ]
        forms_of = [[letters_of(form) for text, _ in label.parts for form in text.split("/")] for label in labels]
        distinct = list({form for of_label in forms_of for form in of_label})
        stem_of = dict(zip(distinct, stems_of(distinct, LANGUAGE), strict=True))
        stems = [
            self._stems(place) | {stem_of[form] for form in of_label}
            for place, of_label in zip(own.tolist(), forms_of, strict=True)
        ]
        known = np.concatenate([np.zeros(0), *null])
        return ChosenLabels(labels, Detection(**scores), known[~np.isnan(known)], precision, stems)

    def _choose(self) -> np.ndarray:
        """The kind of the rule of each feature; empty where none is good enough."""
        n_contexts = (self._evidence.fitted.rows >= 0).sum(-1)
        kinds, best = np.full(len(n_contexts), "", dtype=object), np.full(len(n_contexts), -np.inf)
        for kinds_of_place, margin in (((WORD, TOKEN), 0.0), ((BEFORE, AFTER, POSITION), _BESIDE)):
            found, fewest_parts = np.full(len(kinds), -np.inf), np.full(len(kinds), MAX_PARTS)
            for kind in kinds_of_place:
                n_parts, scores = self._rules[kind].n_parts, np.full(len(kinds), -np.inf)
                has_rule = np.flatnonzero((n_parts > 0) & (n_contexts >= MIN_CONTEXTS))
                scores[has_rule] = self._detect(kind, has_rule, has_rule, held_out=False).score
                is_good = (scores >= MIN_DETECTION) & (self._precision(kind) >= MIN_PRECISION) & (scores > best + margin)
                is_better = is_good & (scores > found + _BETTER) & (n_parts <= fewest_parts)
                kinds[is_better], found[is_better], fewest_parts[is_better] = kind, scores[is_better], n_parts[is_better]
            best = np.maximum(best, found)
        return kinds

    def _precision(self, kind: str) -> Float[np.ndarray, " f"]:
        n_holding = self._context_rules[kind].n_holding(~self._evidence.contexts.is_held_out)
        return rule_precision(self._rules[kind], self._evidence.fitted, n_holding)

    def _detect(self, kind: str, features: np.ndarray, rules_of: np.ndarray, *, held_out: bool = True) -> Detection:
        return detect(
            self._rules[kind].select(rules_of),
            self._context_rules[kind],
            self._evidence.select(features),
            self._largest[features],
            held_out=held_out,
        )

    def _label(self, place: int, forms: dict[str, dict[int, str]]) -> Label:
        kind = self._kinds[place]
        if self._evidence.rows.rows[place, 0] < 0:
            return Label()
        if not kind:
            rules = self._rules[TOKEN]
            texts = _parts(rules, place, len(rules.keys[place]), forms[TOKEN])
            return Label(f"mixed: {_with_shares(texts)}", MIXED, texts) if texts else Label()
        rules = self._rules[kind]
        parts = _parts(rules, place, int(rules.n_parts[place]), forms.get(kind))
        if kind == POSITION:
            parts = tuple((f"{_ordinal(int(text))} token", share) for text, share in parts)
        return Label(_FORMS.get(kind, "{}").format(_with_shares(parts)), TOKEN if kind == WORD else kind, parts)

    def _stems(self, place: int) -> frozenset[str]:
        rules = self._rules[WORD]
        return frozenset(rules.texts.texts[key] for key in rules.keys[place].tolist() if key >= 0)


def neighbor_labels(rows: Int[np.ndarray, "f k"], texts: RowTexts) -> list[Label]:
    """What at least half of some rows are: for directions without an encoder, whose rows all count the same."""
    ones = np.ones(rows.shape)
    drawn = DrawnRows(rows, ones, ones, ones)
    words, tokens = (find_rules(drawn, texts.by_kind[kind]) for kind in (WORD, TOKEN))
    word_forms, token_forms = _Forms(drawn, texts, WORD, words), _Forms(drawn, texts, TOKEN, tokens)
    labels = []
    for place in range(len(rows)):
        is_word = words.n_parts[place] > 0 and not 0 < tokens.n_parts[place] < words.n_parts[place]
        rules, names = (words, word_forms.of(place)) if is_word else (tokens, token_forms.of(place))
        is_named = rules.n_parts[place] > 0
        parts = _parts(rules, place, int(rules.n_parts[place]) if is_named else rules.keys.shape[1], names)
        text = _with_shares(parts)
        labels.append(Label(text, TOKEN, parts) if is_named else Label(f"mixed: {text}", MIXED, parts))
    return labels


class _Forms:
    """The forms that the words, or tokens, of each feature's rule have at its rows."""

    def __init__(self, rows: DrawnRows, texts: RowTexts, kind: str, rules: Rules) -> None:
        forms, keys = texts.forms[kind], texts.by_kind[kind].ids
        feature, form, share = text_shares(rows, forms.ids)
        key_of_form = np.full(len(forms.texts), -1)
        key_of_form[forms.ids[forms.ids >= 0]] = keys[forms.ids >= 0]
        is_of_rule = is_among(key_of_form[form], rules.keys[feature])
        feature, form, share = feature[is_of_rule], form[is_of_rule], share[is_of_rule]
        order = np.lexsort((form, -share, feature))
        self._columns = [values[order] for values in (form, key_of_form[form], share)]
        self._ends = np.searchsorted(feature[order], np.arange(len(rows.rows) + 1))
        self._texts = forms.texts

    def of(self, place: int) -> dict[int, str]:
        """Place of a text → its forms at the rows of one feature, as they are written in a label."""
        here = slice(self._ends[place], self._ends[place + 1])
        forms: defaultdict[int, list[tuple[str, float]]] = defaultdict(list)
        for form, key, share in zip(*(column[here].tolist() for column in self._columns), strict=True):
            forms[key].append((self._texts[form], share))
        return {
            key: "/".join(text for text, share in of_key[:2] if share >= _MIN_FORM * of_key[0][1])
            for key, of_key in forms.items()
        }


def _parts(rules: Rules, place: int, n: int, forms: dict[int, str] | None = None) -> tuple[tuple[str, float], ...]:
    pairs = zip(rules.keys[place, :n].tolist(), rules.shares[place, :n].tolist(), strict=True)
    return tuple((rules.texts.texts[key] if forms is None else forms[key], share) for key, share in pairs if key >= 0)


def _with_shares(parts: tuple[tuple[str, float], ...]) -> str:
    """Each part with its share in percent; texts without a letter in quotes."""
    return " · ".join(f"{part_name(text)} {100 * share:.0f} %" for text, share in parts)


def _ordinal(n: int) -> str:
    suffix = "th" if 10 <= n % 100 <= 20 else {1: "st", 2: "nd", 3: "rd"}.get(n % 10, "th")
    return f"{n}{suffix}"
