"""One score from several sources: weights, what failed, what is another task's, and the penalty on length."""

from __future__ import annotations

import math
from typing import Any

import pytest

from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.scores import scores_of
from rlhf_kit.rollout import Status

OK, FAILED, OTHER = map(int, (Status.OK, Status.FAILED, Status.NOT_APPLICABLE))


def stage(*changes: dict[str, Any], **fields: Any) -> Pairs:
    """Sources called a, b, ... ."""
    lexical = {"type": "lexical", "measure": {"type": "length", "target": 1}}
    rewards = [{**lexical, "name": name, **change} for name, change in zip("abc", changes, strict=False)]
    return Pairs.model_validate(
        {"type": "pairs", "data": {"type": "running_sums", "size": 1}, "rewards": rewards, **fields}
    )


def row(
    prompt: int = 0, length: int = 1, text: str = "", truncated: bool = False, **given: tuple[float, int]
) -> dict[str, Any]:
    found = {f"score.{name}": score for name, (score, _) in given.items()}
    found |= {f"status.{name}": status for name, (_, status) in given.items()}
    return {"prompt_index": prompt, "length": length, "text": text, "truncated": truncated, **found}


def test_a_score_is_the_weighted_sum_of_the_sources() -> None:
    scores = scores_of(stage({"weight": 2.0}, {"weight": -0.5}), [row(a=(1.0, OK), b=(4.0, OK))])
    assert scores.shares == [{"a": 2.0, "b": -2.0}] and scores.totals == [0.0]


def test_a_failure_of_a_required_source_leaves_no_score_and_never_counts_as_0() -> None:
    rows = [row(a=(1.0, OK), b=(math.nan, FAILED)), row(a=(math.nan, FAILED), b=(2.0, OK))]
    first, second = scores_of(stage({}, {"required": False}), rows).totals
    assert first == 1.0 and math.isnan(second)


def test_another_tasks_row_gets_nothing_of_a_source_and_a_row_of_none_has_no_score() -> None:
    rows = [row(a=(math.nan, OTHER), b=(3.0, OK)), row(a=(math.nan, OTHER), b=(math.nan, OTHER))]
    first, second = scores_of(stage({}, {}), rows).totals
    assert first == 3.0 and math.isnan(second)


def test_a_normalised_source_has_deviation_1_over_what_it_judged() -> None:
    rows = [row(a=(value, OK)) for value in (0.0, 4.0)] + [row(a=(math.nan, OTHER))]
    assert scores_of(stage({"normalize": "batch", "weight": 3.0}), rows).totals[:2] == [0.0, 6.0]
    same = [row(a=(5.0, OK)), row(a=(5.0, OK))]
    assert scores_of(stage({"normalize": "batch"}), same).totals == [5.0, 5.0]


def test_the_penalty_on_length_is_a_share_and_closes_the_gap() -> None:
    # By score alone the longer is best in both groups; at alpha 1/2 the first group turns round: 3 - 8/2 < 0 - 1/2.
    rows = [row(0, 8, "x", a=(3.0, OK)), row(0, 1, "x", a=(0.0, OK))]
    rows += [row(1, 9, "x", a=(40.0, OK)), row(1, 2, "x", a=(0.0, OK))]
    scores = scores_of(stage({}, length_debias="tokens"), rows)
    assert scores.debias.gap_before == 7.0 and scores.debias.gap == 0.0
    for share, total, length in zip(scores.shares, scores.totals, (8, 1, 9, 2), strict=True):
        assert share["length_penalty"] == pytest.approx(-scores.debias.alpha * length)
        assert total == pytest.approx(share["a"] + share["length_penalty"])
    assert scores.totals[0] < scores.totals[1] and scores.totals[2] > scores.totals[3]
    characters = scores_of(stage({}, length_debias="characters"), rows)
    assert characters.debias.alpha == 0  # all texts are equally long


def test_completions_that_are_cut_off_do_not_shape_the_penalty_unless_they_may_be_chosen() -> None:
    """Of what is left the longer is best; with the long and bad ones that were cut off, the shorter would be."""
    rows = [row(0, 8, a=(3.0, OK)), row(0, 1, a=(0.0, OK)), row(0, 20, "", True, a=(-9.0, OK))]
    dropped, kept = (
        scores_of(stage({}, length_debias="tokens", select={"type": "best_worst", "truncated": what}), rows).debias
        for what in ("drop", "keep")
    )
    assert dropped.alpha > 0 and dropped.gap_before == 7 and kept.alpha < 0 and kept.gap_before == -12
