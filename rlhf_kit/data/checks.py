"""What rows must be like, whatever is done with them; errors name the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset

from rlhf_kit.data.annotations import check_spans
from rlhf_kit.data.messages import is_messages
from rlhf_kit.data.names import COMPLETIONS, PROMPTS, SAMPLED_IDS, naming


class Origins(NamedTuple):
    """Where the rows of a data set come from: what it is called, and their places in it, from 0."""

    source: str
    places: Sequence[int]

    def name(self, row: int) -> str:
        """What errors call row number `row` (from 0) of what was loaded: the file, and its row there, from 1."""
        return f"{self.source}, row {self.places[row] + 1}"


def check_rows(dataset: Dataset, origins: Origins) -> None:
    """Say which row has a field that cannot be used.

    Raises:
        ValueError: one has; the message names it as `origins` does.
    """
    names = dataset.column_names
    if "prompt" not in names:
        have = ", ".join(names)
        raise ValueError(f"{origins.source}: there is no column 'prompt', only {have}; {naming('prompt', names)}")
    checks = {
        **dict.fromkeys((*PROMPTS, *COMPLETIONS), _text_problem),
        **dict.fromkeys(SAMPLED_IDS, _ids_problem),
        "label": _label_problem,
    }
    for name, problem in checks.items():
        for number, value in enumerate(dataset[name]) if name in names else ():
            found = problem(value)
            if found is not None:
                raise ValueError(f"{origins.name(number)}: {name!r} {found}")
    if {"text", "spans"} <= set(names):
        for number, (text, spans) in enumerate(zip(dataset["text"], dataset["spans"], strict=True)):
            try:
                check_spans(text, spans)
            except ValueError as error:
                raise ValueError(f"{origins.name(number)}: {error}") from error


def _text_problem(value: Any) -> str | None:
    if isinstance(value, str):
        return None
    if not is_messages(value):
        return f"is neither text nor a list of messages ({{role, content}}) but {shown(value)}"
    contents = (message.get("content") for message in value)
    wrong = [content for content in contents if not (content is None or isinstance(content, str) or _parts(content))]
    return f"has a message whose content is neither text nor a list of parts but {shown(wrong[0])}" if wrong else None


def _parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, Mapping) for part in content)


def _ids_problem(value: Any) -> str | None:
    if value is None or (isinstance(value, list) and value and all(isinstance(token, int) for token in value)):
        return None
    what = "is empty" if value == [] else f"is {shown(value)}"
    return (
        f"{what}, where the ids of the tokens that were sampled are meant, at least one: write null, and the row is "
        "encoded from its text; if it means something else here, rename it in `columns`"
    )


def _label_problem(value: Any) -> str | None:
    if value in (0, 1):
        return None
    return (
        f"says whether the completion is right: true, false, 1 or 0, not {shown(value)}; if it means something else "
        "here, rename it in `columns`"
    )


def shown(value: Any) -> str:
    """A value as a short piece of text."""
    text = repr(value)
    return f"{text[:80]}..." if len(text) > 80 else text
