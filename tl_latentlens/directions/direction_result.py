"""Neighbors of directions."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd
from rich.console import Group
from rich.text import Text

from tl_latentlens.index.neighbor import Neighbor
from tl_latentlens.index.page_head import index_call, index_head
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.views.chance import direction_notes
from tl_latentlens.views.data import DirectionEnd, DirectionLine, DirectionNearness
from tl_latentlens.views.directions import direction_page
from tl_latentlens.views.files import output_path
from tl_latentlens.views.notebook import directions_html
from tl_latentlens.views.terminal.layout import plain_text
from tl_latentlens.views.terminal.lens import direction_tables

_DIRECTION_COLUMNS = [
    "direction", "sign", "rank", "token", "context", "position", "prompt_index", "row", "hook_name", "similarity",
]  # fmt: skip


@dataclass(frozen=True)
class DirectionResult:
    """Neighbors of directions: of each vector and of its opposite.

    Attributes:
        ids: The name of each direction: feature numbers, or 0 to n - 1.
        positive: Neighbors of +v.
        negative: Neighbors of -v.
        scores: Two lines a direction, sign +1 and -1; None where they were not asked for. Columns: direction, sign; similarity,
            the mean of the neighbors; z, how far it is above that of random rows, in standard deviations; p_isotropic and
            p_covariance, the shares of two kinds of random directions with at least this z; p, the larger of both.
        random: One random direction, with the covariance of the rows, read in the same way, for comparison; None as `scores`.
    """

    ids: Sequence[int | str]
    positive: SearchResult = field(repr=False)
    negative: SearchResult = field(repr=False)
    scores: pd.DataFrame | None = field(repr=False, default=None, kw_only=True)
    random: "DirectionResult | None" = field(repr=False, default=None, kw_only=True)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.ids)} directions, top {self.positive.rows.shape[-1]})"

    def __str__(self) -> str:
        last = len(self.ids) - 1  # The random direction stands once, below all.
        parts = [
            (Text(f"direction {name}", "bold"), direction_tables(self._line(i), self._random_line if i == last else None))
            for i, name in enumerate(self.ids)
        ]
        return plain_text(Group(*(part for both in parts for part in both)))

    def _repr_html_(self) -> str:
        return directions_html(map(self._line, range(len(self.ids))), len(self.ids), self.transform, self._random_line)

    @property
    def transform(self) -> str:
        """How the directions were compared with the rows, as `ContextualIndex` names it."""
        return self.positive.index.transform

    def neighbors_to_rich(self, direction: int = 0, *, width: int | None = None) -> Group:
        """Tables for the terminal (`rich.print`): the rows nearest to the n-th direction, to its opposite and to a random one.

        Args:
            direction: Which direction, by its place.
            width: In characters; None: the terminal's.
        """
        return direction_tables(self._line(direction), self._random_line, width)

    def to_html(self, path: str | Path, *, call: str = "") -> Path:
        """Write one page that needs no network: the rows nearest to both ends of each direction, and whether they are near.

        Args:
            path: The file.
            call: The command that read the directions, for the page's head; empty: the call of `decode_directions`.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder.
        """
        path = output_path(path)
        index, top_k = self.positive.index, self.positive.rows.shape[-1]
        head = index_head(
            index,
            "What a direction means" if len(self.ids) == 1 else f"What {len(self.ids):,} directions mean",
            "The tokens of the bank whose activations point most along the vector v, and most against it.",
            call=call or f"decode_directions(vectors, {index_call(index)}, top_k={top_k}, calibrate={self.scores is not None})",
            notes=direction_notes(self.transform, has_scores=self.scores is not None),
        )
        lines = [self._line(i) for i in range(len(self.ids))]
        path.write_text(direction_page(lines, self._random_line, head), encoding="utf-8")
        return path

    @property
    def _random_line(self) -> DirectionLine | None:
        """The random direction as views draw it."""
        return None if self.random is None else self.random._line(0)

    def _line(self, direction: int) -> DirectionLine:
        """The n-th direction as views draw it."""
        return DirectionLine(str(self.ids[direction]), *self.ends(direction), transform=self.transform)

    def ends(self, direction: int) -> tuple[DirectionEnd, DirectionEnd]:
        """The neighbors of +v and of -v for the n-th direction as views draw them, and whether they are near."""
        ends = []
        for end, found in enumerate((self.positive, self.negative)):
            # Whether they are near is said of the neighbors together.
            neighbors = [replace(near, chance=None) for near in found.neighbor_lines(direction)]
            ends.append(DirectionEnd(neighbors, self._nearness(direction, end)))
        return ends[0], ends[1]

    def _nearness(self, direction: int, end: int) -> DirectionNearness | None:
        if self.scores is None:
            return None
        return DirectionNearness(*map(float, self.scores.iloc[2 * direction + end][["z", "p"]]))

    def neighbors(self, direction: int) -> tuple[list[Neighbor], list[Neighbor]]:
        """Neighbors of +v and of -v for a direction by its place in `ids`, from 0."""
        return self.positive.neighbors_of(direction), self.negative.neighbors_of(direction)

    def to_dataframe(self) -> pd.DataFrame:
        """One line for each direction, sign (+1 or -1) and rank: the columns of `neighbors_dataframe`."""
        return self.neighbors_dataframe()

    def neighbors_dataframe(self) -> pd.DataFrame:
        """One line for each direction, sign (+1 or -1) and rank: direction, sign, rank, token, context, ..., similarity.

        `attrs["transform"]` of the frame is `transform`.
        """
        lines = []
        for i, name in enumerate(self.ids):
            for sign, neighbors in zip((1, -1), self.neighbors(i), strict=True):
                for rank, neighbor in enumerate(neighbors):
                    columns = {key: value for key, value in vars(neighbor).items() if key != "chance" or value is not None}
                    lines.append({"direction": name, "sign": sign, "rank": rank + 1, **columns})
        columns = [*_DIRECTION_COLUMNS, *([] if self.positive.chances is None else ["chance"])]
        frame = pd.DataFrame(lines, columns=columns)
        frame.attrs["transform"] = self.transform
        return frame
