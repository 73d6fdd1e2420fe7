"""Requests to an OpenAI-compatible server: bounded in number, time and tries."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import openai
from pydantic import BaseModel, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from rlhf_kit.judges.base import Answer, Question, cut_answer
from rlhf_kit.judges.choices import choice_log_probs
from rlhf_kit.judges.usage import Usage
from rlhf_kit.redact import REDACTED, redact
from rlhf_kit.rollout import Message

if TYPE_CHECKING:
    from rlhf_kit.judges.server import Server

logger = logging.getLogger(__name__)

FIRST_WAIT = 0.5  # seconds; it doubles with every try
LONGEST_WAIT = 30.0
LEAST_UNANSWERED = 4  # questions in a row
LONGEST_ERROR = 300  # characters
MOST_TOKENS = 10**9  # of one request
BYTES_A_TOKEN = 4
MODES = ("json_schema", "json_object", "none")
_REFUSALS = (400, 415, 422, 501)  # what servers say to a response format that they do not have
_TIMEOUT = 408
_TOO_MANY = 429


class NoAnswer(Exception):
    """A question that has no answer; the text says why."""


class TryAgain(Exception):
    """A request that failed in a way that may pass, and how long the server asked to wait."""

    def __init__(self, message: str, wait: float | None = None) -> None:
        super().__init__(message)
        self.wait = wait


class Refused(Exception):
    """The server does not take this request as it is."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


# --- what of a chat completion is read; everything else may be as it likes ---


class _Shown(BaseModel):
    token: str
    logprob: float


class _First(BaseModel):
    top_logprobs: list[_Shown] | None = None


class _LogProbs(BaseModel):
    content: list[_First] | None = None


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    logprobs: _LogProbs | None = None
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    completion_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)]


def _or_none(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:
        return None


class ChatCompletion(BaseModel):
    """A server's reply; a usage that cannot be is none, which takes nothing from the answer."""

    choices: list[_Choice] = Field(min_length=1)
    usage: Annotated[_Usage | None, WrapValidator(_or_none)] = None


class Asking:
    """The questions that were asked together.

    Attributes:
        ends: when the last of them is given up, on the clock of `time.monotonic`.
        unanswered: how many in a row had no answer in spite of all tries.
    """

    def __init__(self, seconds: float) -> None:
        self.ends = time.monotonic() + seconds
        self.unanswered = 0


class ChatClient:
    """Asks a server, `concurrency` questions at a time, each at most `attempts` times for `timeout` seconds."""

    def __init__(self, config: Server, api_key: str | None, usage: Usage) -> None:
        self._config = config
        self._api_key = api_key
        self._usage = usage
        self._slots = asyncio.Semaphore(config.concurrency)
        self._mode = 0 if config.structured == "auto" else MODES.index(config.structured)
        self._estimates = False  # whether it has been said that usage is estimated
        self._random = random.Random()  # its own: waiting must not move the run's random numbers
        self._client = openai.AsyncOpenAI(
            api_key=api_key or "none",  # the client insists on one; servers that need none ignore it
            base_url=config.base_url,
            max_retries=0,
            timeout=config.timeout,
        )

    async def answer(self, question: Question, body: Mapping[str, Any], asking: Asking) -> Answer:
        """The server's answer, or why there is none, before the asking ends.

        It takes `attempts` times `timeout` at most, and the waits between them.
        A response format that is refused costs a request more, which happens twice at most.
        Once as many questions of one asking as are open at once, and at least `LEAST_UNANSWERED`, have used up their
        tries without an answer to any in between, its other questions fail at once: a server that hangs must not hold
        a run for hours.
        """
        try:
            async with asyncio.timeout(asking.ends - time.monotonic()):
                return await self._answer(question, body, asking)
        except TimeoutError:
            limit = f"the judge's deadline of {self._config.deadline:g} s for the questions of a rollout"
            return Answer(error=f"no answer within {limit}: a slow server needs more concurrency or a longer one")

    async def _answer(self, question: Question, body: Mapping[str, Any], asking: Asking) -> Answer:
        async with self._slots:
            if asking.unanswered >= max(self._config.concurrency, LEAST_UNANSWERED):
                return Answer(error=f"not asked, for the server failed {asking.unanswered} questions before this one")
            try:
                reply = await self._reply(question, dict(body))
                asking.unanswered = 0
                return read_choices(reply, question.choices) if question.choices else read_text(reply, question)
            except TryAgain as error:
                asking.unanswered += 1
                return Answer(error=self.clean(f"{error}, in {self._config.attempts} tries"))
            except (NoAnswer, Refused) as error:
                return Answer(error=self.clean(str(error)))

    async def _reply(self, question: Question, body: dict[str, Any]) -> ChatCompletion:
        """The first reply, in the strictest response format that the server takes; `auto` remembers which that is."""
        first_refusal: Refused | None = None
        failures, mode = 0, self._mode
        while True:
            spent = self._usage.begin_call()
            if spent is not None:
                raise NoAnswer(spent)
            try:
                reply = await self._request({**body, **response_format(MODES[mode], question)})
            except Refused as refusal:
                first_refusal = first_refusal or refusal
                if not self._may_loosen(question, mode, refusal):
                    raise first_refusal from refusal
                mode += 1
            except TryAgain as failure:
                failures += 1
                if failures >= self._config.attempts:
                    raise
                self._usage.add(retried=1)
                await asyncio.sleep(self._wait(failures, failure.wait))
            else:
                self._mode = max(self._mode, mode)
                return reply

    def _may_loosen(self, question: Question, mode: int, refusal: Refused) -> bool:
        """Whether the refusal may be about the response format, and there is a looser one."""
        auto = self._config.structured == "auto" and question.schema is not None and not question.choices
        return auto and refusal.status in _REFUSALS and mode + 1 < len(MODES)

    def _wait(self, failures: int, asked: float | None) -> float:
        """Seconds before the next try: what the server asked for, or exponential backoff with full jitter.

        Raises:
            NoAnswer: the server asked for more than `LONGEST_WAIT`.
        """
        if asked is None:
            return self._random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2**failures))
        if asked > LONGEST_WAIT:
            raise NoAnswer(f"the server is busy and asks to wait {asked:g} s, longer than {LONGEST_WAIT:g} s")
        return asked + self._random.uniform(0, FIRST_WAIT)  # or all come back at the same moment

    async def _request(self, body: Mapping[str, Any]) -> ChatCompletion:
        """One request.

        Raises:
            TryAgain: no reply in time, a broken connection, too many requests, an error of the server, or a reply
                that is no chat completion.
            Refused: the server's other errors.
            NoAnswer: the request cannot be sent.
        """
        try:
            async with asyncio.timeout(self._config.timeout):  # openai's own begins anew with every piece of a reply
                # All of it is sent as extra: to go through messages takes the client a fourth of its time.
                create = self._client.chat.completions.with_raw_response.create
                whole = {**body, **self._config.extra_body}
                raw = await create(model=self._config.model, messages=(), extra_body=whole)
                reply = ChatCompletion.model_validate_json(raw.content)
        except (TimeoutError, openai.APITimeoutError) as error:
            raise TryAgain(f"no answer within {self._config.timeout:g} s") from error
        except openai.APIConnectionError as error:
            raise TryAgain(f"no connection to {self._config.base_url} ({error.__cause__ or error})") from error
        except openai.APIStatusError as error:
            self._raise_status(error)
        except ValidationError as error:
            raise TryAgain(f"the server's reply is no chat completion ({_first_line(error)})") from error
        except (ValueError, TypeError) as error:  # such as text that cannot be encoded
            raise NoAnswer(f"the request cannot be sent ({error})") from error
        else:
            limit = whole.get("max_completion_tokens") or whole.get("max_tokens")
            self._count(reply, body["messages"], limit if isinstance(limit, int) else None)
            return reply

    def _count(self, reply: ChatCompletion, messages: Sequence[Message], limit: int | None) -> None:
        """Count the tokens that the server says, or an estimate; the first of these is warned of."""
        if reply.usage is not None:
            self._usage.add_tokens(reply.usage.prompt_tokens, reply.usage.completion_tokens)
            return
        if not self._estimates:
            self._estimates = True
            logger.warning(
                "judge %s: the server does not say how many tokens it uses. They are estimated, on the safe side: one "
                "for %d bytes of a question, and max_tokens for its answer. budget.tokens and budget.cost count these",
                *(self._config.model, BYTES_A_TOKEN),
            )
        self._usage.add_tokens(*estimated_tokens(messages, limit, reply.choices[0].message.content or ""))

    def _raise_status(self, error: openai.APIStatusError) -> NoReturn:
        status = error.status_code
        said = f"the server answered {status} ({_detail(error.body)})"
        if status in (_TIMEOUT, _TOO_MANY) or (status >= 500 and status not in _REFUSALS):
            raise TryAgain(said, retry_after(error.response.headers.get("retry-after"))) from error
        if status in (401, 403):
            given = "is not set" if self._api_key is None else "is not accepted"
            said += f": the key in the environment variable {self._config.api_key_env} {given}"
        raise Refused(said, status) from error

    def clean(self, text: str) -> str:
        """A message in one line, without secrets, and not as long as a server's page of HTML."""
        text = " ".join(text.split())
        if self._api_key:
            text = text.replace(self._api_key, REDACTED)
        text = redact(text)
        return text if len(text) <= LONGEST_ERROR else f"{text[: LONGEST_ERROR - 3]}..."


def estimated_tokens(messages: Sequence[Message], limit: int | None, answer: str) -> tuple[int, int]:
    """Tokens read and written where the server does not say: rather too many than too few.

    One for `BYTES_A_TOKEN` bytes of the messages in UTF-8, and one for each message; and as many as the answer may
    have, or without a limit those of its text.
    """
    read = sum(_tokens_of(str(message["content"])) + 1 for message in messages)
    return read, _tokens_of(answer) if limit is None else limit


def _tokens_of(text: str) -> int:
    return math.ceil(len(text.encode(errors="replace")) / BYTES_A_TOKEN)


def response_format(mode: str, question: Question) -> dict[str, Any]:
    """The part of a request that holds the model to JSON."""
    if question.schema is None or question.choices or mode == "none":
        return {}
    if mode == "json_object":
        return {"response_format": {"type": "json_object"}}
    schema = {"name": "answer", "schema": dict(question.schema), "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": schema}}


def read_text(reply: ChatCompletion, question: Question) -> Answer:
    """What the model wrote.

    Raises:
        NoAnswer: nothing, or its answer was filtered or refused.
    """
    choice = reply.choices[0]
    if choice.message.refusal:
        raise NoAnswer(f"the model refused ({choice.message.refusal})")
    if choice.finish_reason == "length":
        return cut_answer(choice.message.content or "", question)
    if choice.finish_reason == "content_filter":
        raise NoAnswer("the server's content filter cut the answer")
    if not choice.message.content:
        raise NoAnswer(f"the model wrote nothing (finish_reason {choice.finish_reason})")
    return Answer(text=choice.message.content)


def read_choices(reply: ChatCompletion, choices: Sequence[str]) -> Answer:
    """Log-probabilities of the words that the answer may begin with.

    Raises:
        NoAnswer: there are no log-probabilities, or what is shown is none, or none of the words is among it.
    """
    shown = reply.choices[0].logprobs
    if shown is None or not shown.content or not shown.content[0].top_logprobs:
        raise NoAnswer(
            "the server returned no log-probabilities (top_logprobs), which a question with choices needs: take a "
            "server that has them, or a judge of type local or policy"
        )
    top = [(one.token, one.logprob) for one in shown.content[0].top_logprobs]
    try:
        return Answer(log_probs=tuple(choice_log_probs(top, choices)))
    except ValueError as error:
        raise NoAnswer(str(error)) from error


def retry_after(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks to wait; it is a number or a date."""
    if header is None:
        return None
    try:
        seconds = float(header)
        return max(seconds, 0.0) if math.isfinite(seconds) else None
    except ValueError:
        pass
    try:
        return max((parsedate_to_datetime(header) - datetime.now(UTC)).total_seconds(), 0.0)
    except (ValueError, TypeError):
        return None


@cache
def background_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all judges of this process, in a thread of its own that ends with the process."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="judges", daemon=True).start()
    return loop


def _detail(body: object) -> object:
    """What an error's body says; `{"message": ...}` is OpenAI's form, `{"detail": ...}` FastAPI's."""
    if isinstance(body, Mapping):
        return body.get("message") or body.get("detail") or dict(body)
    return body or "and no more"


def _first_line(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))} {first['msg']}".strip()
