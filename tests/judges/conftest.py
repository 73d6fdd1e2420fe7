"""Scripted servers, judges that ask them, and short waits between tries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from rlhf_kit.judges import client
from rlhf_kit.judges.base import Question
from rlhf_kit.judges.server import Server, ServerJudge

from .scripted import Script, ScriptedServer


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Start a server with a script; it stops at the end of the test."""
    with ExitStack() as stack:

        def start(script: Script | None = None) -> ScriptedServer:
            return stack.enter_context(ScriptedServer(script))

        yield start


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once; by how much they wait is tested on its own."""
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


def judge(server: ScriptedServer, **fields: Any) -> ServerJudge:
    """A judge that asks this server."""
    return config(server.base_url, **fields).build()


def config(base_url: str = "http://127.0.0.1:9/v1", **fields: Any) -> Server:
    """The configuration of a judge; a request may take ten seconds."""
    return Server.model_validate({"type": "server", "base_url": base_url, "model": "m", "timeout": 10.0, **fields})


def question(text: str, **fields: Any) -> Question:
    """A question of one message."""
    return Question([{"role": "user", "content": text}], **fields)
