"""The description of a model that a bank stores: name, sizes, dtype, weight processing, vocabulary."""

from dataclasses import dataclass, field


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
        source: What to load it by again: "demo", a name on the hub, an absolute folder or GGUF file; empty where that is not
            known. The same model may be loaded from several places, so this is left out of every comparison.
        quantization: The types of the weights in the GGUF file that it was read from, that of the most weights first, for
            instance "Q4_1, Q8_0, F32"; empty for other models.
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
    source: str = field(default="", compare=False)
    quantization: str = ""

    @property
    def kind(self) -> str | None:
        """The `kind` that `load_model` takes for its class; None for a class that `load_model` does not make."""
        kinds = {"HookedTransformer": "hooked", "HookedSAETransformer": "hooked"}
        return kinds.get(self.class_name, "bridge" if self.class_name.endswith("Bridge") else None)
