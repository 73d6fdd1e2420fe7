"""`trainer.args` against the dataclasses of the installed TRL and transformers."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path

import pytest

from rlhf_kit.problems import UNSET
from rlhf_kit.trainers.args import batch_of, check_args, check_batch
from rlhf_kit.trainers.argument_source import arguments, enum_values, trackers
from rlhf_kit.trainers.config import Credit, Ppo, Sft

CLASSES = [
    "trl.SFTConfig",
    "trl.DPOConfig",
    "trl.KTOConfig",
    "trl.GRPOConfig",
    "transformers.TrainingArguments",
]


def imported(class_name: str) -> dict[str, dataclasses.Field]:
    module, name = class_name.split(".")
    fields = dataclasses.fields(getattr(importlib.import_module(module), name))
    return {field.name: field for field in fields if field.init}


def ppo(**args) -> Ppo:
    return Ppo.model_validate(
        {
            "type": "ppo",
            "model": {"type": "scratch", "vocabulary": "running_sums"},
            "data": {"type": "running_sums", "size": 8},
            "rewards": [{"type": "verifier", "verifier": "exact"}],
            "credit": {"estimator": "rloo"},
            "trainer": {"args": args},
        }
    )


def messages(stage_type: str, args: dict, objective: str = "ce") -> list[str]:
    return [str(problem) for problem in check_args(stage_type, objective, args)[1]]


@pytest.mark.slow
@pytest.mark.parametrize("class_name", CLASSES)
def test_the_arguments_read_from_source_are_those_of_the_imported_class(class_name: str) -> None:
    assert set(arguments(class_name)) == set(imported(class_name))


@pytest.mark.slow
@pytest.mark.parametrize("class_name", CLASSES)
def test_the_defaults_read_from_source_are_those_of_the_imported_class(class_name: str) -> None:
    for name, field in imported(class_name).items():
        read = arguments(class_name)[name].default
        if read is UNSET:  # computed when the class is made
            continue
        factory = field.default_factory
        actual = field.default if factory is dataclasses.MISSING else factory()
        assert read == actual, name
    unread = {name for name, argument in arguments(class_name).items() if argument.default is UNSET}
    assert unread <= {"optim"}


@pytest.mark.slow
def test_choices_read_from_source_are_those_of_the_imported_enumerations() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import IntervalStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    assert set(trackers()) == set(INTEGRATION_TO_CALLBACK)
    for enumeration in (IntervalStrategy, SchedulerType, OptimizerNames):
        assert set(enum_values(enumeration.__name__)) == {member.value for member in enumeration}


@pytest.mark.slow
@pytest.mark.parametrize("class_name", CLASSES)
def test_every_default_passes_its_own_check(class_name: str) -> None:
    """A default that the check refused would show a type or a choice that is misread."""
    stage, objective = {
        "trl.SFTConfig": ("sft", "ce"),
        "trl.DPOConfig": ("reward", "dpo"),
        "trl.KTOConfig": ("reward", "kto"),
        "trl.GRPOConfig": ("ppo", "ce"),
        "transformers.TrainingArguments": ("reward", "ce"),
    }[class_name]
    for name, argument in arguments(class_name).items():
        if argument.default is not UNSET:
            found = messages(stage, {name: argument.default}, objective)
            assert [m for m in found if "is the kit's to set" not in m] == []


@pytest.mark.parametrize(
    ("given", "read"),
    [
        ({"learning_rate": "1e-5"}, 1e-5),
        ({"learning_rate": 1}, 1),
        ({"max_steps": 1e3}, 1000),
        ({"num_train_epochs": 2}, 2),
        ({"report_to": "none"}, "none"),
        ({"report_to": ["wandb", "tensorboard"]}, ["wandb", "tensorboard"]),
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, {"num_cycles": 2}),
        ({"pad_to_multiple_of": "auto"}, "auto"),
        ({"pad_to_multiple_of": 8}, 8),
        ({"eval_steps": None}, None),
        ({"top_entropy_quantile": 0.2}, 0.2),
        ({"loss_type": "cispo"}, "cispo"),
        ({"beta": 0}, 0),
        ({"eval_strategy": "no"}, "no"),
    ],
)
def test_valid_arguments_pass_and_numbers_take_the_declared_type(given: dict, read: object) -> None:
    checked, problems = check_args("ppo", "ce", given)
    assert problems == []
    (value,) = checked.values()
    assert value == read
    assert type(value) is type(read)


@pytest.mark.parametrize(
    ("stage", "args", "fragments"),
    [
        (
            "ppo",
            {"num_generatons": 8},
            ["num_generatons: unknown argument of trl.GRPOConfig", "'num_generations'?"],
        ),
        ("sft", {"num_generations": 8}, ["unknown argument of trl.SFTConfig (value 8)"]),
        ("ppo", {"xyzzy": 1}, ["xyzzy", "its names are those of trl.GRPOConfig"]),
        (
            "sft",
            {"learning_rate": "fast"},
            ["expected a number, got text (value 'fast')", "default is 2e-05"],
        ),
        ("sft", {"learning_rate": True}, ["expected a number, got true or false"]),
        ("sft", {"max_steps": "ten"}, ["expected an integer, got text (value 'ten')"]),
        ("sft", {"max_steps": 1.5}, ["expected an integer, got a number (value 1.5)"]),
        ("sft", {"max_steps": True}, ["expected an integer, got true or false (value True)"]),
        ("sft", {"bf16": "yes"}, ["expected true or false, got text (value 'yes')"]),
        ("sft", {"bf16": 1}, ["expected true or false"]),
        ("sft", {"run_name": 5}, ["expected text, got an integer (value 5)"]),
        ("sft", {"seed": None}, ["expected an integer, got null"]),
        ("sft", {"label_names": "x"}, ["expected a list"]),
        ("sft", {"label_names": [1]}, ["expected a list"]),
        (
            "sft",
            {"lr_scheduler_type": "cosin"},
            ["not a valid choice (value 'cosin')", "did you mean 'cosine'?"],
        ),
        ("sft", {"optim": "adamw_torc"}, ["did you mean 'adamw_torch'?"]),
        ("sft", {"eval_strategy": "step"}, ["did you mean 'steps'?", "no, steps, epoch"]),
        ("sft", {"eval_strategy": False}, ["eval_strategy: expected", "got true or false"]),
        ("sft", {"packing_strategy": "bdf"}, ["did you mean 'bfd'?"]),
        ("sft", {"report_to": "wandbb"}, ["did you mean 'wandb'?"]),
        ("sft", {"report_to": ["tensorboard", "wndb"]}, ["(value 'wndb')", "did you mean 'wandb'?"]),
        ("sft", {"per_device_train_batch_size": 0}, ["must be greater than 0 (value 0)"]),
        ("sft", {"learning_rate": -1e-5}, ["must not be negative (value -1e-05)"]),
        ("sft", {"max_steps": 0}, ["max_steps: does not mean 'no steps'"]),
        ("sft", {"bf16": True, "fp16": True}, ["fp16: cannot be true beside bf16"]),
        ("sft", {"output_dir": "x"}, ["output_dir: is the kit's to set (value 'x')", "runs_dir"]),
        ("sft", {"hub_token": "abc"}, ["hub_token: is the kit's to set (value <redacted>)", "HF_TOKEN"]),
        ("sft", {"resume_from_checkpoint": "x"}, ["start the same command again"]),
        ("reward", {"beta": 0.1}, ["beta: is the kit's to set (value 0.1); set the stage's beta"]),
        ("ppo", {"beta": 0.04}, ["set credit.kl"]),
        ("ppo", {"scale_rewards": "group"}, ["set credit.scale"]),
        ("ppo", {"reward_weights": [1.0]}, ["weight of each of the rewards"]),
        ("ppo", {"multi_objective_aggregation": "normalize_then_sum"}, ["multi_objective_aggregation"]),
        ("ppo", {"mask_truncated_completions": True}, ["set truncation.policy to mask"]),
        ("ppo", {"off_policy_mask_threshold": 0.5}, ["one advantage a completion"]),
        ("ppo", {"loss_type": "vespo"}, ["takes no token-level advantages (value 'vespo')", "cispo"]),
        ("ppo", {"loss_type": "dappo"}, ["did you mean 'dapo'?"]),
        ("ppo", {"importance_sampling_level": "sequence"}, ["must be token (value 'sequence')"]),
        ("ppo", {"num_generations": None}, ["num_generations: must be a number"]),
        (
            "ppo",
            {"generation_batch_size": 8, "steps_per_generation": 1},
            ["cannot stand beside steps_per_generation"],
        ),
    ],
)
def test_invalid_arguments_are_named_with_value_and_remedy(stage: str, args: dict, fragments: list[str]) -> None:
    (message,) = messages(stage, args)
    for fragment in fragments:
        assert fragment in message


def test_null_leaves_to_the_kit_what_is_the_kits_to_set() -> None:
    assert check_args("ppo", "ce", {"scale_rewards": None, "reward_weights": None}) == ({}, [])


def test_no_message_shows_a_secret() -> None:
    secret = "hf_" + "a1B2" * 8
    for args in ({"hub_token": secret}, {"hub_tokn": secret}, {"hub_token": "anything"}):
        (message,) = messages("sft", args)
        assert secret not in message
        assert "anything" not in message


@pytest.mark.parametrize("objective", ["dpo", "nca", "kto"])
def test_the_loss_of_a_reward_stage_is_its_objective(objective: str) -> None:
    (beta,) = messages("reward", {"beta": 0.1}, objective)
    assert "set the stage's beta" in beta
    (loss,) = messages("reward", {"loss_type": "apo_zero_unpaired"}, objective)
    assert "set the stage's objective" in loss


def test_a_rollout_is_counted_as_trl_counts_it() -> None:
    stage = ppo(per_device_train_batch_size=2, gradient_accumulation_steps=3, steps_per_generation=6, num_iterations=2)
    batch = batch_of(stage, world_size=4)
    assert batch.rows_per_update == 4 * 2 * 3
    assert batch.rollout == 4 * 2 * 6
    assert batch.num_generations == 8
    assert batch.prompts_per_update == 3
    assert batch.updates_per_rollout == 4


def test_a_rollout_follows_accumulation_unless_said_otherwise() -> None:
    stage = ppo(per_device_train_batch_size=2, gradient_accumulation_steps=3)
    assert batch_of(stage, 2).rollout == 2 * 2 * 3
    assert batch_of(ppo(generation_batch_size=32), 2).rollout == 32


@pytest.mark.parametrize(
    ("world_size", "args", "fragments"),
    [
        (
            1,
            {"num_generations": 3},
            ["num_generations: does not divide the 8 completions of a rollout (value 3)", "2, 4"],
        ),
        (1, {"per_device_train_batch_size": 4}, ["does not divide the 4 completions of a rollout (value 8)"]),
        (
            3,
            {"per_device_train_batch_size": 2, "num_generations": 4},
            ["the 6 completions", "3 processes x 2 per device"],
        ),
        (2, {"generation_batch_size": 24}, ["generation_batch_size: is no multiple of 16 (value 24)"]),
        (
            1,
            {"eval_strategy": "steps", "per_device_eval_batch_size": 6, "num_generations": 4},
            ["per_device_eval_batch_size: times 1 processes is no multiple of the 4"],
        ),
    ],
)
def test_a_rollout_that_does_not_hold_whole_groups_is_refused(
    world_size: int, args: dict, fragments: list[str]
) -> None:
    (problem,) = check_batch(ppo(**args), world_size)
    for fragment in fragments:
        assert fragment in str(problem)


@pytest.mark.parametrize(
    ("world_size", "args"),
    [
        (1, {}),
        (2, {"per_device_train_batch_size": 4}),
        (1, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}),
        (1, {"per_device_train_batch_size": 2, "steps_per_generation": 4}),
        (4, {"per_device_train_batch_size": 1, "num_generations": 2}),
        (1, {"generation_batch_size": 16}),
        (1, {"eval_strategy": "steps", "num_generations_eval": 4, "per_device_eval_batch_size": 4}),
        (3, {"num_generations": 1, "per_device_train_batch_size": 5}),
    ],
)
def test_a_rollout_of_whole_groups_passes(world_size: int, args: dict) -> None:
    assert check_batch(ppo(**args), world_size) == []


def test_other_stages_have_no_rollout() -> None:
    stage = Sft.model_validate(
        {
            "type": "sft",
            "model": {"type": "scratch", "vocabulary": "running_sums"},
            "data": {"type": "running_sums", "size": 8},
            "trainer": {"args": {"gradient_accumulation_steps": 2}},
        }
    )
    assert batch_of(stage, 4).rows_per_update == 4 * 8 * 2
    assert batch_of(stage, 4).rollout == 0


ONE_A_PROMPT = {"num_generations": 1, "max_steps": 1}


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["gae", "reinforce"])
@pytest.mark.parametrize(
    ("args", "steps", "rollout"),
    [
        ({"per_device_train_batch_size": 1}, 1, 1),
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}, 3, 3),
        ({"per_device_train_batch_size": 3, "steps_per_generation": 5, "gradient_accumulation_steps": 5}, 5, 15),
        ({"per_device_train_batch_size": 1, "generation_batch_size": 1}, 1, 1),
        ({"per_device_train_batch_size": 3, "generation_batch_size": 9}, 3, 9),
        ({"per_device_train_batch_size": 1, "per_device_eval_batch_size": 3, "eval_strategy": "steps"}, 1, 1),
        ({"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}, 2, 16),
        ({}, 1, 8),
    ],
)
def test_one_completion_a_prompt_suits_any_batch(
    estimator: str, args: dict, steps: int, rollout: int, tmp_path: Path
) -> None:
    from rlhf_kit.trainers.run_ppo import ppo_args
    from rlhf_kit.trainers.setup import StageRun

    stage = ppo(**ONE_A_PROMPT, **args).model_copy(update={"credit": Credit(estimator=estimator)})  # pyright: ignore
    assert check_batch(stage, 1) == []
    built = ppo_args(stage, StageRun(tmp_path))
    assert (built.num_generations, built.num_generations_eval) == (1, 1)
    assert (built.steps_per_generation, built.generation_batch_size) == (steps, rollout)
    assert built.gradient_accumulation_steps == args.get("gradient_accumulation_steps", 1)


@pytest.mark.slow
@pytest.mark.parametrize("args", [{"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, {}])
def test_one_completion_a_prompt_differs_in_the_group_alone(args: dict, tmp_path: Path) -> None:
    from rlhf_kit.trainers.run_ppo import ppo_args
    from rlhf_kit.trainers.setup import StageRun

    one, two = (ppo_args(ppo(num_generations=n, **args), StageRun(tmp_path)).to_dict() for n in (1, 2))
    changed = {name for name in two if one[name] != two[name]}
    assert changed == {"num_generations", "num_generations_eval"}


@pytest.mark.slow
def test_one_completion_a_prompt_still_needs_a_rollout_of_whole_steps(tmp_path: Path) -> None:
    from rlhf_kit.errors import RunError
    from rlhf_kit.trainers.run_ppo import ppo_args
    from rlhf_kit.trainers.setup import StageRun

    stage = ppo(**ONE_A_PROMPT, per_device_train_batch_size=2, generation_batch_size=3)
    with pytest.raises(RunError, match=r"trainer\.args\.generation_batch_size: is no multiple of 2 \(value 3\)"):
        ppo_args(stage, StageRun(tmp_path))
