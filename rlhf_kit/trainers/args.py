"""`trainer.args`: TRL's and transformers' own arguments, checked before anything is instantiated."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_kit.problems import Problem, did_you_mean, listed
from rlhf_kit.trainers.argument_source import Argument, arguments, enum_values, trackers
from rlhf_kit.trainers.config import Ppo, Preference, Reward, TrainingStage

TOKEN_LEVEL_LOSSES = ("dapo", "grpo", "bnpo", "dr_grpo", "cispo")

_PREFERENCE_CLASSES = {"dpo": "trl.DPOConfig", "kto": "trl.KTOConfig"}
_REWARD_CLASSES = {"dpo": "trl.DPOConfig", "nca": "trl.DPOConfig", "kto": "trl.KTOConfig"}

# What the kit itself decides, and where a recipe says it instead.
_RESERVED = {
    "output_dir": "set the recipe's name and runs_dir",
    "resume_from_checkpoint": "start the same command again: it goes on from the last checkpoint",
    "ignore_data_skip": "leave it out: a resumed run goes on at the next row",
    "save_only_model": "checkpoints must hold all that resuming needs; model/ holds the model alone",
    "hub_token": "set HF_TOKEN in the environment: a secret does not belong in a recipe",
    "model_init_kwargs": "set the fields of `model`",
    "trust_remote_code": "set model.trust_remote_code",
}
_RESERVED_BY_STAGE = {
    "sft": {},
    "reward": {"beta": "set the stage's beta", "loss_type": "set the stage's objective"},
    "segment": {},
    "preference": {
        **dict.fromkeys(("beta", "loss_type", "loss_weights", "label_smoothing"), "set it in the stage's objective"),
        **dict.fromkeys(("desirable_weight", "undesirable_weight"), "set it in the stage's objective"),
    },
    "ppo": {
        "beta": "set credit.kl",
        "scale_rewards": "set credit.scale",
        "reward_weights": "set the weight of each of the rewards",
        "multi_objective_aggregation": "set weight and normalize of each of the rewards",
        "mask_truncated_completions": "set truncation.policy to mask",
        "off_policy_mask_threshold": "leave it out: it needs one advantage a completion",
        "auto_find_batch_size": "lower per_device_train_batch_size",
    },
}
_POSITIVE = {
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"),
    *("num_train_epochs", "logging_steps", "save_steps", "eval_steps", "max_length", "max_completion_length"),
    *("num_generations", "num_generations_eval", "num_iterations", "steps_per_generation"),
    *("generation_batch_size", "temperature"),
}
_NOT_NEGATIVE = {"learning_rate", "weight_decay", "warmup_steps", "max_grad_norm", "epsilon"}


_IN_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "text",
    "list": "a list",
    "dict": "a mapping",
}


def config_class(stage_type: str, objective: str = "ce") -> str:
    """The dataclass whose fields a stage's `trainer.args` are."""
    if stage_type == "segment":
        return "transformers.TrainingArguments"
    if stage_type == "preference":
        return _PREFERENCE_CLASSES.get(objective, "transformers.TrainingArguments")
    if stage_type == "reward":
        return _REWARD_CLASSES.get(objective, "transformers.TrainingArguments")
    return {"sft": "trl.SFTConfig", "ppo": "trl.GRPOConfig"}[stage_type]


def check_args(stage_type: str, objective: str, args: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The arguments with numbers of the declared type (`"1e-5"` is a float), and all that is wrong with them.

    Paths of the problems are relative to `trainer.args`.
    """
    class_name = config_class(stage_type, objective)
    known = arguments(class_name)
    reserved = {**_RESERVED, **_RESERVED_BY_STAGE[stage_type]}
    checked, problems = dict(args), []
    for name, value in args.items():
        if name in reserved and value is None:
            del checked[name]
        elif name in reserved and value != 0:
            problems.append(Problem(name, "is the kit's to set", value, reserved[name]))
        elif name not in known:
            remedy = did_you_mean(name, set(known) - set(reserved), f"its names are those of {class_name}")
            problems.append(Problem(name, f"unknown argument of {class_name}", value, remedy))
        else:
            accepted, checked[name] = _accept(ast.parse(known[name].annotation, mode="eval").body, value)
            problem = _value_problem(known[name], checked[name]) if accepted else _type_problem(known[name], value)
            problems += [problem] if problem else []
    return checked, problems + _conflicts(stage_type, checked)


def _accept(annotation: ast.expr, value: Any) -> tuple[bool, Any]:
    """Whether the value fits the annotation, and the value as that type; anything exotic is accepted."""
    match annotation:
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            results = [_accept(left, value), _accept(right, value)]
            fitting = [result for result in results if result[0]]
            unchanged = [result for result in fitting if type(result[1]) is type(value)]
            return (unchanged or fitting or [(False, value)])[0]
        case ast.Constant(value=None):
            return value is None, value
        case ast.Name(id="bool" | "str" | "dict" | "list" as name):
            return isinstance(value, {"bool": bool, "str": str, "dict": dict, "list": list}[name]), value
        case ast.Name(id="int"):
            whole = isinstance(value, float) and value.is_integer()
            return (True, int(value)) if whole else (type(value) is int, value)
        case ast.Name(id="float"):
            return _accept_float(value)
        case ast.Subscript(value=ast.Name(id="dict")):
            return isinstance(value, dict), value
        case ast.Subscript(value=ast.Name(id="list"), slice=item) if isinstance(value, list):
            results = [_accept(item, element) for element in value]
            return all(fits for fits, _ in results), [element for _, element in results]
        case ast.Subscript(value=ast.Name(id="list")):
            return False, value
        case ast.Subscript(value=ast.Name(id="Literal"), slice=options):
            return value in list(ast.literal_eval(f"({ast.unparse(options)},)")), value
        case ast.Name(id=name) if enum_values(name):
            return isinstance(value, str), value
    return True, value


def _accept_float(value: Any) -> tuple[bool, Any]:
    if isinstance(value, str):
        try:
            return True, float(value)
        except ValueError:
            return False, value
    return isinstance(value, int | float) and not isinstance(value, bool), value


def _type_problem(argument: Argument, value: Any) -> Problem:
    got = {bool: "true or false", str: "text", dict: "a mapping", list: "a list", type(None): "null"}
    found = got.get(type(value), "an integer" if isinstance(value, int) else "a number")
    wanted = argument.annotation.replace(" | None", "").replace("None | ", "")
    for name, words in _IN_WORDS.items():
        wanted = re.sub(rf"\b{name}\b(\[[^]]*\])?", words, wanted)
    wanted = wanted.replace(" | ", " or ")
    default = "" if argument.default in (None, []) else f"; its default is {argument.default}"
    return Problem(argument.name, f"expected {wanted}, got {found}", value, f"write {wanted}{default}")


def _value_problem(argument: Argument, value: Any) -> Problem | None:
    name, choices = argument.name, _choices(argument)
    wrong = [item for item in (value if isinstance(value, list) else [value]) if item not in choices]
    if choices and wrong and value is not None:
        remedy = f"{did_you_mean(wrong[0], choices)} (choices: {listed(choices)})".strip()
        return Problem(name, "not a valid choice", wrong[0], remedy)
    if isinstance(value, str | list | dict) or value is None:
        return None
    if name in _POSITIVE and not value > 0:
        return Problem(name, "must be greater than 0", value, f"its default is {argument.default}")
    if name in _NOT_NEGATIVE and not value >= 0:
        return Problem(name, "must not be negative", value, f"its default is {argument.default}")
    if name == "max_steps" and value == 0:
        return Problem(name, "does not mean 'no steps'", value, "transformers would train num_train_epochs; say so")
    return None


def _choices(argument: Argument) -> tuple[str, ...]:
    if argument.name == "report_to":
        return ("none", "all", *trackers())
    if argument.name == "debug":  # several options in one text
        return ()
    names = {node.id for node in ast.walk(ast.parse(argument.annotation)) if isinstance(node, ast.Name)}
    return argument.choices or tuple(value for name in sorted(names) for value in enum_values(name))


def _conflicts(stage_type: str, args: Mapping[str, Any]) -> list[Problem]:
    """Values that are valid, but not for this stage or not together."""
    problems = []
    if args.get("bf16") is True and args.get("fp16") is True:
        problems.append(Problem("fp16", "cannot be true beside bf16", True, "keep one of the two"))
    strategies = [args.get(f"{what}_strategy", "no" if what == "eval" else "steps") for what in ("eval", "save")]
    if args.get("load_best_model_at_end") is True and (strategies[0] == "no" or "save_strategy" not in args):
        remedy = "set eval_strategy and save_strategy to the same value, e.g. steps, and eval_steps and save_steps"
        problems.append(Problem("load_best_model_at_end", "needs evaluations and checkpoints", True, remedy))
    elif args.get("load_best_model_at_end") is True and strategies[0] != strategies[1] != "best":
        problems.append(Problem("save_strategy", f"must be eval_strategy's ({strategies[0]})", strategies[1]))
    if stage_type != "ppo":
        return problems
    if not 0 < args.get("top_p", 1.0) <= 1:
        problems.append(Problem("top_p", "must be above 0 and at most 1", args["top_p"], "write 1.0 for no limit"))
    if args.get("use_liger_kernel"):
        remedy = "remove it: log-probabilities already come without the logits of all tokens"
        problems.append(Problem("use_liger_kernel", "has no place for token-level advantages", True, remedy))
    loss = args.get("loss_type", "dapo")
    if loss not in TOKEN_LEVEL_LOSSES:
        remedy = f"{did_you_mean(loss, TOKEN_LEVEL_LOSSES)} (choices: {listed(TOKEN_LEVEL_LOSSES)})".strip()
        problems.append(Problem("loss_type", "takes no token-level advantages", loss, remedy))
    level = args.get("importance_sampling_level", "token")
    if level != "token":
        remedy = "write token: advantages differ from token to token"
        problems.append(Problem("importance_sampling_level", "must be token", level, remedy))
    if args.get("num_generations", 8) is None:
        problems.append(Problem("num_generations", "must be a number", None, "write the completions per prompt"))
    if args.get("steps_per_generation") is not None and args.get("generation_batch_size") is not None:
        remedy = "keep one of the two"
        value = args["generation_batch_size"]
        problems.append(Problem("generation_batch_size", "cannot stand beside steps_per_generation", value, remedy))
    return problems


# --- batch arithmetic ---


@dataclass(frozen=True)
class Batch:
    """How rows are divided: over processes, devices and accumulation steps, and for `ppo` over rollouts.

    Attributes:
        processes: the world size.
        per_device: rows of one forward and backward pass.
        accumulation: passes per optimiser update.
        num_generations: completions per prompt (1 outside `ppo`).
        rollout: completions that are sampled at once, over all processes (0 outside `ppo`).
        iterations: how often a rollout is gone through.
    """

    processes: int
    per_device: int
    accumulation: int
    num_generations: int = 1
    rollout: int = 0
    iterations: int = 1

    @property
    def rows_per_update(self) -> int:
        """Rows (completions) that one optimiser update sees."""
        return self.processes * self.per_device * self.accumulation

    @property
    def prompts_per_update(self) -> float:
        """Prompts that one optimiser update sees."""
        return self.rows_per_update / self.num_generations

    @property
    def updates_per_rollout(self) -> float:
        """Optimiser updates made from one rollout."""
        return self.rollout * self.iterations / self.rows_per_update


def argument(stage: TrainingStage, name: str) -> Any:
    """An argument of the stage's trainer: as the recipe gives it, or else the dataclass's default."""
    if name in stage.trainer.args:
        return stage.trainer.args[name]
    objective = stage.objective if isinstance(stage, Reward) else "ce"
    objective = stage.objective.type if isinstance(stage, Preference) else objective
    class_name = config_class(stage.type, objective)
    return arguments(class_name)[name].default


def measures_loss(stage: TrainingStage) -> bool:
    """Whether the stage's trainer measures the loss on its `eval_data`."""
    return argument(stage, "eval_strategy") != "no" or bool(argument(stage, "eval_on_start"))


def batch_of(stage: TrainingStage, world_size: int) -> Batch:
    """The stage's batch arithmetic on `world_size` processes, as TRL computes it."""
    per_device = argument(stage, "per_device_train_batch_size")
    accumulation = argument(stage, "gradient_accumulation_steps")
    if not isinstance(stage, Ppo):
        return Batch(world_size, per_device, accumulation)
    rollout = argument(stage, "generation_batch_size")
    if rollout is None:
        steps = argument(stage, "steps_per_generation")
        rollout = world_size * per_device * (accumulation if steps is None else steps)
    num_generations = argument(stage, "num_generations")
    return Batch(world_size, per_device, accumulation, num_generations, rollout, argument(stage, "num_iterations"))


def check_batch(stage: Ppo, world_size: int) -> list[Problem]:
    """Whether every rollout holds whole groups of completions; paths are relative to `trainer.args`."""
    batch = batch_of(stage, world_size)
    group, forward = batch.num_generations, world_size * batch.per_device
    problems = []
    if batch.rollout % forward:
        remedy = f"{world_size} processes x {batch.per_device} rows: write a multiple of {forward}"
        problems.append(Problem("generation_batch_size", f"is no multiple of {forward}", batch.rollout, remedy))
    elif batch.rollout % group:
        steps = batch.rollout // forward
        what = f"does not divide the {batch.rollout} completions of a rollout"
        product = f"{world_size} processes x {batch.per_device} per device x {steps} per generation"
        divisors = [d for d in range(2, batch.rollout + 1) if batch.rollout % d == 0] or [1]
        nearest = sorted(divisors, key=lambda d: abs(d - group))[:3]
        remedy = f"{product}: change one of them, or write {listed(sorted(nearest))}"
        problems.append(Problem("num_generations", what, group, remedy))
    if argument(stage, "eval_strategy") != "no":
        evaluated = world_size * argument(stage, "per_device_eval_batch_size")
        group = argument(stage, "num_generations_eval") or group
        if evaluated % group:
            what = f"times {world_size} processes is no multiple of the {group} completions per prompt"
            remedy = f"write a multiple of {group}, or set num_generations_eval"
            problems.append(Problem("per_device_eval_batch_size", what, evaluated // world_size, remedy))
    return problems
