"""Record and replay: the same question has the same answer, without the server and after a kill."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.errors import RunError
from rlhf_kit.judges.base import Answer
from rlhf_kit.judges.cache import AnswerCache, request_key

from .conftest import config, judge, question
from .scripted import Reply, asked

WRITER = Path(__file__).parent / "recording.py"
SCHEMA = {"type": "object"}


@pytest.fixture
def file(tmp_path: Path) -> str:
    return str(tmp_path / "folder" / "answers.sqlite")


def test_a_question_that_was_asked_before_has_its_answer_without_the_server(serve, file: str) -> None:
    server = serve(lambda r, number: Reply(f"{asked(r)}{number}", top=[("Yes", -0.25), ("No", -1.5)]))
    questions = [question("a"), question("b", schema=SCHEMA), question("c", choices=("Yes", "No"))]
    first = judge(server, cache=file).ask(questions)()
    server.stop()
    again = judge(server, cache=file)
    assert again.ask(questions[::-1])() == first[::-1]
    assert all(answer.error is None for answer in first) and len(server.requests) == 3
    metrics = again.metrics()
    assert metrics["cached"] == 3 and metrics["calls"] == metrics["prompt_tokens"] == metrics["cost"] == 0


def test_replay_alone_needs_no_server_and_no_client(serve, file: str) -> None:
    judge(serve(), cache=file).ask([question("a")])()
    known, unknown = config(cache=file, replay_only=True).build().ask([question("a"), question("b")])()
    assert known == Answer("yes")
    assert "not on record" in str(unknown.error) and file in str(unknown.error)


def test_replay_alone_does_not_import_the_client(file: str) -> None:
    code = f"""
import sys
from rlhf_kit.judges.server import Server
Server(type="server", base_url="http://h/v1", model="m", cache={file!r}, replay_only=True).build()
assert not {{"openai", "torch", "transformers"}} & set(sys.modules), sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2], timeout=60)


@pytest.mark.parametrize(
    "other",
    [
        {"model": "other"},
        {"temperature": 0.5},
        {"max_tokens": 9},
        {"extra_body": {"seed": 1}},
        {"structured": "none"},
    ],
)
def test_what_determines_the_answer_makes_another_question(serve, file: str, other: dict[str, Any]) -> None:
    server = serve(lambda r, number: Reply(str(number)))
    judge(server, cache=file).ask([question("a")])()
    assert judge(server, cache=file, **other).ask([question("a")])() == [Answer("1")]


@pytest.mark.parametrize(
    "other", [{"timeout": 9.0}, {"attempts": 1}, {"concurrency": 2}, {"api_key_env": "OTHER"}, {"budget": {"calls": 9}}]
)
def test_what_does_not_determine_it_does_not(serve, file: str, other: dict[str, Any]) -> None:
    server = serve(lambda r, number: Reply(str(number)))
    judge(server, cache=file).ask([question("a")])()
    assert judge(server, cache=file, **other).ask([question("a")])() == [Answer("0")]


def test_messages_schema_and_choices_are_part_of_the_question(serve, file: str) -> None:
    server = serve(lambda r, number: Reply(str(number), top=[("Yes", -0.5)]))
    asking = judge(server, cache=file, concurrency=1)
    fields: list[dict[str, Any]] = [{}, {"schema": SCHEMA}, {"choices": ("Yes", "No")}, {"choices": ("No", "Yes")}]
    asking.ask([question("a", **one) for one in fields] + [question("A")])()
    assert len(server.requests) == 5 and asking.metrics()["cached"] == 0


def test_errors_are_not_recorded(serve, file: str, short_waits: None) -> None:
    server = serve(lambda r, number: Reply(status=400) if number == 0 else Reply())
    asking = judge(server, cache=file)
    assert asking.ask([question("a")])()[0].error is not None
    assert asking.ask([question("a")])() == [Answer("yes")]


def test_the_key_is_the_hash_of_canonical_json() -> None:
    assert request_key({"b": 1, "a": ["é"]}) == request_key({"a": ["é"], "b": 1})
    assert request_key({"a": "1"}) != request_key({"a": 1}) != request_key({"a": 2})
    assert len(request_key({})) == 32


def test_a_file_that_is_something_else_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "recipe.yaml"
    other.write_text("stages: {}\n" * 100)
    with pytest.raises(RunError, match=r"cannot use '.*recipe.yaml' as a judge's cache .*name another file"):
        AnswerCache(other)
    assert other.read_text() == "stages: {}\n" * 100


def test_the_answer_that_was_first_is_everyones(file: str) -> None:
    one, other = AnswerCache(Path(file)), AnswerCache(Path(file))
    key = request_key({"a": 1})
    assert one.put(key, Answer("first")) == other.put(key, Answer("second")) == Answer("first")
    assert other.get([key]) == {key: Answer("first")}


def test_more_keys_than_a_query_takes(file: str) -> None:
    cache = AnswerCache(Path(file))
    keys = [request_key({"n": n}) for n in range(1203)]
    for n, key in enumerate(keys):
        cache.put(key, Answer(str(n), log_probs=(-0.5, n / 7)))
    assert cache.get(keys) == {key: Answer(str(n), log_probs=(-0.5, n / 7)) for n, key in enumerate(keys)}


def test_processes_that_write_one_file_at_once_lose_nothing(file: str) -> None:
    writers = [subprocess.Popen([sys.executable, str(WRITER), file, str(first), "400"]) for first in (0, 200, 400)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    keys = [request_key({"n": n}) for n in range(800)]
    assert AnswerCache(Path(file)).get(keys) == {key: Answer(f"answer {n}") for n, key in enumerate(keys)}


def test_a_killed_writer_leaves_a_whole_file_with_all_that_it_had_recorded(file: str) -> None:
    for attempt in range(5):
        writer = subprocess.Popen(
            [sys.executable, str(WRITER), file, str(attempt * 10**6), "1000000"], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.02 * attempt)
        writer.send_signal(signal.SIGKILL)
        recorded = [line for line in writer.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
        writer.wait()
        last = attempt * 10**6 + len(recorded)
        assert AnswerCache(Path(file)).get([request_key({"n": last})]) == {
            request_key({"n": last}): Answer(f"answer {last}")
        }
        with sqlite3.connect(file) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_judge_that_cannot_record_still_answers(serve, file: str, caplog: pytest.LogCaptureFixture) -> None:
    asking = judge(serve(), cache=file)
    with sqlite3.connect(file) as connection:
        connection.execute("DROP TABLE answers")
    assert asking.ask([question("a")])() == [Answer("yes")]
    assert "cannot read the judge's cache" in caplog.text and "cannot record an answer" in caplog.text
