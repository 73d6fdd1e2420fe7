"""A judge on a server: what it asks, in which order it answers, and what it counts."""

from __future__ import annotations

import json
import time
from math import log
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from rlhf_kit.judges.base import Answer
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.judges.local import Policy
from rlhf_kit.judges.usage import Budget

from .conftest import config, judge, question
from .scripted import Reply, asked

SCHEMA = {"type": "object", "properties": {"score": {"type": "integer"}}, "required": ["score"]}
YES_NO = ("Yes", "No")


def test_answers_come_in_the_order_of_the_questions_whichever_is_first(serve) -> None:
    server = serve(lambda request, number: Reply(asked(request).upper(), delay=float(asked(request)[-1]) / 20))
    answers = judge(server).ask([question(f"q{place}") for place in (5, 1, 9, 0)])()
    assert answers == [Answer("Q5"), Answer("Q1"), Answer("Q9"), Answer("Q0")]


def test_asking_returns_at_once_and_the_answers_arrive_meanwhile(serve) -> None:
    server = serve(lambda request, number: Reply(delay=0.2))
    asking = judge(server)
    wait = asking.ask([question(str(place)) for place in range(4)])
    assert not server.requests or len(server.requests) < 4 or server.at_once == 4
    deadline = time.monotonic() + 20
    while asking._in_flight and time.monotonic() < deadline:
        time.sleep(0.01)
    server.stop()  # everything is here already
    assert wait() == [Answer("yes")] * 4


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_questions_are_open_than_allowed(serve, concurrency: int) -> None:
    server = serve(lambda request, number: Reply(delay=0.05))
    judge(server, concurrency=concurrency).ask([question(str(place)) for place in range(7)])()
    assert server.at_once == concurrency


def test_the_request_says_what_the_recipe_says(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve()
    monkeypatch.setenv("JUDGE_KEY", "k-123\n")
    judge(server, temperature=0.5, max_tokens=7, api_key_env="JUDGE_KEY", extra_body={"seed": 3}).ask([question("q")])()
    expected = {"model": "m", "messages": [{"role": "user", "content": "q"}], "temperature": 0.5, "max_tokens": 7}
    assert server.requests == [{**expected, "seed": 3}]
    assert server.headers[0]["authorization"] == "bearer k-123"
    judge(server, temperature=None, max_tokens=None).ask([question("q")])()
    assert server.requests[1] == {"model": "m", "messages": [{"role": "user", "content": "q"}]}


def test_a_server_without_a_key_works(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    assert judge(serve()).ask([question("q")])() == [Answer("yes")]


def test_choices_are_answered_with_log_probabilities(serve) -> None:
    top = [("Yes", log(0.5)), (" yes", log(0.1)), ("no", log(0.3)), ("Well", log(0.05))]
    server = serve(lambda request, number: Reply("Yes", top=top, finish="length"))
    [answer] = judge(server).ask([question("good?", choices=YES_NO)])()
    assert answer.error is None and list(answer.log_probs) == pytest.approx([log(0.6), log(0.3)])
    assert {name: server.requests[0][name] for name in ("logprobs", "top_logprobs", "max_tokens")} == {
        "logprobs": True,
        "top_logprobs": 20,
        "max_tokens": 1,
    }


def test_a_server_without_log_probabilities_or_without_the_choices_is_an_error_that_says_what_to_do(serve) -> None:
    replies = [Reply("Yes"), Reply("Well", top=[("Well", -0.1), ("The", -3.0)])]
    server = serve(lambda request, number: replies[number])
    ask = judge(server).ask
    [without] = ask([question("a", choices=YES_NO)])()
    [others] = ask([question("b", choices=YES_NO)])()
    assert without.error and "take a server that has them, or a judge of type local" in without.error
    assert others.error and "let the prompt ask for one of these words" in others.error


# -- held to JSON ------------------------------------------------------------------------------------------------------


def formats(requests: list[dict[str, Any]]) -> list[str]:
    return [request.get("response_format", {"type": "none"})["type"] for request in requests]


def refuses(*refused: str, status: int = 400):
    """A server that does not know some response formats."""

    def script(request: dict[str, Any], number: int) -> Reply:
        return Reply(status=status, text="unknown response_format") if formats([request])[0] in refused else Reply("{}")

    return script


@pytest.mark.parametrize("status", [400, 422, 501])
def test_auto_finds_the_strictest_format_that_the_server_takes_and_remembers_it(serve, status: int) -> None:
    server = serve(refuses("json_schema", "json_object", status=status))
    asking = judge(server)
    assert asking.ask([question("a", schema=SCHEMA)])() == [Answer("{}")]
    assert asking.ask([question("b", schema=SCHEMA)])() == [Answer("{}")]
    assert formats(server.requests) == ["json_schema", "json_object", "none", "none"]


def test_the_schema_goes_to_the_server_that_takes_it(serve) -> None:
    server = serve()
    judge(server).ask([question("a", schema=SCHEMA), question("b")])()
    sent = {asked(request): request.get("response_format") for request in server.requests}
    json_schema = {"name": "answer", "schema": SCHEMA, "strict": True}
    assert sent == {"a": {"type": "json_schema", "json_schema": json_schema}, "b": None}


def test_a_refusal_for_another_reason_is_not_taken_for_one_of_the_format(serve) -> None:
    script = refuses("json_schema")
    server = serve(lambda r, n: Reply(status=400, text=f"no {n}: too long") if asked(r) == "long" else script(r, n))
    asking = judge(server)
    [answer] = asking.ask([question("long", schema=SCHEMA)])()
    assert answer.error == "the server answered 400 (no 0: too long)"
    asking.ask([question("a", schema=SCHEMA)])()
    assert formats(server.requests) == ["json_schema", "json_object", "none", "json_schema", "json_object"]


@pytest.mark.parametrize("structured", ["json_schema", "json_object", "none"])
def test_a_format_that_the_recipe_names_is_the_only_one(serve, structured: str) -> None:
    server = serve(refuses("json_schema", "json_object", "none"))
    [answer] = judge(server, structured=structured).ask([question("a", schema=SCHEMA)])()
    assert answer.error and "400" in answer.error and formats(server.requests) == [structured]


# -- counted -----------------------------------------------------------------------------------------------------------


def test_metrics_count_since_they_were_last_asked(serve, short_waits: None) -> None:
    replies = [Reply(), Reply(status=500), Reply(), Reply(status=400)]
    server = serve(lambda request, number: replies[number])
    prices = {"prompt_price": 2.0, "completion_price": 6.0}
    asking = judge(server, concurrency=1, budget=prices)
    asking.ask([question("a"), question("b"), question("a"), question("c")])()
    metrics = asking.metrics()
    assert metrics.pop("waited") > 0
    assert metrics == {
        "calls": 4,
        "cached": 1,
        "failed": 1,
        "retried": 1,
        "prompt_tokens": 20,
        "completion_tokens": 10,
        "cost": pytest.approx(20 * 2e-6 + 10 * 6e-6),
    }
    assert set(asking.metrics().values()) == {0.0}


WITHOUT_USAGE: list[Any] = [
    None,
    {},
    "none",
    {"prompt_tokens": -100, "completion_tokens": 5},
    {"prompt_tokens": 10, "completion_tokens": -5},
    {"prompt_tokens": 0, "completion_tokens": 0},
    {"prompt_tokens": 10},
    {"prompt_tokens": 10**400, "completion_tokens": 5},
    {"prompt_tokens": 1.5, "completion_tokens": 5},
]


def with_usage(usage: Any) -> Reply:
    """A reply of five characters."""
    return Reply(body=json.dumps({"choices": [{"message": {"content": "Maybe"}}], "usage": usage}).encode())


@pytest.mark.parametrize("usage", WITHOUT_USAGE)
def test_tokens_are_estimated_where_the_server_does_not_say_what_it_used(serve, caplog, usage: Any) -> None:
    server = serve(lambda request, number: with_usage(usage))
    prices = {"prompt_price": 1e6, "completion_price": 10e6}
    asking = judge(server, concurrency=1, budget={"tokens": 70, **prices}, max_tokens=20)
    answers = asking.ask(
        [question("é" * 20 + str(place)) for place in range(5)]
    )()  # 41 bytes: 11 tokens, and a message
    assert [answer.text for answer in answers] == ["Maybe"] * 3 + [""] * 2
    assert "budget.tokens of 70 is used up (so far 96)" in str(answers[-1].error)
    metrics = asking.metrics()
    assert (metrics["prompt_tokens"], metrics["completion_tokens"]) == (36, 60)
    assert metrics["cost"] == pytest.approx(36 + 600)
    warned = [message for message in caplog.messages if "does not say how many tokens it uses" in message]
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("fields", "written"),
    [({"max_tokens": None}, 2), ({"max_tokens": None, "extra_body": {"max_completion_tokens": 7}}, 7)],
)
def test_an_answer_is_estimated_by_its_limit_or_else_by_its_text(serve, fields, written: int) -> None:
    asking = judge(serve(lambda request, number: with_usage(None)), **fields)
    asking.ask([question("abcd")])()
    assert (asking.metrics()["prompt_tokens"], asking.used()["completion_tokens"]) == (2, written)


def test_identical_questions_in_flight_are_asked_once(serve) -> None:
    server = serve(lambda request, number: Reply(str(number), delay=0.2))
    asking = judge(server)
    first, second = asking.ask([question("a"), question("a")]), asking.ask([question("a")])
    assert first() + second() == [Answer("0")] * 3
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    ("budget", "calls"),
    [({"calls": 3}, 3), ({"tokens": 31}, 3), ({"cost": 2.9, "prompt_price": 1e5}, 3)],
)
def test_when_the_budget_is_used_up_the_other_questions_are_errors_that_say_so(serve, budget, calls: int) -> None:
    server = serve()
    asking = judge(server, concurrency=1, budget=budget)
    answers = asking.ask([question(str(place)) for place in range(5)])()
    assert [answer.error is None for answer in answers] == [True] * calls + [False] * (5 - calls)
    [name] = set(budget) & {"calls", "tokens", "cost"}
    assert f"budget.{name} of {budget[name]:g} is used up" in str(answers[-1].error)
    assert len(server.requests) == calls
    assert asking.ask([question("later")])()[0].error is not None


def test_each_process_has_an_equal_share_of_the_budget(serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    server = serve()
    answers = judge(server, concurrency=1, budget={"calls": 4}).ask([question(str(place)) for place in range(5)])()
    assert len(server.requests) == 2 and "of 4, of which this process has 2, is used up" in str(answers[-1].error)


@pytest.mark.parametrize("processes", [1, 2, 3, 7])
def test_the_shares_of_a_budget_add_up_to_it(processes: int) -> None:
    budget = Budget(calls=10, tokens=5, cost=0.7, prompt_price=1)
    for name, whole in (("calls", 10), ("tokens", 5), ("cost", 0.7)):
        shares = [budget.share(name, rank, processes) for rank in range(processes)]
        assert sum(shares) == pytest.approx(whole) and max(shares) - min(shares) < processes


def test_a_run_that_goes_on_has_what_was_left_of_its_budget(serve) -> None:
    server = serve()
    first = judge(server, budget={"calls": 3})
    first.ask([question("a"), question("b")])()
    again = judge(server, concurrency=1, budget={"calls": 3})
    again.resume(first.used())
    answers = again.ask([question("c"), question("d")])()
    assert [answer.error is None for answer in answers] == [True, False] and len(server.requests) == 3
    assert again.metrics()["calls"] == 1  # the log has what was asked since


# -- the recipe --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "path", "said"),
    [
        ({"base_url": "127.0.0.1:8000"}, "base_url", "no http(s) address"),
        ({"base_url": "http://[1"}, "base_url", "no http(s) address"),
        ({"base_url": "http://me:hush@host/v1"}, "base_url", "holds a secret"),
        ({"base_url": "http://host/v1?key=hush"}, "base_url", "has a query"),
        ({"base_url": "http://host/v1#hush"}, "base_url", "has a query"),
        ({"extra_body": {"api_key": "hush"}}, "extra_body.api_key", "is a secret"),
        (
            {"extra_body": {"a": [{"headers": {"Authorization": "hush"}}]}},
            "extra_body.a.0.headers.Authorization",
            "is a",
        ),
        ({"extra_body": {"credentials": {"user": "hush"}}}, "extra_body.credentials", "is a secret"),
        ({"extra_body": {"sources": [{"type": "api_key", "key": "hush"}]}}, "extra_body.sources.0.key", "is a secret"),
        ({"extra_body": {"note": ["Bearer hush-hush-hush-hush"]}}, "extra_body.note.0", "is a secret"),
        ({"replay_only": True}, "cache", "there is none"),
        ({"replay_only": True, "cache": "none.sqlite"}, "cache", "it is not there"),
        ({"budget": {"cost": 5}}, "budget.cost", "without prices"),
        ({"model": " "}, "model", "says no model"),
        ({"cache": "."}, "cache", "is a folder"),
        ({"cache": __file__}, "cache", "something else than SQLite"),
        ({"api_key_env": "sk-hush-hush"}, "api_key_env", "no name of an environment variable"),
        ({"api_key_env": "hush 2"}, "api_key_env", "no name of an environment variable"),
        ({"api_key_env": "hush5d8f0a1b2c3d4e5f6a7b"}, "api_key_env", "no name of an environment variable"),
        ({"api_key_env": "hf_HushHushHushHushHush"}, "api_key_env", "no name of an environment variable"),
    ],
)
def test_what_cannot_work_is_said_beforehand(fields: dict[str, Any], path: str, said: str) -> None:
    [problem] = list(config(**fields).problems())
    assert problem.path == path and said in str(problem) and "hush" not in str(problem)


def test_a_sound_configuration_has_no_problems(tmp_path: Path) -> None:
    (tmp_path / "c.sqlite").touch()
    sound = config(cache=str(tmp_path / "c.sqlite"), replay_only=True, budget={"cost": 1, "prompt_price": 1})
    assert list(sound.problems()) == []
    config(cache=str(tmp_path / "answers" / "c.sqlite")).build()
    names = ("OPENAI_API_KEY", "my_key_2", "KEY_OF_SERVER_20261128", "AZURE2OPENAI")
    made = [config(cache=str(tmp_path / "answers" / "c.sqlite"), api_key_env=name) for name in names]
    assert [problem for one in made for problem in one.problems()] == []


@pytest.mark.parametrize("fields", [{"concurrency": 0}, {"timeout": 0}, {"attempts": 0}, {"budget": {"calls": 0}}])
def test_numbers_that_make_no_sense_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        config(**fields)


def test_a_recipe_names_a_judge_by_its_type() -> None:
    read = TypeAdapter(JudgeConfig).validate_python
    assert read({"type": "server", "base_url": "http://h/v1", "model": "m"}) == config("http://h/v1", timeout=60)
    assert read({"type": "policy"}) == Policy(type="policy")
    with pytest.raises(ValidationError, match="server"):
        read({"type": "oracle"})
