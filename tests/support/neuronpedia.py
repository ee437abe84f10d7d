"""Neuronpedia as its web app and its utilities have it: the fields of its bulk files, and a server that checks each batch."""

import gzip
import json
import math
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

KEY = "sk-np-test"
FAILURES = ["429", "500", "502", "drop", "drop after storing", "500 after storing", "html", "slow after storing"]

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


def check_batch(body: dict[str, Any]) -> None:
    """What the route `upload-batch` asks of a request."""
    assert set(body) == {"modelId", "source", "features"}
    assert body["modelId"] == body["modelId"].lower()
    assert body["source"] == body["source"].lower()
    assert 1 <= len(body["features"]) <= 128
    assert len({feature["index"] for feature in body["features"]}) == len(body["features"])
    for feature in body["features"]:
        assert set(feature) <= {"index", "density", "topLogits", "bottomLogits", "explanations", "activations"}
        assert type(feature["index"]) is int
        assert 0 <= feature["index"] <= 10_000_000
        assert 0 <= feature.get("density", 0) <= 1
        for logit in (*feature["topLogits"], *feature["bottomLogits"]):
            assert set(logit) == {"token", "value"}
            assert logit["token"]
            assert math.isfinite(logit["value"])
        assert max(len(feature["topLogits"]), len(feature["bottomLogits"])) <= 20
        for explanation in feature["explanations"]:
            assert set(explanation) <= {"text", "methodName", "modelName"}
            assert 1 <= len(explanation["text"].encode("utf-16-le")) // 2 <= 512
        assert feature["activations"]
        for activation in feature["activations"]:
            assert set(activation) <= {"tokens", "values", "quantileMax", "quantileMin", "quantileFraction"}
            check_tokens(activation["tokens"], activation["values"])


class NeuronpediaStub:
    """A server of Neuronpedia. A batch is stored as a whole: features once, their activations and explanations each time.

    `plan(number)` names what happens to the request of that number: "ok", a status, or one of `FAILURES`. `problems` has every
    request that the real server would not have taken.
    """

    def __init__(self) -> None:
        self.plan: Callable[[int], str] = lambda number: "ok"
        self.stored: dict[str, dict[str, Any]] = {}
        self.times_stored: Counter[int] = Counter()
        self.problems: list[str] = []
        self.happened: list[str] = []
        self.headers: dict[str, str] = {}
        self.lookups, self.max_bytes, self.slow = 0, 4_500_000, 2.0
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_POST(self) -> None:
                stub.post(self, self.rfile.read(int(self.headers["Content-Length"])))

            def do_GET(self) -> None:
                stub.get(self)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def post(self, handler: Any, content: bytes) -> None:
        with self._lock:
            what = self.plan(len(self.happened))
            self.happened.append(what)
            if handler.headers["x-api-key"] != KEY:
                return _send(handler, 401, {"error": "This endpoint requires authorization."})
            if len(content) > self.max_bytes:
                return _send(handler, 413, b"Request Entity Too Large")
            try:
                body = json.loads(content)
                check_batch(body)
                assert handler.path == "/api/feature/upload-batch"
            except (AssertionError, ValueError) as error:
                self.problems.append(repr(error))
                return _send(handler, 400, {"error": "not as in the schema", "path": "features[0]"})
            if what == "ok" or what.endswith("after storing"):
                self._store(body)
        if what.startswith("slow"):
            time.sleep(self.slow)
        if what.startswith(("drop", "slow")):
            handler.close_connection = True
            return handler.connection.close()
        if what == "html":
            return _send(handler, 200, b"<html>Bad gateway</html>")
        if what == "ok":
            return _send(handler, 200, {"message": f"{len(body['features'])} features created."})
        return _send(handler, int(what.split()[0]), {"error": f"made up {what}", "message": f"made up {what}"}, self.headers)

    def _store(self, body: dict[str, Any]) -> None:
        for feature in body["features"]:
            self.times_stored[feature["index"]] += 1
            path = f"/api/feature/{body['modelId']}/{body['source']}/{feature['index']}"
            known = self.stored.setdefault(path, {**feature, "explanations": [], "activations": []})
            known["activations"] += feature["activations"]
            known["explanations"] += [
                {"description": one["text"], "typeName": one.get("methodName")} for one in feature["explanations"]
            ]

    def get(self, handler: Any) -> None:
        with self._lock:
            self.lookups += 1
            found = self.stored.get(handler.path)
        _send(handler, *((404, {"error": "Not Found"}) if found is None else (200, found)))


def _send(handler: Any, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    try:
        handler.send_response(status)
        for name, value in (headers or {}).items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)
    except OSError:  # who asked was killed
        pass
