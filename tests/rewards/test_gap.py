"""The quality gap is antisymmetric, exactly, whatever the judge prefers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.rewards import RewardConfig
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rewards.gap import Gap, GapConfig
from rlhf_kit.rollout import Rollout, Status

torch.set_num_threads(1)

TEXTS = ["the film was good", "no", "I like it. Thank you!", "the same", "yes"]
REFERENCES: list[Any] = ["the story was bad and the film was bad", "Yes yes", [{"role": "assistant", "content": "A"}]]
REFERENCES += ["the same", None]
PROMPT = "{{prompt}} 1: {{first}} 2: {{second}} {{question}}"


def config(**fields: Any) -> GapConfig:
    return TypeAdapter(RewardConfig).validate_python({"type": "gap", "judge": {"type": "policy"}, **fields})


def rollout(texts: Sequence[str], references: Sequence[Any]) -> Rollout:
    """Completions of three tokens, whatever their texts."""
    rows = len(texts)
    mask, prompt = torch.ones(rows, 3).bool(), torch.zeros(rows, 1).long()
    return Rollout(
        prompts=["How was it?"] * rows,
        completions=list(texts),
        prompt_ids=prompt,
        prompt_mask=prompt.bool(),
        completion_ids=mask.long(),
        completion_mask=mask,
        action_mask=mask,
        texts=list(texts),
        columns={"reference": list(references)},
    )


def scores(source: Gap, texts: Sequence[str], references: Sequence[Any]) -> list[float]:
    return source.score(rollout(texts, references)).tokens[:, -1].tolist()


class Scripted(Judge):
    """Log-odds of the first place by a function of the two texts."""

    def __init__(self, odds: Callable[[str, str], float | None]) -> None:
        self.odds = odds
        self.questions: list[Question] = []

    def ask(self, questions: Sequence[Question]) -> Callable[[], list[Answer]]:
        self.questions += questions
        return lambda: [self._answer(question) for question in questions]

    def _answer(self, question: Question) -> Answer:
        content = question.messages[0]["content"]
        one, other = re.findall(r"<<<BEGIN (?:first|second) completion \w+\n(.*?)\n>>>END", content, re.DOTALL)
        odds = self.odds(one, other)
        return Answer(error="lost") if odds is None else Answer(log_probs=(odds - 3, -3.0))


@pytest.fixture(scope="module")
def context(talker: Path) -> BuildContext:
    config = Pretrained(path=str(talker))
    return BuildContext(load_model(config), config, 1.0, torch.device("cpu"), tokenizer=load_tokenizer(config))


@pytest.mark.parametrize("bounded", [False, True])
def test_a_real_model_gives_an_exactly_antisymmetric_gap(context: BuildContext, bounded: bool) -> None:
    references = [REFERENCES[0], REFERENCES[1], "A"]
    there = scores(config(bounded=bounded).build(context), TEXTS[:3], references)
    back = scores(config(bounded=bounded).build(context), references, TEXTS[:3])
    assert there == [-gap for gap in back]
    assert all(gap != 0 for gap in there)


def test_the_gap_is_half_the_difference_of_both_orders() -> None:
    quality = {"good": 2.0, "bad": -1.0}
    judge = Scripted(lambda one, other: quality[one] - quality[other] + 5.0)  # drawn to the first place
    source = Gap(config(), judge, PROMPT)
    rewards = source.score(rollout(["good", "bad"], ["bad", "good"]))
    assert rewards.tokens.tolist() == [[0, 0, 3.0], [0, 0, -3.0]]
    assert rewards.metrics["first_place"] == 5.0
    assert len(judge.questions) == 4 and judge.questions[0].choices == ("A", "B")


def test_a_judge_that_looks_at_the_place_alone_gives_nothing() -> None:
    assert scores(Gap(config(), Scripted(lambda one, other: 7.3), PROMPT), ["x", "y"], ["y", "z"]) == [0.0, 0.0]


def test_bounded_is_twice_the_probability_less_one() -> None:
    source = Gap(config(bounded=True), Scripted(lambda one, other: 1.5 if one == "good" else -1.5), PROMPT)
    p = 1 / (1 + math.exp(-1.5))
    assert scores(source, ["good"], ["bad"]) == pytest.approx([2 * p - 1])


def test_rows_without_a_reference_do_not_apply_and_failed_ones_are_missing() -> None:
    judge = Scripted(lambda one, other: None if "no" in (one, other) else 1.0)
    rewards = Gap(config(), judge, PROMPT).score(rollout(TEXTS, REFERENCES))
    ok, failed, other = int(Status.OK), int(Status.FAILED), int(Status.NOT_APPLICABLE)
    assert rewards.status.tolist() == [ok, failed, ok, ok, other]
    assert rewards.tokens[3].tolist() == [0, 0, 0]  # a text against itself, which is not asked about
    assert len(judge.questions) == 6


def test_one_failed_order_is_a_failed_row() -> None:
    rewards = Gap(config(), Scripted(lambda one, other: None if one == "a" else 1.0), PROMPT).score(
        rollout(["a"], ["b"])
    )
    assert rewards.status.tolist() == [Status.FAILED]


def test_a_column_that_is_not_there_is_named() -> None:
    bare = replace(rollout(["a"], ["b"]), columns={"answer": ["b"]})
    source = Gap(config(), Scripted(lambda one, other: 0.0), PROMPT)
    source.begin(bare)  # what is wrong is said where the ranks agree on it
    with pytest.raises(ValueError, match="no column 'reference' with references \\(it has: answer\\)"):
        source.score(bare)


def test_a_prompt_without_its_placeholders_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("{{first}} {{second}} {{which}}")
    (problem,) = config(prompt=str(tmp_path / "own.txt")).problems(Pretrained(path="p"), [])
    assert problem.path == "prompt" and "{{which}}" in problem.message


def test_a_judge_that_cannot_tell_its_answers_apart_is_refused_when_it_is_built() -> None:
    scratch = Scratch(type="scratch", vocabulary=("yes", "no", "1", "2"), hidden_size=16, num_attention_heads=2)
    context = BuildContext(load_model(scratch), scratch, 1.0, torch.device("cpu"), tokenizer=load_tokenizer(scratch))
    with pytest.raises(ValueError, match="tokenizer knows"):
        config().build(context)
