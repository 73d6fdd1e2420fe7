"""Yes/no rewards are the judge's probabilities of the two words, on the completion or on its segments."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.judges.local import first_tokens
from rlhf_kit.models.config import Pretrained
from rlhf_kit.rewards import RewardConfig
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rewards.yes_no import YesNo, YesNoConfig, margin_of
from rlhf_kit.rollout import Rollout, Status

from .reading import reader, rollout_of_texts

torch.set_num_threads(1)
POLICY = Pretrained(path="policy")
TEXTS = ["I like it. The film was good!", "no", "the story was bad"]


def config(**fields: Any) -> YesNoConfig:
    value = {"type": "yes_no", "judge": {"type": "policy"}, "questions": "Is it good?", **fields}
    return TypeAdapter(RewardConfig).validate_python(value)


@pytest.fixture(scope="module")
def context(talker: Path) -> BuildContext:
    return reader(talker)


@pytest.fixture(scope="module")
def rollout(context: BuildContext) -> Rollout:
    prompts = ["The film:", [{"role": "user", "content": "And?"}], "Well, {{completion}}"]
    return rollout_of_texts(context, prompts, TEXTS)


class Scripted(Judge):
    """Answers by a function of the question; counts how often it was asked."""

    def __init__(self, answer: Callable[[Question], Answer]) -> None:
        self.answer = answer
        self.questions: list[Question] = []

    def ask(self, questions: Sequence[Question]) -> Callable[[], list[Answer]]:
        self.questions += questions
        return lambda: [self.answer(question) for question in questions]


def content(question: Question) -> str:
    (message,) = question.messages
    return message["content"]


def test_the_reward_is_the_probability_of_a_yes_on_the_last_action_token(
    context: BuildContext, rollout: Rollout, talker: Path
) -> None:
    """Against one plain forward a row of the same prompt: `P(yes) / (P(yes) + P(no))`, summed over forms."""
    source = config().build(context)
    assert source.kind == "outcome"
    rewards = source.score(rollout)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talker), AutoTokenizer.from_pretrained(talker)
    expected = torch.zeros_like(rewards.tokens)
    for row, question in enumerate(source._questions(rollout)):
        ids = tokenizer(f"<|user|>{content(question)}<|end|><|assistant|>", return_tensors="pt")["input_ids"]
        with torch.no_grad():
            probabilities = model(ids).logits[0, -1].softmax(0)
        yes, no = (probabilities[tokens].sum() for tokens in first_tokens(tokenizer, ["Yes", "No"]))
        expected[row, int(rollout.action_mask[row].sum()) - 1] = yes / (yes + no)
    torch.testing.assert_close(rewards.tokens, expected, atol=1e-5, rtol=1e-5)
    assert rewards.status.tolist() == [Status.OK] * 3
    assert rewards.metrics["yes"] == pytest.approx(expected.sum().item() / 3, abs=1e-5)
    assert source.judges()["judge"].metrics()["calls"] == 3


def test_swapping_the_words_turns_p_into_one_minus_p_exactly(context: BuildContext, rollout: Rollout) -> None:
    straight = config(scale=10, center=0.5).build(context).score(rollout).tokens
    swapped = config(scale=10, center=0.5, yes="No", no="Yes").build(context).score(rollout).tokens
    assert torch.equal(straight, -swapped)
    assert straight.abs().sum() > 0.1


@pytest.mark.parametrize("margin", [0.0, 1e-9, 0.3, 20.0, 1e4])
def test_the_sigmoid_is_odd_about_one_half_and_does_not_overflow(margin: float) -> None:
    one, other = Answer(log_probs=(margin - 5, -5.0)), Answer(log_probs=(-5.0, margin - 5))
    assert margin_of(one) == -margin_of(other)
    assert 0.5 + margin_of(one) == pytest.approx(1 / (1 + math.exp(-margin)), abs=1e-12)


def test_several_questions_are_averaged_in_probability_and_then_scaled(rollout: Rollout) -> None:
    odds = {"good": 0.2, "long": 0.9}

    def answer(question: Question) -> Answer:
        p = next(p for word, p in odds.items() if f"Is it {word}?" in content(question))
        return Answer(log_probs=(math.log(p), math.log(1 - p)))

    source = YesNo(config(questions=["Is it good?", "Is it long?"], scale=10, center=0.5), Scripted(answer), PROMPT)
    assert source.score(rollout).tokens.sum(dim=1).tolist() == pytest.approx([10 * (0.55 - 0.5)] * 3)


PROMPT = "{{prompt}} / {{completion}} / {{question}} {{answers}}"


def test_a_row_with_a_failed_question_is_missing(rollout: Rollout) -> None:
    def answer(question: Question) -> Answer:
        return Answer(error="hung up") if "story" in content(question) else Answer(log_probs=(0.0, 0.0))

    rewards = YesNo(config(), Scripted(answer), PROMPT).score(rollout)
    assert rewards.status.tolist() == [Status.OK, Status.OK, Status.FAILED]
    assert rewards.tokens.sum(dim=1).tolist() == [0.5, 0.5, 0.0]
    assert rewards.metrics["yes"] == 0.5
    by_sentence = config(segments={"by": "sentence"})
    rewards = YesNo(by_sentence, Scripted(answer), PROMPT + "{{segment}}").score(rollout)
    assert rewards.status.tolist() == [Status.OK, Status.OK, Status.FAILED]
    assert rewards.tokens[2].tolist() == [0.0] * rewards.tokens.shape[1]


def test_segments_are_asked_about_one_by_one_and_rewarded_where_they_end(rollout: Rollout) -> None:
    def answer(question: Question) -> Answer:
        good = "film was good" in content(question).split("SEGMENT")[1]
        return Answer(log_probs=(-1.0, -1.0 - math.log(3)) if good else (-1.0, -1.0))

    judge = Scripted(answer)
    source = YesNo(config(segments={"by": "sentence"}), judge, PROMPT + " SEGMENT {{segment}}")
    assert source.kind == "process" and not config(segments={"by": "sentence"}).labels_outcomes
    rewards = source.score(rollout)
    assert [[(span.start, span.end, span.reward) for span in row] for row in rewards.spans] == [
        [(0, 10, 0.5), (11, 29, 0.75)],
        [(0, 2, 0.5)],
        [(0, 17, 0.5)],
    ]
    first = next(place for place, (_, end) in enumerate(rollout.offsets[0]) if end == 10)
    last = max(place for place, (start, end) in enumerate(rollout.offsets[0]) if start < 29 <= end and start < end)
    assert {(0, first), (0, last)} == {(r, t) for r, t in rewards.tokens.nonzero().tolist() if r == 0}
    assert rewards.tokens[0, last].item() == 0.75
    assert len(judge.questions) == 4


def test_the_judge_is_asked_once_when_scoring_begins(rollout: Rollout) -> None:
    judge = Scripted(lambda question: Answer(log_probs=(0.0, -1.0)))
    source = YesNo(config(), judge, PROMPT)
    source.begin(rollout)
    assert len(judge.questions) == 3
    one = source.score(rollout)
    assert len(judge.questions) == 3
    source.begin(rollout)
    source.score(rollout.rows(0, 2))  # another rollout than the one that was begun
    assert len(judge.questions) == 8
    assert one.tokens.sum().item() == pytest.approx(3 / (1 + math.exp(-1)))


def test_the_judged_text_is_fenced_and_filled_literally(rollout: Rollout) -> None:
    judge = Scripted(lambda question: Answer(log_probs=(0.0, 0.0)))
    YesNo(config(), judge, PROMPT).score(rollout)
    prompt, completion, question = content(judge.questions[2]).split(" / ")
    assert "Well, {{completion}}\n>>>END prompt" in prompt
    assert "<<<BEGIN completion" in completion and "the story was bad\n>>>END" in completion
    assert question == "Is it good? Yes or No"
    assert judge.questions[0].choices == ("Yes", "No")
    assert "User: And?" in content(judge.questions[1])


def test_what_cannot_work_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("{{prompt}} {{question}}")
    bad = config(no=" yes", prompt=str(tmp_path / "own.txt"), segments={"by": "turn", "pattern": "x"})
    assert [problem.path for problem in bad.problems(POLICY, [])] == ["no", "segments.pattern", "prompt"]
    assert ("prompt", str(tmp_path / "own.txt"), False) in list(bad.files())
    assert list(config().problems(POLICY, [])) == []
    server = {"type": "server", "base_url": "nowhere", "model": "m"}
    assert [problem.path for problem in config(judge=server).problems(POLICY, [])] == ["judge.base_url"]
    local = {"type": "local", "model": {"path": "m"}}
    assert list(config(judge=local).files()) == [("judge.model.path", "m", True)]
    with pytest.raises(ValueError, match="questions"):
        config(questions=[])


@pytest.mark.parametrize(
    ("fields", "path", "said"),
    [
        ({"questions": ""}, "questions", "asks nothing"),
        ({"questions": ["Is it good?", " \n"]}, "questions", "asks nothing"),
        ({"yes": "  "}, "yes", "is no word"),
        ({"no": ""}, "no", "is no word"),
        ({"placement": "spread"}, "placement", "does nothing where whole completions are measured"),
        ({"per_segment": "mean"}, "per_segment", "does nothing where whole completions are measured"),
    ],
)
def test_what_asks_nothing_or_does_nothing_is_said(fields: dict[str, Any], path: str, said: str) -> None:
    (problem,) = config(**fields).problems(POLICY, [])
    assert problem.path == path and said in str(problem) and problem.remedy


def test_placement_is_that_of_segments() -> None:
    by_sentence = config(segments={"by": "sentence"}, placement="spread", per_segment="mean")
    assert list(by_sentence.problems(POLICY, [])) == []


def test_a_raw_probability_of_a_completion_is_an_outcome() -> None:
    assert config().labels_outcomes
    assert not config(scale=10, center=0.5).labels_outcomes


def test_words_that_begin_alike_are_refused_when_the_source_is_built(context: BuildContext) -> None:
    with pytest.raises(ValueError, match="both begin with the token"):
        config(yes="12", no="13").build(context)


def test_a_prompt_of_the_recipes_own_is_used(context: BuildContext, rollout: Rollout, tmp_path: Path) -> None:
    (tmp_path / "own.txt").write_text("Q {{question}} {{answers}} {{prompt}} {{completion}}\n")
    source = config(prompt=str(tmp_path / "own.txt"), yes="good", no="bad").build(context)
    assert content(source._questions(rollout)[0]).startswith("Q Is it good? good or bad (")
    assert json.dumps(source._questions(rollout)[0].choices) == '["good", "bad"]'
