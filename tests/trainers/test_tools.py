"""Two rollouts with TRL's tool loop: what a tool said is context, and is neither rewarded nor credited nor learnt.

A tiny policy writes calls of the calculator that are often wrong. Turns, tool text and credit are worked out again from
the messages, the sampled ids and the definitions.
"""

from __future__ import annotations

from itertools import groupby
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_kit.data.tool_tasks import tool_arithmetic
from rlhf_kit.errors import RunError
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.trainers.run_ppo import build_ppo_trainer
from rlhf_kit.trainers.setup import StageRun

DATA = {"type": "tool_arithmetic", "size": 64, "terms": 2, "largest": 9}
GAMMA, LAM = 0.9, 0.8
SUCCESS, FAILURE = 0.5, -0.25
# A right conversation takes 26 tokens; under a limit of 24 the last answer of the tool leaves no room for a turn.
LIMITS = (30, 24)


@pytest.fixture(scope="module")
def caller_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a policy that has half learnt to call the calculator."""
    torch.manual_seed(0)
    config = Scratch(
        type="scratch",
        vocabulary="tool_arithmetic",
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    model, tokenizer = load_model(config), load_tokenizer(config)
    rows = tool_arithmetic(200, terms=2, largest=9, seed=5)
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]
    ids: Any = tokenizer(texts, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("caller")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=LIMITS)
def trained(build, caller_path, request) -> SimpleNamespace:
    """A trainer after two rollouts of two passes each, and the ids that `generate` sampled, call by call."""
    trainer = build(
        model={"path": caller_path},
        data=DATA,
        tools=["calculator"],
        rewards=[
            {"type": "verifier", "verifier": "exact"},
            {"type": "turns", "success": SUCCESS, "failure": FAILURE},
        ],
        credit={"estimator": "gae", "gamma": GAMMA, "lam": LAM, "whiten": False},
        args={
            "per_device_train_batch_size": 32,
            "max_completion_length": request.param,
            "max_steps": 4,
            "num_iterations": 2,
        },
    )
    generate, sampled = trainer._generate_single_turn, []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        result = generate(*args, **kwargs)
        sampled.append([list(ids) for ids in result[0]])
        return result

    trainer._generate_single_turn = recorded
    trainer.train()
    rollouts = trainer.rollouts
    assert len(rollouts) == len(trainer.batches) == len(trainer.samples) == 2
    return SimpleNamespace(trainer=trainer, rollouts=rollouts, sampled=sampled, limit=request.param)


def runs(mask: list[bool], value: bool) -> list[list[int]]:
    """The maximal runs of `value` in a mask, as columns."""
    return [[t for t, _ in run] for kind, run in groupby(enumerate(mask), key=lambda item: item[1]) if kind == value]


def masks(rollout: Any) -> list[list[bool]]:
    """The action mask of each completion, without its padding."""
    lengths = rollout.completion_mask.sum(dim=1).tolist()
    return [row[:length] for row, length in zip(rollout.action_mask.tolist(), lengths, strict=True)]


def test_the_tokens_that_are_no_actions_are_those_of_the_tool(trained) -> None:
    tokenizer, turns, errors = trained.trainer.processing_class, [], 0
    for rollout in trained.rollouts:
        assert not (rollout.action_mask & ~rollout.completion_mask).any()
        for ids, mask, messages in zip(rollout.completion_ids, masks(rollout), rollout.completions, strict=True):
            said = [message["content"] for message in messages if message["role"] == "tool"]
            errors += sum(content.startswith("{'error'") for content in said)
            expected = [f"tool {'error' if c.startswith('{') else c.replace('-', '- ')} assistant" for c in said]
            found = [tokenizer.decode(ids[columns]) for columns in runs(mask, False)]
            assert [words.replace("<unk>", "?") for words in found] == [_in_vocabulary(words) for words in expected]
            turns.append(len(runs(mask, True)))
            assert turns[-1] == sum(message["role"] == "assistant" for message in messages)
    assert set(turns) >= {1, 2} and errors > 0  # or the rollouts would show little


def _in_vocabulary(words: str) -> str:
    return " ".join("?" if word.isdecimal() and int(word) > 99 else word for word in words.split())


def test_every_turn_holds_the_ids_that_were_sampled(trained) -> None:
    calls = iter(trained.sampled)
    for rollout in trained.rollouts:
        open_rows = list(range(len(rollout)))
        seen = [0] * len(rollout)
        turns = [runs(mask, True) for mask in masks(rollout)]
        answers = [sum(m["role"] == "assistant" for m in messages) for messages in rollout.completions]
        while open_rows:
            sampled = next(calls)
            assert len(sampled) == len(open_rows)
            following = []
            for row, ids in zip(open_rows, sampled, strict=True):
                # A tool's answer that filled the length limit leaves none of what was sampled behind it.
                columns = turns[row][seen[row]] if seen[row] < answers[row] else []
                cut = columns[-1:] == [trained.limit - 1] or not columns
                kept = rollout.completion_ids[row, columns].tolist()
                assert kept == ids[: len(kept)] and (len(kept) == len(ids) or cut)
                seen[row] += 1
                if _answered(rollout.completions[row], seen[row]):
                    following.append(row)
            open_rows = following
    assert next(calls, None) is None


def _answered(messages: Any, turn: int) -> bool:
    """Whether a tool's message follows the `turn`-th message (from 1) of the assistant."""
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    return turn <= len(places) and places[turn - 1] + 1 < len(messages)


def test_log_probs_are_those_of_the_sampled_ids_behind_the_tools_text(trained, caller_path) -> None:
    """The first rollout against a plain forward of the untrained policy, row by row, without padding."""
    policy: Any = load_model(Pretrained(path=caller_path))
    rollout, batch = trained.rollouts[0], trained.trainer.batches[0]
    for row, mask in enumerate(masks(rollout)):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
        completion = rollout.completion_ids[row, : len(mask)]
        with torch.no_grad():
            logits = policy(input_ids=torch.cat([prompt, completion])[None]).logits[0]
        expected = logits[len(prompt) - 1 : -1].log_softmax(dim=-1).gather(1, completion[:, None]).squeeze(1)
        actual = batch["old_per_token_logps"][row, : len(mask)]
        torch.testing.assert_close(actual[mask], expected[mask], rtol=1e-4, atol=1e-4)


def test_rewards_and_advantages_are_exactly_0_on_tool_tokens(trained) -> None:
    skipped = 0
    for rollout, batch, samples in zip(trained.rollouts, trained.trainer.batches, trained.trainer.samples, strict=True):
        assert (batch["advantages"][~rollout.action_mask] == 0).all()
        assert (batch["returns"][~rollout.action_mask] == 0).all()
        assert batch["num_items_in_batch"] == rollout.action_mask.sum()
        for sample, mask in zip(samples, masks(rollout), strict=True):
            assert sample["action_mask"] == mask
            for rewards in sample["rewards"].values():
                assert all(reward == 0 for reward, action in zip(rewards, mask, strict=True) if not action)
            skipped += mask.count(False)
    assert skipped > 0


def test_turn_rewards_lie_on_the_last_token_of_the_turn_that_called(trained) -> None:
    given = set()
    for rollout, samples in zip(trained.rollouts, trained.trainer.samples, strict=True):
        for sample, mask, messages in zip(samples, masks(rollout), rollout.completions, strict=True):
            places = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
            expected = [0.0] * len(mask)
            for columns, place in zip(runs(mask, True), places, strict=True):
                if messages[place].get("tool_calls"):
                    answer = messages[place + 1]["content"] if place + 1 < len(messages) else "{'error'"
                    expected[columns[-1]] = FAILURE if answer.startswith("{'error'") else SUCCESS
            assert sample["rewards"]["turns"] == expected
            given |= set(expected)
    assert given == {0.0, SUCCESS, FAILURE}


def test_gae_passes_over_the_tools_tokens(trained) -> None:
    """A_t = sum_l (gamma lambda)^l delta_{t+l} over the action tokens alone."""
    for rollout, batch, samples in zip(trained.rollouts, trained.trainer.batches, trained.trainer.samples, strict=True):
        for row, mask in enumerate(masks(rollout)):
            steps = [t for t, action in enumerate(mask) if action]
            rewards = [sum(source[t] for source in samples[row]["rewards"].values()) for t in steps]
            values = [*batch["old_values"][row, steps].tolist(), 0.0]
            delta = [rewards[k] + GAMMA * values[k + 1] - values[k] for k in range(len(steps))]
            for k, t in enumerate(steps):
                advantage = sum((GAMMA * LAM) ** (j - k) * delta[j] for j in range(k, len(steps)))
                assert batch["advantages"][row, t].item() == pytest.approx(advantage, abs=1e-5)


def test_the_report_shows_every_turn(trained) -> None:
    for rollout, samples in zip(trained.rollouts, trained.trainer.samples, strict=True):
        for sample, ids, mask in zip(samples, rollout.completion_ids, masks(rollout), strict=True):
            words = trained.trainer.processing_class.convert_ids_to_tokens(ids[: len(mask)].tolist())
            assert [piece.strip() for piece in sample["tokens"]] == words


@pytest.mark.parametrize(
    ("model", "data", "named"),
    [
        ({}, {"type": "running_sums", "size": 60, "terms": 2, "modulus": 5}, "data: row 1 .* write data.chat: true"),
        ({}, {"type": "running_sums", "size": 60, "terms": 2, "modulus": 5, "chat": True}, "chat template .* cannot"),
        (
            {"chat_template": "{% for m in messages %}{{ m }} {% endfor %}"},
            {"type": "running_sums", "size": 60, "terms": 2, "modulus": 5, "chat": True},
            "TRL does not know",
        ),
    ],
)
def test_what_cannot_call_tools_is_refused_before_the_model_is_loaded(stage, tmp_path, model, data, named) -> None:
    with pytest.raises(RunError, match=named):
        build_ppo_trainer(stage(model=model, data=data, tools=["calculator"]), StageRun(tmp_path))
