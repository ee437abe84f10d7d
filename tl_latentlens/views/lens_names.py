"""The lenses, and the words that LatentLens reads: what each is called, what its scores are, and its colors."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LensInfo:
    """The names, score and colors by which views show one lens.

    Attributes:
        label: Its name in a sentence.
        switch: Its name on a switch between lenses.
        title: Its name as a heading, with what it reads.
        score_name: What its scores are: "cosine" or "probability".
        hue: Its color on pages and pictures, RGB.
        colorscale: The colors of its heatmap from low to high, light enough for dark words.
    """

    label: str
    switch: str
    title: str
    score_name: str
    hue: tuple[int, int, int]
    colorscale: tuple[str, str, str]

    def format_score(self, score: float) -> str:
        """A score in few characters: a probability in percent, a cosine with two digits."""
        return f"{score:.0%}" if self.score_name == "probability" else f"{score:.2f}"


_BLUE = (37, 99, 235)
_BLUES = ("#f7fbff", "#9ecae1", "#4292c6")

LENSES = {
    "words": LensInfo("other words", "other words", "The nearest other word", "cosine", _BLUE, _BLUES),
    "latentlens": LensInfo("LatentLens", "uses", "LatentLens: the nearest contextual token", "cosine", _BLUE, _BLUES),
    "around": LensInfo(
        "words around", "around", "A word that stands near the nearest uses and not near other uses", "cosine", _BLUE, _BLUES
    ),
    "logit_lens": LensInfo(
        "logit lens",
        "logit lens",
        "Logit lens: the likeliest next token",
        "probability",
        (234, 88, 12),
        ("#fff5eb", "#fdbe85", "#f16913"),
    ),
    "embedding_lens": LensInfo(
        "embedding lens",
        "embedding lens",
        "Embedding lens: the nearest input token",
        "cosine",
        (22, 163, 74),
        ("#f7fcf5", "#a1d99b", "#41ab5d"),
    ),
}
"""In the order in which a switch shows them."""

CONTEXT_LENSES = ("words", "latentlens", "around")
"""What is read from the nearest rows."""

VOCABULARY_LENSES = ("logit_lens", "embedding_lens")
"""What is read from the model's own vocabulary."""

NO_WORD = "·"
"""What a cell shows that has no other word."""
