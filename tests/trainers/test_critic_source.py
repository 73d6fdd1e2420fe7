"""An LLM critic in PPO: asked early, asked only where the outcome says so, and its failures are in no loss."""

from __future__ import annotations

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from ..judges.scripted import Reply, ScriptedServer, asked


@pytest.fixture
def serve() -> Iterator[Callable[..., ScriptedServer]]:
    """Start a critic that finds every 1 good and every 3 bad, and fails where a completion has a word of `broken`."""
    with ExitStack() as stack:

        def start(broken: str = "") -> ScriptedServer:
            def script(request: dict[str, Any], number: int) -> Reply:
                words = completion_in(asked(request)).split()
                if set(broken) & set(words):
                    return Reply("Well, I could not say.") if len(words) % 2 else Reply("broken", status=500)
                named = [{"quote": word, "verdict": "good" if word == "1" else "bad"} for word in words if word in "13"]
                return Reply(json.dumps({"spans": named}))

            return stack.enter_context(ScriptedServer(script))

        yield start


def completion_in(question: str) -> str:
    found = re.search(r"<<<BEGIN completion (\w+)\n(.*)\n>>>END completion \1(?:\n|$)", question, re.DOTALL)
    assert found is not None
    return found[2]


def source(server: ScriptedServer, judge: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    where = {"type": "server", "base_url": server.base_url, "model": "m", "timeout": 10, "attempts": 1}
    return {"type": "llm_critic", "task": "Add.", "judge": where | (judge or {}), **fields}


def words(row: dict[str, Any]) -> list[str]:
    """The tokens of a sample, which are words here."""
    return [token.strip() for token in row["tokens"]]


def text_of(row: dict[str, Any]) -> str:
    return " ".join(word for word in words(row) if not word.startswith("<"))


def expected_rewards(row: dict[str, Any]) -> list[float]:
    return [{"1": 0.5, "3": -0.5}.get(word, 0.0) for word in words(row)]


def test_rows_that_the_critic_failed_on_are_in_no_loss(serve, build, logged) -> None:
    rewards = [source(serve(broken="2"), max_failure_rate=1.0)]
    trainer = build(rewards=rewards, credit={"estimator": "reinforce"}, args={"max_steps": 2})
    trainer.train()
    failures = 0
    for batch, rows in zip(trainer.batches, trainer.samples, strict=True):
        failed = torch.tensor(["2" in words(row) for row in rows])
        failures += int(failed.sum())
        live = batch["completion_mask"].bool() & ~failed[:, None]
        assert batch["num_items_in_batch"] == live.sum()
        assert not batch["advantages"][failed].any()
        if failed.any():
            assert torch.equal(batch["completion_mask"].bool() & batch["tool_mask"].bool(), live)
        for row, gone in zip(rows, failed.tolist(), strict=True):
            assert row["rewards"]["llm_critic"] == ([0.0] * len(row["tokens"]) if gone else expected_rewards(row))
    log = logged(trainer)
    assert failures > 0
    assert (
        sum(entry["rewards/llm_critic/failed"] * len(rows) for entry, rows in zip(log, trainer.samples, strict=True))
        == failures
    )
    assert all(entry["grad_norm"] > 0 for entry in log)


def test_a_failed_row_changes_the_update_as_if_it_were_not_there(serve, build, weights) -> None:
    """What the failed rows would have earned makes no difference to the weights."""
    ends = []
    for extra in (0.0, 25.0):

        def where_broken(completions, extra=extra, **_):
            return [extra if "2" in text.split() else float(len(text)) for text in completions]

        trainer = build(
            functions={"length": where_broken},
            rewards=[source(serve(broken="2"), max_failure_rate=1.0), {"type": "function", "function": "length"}],
            args={"max_steps": 2},
        )
        trainer.train()
        ends.append(weights(trainer.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_the_critic_is_asked_only_about_wrong_completions(serve, build, logged) -> None:
    server = serve()
    rewards = [{"type": "verifier", "verifier": "exact"}, source(server, ask="below", threshold=0.5)]
    trainer = build(rewards=rewards, args={"max_steps": 2})
    trainer.train()
    rows = [row for rollout in trainer.samples for row in rollout]
    wrong = [row for row in rows if not sum(row["rewards"]["verifier"])]
    assert 0 < len(wrong) < len(rows)
    assert {completion_in(asked(request)) for request in server.requests} == {text_of(row) for row in wrong} - {""}
    for row in rows:
        right = sum(row["rewards"]["verifier"]) > 0
        assert row["rewards"]["llm_critic"] == ([0.0] * len(row["tokens"]) if right else expected_rewards(row))
    assert logged(trainer)[0]["rewards/llm_critic/failed"] == 0


def test_the_server_works_while_other_sources_score(serve, build) -> None:
    server = serve()
    seen = []

    def scores_while_the_server_works(completions, **_):
        """Returns once the critic has been asked, which is never if the sources wait for each other."""
        texts = {text for text in completions if text.strip()}
        deadline = time.monotonic() + 10
        while len(server.requests) < len(texts) and time.monotonic() < deadline:
            time.sleep(0.01)
        seen.append((len(server.requests), len(texts)))
        return [float(len(text)) for text in completions]

    rewards = [{"type": "function", "function": "slow"}, source(server)]
    trainer = build(functions={"slow": scores_while_the_server_works}, rewards=rewards, args={"max_steps": 1})
    trainer.train()
    ((requests, texts),) = seen
    assert requests >= texts > 0


def test_a_run_with_recorded_answers_needs_no_server(serve, build, weights, tmp_path) -> None:
    server = serve()
    cache = {"cache": str(tmp_path / "answers.sqlite")}
    first = build(rewards=[source(server, cache)], args={"max_steps": 3})
    first.train()
    server.stop()
    second = build(rewards=[source(server, {**cache, "replay_only": True})], args={"max_steps": 3})
    second.train()
    ends = [weights(trainer.model) for trainer in (first, second)]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert first.samples == second.samples
    assert any(any(row["rewards"]["llm_critic"]) for row in first.samples[-1])


def test_a_critic_that_never_answers_stops_the_run(serve, build) -> None:
    from rlhf_kit.errors import RunError

    trainer = build(
        functions={"one": lambda completions, **_: [1.0] * len(completions)},
        rewards=[source(serve(broken="01234"), max_failure_rate=0.5), {"type": "function", "function": "one"}],
        args={"max_steps": 10},
    )
    with pytest.raises(RunError, match="'llm_critic' failed in more than 50% of the completions of 3 rollouts"):
        trainer.train()
    assert trainer.state.global_step < 10


def yes_no(server: ScriptedServer) -> dict[str, Any]:
    judge = {"type": "server", "base_url": server.base_url, "model": "m", "timeout": 20, "attempts": 1}
    return {"type": "yes_no", "judge": judge, "questions": "Is it right?"}


def test_a_judge_that_the_recipe_names_first_is_waited_for_last(build, logged) -> None:
    """Its server answers only when the other source of its kind has scored."""
    scored = threading.Event()
    top = [("Yes", math.log(0.75)), ("No", math.log(0.25))]

    def script(request: dict[str, Any], number: int) -> Reply:
        return Reply(top=top) if scored.wait(10) else Reply(status=400)

    def score(completions, **_):
        scored.set()
        return [1.0] * len(completions)

    with ScriptedServer(script) as server:
        rewards = [yes_no(server), {"type": "function", "function": "score"}]
        trainer = build(functions={"score": score}, rewards=rewards, args={"max_steps": 1})
        trainer.train()
    (entry,) = logged(trainer)
    assert entry["rewards/yes_no/failed"] == 0
    assert all(sum(row["rewards"]["yes_no"]) == pytest.approx(0.75) for rows in trainer.samples for row in rows)


def test_a_judge_of_the_accuracy_band_is_asked_once_about_each_completion(build, logged) -> None:
    rounds: list[list[tuple[str, str]]] = []

    def label(prompts, completions, **_):
        rounds.append(list(zip(prompts, completions, strict=True)))
        return [float(len(rounds) % 2)] * len(completions)  # with the judge's: above the band at first, then inside

    with ScriptedServer(lambda request, number: Reply(top=[("Yes", math.log(0.5)), ("No", math.log(0.5))])) as server:
        trainer = build(
            functions={"label": label},
            rewards=[yes_no(server), {"type": "function", "function": "label", "bounded": True}],
            accuracy_band={"mode": "resample", "max_rounds": 3, "low": 0.1, "high": 0.6},
            args={"max_steps": 2},
        )
        trainer.train()
        assert [entry["credit/resample_rounds"] for entry in logged(trainer)] == [2, 2] and len(rounds) == 4
        assert len(server.requests) == sum(len(set(made)) for made in rounds)
    calls = [entry["rewards/yes_no/judge/calls"] for entry in logged(trainer)]
    assert calls == [sum(len(set(made)) for made in rounds[place : place + 2]) for place in (0, 2)]


def test_a_run_that_goes_on_has_what_was_left_of_its_budget(serve, build, tmp_path) -> None:
    server = serve()
    args = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    judge = {"budget": {"calls": 10_000}}
    whole = build(rewards=[source(server, judge)], args=args)
    whole.train()
    used = whole.scoring.used_by_judges()
    assert used["llm_critic/judge"]["calls"] == len(server.requests) > 0
    resumed = build(rewards=[source(server, judge)], args=args)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    assert resumed.scoring.used_by_judges() == used
