"""The schema of Neuronpedia, as its web app and its utilities have it: fields of the bulk files, limits of a batch."""

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

FIELDS = {
    "release": "name description creatorName creatorId visibility isNewUi featured descriptionShort urls creatorEmail "
    "creatorNameShort defaultSourceSetName defaultSourceId defaultUmapSourceIds createdAt",
    "model": "id instruct creatorId displayNameShort displayName tlensId dimension visibility defaultSourceSetName "
    "defaultSourceId inferenceEnabled layers neuronsPerLayer createdAt owner updatedAt website",
    "sourceset": "modelId name creatorId hasDashboards visibility description type creatorName urls creatorEmail releaseName "
    "defaultOfModelId defaultRange defaultShowBreaks showDfa showCorrelated showHeadAttribution showUmap createdAt",
    "source": "id modelId setName creatorId hasDashboards inferenceEnabled inferenceHosts saelensConfig saelensRelease "
    "saelensSaeId hfRepoId hfFolderId visibility defaultOfModelId hasUmap hasUmapLogSparsity hasUmapClusters num_prompts "
    "num_tokens_in_prompt dataset notes createdAt",
    "features": "modelId layer index creatorId createdAt maxActApprox hasVector vector vectorLabel vectorDefaultSteerStrength "
    "hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 "
    "correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices "
    "correlated_features_pearson correlated_features_l1 neg_str neg_values pos_str pos_values frac_nonzero "
    "freq_hist_data_bar_heights freq_hist_data_bar_values logits_hist_data_bar_heights logits_hist_data_bar_values "
    "decoder_weights_dist sourceSetName",
    "activations": "id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource dataIndex "
    "dfaValues dfaTargetIndex dfaMaxValue createdAt lossValues logitContributions binMin binMax binContains "
    "qualifyingTokenIndex zIndices zValues",
    "explanations": "id modelId layer index description authorId embedding triggeredById typeName explanationModelName notes "
    "createdAt",
}


def read_bulk(source: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of each kind of file of a source, checked against the fields of Neuronpedia."""
    found = {name: _lines((source / f"{name}.jsonl").read_bytes()) for name in ("release", "model", "sourceset", "source")}
    for kind in ("features", "activations", "explanations"):
        paths = sorted((source / kind).iterdir(), key=lambda path: int(re.findall(r"\d+", path.name)[0]))
        assert all(re.fullmatch(r"batch-\d+\.jsonl\.gz", path.name) for path in paths)
        found[kind] = [line for path in paths for line in _lines(gzip.decompress(path.read_bytes()))]
    for kind, lines in found.items():
        assert all(set(line) == set(FIELDS[kind].split()) for line in lines), kind
    for line in found["features"]:
        assert len(line["pos_str"]) == len(line["pos_values"]) <= 20
        assert len(line["neg_str"]) == len(line["neg_values"]) <= 20
        assert line["frac_nonzero"] == -1 or 0 <= line["frac_nonzero"] <= 1
    for line in found["activations"]:
        check_tokens(line["tokens"], line["values"])
        assert line["maxValue"] == max(line["values"]) == line["values"][line["maxValueTokenIndex"]]
        assert line["minValue"] == min(line["values"])
    assert all(1 <= len(line["description"]) <= 512 for line in found["explanations"])
    ids = [line["id"] for kind in ("activations", "explanations") for line in found[kind]]
    assert all(re.fullmatch(r"c[a-z0-9]{24}", one) for one in ids)
    return found


def _lines(content: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in content.decode().splitlines()]


def check_tokens(tokens: list[str], values: list[float]) -> None:
    """What Neuronpedia and its database ask of the tokens and values of an activation."""
    assert 1 <= len(tokens) == len(values) <= 1024
    assert all(token and "\0" not in token for token in tokens)
    assert all(math.isfinite(value) for value in values)
