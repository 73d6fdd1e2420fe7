"""How a completion is cut for a source, and how the spans that it gives back become token rewards."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from rlhf_kit.rewards.text import Judged, Segments, TextSource, TextSourceConfig, own_turns, span_rewards
from rlhf_kit.rollout import Rollout, Span, Status

OK, FAILED, NOT_APPLICABLE = int(Status.OK), int(Status.FAILED), int(Status.NOT_APPLICABLE)


def make_rollout(*rows: list[tuple[str, bool]]) -> Rollout:
    """Completions of tokens, each its text and whether the policy chose it; padding behind them."""
    width = max(map(len, rows)) + 1
    texts = ["".join(text for text, _ in row) for row in rows]
    offsets, actions, present = [], [], []
    for row, text in zip(rows, texts, strict=True):
        ends = [sum(len(piece) for piece, _ in row[: k + 1]) for k in range(len(row))]
        places = [(end - len(piece), end) for end, (piece, _) in zip(ends, row, strict=True)]
        offsets.append(places + [(len(text), len(text))] * (width - len(row)))
        actions.append([action for _, action in row] + [False] * (width - len(row)))
        present.append([True] * len(row) + [False] * (width - len(row)))
    prompt = torch.ones(len(rows), 1, dtype=torch.long)
    return Rollout(
        prompts=["p"] * len(rows),
        completions=texts,
        prompt_ids=prompt,
        prompt_mask=prompt.bool(),
        completion_ids=torch.arange(len(rows) * width).view(len(rows), width),
        completion_mask=torch.tensor(present),
        action_mask=torch.tensor(actions),
        texts=texts,
        offsets=offsets,
    )


@pytest.fixture
def conversation() -> Rollout:
    """The policy, a tool and the policy again; plain text; nothing."""
    talk = [("Ask it. ", True), ("Now, please", True), ("\n7. No. 8\n", False), ("It is 7", True), (". Yes", True)]
    return make_rollout([*talk, ("", True)], [("a b", True), (". c", True)], [("", True)])


def parts(rollout: Rollout, row: int, **fields: Any) -> list[str]:
    segments = Segments.model_validate(fields)
    return [rollout.texts[row][start:end] for start, end in segments.ranges(rollout, row)]


@pytest.mark.parametrize(
    ("by", "expected"),
    [
        ("completion", ["Ask it. Now, please\n7. No. 8\nIt is 7. Yes"]),
        ("turn", ["Ask it. Now, please", "It is 7. Yes"]),
        ("step", ["Ask it. Now, please", "It is 7. Yes"]),
        ("sentence", ["Ask it.", "Now, please", "It is 7.", "Yes"]),
        ("subsentence", ["Ask it.", "Now, please", "It is 7.", "Yes"]),
        ("token", ["Ask it. ", "Now, please", "It is 7", ". Yes"]),
    ],
)
def test_only_a_whole_completion_holds_what_a_tool_said(conversation, by, expected) -> None:
    assert parts(conversation, 0, by=by) == expected
    assert parts(conversation, 2, by=by) == []


def test_fields_of_a_segmenter_are_used(conversation) -> None:
    assert parts(conversation, 0, by="subsentence", min_words=1) == ["Ask it.", "Now,", "please", "It is 7.", "Yes"]
    assert parts(conversation, 0, by="step", pattern=r"\.") == ["Ask it.", "Now, please", "It is 7.", "Yes"]
    dates = make_rollout([("Am 3. Mai. Ja.", True)])
    assert parts(dates, 0, by="sentence", language="de") == ["Am 3. Mai.", "Ja."]
    assert parts(dates, 0, by="sentence") == ["Am 3.", "Mai.", "Ja."]


def test_own_turns(conversation) -> None:
    assert [own_turns(conversation, row) for row in range(3)] == [[(0, 19), (29, 41)], [(0, 6)], []]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"by": "sentence", "pattern": "x"}, "only for by: step, not sentence"),
        ({"by": "step", "pattern": "(x"}, "no regular expression"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(fields, said) -> None:
    (problem,) = Segments.model_validate(fields).problems()
    assert problem.path == "pattern" and said in problem.message and problem.value == fields["pattern"]
    assert problem.remedy


def test_segments_without_problems() -> None:
    assert not list(Segments().problems())
    assert not list(Segments(by="step", pattern=r"\n+").problems())
    with pytest.raises(ValidationError):
        Segments(by="subsentence", min_words=0)


def test_statuses_and_metrics_are_passed_on_and_only_judged_rows_have_rewards() -> None:
    rollout = make_rollout([("ab", True)], [("cd", True)], [("ef", True)], [("gh", True)])
    judged = Judged([[Span(0, 1, 2.0, "x")], Status.FAILED, Status.NOT_APPLICABLE, []], {"calls": 3.0})
    rewards = span_rewards(judged, rollout)
    assert rewards.tokens.tolist() == [[2, 0], [0, 0], [0, 0], [0, 0]]
    assert rewards.tokens.dtype == torch.float32
    assert rewards.status.tolist() == [OK, FAILED, NOT_APPLICABLE, OK]
    assert rewards.metrics == {"calls": 3.0}
    assert rewards.spans == [[Span(0, 1, 2.0, "x")], [], [], []]


@pytest.mark.parametrize(("placement", "expected"), [("end", [0, 0, 3]), ("start", [3, 0, 0]), ("spread", [1, 1, 1])])
def test_placement(placement, expected) -> None:
    rollout = make_rollout([("ab", True), ("cd", True), ("ef", True)])
    rewards = span_rewards(Judged([[Span(1, 5, 3.0, "x")]]), rollout, placement)
    assert rewards.tokens[0, :3].tolist() == expected


def test_the_mean_is_over_the_spans_that_reward_a_token() -> None:
    """Two of three spans lie on the policy's text: each counts half. With one span there is nothing to divide."""
    rollout = make_rollout([("ab", True), ("tool", False), ("c", True)], [("abc", True)])
    spans = [[Span(0, 2, 1.0, "x"), Span(2, 6, 10.0, "x"), Span(4, 7, 3.0, "x")], [Span(0, 3, 5.0, "x")]]
    rewards = span_rewards(Judged(spans), rollout, per_segment="mean")
    assert rewards.tokens.tolist() == [[0.5, 0, 1.5, 0], [5, 0, 0, 0]]
    assert rewards.spans == [[Span(0, 2, 0.5, "x"), Span(4, 7, 1.5, "x")], [Span(0, 3, 5.0, "x")]]
    assert span_rewards(Judged(spans), rollout).tokens.tolist() == [[1, 0, 3, 0], [5, 0, 0, 0]]


def test_a_span_outside_its_completion_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not lie within its completion of 2 characters"):
        span_rewards(Judged([[Span(0, 3, 1.0, "x")]]), make_rollout([("ab", True)]))


class VowelsConfig(TextSourceConfig):
    type: Literal["vowels"] = "vowels"

    def build(self, context) -> Vowels:
        return Vowels(self)


class Vowels(TextSource):
    def judge(self, rollout: Rollout) -> Judged:
        found = [[k for k, sign in enumerate(text) if sign in "aeiou"] for text in rollout.texts]
        return Judged([[Span(k, k + 1, 1.0, self.name) for k in row] for row in found])


def test_a_source_defines_only_how_it_judges() -> None:
    rollout = make_rollout([("banana", True), ("na", True)])
    source = VowelsConfig(name="v", placement="start", per_segment="mean").build(None)
    assert source.name == "v" and source.kind == "process" and VowelsConfig().kind == "process"
    assert source.score(rollout).tokens[0].tolist() == [0.75, 0.25, 0]
    assert VowelsConfig().build(None).score(rollout).tokens[0].tolist() == [3, 1, 0]
