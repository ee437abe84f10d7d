"""The bulk files of Neuronpedia: one folder for each source, as its own tools write and import it."""

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tl_latentlens.directions.features.neuronpedia.records import ActivationRecord, FeatureRecord, FeatureRecords
from tl_latentlens.directions.features.neuronpedia.source_lines import BulkSource
from tl_latentlens.errors import InvalidInputError
from tl_latentlens.index.search_result import SearchedIndex

_TOP_INTERVAL = -1  # In place of an interval of activations: the largest of all.
_EMPTY_COLUMNS = (
    "vector topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 "
    "correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1 correlated_features_indices "
    "correlated_features_pearson correlated_features_l1 freq_hist_data_bar_heights freq_hist_data_bar_values "
    "logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist"
).split()


def write_bulk_files(folder: Path, source: BulkSource, records: FeatureRecords, index: SearchedIndex) -> Path:
    """Write the source's folder, `folder/model_id/source`, in place of the batches that are there, and return its path.

    Args:
        folder: Made where there is none.
        source: Model and source, and how they are described.
        records: The features.
        index: The rows by which they were labelled.

    Raises:
        InvalidInputError: A file stands where a folder should be.
    """
    path = folder / source.name.model_id / source.name.source
    for kind in ("features", "activations", "explanations"):
        _empty_folder(path / kind)
    now = datetime.now(timezone.utc).isoformat()
    for name, lines in source.lines(now, index).items():
        (path / f"{name}.jsonl").write_bytes(_json_lines(lines))
    for number, batch in enumerate(records):
        lines = {
            "features": [_feature_line(source, record, now) for record in batch],
            "activations": [line for record in batch for line in _activation_lines(source, record, now)],
            "explanations": [line for record in batch for line in _explanation_lines(source, record, now)],
        }
        for kind, kind_lines in lines.items():
            if kind_lines:  # Neuronpedia's import reads the columns off the first line.
                packed = gzip.compress(_json_lines(kind_lines), compresslevel=5, mtime=0)
                (path / kind / f"batch-{number}.jsonl.gz").write_bytes(packed)
    return path


def _place(source: BulkSource, record: FeatureRecord) -> dict[str, str]:
    return {"modelId": source.name.model_id, "layer": source.name.source, "index": str(record.feature)}


def _feature_line(source: BulkSource, record: FeatureRecord, now: str) -> dict[str, Any]:
    return {
        **_place(source, record),
        "creatorId": source.creator_id,
        "createdAt": now,
        "maxActApprox": record.max_activation,
        "hasVector": False,
        "vectorLabel": None,
        "vectorDefaultSteerStrength": record.max_activation,
        "hookName": None,
        **{name: [] for name in _EMPTY_COLUMNS},
        "neg_str": [token for token, _ in record.bottom_logits],
        "neg_values": [value for _, value in record.bottom_logits],
        "pos_str": [token for token, _ in record.top_logits],
        "pos_values": [value for _, value in record.top_logits],
        "frac_nonzero": -1 if record.density is None else record.density,  # -1 is what its API writes for unknown.
        "sourceSetName": source.name.source_set,
    }


def _activation_lines(source: BulkSource, record: FeatureRecord, now: str) -> Iterator[dict[str, Any]]:
    for activation in record.activations:
        largest = max(activation.values)
        line = {
            **_place(source, record),
            "tokens": activation.tokens,
            "maxValue": largest,
            "maxValueTokenIndex": activation.values.index(largest),
            "minValue": min(activation.values),
            "values": activation.values,
            "dataSource": None,
            "dataIndex": None,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
            **_interval(record, activation),
            "qualifyingTokenIndex": activation.at,
            "zIndices": None,
            "zValues": None,
        }
        identity = *_place(source, record).values(), activation.tokens, activation.at, largest, sum(activation.values)
        yield {"id": _row_id(identity), "creatorId": source.creator_id, "createdAt": now, **line}


def _explanation_lines(source: BulkSource, record: FeatureRecord, now: str) -> Iterator[dict[str, Any]]:
    for text, method in ((record.sentence, source.sentence_method), (record.label, source.method)):
        if not text:
            continue
        line = {
            **_place(source, record),
            "description": text,
            "embedding": None,
            "triggeredById": None,
            "typeName": method,
            "explanationModelName": None,
            "notes": None,
        }
        yield {"id": _row_id(tuple(line.values())), "authorId": source.creator_id, "createdAt": now, **line}


def _interval(record: FeatureRecord, activation: ActivationRecord) -> dict[str, float]:
    low, high, share = activation.interval or (_TOP_INTERVAL, record.max_activation, _TOP_INTERVAL)
    return {"binMin": low, "binMax": high, "binContains": share}


def _empty_folder(folder: Path) -> None:
    """Make a folder, and take away the batches of an earlier export, which may have had more of them."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InvalidInputError(f"cannot write {folder}: a file stands in the way; give another folder") from error
    for path in folder.glob("batch-*.jsonl.gz"):
        path.unlink()


def _row_id(identity: tuple[Any, ...]) -> str:
    """An id like Neuronpedia's own. Equal content has the same, so that files imported twice make no second rows."""
    return "c" + hashlib.sha256(repr(identity).encode()).hexdigest()[:24]


def _json_lines(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines).encode()
