"""Runs of the model on a word and on the rows to compare it with; the contributions of heads and neurons from them."""

import re
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from tl_latentlens.directions.find.component_outputs import (
    ComponentOutputs,
    OutputWeights,
    output_weights,
    record_component_outputs,
)
from tl_latentlens.directions.find.component_ranking import Contributions, RankedComponents, rank_components
from tl_latentlens.directions.find.other_meanings import other_meanings, unlike_the_word
from tl_latentlens.directions.find.word_in_context import WordInContext, locate_word
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.contextual import ContextualIndex, require_index
from tl_latentlens.model.describe import require_model
from tl_latentlens.model.layers import one_hook_name
from tl_latentlens.search.ambient import own_arithmetic

_MAX_RUNS = 64  # Prompts with contrast uses, and prompts with random rows.


@dataclass(frozen=True, eq=False)
class ComponentRuns:
    """Outputs of heads and neurons at a word (place 0), then at its contrast uses, then at random rows.

    Attributes:
        word: The word.
        weights: The weights of the components.
        outputs: Their activations at all of these places.
        others: The meanings of other words (`other_meanings`).
    """

    word: WordInContext
    weights: OutputWeights
    outputs: ComponentOutputs
    others: Float[Tensor, "meanings d_model"]

    @property
    def usual_places(self) -> slice:
        """The places whose mean is the usual output: contrast uses, or random rows where these are too few."""
        return self._contrast_places if self.word.has_contrast else self._random_places

    @property
    def _contrast_places(self) -> slice:
        return slice(1, 1 + len(self.word.contrast_rows))

    @property
    def _random_places(self) -> slice:
        return slice(1 + len(self.word.contrast_rows), None)

    def rank_heads(self, top_k: int) -> RankedComponents:
        """The heads with the largest shares; their places count through layers and heads."""
        others = unlike_the_word(self.others, self.word)
        along_others = self.weights.largest_of_heads(self.excess(self.outputs.z), others)
        return self._rank(self.head_projections(), along_others, top_k)

    def rank_neurons(self, top_k: int) -> RankedComponents:
        """The neurons with the largest shares; their places count through layers and neurons."""
        others = unlike_the_word(self.others, self.word)
        along_others = self.weights.largest_of_neurons(self.excess(self.outputs.post), others)
        return self._rank(self.neuron_projections(), along_others, top_k)

    def _rank(
        self, projections: Float[Tensor, "places ..."], along_others: Float[Tensor, " meanings"], top_k: int
    ) -> RankedComponents:
        values = projections.flatten(1).numpy()
        at_contrast, at_random = values[self._contrast_places], values[self._random_places]
        contributions = Contributions(values[0], at_contrast, at_random, along_others.numpy())
        return rank_components(contributions, self.word, self._excess(self._activation_projections), top_k)

    def excess(self, of_places: Float[Tensor, "layers places ..."]) -> Float[Tensor, "layers ..."]:
        """What components do at the word less what they usually do."""
        return of_places[:, 0] - of_places[:, self.usual_places].mean(1)

    def head_projections(self) -> Float[Tensor, "places layers head"]:
        """The output of each head, projected on the meaning's direction."""
        return self.weights.heads(self.outputs, self.word.direction)

    def neuron_projections(self) -> Float[Tensor, "places layers d_mlp"]:
        """The output of each neuron, projected on the meaning's direction."""
        return self.weights.neurons(self.outputs, self.word.direction)

    def parts(self) -> dict[str, float]:
        """The shares of all heads, of all neurons, and of the embedding, which has the rest."""
        total = self._excess(self._activation_projections)
        projections = {"heads": self.head_projections(), "neurons": self.neuron_projections()}
        shares = {kind: self._excess(values.flatten(1).sum(1)) / total for kind, values in projections.items()}
        return {**shares, "embedding": 1 - sum(shares.values())}

    @property
    def _activation_projections(self) -> Float[Tensor, " places"]:
        with own_arithmetic(full_products=True):
            return self.outputs.activation @ self.word.direction

    def _excess(self, values: Float[Tensor, " places"]) -> float:
        """The value at the word minus the usual value, the mean over `usual_places`."""
        return float(values[0] - values[self.usual_places].mean())


def run_components(
    text: str, at: int | str, index: ContextualIndex, model: Any, hook_name: int | str | None, seed: int
) -> ComponentRuns:
    """The outputs of heads and neurons at a word and at the rows to compare it with.

    Raises:
        InvalidInputError: As `locate_word`; an activation outside the residual stream; a model without the weights of heads or
            neurons; components that do not add up to the activation.
    """
    require_index(index)
    require_model(model)
    read_hook = _default_hook_name(index) if hook_name is None else one_hook_name(hook_name, index.model_info.n_layers)
    weights = output_weights(model, read_hook)  # It refuses what cannot be parted into components before the model runs.
    word = locate_word(text, at, index, model, read_hook, _MAX_RUNS, seed)
    rows = [index.row(row) for row in [*word.contrast_rows.tolist(), *word.random_rows.tolist()]]
    prompts = [row.bank.prompt(row.prompt_index)[: row.position + 1] for row in rows]
    outputs = record_component_outputs(model, [word.tokens, *prompts], read_hook)
    weights.require_sum(outputs, read_hook)
    return ComponentRuns(word, weights, outputs, other_meanings(word, index, seed))


def stack_rows(weights: list[Float[Tensor, "n ..."]], layers: list[int], places: list[int]) -> Float[Tensor, "top ..."]:
    """One row of a layer's weight for each pair of layer and place, float32 on the CPU."""
    return torch.stack([weights[layer][place].float().cpu() for layer, place in zip(layers, places, strict=True)])


def _default_hook_name(index: ContextualIndex) -> str:
    """The index's resid_post nearest to two thirds of the layers: late enough for context, too early for the next token."""
    layers = {int(name.split(".")[1]): name for name in index.hook_names if re.fullmatch(r"blocks\.\d+\.hook_resid_post", name)}
    if not layers:
        raise InvalidInputError(f"the index has no resid_post, only {list(index.hook_names)}; pass hook_name=")
    return layers[min(layers, key=lambda layer: abs(layer - 2 / 3 * (index.model_info.n_layers - 1)))]
