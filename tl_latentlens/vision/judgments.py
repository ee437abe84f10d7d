"""What a judge said of the words that lenses read: shares with intervals, beside the control, and agreement of two judges."""

import math
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.statistics.intervals import mean_of, share_of

RELATIONS = ("concrete", "abstract", "global", "none")  # a patch counts as the first that one of its words has
UNPARSED, UNANSWERED = "unparsed", "unanswered"
_KEYS = ["image", "position", "lens", "hook_name", "shown"]
_RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class Judgments:
    """What a judge said of the words that lenses read.

    Attributes:
        model: The judge.
        table: A line a question: those of `JudgeQuestions.to_dataframe`; category (the first of concrete, abstract, global and
            none that one of its words has; "unparsed" where the answer holds no such judgment, a refusal for instance;
            "unanswered"), relations (of each word), answer (the judge's text), problem (why there is none).
        input_tokens, output_tokens: Of all answers, as the endpoint counted them.
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
        """How the patches fare, for each lens and hook name, with 95 % intervals over images, beside the control.

        A line for each category, and for "interpretable": concrete, abstract or global. Columns: lens, hook_name, category;
        share, low, high (Wilson); control, control_low, control_high, the same with another image shown; gain, gain_low,
        gain_high, the difference image by image (bootstrap); patches, unanswered, control_unanswered. Patches without an
        answer are left out of the shares, unparsed ones are in them.
        """
        category, control, image = (np.asarray(self.table[name]) for name in ("category", "control", "image"))
        answered, n_images = category != UNANSWERED, int(image.max()) + 1
        lines = []
        for lens, hook_name in self.table[["lens", "hook_name"]].drop_duplicates().itertuples(index=False):
            here = np.asarray((self.table["lens"] == lens) & (self.table["hook_name"] == hook_name))
            seen, other = (np.flatnonzero(here & answered & (control == shuffled)) for shuffled in (False, True))
            missing = {
                "unanswered": np.count_nonzero(here & ~answered & ~control),
                "control_unanswered": np.count_nonzero(here & ~answered & control),
            }
            for name in (*RELATIONS, UNPARSED, "interpretable"):
                counted = np.isin(category, RELATIONS[:3] if name == "interpretable" else [name])
                real, shuffled = (_image_shares(image[some], counted[some], n_images) for some in (seen, other))
                share, null, gain = share_of(real), share_of(shuffled), mean_of(real - shuffled)
                line = {"lens": lens, "hook_name": hook_name, "category": name}
                line |= {"share": share.mean, "low": share.low, "high": share.high}
                line |= {"control": null.mean, "control_low": null.low, "control_high": null.high}
                line |= {"gain": gain.mean, "gain_low": gain.low, "gain_high": gain.high}
                lines.append({**line, "patches": len(seen), **missing})
        return pd.DataFrame(lines)

    def agreement(self, other: "Judgments | pd.DataFrame", seed: int = 0) -> pd.DataFrame:
        """Cohen's kappa with another judge, or with people, over the questions on which both have a category.

        Args:
            other: Judgments, or a frame as `JudgeQuestions.to_dataframe` gives, with a column `category`: concrete, abstract,
                global or none. Lines with anything else are left out.
            seed: Of the bootstrap over images.

        Returns:
            A line for the four categories ("relation"), and one for whether there is any relation ("interpretable"): kappa,
            low, high (95 %), agreement (the share of equal ones), n. Kappa is NaN where both always say the same one thing.

        Raises:
            InvalidInputError: No question that both judged.
        """
        frames = [frame[frame["category"].isin(RELATIONS)] for frame in (self.table, _frame(other))]
        pairs = frames[0].merge(frames[1], on=_KEYS, suffixes=("", "_other"), validate="one_to_one")
        if pairs.empty:
            raise InvalidInputError(f"no question was judged by both; expected the same {', '.join(_KEYS)}, and a category")
        first, second = (pairs[name].map(RELATIONS.index).to_numpy() for name in ("category", "category_other"))
        images = pd.factorize(pairs["image"])[0]
        lines = []
        for name, classes, a, b in (("relation", 4, first, second), ("interpretable", 2, first == 3, second == 3)):
            counts = np.zeros((images.max() + 1, classes, classes))
            np.add.at(counts, (images, a.astype(int), b.astype(int)), 1)
            kappa, low, high = _kappa_with_interval(counts, seed)
            equal = float((a == b).mean())
            lines.append({"labels": name, "kappa": kappa, "low": low, "high": high, "agreement": equal, "n": len(pairs)})
        return pd.DataFrame(lines)


def _frame(other: "Judgments | pd.DataFrame") -> pd.DataFrame:
    return other.table if isinstance(other, Judgments) else other


def _image_shares(image: Int[np.ndarray, " n"], counted: Bool[np.ndarray, " n"], n_images: int) -> Float[np.ndarray, " images"]:
    """The share that is counted of each image's patches; NaN where it has none."""
    with np.errstate(invalid="ignore"):
        return np.bincount(image, counted, n_images) / np.bincount(image, minlength=n_images)


def _with_interval(table: pd.DataFrame, *names: str) -> list[str]:
    return [f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in table[list(names)].itertuples(index=False)]


def cohens_kappa(counts: Float[np.ndarray, "... classes classes"]) -> Float[np.ndarray, "..."]:
    """(p_o - p_e) / (1 - p_e) of tables of how often two judges gave each pair of labels (Cohen, 1960); NaN where p_e is 1."""
    shares = counts / counts.sum((-2, -1), keepdims=True)
    observed = np.trace(shares, axis1=-2, axis2=-1)
    expected = (shares.sum(-1) * shares.sum(-2)).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(expected < 1, (observed - expected) / (1 - expected), np.nan)


def _kappa_with_interval(counts: Float[np.ndarray, "images classes classes"], seed: int) -> tuple[float, float, float]:
    """Kappa of all images together, and its percentile bootstrap interval over images."""
    n = len(counts)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), _RESAMPLES)
    resampled = cohens_kappa(np.tensordot(draws, counts, 1))
    known = resampled[~np.isnan(resampled)]
    low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (math.nan, math.nan)
    return float(cohens_kappa(counts.sum(0))), float(low), float(high)
