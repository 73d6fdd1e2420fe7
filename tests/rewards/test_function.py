"""A TRL reward function works unchanged, and lands on the last action token."""

from __future__ import annotations

import asyncio
import math
from importlib.metadata import entry_points

import pytest

from rlhf_kit.rewards.function import ENTRY_POINTS, Function, FunctionConfig
from rlhf_kit.rollout import Status


def last_tokens(rewards, rollout) -> list[float]:
    """Each row's reward on its last action token, having checked that there is none elsewhere."""
    columns = [2, 0, 1, 2]
    found = [rewards.tokens[row, column].item() for row, column in enumerate(columns)]
    assert rewards.tokens.abs().sum().item() == pytest.approx(sum(map(abs, found)))
    assert (rewards.tokens[~rollout.action_mask] == 0).all()
    return found


def test_scores_land_on_the_last_action_token(rollout) -> None:
    rewards = Function("f", lambda completions, **_: [0.5, -1, 2.0, 3.25]).score(rollout)
    assert last_tokens(rewards, rollout) == [0.5, -1.0, 2.0, 3.25]
    assert rewards.status.tolist() == [Status.OK] * 4


def test_the_function_is_called_as_trl_calls_it(rollout) -> None:
    seen = {}

    def function(prompts, completions, completion_ids, answer, **kwargs):
        seen.update(kwargs, prompts=prompts, completions=completions, completion_ids=completion_ids, answer=answer)
        return [0.0] * len(prompts)

    Function("f", function).score(rollout)
    assert seen.pop("trainer_state").global_step == rollout.step
    seen.pop("log_extra")("note", [])
    seen.pop("log_metric")("seen", 1.0)
    assert seen == {
        "prompts": ["1 =", "1 =", "0 1 =", "0 1 ="],
        "completions": ["1 2", "", "1", "3 4"],
        "completion_ids": [[5, 6, 2], [2], [5, 2], [7, 8, 2]],
        "answer": ["2", "2", "1", "0"],
        "task": ["a", "b", "a", "b"],
    }


def test_an_async_function_is_awaited(rollout) -> None:
    async def function(completions, **_):
        await asyncio.sleep(0)
        return [float(len(text)) for text in completions]

    assert last_tokens(Function("f", function).score(rollout), rollout) == [3.0, 0.0, 1.0, 3.0]


def test_none_is_a_row_of_another_task_and_no_finite_score_a_failure(rollout) -> None:
    rewards = Function("f", lambda **_: [1.0, None, math.nan, math.inf]).score(rollout)
    assert last_tokens(rewards, rollout) == [1.0, 0.0, 0.0, 0.0]
    assert rewards.status.tolist() == [Status.OK, Status.NOT_APPLICABLE, Status.FAILED, Status.FAILED]


def test_none_for_every_row_is_no_failure(rollout) -> None:
    rewards = Function("f", lambda **_: [None] * 4).score(rollout)
    assert (rewards.tokens == 0).all()
    assert rewards.status.tolist() == [Status.NOT_APPLICABLE] * 4


@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_number_of_scores_is_an_error(rollout, count) -> None:
    with pytest.raises(ValueError, match=rf"'short' returned {count} scores for 4 completions"):
        Function("short", lambda **_: [1.0] * count).score(rollout)


def test_a_function_is_found_by_name_in_python_first(context, rollout) -> None:
    config = FunctionConfig(type="function", function="brevity", weight=2.0)
    source = config.build(context(functions={"brevity": lambda completions, **_: [1.0] * len(completions)}))
    assert source.name == "brevity" and config.source_name == "brevity"
    assert last_tokens(source.score(rollout), rollout) == [1.0] * 4  # the weight is applied elsewhere
    assert FunctionConfig(type="function", function="f", name="g").source_name == "g"


def test_a_function_is_found_as_an_entry_point(context, rollout, tmp_path, monkeypatch) -> None:
    (tmp_path / "my_rewards.py").write_text("def always(completions, **_):\n    return [7.0] * len(completions)\n")
    info = tmp_path / "my_rewards-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-rewards\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{ENTRY_POINTS}]\nseven = my_rewards:always\nother = my_rewards:other\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = FunctionConfig(type="function", function="seven").build(context())
    assert last_tokens(source.score(rollout), rollout) == [7.0] * 4
    with pytest.raises(ValueError, match=r"no reward function 'eight' .*: other, seven\)"):
        FunctionConfig(type="function", function="eight").build(context())


def test_without_entry_points_the_error_says_so(context) -> None:
    assert not entry_points(group=ENTRY_POINTS)
    with pytest.raises(ValueError, match=r"none is installed.*functions=\{'eight': f\}"):
        FunctionConfig(type="function", function="eight").build(context())


def test_only_a_bounded_function_labels_outcomes() -> None:
    assert not FunctionConfig(type="function", function="f").labels_outcomes
    assert FunctionConfig(type="function", function="f", bounded=True).labels_outcomes


def test_what_a_function_logs_is_the_sources_metric(rollout) -> None:
    def function(completions, log_metric, **_):
        log_metric("length", 2)
        log_metric("length", 4)
        return [0.0] * len(completions)

    assert Function("f", function).score(rollout).metrics == {"length": 3.0}


@pytest.mark.parametrize("score", [-0.1, 1.5])
def test_a_bounded_function_that_leaves_its_bounds_is_an_error(rollout, score) -> None:
    bounded = Function("length", lambda **_: [0.0, None, 1.0, score], bounded=True)
    with pytest.raises(ValueError, match=rf"'length' returned {score}, and with bounded: true .* write bounded: false"):
        bounded.score(rollout)
    assert Function("length", lambda **_: [0.0, None, 1.0, score]).score(rollout).status.tolist().count(Status.OK) == 3
