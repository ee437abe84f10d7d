"""When a request is tried again, and after how long."""

import math
import random
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

_FIRST_BACKOFF, _MAX_BACKOFF = 1.0, 60.0  # seconds between attempts, doubled each time, where the endpoint names none
_WORTH_RETRYING = (408, 409, 429)  # Every status of 500 and above is retried too.


def is_worth_retrying(status: int) -> bool:
    """Whether the same request may have another status later."""
    return status in _WORTH_RETRYING or status >= 500


def backoff(attempt: int) -> float:
    """Seconds to wait after an attempt, with some jitter so that threads do not come back together."""
    return min(_MAX_BACKOFF, _FIRST_BACKOFF * 2**attempt) * random.uniform(0.5, 1)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds until the time that `retry-after` names, as a number or a date; None where it names none."""
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        wait = float(value)
    except ValueError:
        try:
            wait = parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return wait if 0 <= wait < math.inf else None
