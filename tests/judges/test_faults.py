"""Servers that fail in every way: right answers or errors, in order and in bounded time."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.judges import client
from rlhf_kit.judges.base import CUT_OFF, Answer, cut_answer
from rlhf_kit.judges.client import ChatClient, NoAnswer, retry_after
from rlhf_kit.judges.usage import Budget, Usage

from .conftest import config, judge, question
from .scripted import Reply, asked

FAULTS = {
    "500": (Reply(status=500, text="oh"), "answered 500 (oh)"),
    "503 in HTML": (Reply(status=503, body=b"<html>"), "answered 503"),
    "429": (Reply(status=429, text="slow down", headers={"Retry-After": "0"}), "answered 429"),
    "408": (Reply(status=408, text="late"), "answered 408"),
    "hangs": (Reply(how="hang"), "no answer within 0.6 s"),
    "trickles": (Reply(how="trickle"), "no answer within 0.6 s"),
    "closes half-way": (Reply(how="half"), "no connection"),
    "closes": (Reply(how="drop"), "no connection"),
    "no JSON": (Reply(body=b"<html>hello</html>"), "no chat completion"),
    "half of its JSON": (Reply(body=b'{"choices": [{"mess'), "no chat completion"),
    "another JSON": (Reply(body=b'{"choices": "score 10"}'), "no chat completion"),
    "no choice": (Reply(body=b'{"choices": []}'), "no chat completion"),
    "not UTF-8": (Reply(body=b'{"choices": [{"message": {"content": "\xff\xfe"}}]}'), "no chat completion"),
}
FINAL = {
    "400": (Reply(status=400, text="bad"), "answered 400 (bad)"),
    "400 of FastAPI": (Reply(status=400, body=b'{"detail": "pinned"}'), "answered 400 (pinned)"),
    "404": (Reply(status=404, text="no such model"), "answered 404 (no such model)"),
    "401": (Reply(status=401, text="who?"), "environment variable NO_KEY is not set"),
    "busy for long": (Reply(status=429, headers={"Retry-After": "3600"}), "asks to wait 3600 s"),
    "cut off": (Reply("half a", finish="length"), "raise the judge's max_tokens"),
    "filtered": (Reply("half a", finish="content_filter"), "content filter"),
    "nothing written": (Reply(""), "wrote nothing"),
}


def patience(fault: str) -> float:
    """Seconds for a request: few where they will pass, many where a busy machine could use them up."""
    return 0.6 if FAULTS[fault][0].how in ("hang", "trickle") else 20.0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_passes_is_tried_again(serve, short_waits: None, fault: str) -> None:
    server = serve(lambda r, number: FAULTS[fault][0] if number == 0 else Reply("good"))
    asking = judge(server, timeout=patience(fault), attempts=2, concurrency=1)
    assert asking.ask([question("a"), question("b")])() == [Answer("good")] * 2
    assert asking.metrics()["retried"] == 1 and len(server.requests) == 3


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_that_stays_is_an_error_after_all_tries_and_others_have_their_answers(
    serve, short_waits: None, fault: str
) -> None:
    server = serve(lambda r, number: FAULTS[fault][0] if asked(r) == "bad" else Reply(asked(r)))
    asking = judge(server, timeout=patience(fault), attempts=2)
    answers = asking.ask([question("a"), question("bad"), question("c")])()
    assert answers[0] == Answer("a") and answers[2] == Answer("c")
    assert FAULTS[fault][1] in str(answers[1].error) and str(answers[1].error).endswith("in 2 tries")
    assert asking.metrics()["failed"] == 1 and len(server.requests) == 4


@pytest.mark.parametrize("fault", FINAL)
def test_what_would_not_pass_is_not_tried_again(serve, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    server = serve(lambda r, number: FINAL[fault][0])
    [answer] = judge(server, api_key_env="NO_KEY").ask([question("a")])()
    assert FINAL[fault][1] in str(answer.error) and answer.text == ""
    assert len(server.requests) == 1


@pytest.mark.parametrize("value", ["NaN", "800.0", "5000", "Infinity", "0.5"])
def test_what_is_no_log_probability_is_no_answer_and_is_not_recorded(serve, tmp_path: Path, value: str) -> None:
    shown = f'[{{"token": "Yes", "logprob": {value}}}, {{"token": "No", "logprob": -1}}]'
    first = f'{{"choices": [{{"message": {{}}, "logprobs": {{"content": [{{"top_logprobs": {shown}}}]}}}}]}}'
    sound = Reply(top=[("Yes", -0.5), ("No", -1.0)])
    server = serve(lambda r, number: Reply(body=first.encode()) if number == 0 else sound)
    asked_for = question("a", choices=("Yes", "No"))
    answers = [judge(server, cache=str(tmp_path / "c.sqlite")).ask([asked_for])()[0] for _ in range(3)]
    assert "what the server calls log-probabilities are none: that of 'Yes' is" in str(answers[0].error)
    assert [answer.log_probs for answer in answers] == [(), (-0.5, -1.0), (-0.5, -1.0)]
    assert len(server.requests) == 2


def test_a_cut_answer_counts_where_the_object_that_was_asked_for_is_whole() -> None:
    schema = question("a", schema={"type": "object"})
    on = '{"score": 3}\n\nNext: {"sco'
    assert cut_answer(on, schema) == Answer(on)
    assert cut_answer('{"score": 3', schema) == cut_answer(on, question("a")) == Answer(error=CUT_OFF)


def test_text_that_cannot_be_sent_is_an_error(serve) -> None:
    bad, good = judge(serve()).ask([question("\ud800"), question("a")])()
    assert "cannot be sent" in str(bad.error) and good == Answer("yes")


def test_retry_after_is_waited_for(serve, short_waits: None) -> None:
    times = []

    def script(request: dict[str, Any], number: int) -> Reply:
        times.append(time.monotonic())
        return Reply(status=429, headers={"Retry-After": "1"}) if number == 0 else Reply()

    assert judge(serve(script)).ask([question("a")])() == [Answer("yes")]
    assert times[1] - times[0] >= 1


def test_retry_after_is_a_number_or_a_date() -> None:
    assert retry_after("1.5") == 1.5 and retry_after("-3") == 0 and retry_after(None) is None
    assert retry_after("soon") is None
    later = retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True))
    assert later is not None and 15 < later <= 20


def test_waits_grow_exponentially_to_a_bound_with_full_jitter() -> None:
    asking = ChatClient(config(), None, Usage(Budget()))
    for failures in (1, 3, 20):
        bound = min(client.LONGEST_WAIT, client.FIRST_WAIT * 2**failures)
        waits = [asking._wait(failures, None) for _ in range(400)]
        assert 0 <= min(waits) < 0.1 * bound and 0.9 * bound < max(waits) <= bound
    assert 7 <= asking._wait(1, 7.0) <= 7 + client.FIRST_WAIT
    with pytest.raises(NoAnswer, match="longer than 30 s"):
        asking._wait(1, 31.0)


def test_a_server_that_dies_half_way_and_comes_back_answers_everything(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.3)
    died = threading.Event()

    def script(request: dict[str, Any], number: int) -> Reply:
        if number == 5:
            died.set()
        return Reply(asked(request), delay=0.05 if number < 5 else 0.3)

    server = serve(script)
    wait = judge(server, attempts=8, concurrency=3).ask([question(str(place)) for place in range(12)])
    assert died.wait(20)
    server.stop()
    server.start()
    assert wait() == [Answer(str(place)) for place in range(12)]


def test_a_dead_server_fails_the_questions_and_one_that_is_back_answers_the_next(serve, short_waits: None) -> None:
    server = serve()
    asking = judge(server, attempts=2)
    server.stop()
    assert "no connection" in str(asking.ask([question("a")])()[0].error)
    server.start()
    assert asking.ask([question("a")])() == [Answer("yes")]


def test_a_server_that_answers_now_and_then_is_given_up_at_the_deadline(serve, short_waits: None) -> None:
    """Every other question is answered, so that the count of failures in a row begins anew each time."""
    server = serve(lambda r, number: Reply(asked(r)) if int(asked(r)) % 2 else Reply(how="hang"))
    asking = judge(server, timeout=0.4, attempts=1, concurrency=1, deadline=1.5)
    answers = asking.ask([question(str(place)) for place in range(40)])()
    late = ["deadline of 1.5 s" in str(answer.error) for answer in answers]
    assert not any(late[:3]) and all(late[20:]) and answers[1] == Answer("1")
    assert asking.ask([question("1")])() == [Answer("1")]


def test_a_server_that_hangs_holds_a_rollout_for_the_time_of_two_questions_not_of_all(serve, short_waits: None) -> None:
    server = serve(lambda r, number: Reply(how="hang"))
    answers = judge(server, timeout=0.2, attempts=2, concurrency=5).ask([question(str(n)) for n in range(60)])()
    tried = ["no answer within" in str(answer.error) for answer in answers]
    assert 5 <= sum(tried) < 2 * 5  # those that were open when the fifth failed had begun before
    assert ["not asked" in str(answer.error) for answer in answers] == [not was for was in tried]
    assert len(server.requests) == 2 * sum(tried)


def test_failures_with_answers_in_between_do_not_stop_the_asking(serve, short_waits: None) -> None:
    server = serve(lambda r, number: Reply(status=500) if int(asked(r)) % 4 else Reply())
    answers = judge(server, attempts=1, concurrency=1).ask([question(str(n)) for n in range(16)])()
    assert [answer.error is None for answer in answers] == [True, False, False, False] * 4
    assert len(server.requests) == 16
