"""A source as Neuronpedia describes it: the lines of the files beside the batches."""

from dataclasses import dataclass
from typing import Any

from tl_latentlens.directions.features.neuronpedia.names import SourceName
from tl_latentlens.index.search_result import SearchedIndex

METHOD = "latentlens"
DEFAULT_CREATOR = "clkht01d40000jv08hvalcvly"  # Neuronpedia's own tools write this user where none is given.

_LABELS = "Labels by the contextual tokens that activate a feature, without a language model."
_SENTENCES = "Sentences by a language model that tell held-out contexts apart better than such a label."


@dataclass(frozen=True)
class BulkSource:
    """A source, its set and its release.

    Attributes:
        name: Model and source.
        release: Name of the release that the source set belongs to; empty: the source set's own.
        creator: Who is named as the creator of release and source set.
        description: A line on the source set and the release.
        url: A page on them; empty: none.
        method: The name of the way in which the explanations were made.
        creator_id: The user of Neuronpedia to whom all of it belongs.
    """

    name: SourceName
    release: str = ""
    creator: str = ""
    description: str = ""
    url: str = ""
    method: str = METHOD
    creator_id: str = DEFAULT_CREATOR

    @property
    def sentence_method(self) -> str:
        """The name of the way in which the sentences of a language model were made."""
        return f"{self.method}-sentence"

    def lines(self, now: str, index: SearchedIndex) -> dict[str, list[dict[str, Any]]]:
        """The lines of each file beside the batches, by the file's name.

        Args:
            now: The time, in ISO 8601.
            index: The rows by which the features were labelled.
        """
        return {
            "release": [self._release_line(now)],
            "model": [self._model_line(now, index)],
            "sourceset": [self._source_set_line(now)],
            "source": [self._source_line(now, index)],
            "explanation_type": [
                self._explanation_type_line(name, description, now)
                for name, description in ((self.method, _LABELS), (self.sentence_method, _SENTENCES))
            ],
        }

    @property
    def _by(self) -> dict[str, str | None]:
        return {"creatorName": self.creator, "creatorId": self.creator_id, "creatorEmail": None}

    @property
    def _urls(self) -> list[str]:
        return [self.url] if self.url else []

    @property
    def _release(self) -> str:
        return self.release or self.name.source_set

    def _release_line(self, now: str) -> dict[str, Any]:
        return {
            "name": self._release,
            "description": self.description or self._release,
            **self._by,
            "createdAt": now,
            "visibility": "PUBLIC",
            "isNewUi": False,
            "featured": False,
            "descriptionShort": self.description or self._release,
            "urls": self._urls,
            "creatorNameShort": self.creator,
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "defaultUmapSourceIds": [],
        }

    def _model_line(self, now: str, index: SearchedIndex) -> dict[str, Any]:
        return {
            "id": self.name.model_id,
            "instruct": False,
            "creatorId": self.creator_id,
            "displayNameShort": self.name.model_id,
            "displayName": self.name.model_id,
            "tlensId": None,
            "dimension": index.model_info.d_model,
            "visibility": "PUBLIC",
            "defaultSourceSetName": None,
            "defaultSourceId": None,
            "inferenceEnabled": False,
            "layers": index.model_info.n_layers,
            "neuronsPerLayer": 0,
            "createdAt": now,
            "owner": "",
            "updatedAt": now,
            "website": None,
        }

    def _source_set_line(self, now: str) -> dict[str, Any]:
        return {
            "modelId": self.name.model_id,
            "name": self.name.source_set,
            **self._by,
            "createdAt": now,
            "hasDashboards": True,
            "visibility": "PUBLIC",
            "description": self.description or self.name.source_set,
            "type": "",
            "urls": self._urls,
            "releaseName": self._release,
            "defaultOfModelId": None,
            "defaultRange": 1,
            "defaultShowBreaks": True,
            "showDfa": False,
            "showCorrelated": False,
            "showHeadAttribution": False,
            "showUmap": False,
        }

    def _source_line(self, now: str, index: SearchedIndex) -> dict[str, Any]:
        return {
            "id": self.name.source,
            "modelId": self.name.model_id,
            "setName": self.name.source_set,
            "creatorId": self.creator_id,
            "hasDashboards": True,
            "inferenceEnabled": False,
            "inferenceHosts": [],
            "saelensConfig": None,
            "saelensRelease": None,
            "saelensSaeId": None,
            "hfRepoId": None,
            "hfFolderId": None,
            "visibility": "PUBLIC",
            "defaultOfModelId": None,
            "hasUmap": False,
            "hasUmapLogSparsity": False,
            "hasUmapClusters": False,
            "num_prompts": sum(bank.plan.n_prompts for _, bank in index.bank_rows.by_plan),
            "num_tokens_in_prompt": None,
            "dataset": None,
            "notes": None,
            "createdAt": now,
        }

    def _explanation_type_line(self, name: str, description: str, now: str) -> dict[str, Any]:
        return {
            "name": name,
            "displayName": name,
            "description": description,
            "featured": True,
            "isAttention": False,
            "url": None,
            "creatorName": self.creator,
            "creatorId": self.creator_id,
            "createdAt": now,
            "updatedAt": now,
        }
