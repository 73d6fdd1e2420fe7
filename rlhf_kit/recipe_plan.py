"""What a recipe will do, stage by stage, in words."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_kit.evals.stage import Eval
from rlhf_kit.models.config import Scratch
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.rewards.config import Schedule
from rlhf_kit.rewards.implicit_prm import ImplicitPrmConfig
from rlhf_kit.runs.config import Recipe
from rlhf_kit.trainers.args import argument, batch_of, config_class
from rlhf_kit.trainers.config import Bootstrap, Critic, Ppo, Preference, Reward, Segment, Sft, Stage, TrainingStage

Section = tuple[str, list[tuple[str, str]]]


def plan(recipe: Recipe, world_size: int) -> list[Section]:
    """One section a stage: its title, and what it does as (topic, text)."""
    sections = []
    for number, (name, stage) in enumerate(recipe.stages.items(), 1):
        title = f"{number}. {name}" if name == stage.type else f"{number}. {name} ({stage.type})"
        rows = list(_rows(stage, world_size))
        sections.append((title, [*rows, ("writes", str(recipe.stage_folder(name)))]))
    return sections


def _rows(stage: Stage, world_size: int) -> Iterator[tuple[str, str]]:
    if isinstance(stage, Eval):
        yield from _eval_rows(stage)
        return
    if isinstance(stage, Bootstrap):
        yield (
            "rounds",
            f"at most {stage.rounds}, the {stage.keep} is kept" + (", may stop earlier" if stage.stop else ""),
        )
        for title, step in (("pairs", stage.pairs_of(1, Path("."))), ("training", stage.preference_of(1, Path(".")))):
            yield from ((title, f"{topic}: {text}") for topic, text in _rows(step, world_size) if topic != "data")
        return
    if stage.model is not None:
        yield "model", _model(stage.model)
    yield "data", _data(stage.data)
    if isinstance(stage, Pairs):
        yield from _pairs_rows(stage)
        return
    if isinstance(stage, Sft | Ppo) and stage.evaluation:
        yield "evaluation", f"{stage.evaluation.verifier} on {_data(stage.eval_data)}"
    if isinstance(stage, Preference) and stage.evaluation:
        yield "evaluation", f"{stage.evaluation.verifier} on {_data(stage.evaluation.data)}"
    if isinstance(stage, Reward):
        objective, config = stage.objective, config_class(stage.type, stage.objective)
        offset = "" if stage.offset == "none" else f", {stage.offset} offset"
        yield "objective", f"{objective}, beta {stage.beta:g}{offset} ({config})"
    if isinstance(stage, Preference):
        yield "objective", f"{stage.objective.type} ({config_class(stage.type, stage.objective.type)})"
    if isinstance(stage, Segment):
        yield "segments", f"{stage.segments.by}: {', '.join(stage.classes)}, or none"
    if isinstance(stage, Ppo):
        for source in stage.rewards:
            yield "reward", _source(source)
        yield "credit", _credit(stage)
    yield from _batch(stage, world_size)


def _pairs_rows(stage: Pairs) -> Iterator[tuple[str, str]]:
    yield "builder", stage.builder.type
    if stage.model is not None:
        yield "sampling", _sampling(stage)
    for source in stage.rewards:
        yield "reward", _source(source)
    debiased = "" if stage.length_debias == "none" else f", lengths debiased by {stage.length_debias}"
    if stage.select is not None:
        yield "selection", stage.select.type + debiased
    yield "rows", ", ".join(f"{output}.{stage.format}" for output in stage.outputs)


def _sampling(stage: Pairs) -> str:
    generation = stage.generation
    likeliest = "" if generation.top_p == 1 else f", top_p {generation.top_p:g}"
    tokens = f"at most {generation.max_new_tokens} tokens, temperature {generation.temperature:g}{likeliest}"
    return f"{generation.num_generations} completions a prompt, {tokens}{', by vLLM' if generation.use_vllm else ''}"


def _eval_rows(stage: Eval) -> Iterator[tuple[str, str]]:
    if stage.model is not None:
        yield "model", _model(stage.model)
    for source in stage.rewards:
        yield "reward", _source(source)
    for name, evaluation in stage.evals.items():
        data = ", ".join(_data(config) for _, config, _ in evaluation.data_sets())
        files = ", ".join(path for _, path, _ in evaluation.files())
        on = "; ".join(part for part in (data, files) if part)
        kind = "" if evaluation.type == name else f" ({evaluation.type})"
        yield "evaluation", f"{name}{kind}" + (f" on {on}" if on else "")


def _model(model: Any) -> str:
    if isinstance(model, Scratch):
        return f"new Llama, {model.num_hidden_layers} layers of {model.hidden_size}, random weights"
    lora = f", LoRA r {model.peft.r}" if model.peft else ""
    return f"{model.path} ({model.dtype}{lora})"


def _data(data: Any) -> str:
    if data.type == "sampled":
        return f"{data.num_generations} samples of {data.model} a prompt of {_data(data.prompts)}"
    if data.type == "perturbed":
        return f"{data.per_text} edited versions a text of {_data(data.texts)}"
    where = getattr(data, "path", None) or getattr(data, "task", None)
    size = f"{data.size} rows" if hasattr(data, "size") else ""
    part = f"at most {data.limit}" if data.limit else ""
    return ", ".join(item for item in (data.type, where, size, part) if item)


def _source(source: Any) -> str:
    weight = source.weight
    shown = (
        f"{weight.start:g} to {weight.end:g} over {weight.steps} steps"
        if isinstance(weight, Schedule)
        else f"{weight:g}"
    )
    text = f"{source.source_name}: {source.kind}, weight {shown}"
    if isinstance(source, ImplicitPrmConfig):
        online = f"learns online ({source.online.order})" if source.online else "frozen"
        text += f", beta {source.beta:g}, reference {source.reference}, {online}"
        text += f", from {source.path or 'the policy'}"
    return text


def _credit(stage: Ppo) -> str:
    credit, kl = stage.credit, stage.credit.kl
    parts = [credit.estimator, f"gamma {credit.gamma:g}"]
    if credit.estimator == "gae":
        critic = stage.critic or Critic()
        parts += [f"lambda {credit.lam:g}", f"critic {critic.type}"]
    parts += ["whitened"] if credit.whiten else []
    if kl.coefficient:
        parts.append(f"KL {kl.coefficient:g} {kl.estimator} in the {kl.where}")
    return ", ".join(parts)


def _batch(stage: TrainingStage, world_size: int) -> Iterator[tuple[str, str]]:
    batch = batch_of(stage, world_size)
    rows = "completions" if isinstance(stage, Ppo) else "rows"
    processes = f"{world_size} process" if world_size == 1 else f"{world_size} processes"
    product = f"{processes} x {batch.per_device} per device x {batch.accumulation} accumulated"
    yield "batch", f"{product} = {batch.rows_per_update} {rows} per update"
    if isinstance(stage, Ppo):
        groups = f"{batch.num_generations} per prompt = {batch.prompts_per_update:g} prompts per update"
        updates = f"{batch.updates_per_rollout:g} update{'s' * (batch.updates_per_rollout != 1)}"
        rollout = f"{batch.rollout} completions for {updates}"
        yield "rollout", f"{rollout}; {groups}"
    max_steps = argument(stage, "max_steps")
    epochs = f"{argument(stage, 'num_train_epochs'):g} epochs over the data"
    yield "length", f"{max_steps} update{'s' * (max_steps != 1)}" if max_steps > 0 else epochs
