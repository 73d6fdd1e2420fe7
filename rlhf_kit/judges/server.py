"""A judge behind an OpenAI-compatible server."""

from __future__ import annotations

import asyncio
import logging
import os
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from rlhf_kit.config import Config, Place
from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.judges.cache import AnswerCache, request_key
from rlhf_kit.judges.usage import Budget, Usage
from rlhf_kit.problems import Problem
from rlhf_kit.redact import is_secret, redact

if TYPE_CHECKING:
    from rlhf_kit.judges.client import Asking, ChatClient
    from rlhf_kit.models.in_process import PolicyContext

logger = logging.getLogger(__name__)
SHOWN_ERRORS = 3
SQLITE_HEADER = b"SQLite format 3\0"
LONGEST_WORD = 16  # characters of a variable's name with digits and without "_"
SECRETS_OF_REQUESTS = ("key", "token", "bearer", "cookie")  # beside those of every setting


class Server(Config):
    """Any server with OpenAI's chat completions, such as vLLM, llama.cpp, `transformers serve` or OpenAI's own.

    A request takes at most `timeout` seconds, a question at most `attempts` requests; time-outs, broken connections,
    429 and 5xx are tried again, after what Retry-After asks for or exponential backoff with jitter. Questions that are
    asked together have `deadline` seconds in all: other processes wait meanwhile, by default for half an hour, and
    `hindsight` asks three times a rollout. With a `cache` every answer is recorded in this file (SQLite, on a disk of
    this machine), and a question that was asked before, of the same model with the same messages, sampling and schema,
    gets the answer on record; with `replay_only` no other question is asked. `structured` holds the model to JSON: to
    the question's schema, to any object, or by the prompt alone; `auto` takes the first of these that the server
    accepts. `temperature` and `max_tokens` may be null, to send none; `extra_body` is added to every request.
    """

    type: Literal["server"]
    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: PositiveInt = 16
    timeout: PositiveFloat = 60.0
    deadline: PositiveFloat = 500.0
    attempts: PositiveInt = 4
    budget: Budget = Budget()
    cache: Place | None = None
    replay_only: bool = False
    temperature: NonNegativeFloat | None = 0.0
    max_tokens: PositiveInt | None = 512
    top_logprobs: Annotated[int, Field(ge=2)] = 20
    structured: Literal["auto", "json_schema", "json_object", "none"] = "auto"
    extra_body: dict[str, Any] = Field(default_factory=dict)

    def problems(self) -> Iterator[Problem]:
        """What cannot work."""
        if "@" in self.base_url:
            yield Problem("base_url", "holds a secret", remedy="put the key into the environment variable api_key_env")
        elif "?" in self.base_url or "#" in self.base_url:  # which may hold a secret: it is not shown
            remedy = "leave it out, and put a key into the environment variable api_key_env"
            yield Problem("base_url", "has a query, which requests below this address do not keep", remedy=remedy)
        elif not _is_address(self.base_url):
            yield Problem("base_url", "is no http(s) address", self.base_url, "such as http://127.0.0.1:8000/v1")
        for name in _secrets(self.extra_body):
            remedy = "put it into the environment variable api_key_env"
            yield Problem(f"extra_body.{name}", "is a secret", remedy=remedy)
        if not _is_variable(self.api_key_env):  # which may be the key itself: it is not shown
            remedy = "put the key into a variable, such as OPENAI_API_KEY, and write that name here"
            yield Problem("api_key_env", "is no name of an environment variable", remedy=remedy)
        if not self.model.strip():
            yield Problem("model", "says no model", self.model, "write the name that the server knows it by")
        yield from self._cache_problems()
        if self.budget.cost is not None and not (self.budget.prompt_price or self.budget.completion_price):
            yield Problem(
                "budget.cost",
                "without prices everything costs 0",
                self.budget.cost,
                "write budget.prompt_price and completion_price, per million tokens",
            )

    def _cache_problems(self) -> Iterator[Problem]:
        if self.cache is None:
            if self.replay_only:
                yield Problem("cache", "replay_only answers from a cache, and there is none", remedy="name its file")
            return
        path = Path(self.cache)
        if path.is_dir():
            remedy = "name a file in it, such as answers.sqlite"
            yield Problem("cache", "is a folder, and answers are recorded in a file", self.cache, remedy)
        elif path.is_file():
            remedy = "name another; it is made where it is not there"
            try:
                with path.open("rb") as file:
                    opening = file.read(len(SQLITE_HEADER))
            except OSError as error:
                yield Problem("cache", f"cannot be read ({error.strerror})", self.cache, remedy)
            else:
                if opening not in (b"", SQLITE_HEADER):
                    yield Problem("cache", "is a file of something else than SQLite", self.cache, remedy)
        elif self.replay_only:
            remedy = "write replay_only: false to record the answers first"
            yield Problem("cache", "replay_only answers from this file, and it is not there", self.cache, remedy)

    def files(self) -> Iterator[tuple[str, str, bool]]:
        """Nothing that must be there; the cache may be made."""
        return iter(())

    def build(self, context: PolicyContext | None = None) -> ServerJudge:
        """The judge.

        Raises:
            RunError: its cache cannot be opened.
        """
        return ServerJudge(self)


def _is_address(text: str) -> bool:
    try:
        url = urlsplit(text)
    except ValueError:
        return False
    return url.scheme in ("http", "https") and bool(url.netloc)


def _is_variable(name: str) -> bool:
    """Whether it names an environment variable, and does not look like the key that belongs into one.

    A key of letters and digits is a valid name, too: what has many of both in a row is none that people choose.
    """
    chosen = not any(len(part) >= LONGEST_WORD and re.search(r"\d", part) for part in name.split("_"))
    return re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name) is not None and chosen and redact(name) == name


def _number(variable: str, default: int) -> int:
    return int(os.environ.get(variable, default))


def _secrets(body: Any, prefix: str = "") -> Iterator[str]:
    """Paths of the fields that hold a secret, by their name or by its form, however deep."""
    items = body.items() if isinstance(body, Mapping) else enumerate(body) if isinstance(body, list | tuple) else ()
    for name, value in items:
        named = is_secret(str(name)) or (str(name).lower() in SECRETS_OF_REQUESTS and isinstance(value, str))
        if (named and value) or (isinstance(value, str) and redact(value) != value):
            yield f"{prefix}{name}"
        else:
            yield from _secrets(value, f"{prefix}{name}.")


class ServerJudge(Judge):
    """Asks the server in the background; of identical questions at the same time only one is sent.

    An answer that the server cut off at `max_tokens` is an error, as it is for a judge in this process (`cut_answer`).
    """

    remote = True

    def __init__(self, config: Server) -> None:
        self._config = config
        self._usage = Usage(config.budget, rank=_number("RANK", 0), processes=_number("WORLD_SIZE", 1))
        self._cache = None if config.cache is None else AnswerCache(Path(config.cache))
        self._client: ChatClient | None = None
        if not config.replay_only:
            from rlhf_kit.judges.client import ChatClient

            key = os.environ.get(config.api_key_env, "").strip()  # a line end from a file is no part of it
            self._client = ChatClient(config, key or None, self._usage)
        self._in_flight: dict[bytes, Future[Answer]] = {}
        self._tasks: set[asyncio.Task[Answer]] = set()  # a loop does not hold its tasks

    def ask(self, questions: Sequence[Question]) -> Callable[[], list[Answer]]:
        """Send what is not on record, and return at once; the result waits for it."""
        questions = list(questions)
        bodies = [self._body(question) for question in questions]
        keys = [self._key(question, body) for question, body in zip(questions, bodies, strict=True)]
        # First what is in flight, then what is on record: what arrives in between is recorded before it has landed.
        open_answers = {key: future for key in keys if (future := self._in_flight.get(key)) is not None}
        known = self._recorded([key for key in dict.fromkeys(keys) if key not in open_answers])
        asked = self._send(questions, bodies, keys, known, open_answers)
        self._usage.add(cached=len(keys) - asked)
        return lambda: self._wait([known.get(key) or open_answers[key] for key in keys])

    def metrics(self) -> dict[str, float]:
        """Requests and what they used (`calls`, `retried`, tokens, `cost`), questions that no request was made for
        (`cached`) or that have no answer (`failed`), and the seconds that this process has `waited`."""
        return self._usage.take()

    def used(self) -> dict[str, float]:
        return self._usage.total()

    def resume(self, used: Mapping[str, float]) -> None:
        self._usage.resume(used)

    def _body(self, question: Question) -> dict[str, Any]:
        """The request, but for the response format and `extra_body`."""
        config = self._config
        body = {
            "model": config.model,
            "messages": [dict(message) for message in question.messages],
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
        }
        if question.choices:
            body |= {"max_tokens": 1, "logprobs": True, "top_logprobs": config.top_logprobs}
        return {name: value for name, value in body.items() if value is not None}

    def _key(self, question: Question, body: Mapping[str, Any]) -> bytes:
        """Not of the address: a server may move. Of `structured` as the recipe has it: what `auto` finds may change."""
        asked = {"schema": question.schema, "choices": list(question.choices), "structured": self._config.structured}
        extra = {"extra_body": self._config.extra_body} if self._config.extra_body else {}
        return request_key({**body, **extra, **asked})

    def _recorded(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        if self._cache is None:
            return {}
        try:
            return self._cache.get(keys)
        except sqlite3.Error as error:
            logger.warning("cannot read the judge's cache '%s': %s", self._config.cache, error)
            return {}

    def _send(
        self,
        questions: Sequence[Question],
        bodies: Sequence[Mapping[str, Any]],
        keys: Sequence[bytes],
        known: dict[bytes, Answer],
        open_answers: dict[bytes, Future[Answer]],
    ) -> int:
        """Send the questions that are neither known nor open, each once; how many those are."""
        asked = 0
        sent: list[tuple[Question, Mapping[str, Any], bytes]] = []
        for question, body, key in zip(questions, bodies, keys, strict=True):
            if key in known or key in open_answers:
                continue
            asked += 1
            if self._client is None:
                error = f"the answer is not on record in '{self._config.cache}', and replay_only asks no server"
                known[key] = Answer(error=error)
                continue
            open_answers[key] = self._in_flight[key] = Future()
            sent.append((question, body, key))
        if self._client is not None and sent:
            self._start(self._client, sent)
        return asked

    def _start(self, client: ChatClient, sent: Sequence[tuple[Question, Mapping[str, Any], bytes]]) -> None:
        """Let the background loop answer them all; one call to it, for each wakes it up."""
        from rlhf_kit.judges.client import Asking, background_loop

        loop, asking = background_loop(), Asking(self._config.deadline)
        tasks = [(key, self._answer(client, question, body, key, asking)) for question, body, key in sent]
        loop.call_soon_threadsafe(lambda: [self._settle_when_done(key, loop.create_task(task)) for key, task in tasks])

    def _settle_when_done(self, key: bytes, task: asyncio.Task[Answer]) -> None:
        def settle(done: asyncio.Task[Answer]) -> None:
            self._tasks.discard(done)
            future = self._in_flight.pop(key)
            if done.cancelled():
                future.cancel()
            elif (error := done.exception()) is not None:
                future.set_exception(error)
            else:
                future.set_result(done.result())

        self._tasks.add(task)
        task.add_done_callback(settle)

    async def _answer(
        self, client: ChatClient, question: Question, body: Mapping[str, Any], key: bytes, asking: Asking
    ) -> Answer:
        """Ask, and record the answer; an error is never recorded."""
        answer = await client.answer(question, body, asking)
        if answer.error is not None or self._cache is None:
            return answer
        try:
            return await asyncio.to_thread(self._cache.put, key, answer)
        except sqlite3.Error as error:
            logger.warning("cannot record an answer in the judge's cache '%s': %s", self._config.cache, error)
            return answer

    def _wait(self, answers: Sequence[Answer | Future[Answer]]) -> list[Answer]:
        start = time.perf_counter()
        settled = [answer.result() if isinstance(answer, Future) else answer for answer in answers]
        errors = Counter(answer.error for answer in settled if answer.error is not None)
        self._usage.add(waited=time.perf_counter() - start, failed=errors.total())
        if errors:
            said = "; ".join(f"{error} ({count} times)" for error, count in errors.most_common(SHOWN_ERRORS))
            failed = f"{errors.total()} of {len(settled)} questions"
            logger.warning("judge %s: %s have no answer: %s", self._config.model, failed, said)
        return settled
