"""`yes_no` over HTTP: a server of a real model that returns its likeliest first tokens, as vLLM and OpenAI do."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import uvicorn
from fastapi import FastAPI, Request
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kit.rewards import RewardConfig
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rewards.yes_no import YesNo, YesNoConfig
from rlhf_kit.rollout import Rollout, Status

from .reading import reader, rollout_of_texts

torch.set_num_threads(1)
TEXTS = ["I like it. The film was good!", "no", "the story was bad", "A film", "Thank you! I like the story"]
FORMS = {word: {form + case for form in ("", " ") for case in cases} for word, cases in {
    "Yes": ("Yes", "yes", "YES"), "No": ("No", "no", "NO"),
}.items()}  # fmt: skip


class Model:
    """A language model, asked by messages."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.network = AutoModelForCausalLM.from_pretrained(folder)

    @torch.no_grad()
    def first_tokens(self, messages: list[dict[str, str]]) -> list[tuple[str, float]]:
        """Every token that the answer may begin with and its log-probability, the likeliest first."""
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        log_probs, order = self.network(ids).logits[0, -1].log_softmax(0).sort(descending=True)
        tokens = [self.tokenizer.decode([token]) for token in order.tolist()]
        return list(zip(tokens, log_probs.tolist(), strict=True))


@pytest.fixture(scope="module")
def model(talker: Path) -> Model:
    return Model(talker)


@pytest.fixture(scope="module")
def base_url(model: Model) -> Iterator[str]:
    """The address of a server of this model."""
    app = FastAPI()

    @app.post("/v1/chat/completions")
    async def complete(request: Request) -> dict[str, Any]:
        body = await request.json()
        assert body["logprobs"] is True and body["max_tokens"] == 1
        shown = [{"token": t, "logprob": p, "bytes": None} for t, p in model.first_tokens(body["messages"])]
        first = {**shown[0], "top_logprobs": shown[: body["top_logprobs"]]}
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": shown[0]["token"]},
            "logprobs": {"content": [first]},
            "finish_reason": "length",
        }
        usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10}
        return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice], "usage": usage}

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def context(talker: Path) -> BuildContext:
    return reader(talker)


@pytest.fixture(scope="module")
def rollout(context: BuildContext) -> Rollout:
    return rollout_of_texts(context, ["The film:"] * len(TEXTS), TEXTS)


def source(judge: dict[str, Any], context: BuildContext) -> YesNo:
    value = {"type": "yes_no", "judge": judge, "questions": "Is it good?"}
    config = cast(YesNoConfig, TypeAdapter(RewardConfig).validate_python(value))
    return config.build(context)


def over_http(base_url: str, top_logprobs: int) -> dict[str, Any]:
    return {"type": "server", "base_url": base_url, "model": "m", "top_logprobs": top_logprobs, "attempts": 1}


def test_where_every_token_is_shown_it_is_the_reward_of_the_same_model_in_process(
    base_url: str, context: BuildContext, rollout: Rollout, model: Model
) -> None:
    served = source(over_http(base_url, len(model.tokenizer)), context)
    rewards = served.score(rollout)
    assert rewards.status.tolist() == [Status.OK] * len(TEXTS)
    for row, question in enumerate(served._questions(rollout)):
        shown = model.first_tokens([dict(message) for message in question.messages])
        yes, no = (sum(math.exp(p) for token, p in shown if token in FORMS[word]) for word in ("Yes", "No"))
        assert yes > 0 and no > 0
        assert rewards.tokens[row].sum().item() == pytest.approx(yes / (yes + no), abs=1e-5)
    here = source({"type": "policy"}, context).score(rollout)
    torch.testing.assert_close(rewards.tokens, here.tokens, atol=1e-5, rtol=1e-5)
    assert rewards.tokens.sum(dim=1).std() > 0.01


@pytest.mark.parametrize("top", [20, 60])
def test_of_the_likeliest_tokens_those_that_are_shown_count_and_a_row_without_any_is_missing(
    base_url: str, context: BuildContext, rollout: Rollout, model: Model, top: int
) -> None:
    """Whole words before their beginnings; a word that is not shown has at most what no shown token has."""
    served = source(over_http(base_url, top), context)
    rewards = served.score(rollout)
    statuses = []
    for row, question in enumerate(served._questions(rollout)):
        shown = dict(model.first_tokens([dict(message) for message in question.messages])[:top])
        sums = []
        for word, other in (("Yes", "No"), ("No", "Yes")):
            whole = [t for t in shown if t in FORMS[word]]
            begins = [t for t in shown if t.strip() and any(form.startswith(t) for form in FORMS[word])]
            begins = [t for t in begins if not any(form.startswith(t) for form in FORMS[other])]
            sums.append(sum(math.exp(shown[t]) for t in whole or begins))
        statuses.append(Status.OK if any(sums) else Status.FAILED)
        rest = min(min(math.exp(p) for p in shown.values()), 1 - sum(math.exp(p) for p in shown.values()))
        yes, no = (value or rest for value in sums)
        expected = yes / (yes + no) if any(sums) else 0.0
        assert rewards.tokens[row].sum().item() == pytest.approx(expected, abs=1e-5)
    assert rewards.status.tolist() == statuses
