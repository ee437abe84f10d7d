"""The interval of Cohen's kappa over images: two judges whose answers agree with a probability of each image's own."""

import numpy as np
import pandas as pd

from benchmarks.coverage.lines import Line
from benchmarks.measure import Settings
from tl_latentlens.vision.judge.judgments import Judgments, cohens_kappa
from tl_latentlens.vision.judge.questions import RELATIONS

TITLE = "Cohen's kappa of two judges, 95 % intervals over images"
_BASE = np.array([0.4, 0.2, 0.1, 0.3])  # how often a judge gives each category
_SIZES = ((30, 1), (30, 5), (100, 1), (100, 5))  # images, questions of each
_MANY = 20_000  # images whose kappa is the truth


def lines(settings: Settings) -> list[Line]:
    """Coverage by agreement, images, and questions an image."""
    draws = max(1, settings.draws // 4)
    return [of_agreement(copied, *size, draws) for copied in (0.5, 0.9) for size in _SIZES]


def of_agreement(copied: float, n_images: int, n_questions: int, draws: int) -> Line:
    """The second judge gives the first one's answer with probability `copied` on the whole, else one of its own."""
    rng = np.random.default_rng([n_images, n_questions])
    truth = float(cohens_kappa(_counts(*_answers(rng, _MANY, n_questions, copied))))
    found = [_agreement(*_answers(rng, n_images, n_questions, copied)) for _ in range(draws)]
    covered = np.mean([line["low"] <= truth <= line["high"] for line in found])
    return Line(f"kappa {truth:.2f}, questions an image: {n_questions}", n_images, 0.95, float(covered), draws)


def _answers(rng: np.random.Generator, n_images: int, n_questions: int, copied: float) -> tuple[np.ndarray, np.ndarray]:
    """Categories of both judges, [images, questions]."""
    shape = (n_images, n_questions)
    first, own = (rng.choice(len(_BASE), shape, p=_BASE) for _ in range(2))
    is_copied = rng.random(shape) < rng.beta(6 * copied, 6 * (1 - copied), (n_images, 1))
    return first, np.where(is_copied, first, own)


def _counts(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    counts = np.zeros((len(_BASE), len(_BASE)))
    np.add.at(counts, (first, second), 1)
    return counts


def _agreement(first: np.ndarray, second: np.ndarray) -> pd.Series:
    images, positions = np.indices(first.shape)
    place = {"image": images.ravel(), "position": positions.ravel(), "lens": "logit_lens", "hook_name": "a"}
    tables = [
        pd.DataFrame({**place, "shown": place["image"], "category": np.array(RELATIONS)[answers.ravel()]})
        for answers in (first, second)
    ]
    return Judgments("m", tables[0], 0, 0).agreement(tables[1]).iloc[0]
