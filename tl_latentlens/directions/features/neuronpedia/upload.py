"""The upload of features to Neuronpedia in batches: what was sent is remembered, so that it goes on where it stopped.

A batch is stored by the server as a whole or not at all. Features that are sent twice would get each activation and explanation
twice, so a batch whose fate is not known, after a kill or a broken connection, is looked up before it is sent again.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from tl_latentlens.directions.features.neuronpedia.names import SourceName
from tl_latentlens.directions.features.neuronpedia.records import BATCH_SIZE, ActivationRecord, FeatureRecord, FeatureRecords
from tl_latentlens.directions.features.neuronpedia.server import NeuronpediaServer, TryAgainError
from tl_latentlens.endpoint.keyed_lines import LineKind, LineWriter, StoredLines, append_lines
from tl_latentlens.endpoint.retry import backoff
from tl_latentlens.errors import InvalidInputError

_SENT = LineKind("a line of an upload to Neuronpedia", ("state", "batch", "place"))
_SENDING, _DONE = "sending", "done"
_ATTEMPTS = 6
_LAST_ADVICE = (
    "try again later: what was sent is remembered. If it stays, see that the source set exists and is yours, and that the "
    "server knows the method"
)
_MAX_BYTES = 4_000_000  # Of a request: the host of neuronpedia.org takes 4.5 MB.


@dataclass(frozen=True)
class NeuronpediaUpload:
    """What an upload did.

    Attributes:
        url: The page of the source.
        uploaded: Number of features that are there now and were not known to be before.
        already: Number of features that an earlier run had uploaded.
        skipped: Features without an activation on the bank, which Neuronpedia does not take.
    """

    url: str
    uploaded: int
    already: int
    skipped: list[int] = field(repr=False)

    def __str__(self) -> str:
        skipped = f", {len(self.skipped):,} skipped, which are never active" if self.skipped else ""
        return f"{self.uploaded:,} features uploaded, {self.already:,} were there{skipped}: {self.url}"


@dataclass(frozen=True)
class _Feature:
    """A feature to send: its key in the file, where it goes, and its part of a request."""

    key: str
    place: str
    payload: dict[str, Any]
    n_bytes: int


def upload_features(
    records: FeatureRecords,
    name: SourceName,
    server: NeuronpediaServer,
    state: Path,
    *,
    method: str | None,
    batch_size: int,
    progress: bool,
) -> NeuronpediaUpload:
    """Send the features that the file does not know as sent.

    Args:
        records: The features.
        name: Model and source.
        server: Where they go.
        state: The file that remembers what was sent; made where there is none.
        method: The name of the way in which labels were made, where the server knows it; None: none is named.
        batch_size: Features of a request, at most 128.
        progress: Show a progress bar.

    Raises:
        InvalidInputError: The server refuses the key or a batch, or a request stays without success; a feature was sent with
            other content; or the file is another one, or is being written by another process. What was sent is remembered.
    """
    n_uploaded, n_already, skipped = 0, 0, []
    with append_lines(state, _SENT) as (writer, stored):
        run = _UploadRun(server, writer, stored)
        with tqdm(total=records.n_features, desc="uploading", unit=" features", disable=not progress) as bar:
            for batch in records:
                features = [_feature(record, name, server.base_url, method) for record in batch if record.activations]
                skipped += [record.feature for record in batch if not record.activations]
                new = run.new_of(features)
                for part in _parts(run.settle(new), batch_size):
                    run.send(part, bar)
                n_uploaded += len(new)
                n_already += len(features) - len(new)
                bar.update(len(batch))
    return NeuronpediaUpload(f"{server.base_url}/{name.model_id}/{name.source}", n_uploaded, n_already, skipped)


class _UploadRun:
    """The requests of one run."""

    def __init__(self, server: NeuronpediaServer, writer: LineWriter, stored: StoredLines) -> None:
        self._server, self._writer, self._stored = server, writer, stored.by_key
        self._key_at = {line["place"]: key for key, line in stored.by_key.items()}

    def new_of(self, features: list[_Feature]) -> list[_Feature]:
        """The features that are not known to be there.

        Raises:
            InvalidInputError: One was sent with other content.
        """
        changed = [one.payload["index"] for one in features if self._key_at.get(one.place, one.key) != one.key]
        if changed:
            raise InvalidInputError(
                f"{len(changed)} features, first {changed[:5]}, were sent before with other labels or contexts: Neuronpedia "
                "would keep both. To add these all the same, give another state file"
            )
        return [one for one in features if self._stored.get(one.key, {}).get("state") != _DONE]

    def settle(self, features: list[_Feature]) -> list[_Feature]:
        """The features that are still to be sent. Those are looked up whose batch an earlier run did not see to its end."""
        arrived: dict[str, bool] = {}
        there, left = [], []
        for feature in features:
            batch = self._stored.get(feature.key, {}).get("batch", "")
            if batch and batch not in arrived:
                arrived[batch] = self._until_success(lambda one=feature: self._server.has(one.payload))
            (there if arrived.get(batch) else left).append(feature)
        self._remember(there, _DONE, "")
        return left

    def send(self, features: list[_Feature], bar: Any) -> None:
        """Send one batch, until the server has it."""
        batch = hashlib.sha256("".join(feature.key for feature in features).encode()).hexdigest()[:16]
        self._remember(features, _SENDING, batch)
        payloads = [feature.payload for feature in features]
        may_have_arrived = False

        def attempt() -> bool:
            nonlocal may_have_arrived
            if may_have_arrived and self._server.has(payloads[0]):
                return True
            try:
                self._server.upload(payloads)
            except TryAgainError as error:
                may_have_arrived |= error.may_have_arrived
                raise
            return True

        self._until_success(attempt, bar)
        self._remember(features, _DONE, batch)

    def _until_success(self, attempt: Callable[[], bool], bar: Any = None) -> bool:
        """What an attempt gives, tried again as long as there is hope."""
        for number in range(_ATTEMPTS):
            try:
                return attempt()
            except TryAgainError as error:
                if number + 1 == _ATTEMPTS:
                    raise InvalidInputError(f"{error.problem}, {_ATTEMPTS} times; {_LAST_ADVICE}") from error
                wait = backoff(number) if error.wait is None else error.wait
                if bar is not None:
                    bar.set_postfix_str(f"again in {wait:.0f} s")
                time.sleep(wait)
        raise AssertionError("an attempt succeeds, or raises")

    def _remember(self, features: list[_Feature], state: str, batch: str) -> None:
        self._writer.append_all({one.key: {"state": state, "batch": batch, "place": one.place} for one in features})


def _feature(record: FeatureRecord, name: SourceName, base_url: str, method: str | None) -> _Feature:
    label = {"text": record.label} | ({} if method is None else {"methodName": method})
    payload: dict[str, Any] = {
        "index": record.feature,
        "topLogits": [{"token": token, "value": value} for token, value in record.top_logits],
        "bottomLogits": [{"token": token, "value": value} for token, value in record.bottom_logits],
        "explanations": [one for one in ({"text": record.sentence}, label) if one["text"]],
        "activations": [_activation(one) for one in record.activations],
    }
    if record.density is not None:
        payload["density"] = record.density
    content = json.dumps(payload, sort_keys=True, ensure_ascii=False).encode()
    place = f"{base_url}/{name.model_id}/{name.source}/{record.feature}"
    return _Feature(hashlib.sha256(place.encode() + b" " + content).hexdigest(), place, payload, len(content))


def _activation(record: ActivationRecord) -> dict[str, Any]:
    interval = dict(zip(("quantileMin", "quantileMax", "quantileFraction"), record.interval or (), strict=False))
    return {"tokens": record.tokens, "values": record.values, **interval}


def _parts(features: list[_Feature], batch_size: int) -> Iterator[list[_Feature]]:
    """The features in batches that are neither too many nor too large."""
    part: list[_Feature] = []
    for feature in features:
        if part and (len(part) == batch_size or sum(one.n_bytes for one in part) + feature.n_bytes > _MAX_BYTES):
            yield part
            part = []
        part.append(feature)
    if part:
        yield part


def require_batch_size(batch_size: int) -> None:
    """Check the number of features of a request.

    Raises:
        InvalidInputError: It is not between 1 and 128.
    """
    if not 1 <= batch_size <= BATCH_SIZE:
        raise InvalidInputError(f"got batch_size={batch_size}; Neuronpedia takes 1 to {BATCH_SIZE} features at once")
