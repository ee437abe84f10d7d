"""Neuronpedia's API: one request at a time, and what its answer means."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from tl_latentlens.directions.features.neuronpedia.names import SourceName
from tl_latentlens.endpoint.retry import is_worth_retrying, retry_after
from tl_latentlens.errors import InvalidInputError, MissingExtraError

BASE_URL = "https://www.neuronpedia.org"
KEY_VARIABLE = "NEURONPEDIA_API_KEY"
_TIMEOUT = 120.0  # Seconds; the server gives up earlier.
_UPLOAD, _FEATURE = "/api/feature/upload-batch", "/api/feature/{}/{}/{}"


@dataclass
class TryAgainError(Exception):
    """A request that failed and may succeed later.

    Attributes:
        problem: What happened, in the server's words where it said something.
        wait: Seconds that the server names; None: it names none.
        may_have_arrived: Whether the server may have done what was asked all the same.
    """

    problem: str
    wait: float | None = None
    may_have_arrived: bool = True


def find_api_key(api_key: str | None) -> str:
    """The key given, or that of the environment.

    Raises:
        InvalidInputError: There is none, or it is no key.
    """
    found = (os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key).strip()
    if not found or not found.isascii() or not found.isprintable():
        kind = "an API key of other characters than ASCII" if found else "no API key"
        raise InvalidInputError(
            f"got {kind}; give api_key, or set {KEY_VARIABLE}: it stands in the settings of your account at neuronpedia.org"
        )
    return found


class NeuronpediaServer:
    """A server of Neuronpedia, asked with a key; a context that closes its connections."""

    def __init__(self, name: SourceName, api_key: str | None, base_url: str) -> None:
        """Open no connection yet.

        Raises:
            MissingExtraError: httpx is not installed.
            InvalidInputError: No key, or an address that is none.
        """
        try:
            import httpx
        except ImportError as error:
            raise MissingExtraError('the upload needs httpx: pip install "tl-latentlens[neuronpedia]"') from error
        self._httpx, self._name = httpx, name
        self.base_url = base_url.rstrip("/").removesuffix("/api")
        headers = {"x-api-key": find_api_key(api_key), "content-type": "application/json", "accept": "application/json"}
        if not _is_address(self.base_url):
            raise InvalidInputError(f"got base_url={base_url!r}; expected an address such as {BASE_URL!r}")
        self._client = httpx.Client(base_url=self.base_url, headers=headers, timeout=_TIMEOUT)

    def __enter__(self) -> "NeuronpediaServer":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def upload(self, features: Sequence[Mapping[str, Any]]) -> None:
        """Send a batch of features.

        Raises:
            TryAgainError: A rate limit, a fault of the server or of the network.
            InvalidInputError: The server refuses the key or the batch, in its words.
        """
        body = {"modelId": self._name.model_id, "source": self._name.source, "features": features}
        reply = self._request("POST", _UPLOAD, content=json.dumps(body, ensure_ascii=False, allow_nan=False).encode())
        if not isinstance(reply, dict) or "error" in reply:
            raise TryAgainError(f"an answer that is none of Neuronpedia: {str(reply)[:200]!r}")

    def has(self, feature: Mapping[str, Any]) -> bool:
        """Whether the server has these activations and explanations of a feature.

        Raises:
            TryAgainError: It cannot say now.
            InvalidInputError: The server refuses the key.
        """
        path = _FEATURE.format(self._name.model_id, self._name.source, feature["index"])
        stored = self._request("GET", path, missing=None)
        if stored is None:
            return False
        if not isinstance(stored, dict):
            raise TryAgainError(f"an answer that is none of Neuronpedia: {str(stored)[:200]!r}")
        descriptions = [explanation.get("description") for explanation in stored.get("explanations") or []]
        has_texts = all(explanation["text"] in descriptions for explanation in feature["explanations"])
        first = feature["activations"][0]
        return has_texts and any(_is_same(first, activation) for activation in stored.get("activations") or [])

    def _request(self, method: str, path: str, **settings: Any) -> Any:
        """The parsed body of the answer; `missing` where that is given and there is no such thing."""
        has_default, default = "missing" in settings, settings.pop("missing", None)
        try:
            response = self._client.request(method, path, **settings)
        except (self._httpx.ConnectError, self._httpx.ConnectTimeout) as error:
            raise TryAgainError(f"nobody answers at {self.base_url}: {error}", may_have_arrived=False) from error
        except self._httpx.RequestError as error:
            raise TryAgainError(f"{type(error).__name__}: {error}") from error
        status = response.status_code
        if status == 404 and has_default:
            return default
        if status >= 300:
            problem = f"{status}: {_message(response)}"
            if is_worth_retrying(status):
                raise TryAgainError(problem, retry_after(response.headers), may_have_arrived=status >= 500 or status == 408)
            raise InvalidInputError(f"{self.base_url} answers {problem}; {_advice(status, response.headers)}")
        try:
            return response.json()
        except ValueError as error:
            raise TryAgainError(f"an answer that is none of Neuronpedia: {response.text[:200]!r}") from error


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _message(response: Any) -> str:
    """What the server says: its error, and the field that it is about."""
    try:
        reply = response.json()
        path = f" (at {reply['path']})" if reply.get("path") else ""
        return f"{reply.get('error') or reply.get('message')}{path}"
    except (ValueError, AttributeError):
        return response.text[:200].strip() or response.reason_phrase


def _advice(status: int, headers: Mapping[str, str]) -> str:
    if status in (401, 403):
        return f"see to api_key or {KEY_VARIABLE}: only the creator of a source set may upload to it"
    if status == 413:
        return "a request is too large for it: give a smaller batch_size, or fewer contexts"
    if status < 400:
        return f"give base_url as it is there: {headers.get('location', '')}"
    if status in (404, 405):
        return "see to base_url"
    return "see to model_id, source and the labels"


def _is_same(sent: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    """Whether an activation of the server is the one that was sent."""
    values = stored.get("values") or []
    return stored.get("tokens") == sent["tokens"] and len(values) == len(sent["values"]) and np.allclose(values, sent["values"])
