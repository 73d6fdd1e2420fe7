"""Every estimator trains; the critic, the KL and the schedule of updates do what they say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf_kit.models.critic import values_of_completion
from rlhf_kit.trainers.losses import value_loss

PRM = {"type": "implicit_prm", "beta": 0.3, "online": {"learning_rate": 1e-2}}


def words(completions, **_):
    """A reward that varies: how many words there are."""
    return [len(text.split()) / 5 for text in completions]


def even(completion_ids, **_):
    """An outcome that varies."""
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


FUNCTIONS = {"words": words, "even": even}
WORDS = {"type": "function", "function": "words"}
EVEN = {"type": "function", "function": "even", "bounded": True}


class Copies(TrainerCallback):
    """The policy's parameters before the first and after each update."""

    def __init__(self):
        self.states = []

    def on_train_begin(self, args, state, control, model, **_):
        self._keep(model)

    def on_step_end(self, args, state, control, model, **_):
        self._keep(model)

    def _keep(self, model):
        self.states.append({name: parameter.detach().clone() for name, parameter in model.named_parameters()})


def changed(before, after, part):
    """Names with `part` in them whose tensors differ in any bit."""
    return {name for name in before if part(name) and not torch.equal(before[name], after[name])}


def is_critic(name):
    return ".critic." in f".{name}"


def is_policy(name):
    return not is_critic(name)


ESTIMATORS = {
    "gae with a value head": {"credit": {"estimator": "gae"}},
    "gae with a model of its own": {"credit": {"estimator": "gae"}, "critic": {"type": "model"}},
    "gae, one completion a prompt": {"credit": {"estimator": "gae"}, "args": {"num_generations": 1}},
    "rloo": {"credit": {"estimator": "rloo"}},
    "group": {"credit": {"estimator": "group", "scale": "group"}},
    "reinforce": {"credit": {"estimator": "reinforce"}},
    "reinforce, one completion a prompt": {"credit": {"estimator": "reinforce"}, "args": {"num_generations": 1}},
    "prime": {"credit": {"estimator": "prime"}},
    "prime, immediate": {"credit": {"estimator": "prime", "horizon": "immediate"}},
    "min_form": {"credit": {"estimator": "min_form", "step_pattern": " "}},
}


@pytest.mark.parametrize("fields", ESTIMATORS.values(), ids=ESTIMATORS.keys())
def test_every_estimator_trains(fields, build, logged) -> None:
    copies = Copies()
    trainer = build(functions=FUNCTIONS, callbacks=[copies], rewards=[WORDS, EVEN, PRM], **fields)
    trainer.train()
    for step, entry in enumerate(logged(trainer)):
        shares = {name: value for name, value in entry.items() if name.startswith("credit/share/")}
        assert set(shares) - {"credit/share/critic"} == {
            f"credit/share/{name}" for name in ("words", "even", "implicit_prm")
        }
        assert sum(shares.values()) == pytest.approx(1)
        assert all(value is None or math.isfinite(value) for value in entry.values())
        assert changed(copies.states[step], copies.states[step + 1], is_policy)
        assert entry["skipped_steps"] == entry["empty_steps"] == 0
    assert len(copies.states) == 3


# -- critic ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["head", "model"])
@pytest.mark.parametrize("kl", [{}, {"coefficient": 0.1, "estimator": "k2", "where": "loss"}], ids=["", "kl in loss"])
def test_while_the_critic_warms_up_the_policy_stays_still(kind, kl, build) -> None:
    copies = Copies()
    trainer = build(
        functions=FUNCTIONS,
        callbacks=[copies],
        rewards=[WORDS],
        credit={"estimator": "gae", "kl": kl},
        critic={"type": kind, "warmup_steps": 3},
        args={"max_steps": 4, "weight_decay": 0.1},
    )
    if kl:
        with torch.no_grad():
            for parameter in trainer.model.lm_head.parameters():
                parameter.mul_(1.5)  # so that there is a KL divergence to reduce
    trainer.train()
    before, *after_warmup, after = copies.states
    for state in after_warmup:
        assert not changed(before, state, is_policy)
    assert changed(before, after_warmup[0], is_critic)
    assert changed(after_warmup[-1], after, is_policy)


def test_the_critic_has_its_own_learning_rate(build) -> None:
    copies = Copies()
    trainer = build(
        functions=FUNCTIONS,
        callbacks=[copies],
        rewards=[WORDS],
        credit={"estimator": "gae"},
        critic={"learning_rate": 0.03},
        args={"max_steps": 1, "learning_rate": 0.002, "max_grad_norm": 0},
    )
    trainer.train()
    before, after = copies.states
    # The first step of Adam has the size of the learning rate, whatever the gradient's.
    for name in before:
        size = (after[name] - before[name]).abs().max().item()
        assert size == pytest.approx(0.03 if is_critic(name) else 0.002, rel=0.02), name


def test_the_critic_learns_the_returns(build, logged) -> None:
    def constant(completions, **_):
        return [1.0] * len(completions)

    trainer = build(
        functions={"constant": constant},
        rewards=[{"type": "function", "function": "constant"}],
        credit={"estimator": "gae", "lam": 1.0},
        critic={"learning_rate": 0.1, "clip": None},
        args={"max_steps": 25, "learning_rate": 1e-6},
    )
    trainer.train()
    log = logged(trainer)
    # At first every value is 0 and every return 1: the loss is a half.
    assert log[0]["value/loss"] == pytest.approx(0.5)
    assert log[0]["value/mean"] == 0
    assert log[-1]["value/loss"] < 0.05  # a tenth
    assert log[-1]["value/mean"] == pytest.approx(1, abs=0.2)


def test_explained_variance_is_that_of_the_returns(build, logged) -> None:
    trainer = build(
        functions=FUNCTIONS,
        rewards=[WORDS],
        credit={"estimator": "gae", "lam": 1.0, "gamma": 1.0},
        args={"max_steps": 2, "learning_rate": 0.05},
    )
    trainer.train()
    for rows, batch, entry in zip(trainer.samples, trainer.batches, logged(trainer), strict=True):
        # With lambda 1 and the reward at the end, every return is the completion's reward.
        returns = [row["rewards"]["words"][-1] for row in rows for _ in row["tokens"]]
        values = [value for row in rows for value in row["values"]]
        returns, values = torch.tensor(returns), torch.tensor(values)
        explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
        assert entry["value/explained_variance"] == pytest.approx(explained.item(), abs=1e-5)
        live = batch["completion_mask"].bool()
        torch.testing.assert_close(batch["returns"][live], returns)


def test_a_value_reads_what_comes_before_its_token_and_nothing_else(build) -> None:
    trainer = build(functions=FUNCTIONS, rewards=[WORDS], credit={"estimator": "gae"})
    torch.nn.init.normal_(trainer.model.critic.linear.weight)
    trainer.train()
    batch = trainer.batches[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    prompt, length = batch["prompt_ids"].shape[1], batch["completion_ids"].shape[1]

    def values(ids):
        output = trainer.model(
            input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True, with_values=True
        )
        return values_of_completion(output.state_values, length)

    with torch.no_grad():
        plain = values(ids)
        assert plain.shape == batch["completion_ids"].shape
        for t in range(length):
            other = ids.clone()
            other[:, prompt + t] = (other[:, prompt + t] + 1) % 10
            differs = (values(other) != plain).any(dim=0).tolist()
            assert differs == [False] * (t + 1) + [True] * (length - t - 1)
        last_of_prompt = ids.clone()
        last_of_prompt[:, prompt - 1] = (last_of_prompt[:, prompt - 1] + 1) % 10
        assert (values(last_of_prompt) != plain)[:, 0].any()


def test_values_and_generation_are_those_of_the_plain_model(build, policy_path) -> None:
    """The critic rides on the forward pass and changes nothing of it."""
    trainer = build(functions=FUNCTIONS, rewards=[WORDS], credit={"estimator": "gae"})
    ids = torch.tensor([[4, 5, 6, 9, 7, 8]])
    options = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids, "fused_lm_head": True}
    with torch.no_grad():
        plain, with_values = trainer.model(**options), trainer.model(**options, with_values=True)
    assert torch.equal(plain.log_probs, with_values.log_probs)
    assert getattr(plain, "state_values", None) is None
    # entry i: after token i was read; the linear layer starts at 0
    assert torch.equal(with_values.state_values, torch.zeros(1, 6))


@pytest.mark.parametrize(
    ("value", "old", "target", "clip", "expected"),
    [
        (1.0, 0.0, 3.0, None, 0.5 * 4),
        (1.0, 0.0, 3.0, 0.2, 0.5 * 2.8**2),  # moved towards the return by more than the clip: the clipped error counts
        (-1.0, 0.0, 3.0, 0.2, 0.5 * 16),  # moved away: the larger, unclipped error counts
        (0.1, 0.0, 3.0, 0.2, 0.5 * 2.9**2),
    ],
)
def test_value_loss(value, old, target, clip, expected) -> None:
    loss = value_loss(torch.tensor([[value]]), torch.tensor([[old]]), torch.tensor([[target]]), clip)
    assert loss.item() == pytest.approx(expected)


# -- KL ---------------------------------------------------------------------------------------------------------------


def sharpened(trainer):
    """The trainer, its policy moved away from the reference."""
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.5)
    return trainer


def log_probs(model, batch, temperature=1.0):
    """Of the completions' tokens, from the plain logits."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1] / temperature
    all_tokens = F.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
    return all_tokens[:, -batch["completion_ids"].shape[1] :]


@pytest.mark.parametrize("peft", [None, {"type": "lora", "r": 2}], ids=["whole", "lora"])
@pytest.mark.parametrize(("dtype", "bf16"), [("float32", False), ("bfloat16", False), ("float32", True)], ids=str)
def test_at_the_start_the_kl_is_exactly_0(peft, dtype, bf16, build, logged) -> None:
    trainer = build(
        functions=FUNCTIONS,
        rewards=[WORDS],
        model={"peft": peft, "dtype": dtype},
        credit={"kl": {"coefficient": 0.1, "estimator": "k2"}},
        args={"max_steps": 2, "bf16": bf16},
    )
    trainer.train()
    first, second = logged(trainer)
    assert first["kl"] == 0.0
    assert second["kl"] > 0
    assert {value for row in trainer.samples[0] for value in row["kl"]} == {0.0}


def test_kl_in_the_reward_is_a_source_of_its_own(build, logged, policy_path) -> None:
    trainer = sharpened(
        build(
            functions=FUNCTIONS,
            rewards=[WORDS],
            credit={"estimator": "reinforce", "gamma": 0.9, "whiten": False, "kl": {"coefficient": 0.3}},
            args={"max_steps": 1, "learning_rate": 1e-30, "temperature": 0.8},
        )
    )
    trainer.train()
    (batch,), (rows,) = trainer.batches, trainer.samples
    reference = AutoModelForCausalLM.from_pretrained(policy_path)
    with torch.no_grad():
        kl = log_probs(trainer.model, batch, 0.8) - log_probs(reference, batch, 0.8)
    live = batch["completion_mask"].bool()
    assert kl[live].abs().mean() > 0.05
    for row, by_hand, mask in zip(rows, kl, live, strict=True):
        assert row["kl"] == pytest.approx(by_hand[mask].tolist(), abs=1e-5)

    def centred_returns(rewards):
        returns = []
        for row in rewards:
            future, row_returns = 0.0, []
            for reward in reversed(row):
                future = reward + 0.9 * future
                row_returns.insert(0, future)
            returns.append(row_returns)
        flat = [value for row in returns for value in row]
        return torch.tensor(flat) - sum(flat) / len(flat)

    task = centred_returns([row["rewards"]["words"] for row in rows])
    penalty = centred_returns([[-0.3 * value for value in row["kl"]] for row in rows])
    torch.testing.assert_close(batch["advantages"][live], task + penalty, rtol=1e-4, atol=1e-5)
    share = (penalty.abs().sum() / (penalty.abs().sum() + task.abs().sum())).item()
    (entry,) = logged(trainer)
    assert entry["credit/share/kl"] == pytest.approx(share, abs=1e-5)
    assert entry["kl"] == pytest.approx(kl[live].mean().item(), abs=1e-5)
    total = [sum(row["rewards"]["words"]) - 0.3 * sum(row["kl"]) for row in rows]
    assert entry["reward"] == pytest.approx(sum(total) / len(total), abs=1e-5)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_in_the_loss_adds_the_gradient_of_its_mean_over_the_rollouts_tokens(
    estimator, build, weights, policy_path
) -> None:
    args = {
        "max_steps": 1,
        "gradient_accumulation_steps": 2,
        "optim": "sgd",
        "learning_rate": 1.0,
        "max_grad_norm": 0,
        "temperature": 0.8,
    }
    ends = []
    for coefficient in (0.0, 0.3):
        kl = {"coefficient": coefficient, "estimator": estimator, "where": "loss"}
        # Some rows are dropped, and must be in no loss.
        trainer = sharpened(
            build(
                functions={
                    **FUNCTIONS,
                    "outcome": lambda prompts, **_: [float(prompt[0] == "0") for prompt in prompts],
                },
                rewards=[WORDS, {"type": "function", "function": "outcome", "bounded": True}],
                credit={"kl": kl},
                accuracy_band={"low": 0.0, "high": 0.5},
                args=args,
            )
        )
        before = AutoModelForCausalLM.from_pretrained(policy_path)
        before.load_state_dict(trainer.model.state_dict())
        trainer.train()
        ends.append(weights(trainer.model))
    (batch,) = trainer.batches
    assert len(batch["completion_ids"]) == 16
    reference = AutoModelForCausalLM.from_pretrained(policy_path)
    live = batch["completion_mask"].bool() & batch["tool_mask"].bool()
    assert set(live.any(dim=1).tolist()) == {True, False}
    difference = (log_probs(before, batch, 0.8) - log_probs(reference, batch, 0.8).detach())[live]
    penalty = {
        "k1": difference,
        "k2": difference**2 / 2,
        "k3": torch.exp(-difference) - 1 + difference,
    }[estimator]
    (0.3 * penalty.mean()).backward()
    for name, parameter in before.named_parameters():
        torch.testing.assert_close(ends[1][name] - ends[0][name], -parameter.grad, rtol=1e-3, atol=1e-5)
    assert before.lm_head.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize(("target", "error"), [(1e-4, 0.2), (1e4, -0.2)])
def test_the_coefficient_follows_its_target(target, error, build, logged) -> None:
    kl = {"coefficient": 0.1, "estimator": "k2", "target": target, "adaptation_horizon": 80}
    trainer = sharpened(build(functions=FUNCTIONS, rewards=[WORDS], credit={"kl": kl}, args={"max_steps": 3}))
    trainer.train()
    # The error is clipped at 0.2, and 8 of 80 completions are a tenth of the horizon.
    expected = [0.1 * (1 + error / 10) ** step for step in range(3)]
    assert [entry["credit/kl_coefficient"] for entry in logged(trainer)] == pytest.approx(expected)


def test_the_coefficient_follows_the_kl_of_a_completion(build, logged) -> None:
    kl = {"coefficient": 0.1, "estimator": "k2", "target": 1.0, "adaptation_horizon": 80}
    # Sampling takes no random numbers for the KL, so another target sees the same rollout.
    trainer = sharpened(build(functions=FUNCTIONS, rewards=[WORDS], credit={"kl": kl}, args={"max_steps": 1}))
    trainer.train()
    (rows,) = trainer.samples
    per_completion = sum(value**2 / 2 for row in rows for value in row["kl"]) / len(rows)
    kl["target"] = per_completion / 1.1
    trainer = sharpened(build(functions=FUNCTIONS, rewards=[WORDS], credit={"kl": kl}, args={"max_steps": 1}))
    trainer.train()
    assert trainer.kl_coefficient == pytest.approx(0.1 * (1 + 0.1 * 8 / 80), rel=1e-4)


# -- updates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "credit",
    [{"estimator": "gae", "kl": {"coefficient": 0.3, "estimator": "k3", "where": "loss"}}, {"estimator": "prime"}],
    ids=lambda credit: credit["estimator"],
)
def test_accumulation_splits_the_batch_and_changes_nothing(credit, build, weights) -> None:
    ends = []
    for size, accumulate in ((16, 1), (4, 4)):
        trainer = sharpened(
            build(
                functions=FUNCTIONS,
                rewards=[WORDS, EVEN, {**PRM, "online": {"learning_rate": 1e-30}}],
                credit=credit,
                accuracy_band={"low": 0.3, "high": 0.9},
                args={
                    "max_steps": 2,
                    "per_device_train_batch_size": size,
                    "gradient_accumulation_steps": accumulate,
                    "optim": "sgd",
                    "learning_rate": 0.05,
                    "max_grad_norm": 0,
                },
            )
        )
        before = weights(trainer.model)
        trainer.train()
        assert any("tool_mask" in batch for batch in trainer.batches)
        ends.append(weights(trainer.model))
    assert changed(before, ends[0], is_policy)
    for name, value in ends[0].items():
        torch.testing.assert_close(ends[1][name], value, rtol=1e-4, atol=1e-5)


def test_rollouts_of_several_updates_and_passes(build, logged) -> None:
    copies = Copies()
    trainer = build(
        functions=FUNCTIONS,
        callbacks=[copies],
        rewards=[WORDS, EVEN, PRM],
        credit={"estimator": "gae"},
        args={
            "max_steps": 4,
            "num_iterations": 2,
            "steps_per_generation": 2,
            "gradient_accumulation_steps": 2,
        },
    )
    trainer.train()
    assert len(trainer.batches) == 2  # each is learnt from twice
    assert [step for step, entry in enumerate(logged(trainer))] == [0, 1]
    (moments,) = {state["step"].item() for state in trainer.scoring.online["implicit_prm"].optimizer.state.values()}
    assert moments == 2  # the PRM learns once a rollout
    for before, after in itertools.pairwise(copies.states):
        assert changed(before, after, is_policy) and changed(before, after, is_critic)
    losses = [entry["value/loss"] for entry in trainer.state.log_history if "value/loss" in entry]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
