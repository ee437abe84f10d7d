"""When a request is tried again, and after how long."""

import time
from email.utils import formatdate

import pytest

from tl_latentlens.endpoint.replies import MalformedError, read_reply
from tl_latentlens.endpoint.retry import backoff, is_worth_retrying, retry_after


def test_a_wait_is_a_number_or_a_date() -> None:
    assert retry_after({"retry-after": "1.5"}) == 1.5
    assert retry_after({"retry-after": formatdate(time.time() + 30, usegmt=True)}) == pytest.approx(30, abs=2)
    assert [retry_after({"retry-after": one}) for one in ("soon", "nan", "inf", "-3", "")] == [None] * 5
    assert retry_after({}) is None


def test_waits_double_up_to_a_minute() -> None:
    assert all(0.5 * 2**attempt <= backoff(attempt) <= 2**attempt for attempt in range(6))
    assert 30 <= backoff(50) <= 60


def test_what_may_change_is_tried_again() -> None:
    assert [
        status for status in (400, 401, 403, 404, 408, 409, 413, 422, 429, 500, 502, 503, 529) if is_worth_retrying(status)
    ] == [
        408,
        409,
        429,
        500,
        502,
        503,
        529,
    ]


def test_a_reply_without_an_answer_is_none() -> None:
    assert read_reply('{"choices": [{"message": {"content": null, "refusal": "No."}}]}')["answer"] == "No."
    for text in ("", "[]", "null", '{"choices": []}', '{"error": {"message": "overloaded"}}', "<html>"):
        with pytest.raises(MalformedError, match="a reply without an answer"):
            read_reply(text)
