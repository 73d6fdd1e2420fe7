"""From sources to weighted rewards: failures, outcomes, the accuracy band, normalisation and weights."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from rlhf_kit.errors import RunError
from rlhf_kit.rewards.config import BuildContext, Schedule, SourceConfig
from rlhf_kit.rewards.function import FunctionConfig
from rlhf_kit.rollout import RewardSource, Rollout, Status, TokenRewards
from rlhf_kit.trainers.config import AccuracyBand
from rlhf_kit.trainers.rollouts import Ranks
from rlhf_kit.trainers.scoring import RunningScale, Scoring, in_band

GROUP = 2
NAN = float("nan")


class FixedConfig(SourceConfig):
    """A process source that gives what it is told."""

    kind: ClassVar[Literal["outcome", "process"]] = "process"
    type: Literal["fixed"] = "fixed"
    tokens: Any = None
    status: tuple[int, ...] = (0, 0, 0, 0)

    def build(self, context) -> Fixed:
        return Fixed(self)


class Fixed(RewardSource):
    """Keeps the names of all that were asked in `turns`, if it is given that list."""

    turns: list[str] | None = None

    def __init__(self, config: FixedConfig) -> None:
        self.name, self.config, self.observed = config.source_name, config, []

    def score(self, rollout):
        if self.turns is not None:
            self.turns.append(self.name)
        return TokenRewards(torch.tensor(self.config.tokens), torch.tensor(self.config.status))

    def observe(self, outcomes) -> None:
        self.observed.append(outcomes.tolist())


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    return Ranks(Accelerator(cpu=True))


@pytest.fixture
def rollout() -> Rollout:
    """Two groups of two; lengths 3, 2, 1 and 3, of which the second token of the last is not the policy's."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
    action_mask = mask.clone()
    action_mask[3, 1] = False
    ids = torch.arange(12).view(4, 3)
    return Rollout(
        prompts=["p", "p", "q", "q"],
        completions=["a b c", "d e", "f", "g h i"],
        prompt_ids=torch.zeros(4, 1, dtype=torch.long),
        prompt_mask=torch.ones(4, 1, dtype=torch.bool),
        completion_ids=ids,
        completion_mask=mask,
        action_mask=action_mask,
        columns={"answer": ["x", "x", "y", "y"]},
        group_size=GROUP,
    )


def function(name, **fields) -> FunctionConfig:
    return FunctionConfig(type="function", function=name, **fields)


@pytest.fixture
def ask(ranks):
    """Sources of functions whose scores are given, on a rollout: what they said and what becomes of it."""

    def make(rollout, *pairs, band=None):
        functions = {config.function: given for config, given in pairs if isinstance(config, FunctionConfig)}
        functions = {name: given if callable(given) else _constant(given) for name, given in functions.items()}
        context = BuildContext(torch.nn.Module(), None, 1.0, torch.device("cpu"), functions)  # pyright: ignore
        configs = [config for config, _ in pairs]
        scoring = Scoring(configs, [config.build(context) for config in configs], band, ranks)
        scores = scoring.score_outcomes(rollout)
        scoring.learn_and_score(rollout, scores)
        return scoring, scores

    return make


def _constant(scores):
    return lambda **_: scores


# -- turns -------------------------------------------------------------------------------------------------------------


class Meter:
    """A judge whose amounts are 0."""

    def __init__(self, remote: bool) -> None:
        self.remote = remote

    def metrics(self) -> dict[str, float]:
        return {"calls": 0.0}

    def used(self) -> dict[str, float]:
        return {"calls": 0.0}

    def resume(self, used) -> None:
        return


@pytest.mark.parametrize(
    ("sources", "turns"),
    [
        ("server model server2 model2", "model model2 server server2"),
        ("local server model", "local model server"),
        ("mixed server model", "mixed model server"),
        ("server model reader server2 model2", "model server reader model2 server2"),
    ],
)
def test_who_only_waits_for_a_server_is_asked_last_and_reported_where_the_recipe_has_it(
    rollout, ranks, sources: str, turns: str
) -> None:
    """A `reader` learns from what those before it gave."""
    judges = {"server": (True,), "server2": (True,), "local": (False,), "mixed": (True, False)}
    names, asked = sources.split(), []
    made = []
    for number, name in enumerate(names):
        source = FixedConfig(name=name, tokens=[[float(number), 0.0, 0.0]] * 4).build(None)
        source.turns, source.reads_rewards = asked, name == "reader"
        own = {f"judge{place}": Meter(remote) for place, remote in enumerate(judges.get(name, ()))}
        source.judges = lambda own=own: own
        made.append(source)
    scoring = Scoring([source.config for source in made], made, None, ranks)
    scores = scoring.score_outcomes(rollout)
    scoring.learn_and_score(rollout, scores)
    assert " ".join(asked) == turns
    assert list(scores.rewards) == names
    assert [name for name in scores.metrics if name.endswith("failed")] == [f"rewards/{n}/failed" for n in names]
    assert [weighted.tokens[0, 0].item() for weighted in scoring.weighted(rollout, scores)] == [*range(len(names))]


# -- functions ---------------------------------------------------------------------------------------------------------


def test_a_function_sees_what_trl_gives_it_and_scores_the_last_action_token(rollout, ask) -> None:
    seen = {}

    def judge(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions, completion_ids=completion_ids, **columns)
        return [1.0, 2.0, 3.0, 4.0]

    _, scores = ask(rollout, (function("judge"), judge))
    assert seen.pop("trainer_state").global_step == rollout.step
    seen.pop("log_extra")("note", [])
    seen.pop("log_metric")("seen", 1.0)
    assert seen == {
        "prompts": ["p", "p", "q", "q"],
        "completions": ["a b c", "d e", "f", "g h i"],
        "completion_ids": [[0, 1, 2], [3, 4], [6], [9, 10, 11]],
        "answer": ["x", "x", "y", "y"],
    }
    expected = torch.tensor([[0, 0, 1], [0, 2, 0], [3, 0, 0], [0, 0, 4]]).float()
    assert torch.equal(scores.rewards["judge"].tokens, expected)
    assert scores.valid.all()


def test_an_asynchronous_function_is_awaited(rollout, ask) -> None:
    async def judge(completions, **_):
        return [float(len(text)) for text in completions]

    _, scores = ask(rollout, (function("judge"), judge))
    assert scores.rewards["judge"].tokens.sum(dim=1).tolist() == [5, 3, 1, 5]


def test_a_row_without_an_action_token_has_no_reward_and_does_not_count(rollout, ask) -> None:
    rollout.action_mask[1] = False
    scoring, scores = ask(rollout, (function("judge", normalize="batch"), [1.0, 100.0, 3.0, 5.0]))
    assert scores.valid.tolist() == [True, False, True, True]
    (weighted,) = scoring.weighted(rollout, scores)
    assert not weighted.tokens[1].any()
    assert weighted.tokens.sum(dim=1)[scores.valid].tolist() == pytest.approx([0.5, 1.5, 2.5])


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broken", [NAN, float("inf"), -float("inf")])
def test_a_row_whose_score_is_not_finite_has_failed(broken, rollout, ask) -> None:
    scoring, scores = ask(rollout, (function("judge"), [1.0, broken, 3.0, 4.0]))
    assert scores.rewards["judge"].status.tolist() == [Status.OK, Status.FAILED, Status.OK, Status.OK]
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.metrics["rewards/judge/failed"] == 0.25
    (weighted,) = scoring.weighted(rollout, scores)
    assert weighted.tokens.isfinite().all()
    assert not weighted.tokens[1].any()


def test_what_is_not_required_may_fail(rollout, ask) -> None:
    scoring, scores = ask(
        rollout, (function("judge", required=False), [1.0, NAN, 3.0, 4.0]), (function("other"), [1.0, 2.0, 3.0, 4.0])
    )
    assert scores.valid.all()
    assert scores.metrics["rewards/judge/failed"] == 0.25
    judge, other = scoring.weighted(rollout, scores)
    assert judge.present.tolist() == [True, False, True, True]
    assert other.present.all()


def test_none_is_a_row_of_another_task_and_no_failure(rollout, ask) -> None:
    scoring, scores = ask(
        rollout, (function("judge"), [None, None, 3.0, 4.0]), (function("other"), [1.0, 2.0, 3.0, 4.0])
    )
    assert scores.rewards["judge"].status.tolist() == [Status.NOT_APPLICABLE] * 2 + [Status.OK] * 2
    assert scores.valid.all()
    assert scores.metrics["rewards/judge/failed"] == 0
    assert scoring.weighted(rollout, scores)[0].present.tolist() == [False, False, True, True]


def test_a_row_that_nobody_judged_does_not_count(rollout, ask) -> None:
    optional = function("judge", required=False)
    _, scores = ask(rollout, (optional, [None, NAN, 3.0, 4.0]), (function("other"), [None, None, None, 1.0]))
    assert scores.valid.tolist() == [False, False, True, True]


def test_a_token_that_is_not_finite_fails_its_row_unless_it_is_masked(rollout, ask) -> None:
    tokens = [[1.0, 1.0, 1.0], [1.0, 1.0, NAN], [1.0, NAN, 7.0], [1.0, NAN, 1.0]]
    _, scores = ask(rollout, (FixedConfig(tokens=tokens), None))
    assert scores.valid.all()
    assert torch.equal(scores.rewards["fixed"].tokens, rollout.action_mask.float())
    tokens[3][2] = NAN
    _, scores = ask(rollout, (FixedConfig(tokens=tokens), None))
    assert scores.valid.tolist() == [True, True, True, False]
    assert not scores.rewards["fixed"].tokens[3].any()


def test_a_source_may_say_itself_that_a_row_failed(rollout, ask) -> None:
    config = FixedConfig(tokens=[[1.0, 1.0, 1.0]] * 4, status=(0, int(Status.FAILED), int(Status.NOT_APPLICABLE), 0))
    _, scores = ask(rollout, (config, None), (function("other"), [1.0] * 4))
    assert scores.valid.tolist() == [True, False, True, True]
    assert scores.rewards["fixed"].tokens.any(dim=1).tolist() == [True, False, False, True]


def test_a_source_that_raises_stops_the_run_by_name(rollout, ask) -> None:
    def judge(**_):
        raise ConnectionError("nobody answers")

    with pytest.raises(RunError, match=r"'judge' failed on this process: nobody answers") as caught:
        ask(rollout, (function("judge"), judge))
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_a_function_that_forgets_a_row_stops_the_run(rollout, ask) -> None:
    with pytest.raises(RunError, match=r"'judge' returned 3 scores for 4 completions"):
        ask(rollout, (function("judge"), [1.0, 2.0, 3.0]))


# -- outcomes ----------------------------------------------------------------------------------------------------------


def test_outcomes_are_the_mean_of_what_the_labelling_sources_say(rollout, ask) -> None:
    _, scores = ask(
        rollout,
        (function("one", bounded=True), [1.0, 0.0, None, None]),
        (function("two", bounded=True), [0.0, 0.0, 0.5, None]),
        (function("unbounded"), [9.0, 9.0, 9.0, 9.0]),
    )
    assert scores.outcomes.tolist() == [0.5, 0.0, 0.5, 0.0]
    assert scores.labelled.tolist() == [True, True, True, False]
    assert scores.valid.all()  # the last row is judged by the third source, and nobody learns from the outcomes


def test_without_a_labelling_source_there_are_no_outcomes(rollout, ask) -> None:
    _, scores = ask(rollout, (function("judge"), [1.0, 0.0, 1.0, 0.0]))
    assert scores.outcomes is None


def test_process_sources_observe_the_outcomes_of_the_rows_that_count(rollout, ask) -> None:
    process = FixedConfig(tokens=[[1.0] * 3] * 4)
    scoring, _ = ask(rollout, (process, None), (function("judge", bounded=True), [1.0, NAN, 0.0, 0.5]))
    assert scoring.sources[0].observed == [[1.0, 0.0, 0.5]]


def test_peers_are_the_other_completions_of_the_prompt(rollout, ask) -> None:
    scoring, scores = ask(rollout, (function("judge", bounded=True), [1.0, NAN, 0.0, 0.5]))
    # The first row's only peer has failed: nothing is known.
    assert scoring.with_peers(rollout, scores).peer_outcomes[[0, 2, 3]].tolist() == [0.5, 0.5, 0.0]


@pytest.mark.parametrize(
    ("outcomes", "valid", "expected"),
    [
        ([1, 1, 1, 0, 0, 0, 0, 1], None, [True] * 8),  # accuracies 3/4 and 1/4
        ([1, 1, 1, 1, 0, 0, 0, 1], None, [False] * 4 + [True] * 4),
        ([0, 0, 0, 0, 0, 1, 0, 1], None, [False] * 4 + [True] * 4),
        # of the first group only a right and a wrong one count; of the second, three wrong ones
        ([1, 1, 1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 1, 1, 0], [True] * 4 + [False] * 4),
        ([1, 1, 1, 0, 0, 1, 0, 1], [0, 0, 0, 0, 1, 1, 1, 1], [False] * 4 + [True] * 4),  # nobody is left
    ],
)
def test_the_band_keeps_groups_by_the_accuracy_of_the_rows_that_count(outcomes, valid, expected) -> None:
    valid = torch.ones(8, dtype=torch.bool) if valid is None else torch.tensor(valid).bool()
    inside = in_band(torch.tensor(outcomes).float(), valid, 4, AccuracyBand(low=0.2, high=0.8))
    assert inside.tolist() == expected


def test_the_bounds_belong_to_the_band() -> None:
    outcomes = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
    inside = in_band(outcomes, torch.ones(8, dtype=torch.bool), 4, AccuracyBand(low=0.25, high=0.75))
    assert inside.all()


def test_rows_outside_the_band_do_not_count(rollout, ask) -> None:
    judge = function("judge", bounded=True)
    _, scores = ask(rollout, (judge, [1.0, 0.0, 1.0, 1.0]), band=AccuracyBand())
    assert scores.valid.tolist() == [True, True, False, False]
    assert scores.metrics["credit/in_band"] == 0.5
    _, scores = ask(rollout, (judge, [1.0, None, 1.0, 0.0]), band=AccuracyBand())
    assert scores.valid.tolist() == [False, False, True, True]


# -- normalisation and weights -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "expected"), [(0, 2.0), (5, 1.25), (10, 0.5), (1000, 0.5)])
def test_a_schedule_is_a_line_and_then_its_end(step, expected, rollout, ask) -> None:
    schedule = Schedule(start=2.0, end=0.5, steps=10)
    assert schedule.at(step) == pytest.approx(expected)
    later = replace(rollout, step=step)
    scoring, scores = ask(later, (function("judge", weight=schedule), [1.0, 2.0, 3.0, 4.0]))
    (weighted,) = scoring.weighted(later, scores)
    assert weighted.tokens.sum(dim=1).tolist() == pytest.approx([expected * score for score in (1, 2, 3, 4)])


def test_weights_are_applied_after_the_normalisation(rollout, ask) -> None:
    given = np.array([1.0, 2.0, 3.0, 7.0])
    scoring, scores = ask(rollout, (function("judge", weight=-3.0, normalize="batch"), given.tolist()))
    (weighted,) = scoring.weighted(rollout, scores)
    expected = -3 * given / given.std(ddof=1)
    assert weighted.tokens.sum(dim=1).numpy() == pytest.approx(expected)


def test_normalisation_reads_the_rows_that_count_and_were_judged(rollout, ask) -> None:
    scoring, scores = ask(
        rollout,
        (function("judge", normalize="batch"), [None, 2.0, 3.0, 7.0]),
        (function("other"), [1.0, NAN, 1.0, 1.0]),
    )
    judge, _ = scoring.weighted(rollout, scores)
    scale = np.std([3.0, 7.0], ddof=1)
    assert judge.tokens.sum(dim=1)[2:].numpy() == pytest.approx(np.array([3.0, 7.0]) / scale)


def test_token_rewards_are_divided_by_the_deviation_of_the_completions_sums(rollout, ask) -> None:
    tokens = [[1.0, 2.0, -1.0], [0.5, 0.5, 0.0], [4.0, 0.0, 0.0], [1.0, 0.0, 1.0]]
    scoring, scores = ask(rollout, (FixedConfig(tokens=tokens, normalize="batch"), None))
    (weighted,) = scoring.weighted(rollout, scores)
    expected = np.array(tokens) / np.std([2.0, 1.0, 4.0, 2.0], ddof=1)
    assert weighted.tokens.numpy() == pytest.approx(expected)


def test_equal_rewards_stay_as_they_are(rollout, ask) -> None:
    scoring, scores = ask(rollout, (function("judge", normalize="batch"), [3.0] * 4))
    (weighted,) = scoring.weighted(rollout, scores)
    assert weighted.tokens.sum(dim=1).tolist() == [3.0] * 4


def test_the_running_scale_is_the_deviation_of_all_that_was_seen(rollout, ask) -> None:
    batches = [[1.0, 2.0, 3.0, 7.0], [100.0, 101.0, 99.0, 100.0], [0.0, 0.0, 0.0, 0.0]]
    given = iter(batches)
    scoring, scores = ask(rollout, (function("judge", normalize="running"), lambda **_: next(given)))
    for seen in range(1, 4):
        (weighted,) = scoring.weighted(rollout, scores)
        deviation = np.std(np.concatenate(batches[:seen]), ddof=1)
        assert weighted.tokens.sum(dim=1).numpy() == pytest.approx(np.array(batches[seen - 1]) / deviation, rel=1e-5)
        if seen < 3:
            scores = scoring.score_outcomes(rollout)
            scoring.learn_and_score(rollout, scores)


def test_the_running_scale_goes_on_after_a_checkpoint() -> None:
    numbers = np.random.default_rng(0).normal(3.0, 2.0, size=(5, 7))
    scale = RunningScale()
    for row in numbers[:3]:
        scale.update(torch.tensor(row))
    restored = RunningScale()
    restored.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    for row in numbers[3:]:
        last = restored.update(torch.tensor(row))
    assert last == pytest.approx(numbers.std(ddof=1))


def test_the_running_scale_survives_rewards_that_overflow_float32() -> None:
    scale = RunningScale()
    deviation = scale.update(torch.tensor([3e38, 3e38, -3e38, 3e38]))
    assert deviation == pytest.approx(3e38)


def test_the_running_scale_of_nothing_is_1() -> None:
    assert RunningScale().update(torch.tensor([])) == 1.0
    assert RunningScale().update(torch.tensor([5.0])) == 1.0
