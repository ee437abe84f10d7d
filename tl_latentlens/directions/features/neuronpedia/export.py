"""The methods by which a `FeatureResult` goes to Neuronpedia: into files, or through its API."""

from pathlib import Path
from typing import Any

import pandas as pd

from tl_latentlens.corpus.paths import absolute_path
from tl_latentlens.directions.features.activity import Activity
from tl_latentlens.directions.features.neuronpedia.files import write_bulk_files
from tl_latentlens.directions.features.neuronpedia.label_table import label_table, source_of
from tl_latentlens.directions.features.neuronpedia.names import SourceName
from tl_latentlens.directions.features.neuronpedia.records import BATCH_SIZE, FeatureRecords
from tl_latentlens.directions.features.neuronpedia.server import BASE_URL, NeuronpediaServer
from tl_latentlens.directions.features.neuronpedia.source_lines import METHOD, BulkSource
from tl_latentlens.directions.features.neuronpedia.upload import NeuronpediaUpload, require_batch_size, upload_features
from tl_latentlens.index.search_result import SearchResult
from tl_latentlens.views.files import output_path


class NeuronpediaExport:
    """Labelled features, with what Neuronpedia shows of them; `FeatureResult` has these attributes."""

    table: pd.DataFrame
    positive: SearchResult
    activity: Activity | None
    sae: Any
    model: Any
    places: Any

    def label_table(self, model_id: str = "", source: str = "") -> pd.DataFrame:
        """A plain table for SAEDashboard and SAELens: a line a feature with its label, scores, and page on Neuronpedia.

        Columns hold texts and numbers, no lists. `description`, `modelId`, `layer` and `index` are named as in Neuronpedia's
        explanations. Without ids the table has those that an SAE of SAELens names (`neuronpedia_id`), or no link.

        Raises:
            InvalidInputError: An id that Neuronpedia does not take.
        """
        return label_table(self.table, SourceName(model_id, source) if model_id or source else source_of(self.sae))

    def to_neuronpedia(
        self,
        folder: str | Path,
        *,
        model_id: str,
        source: str,
        release: str = "",
        creator: str = "",
        description: str = "",
        url: str = "",
        method: str = METHOD,
        contexts: int = 20,
        progress: bool = True,
    ) -> Path:
        """Write the files of a bulk import to Neuronpedia, and return their folder, `folder/model_id/source`.

        Release, creator, description, url and method are those of `BulkSource`; docs/features.md says what the files hold.

        Raises:
            InvalidInputError: An id that Neuronpedia does not take; or the result came from another process without its SAE.
        """
        named = BulkSource(SourceName(model_id, source), release, creator, description, url, method)
        return write_bulk_files(
            absolute_path(folder), named, self._neuronpedia_records(contexts, progress), self.positive.index
        )

    def upload_to_neuronpedia(
        self,
        model_id: str,
        source: str,
        *,
        state: str | Path,
        api_key: str | None = None,
        base_url: str = BASE_URL,
        method: str | None = None,
        contexts: int = 20,
        batch_size: int = BATCH_SIZE,
        progress: bool = True,
    ) -> NeuronpediaUpload:
        """Send the features to a source of yours on Neuronpedia (extra `neuronpedia`), and return what was sent.

        The file `state` remembers what was sent, so that a run that was stopped goes on. `api_key` is NEURONPEDIA_API_KEY where
        none is given; `method` names how the labels were made, where the server knows that name.

        Raises:
            InvalidInputError: An id, key or batch that the server does not take; or a server that stays without an answer.
            MissingExtraError: httpx is not installed.
        """
        require_batch_size(batch_size)
        name, settings = SourceName(model_id, source), {"method": method, "batch_size": batch_size, "progress": progress}
        with NeuronpediaServer(name, api_key, base_url) as server:
            path = output_path(absolute_path(state))
            return upload_features(self._neuronpedia_records(contexts, progress), name, server, path, **settings)

    def _neuronpedia_records(self, contexts: int, progress: bool) -> FeatureRecords:
        parts = {"sae": self.sae, "model": self.model, "contexts": contexts, "progress": progress}
        return FeatureRecords(self.table, self.places, self.positive.index, self.activity, **parts)
