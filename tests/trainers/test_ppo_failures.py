"""What is not finite, out of the band, cut off or not judged: nothing is learnt from what is not known."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import TrainerCallback

from rlhf_kit.errors import RunError

HUGE = 3e38


def words(completions, **_):
    return [len(text.split()) / 5 for text in completions]


class Steps(TrainerCallback):
    """Weights and optimiser state before the first and after each update."""

    def __init__(self):
        self.weights, self.moments = [], []

    def on_train_begin(self, args, state, control, model, optimizer, **_):
        self._keep(model, optimizer)

    def on_step_end(self, args, state, control, model, optimizer, **_):
        self._keep(model, optimizer)

    def _keep(self, model, optimizer):
        self.weights.append([parameter.detach().clone() for parameter in model.parameters()])
        state = optimizer.state_dict()["state"]
        self.moments.append([value.clone() for entry in state.values() for value in entry.values()])

    def unchanged(self, step):
        """Whether update `step`, counted from 1, left every bit as it was."""
        pairs = [(self.weights[step - 1], self.weights[step]), (self.moments[step - 1], self.moments[step])]
        return all(len(before) == len(after) and all(map(_same, before, after)) for before, after in pairs)


def _same(one, other):
    return torch.equal(one.nan_to_num(nan=7.5), other.nan_to_num(nan=7.5))


def in_rollouts(*numbers):
    """A reward function whose rewards cannot be summed in float32, in these of its rollouts, for one prompt."""
    seen = []

    def sometimes_huge(prompts, completions, **_):
        seen.append(None)
        huge = [len(seen) in numbers and prompt == prompts[0] for prompt in prompts]
        return [HUGE if extreme else score for extreme, score in zip(huge, words(completions), strict=True)]

    return {"sometimes_huge": sometimes_huge}


SOMETIMES_HUGE = [{"type": "function", "function": "sometimes_huge"}]


# -- not finite --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("credit", [{"whiten": False}, {"whiten": True}, {"estimator": "gae"}], ids=str)
def test_a_loss_that_is_not_finite_changes_nothing(accumulate, credit, build, logged) -> None:
    steps = Steps()
    trainer = build(
        functions=in_rollouts(2),
        callbacks=[steps],
        rewards=SOMETIMES_HUGE,
        credit=credit,
        args={"max_steps": 3, "gradient_accumulation_steps": accumulate, "weight_decay": 0.1},
    )
    trainer.train()
    assert [steps.unchanged(step) for step in (1, 2, 3)] == [False, True, False]
    assert [entry["skipped_steps"] for entry in logged(trainer)] == [0, 1, 1]
    assert trainer.guard.skipped == 1
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_a_gradient_that_is_not_finite_changes_nothing(build) -> None:
    steps = Steps()
    trainer = build(
        functions={"words": words},
        callbacks=[steps],
        rewards=[{"type": "function", "function": "words"}],
        args={"max_steps": 3, "weight_decay": 0.1},
    )
    spoil = [False, True, False]
    trainer.model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan if spoil.pop(0) else gradient)
    trainer.train()
    assert [steps.unchanged(step) for step in (1, 2, 3)] == [False, True, False]
    assert trainer.guard.skipped == 1


def test_weights_that_are_not_finite_do_not_spread(build) -> None:
    steps = Steps()

    class Spoil(TrainerCallback):
        """Between the two passes over a rollout, for a broken policy cannot generate."""

        def on_step_begin(self, args, state, control, model, **_):
            if state.global_step == 1:
                with torch.no_grad():
                    model.model.norm.weight[3] = math.nan

    trainer = build(
        functions={"words": words},
        callbacks=[Spoil(), steps],
        rewards=[{"type": "function", "function": "words"}],
        args={"max_steps": 2, "num_iterations": 2, "weight_decay": 0.1},
    )
    trainer.train()
    spoilt = [[not parameter.isfinite().all() for parameter in weights].count(True) for weights in steps.weights]
    assert spoilt == [0, 0, 1]
    assert all(moment.isfinite().all() for moment in steps.moments[2])
    assert trainer.guard.skipped == 1


def test_too_many_skipped_updates_stop_the_run(build) -> None:
    trainer = build(
        functions=in_rollouts(1, 3),
        rewards=SOMETIMES_HUGE,
        args={"max_steps": 5},
        max_skipped_steps=1,
    )
    with pytest.raises(RunError, match=r"2 updates were skipped .*step 2.*max_skipped_steps"):
        trainer.train()


# -- accuracy band -----------------------------------------------------------------------------------------------------


def test_a_rollout_outside_the_band_changes_nothing_and_is_no_failure(build, logged) -> None:
    def in_second_rollout_all_wrong(completions, _seen=[], **_):  # noqa: B006
        _seen.append(None)
        return [float(len(_seen) != 2 and row % 2 == 0) for row in range(len(completions))]

    steps = Steps()
    trainer = build(
        functions={"outcome": in_second_rollout_all_wrong},
        callbacks=[steps],
        rewards=[{"type": "function", "function": "outcome", "bounded": True}],
        accuracy_band={"low": 0.2, "high": 0.8},
        args={"max_steps": 3, "weight_decay": 0.1},
    )
    trainer.train()
    assert [steps.unchanged(step) for step in (1, 2, 3)] == [False, True, False]
    log = logged(trainer)
    assert [entry["credit/in_band"] for entry in log] == [1, 0, 1]
    assert [entry["credit/dropped_rows"] for entry in log] == [0, 1, 0]
    assert [entry["empty_steps"] for entry in log] == [0, 1, 0]
    assert [entry["skipped_steps"] for entry in log] == [0, 0, 0]


LOSSES = {
    "rloo": {"credit": {"estimator": "rloo"}},
    "gae, kl in loss": {"credit": {"estimator": "gae", "kl": {"coefficient": 0.1, "estimator": "k2", "where": "loss"}}},
    "prime, kl in reward": {"credit": {"estimator": "prime", "kl": {"coefficient": 0.1}}},
    "min_form": {"credit": {"estimator": "min_form", "step_pattern": " "}},
    "grpo": {"credit": {"estimator": "group", "scale": "batch"}},
}


@pytest.mark.parametrize("fields", LOSSES.values(), ids=LOSSES.keys())
@pytest.mark.parametrize("order", ["before_scoring", "with_policy"])
def test_rows_outside_the_band_are_in_no_loss_and_in_no_statistic(fields, order, build, weights, logged) -> None:
    ends, dropped = [], 0
    for score_outside in (0.0, 50.0):

        def outside(prompts):
            return [int(prompt[0]) < 2 for prompt in prompts]

        def outcome(prompts, **_):
            return [1.0 if out else float(row % 2) for row, out in enumerate(outside(prompts))]

        def score(prompts, completions, score_outside=score_outside, **_):
            pairs = zip(outside(prompts), words(completions), strict=True)
            return [score_outside if out else value for out, value in pairs]

        trainer = build(
            functions={"outcome": outcome, "score": score},
            rewards=[
                {"type": "function", "function": "outcome", "bounded": True},
                {"type": "function", "function": "score", "normalize": "running"},
                {"type": "implicit_prm", "beta": 0.3, "online": {"learning_rate": 1e-2, "order": order}},
            ],
            accuracy_band={},
            args={"max_steps": 3, "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2},
            **fields,
        )
        trainer.train()
        prm = trainer.scoring.sources[2].trainable_parameters()
        ends.append({**weights(trainer.model), **dict(enumerate(parameter.clone() for parameter in prm))})
        assert any(entry["grad_norm"] > 0 for entry in logged(trainer))
        for batch, rows in zip(trainer.batches, trainer.samples, strict=True):
            out = torch.tensor(outside([row["prompt"] for row in rows]))
            live = batch["completion_mask"].bool() & ~out[:, None]
            assert batch["num_items_in_batch"] == live.sum()
            assert torch.equal(batch["completion_mask"].bool() & batch["tool_mask"].bool(), live)
            assert not batch["advantages"][~live].any()
            dropped += int(out.sum())
    assert dropped > 0
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


# -- truncation --------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut_off(build):
    """A rollout of which the greater part is cut off after two tokens; rewards are whole numbers."""

    def make(policy, **fields):
        trainer = build(
            functions={"words": lambda completions, **_: [3.0 * len(text.split()) - 4 for text in completions]},
            rewards=[{"type": "function", "function": "words"}],
            truncation={"policy": policy, "penalty": -5.0},
            args={"max_steps": 1, "max_completion_length": 2, "learning_rate": 1e-30},
            **{"credit": {"estimator": "reinforce", "whiten": False}, **fields},
        )
        return trainer

    return make


def run(trainer):
    """Its rows, and which of them are cut off."""
    trainer.train()
    (rows,) = trainer.samples
    cut = [row["tokens"][-1] != "<eos>" for row in rows]
    assert True in cut and False in cut
    return rows, cut


def assert_advantages(rows, expected):
    """`expected` gives the return of each row that counts (None: it does not); the baseline is their tokens' mean."""
    tokens = [value for row, value in zip(rows, expected, strict=True) if value is not None for _ in row["tokens"]]
    baseline = sum(tokens) / len(tokens)
    for row, value in zip(rows, expected, strict=True):
        wanted = [0.0 if value is None else value - baseline] * len(row["tokens"])
        assert row["advantages"] == pytest.approx(wanted, abs=1e-5)


def test_truncation_terminal_treats_the_row_as_ended(cut_off) -> None:
    rows, _ = run(cut_off("terminal"))
    assert_advantages(rows, [sum(row["rewards"]["words"]) for row in rows])


def test_truncation_penalty_is_a_reward_on_the_last_token(cut_off, logged) -> None:
    trainer = cut_off("penalty")
    rows, cut = run(trainer)
    assert_advantages(rows, [sum(row["rewards"]["words"]) - 5 * c for row, c in zip(rows, cut, strict=True)])
    assert 0 < logged(trainer)[0]["credit/share/truncation"] < 1


def test_truncation_mask_takes_the_row_out(cut_off) -> None:
    trainer = cut_off("mask")
    rows, cut = run(trainer)
    assert_advantages(rows, [None if c else sum(row["rewards"]["words"]) for row, c in zip(rows, cut, strict=True)])
    live = sum(len(row["tokens"]) for row, c in zip(rows, cut, strict=True) if not c)
    assert trainer.batches[0]["num_items_in_batch"] == live


def test_truncation_bootstrap_goes_on_with_the_critics_value(cut_off) -> None:
    trainer = cut_off("bootstrap", credit={"estimator": "gae", "lam": 1.0, "gamma": 0.5, "whiten": False})
    torch.nn.init.normal_(trainer.model.critic.linear.weight)
    rows, cut = run(trainer)
    batch = trainer.batches[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        output = trainer.model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True, with_values=True)
    behind = output.state_values[:, -1].tolist()  # after two tokens were read, which a cut-off row has
    for row, c, value in zip(rows, cut, behind, strict=True):
        future = value if c else 0.0
        expected = []
        for reward in reversed(row["rewards"]["words"]):
            future = reward + 0.5 * future
            expected.insert(0, future)
        advantages = [target - value for target, value in zip(expected, row["values"], strict=True)]
        assert row["advantages"] == pytest.approx(advantages, abs=1e-5)


# -- not judged --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("credit", "left_out"),
    [
        ({"estimator": "rloo"}, 4),
        ({"estimator": "group"}, 4),
        ({"estimator": "reinforce"}, 3),
        ({"estimator": "gae"}, 3),
        ({"estimator": "reinforce", "scale": "group"}, 4),
        ({"estimator": "gae", "scale": "batch"}, 3),
    ],
    ids=str,
)
def test_a_completion_alone_in_its_group_counts_where_none_are_compared(credit, left_out, build, logged) -> None:
    def one_of_the_first(prompts, completions, **_):
        broken = [0 < place < 4 for place in range(len(prompts))]
        return [math.nan if fails else score for fails, score in zip(broken, words(completions), strict=True)]

    trainer = build(
        functions={"one_of_the_first": one_of_the_first},
        rewards=[{"type": "function", "function": "one_of_the_first"}],
        credit={"whiten": False, **credit},
        args={"max_steps": 1},
    )
    trainer.train()
    (log,) = logged(trainer)
    assert log["credit/small_groups"] == pytest.approx(1 / 8)
    assert log["credit/dropped_rows"] == pytest.approx(left_out / 8)
    first, *failed = trainer.samples[0][:4]
    assert any(first["advantages"]) == (left_out == 3)
    assert not any(value for row in failed for value in row["advantages"])


# -- runs that would end without an error and without a change -----------------------------------------------------


def test_a_run_in_which_nothing_is_ever_judged_stops(build) -> None:
    trainer = build(
        functions={"silent": lambda completions, **_: [None] * len(completions)},
        rewards=[{"type": "function", "function": "silent"}],
        args={"max_steps": 10},
    )
    with pytest.raises(RunError, match=r"no reward source judged any completion .*\(silent\)"):
        trainer.train()
    assert trainer.state.global_step < 10


def test_fewer_prompts_than_a_rollout_are_refused(build) -> None:
    data = {"type": "running_sums", "size": 1, "terms": 2, "modulus": 5, "seed": 0}
    with pytest.raises(RunError, match="1 prompts are fewer than the 2 of one rollout"):
        build(data=data)
