"""A judge's answers as figures: shares with intervals beside the control, and the agreement of two judges."""

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.statistics.intervals import gain_of, share_of
from tl_latentlens.vision.judge.questions import RELATIONS

UNPARSED, UNANSWERED = "unparsed", "unanswered"  # categories of questions without a relation, without an answer
_QUESTION_COLUMNS = ["image", "position", "lens", "hook_name", "shown"]  # they tell which lines of two tables are one question


@dataclass(frozen=True, eq=False)
class Judgments:
    """A judge's answers to questions on the words that lenses read.

    Attributes:
        model: Name of the judge.
        table: A line a question, with the columns of `JudgeQuestions.to_dataframe` and four more. category: the first of
            concrete, abstract, global and none that one of its words has; "unparsed" where the answer names no relations, as in
            a refusal; "unanswered". relations: one for each word. answer: the judge's text. problem: why there is no answer.
        input_tokens, output_tokens: Tokens of all answers, as the endpoint counted them.
    """

    model: str
    table: pd.DataFrame = field(repr=False)
    input_tokens: int
    output_tokens: int

    def __str__(self) -> str:
        shares = self.shares()
        shown = shares.assign(
            share=_with_interval(shares, "share", "low", "high"),
            control=_with_interval(shares, "control", "control_low", "control_high"),
        )
        columns = ["lens", "hook_name", "category", "share", "control", "patches", "unanswered"]
        return f"{self.model}\n{shown[columns].to_string(index=False)}"

    def to_dataframe(self) -> pd.DataFrame:
        """The table."""
        return self.table

    def shares(self) -> pd.DataFrame:
        """The share of patches in each category, for each lens and hook name, with 95 % intervals over images.

        There is a line for each category, and one for "interpretable": concrete, abstract or global. Unanswered patches do not
        count; unparsed ones do. Columns:
        - lens, hook_name, category;
        - share, low, high: the share and its Wilson interval;
        - control, control_low, control_high: the same where another image was shown;
        - gain, gain_low, gain_high: share less control, image by image, with a t interval, if four images or more differ;
        - patches, unanswered, control_unanswered: numbers of patches.
        """
        category, is_control, image = (np.asarray(self.table[name]) for name in ("category", "control", "image"))
        is_answered, n_images = category != UNANSWERED, int(image.max()) + 1
        lines = []
        for lens, hook_name in self.table[["lens", "hook_name"]].drop_duplicates().itertuples(index=False):
            is_read = np.asarray((self.table["lens"] == lens) & (self.table["hook_name"] == hook_name))
            own, control = (np.flatnonzero(is_read & is_answered & (is_control == value)) for value in (False, True))
            counts = {
                "patches": len(own),
                "unanswered": np.count_nonzero(is_read & ~is_answered & ~is_control),
                "control_unanswered": np.count_nonzero(is_read & ~is_answered & is_control),
            }
            for name in (*RELATIONS, UNPARSED, "interpretable"):
                is_counted = np.isin(category, RELATIONS[:3] if name == "interpretable" else [name])
                own_shares, control_shares = (_image_shares(image[ids], is_counted[ids], n_images) for ids in (own, control))
                share, null, gain = share_of(own_shares), share_of(control_shares), gain_of(own_shares - control_shares)
                line = {"lens": lens, "hook_name": hook_name, "category": name}
                line |= {"share": share.mean, "low": share.low, "high": share.high}
                line |= {"control": null.mean, "control_low": null.low, "control_high": null.high}
                line |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
                lines.append({**line, **counts})
        return pd.DataFrame(lines)

    def agreement(self, other: "Judgments | pd.DataFrame", seed: int = 0) -> pd.DataFrame:
        """Cohen's kappa with another judge, or with people, over the questions on which both have a category.

        Args:
            other: Judgments, or a frame as `JudgeQuestions.to_dataframe` gives, with a column `category`: concrete, abstract,
                global or none. Lines with anything else are left out.
            seed: Not used: nothing is drawn.

        Returns:
            A line for the four categories ("relation"), and one for whether there is any relation ("interpretable"): kappa,
            low, high (95 %, over images), agreement (share of equal ones), n. Kappa is NaN where both always give one and the
            same category.

        Raises:
            InvalidInputError: No question that both judged.
        """
        frames = [frame[frame["category"].isin(RELATIONS)] for frame in (self.table, _frame(other))]
        pairs = frames[0].merge(frames[1], on=_QUESTION_COLUMNS, suffixes=("", "_other"), validate="one_to_one")
        if pairs.empty:
            raise InvalidInputError(
                f"no question was judged by both; expected the same {', '.join(_QUESTION_COLUMNS)}, and a category"
            )
        first, second = (pairs[name].map(RELATIONS.index).to_numpy() for name in ("category", "category_other"))
        images = pd.factorize(pairs["image"])[0]
        lines = []
        for name, classes, a, b in (("relation", 4, first, second), ("interpretable", 2, first == 3, second == 3)):
            counts = np.zeros((images.max() + 1, classes, classes))
            np.add.at(counts, (images, a.astype(int), b.astype(int)), 1)
            kappa, low, high = _kappa_with_interval(counts)
            equal = float((a == b).mean())
            lines.append({"labels": name, "kappa": kappa, "low": low, "high": high, "agreement": equal, "n": len(pairs)})
        return pd.DataFrame(lines)


def _frame(other: "Judgments | pd.DataFrame") -> pd.DataFrame:
    return other.table if isinstance(other, Judgments) else other


def _image_shares(
    image: Int[np.ndarray, " n"], is_counted: Bool[np.ndarray, " n"], n_images: int
) -> Float[np.ndarray, " images"]:
    """For each image, the share of its patches that count; NaN where it has none."""
    with np.errstate(invalid="ignore"):
        return np.bincount(image, is_counted, n_images) / np.bincount(image, minlength=n_images)


def _with_interval(table: pd.DataFrame, *names: str) -> list[str]:
    return [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in table[list(names)].itertuples(index=False)]


def cohens_kappa(counts: Float[np.ndarray, "... classes classes"]) -> Float[np.ndarray, "..."]:
    """Cohen's kappa (1960), (p_o - p_e) / (1 - p_e), from how often two judges gave each pair of labels; NaN where p_e is 1."""
    shares = counts / counts.sum((-2, -1), keepdims=True)
    return _kappa(np.trace(shares, axis1=-2, axis2=-1), _expected_agreement(shares))


def _expected_agreement(shares: Float[np.ndarray, "... classes classes"]) -> Float[np.ndarray, "..."]:
    """p_e: how often two judges with these shares of labels would agree by chance."""
    return (shares.sum(-1) * shares.sum(-2)).sum(-1)


def _kappa(observed: Float[np.ndarray, "..."], expected: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)


def _kappa_with_interval(counts: Float[np.ndarray, "images classes classes"]) -> tuple[float, float, float]:
    """Kappa of all images together, and its 95 % interval: Wilson's of p_o, over images, put in kappa's formula."""
    n_questions = counts.sum((1, 2))
    agreement = share_of(np.trace(counts, axis1=1, axis2=2) / n_questions, n_questions)
    expected = _expected_agreement(counts.sum(0) / n_questions.sum())
    low, high = np.minimum(_kappa(np.array([agreement.low, agreement.high]), expected), 1)
    return float(cohens_kappa(counts.sum(0))), float(low), float(high)
