"""One process's judge fails, and the other's does not: none waits for ever, and both know the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ..distributed.conftest import launch

FOR_GOOD = ["hangs", "500", "nonsense", "none"]
COMES_BACK = ["half", "no verdict", "none", "hangs", "500", "none"]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[list[list[dict[str, Any]]]]:
    """By process, plan and rollout: what it saw."""
    folder = tmp_path_factory.mktemp("two")
    launch("cpu_ddp", str(Path(__file__).parent / "failing_on_one.py"), str(folder), json.dumps([FOR_GOOD, COMES_BACK]))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_rows_whose_judge_fails_are_missing_in_the_view_of_both(seen) -> None:
    for rank, own in ((0, "OK"), (1, "FAILED")):
        for rollout in seen[rank][0][:2]:
            assert rollout["own"] == [own] * 2 and rollout["valid"] == [rank == 0] * 2
            assert rollout["everyone"] == [True, True, False, False]
            assert rollout["sums"] == [1.0, 1.0, 0.0, 0.0]


def test_requests_are_added_up_over_processes(seen) -> None:
    """Two rows a process, each asked about once by the first and, where the server fails, twice by the second."""
    calls = [[rollout["calls"] for rollout in plans[1]] for plans in seen]
    assert calls == [[6.0, 4.0, 4.0, 6.0, 6.0, 4.0]] * 2


def test_both_stop_after_three_rollouts_above_the_failure_rate_with_the_same_words(seen) -> None:
    first, second = (plans[0] for plans in seen)
    assert len(first) == len(second) == 3
    assert first[-1] == second[-1]
    assert first[-1]["stopped"].startswith(
        "reward source 'judged' failed in more than 40% of the completions of 3 rollouts in a row (2 of 4 in the last)"
    )


def test_a_judge_that_comes_back_in_between_does_not_stop_the_run(seen) -> None:
    for rank in (0, 1):
        rollouts = seen[rank][1]
        assert ["stopped" in rollout for rollout in rollouts] == [False] * 6
        failed = [False] * 6 if rank == 0 else [True, True, False, True, True, False]
        assert [rollout["own"] for rollout in rollouts] == [["FAILED" if f else "OK"] * 2 for f in failed]
        assert [rollout["everyone"][2:] for rollout in rollouts] == [[False] * 2, [False] * 2, [True] * 2] * 2
