"""The ids by which Neuronpedia knows a model and a source, checked before anything is computed."""

import re
from dataclasses import dataclass

from tl_latentlens.errors import InvalidInputError

_MODEL = re.compile(r"[a-z0-9](?:[a-z0-9._-]*[a-z0-9])?")
_SOURCE = re.compile(r"(?:\d+|e)-([a-z0-9](?:[a-z0-9._-]*[a-z0-9])?)")
_SUFFIX = "__"  # Parts the name of a source set from what tells its sources of one layer apart.


@dataclass(frozen=True)
class SourceName:
    """A source of Neuronpedia: the features of one SAE.

    Attributes:
        model_id: The model's id, such as "gpt2-small".
        source: Layer and source set, such as "5-name-res-16k"; "e-name" for the embedding.
    """

    model_id: str
    source: str

    def __post_init__(self) -> None:
        if not isinstance(self.model_id, str) or _MODEL.fullmatch(self.model_id) is None:
            raise InvalidInputError(
                f"got model_id={self.model_id!r}; expected the id that Neuronpedia has for the model, in lower case, such as "
                '"gpt2-small": it stands in the addresses of its pages'
            )
        if not isinstance(self.source, str) or _SOURCE.fullmatch(self.source) is None:
            raise InvalidInputError(
                f"got source={self.source!r}; expected the layer, a hyphen and the name of the source set, in lower case, such "
                'as "5-name-res-16k"'
            )

    @property
    def source_set(self) -> str:
        """The name of the source set: "name-res-16k" of "5-name-res-16k"."""
        return self.source.split("-", 1)[1].split(_SUFFIX)[0]
