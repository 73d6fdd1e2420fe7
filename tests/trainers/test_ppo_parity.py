"""With group-centred, group-scaled credit the trainer is TRL's GRPOTrainer: same updates, same metrics."""

from __future__ import annotations

import pytest
import torch
from transformers import set_seed
from trl import GRPOTrainer

from rlhf_kit.data.load import load_data
from rlhf_kit.data.verifiers import verify
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.trainers.run_ppo import ppo_args
from rlhf_kit.trainers.setup import StageRun

GRPO = {"estimator": "group", "scale": "group", "whiten": False}
TIMES = {"step_time"}


def exact(completions, answer, **_):
    return [verify("exact", text, {"answer": right}) for text, right in zip(completions, answer, strict=True)]


def letters(completions, **_):
    """Not for every prompt, as in a mixture of tasks."""
    return [len(text) / 10 for text in completions]


def only_some(prompts, completions, **_):
    """A reward of the prompts that begin with an even number alone."""
    pairs = zip(prompts, completions, strict=True)
    return [len(text) / 10 if int(prompt[0]) % 2 == 0 else None for prompt, text in pairs]


@pytest.fixture
def grpo(stage, tmp_path):
    """TRL's own trainer with the same arguments."""

    def make(reward_funcs, **fields):
        config = stage(**fields)
        args = ppo_args(config, StageRun(tmp_path / "trl"))
        set_seed(args.seed)
        return GRPOTrainer(
            model=load_model(config.model),
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=load_data(config.data),
            processing_class=load_tokenizer(config.model),
        )

    return make


def train_both(ours, theirs):
    """Both from the same random state: they sample with the global generator."""
    for trainer in (ours, theirs):
        set_seed(0)
        trainer.train()


def assert_same_weights(ours, theirs, before, atol=0.0):
    moved = 0.0
    for (name, mine), (_, other) in zip(ours.model.named_parameters(), theirs.model.named_parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
        moved = max(moved, (mine - before[name]).abs().max().item())
    assert moved > 1e-3, "nothing was learnt, so nothing was compared"


SETTINGS = {
    "one update a rollout": {"max_steps": 3, "per_device_train_batch_size": 16},
    "accumulation": {"gradient_accumulation_steps": 2, "max_steps": 2},
    "two iterations": {"num_iterations": 2, "max_steps": 4, "per_device_train_batch_size": 16},
    "both": {"gradient_accumulation_steps": 2, "num_iterations": 2, "steps_per_generation": 4, "max_steps": 4},
}


@pytest.mark.parametrize("args", SETTINGS.values(), ids=SETTINGS.keys())
def test_updates_and_metrics_are_those_of_grpo(args, build, grpo, weights) -> None:
    ours, theirs = build(credit=GRPO, args=args), grpo([exact], args=args)
    before = weights(ours.model)
    train_both(ours, theirs)
    assert_same_weights(ours, theirs, before)
    for mine, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        other = {name.replace("rewards/exact/", "rewards/verifier/"): value for name, value in other.items()}
        names = {name for name in other if not name.startswith("train_")} - TIMES
        assert names <= set(mine)
        assert {name: mine[name] for name in names} == pytest.approx({name: other[name] for name in names}, abs=1e-6)


def test_rewards_of_several_functions_are_weighted_as_by_grpo(build, grpo, weights) -> None:
    rewards = [
        {"type": "function", "function": "exact", "weight": 2.0},
        {"type": "function", "function": "letters", "weight": -0.5},
    ]
    args = {"max_steps": 2}
    ours = build(functions={"exact": exact, "letters": letters}, credit=GRPO, rewards=rewards, args=args)
    theirs = grpo([exact, letters], args={**args, "reward_weights": [2.0, -0.5]})
    before = weights(ours.model)
    train_both(ours, theirs)
    assert_same_weights(ours, theirs, before, atol=1e-6)


def test_a_reward_that_knows_some_prompts_only_is_used_as_by_grpo(build, grpo, weights) -> None:
    rewards = [{"type": "verifier", "verifier": "exact"}, {"type": "function", "function": "only_some"}]
    args = {"max_steps": 2, "per_device_train_batch_size": 16}
    ours = build(functions={"only_some": only_some}, credit=GRPO, rewards=rewards, args=args)
    theirs = grpo([exact, only_some], args=args)
    before = weights(ours.model)
    train_both(ours, theirs)
    # Here each source's advantage is scaled and then added; the sum may differ in its last bit.
    assert_same_weights(ours, theirs, before, atol=1e-6)
    names = ["rewards/only_some/mean", "rewards/only_some/std", "reward", "reward_std", "frac_reward_zero_std"]
    for mine, other in zip(ours.state.log_history[:-1], theirs.state.log_history[:-1], strict=True):
        assert [mine[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-6)
