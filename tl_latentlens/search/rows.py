"""Rows of a search as they are stored, and as they are compared: transformed, normalized, on the device chunk by chunk."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from tl_latentlens.errors import InvalidInputError
from tl_latentlens.search.chunks import Chunk, rows_per_chunk, split_chunk
from tl_latentlens.search.device import has_room_for, working_memory
from tl_latentlens.search.error_bounds import MAX_UNIT_LENGTH, UNIT_LENGTH_TOLERANCE
from tl_latentlens.search.geometry import MIN_LENGTH, RowGeometry
from tl_latentlens.search.tensors import as_tensor

_OTHER_LENGTH_TOLERANCE = 1e-5  # For rows of other float types than UNIT_LENGTH_TOLERANCE has.


@dataclass(frozen=True)
class RowScales:
    """The factors that bring rows to length 1.

    Attributes:
        prenorm: Multiplied with each stored row before it is transformed. None: 1.
        row: Multiplied with each transformed row; 0 where nothing is left of it. None: 1.
        max_deviation: Largest |row - 1|, where the rows are compared untransformed and are of length 1 up to the rounding of
            their type. None: they are not.
        row_error_gain: Largest length of a stored row after both scales: how much its rounding error grows.
        center_error_gain: Largest length of the center after both scales.
    """

    prenorm: Float[Tensor, " n"] | None = None
    row: Float[Tensor, " n"] | None = None
    max_deviation: float | None = None
    row_error_gain: float = MAX_UNIT_LENGTH
    center_error_gain: float = 0.0


class StoredRows:
    """The rows of one search.

    Attributes:
        vectors: [n, d], as given; on the device where it has room for them.
        device: Where rows are compared.
        geometry: How they are compared, on the device.
        penalty: Subtracted from each row's similarities, float64. None: nothing.
        memory_budget: Bytes of working memory for a search.
    """

    vectors: Float[Tensor, "n d"]
    device: torch.device
    geometry: RowGeometry
    penalty: Float[Tensor, " n"] | None
    memory_budget: int

    def __init__(
        self,
        vectors: Float[Tensor, "n d"] | np.ndarray,
        device: torch.device,
        geometry: RowGeometry,
        unit_length: bool | None,
        memory_budget: int | None,
        *,
        is_verified: bool,
    ) -> None:
        """Check the rows and place them on the device if it has room; see `VectorSearch`."""
        self.vectors = _place_on_device(_check_vectors(vectors), device)
        self.device = self.vectors.device if self.vectors.device.type == device.type else device
        self.memory_budget = working_memory(device) if memory_budget is None else memory_budget
        self.geometry = geometry.to(self.device)
        self._unit_length = unit_length
        if not is_verified:
            _ = self.scales
        self.penalty = self._hubness_penalty()

    def __len__(self) -> int:
        """Number of rows."""
        return self.vectors.shape[0]

    @property
    def d(self) -> int:
        """Width of the vectors."""
        return self.vectors.shape[1]

    @cached_property
    def scales(self) -> RowScales:
        """What brings the rows to length 1, from one pass over them."""
        return self._fit_scales(self._unit_length)

    @property
    def is_on_device(self) -> bool:
        """True where the vectors are on the device: on a CPU always, on a GPU if they fit."""
        return self.vectors.device == self.device

    @property
    def is_untransformed(self) -> bool:
        """True where similarities are products with rows as stored, up to a scale of each row."""
        return self.geometry.is_identity and self.penalty is None

    def chunks(self, rows: Chunk, bytes_per_row: int) -> list[Chunk]:
        """The same rows in chunks that take half the memory budget, at `bytes_per_row` each."""
        return split_chunk(rows, rows_per_chunk(bytes_per_row, self.memory_budget, self.device))

    def transformed(self, rows: slice | Int[Tensor, " rows"], dtype: torch.dtype) -> Float[Tensor, "rows d"]:
        """Some rows as they are compared, but for their length."""
        return self._transform(rows, dtype, self.scales.prenorm)

    def normalized(self, rows: slice | Int[Tensor, " rows"]) -> Float[Tensor, "rows d"]:
        """Some rows as they are compared, of length 1 (0 where nothing is left of a row), float32."""
        exact = self.transformed(rows, torch.float32 if self.geometry.is_identity else torch.float64)
        return (exact if self.scales.row is None else exact * self.scales.row[rows, None]).float()

    def on_device(self, chunks: list[Chunk]) -> Iterator[tuple[Chunk, Float[Tensor, "rows d"]]]:
        """Stored rows on the device, chunk by chunk; rows that are elsewhere are copied one chunk ahead."""
        if self.is_on_device:
            for chunk in chunks:
                yield chunk, self.vectors[chunk.rows]
            return
        stream = torch.cuda.Stream(self.device)

        def load(chunk: Chunk) -> Tensor:
            with torch.cuda.stream(stream):
                vectors = self.vectors[chunk.rows].pin_memory().to(self.device, non_blocking=True)
            stream.synchronize()
            return vectors

        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(load, chunks[0])
            for chunk, next_chunk in zip(chunks, [*chunks[1:], None], strict=True):
                vectors = coming.result()
                if next_chunk is not None:
                    coming = pool.submit(load, next_chunk)
                vectors.record_stream(torch.cuda.current_stream(self.device))
                yield chunk, vectors

    def _transform(
        self, rows: slice | Int[Tensor, " rows"], dtype: torch.dtype, prenorm: Float[Tensor, " n"] | None
    ) -> Float[Tensor, "rows d"]:
        vectors = self.vectors
        stored = vectors[rows] if isinstance(rows, slice) else vectors.index_select(0, rows.to(vectors.device))
        exact = stored.to(self.device).to(dtype)
        return self.geometry.rows(exact if prenorm is None else exact * prenorm[rows, None])

    def _fit_scales(self, unit_length: bool | None) -> RowScales:
        """The scales that bring the rows to length 1; see `VectorSearch`."""
        is_identity = self.geometry.is_identity
        if is_identity and unit_length:
            return RowScales()
        chunks = self.chunks(Chunk(0, len(self)), 32 * self.d) or [Chunk(0, 0)]
        stored_lengths = self._stored_lengths(chunks)
        _require_finite(stored_lengths)
        deviation = float((stored_lengths - 1).abs().max()) if len(self) else 0.0
        is_rounded_unit = deviation <= UNIT_LENGTH_TOLERANCE.get(self.vectors.dtype, _OTHER_LENGTH_TOLERANCE)
        if is_identity:
            scales = self.geometry.row_scales(stored_lengths, stored_lengths)
            gain = float((stored_lengths * scales).max()) if len(self) else 1.0
            max_deviation = float((scales - 1).abs().max()) if is_rounded_unit and len(self) else None
            return RowScales(None, scales, max_deviation, row_error_gain=gain)
        prenorm = None
        if unit_length is False or (unit_length is None and is_rounded_unit):
            prenorm = torch.where(stored_lengths > MIN_LENGTH, 1 / stored_lengths, 0.0)
            stored_lengths = stored_lengths * prenorm
        lengths = torch.cat([self._transform(chunk.rows, torch.float64, prenorm).norm(dim=-1) for chunk in chunks])
        if prenorm is not None:
            lengths = torch.where(prenorm > 0, lengths, 0.0)  # zeros have no direction, centered or not
            if is_rounded_unit:
                lengths[self._nothing_left(lengths, deviation)] = 0.0
        _require_finite(lengths)
        scales = self.geometry.row_scales(lengths, stored_lengths)
        center = self.geometry.affine.center
        return RowScales(
            prenorm,
            scales,
            row_error_gain=float((stored_lengths * scales).max()) if len(self) else 1.0,
            center_error_gain=float(scales.max()) * float(center.norm()) if len(self) and center is not None else 0.0,
        )

    def _nothing_left(self, lengths: Float[Tensor, " n"], deviation: float) -> Int[Tensor, " some"]:
        """Rows of which the transform leaves no more than rounding added to their lengths, and nothing as they are stored."""
        weight = self.geometry.affine.weight
        is_short = lengths <= 2 * deviation * (1.0 if weight is None else weight.max())
        nothing = [
            row_ids[self.geometry.leaves_nothing(self.vectors[row_ids.to(self.vectors.device)].to(self.device).double())]
            for row_ids in is_short.nonzero()[:, 0].split(max(1, self.memory_budget // (32 * self.d)))
        ]
        return torch.cat(nothing)

    def _stored_lengths(self, chunks: Iterable[Chunk]) -> Float[Tensor, " n"]:
        return torch.cat([self.vectors[chunk.rows].to(self.device).double().norm(dim=-1) for chunk in chunks])

    def _hubness_penalty(self) -> Float[Tensor, " n"] | None:
        hubs = self.geometry.hubs
        if hubs is None:
            return None
        penalty = torch.zeros(len(self), dtype=torch.float64, device=self.device)
        for chunk in with_progress(self.chunks(Chunk(0, len(self)), 64 * self.d + 16 * len(hubs.units)), len(self), "hubs"):
            penalty[chunk.rows] = hubs.penalty(self.normalized(chunk.rows), chunk.first)
        return penalty


def with_progress(chunks: Iterable[Chunk], n_rows: int, what: str) -> Iterator[Chunk]:
    """The chunks, with a progress bar in rows if they take more than five seconds."""
    options: dict[str, Any] = {"unit": " rows", "unit_scale": True, "delay": 5, "leave": False}
    with tqdm(total=n_rows, desc=what, **options) as bar:
        for chunk in chunks:
            yield chunk
            bar.update(len(chunk))


def _check_vectors(vectors: Tensor | np.ndarray) -> Float[Tensor, "n d"]:
    tensor = as_tensor(vectors)
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise InvalidInputError(f"got vectors of shape {tuple(tensor.shape)}; expected [n, d] floating-point")
    return tensor


def _place_on_device(vectors: Float[Tensor, "n d"], device: torch.device) -> Float[Tensor, "n d"]:
    return vectors.to(device) if vectors.device != device and has_room_for(vectors.nbytes, device) else vectors


def _require_finite(lengths: Float[Tensor, " n"]) -> None:
    if not bool(torch.isfinite(lengths).all()):
        row = int(torch.nonzero(~torch.isfinite(lengths))[0])
        raise InvalidInputError(f"vectors hold NaN or inf, first in row {row}; remove such rows before searching")
