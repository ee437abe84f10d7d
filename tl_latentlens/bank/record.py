"""Hooks that fill a bank: gather a batch's rows from each activation, on the device, and hand them to the writer."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.bank.batches import Batch
from tl_latentlens.model.flatten import flat_activation
from tl_latentlens.search.ambient import own_arithmetic
from tl_latentlens.search.tensors import DTYPES


@runtime_checkable
class RowReceiver(Protocol):
    """What takes the rows of batches: a `BankWriter`, or one that only looks at them."""

    @property
    def hook_names(self) -> tuple[str, ...]:
        """The activations that it takes."""
        ...

    @property
    def dtype(self) -> str:
        """The dtype in which it takes their vectors."""
        ...

    def write(self, hook_name: str, batch: Batch, vectors: Float[Tensor, "rows d"], norms: Float[Tensor, " rows"]) -> None:
        """Take the rows of a batch; see `BankWriter.write`."""
        ...


def bank_hooks(writer: RowReceiver, batch: Batch) -> list[tuple[str, Callable[..., None]]]:
    """Forward hooks that record a batch into a bank, for `run_with_hooks(batch.tokens, fwd_hooks=...)`.

    Args:
        writer: An open `BankWriter`.
        batch: The batch that the model is about to run, from `writer.batches()`.
    """
    return [(name, _recorder(writer, batch, name)) for name in writer.hook_names]


def _recorder(writer: RowReceiver, batch: Batch, name: str) -> Callable[..., None]:
    @own_arithmetic()
    def record(activation: Tensor, hook: Any) -> None:
        vectors = flat_activation(name, activation, batch.tokens.shape)
        places = (batch.row_batch * batch.tokens.shape[1] + batch.row_pos).to(vectors.device)
        rows = vectors.flatten(0, 1).index_select(0, places).float()
        # The division is in float32, because activations of some models are past float16's range. Squares are summed in
        # float64, where those of any float32 fit.
        norms = torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float64).float()
        writer.write(name, batch, (rows / norms[:, None]).to(DTYPES[writer.dtype]), norms)

    return record
