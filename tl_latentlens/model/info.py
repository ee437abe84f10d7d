"""The description of a model that a bank stores: name, sizes, dtype, weight processing, vocabulary."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelInfo:
    """The model a bank was made with.

    Attributes:
        name: `cfg.model_name`.
        class_name: HookedTransformer, TransformerBridge, …
        n_layers, d_model, d_vocab, n_ctx: As in TransformerLens.
        dtype: Of the weights, for instance "float32".
        centered: True where center_writing_weights removed each residual vector's mean over d_model.
        tokenizer: sha256 over the vocabulary, hex.
    """

    name: str
    class_name: str
    n_layers: int
    d_model: int
    d_vocab: int
    n_ctx: int
    dtype: str
    centered: bool
    tokenizer: str
