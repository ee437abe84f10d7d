"""What a search or a lens found, as frozen data; text is built only when it is asked for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int

from tl_latentlens.errors import InvalidInputError, MissingExtraError, UnknownHookError

if TYPE_CHECKING:
    from tl_latentlens.directions.activity import Activity
    from tl_latentlens.index.contextual import SearchResult


@dataclass(frozen=True)
class Neighbor:
    """One found contextual token.

    Attributes:
        token: Its text, with its leading space.
        context: The text around it, the token marked «so».
        position: Its position in its prompt, BOS counted.
        prompt_index: Which text of the corpus.
        row: Its row in the index (in the bank, where the index holds one bank).
        hook_name: The hook name whose vector was found.
        similarity: Cosine in [-1, 1].
        chance: How likely a random activation comes as near, in (0, 1] (`ContextualIndex.chances`); None where it was not
            asked for.
    """

    token: str
    context: str
    position: int
    prompt_index: int
    row: int
    hook_name: str
    similarity: float
    chance: float | None = None


@dataclass(frozen=True)
class TokenReading:
    """Vocabulary tokens that a lens reads from vectors, best first.

    Attributes:
        token_ids: [n, k].
        scores: Probabilities in [0, 1] (logit lens) or cosines in [-1, 1] (embedding lens), [n, k].
        strings: The text of each token id that occurs.
    """

    token_ids: Int[np.ndarray, "n k"]
    scores: Float[np.ndarray, "n k"]
    strings: dict[int, str] = field(repr=False)

    def tokens(self, row: int) -> list[str]:
        """The texts of one vector's tokens."""
        return [self.strings[i] for i in self.token_ids[row].tolist()]


@dataclass(frozen=True)
class Cell:
    """What the lenses read at one hook name and token.

    Attributes:
        hook_name: The hooked activation.
        batch, pos: Where it stood.
        token: The input token there, or None where the run's tokens were not known.
        neighbors: Nearest contextual tokens, nearest first.
        logit_lens, embedding_lens: (token, score) pairs, best first; None where that lens did not read.
    """

    hook_name: str
    batch: int
    pos: int
    token: str | None
    neighbors: list[Neighbor]
    logit_lens: list[tuple[str, float]] | None
    embedding_lens: list[tuple[str, float]] | None


_COLUMNS = [
    "hook_name", "batch", "pos", "token", "rank", "neighbor", "similarity", "context", "neighbor_hook_name", "neighbor_row",
    "neighbor_prompt_index", "neighbor_position",
]  # fmt: skip


@dataclass(frozen=True)
class LensResult:
    """Neighbors, and logit-lens tokens beside them, for each hook name and each decoded token of a run.

    Attributes:
        hook_names: The decoded hook names, in forward order.
        tokens: [batch][pos] texts of the input; None where the run's tokens were not known.
        decoded: True at the positions that were decoded, [batch, pos]; the entries of `found` and of the lenses follow
            its True cells in reading order.
        found: Hook name → neighbors of each decoded token.
        logit_lens: Hook name → what the model's own unembedding reads; empty where it was not asked for.
        embedding_lens: Hook name → nearest input embeddings; empty where it was not asked for.
    """

    hook_names: tuple[str, ...]
    tokens: list[list[str]] | None
    decoded: Bool[np.ndarray, "batch pos"]
    found: "dict[str, SearchResult]" = field(repr=False)
    logit_lens: dict[str, TokenReading] = field(repr=False)
    embedding_lens: dict[str, TokenReading] = field(repr=False)

    def __str__(self) -> str:
        from tl_latentlens.views.terminal import as_text

        return as_text(self)

    @cached_property
    def positions(self) -> Int[np.ndarray, "cells 2"]:
        """(batch, pos) of each decoded token, in reading order."""
        return np.argwhere(self.decoded)

    def cell(self, hook_name: str, pos: int, batch: int = 0) -> Cell:
        """What was read at one hook name and position; negative positions count from the end.

        Raises:
            UnknownHookError: The hook name was not decoded.
            InvalidInputError: The position was not decoded (padding, BOS, or not selected).
        """
        if hook_name not in self.found:
            raise UnknownHookError(f"{hook_name!r} was not decoded; decoded hook names: {list(self.hook_names)}")
        return self._cell(hook_name, self.place(pos, batch))

    def place(self, pos: int, batch: int = 0) -> int:
        """Which of `positions` a position is; negative ones count from the end.

        Raises:
            InvalidInputError: The position was not decoded (padding, BOS, or not selected).
        """
        pos = pos + self.decoded.shape[1] if pos < 0 else pos
        at = np.flatnonzero((self.positions == (batch, pos)).all(-1))
        if not len(at):
            raise InvalidInputError(f"batch {batch}, position {pos} was not decoded; decoded: {self.positions.tolist()}")
        return int(at[0])

    def token(self, batch: int, pos: int) -> str | None:
        """The input token at a position; None where the run's tokens were not known."""
        return None if self.tokens is None else self.tokens[batch][pos]

    def cells(self) -> list[Cell]:
        """Every cell: hook names in order, within each the tokens in reading order."""
        return list(self.iter_cells())

    def iter_cells(self) -> Iterator[Cell]:
        """The cells one by one, for results too large to build at once."""
        return (self._cell(name, i) for name in self.hook_names for i in range(len(self.positions)))

    def _cell(self, hook_name: str, i: int) -> Cell:
        batch, pos = self.positions[i].tolist()
        return Cell(
            hook_name,
            batch,
            pos,
            self.token(batch, pos),
            self.found[hook_name].neighbors_of(i),
            _pairs(self.logit_lens.get(hook_name), i),
            _pairs(self.embedding_lens.get(hook_name), i),
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One line for each hook name, token and rank.

        Columns: hook_name, batch, pos, token, rank (from 1), neighbor, similarity, context, neighbor_hook_name,
        neighbor_row, neighbor_prompt_index, neighbor_position; chance where it was asked for; logit_token and
        logit_probability, embedding_token and embedding_similarity where those lenses read.
        """
        lines: list[dict[str, Any]] = []
        for cell in self.cells():
            where = {"hook_name": cell.hook_name, "batch": cell.batch, "pos": cell.pos, "token": cell.token}
            for rank, neighbor in enumerate(cell.neighbors):
                line = {
                    **where,
                    "rank": rank + 1,
                    "neighbor": neighbor.token,
                    "similarity": neighbor.similarity,
                    "context": neighbor.context,
                    "neighbor_hook_name": neighbor.hook_name,
                    "neighbor_row": neighbor.row,
                    "neighbor_prompt_index": neighbor.prompt_index,
                    "neighbor_position": neighbor.position,
                    **({} if neighbor.chance is None else {"chance": neighbor.chance}),
                }
                if cell.logit_lens is not None and rank < len(cell.logit_lens):
                    line["logit_token"], line["logit_probability"] = cell.logit_lens[rank]
                if cell.embedding_lens is not None and rank < len(cell.embedding_lens):
                    line["embedding_token"], line["embedding_similarity"] = cell.embedding_lens[rank]
                lines.append(line)
        return pd.DataFrame(lines) if lines else pd.DataFrame(columns=_COLUMNS)

    def plot(self, batch: int = 0, lens: str = "latentlens") -> Any:
        """A layer × position heatmap (a plotly Figure), layers upwards, with buttons that switch between the lenses.

        Cells show the word of the nearest neighbor, faint where chance explains it (`calibrate=True`), or a lens's first
        token. Color is the cosine of the nearest neighbor, -log10 of its chance where the result is calibrated, or the
        token's probability or cosine. The hover shows neighbors in context and every lens's tokens.

        Args:
            batch: Which text.
            lens: Shown first: "latentlens", "logit_lens" or "embedding_lens".

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidInputError: Nothing was decoded of that text, or the lens was not read.
        """
        return _plotly().heatmap(self, batch, lens)

    def plot_lenses(self, batch: int = 0) -> Any:
        """The heatmaps of `plot` for each lens that was read, one above the other on one axis of positions.

        Raises:
            MissingExtraError: plotly is not installed.
            InvalidInputError: Nothing was decoded of that text.
        """
        return _plotly().heatmaps(self, batch)

    def to_html(self, path: str | Path) -> Path:
        """Write one page that needs no network and no plotly: a layer × token table, and the neighbors of the cell clicked.

        All texts of the batch are in it, and a switch between the lenses. It follows the light or dark setting of its reader.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder, or nothing was decoded.
        """
        from tl_latentlens.views.page import write_page

        return write_page(self, path)

    def _repr_html_(self) -> str:
        from tl_latentlens.views.html import lens_html

        return lens_html(self)


def _plotly() -> Any:
    try:
        from tl_latentlens.views import heatmap
    except ImportError as error:
        raise MissingExtraError('plotting needs plotly: pip install "tl-latentlens[viz]"') from error
    return heatmap


def _pairs(reading: TokenReading | None, row: int) -> list[tuple[str, float]] | None:
    if reading is None:
        return None
    return list(zip(reading.tokens(row), reading.scores[row].tolist(), strict=True))


_DIRECTION_COLUMNS = [
    "direction", "sign", "rank", "token", "context", "position", "prompt_index", "row", "hook_name", "similarity",
]  # fmt: skip


@dataclass(frozen=True)
class DirectionResult:
    """Neighbors of directions: of each vector and of its opposite.

    Attributes:
        ids: What each direction is called: feature numbers, or 0 to n - 1.
        positive: Neighbors of +v.
        negative: Neighbors of -v.
    """

    ids: Sequence[int]
    positive: "SearchResult" = field(repr=False)
    negative: "SearchResult" = field(repr=False)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.ids)} directions, top {self.positive.rows.shape[-1]})"

    def __str__(self) -> str:
        from tl_latentlens.views.text import printable

        chance = ["chance"] * (self.positive.chances is not None)
        columns = ["direction", "sign", "rank", "similarity", *chance, "hook_name", "context"]
        shown = self.to_dataframe()[columns].assign(context=lambda table: table["context"].map(printable))
        with pd.option_context("display.max_colwidth", 100):
            return shown.to_string(index=False)

    def _repr_html_(self) -> str:
        from tl_latentlens.views.html import directions_html

        return directions_html(self)

    def neighbors(self, direction: int) -> tuple[list[Neighbor], list[Neighbor]]:
        """Neighbors of +v and of -v for the n-th direction."""
        return self.positive.neighbors_of(direction), self.negative.neighbors_of(direction)

    def to_dataframe(self) -> pd.DataFrame:
        """One line for each direction, sign (+1 or -1) and rank."""
        lines = []
        for i, name in enumerate(self.ids):
            for sign, neighbors in zip((1, -1), self.neighbors(i), strict=True):
                for rank, n in enumerate(neighbors):
                    found = {key: value for key, value in vars(n).items() if key != "chance" or value is not None}
                    lines.append({"direction": name, "sign": sign, "rank": rank + 1, **found})
        return pd.DataFrame(lines) if lines else pd.DataFrame(columns=_DIRECTION_COLUMNS)


@dataclass(frozen=True)
class FeatureResult(DirectionResult):
    """Neighbors of SAE features, a label for each that has earned one, and the figures that say so.

    `ids`, `positive` and `negative` leave out features whose decoder row is zero: they point nowhere.

    Attributes:
        table: One line a feature, in the order asked for: feature, label, why_not (what kept the label back, else empty),
            similarity (mean cosine of the neighbors) and p_similarity against random directions. With an encoder and a bank
            of the activation it reads:
            density (share of rows on which it is active), mean_activation and max_activation; auroc and auroc_same_token in
            [0, 1], their 95 % intervals (_low, _high), the means of shuffled decoders (_null) and p-values (p_auroc, ...);
            overlap in [0, 1] and overlap_null. With a model: logit_tokens and logit_tokens_negative (of v and of -v), steered
            and steered_next in [0, 1], their nulls.
        activity: Max-activating rows and histograms, from the pass over the bank; None without an encoder.
        nulls: Score → what wrong directions score: similarity (random directions), auroc and auroc_same_token (shuffled).
        sae, model: What the features were labelled with.
    """

    table: pd.DataFrame = field(repr=False)
    activity: "Activity | None" = field(repr=False, default=None)
    nulls: dict[str, Float[np.ndarray, " nulls"]] = field(repr=False, default_factory=dict)
    sae: Any = field(repr=False, default=None)
    model: Any = field(repr=False, default=None)

    def __repr__(self) -> str:
        return f"FeatureResult({len(self.table)} features, {np.count_nonzero(self.table['label'] != '')} labelled)"

    def __str__(self) -> str:
        from tl_latentlens.views.terminal import features_as_text

        return features_as_text(self)

    def _repr_html_(self) -> str:
        from tl_latentlens.views.html import features_html

        return features_html(self)

    def to_html(self, path: str | Path, contexts: int = 20, *, progress: bool = True) -> Path:
        """Write one page that needs no network: a table of the features to search and sort, and a card for the one chosen.

        A card has the neighbors of v and of -v, max-activating contexts shaded by the activation of each token, a histogram of
        activations, the logit lens of both, and each score among those of wrong directions: what of these there is. Tokens that
        are no rows of the bank are shaded only where the features were labelled with a model, which then runs their texts.
        `path#feature=123` opens a card.

        Args:
            path: The file.
            contexts: Max-activating contexts of each feature; at most four times the `top_k` of `label_features` are kept.
            progress: Show a progress bar.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder.
        """
        from tl_latentlens.views.features import write_features

        return write_features(self, path, contexts, progress)

    def with_evidence(self, rows: int = 3) -> pd.DataFrame:
        """The table, and the contexts of the first `rows` neighbors and max-activating rows, as columns of lists."""
        place = {feature: i for i, feature in enumerate(self.ids)}
        features = self.table["feature"].tolist()
        neighbors = [self.positive.neighbors_of(place[f])[:rows] if f in place else [] for f in features]
        largest = [[neighbor for _, neighbor in self.max_activating(f, rows)] for f in features]
        columns = {"neighbors": neighbors, "max_activating": largest}
        return self.table.assign(**{name: [[n.context for n in found] for found in each] for name, each in columns.items()})

    def max_activating(self, feature: int, top_k: int = 10) -> list[tuple[float, Neighbor]]:
        """Activation and row of a feature's max-activating rows, the largest first.

        Empty without an encoder, and for a feature whose decoder row is zero.

        At most four times the `top_k` of `label_features` are kept. The rows' similarity is NaN: none was computed.

        Raises:
            InvalidInputError: The feature was not asked for.
        """
        if feature not in self.table["feature"].to_numpy():
            raise InvalidInputError(f"feature {feature} is not among the {len(self.table)} that were labelled")
        if self.activity is None or feature not in self.ids:
            return []
        at = list(self.ids).index(feature)
        values, rows = (part[at, :top_k] for part in (self.activity.top.similarities, self.activity.top.rows))
        index = self.positive.index
        hook_id = index.hook_names.index(self.activity.hook_name)
        pairs = [(value, row) for value, row in zip(values.tolist(), rows.tolist(), strict=True) if value > float("-inf")]
        return [(value, index.neighbor(row, hook_id, float("nan"))) for value, row in pairs]

    def summary(self) -> pd.DataFrame:
        """How many features are alive and labelled, and the mean of each score beside its null, with 95 % intervals."""
        from tl_latentlens.directions.label import summarize

        return summarize(self.table)


@dataclass(frozen=True, eq=False)
class Meaning:
    """What a word means in its context: what this use shares with the nearest other uses of its token, and others lack.

    Attributes:
        tokens: The text up to the word, which is the last, BOS included.
        hook_name: The activation that was read.
        direction: m, [d], of length 1.
        strength: How much more of m the activation has than the uses it is compared with, in its own units.
        alike_rows: Rows of the nearest other uses, nearest first; empty where `by_token` is False.
        alike_cosines: Their cosines to this use, both less the mean of all uses.
        n_uses: Uses of another kind, with which it is compared.
        by_token: False where the bank has too few uses of the token: m is then the activation less the bank's mean.
        found: Neighbors of the direction.
    """

    tokens: list[str]
    hook_name: str
    direction: Float[np.ndarray, " d"] = field(repr=False)
    strength: float
    alike_rows: Int[np.ndarray, " alike"] = field(repr=False)
    alike_cosines: Float[np.ndarray, " alike"] = field(repr=False)
    n_uses: int
    by_token: bool
    found: "SearchResult" = field(repr=False)

    def alike(self) -> list[Neighbor]:
        """The nearest other uses of the token."""
        index = self.found.index
        pairs = zip(self.alike_rows.tolist(), self.alike_cosines.tolist(), strict=True)
        return [index.neighbor(row, index.hook_names.index(self.hook_name), cosine) for row, cosine in pairs]

    def neighbors(self) -> list[Neighbor]:
        """The rows nearest to the direction."""
        return self.found.neighbors_of(0)


@dataclass(frozen=True, eq=False)
class FindResult:
    """Components that write what a word means in its context, the largest share first.

    Attributes:
        kind: "feature", "head" or "neuron".
        meaning: What the word means here, and what it was compared with.
        table: A line a component: what it is, contribution, usual, share, beats_null, why_not, and p, z and n against both
            nulls (_same_token, _random).
        parts: What all components of a kind add up to, as shares of the whole; they sum to 1.
        found: Neighbors of what each line's component writes.
    """

    kind: str
    meaning: Meaning
    table: pd.DataFrame = field(repr=False)
    parts: dict[str, float]
    found: "SearchResult" = field(repr=False)

    def __str__(self) -> str:
        from tl_latentlens.views.found import find_text

        return find_text(self)

    def neighbors(self, line: int) -> list[Neighbor]:
        """The rows nearest to what the component of a line of the table writes."""
        return self.found.neighbors_of(line)

    def to_dataframe(self) -> pd.DataFrame:
        """The table, with rank (from 1), and the nearest row's similarity and context."""
        nearest = [self.neighbors(line)[0] for line in range(len(self.table))]
        table = self.table.assign(similarity=[n.similarity for n in nearest], nearest=[n.context for n in nearest])
        table.insert(0, "rank", range(1, len(table) + 1))
        return table
