"""Prompts outside the accuracy band are replaced by new ones: at most `max_rounds` times, in whole groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import TrainerCallback

from rlhf_kit.errors import RunError
from rlhf_kit.trainers.resampling import Resampler
from rlhf_kit.trainers.rollouts import Ranks

GROUP = 4


class Script:
    """Generates completions that are numbered through, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.rounds: list[list[str]] = []
        self._made = 0

    def __call__(self, rows: list[dict[str, Any]]) -> tuple[Any, ...]:
        self.rounds.append([row["prompt"] for row in rows])
        numbers = list(range(self._made, self._made + len(rows)))
        self._made += len(rows)
        texts = [f"{row['prompt']} #{number}" for row, number in zip(rows, numbers, strict=True)]
        return [[number] for number in numbers], texts, None, {"numbers": numbers}


def groups(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts for _ in range(GROUP)]


@pytest.fixture
def resample() -> Callable[..., Any]:
    """Runs a resampler over a data set of the prompts `good` and `bad`, of which the good ones are in the band."""

    def run(rows: list[dict[str, Any]], good: Sequence[str], bad: Sequence[str], max_rounds: int, seed: int = 0) -> Any:
        script = Script()
        resampler = Resampler(
            dataset=Dataset.from_list([{"prompt": prompt} for prompt in (*good, *bad)]),
            group_size=GROUP,
            max_rounds=max_rounds,
            generate=script,
            in_band=lambda rows, made: (torch.tensor([row["prompt"] in good for row in rows]), made[1]),
            ranks=Ranks(Accelerator(cpu=True)),
        )
        rows, generated, known, rounds = resampler(rows, seed)
        assert known == generated[1]  # each row's own
        return rows, generated, rounds, script.rounds

    return run


def assert_whole(rows: list[dict[str, Any]], generated: tuple[Any, ...], made: list[list[str]]) -> None:
    """Rows are groups of one prompt, each with its own completions, which were made together and are used once."""
    ids, texts, nothing, more = generated
    assert nothing is None
    numbers = [number for (number,) in ids]
    assert more == {"numbers": numbers}
    assert texts == [f"{row['prompt']} #{number}" for row, number in zip(rows, numbers, strict=True)]
    asked = [prompt for prompts in made for prompt in prompts]
    assert [asked[number] for number in numbers] == [row["prompt"] for row in rows]
    for start in range(0, len(rows), GROUP):
        assert numbers[start] % GROUP == 0
        assert numbers[start : start + GROUP] == list(range(numbers[start], numbers[start] + GROUP))
    assert len(set(numbers)) == len(numbers)


# -- the resampler alone -----------------------------------------------------------------------------------------------


def test_groups_in_the_band_are_kept_without_a_second_round(resample) -> None:
    rows, generated, rounds, made = resample(groups("a", "b", "a"), "ab", "", max_rounds=3)
    assert rounds == 1 and made == [["a"] * 4 + ["b"] * 4 + ["a"] * 4]
    assert rows == groups("a", "b", "a")
    assert_whole(rows, generated, made)


def test_groups_outside_the_band_are_replaced_by_later_ones_inside(resample) -> None:
    rows, generated, rounds, made = resample(groups("x", "a", "y"), "abc", "xy", max_rounds=50)
    assert 1 < rounds == len(made)
    # By definition: the first three groups inside, in the order in which they were made.
    inside = [prompt for prompts in made for prompt in prompts[::GROUP] if prompt in "abc"]
    assert inside[0] == "a" and len(inside) >= 3
    assert rows == groups(*inside[:3])
    assert_whole(rows, generated, made)
    # It stopped with the round that filled the last place.
    assert sum(prompt in "abc" for prompts in made[:-1] for prompt in prompts[::GROUP]) < 3


@pytest.mark.parametrize("max_rounds", [1, 2, 3])
def test_the_rounds_are_limited_and_what_is_missing_is_filled_with_the_last_outside(resample, max_rounds) -> None:
    rows, generated, rounds, made = resample(groups("x", "y", "z"), "", "xyz", max_rounds)
    assert rounds == max_rounds == len(made)
    assert all(len(prompts) == 3 * GROUP for prompts in made)
    assert rows == groups(*made[-1][::GROUP][::-1])
    assert_whole(rows, generated, made)


def test_what_was_inside_comes_before_what_was_not(resample) -> None:
    rows, generated, _, made = resample(groups("x", "a", "y"), "a", "xy", max_rounds=1)
    assert [row["prompt"] for row in rows[::GROUP]] == ["a", "y", "x"]
    assert_whole(rows, generated, made)


def test_the_seed_decides_what_is_drawn(resample) -> None:
    letters = [chr(code) for code in range(97, 123)]

    def drawn(seed: int) -> list[str]:
        return resample(groups("A", "B", "C", "D"), "", letters, 2, seed)[3][1]

    assert drawn(1) == drawn(1) != drawn(2)
    assert set(drawn(1)) <= set(letters)


def test_a_group_that_is_not_whole_is_an_error(resample) -> None:
    with pytest.raises(RunError, match="6 rows a process are no multiple of num_generations 4"):
        resample(groups("a", "b")[:6], "ab", "", max_rounds=3)


# -- in the trainer ----------------------------------------------------------------------------------------------------


class Weights(TrainerCallback):
    """The policy's parameters before the first and after each update."""

    def __init__(self) -> None:
        self.states: list[list[torch.Tensor]] = []

    def on_train_begin(self, args, state, control, model, **_):
        self.states.append([parameter.detach().clone() for parameter in model.parameters()])

    def on_step_end(self, args, state, control, model, **_):
        self.on_train_begin(args, state, control, model)

    def changed(self, step: int) -> bool:
        return not all(map(torch.equal, self.states[step - 1], self.states[step]))


class Outcome:
    """Every other completion is right, but for prompts whose first number is too large: those are all wrong.

    Attributes:
        asked: the prompts of each call.
    """

    def __init__(self, hard_from: int) -> None:
        self.hard_from = hard_from
        self.asked: list[list[str]] = []

    def hard(self, prompt: str) -> bool:
        return int(prompt[0]) >= self.hard_from

    def __call__(self, prompts, **_):
        self.asked.append(list(prompts))
        return [float(not self.hard(prompt) and row % 2 == 0) for row, prompt in enumerate(prompts)]


@pytest.fixture
def train(build):
    def run(hard_from: int, max_rounds: int, **fields: Any):
        outcome, copies = Outcome(hard_from), Weights()
        trainer = build(
            functions={"outcome": outcome},
            callbacks=[copies],
            rewards=[{"type": "function", "function": "outcome", "bounded": True}],
            accuracy_band={"mode": "resample", "max_rounds": max_rounds, **fields.pop("accuracy_band", {})},
            args={"max_steps": 3, "per_device_train_batch_size": 16, "weight_decay": 0.1, **fields.pop("args", {})},
            **fields,
        )
        trainer.train()
        return trainer, outcome, copies

    return run


def prompts_of(rows: list[dict[str, Any]]) -> list[str]:
    """Prompts of a rollout's groups, which must be whole."""
    prompts = [row["prompt"] for row in rows]
    for start in range(0, len(prompts), GROUP):
        assert len(set(prompts[start : start + GROUP])) == 1
    return prompts[::GROUP]


def rounds_of(outcome: Outcome, rounds: Sequence[float]) -> list[list[list[str]]]:
    """The prompts of the groups that each rollout's rounds generated; the rollout itself is not scored again."""
    calls, found = [prompts[::GROUP] for prompts in outcome.asked], []
    for number in rounds:
        found.append(calls[: int(number)])
        calls = calls[int(number) :]
    assert calls == []
    return found


def test_with_rounds_enough_every_prompt_of_the_rollout_is_in_the_band(train, logged) -> None:
    trainer, outcome, copies = train(hard_from=2, max_rounds=40)
    log = logged(trainer)
    rounds = [entry["credit/resample_rounds"] for entry in log]
    assert max(rounds) > 1
    for rows, made, batch in zip(trainer.samples, rounds_of(outcome, rounds), trainer.batches, strict=True):
        assert len(rows) == 16
        kept = prompts_of(rows)
        # The definition: the first four groups that were in the band, of all that were generated for this rollout.
        assert kept == [prompt for prompts in made for prompt in prompts if not outcome.hard(prompt)][:4]
        assert "tool_mask" not in batch
        assert batch["num_items_in_batch"] == sum(len(row["tokens"]) for row in rows)
    assert [entry["credit/in_band"] for entry in log] == [1, 1, 1]
    assert [entry["credit/dropped_rows"] for entry in log] == [0, 0, 0]
    assert [copies.changed(step) for step in (1, 2, 3)] == [True, True, True]


def test_what_is_still_outside_after_the_last_round_is_masked(train, logged) -> None:
    trainer, outcome, _ = train(hard_from=1, max_rounds=2)
    log = logged(trainer)
    rounds = [entry["credit/resample_rounds"] for entry in log]
    assert max(rounds) == 2
    partly = 0
    for rows, made, batch, entry in zip(trainer.samples, rounds_of(outcome, rounds), trainer.batches, log, strict=True):
        kept, everything = prompts_of(rows), [prompt for prompts in made for prompt in prompts]
        inside = [prompt for prompt in everything if not outcome.hard(prompt)]
        assert kept[: len(inside)] == inside[:4]
        assert len(kept) == 4 and all(outcome.hard(prompt) for prompt in kept[len(inside) :])
        out = torch.tensor([outcome.hard(prompt) for prompt in kept]).repeat_interleave(GROUP)
        live = batch["completion_mask"].bool() & ~out[:, None]
        assert batch["num_items_in_batch"] == live.sum()
        assert not batch["advantages"][~live].any() and batch["advantages"][live].any() == bool(live.any())
        assert entry["credit/dropped_rows"] == pytest.approx(out.float().mean().item())
        partly += 0 < int(out.sum()) < 16
    assert partly


def test_a_rollout_that_is_all_outside_changes_no_weight(train, logged) -> None:
    trainer, outcome, copies = train(hard_from=0, max_rounds=3)
    assert [entry["credit/resample_rounds"] for entry in logged(trainer)] == [3, 3, 3]
    assert len(outcome.asked) == 3 * 3
    assert [copies.changed(step) for step in (1, 2, 3)] == [False, False, False]
    assert [entry["empty_steps"] for entry in logged(trainer)] == [1, 1, 1]
    assert trainer.guard.skipped == 0


def test_accumulated_micro_batches_hold_what_was_resampled(train, logged) -> None:
    args = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "max_steps": 2}
    trainer, outcome, copies = train(hard_from=2, max_rounds=40, args=args)
    assert [len(rows) for rows in trainer.samples] == [16, 16]
    assert not any(outcome.hard(prompt) for rows in trainer.samples for prompt in prompts_of(rows))
    assert [copies.changed(step) for step in (1, 2)] == [True, True]


def test_completions_and_their_columns_stay_with_their_prompt(build) -> None:
    """The reward of a resampled row is that of its own prompt's answer."""
    seen = []

    def outcome(prompts, completions, completion_ids, answer, **_):
        seen.append(list(zip(prompts, answer, completions, map(tuple, completion_ids), strict=True)))
        return [float(row % 2 == 0 and int(prompt[0]) < 2) for row, prompt in enumerate(prompts)]

    trainer = build(
        functions={"outcome": outcome},
        rewards=[{"type": "function", "function": "outcome", "bounded": True}],
        accuracy_band={"mode": "resample", "max_rounds": 40},
        args={"max_steps": 1, "per_device_train_batch_size": 16},
    )
    trainer.train()
    assert len(seen) > 1
    generated = [row for rows in seen for row in rows]
    ((batch, rows, prompts, completions),) = trainer._generated
    assert all(int(prompt[0]) < 2 for prompt in prompts)
    tokenizer = trainer.processing_class
    for row, prompt, text, prompt_ids, padded, mask in zip(
        rows, prompts, completions, batch["prompt_ids"], batch["completion_ids"], batch["completion_mask"], strict=True
    ):
        ids = padded[mask.bool()]
        assert int(row["answer"]) == sum(map(int, prompt.removesuffix(" =").split())) % 5
        assert (prompt, row["answer"], text, tuple(ids.tolist())) in generated
        assert tokenizer.decode(prompt_ids, skip_special_tokens=True) == prompt
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_what_decided_on_a_completion_is_its_reward_and_it_is_judged_once(build, logged) -> None:
    """By a judge that never says the same twice: every other time all groups are above the band, else all but one in
    it. Beside it stands a source that decides nothing."""
    judged, others = [], []

    def said(call: int, row: int) -> float:
        return call % 2 * 0.5 + row / 100 + call / 10_000

    def moody(completions, **_):
        judged.append(len(completions))
        return [said(len(judged) - 1, row) for row in range(len(completions))]

    def other(completions, **_):
        others.append(len(completions))
        return [1.0] * len(completions)

    trainer = build(
        functions={"moody": moody, "other": other},
        rewards=[
            {"type": "function", "function": "moody", "name": "moody", "bounded": True},
            {"type": "function", "function": "other", "name": "other"},
        ],
        accuracy_band={"mode": "resample", "max_rounds": 5, "low": 0.05, "high": 0.3},
        args={"max_steps": 2, "per_device_train_batch_size": 16},
    )
    trainer.train()
    assert [entry["credit/resample_rounds"] for entry in logged(trainer)] == [3, 4]
    assert judged == [16] * 7 and others == [16] * 2
    for rows, first, then in zip(trainer.samples, (0, 4), (2, 6), strict=True):
        expected = [said(first, row) for row in range(4, 16)] + [said(then, row) for row in range(4, 8)]
        assert [sum(row["rewards"]["moody"]) for row in rows] == pytest.approx(expected, abs=1e-6)
