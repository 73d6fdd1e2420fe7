"""What a stage's fields must say together: sources that an estimator needs, group sizes, files that exist.

Each check yields problems with paths relative to the stage.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

from rlhf_kit.data.config import (
    Gsm8kSolutions,
    Perturbed,
    QaFeedback,
    ReasoningGym,
    RunningSums,
    Sampled,
    ToolArithmetic,
)
from rlhf_kit.evals.stage import Eval
from rlhf_kit.models.config import RUNNING_SUMS_MODULUS, Scratch
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.problems import Problem, RecipeError, did_you_mean, listed
from rlhf_kit.recipe_bootstrap import check_bootstrap
from rlhf_kit.recipe_files import missing_files
from rlhf_kit.recipe_preference import check_kto, check_preference
from rlhf_kit.rewards.config import source_problems
from rlhf_kit.rewards.implicit_prm import ImplicitPrmConfig
from rlhf_kit.rewards.segment_model import SegmentModelConfig
from rlhf_kit.rewards.turns import TurnsConfig
from rlhf_kit.runs.config import Recipe
from rlhf_kit.trainers.args import argument, batch_of, check_batch
from rlhf_kit.trainers.config import Bootstrap, Ppo, Preference, Reward, Segment, Stage, TrainingStage

PROCESS_ESTIMATORS = ("prime", "min_form")
FIRST_TRANSFORMERS_WITH_TOOLS = (5, 13)
RESERVED_NAMES: dict[str, str] = dict.fromkeys(
    ("kl", "truncation", "critic", "default", "ema"), "a name of the kit's own reward or adapter"
)


def check_stage(stage: Stage, world_size: int, earlier: Collection[Path], recipe_path: Path) -> list[Problem]:
    """All that is wrong with a valid stage; `earlier` are outputs of earlier stages, which may not exist."""
    problems = list(missing_files(stage, earlier, recipe_path))
    if isinstance(stage, Bootstrap):
        inside = partial(check_stage, world_size=world_size, recipe_path=recipe_path)
        return [*problems, *check_bootstrap(stage, earlier, lambda step, known: inside(step, earlier=known))]
    if isinstance(stage, Eval):
        return [*problems, *_eval(stage, world_size)]
    if isinstance(stage, Pairs):
        return [*problems, *stage.problems()]
    problems += [*_model(stage), *_data(stage), *_arguments(stage)]
    if isinstance(stage, Reward):
        problems += _reward(stage)
    if isinstance(stage, Preference):
        problems += check_preference(stage)
    if isinstance(stage, Segment):
        problems += _segment(stage)
    if isinstance(stage, Ppo):
        problems += [problem.under("trainer.args") for problem in check_batch(stage, world_size)]
        problems += [*_estimator(stage), *_adaptive_kl(stage, world_size), *_critic(stage), *_patterns(stage)]
        problems += [*_sources(stage), *_accuracy_band(stage, world_size), *_tools(stage)]
    return problems


def check_links(recipe: Recipe) -> list[Problem]:
    """What a source asks of the segment model that an earlier stage of the recipe trains, and will not find."""
    trained = {o: s for name, s in recipe.stages.items() if isinstance(s, Segment) for o in recipe.outputs(name)}
    problems = []
    for name, stage in recipe.stages.items():
        for index, source in enumerate(getattr(stage, "rewards", ())):
            model = trained.get(Path(source.path)) if isinstance(source, SegmentModelConfig) else None
            known = () if model is None else ("none", *model.classes)
            for label in source.labels if known else ():
                if label not in known:
                    remedy = did_you_mean(label, known, f"it has {listed(known)}")
                    found = Problem(f"labels.{label}", "is no class of the stage that trains this model", remedy=remedy)
                    problems.append(found.under(f"stages.{name}.rewards.{index}"))
    return problems


def check_deepspeed(recipe: Recipe, source: object) -> None:
    """Refuse what cannot run under DeepSpeed, which applies a gradient as soon as it is whole: no part can rest.

    Raises:
        RecipeError: with every such field; `source` is what the recipe is called.
    """
    problems = []
    for name, stage in recipe.stages.items():
        found = list(_resting(stage)) if isinstance(stage, Ppo) else []
        problems += [problem.under("" if recipe.single else f"stages.{name}") for problem in found]
    if problems:
        raise RecipeError(source, problems)


def _resting(stage: Ppo) -> Iterator[Problem]:
    if stage.critic is not None and stage.critic.warmup_steps > 0:
        what = "lets the policy rest, which DeepSpeed cannot"
        yield Problem("critic.warmup_steps", what, stage.critic.warmup_steps, "write 0, or launch without DeepSpeed")
    for index, source in enumerate(stage.rewards):
        joint = isinstance(source, ImplicitPrmConfig) and source.online and source.online.order == "with_policy"
        if joint and argument(stage, "num_iterations") > 1:
            what = "lets the PRM rest in later iterations, which DeepSpeed cannot"
            remedy = "write before_scoring, or trainer.args.num_iterations: 1, or launch without DeepSpeed"
            yield Problem(f"rewards.{index}.online.order", what, "with_policy", remedy)


def _arguments(stage: TrainingStage) -> Iterator[Problem]:
    if argument(stage, "eval_strategy") != "no" and stage.eval_data is None:
        yield Problem("trainer.args.eval_strategy", "there is nothing to evaluate on", remedy="add eval_data")
    if argument(stage, "eval_on_start") and stage.eval_data is None:
        remedy = f"add eval_data{' and evaluation' if isinstance(stage, Ppo) else ''}, or remove it"
        yield Problem("trainer.args.eval_on_start", "there is nothing to evaluate on", True, remedy)
    if argument(stage, "push_to_hub") and not argument(stage, "hub_model_id"):
        remedy = "write the repository, owner/name"
        yield Problem("trainer.args.hub_model_id", "push_to_hub needs to know where", remedy=remedy)
    if argument(stage, "lr_scheduler_type") == "cosine_with_min_lr" and not argument(stage, "lr_scheduler_kwargs"):
        remedy = "write lr_scheduler_kwargs: {min_lr_rate: 0.1}"
        yield Problem("trainer.args.lr_scheduler_kwargs", "cosine_with_min_lr needs its lowest rate", remedy=remedy)


def _patterns(stage: Ppo) -> Iterator[Problem]:
    try:
        re.compile(stage.credit.step_pattern)
    except re.error as error:
        remedy = r"escape it, as in \("
        yield Problem("credit.step_pattern", f"is no regular expression ({error})", stage.credit.step_pattern, remedy)
    if "" in stage.stop_strings:
        remedy = "remove it"
        yield Problem("stop_strings", "the empty text would end every completion before it begins", "", remedy)
    if stage.step_truth is not None and not stage.step_truth.separator:
        yield Problem("step_truth.separator", "must not be empty", "", "write what stands between steps, e.g. ' '")


def _estimator(stage: Ppo) -> Iterator[Problem]:
    credit, group = stage.credit, argument(stage, "num_generations")
    path = "trainer.args.num_generations"
    if group < 2 and credit.compares_completions:
        remedy = "write at least 2, or use credit.estimator gae or reinforce"
        yield Problem(path, f"credit.estimator {credit.estimator} compares completions of a prompt", group, remedy)
    if credit.scale == "group" and not credit.compares_completions:
        what = f"divides by a group's deviation what {credit.estimator} does not centre: equal scores by nearly 0"
        yield Problem("credit.scale", what, "group", "write batch or none")
    if credit.estimator in PROCESS_ESTIMATORS and all(source.kind != "process" for source in stage.rewards):
        remedy = "add an implicit_prm to rewards, or use rloo"
        yield Problem("credit.estimator", "needs a process reward", credit.estimator, remedy)


def _adaptive_kl(stage: Ppo, world_size: int) -> Iterator[Problem]:
    kl, rollout = stage.credit.kl, batch_of(stage, world_size).rollout
    if kl.target is None:
        return
    if kl.coefficient == 0:
        remedy = "give credit.kl.coefficient a value to start from, e.g. 0.05"
        yield Problem("credit.kl.target", "cannot adapt a coefficient of 0", kl.target, remedy)
    if rollout >= 5 * kl.adaptation_horizon:
        what = f"is so short that one rollout of {rollout} completions could make the coefficient negative"
        remedy = f"write at least {rollout // 5 + 1}"
        yield Problem("credit.kl.adaptation_horizon", what, kl.adaptation_horizon, remedy)


def _critic(stage: Ppo) -> Iterator[Problem]:
    estimator, critic = stage.credit.estimator, stage.critic
    if critic is not None and estimator != "gae":
        remedy = "remove critic, or use credit.estimator gae"
        yield Problem("critic", f"is never used by credit.estimator {estimator}", remedy=remedy)
    if critic is not None and critic.type == "head" and critic.path is not None:
        yield Problem("critic.path", "is only for critic.type model", critic.path, "remove it or set the type")
    own = critic is not None and critic.type == "model" and critic.path is None
    if own and isinstance(stage.model, Scratch):
        what = "starts from the policy's weights, and a scratch policy has none that could be loaded"
        remedy = "write head, or give critic.path, or train the policy by an sft stage first"
        yield Problem("critic.type", what, "model", remedy)
    if stage.truncation.policy == "bootstrap" and estimator != "gae":
        remedy = "use credit.estimator gae, or truncation.policy terminal, mask or penalty"
        yield Problem("truncation.policy", f"needs a critic; {estimator} has none", "bootstrap", remedy)


def _sources(stage: Ppo) -> Iterator[Problem]:
    yield from source_problems(stage.rewards, stage.model, RESERVED_NAMES)
    joint = [
        f"rewards.{index}"
        for index, source in enumerate(stage.rewards)
        if isinstance(source, ImplicitPrmConfig) and source.online and source.online.order == "with_policy"
    ]
    for path in joint[1:]:
        remedy = f"write before_scoring ({joint[0]} is with_policy already)"
        yield Problem(f"{path}.online.order", "one PRM at most trains with the policy", "with_policy", remedy)


def _accuracy_band(stage: Ppo, world_size: int) -> Iterator[Problem]:
    band = stage.accuracy_band
    if band is None:
        return
    if band.low > band.high:
        remedy = f"write low <= high (high is {band.high})"
        yield Problem("accuracy_band.low", "is greater than high", band.low, remedy)
    if not any(source.labels_outcomes for source in stage.rewards):
        remedy = "add a verifier, or a function with bounded: true, to rewards"
        yield Problem("accuracy_band", "needs outcomes, and no source gives them", remedy=remedy)
    group = argument(stage, "num_generations")
    if group < 2:
        remedy = "write at least 2, or remove accuracy_band"
        yield Problem("trainer.args.num_generations", "accuracy_band needs groups", group, remedy)
    rollout = batch_of(stage, world_size).rollout
    rows, rest = divmod(rollout, world_size)
    if band.mode == "resample" and rows % group and not rest and not rollout % group:  # or check_batch says more
        what = f"needs whole groups on each process, and {rows} rows a process are no multiple of {group}"
        remedy = "change per_device_train_batch_size, steps_per_generation or num_generations, or write mask"
        yield Problem("accuracy_band.mode", what, "resample", remedy)


def _tools(stage: Ppo) -> Iterator[Problem]:
    """What cannot work with tools: TRL needs messages, and what is read of a completion's text is its last turn."""
    if not stage.tools:
        for index, source in enumerate(stage.rewards):
            if isinstance(source, TurnsConfig):
                remedy = "add tools: [calculator] to the stage, or remove it"
                yield Problem(f"rewards.{index}", "turns rewards tool calls, and the stage has no tools", remedy=remedy)
        return
    installed = version("transformers")
    if tuple(int(part) for part in installed.split(".")[:2]) < FIRST_TRANSFORMERS_WITH_TOOLS:
        what = f"need a transformers that reads tool calls, 5.13 or later, and {installed} is installed"
        yield Problem("tools", what, list(stage.tools), "pip install -U transformers")
    for index in range(1, len(stage.tools)):
        if stage.tools[index] in stage.tools[:index]:
            yield Problem(f"tools.{index}", "is named twice", stage.tools[index], "remove one")
    if isinstance(stage.data, RunningSums | ReasoningGym | Gsm8kSolutions) and not stage.data.chat:
        yield Problem("data.chat", "tools are called in conversations, and the prompts are text", False, "write true")
    if isinstance(stage.model, Scratch) and stage.model.vocabulary != "tool_arithmetic":
        remedy = "write tool_arithmetic, or give a pretrained model"
        yield Problem("model.vocabulary", "has no template for tool calls", stage.model.vocabulary, remedy)
    if stage.evaluation is not None:
        remedy = "remove it (the accuracy in training is logged)"
        yield Problem("evaluation", "decodes without tools, so that it would judge the first turn alone", remedy=remedy)
    if stage.step_truth is not None:
        yield Problem("step_truth", "looks for steps in the last turn alone", remedy="remove it, or tools")
    if stage.credit.estimator == "min_form":
        remedy = "use another estimator, e.g. gae"
        yield Problem("credit.estimator", "looks for steps in the last turn alone", "min_form", remedy)
    if stage.accuracy_band is not None and stage.accuracy_band.mode == "resample":
        yield Problem("accuracy_band.mode", "generates without tools", "resample", "write mask")


def _reward(stage: Reward) -> Iterator[Problem]:
    paired = stage.objective in ("dpo", "nca")
    for path, data in (("data", stage.data), ("eval_data", stage.eval_data)):
        if isinstance(data, Gsm8kSolutions) and data.paired != paired:
            kind = "pairs" if paired else "single completions with labels"
            remedy = f"write paired: {str(paired).lower()}"
            yield Problem(f"{path}.paired", f"objective {stage.objective} learns from {kind}", data.paired, remedy)
        if isinstance(data, Sampled) and paired:
            what = f"objective {stage.objective} learns from pairs; sampled rows are single completions"
            yield Problem(f"{path}.type", what, "sampled", "use objective ce or kto")
    if stage.offset != "none" and stage.objective != "ce":
        yield Problem("offset", f"is never used by objective {stage.objective}", stage.offset, "write none, or use ce")
    if stage.objective == "kto":
        yield from check_kto(stage)


def _eval(stage: Eval, world_size: int) -> Iterator[Problem]:
    yield from stage.problems()
    if world_size > 1:
        remedy = "leave the stage out of this launch ('~stages.NAME'), and run `rlhf-kit eval RECIPE` afterwards"
        yield Problem("type", f"runs in one process, and here are {world_size}", "eval", remedy)


def _segment(stage: Segment) -> Iterator[Problem]:
    yield from (problem.under("segments") for problem in stage.segments.problems())
    if stage.segments.by == "turn":
        remedy = "write completion, and by: turn in the segments of the source that uses the model"
        yield Problem("segments.by", "a text to learn from is one turn", "turn", remedy)
    if "none" in stage.classes:
        yield Problem("labels", "none is the class of what no span marks", "none", "give it another name")
    counts = Counter(label for labels in stage.marks for label in labels)
    for label in [label for label, count in counts.items() if count > 1]:
        yield Problem("labels", "stands for a class more than once", label, "leave it in one place")
    for name in [name for name, labels in zip(stage.classes, stage.marks, strict=True) if not labels]:
        yield Problem(f"labels.{name}", "no label stands for this class", [], "name some of the data's, or remove it")
    if isinstance(stage.class_weights, dict):
        for name in stage.class_weights:
            if name not in ("none", *stage.classes):
                remedy = f"the classes are none, {listed(stage.classes)}"
                yield Problem(f"class_weights.{name}", "there is no such class", remedy=remedy)
    if stage.prompt_template is not None and "{prompt}" not in stage.prompt_template:
        remedy = "write {prompt} where it goes, or remove it"
        yield Problem("prompt_template", "does not say where the {prompt} goes", stage.prompt_template, remedy)
    if stage.model.gguf_file is not None:
        remedy = "give a folder or hub id with safetensors"
        yield Problem("model.gguf_file", "is no classifier's format", stage.model.gguf_file, remedy)
    for path, data in (("data", stage.data), ("eval_data", stage.eval_data)):
        if isinstance(data, QaFeedback) and data.paired:
            yield Problem(f"{path}.paired", "pairs have no spans", True, "write false")


def _data(stage: TrainingStage) -> Iterator[Problem]:
    if not isinstance(stage, Segment):
        for path, data in (("data", stage.data), ("eval_data", stage.eval_data)):
            if isinstance(data, Perturbed):
                what = f"annotated texts are for segment stages, this one is {stage.type}"
                yield Problem(f"{path}.type", what, "perturbed", "name the texts' own data type")
    if not isinstance(stage, Reward | Segment | Preference):
        for path, data in (("data", stage.data), ("eval_data", stage.eval_data)):
            if isinstance(data, Sampled):
                what = f"labelled samples are for reward stages, this one is {stage.type}"
                yield Problem(f"{path}.type", what, "sampled", "name the prompts' own data type")
        if stage.evaluation is not None and stage.eval_data is None:
            yield Problem("evaluation", "has no prompts", remedy="add eval_data")
    if isinstance(stage, Ppo) and stage.eval_data is not None and stage.evaluation is None:
        yield Problem("eval_data", "is never used", remedy="add evaluation, e.g. {verifier: math}, or remove it")


def _model(stage: TrainingStage) -> Iterator[Problem]:
    model = stage.model
    if isinstance(model, Scratch) and model.hidden_size % model.num_attention_heads:
        what = f"is no multiple of num_attention_heads ({model.num_attention_heads})"
        remedy = f"write a multiple of {model.num_attention_heads}"
        yield Problem("model.hidden_size", what, model.hidden_size, remedy)
    if isinstance(model, Scratch) and model.vocabulary == "running_sums":
        for path, data in (("data", stage.data), ("eval_data", stage.eval_data)):
            if isinstance(data, RunningSums) and data.modulus > RUNNING_SUMS_MODULUS:
                what = f"needs larger numbers than model.vocabulary running_sums has (below {RUNNING_SUMS_MODULUS})"
                yield Problem(path, what, remedy="make them smaller, or list the words in model.vocabulary")
    if isinstance(model, Scratch) and model.vocabulary != "tool_arithmetic":
        for path, data in (("data", stage.data), ("eval_data", stage.eval_data)):
            if isinstance(data, ToolArithmetic):
                what = "has conversations, and the model's vocabulary has neither their words nor a template"
                yield Problem(path, what, data.type, "write model.vocabulary: tool_arithmetic")
