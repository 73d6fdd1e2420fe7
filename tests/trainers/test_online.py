"""A process reward model that learns during training: its start, its updates, and whose weights they touch."""

from __future__ import annotations

import itertools
import math
import shutil
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, TrainerCallback

from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_model
from rlhf_kit.models.scorer import add_log_prob_head, rollout_outputs
from rlhf_kit.trainers.export import export_model, export_sources

LORA = {"peft": {"type": "lora", "r": 2, "alpha": 4}}
WHOLE = {"peft": None}
NO_LEARNING = 1e-30


def even(completion_ids, **_):
    return [float(sum(ids) % 2 == 0) for ids in completion_ids]


def even_of_some(prompts, completion_ids, **_):
    """The outcome of the prompts that begin with 0, 1 or 2; the others are of another task."""
    pairs = zip(prompts, completion_ids, strict=True)
    return [float(sum(ids) % 2 == 0) if int(prompt[0]) < 3 else None for prompt, ids in pairs]


def rewards(online, function="even", **fields):
    prm = {"type": "implicit_prm", "beta": 0.5, "online": online, **fields}
    return [{"type": "function", "function": function, "bounded": True}, prm]


@pytest.fixture
def train(build):
    def make(online, function="even", callbacks=(), model=LORA, prm=None, **fields):
        trainer = build(
            functions={"even": even, "even_of_some": even_of_some},
            rewards=rewards(online, function, **(prm or {})),
            callbacks=list(callbacks),
            model=model,
            **{"credit": {"estimator": "prime"}, **fields},
        )
        trainer.train()
        return trainer

    return make


def prm_of(trainer):
    return trainer.scoring.sources[1]


# -- start -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [WHOLE, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize(
    ("dtype", "bf16"), [("float32", False), ("bfloat16", False), ("float32", True)], ids=["fp32", "bf16", "autocast"]
)
@pytest.mark.parametrize("reference", ["behaviour", "initial", "ema"])
@pytest.mark.parametrize("iterations", [1, 2])  # with two, TRL has scored the policy, and is not asked again
def test_before_it_has_learnt_every_implicit_reward_is_exactly_0(
    peft, dtype, bf16, reference, iterations, train
) -> None:
    trainer = train(
        {"learning_rate": NO_LEARNING},
        model={**peft, "dtype": dtype},
        prm={"reference": reference},
        args={
            "max_steps": 1,
            "bf16": bf16,
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 2,
            "num_iterations": iterations,
        },
    )
    (rows,) = trainer.samples
    assert len({len(row["tokens"]) for row in rows}) > 1, "completions of one length hide what padding does"
    assert {reward for row in rows for reward in row["rewards"]["implicit_prm"]} == {0.0}


def test_what_it_has_learnt_shows_in_the_same_rollout(train) -> None:
    trainer = train({"learning_rate": 1e-2}, args={"max_steps": 1})
    (rows,) = trainer.samples
    assert {reward for row in rows for reward in row["rewards"]["implicit_prm"]} != {0.0}


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [WHOLE, LORA], ids=["whole", "lora"])
def test_its_loss_falls_on_a_fixed_rollout(peft, train) -> None:
    trainer = train({"learning_rate": NO_LEARNING}, model=peft, args={"max_steps": 1, "learning_rate": NO_LEARNING})
    (rollout,) = trainer.rollouts
    update = trainer.scoring.online["implicit_prm"]
    update.optimizer.param_groups[0]["lr"] = 5e-3
    outcomes = torch.tensor(even(batch_ids(rollout)))
    steps = [update.step(rollout, outcomes, torch.ones(len(rollout), dtype=torch.bool)) for _ in range(10)]
    losses = [step["loss"] for step in steps]
    # Before the first step every summed reward is 0: what is left is the success rate of the rollout.
    rate = outcomes.mean().item()
    assert 0 < rate < 1
    assert losses[0] == pytest.approx(-rate * math.log(rate) - (1 - rate) * math.log(1 - rate), abs=1e-5)
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    assert losses[-1] < 0.95 * losses[0]


def batch_ids(rollout):
    return [ids[mask].tolist() for ids, mask in zip(rollout.completion_ids, rollout.completion_mask, strict=True)]


def test_rows_that_do_not_count_teach_it_nothing(train) -> None:
    trainer = train({"learning_rate": NO_LEARNING}, args={"max_steps": 1})
    (rollout,) = trainer.rollouts
    outcomes, valid = torch.tensor(even(batch_ids(rollout))), torch.tensor([True, False] * 4)
    gradients = []
    for labels in (outcomes, torch.where(valid, outcomes, 1 - outcomes)):
        update = trainer.scoring.online["implicit_prm"]
        recorded = update.step(rollout, labels, valid)
        gradients.append((recorded["loss"], recorded["grad_norm"]))
    assert gradients[0] == gradients[1]
    assert gradients[0][1] > 0


def test_a_step_that_is_not_finite_leaves_it_as_it_was(train) -> None:
    trainer = train({"learning_rate": 1e-2}, args={"max_steps": 1})
    (rollout,) = trainer.rollouts
    update, prm = trainer.scoring.online["implicit_prm"], prm_of(trainer)
    before = [parameter.detach().clone() for parameter in prm.trainable_parameters()]
    moments = [state["exp_avg"].clone() for state in update.optimizer.state.values()]
    rollout.logprobs["behaviour"][0, 0] = math.nan
    recorded = update.step(rollout, torch.ones(len(rollout)), torch.ones(len(rollout), dtype=torch.bool))
    assert recorded["skipped"] == 1
    assert all(map(torch.equal, before, prm.trainable_parameters()))
    assert all(map(torch.equal, moments, [state["exp_avg"] for state in update.optimizer.state.values()]))


@pytest.mark.parametrize("order", ["before_scoring", "with_policy"])
def test_rows_without_an_outcome_are_no_failures(order, train, logged) -> None:
    trainer = train(
        {"learning_rate": NO_LEARNING, "order": order},
        "even_of_some",
        prm={"offset": "none"},
        args={"max_steps": 1, "per_device_train_batch_size": 32},
    )
    (rollout,) = trainer.rollouts
    labels = even_of_some(rollout.prompts, batch_ids(rollout))
    assert None in labels
    # All rewards are 0 and there is no offset, so every row that has a label loses log 2, whatever the label; the
    # gradient tells rows with a label from those without.
    (entry,) = logged(trainer)
    assert entry["prm/implicit_prm/loss"] == pytest.approx(math.log(2), abs=1e-6)
    gone = trainer.batches[0]["tool_mask"].any(dim=1)
    assert gone.tolist() == [label is not None for label in labels]
    known = [label for label in labels if label is not None]
    assert entry["accuracy"] == pytest.approx(sum(known) / len(known))


# -- whose weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("peft", [WHOLE, LORA], ids=["whole", "lora"])
def test_neither_loss_reaches_the_other_model(peft, train) -> None:
    trainer = train({"learning_rate": 1e-2}, model=peft, args={"max_steps": 1})
    prm = prm_of(trainer).trainable_parameters()
    policy = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert not {id(p) for p in prm} & {id(p) for p in policy}
    assert not {p.data_ptr() for p in prm} & {p.data_ptr() for p in policy}
    assert all(p.grad is None and not p.requires_grad for p in prm)
    (rollout,) = trainer.rollouts
    for parameter in policy:
        parameter.grad = torch.full_like(parameter, 7.0)
    before = [parameter.detach().clone() for parameter in policy]
    update, all_rows = trainer.scoring.online["implicit_prm"], torch.ones(len(rollout), dtype=torch.bool)
    assert update.step(rollout, torch.tensor(even(batch_ids(rollout))), all_rows)["grad_norm"] > 0
    assert all((parameter.grad == 7).all() for parameter in policy)
    assert all(map(torch.equal, before, policy))
    assert all(parameter.requires_grad for parameter in policy)


def test_with_lora_policy_reference_and_prm_share_one_base_model(train, policy_path) -> None:
    trainer = train({"learning_rate": 1e-2}, prm={"reference": "initial"}, args={"max_steps": 1})
    prm = prm_of(trainer)
    assert prm.scorer.model is trainer.model is trainer.reference.model
    parameters = dict(trainer.model.named_parameters())
    adapters = {
        name: {key: p for key, p in parameters.items() if f".{name}." in key} for name in ("default", "implicit_prm")
    }
    base = {key: p for key, p in parameters.items() if "lora_" not in key}
    assert len(base) + sum(map(len, adapters.values())) == len(parameters)
    assert len(adapters["default"]) == len(adapters["implicit_prm"]) == len(prm.trainable_parameters())
    alone = AutoModelForCausalLM.from_pretrained(policy_path)
    assert sum(p.numel() for p in base.values()) == sum(p.numel() for p in alone.parameters())
    assert not any(parameter.requires_grad for parameter in base.values())
    originals = {key.replace(".base_layer", "").removeprefix("base_model.model."): p for key, p in base.items()}
    assert all(torch.equal(originals[name], p) for name, p in alone.named_parameters())


@pytest.mark.parametrize("order", ["before_scoring", "with_policy"])
def test_adapters_learn_the_same_with_gradient_checkpointing(order, train, logged, weights) -> None:
    """Layers are computed again in the backward pass, by which time another adapter may be the active one."""
    ends, norms = [], []
    for checkpointing in (False, True):
        trainer = train(
            {"learning_rate": 1e-2, "order": order},
            args={"max_steps": 3, "gradient_checkpointing": checkpointing, "num_iterations": 1},
        )
        assert isinstance(trainer.model, PeftModel)
        assert trainer.model.is_gradient_checkpointing == checkpointing
        ends.append(weights(trainer.model))
        names = {"grad_norm", "prm/implicit_prm/grad_norm", "prm/implicit_prm/loss"}
        norms.append([{name: entry[name] for name in names & set(entry)} for entry in logged(trainer)])
    assert norms[0] == [pytest.approx(entry, rel=1e-5) for entry in norms[1]]
    for name, value in ends[0].items():
        torch.testing.assert_close(
            ends[1][name], value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.mark.parametrize("peft", [WHOLE, LORA], ids=["whole", "lora"])
def test_with_policy_one_optimiser_steps_both(peft, train, logged) -> None:
    class First(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            self.state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    first = First()
    trainer = train(
        {"learning_rate": 0.03, "order": "with_policy"},
        callbacks=[first],
        model=peft,
        args={"max_steps": 1, "learning_rate": 0.002, "max_grad_norm": 0},
    )
    moved = {name: (p - first.state[name]).abs().max().item() for name, p in trainer.model.named_parameters()}
    prm = {id(parameter) for parameter in prm_of(trainer).trainable_parameters()}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:  # the gradient of A is 0 while B is 0
            assert moved[name] == pytest.approx(0.03 if id(parameter) in prm else 0.002, rel=0.02), name
    assert "prm/implicit_prm/loss" in logged(trainer)[0]


def test_with_policy_it_learns_in_the_first_pass_over_a_rollout_only(train, logged) -> None:
    trainer = train({"learning_rate": 1e-2, "order": "with_policy"}, args={"max_steps": 4, "num_iterations": 2})
    learnt = ["prm/implicit_prm/loss" in entry for entry in trainer.state.log_history if "grad_norm" in entry]
    assert learnt == [True, False, True, False]


@pytest.mark.parametrize("peft", [WHOLE, LORA], ids=["whole", "lora"])
def test_with_policy_the_momentum_of_its_optimiser_does_not_move_it_either(peft, build) -> None:
    states = []

    class Copies(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            states.append([parameter.detach().clone() for parameter in prm_of(trainer).trainable_parameters()])

    trainer = build(
        functions={"even": even},
        rewards=rewards({"learning_rate": 1e-2, "order": "with_policy"}),
        callbacks=[Copies()],
        model=peft,
        credit={"estimator": "prime"},
        args={"max_steps": 4, "num_iterations": 2},
    )
    trainer.train()
    same = [all(map(torch.equal, before, after)) for before, after in itertools.pairwise(states)]
    assert same == [True, False, True]


@pytest.mark.parametrize("peft", [WHOLE, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("order", ["before_scoring", "with_policy"])
def test_a_resumed_run_ends_with_the_weights_of_one_that_was_not_stopped(order, peft, build, tmp_path) -> None:
    def trainer() -> Any:
        return build(
            functions={"even": even},
            rewards=rewards({"learning_rate": 1e-2, "order": order}),
            model=peft,
            credit={"estimator": "prime"},
            args={"max_steps": 4, "save_strategy": "steps", "save_steps": 2},
        )

    whole, resumed = trainer(), trainer()
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoints" / "checkpoint-2"))
    parts = [(list(t.model.parameters()), prm_of(t).trainable_parameters()) for t in (whole, resumed)]
    for before, after in zip(*parts, strict=True):
        assert len(before) > 0
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("peft", [WHOLE, LORA], ids=["whole", "lora"])
def test_the_moving_average_follows_the_policy(peft, train) -> None:
    states = []

    class Copies(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **_):
            self.on_step_end(args, state, control, model)

        def on_step_end(self, args, state, control, model, **_):
            own = model.named_parameters() if peft == WHOLE else lora(model, "default").items()
            states.append({name: p.detach().clone() for name, p in own if "critic" not in name})

    trainer = train(
        {"learning_rate": 1e-2},
        callbacks=[Copies()],
        model=peft,
        prm={"reference": "ema"},
        credit={"estimator": "gae"},  # whose critic is no part of the average
        ema_decay=0.75,
    )
    start, first, second = states
    for name, average in zip(start, trainer.average.parameters(), strict=True):
        expected = 0.75 * (0.75 * start[name] + 0.25 * first[name]) + 0.25 * second[name]
        torch.testing.assert_close(average, expected, rtol=1e-6, atol=1e-7)
    # The average is what the PRM is compared with: it scores with weights of its own.
    (rollout, *_) = trainer.rollouts
    with torch.no_grad():
        assert not torch.equal(trainer.average(rollout), rollout.logprobs["behaviour"])


def passes_without_gradient(module):
    """A list that grows by one with every scoring pass of the module."""
    passes = []

    def count(_module, _args, kwargs):
        if kwargs.get("fused_lm_head") and not torch.is_grad_enabled():
            passes.append(1)

    module.register_forward_pre_hook(count, with_kwargs=True)
    return passes


@pytest.mark.parametrize("iterations", [1, 2])
def test_the_policy_is_scored_once_a_rollout(iterations, build, policy_path) -> None:
    trainer = build(
        functions={"even": even},
        rewards=rewards({"learning_rate": 1e-2}),
        credit={"estimator": "prime"},
        args={"max_steps": 1, "num_iterations": iterations},
    )
    passes = passes_without_gradient(trainer.model)
    trainer.train()
    assert len(passes) == 1


def test_a_reference_of_its_own_is_scored_once_a_rollout(train, build, policy_path, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(policy_path, other)
    export_sources(train({"learning_rate": 1e-2}, model={"path": str(other)}, args={"max_steps": 1}), tmp_path)
    prm = {"path": str(tmp_path / "prm"), "reference": "initial"}
    trainer = build(
        functions={"even": even},
        rewards=rewards({"learning_rate": 1e-2}, **prm),
        credit={"estimator": "prime"},
        args={"max_steps": 1},
    )
    passes = passes_without_gradient(prm_of(trainer)._own_reference.model)
    trainer.train()
    assert len(passes) == 1


# -- one base ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [1, 2], ids=["the base is a model", "the base is a model with an adapter"])
def test_a_trained_adapter_shares_the_policys_base(levels, train, policy_path, tmp_path) -> None:
    first = train({"learning_rate": 1e-2}, args={"max_steps": 1, "learning_rate": 1e-1})
    start = policy_path
    if levels == 2:
        export_model(first, tmp_path / "start")
        start = str(tmp_path / "start")
        first = train({"learning_rate": 1e-2}, model={**LORA, "path": start}, args={"max_steps": 1})
    export_sources(first, tmp_path)

    trainer = train(None, model={**LORA, "path": start}, prm={"path": str(tmp_path / "prm")}, args={"max_steps": 1})
    prm, (rollout,) = prm_of(trainer), trainer.rollouts
    assert prm.scorer.model is trainer.model
    assert not any(parameter.requires_grad for parameter in lora(trainer.model, "implicit_prm").values())
    alone = load_model(Pretrained.model_validate({"path": str(tmp_path / "prm")}))
    add_log_prob_head(alone)
    with torch.no_grad():
        expected, initial = rollout_outputs(alone, rollout)[0], load_model(Pretrained.model_validate({"path": start}))
        torch.testing.assert_close(prm.scorer(rollout), expected, rtol=1e-4, atol=1e-5)
        add_log_prob_head(initial)
        assert (expected - rollout_outputs(initial, rollout)[0]).abs().max() > 1e-3


def test_an_adapter_of_another_base_gets_a_model_of_its_own(train, policy_path, tmp_path) -> None:
    other = tmp_path / "other"
    shutil.copytree(policy_path, other)
    export_sources(train({"learning_rate": 1e-2}, model={**LORA, "path": str(other)}), tmp_path)
    trainer = train(None, prm={"path": str(tmp_path / "prm")}, args={"max_steps": 1})
    assert prm_of(trainer).scorer.model is not trainer.model


def lora(model, adapter):
    return {name: parameter for name, parameter in model.named_parameters() if f".{adapter}." in name}
