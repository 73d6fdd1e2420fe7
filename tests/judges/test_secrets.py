"""The key goes to the server and nowhere else."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from .conftest import judge, question
from .scripted import Reply, asked

KEY = "local-secret-4711-abcdef"  # of no well-known form


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)


@pytest.mark.parametrize("status", [401, 400, 500])
def test_an_error_that_repeats_the_key_is_shown_without_it(
    serve, short_waits: None, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    caplog.set_level(logging.DEBUG)
    server = serve(lambda r, number: Reply(status=status, text=f"Incorrect API key provided: {KEY}. Or: sk-{KEY}"))
    asking = judge(server, api_key_env="JUDGE_KEY", attempts=2)
    [answer] = asking.ask([question("a")])()
    assert server.headers[0]["authorization"] == f"bearer {KEY}"
    assert str(status) in str(answer.error)
    assert KEY not in str(answer.error) and KEY not in caplog.text and KEY not in repr(asking._config)


def test_the_cache_holds_no_key_and_no_question(serve, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    file = tmp_path / "answers.sqlite"
    server = serve(lambda r, number: Reply("the answer"))
    judge(server, api_key_env="JUDGE_KEY", cache=str(file)).ask([question("what is asked")])()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert b"the answer" in content
    assert KEY.encode() not in content and b"what is asked" not in content and KEY not in caplog.text


def test_an_error_that_repeats_another_key_is_shown_without_it(serve) -> None:
    server = serve(lambda r, number: Reply(status=400, text="your key sk-another1234567890abcdef is for another"))
    [answer] = judge(server).ask([question("a")])()
    assert answer.error == "the server answered 400 (your key <redacted> is for another)"


def test_a_long_page_of_html_is_shown_shortened(serve, short_waits: None) -> None:
    server = serve(lambda r, number: Reply(status=500, text=asked(r) * 1000))
    [answer] = judge(server, attempts=1).ask([question("<p>")])()
    assert len(str(answer.error)) == 300
