"""Readings of steered runs: neighbors under each multiple of a vector, and how far the stream has turned."""

import html
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from jaxtyping import Float
from rich.console import Group

from tl_latentlens.directions.steering.page_head import steering_head
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.lens.grid import text_grid
from tl_latentlens.lens.result import LensResult
from tl_latentlens.views.chance import geometry_note, nearness_sentence
from tl_latentlens.views.data import DirectionNearness, SteeringCell, SteeringColumn
from tl_latentlens.views.files import output_path
from tl_latentlens.views.steering import SteeredText, steering_page
from tl_latentlens.views.terminal.layout import plain_text
from tl_latentlens.views.terminal.steering import steering_tables
from tl_latentlens.views.text import place_name


@dataclass(frozen=True)
class SteeringResult:
    """The readings under each multiple of a steering vector.

    Attributes:
        hook_name: Where the vector was added.
        relative_length: Length of the vector (at multiple 1) as a share of the median length of the bank's rows at `hook_name`;
            None where the index does not hold it.
        readings: Multiple → what the lens hooks read.
        cosines: Multiple → hook name → cosine in [-1, 1] of each decoded token's activation with the unsteered one, in reading
            order; NaN where the tokens up to there are not the same. Empty where multiple 0 was not run.
        scores: How near the vector and its opposite come to the rows of `hook_name` (or else of those that are read), against
            random directions, as `DirectionResult.scores`; None where it was not asked for, or the index has no such rows.
    """

    hook_name: str
    relative_length: float | None
    readings: dict[float, LensResult] = field(repr=False)
    cosines: dict[float, dict[str, Float[np.ndarray, " cells"]]] = field(repr=False)
    scores: pd.DataFrame | None = field(repr=False, default=None)

    def __str__(self) -> str:
        return plain_text(self.table(neighbors=None))

    def _repr_html_(self) -> str:
        return f"<pre style='line-height: 1.2'>{html.escape(str(self))}</pre>"

    def table(
        self, pos: int | None = None, batch: int | None = None, neighbors: int | None = 1, *, width: int | None = None
    ) -> Group:
        """Tables for the terminal (`rich.print`): a line a layer, the multiples side by side.

        Args:
            pos: Which token; negative ones count from the end. None: the last that was decoded.
            batch: Which text; None: each.
            neighbors: Most neighbors at each layer and multiple; None: all that were read.
            width: In characters; None: the terminal's.

        Raises:
            InvalidInputError: The position was not decoded.
        """
        multiples = list(self.readings)
        hook_names = list(dict.fromkeys(name for reading in self.readings.values() for name in reading.hook_names))
        batches = range(len(self.readings[multiples[0]].decoded)) if batch is None else [batch]
        texts = [[self._column(multiple, pos, text, neighbors) for multiple in multiples] for text in batches]
        return steering_tables(texts, hook_names, self._notes(), width)

    def to_html(self, path: str | Path, pos: int | None = None, *, call: str = "") -> Path:
        """Write one page that needs no network: layers by multiples of the vector; a click shows what a cell reads.

        It has a switch between other words, uses and the other lenses, and all texts.

        Args:
            path: The file.
            pos: Which token; negative ones count from the end. None: the last that was decoded.
            call: The command that made the runs, for the page's head; empty: the call of `SteeringLens`.

        Returns:
            The file's path.

        Raises:
            InvalidInputError: No such folder, or the position was not decoded.
        """
        path = output_path(path)
        texts = [self._text(pos, batch) for batch in range(len(next(iter(self.readings.values())).decoded))]
        reading = next(iter(self.readings.values()))
        head = steering_head(
            reading, self.hook_name, list(self.readings), self._notes()[:-1], [t.grids[0] for t in texts], call
        )
        path.write_text(steering_page(texts, head), encoding="utf-8")
        return path

    def _text(self, pos: int | None, batch: int) -> SteeredText:
        """One token of a text under all multiples, as the page shows it, at the hook names that all of them read."""
        readings = self.readings.values()
        names = [name for name in next(iter(readings)).hook_names if all(name in one.hook_names for one in readings)]
        grids, cosines = [], []
        for multiple, reading in self.readings.items():
            token_pos = self._token_pos(multiple, pos, batch)
            found = {name: reading.found[name] for name in names}
            lenses = {"logit_lens": reading.logit_lens, "embedding_lens": reading.embedding_lens}
            cell = np.array([reading.place(token_pos, batch)])
            words = reading.words, reading.around
            grids.append(text_grid(found, *words, lenses, cell, batch=batch, positions=[token_pos], tokens=[""]))
            of_places = self.cosines_at(multiple) if multiple else {}
            cosines.append([of_places.get((name, batch, token_pos), math.nan) for name in names])
        heading = next(iter(readings)).token_heading(batch, self._token_pos(next(iter(self.readings)), pos, batch))
        label = heading.label if heading.context is None else heading.context.clipped(None).marked()
        return SteeredText(label, list(self.readings), grids, np.array(cosines).T)

    def _token_pos(self, multiple: float, pos: int | None, batch: int) -> int:
        """The position of the token that is shown under one multiple."""
        reading = self.readings[multiple]
        decoded = np.flatnonzero(reading.decoded[batch])
        if not len(decoded):
            raise InvalidInputError(f"nothing was decoded of text {batch} under multiple {multiple:g}")
        return int(decoded[-1]) if pos is None else pos if pos >= 0 else pos + reading.decoded.shape[1]

    def _column(self, multiple: float, pos: int | None, batch: int, n_neighbors: int | None) -> SteeringColumn:
        """The readings at one token of a text under one multiple, as views draw them."""
        reading = self.readings[multiple]
        token_pos = self._token_pos(multiple, pos, batch)
        cosines = self.cosines_at(multiple) if multiple else {}
        cells = {}
        for name in reading.hook_names:
            cosine = cosines.get((name, batch, token_pos), math.nan)
            cells[name] = SteeringCell(
                reading.lens_cell(name, token_pos, batch, n_neighbors), None if math.isnan(cosine) else cosine
            )
        return SteeringColumn(multiple, reading.token_heading(batch, token_pos), cells)

    def _notes(self) -> list[str]:
        """Notes to the tables: where the vector was added, and which figures are shown."""
        place = f"added at {place_name(self.hook_name)}"
        if self.relative_length is not None:
            place += f"; the vector is {self.relative_length:.2f} as long as a median row there"
        nearness = []
        if self.scores is not None:
            ends = zip("+−", self.scores["z"], self.scores["p"], strict=True)
            nearness = [f"{sign}v: {nearness_sentence(DirectionNearness(z, p))}" for sign, z, p in ends]
            nearness.append(f"v {geometry_note(self.scores.attrs['transform'])}")
        figures = "cos with the nearest neighbor" + " · with the unsteered activation" * bool(self.cosines)
        logit_lens = "; → logit lens" * any(reading.logit_lens for reading in self.readings.values())
        return [place, *nearness, figures + logit_lens]

    def to_dataframe(self) -> pd.DataFrame:
        """The lines of `LensResult.to_dataframe` with `multiple` in front, and `cos_to_unsteered` (of the cell) behind."""
        frames = []
        for multiple, reading in self.readings.items():
            frame = reading.to_dataframe()
            frame.insert(0, "multiple", multiple)
            places = zip(frame["hook_name"], frame["batch"], frame["pos"], strict=True)
            cosines = self.cosines_at(multiple)
            frame["cos_to_unsteered"] = [cosines.get(place, np.nan) for place in places]
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def cosines_at(self, multiple: float) -> dict[tuple[str, int, int], float]:
        """(hook name, batch, pos) → cosine with the unsteered activation."""
        places = self.readings[multiple].positions.tolist()
        return {
            (name, *place): cosine
            for name, cosines in self.cosines.get(multiple, {}).items()
            for place, cosine in zip(places, cosines.tolist(), strict=True)
        }
