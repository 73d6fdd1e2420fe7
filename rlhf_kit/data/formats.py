"""The form that a recipe gives its rows: prompts in a template, text as messages, labels as booleans."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset

from rlhf_kit.data.checks import Origins
from rlhf_kit.data.config import DataBase
from rlhf_kit.data.implicit_prompts import answer_messages, dialogue_messages
from rlhf_kit.data.messages import completion_messages, prompt_messages
from rlhf_kit.data.names import COMPLETIONS, PROMPTS
from rlhf_kit.data.shaping import struct_columns, with_columns
from rlhf_kit.rollout import Message


def formatted(dataset: Dataset, config: DataBase, origins: Origins) -> Dataset:
    """Wraps prompts, turns text into messages and labels into booleans; every prompt of a row has the same form.

    Raises:
        ValueError: a template would wrap messages, or two prompts of a row differ in form; the message names the row.
    """
    columns = struct_columns(dataset)
    prompts = [name for name in PROMPTS if name in dataset.column_names]
    changes = config.chat or config.prompt_template is not None or len(prompts) > 1
    read = (*prompts, *COMPLETIONS) if changes else ()
    columns |= {name: dataset[name][:] for name in (*read, "label") if name in dataset.column_names}
    if config.prompt_template is not None:
        for name in prompts:
            columns[name] = _wrapped(columns[name], config.prompt_template, origins)
    if config.chat:
        turns = {name: [_dialogue(prompt) for prompt in columns[name]] for name in prompts}
        for name in prompts[1:]:
            _check_alike(columns, name, _is_dialogue, "a dialogue in one text", origins)
        for name in COMPLETIONS:
            if name in columns:
                columns[name] = _answers(columns[name], turns["prompt"])
        for name in prompts:
            told = (said if turn is None else turn for said, turn in zip(columns[name], turns[name], strict=True))
            columns[name] = [prompt_messages(prompt, config.system) for prompt in told]
    for name in prompts[1:]:
        _check_alike(columns, name, _is_text, "text", origins)
    if "label" in columns:
        columns["label"] = [bool(label) for label in columns["label"]]
    return with_columns(dataset, columns)


def _wrapped(prompts: Sequence[Any], template: str, origins: Origins) -> list[str]:
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ValueError(f"{origins.name(number)}: prompt_template wraps text, not messages")
    return [template.replace("{prompt}", prompt) for prompt in prompts]


def _dialogue(prompt: Any) -> list[Message] | None:
    return dialogue_messages(prompt) if isinstance(prompt, str) else None


def _answers(completions: Sequence[Any], turns: Sequence[list[Message] | None]) -> list[list[Message]]:
    """Completions as messages: behind a dialogue in one text, the turns that they hold."""
    return [
        completion_messages(said) if turn is None or not isinstance(said, str) else answer_messages(said)
        for said, turn in zip(completions, turns, strict=True)
    ]


def _check_alike(
    columns: Mapping[str, Sequence[Any]], name: str, form: Callable[[Any], bool | None], what: str, origins: Origins
) -> None:
    """Of a row's prompt and its prompt `name` both are `what`, or neither; None stands for either."""
    for number, (prompt, further) in enumerate(zip(columns["prompt"], columns[name], strict=True)):
        forms = {"prompt": form(prompt), name: form(further)}
        if set(forms.values()) == {True, False}:
            one, other = sorted(forms, key=lambda column: not forms[column])
            raise ValueError(
                f"{origins.name(number)}: {one!r} is {what}, and {other!r} is not: a model would learn the difference "
                "in form; give both alike"
            )


def _is_text(prompt: Any) -> bool:
    return isinstance(prompt, str)


def _is_dialogue(prompt: Any) -> bool | None:
    """None of messages, which a dialogue will be too."""
    return dialogue_messages(prompt) is not None if isinstance(prompt, str) else None
