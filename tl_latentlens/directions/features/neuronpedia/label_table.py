"""Labels as a plain table, for those who look at features elsewhere: in SAEDashboard, in SAELens, on Neuronpedia."""

from typing import Any

import pandas as pd

from tl_latentlens.directions.features.label_line import label_line
from tl_latentlens.directions.features.neuronpedia.names import SourceName
from tl_latentlens.directions.features.neuronpedia.server import BASE_URL


def label_table(table: pd.DataFrame, name: SourceName | None) -> pd.DataFrame:
    """One line a feature, texts and numbers only: what it is about, its scores, and its page on Neuronpedia.

    Args:
        table: The table of a `FeatureResult`.
        name: Model and source on Neuronpedia; None: neither ids nor links.
    """
    lines = [label_line(record) for record in table.to_dict("records")]
    columns: dict[str, Any] = {
        "feature": [line.feature for line in lines],
        "description": [line.name for line in lines],
        "kind": [line.kind for line in lines],
        "shares": [" · ".join(f"{text} {100 * share:.0f} %" for text, share in line.parts) for line in lines],
        "near": [", ".join(line.near) for line in lines],
        "words": [", ".join(line.words) for line in lines],
        "sentence": [line.sentence for line in lines],
        "why_not": table["why_not"].to_list(),
    }
    scores = table.select_dtypes("number").drop(columns="feature")
    columns |= {str(column): scores[column].to_numpy() for column in scores}
    if name is not None:
        columns |= {
            "modelId": [name.model_id] * len(lines),
            "layer": [name.source] * len(lines),
            "index": [str(line.feature) for line in lines],
            "neuronpedia": [f"{BASE_URL}/{name.model_id}/{name.source}/{line.feature}" for line in lines],
        }
    return pd.DataFrame(columns)


def source_of(sae: Any) -> SourceName | None:
    """The source on Neuronpedia that an SAE of SAELens names; None where it names none."""
    named = getattr(getattr(getattr(sae, "cfg", None), "metadata", None), "neuronpedia_id", None)
    if not isinstance(named, str) or named.count("/") != 1:
        return None
    return SourceName(*named.split("/"))
