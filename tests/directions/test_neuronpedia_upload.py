"""Uploads to Neuronpedia: whatever the server, the network or a kill does, each feature is stored once."""

import os
import random
import signal
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.fresh import run_fresh
from support.neuronpedia import FAILURES, KEY, NeuronpediaStub

import tl_latentlens as tll
from tl_latentlens.directions.features.neuronpedia import server as server_module
from tl_latentlens.directions.features.neuronpedia import upload as upload_module
from tl_latentlens.directions.features.neuronpedia.names import SourceName
from tl_latentlens.directions.features.neuronpedia.records import ActivationRecord, FeatureRecord
from tl_latentlens.directions.features.neuronpedia.server import NeuronpediaServer
from tl_latentlens.directions.features.neuronpedia.upload import NeuronpediaUpload, upload_features
from tl_latentlens.endpoint import retry

pytest.importorskip("httpx")
NAME = SourceName("demo-6m", "3-ours-res-2k")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Iterator[NeuronpediaStub]:
    """A running server; attempts follow one another at once."""
    monkeypatch.setattr(retry, "_FIRST_BACKOFF", 0.001)
    monkeypatch.setattr(server_module, "_TIMEOUT", 0.2)
    endpoint = NeuronpediaStub()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


class Records:
    """A few features as `FeatureRecords` gives them."""

    def __init__(self, n: int = 300, label: str = "team {} 59 %") -> None:
        self._records = [record(feature, label.format(feature)) for feature in range(n)]
        self.n_features = n

    def __iter__(self) -> Iterator[list[FeatureRecord]]:
        for first in range(0, len(self._records), 128):
            yield self._records[first : first + 128]


def record(feature: int, label: str) -> FeatureRecord:
    """A feature; every seventh is never active, every third has no label."""
    rng = random.Random(feature)
    values = [round(rng.random(), 4) for _ in range(5)]
    activations = [] if feature % 7 == 6 else [ActivationRecord([" ü", "\n", '"', "🦉", f" {feature}"], values, 2)]
    logits = [(" a", 1.5), ("\t", 0.25)]
    return FeatureRecord(
        feature, 0.125, label if feature % 3 else "", "A sentence." * (feature % 2), logits, logits[::-1], activations
    )


def upload(url: str, state: Path, records: Any = None, batch_size: int = 20, **settings: Any) -> NeuronpediaUpload:
    with NeuronpediaServer(NAME, KEY, url) as server:
        settings = {"method": "latentlens", "batch_size": batch_size, "progress": False, **settings}
        return upload_features(records or Records(), NAME, server, state, **settings)


def active(n: int = 300) -> set[int]:
    return {feature for feature in range(n) if feature % 7 != 6}


def require_each_once(stub: NeuronpediaStub, n: int = 300) -> None:
    assert stub.problems == []
    assert set(stub.times_stored) == active(n)
    assert set(stub.times_stored.values()) == {1}


def test_features_arrive_as_they_are(stub: NeuronpediaStub, tmp_path: Path) -> None:
    found = upload(stub.url, tmp_path / "state.jsonl")
    require_each_once(stub)
    assert (found.uploaded, found.already, len(found.skipped)) == (258, 0, 42)
    assert found.url == f"{stub.url}/demo-6m/3-ours-res-2k"
    assert str(found) == f"258 features uploaded, 0 were there, 42 skipped, which are never active: {found.url}"
    expected = record(17, "team 17 59 %")
    stored = stub.stored["/api/feature/demo-6m/3-ours-res-2k/17"]
    assert stored["density"] == 0.125
    sentence, label = stored["explanations"]
    assert sentence == {"description": "A sentence.", "typeName": None}, "no method of ours wrote it"
    assert label == {"description": "team 17 59 %", "typeName": "latentlens"}
    assert stored["activations"] == [{"tokens": expected.activations[0].tokens, "values": expected.activations[0].values}]
    assert [(one["token"], one["value"]) for one in stored["topLogits"]] == expected.top_logits
    n_requests = len(stub.happened)
    again = upload(f"{stub.url}/api/", tmp_path / "state.jsonl")
    assert (again.uploaded, again.already, len(stub.happened), stub.lookups) == (0, 258, n_requests, 0)


@pytest.mark.parametrize("seed", range(4))
def test_failures_of_all_kinds_lose_nothing_and_store_nothing_twice(stub: NeuronpediaStub, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    stub.plan = lambda number: rng.choice(FAILURES) if rng.random() < 0.4 else "ok"
    stub.slow = 0.3
    found = upload(stub.url, tmp_path / "state.jsonl")
    require_each_once(stub)
    assert found.uploaded == 258
    assert len(set(stub.happened)) > 4


@pytest.mark.parametrize("failure", [*FAILURES, "503", "504"])
def test_a_server_that_stays_broken_ends_the_run_and_the_next_one_goes_on(
    stub: NeuronpediaStub, tmp_path: Path, failure: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upload_module, "_ATTEMPTS", 2)
    stub.slow = 0.3
    stub.plan = lambda number: "ok" if number < 3 else failure
    if failure.endswith("after storing"):  # it is found to be there, so that the run does not end
        assert upload(stub.url, tmp_path / "state.jsonl").uploaded == 258
    else:
        with pytest.raises(tll.InvalidInputError, match="2 times; try again later: what was sent is remembered"):
            upload(stub.url, tmp_path / "state.jsonl")
        stub.plan = lambda number: "ok"
        assert upload(stub.url, tmp_path / "state.jsonl", batch_size=33).uploaded == 258 - 60
    require_each_once(stub)


@pytest.mark.parametrize("batch_size", [1, 7, 128])
def test_batches_may_have_another_size_in_the_next_run(stub: NeuronpediaStub, tmp_path: Path, batch_size: int) -> None:
    stub.plan = lambda number: "ok" if number < 2 else "413"
    with pytest.raises(tll.InvalidInputError, match="a smaller batch_size, or fewer contexts"):
        upload(stub.url, tmp_path / "state.jsonl")
    stub.plan = lambda number: "ok"
    upload(stub.url, tmp_path / "state.jsonl", batch_size=batch_size)
    require_each_once(stub)


class KilledError(BaseException):
    """Stands for a kill."""


@pytest.mark.parametrize("when", ["before", "after", "within"])
@pytest.mark.parametrize("ending_write", range(1, 12))  # five batches, two writes each, and one before them
def test_a_run_that_ends_at_any_write_goes_on(
    stub: NeuronpediaStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending_write: int, when: str
) -> None:
    """A run ends before, after, or in the middle of each of the writes of the file that remembers."""
    path, n_writes, whole = tmp_path / "state.jsonl", 0, upload_module.LineWriter.append_all

    def append_all(writer: Any, records: Any) -> None:
        nonlocal n_writes
        n_writes += 1
        if n_writes == ending_write and when == "before":
            raise KilledError
        whole(writer, records)
        if n_writes == ending_write and when == "within":
            path.write_bytes(path.read_bytes()[:-417])  # two lines and a half
        if n_writes == ending_write:
            raise KilledError

    monkeypatch.setattr(upload_module.LineWriter, "append_all", append_all)
    with pytest.raises(KilledError):
        upload(stub.url, path, Records(100))
    upload(stub.url, path, Records(100))
    require_each_once(stub, 100)


def die_at_request(url: str, state: Path, number: int, after: bool) -> None:
    """Upload, and be killed before or after a request."""
    upload_once, sent = NeuronpediaServer.upload, 0

    def upload_or_die(server: NeuronpediaServer, features: Any) -> None:
        nonlocal sent
        sent += 1
        if sent == number and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        upload_once(server, features)
        if sent == number:
            os.kill(os.getpid(), signal.SIGKILL)

    NeuronpediaServer.upload = upload_or_die
    upload(url, state)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize("after", [False, True])
def test_a_killed_process_goes_on(stub: NeuronpediaStub, tmp_path: Path, after: bool) -> None:
    for number in (1, 3, 2):
        assert run_fresh(die_at_request, stub.url, tmp_path / "state.jsonl", number, after).code == -signal.SIGKILL
    upload(stub.url, tmp_path / "state.jsonl")
    require_each_once(stub)


def test_a_feature_with_another_label_is_not_added_to_the_old_one(stub: NeuronpediaStub, tmp_path: Path) -> None:
    upload(stub.url, tmp_path / "state.jsonl", Records(10))
    with pytest.raises(tll.InvalidInputError, match=r"6 features, first \[1, 2, 4, 5, 7\], were sent before with other labels"):
        upload(stub.url, tmp_path / "state.jsonl", Records(10, "other {}"))
    require_each_once(stub, 10)
    upload(stub.url, tmp_path / "state.jsonl", Records(20))
    require_each_once(stub, 20)
    upload(stub.url, tmp_path / "other.jsonl", Records(10, "other {}"))
    assert stub.times_stored[1] == 2


def test_the_server_says_how_long_to_wait(stub: NeuronpediaStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(upload_module.time, "sleep", waits.append)
    stub.headers, stub.plan = {"Retry-After": "17"}, lambda number: "429" if number == 1 else "ok"
    upload(stub.url, tmp_path / "state.jsonl")
    assert (waits, stub.lookups) == ([17.0], 0)  # a batch that was refused did not arrive
    require_each_once(stub)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("400", "answers 400: made up 400; see to model_id, source and the labels"),
        ("403", "answers 403: made up 403; see to api_key"),
        ("404", "answers 404: made up 404; see to base_url"),
        ("422", "answers 422"),
        ("308", "answers 308: .*give base_url as it is there: https://www.example.org"),
    ],
)
def test_a_refusal_is_told_in_the_words_of_the_server(stub: NeuronpediaStub, tmp_path: Path, what: str, message: str) -> None:
    stub.plan, stub.headers = lambda number: what, {"Location": "https://www.example.org"}
    with pytest.raises(tll.InvalidInputError, match=message):
        upload(stub.url, tmp_path / "state.jsonl")
    assert len(stub.happened) == 1
    stub.plan = lambda number: "ok"
    upload(stub.url, tmp_path / "state.jsonl")
    require_each_once(stub)


def test_keys_and_addresses(stub: NeuronpediaStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NEURONPEDIA_API_KEY", raising=False)
    for key in (None, "", "  ", "schlüssel", "two\nlines"):
        with pytest.raises(tll.InvalidInputError, match="NEURONPEDIA_API_KEY") as error:
            NeuronpediaServer(NAME, key, stub.url)
        assert not key or not key.strip() or key not in str(error.value)
    monkeypatch.setenv("NEURONPEDIA_API_KEY", f"{KEY}\n")
    with NeuronpediaServer(NAME, None, stub.url) as server:
        upload_features(Records(5), NAME, server, tmp_path / "a.jsonl", method=None, batch_size=5, progress=False)
    assert set(stub.times_stored) == active(5)
    with NeuronpediaServer(NAME, "wrong", stub.url) as server, pytest.raises(tll.InvalidInputError, match="requires authoriz"):
        upload_features(Records(5), NAME, server, tmp_path / "b.jsonl", method=None, batch_size=5, progress=False)
    for address in ("neuronpedia.org", "", "http://[", "ftp://a", "http://"):
        with pytest.raises(tll.InvalidInputError, match="got base_url="):
            NeuronpediaServer(NAME, KEY, address)
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(tll.MissingExtraError, match=r"tl-latentlens\[neuronpedia\]"):
        NeuronpediaServer(NAME, KEY, stub.url)


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr(retry, "_FIRST_BACKOFF", 0.001)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # and no one listens
        with pytest.raises(tll.InvalidInputError, match="nobody answers at http://127"):
            upload(f"http://127.0.0.1:{held.getsockname()[1]}", tmp_path / "state.jsonl")


def test_requests_are_not_larger_than_the_server_takes(stub: NeuronpediaStub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(upload_module, "_MAX_BYTES", 3000)
    stub.max_bytes = 3200
    upload(stub.url, tmp_path / "state.jsonl", Records(100), batch_size=128)
    require_each_once(stub, 100)
    assert len(stub.happened) > 5


def test_labelled_features_go_up(stub: NeuronpediaStub, index: tll.ContextualIndex, any_model: Any, tmp_path: Path) -> None:
    features = tll.label_features(
        tll.load_sae("demo"), tll.ContextualIndex(index.banks[0], 3, device="cpu"), range(40), model=any_model, progress=False
    )
    where = {"state": tmp_path / "state.jsonl", "base_url": stub.url, "api_key": KEY, "progress": False}
    found = features.upload_to_neuronpedia("demo-6m", "3-ours", **where, contexts=3, batch_size=9)
    assert stub.problems == []
    assert set(stub.times_stored) | set(found.skipped) == set(range(40))
    assert found.uploaded == len(stub.times_stored) > 10
    alone = replace(features, activity=None)
    assert alone.upload_to_neuronpedia("demo-6m", "4-ours", **where).skipped == list(range(40))
    for given, message in (({"batch_size": 0}, "batch_size=0"), ({"batch_size": 129}, "1 to 128 features at once")):
        with pytest.raises(tll.InvalidInputError, match=message):
            features.upload_to_neuronpedia("demo-6m", "3-ours", **where, **given)
    with pytest.raises(tll.InvalidInputError, match="no folder"):
        features.upload_to_neuronpedia("demo-6m", "3-ours", **{**where, "state": tmp_path / "none" / "s.jsonl"})
