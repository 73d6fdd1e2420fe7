"""From the rows of a source to those that a recipe asks for: names, prompts, further columns, and which rows."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pyarrow
from datasets import Dataset, DatasetInfo, Features, Json, List
from datasets.table import InMemoryTable

from rlhf_kit.data.annotations import has_sentences, sentence_spans
from rlhf_kit.data.config import DataBase
from rlhf_kit.data.implicit_prompts import dialogue_messages, opening, split_pair
from rlhf_kit.data.messages import is_messages, prompt_messages, with_own_keys, without_nulls
from rlhf_kit.data.names import PROMPTS
from rlhf_kit.data.perturbations import last_text, with_last_text

Row = dict[str, Any]

JSON = List(Json())


def dataset_of(columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """A data set of columns. Messages and tools are kept as JSON, so that none has the keys of another row's.

    Raises:
        pyarrow.ArrowException: the values of a column have several types.
    """
    as_json = {name for name, values in columns.items() if _is_json(name, values)}
    plain = Dataset.from_dict({name: list(values) for name, values in columns.items() if name not in as_json})
    features = {name: JSON if name in as_json else plain.features[name] for name in columns}
    given = {name: _cleared(name, columns[name]) if name in as_json else plain[name][:] for name in columns}
    return Dataset.from_dict(given, features=Features(features)) if as_json else plain


def with_columns(dataset: Dataset, columns: Mapping[str, Sequence[Any]]) -> Dataset:
    """The data set with some columns replaced, and new ones behind the others, which stay as they are."""
    if not columns:
        return dataset
    made = dataset_of(columns)
    features = Features({**dataset.features, **made.features})
    whole, new = (cast(pyarrow.Table, of.with_format("arrow")[:]) for of in (dataset, made))
    table = pyarrow.table([(new if name in columns else whole)[name] for name in features], names=list(features))
    return Dataset(InMemoryTable(table), info=DatasetInfo(features=features))


def struct_columns(dataset: Dataset) -> dict[str, list[Any]]:
    """Conversations and tools that a table keeps in columns of their keys, so that each row has all keys."""
    found = {name: dataset[name][:] for name, of in dataset.features.items() if isinstance(_items_of(of), dict)}
    return {name: values for name, values in found.items() if _is_json(name, values)}


def _items_of(feature: Any) -> Any:
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _is_json(name: str, values: Sequence[Any]) -> bool:
    """Whether a column holds conversations, or the tools of each row that has any."""
    if name == "tools":
        given = [value for value in values if value is not None]
        return bool(given) and all(isinstance(value, list) and all(map(_is_mapping, value)) for value in given)
    return len(values) > 0 and all(map(is_messages, values))


def _cleared(name: str, values: Sequence[Any]) -> list[Any]:
    """Tools or conversations without the keys of other rows."""
    return without_nulls(list(values)) if name == "tools" else [list(map(with_own_keys, value)) for value in values]


def _is_mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def with_spans(dataset: Dataset, source: str) -> Dataset:
    """Texts whose `sentences` are labelled have the spans of these."""
    names = set(dataset.column_names)
    if not {"text", "sentences"} <= names or "spans" in names or not has_sentences(dataset["sentences"]):
        return dataset
    spans = []
    for number, row in enumerate(dataset.to_list(), start=1):
        try:
            spans.append(sentence_spans(row["text"], row["sentences"]))
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
    return cast(Any, dataset).add_column("spans", spans)


def with_prompts(dataset: Dataset, source: str) -> Dataset:
    """An annotated text that answers no prompt has an empty one; pairs without one have it in both completions."""
    names = set(dataset.column_names)
    if "prompt" in names:
        return dataset
    if {"text", "spans"} <= names:
        return cast(Any, dataset).add_column("prompt", [""] * len(dataset))
    if not {"chosen", "rejected"} <= names:
        return dataset
    split: dict[str, list[Any]] = {"prompt": [], "chosen": [], "rejected": []}
    for number, row in enumerate(dataset.to_list(), start=1):
        try:
            parts = split_pair(row["chosen"], row["rejected"])
        except ValueError as error:
            raise ValueError(f"{source}, row {number}: {error}") from error
        for name, part in zip(split, parts, strict=True):
            split[name].append(part)
    rest = [name for name in dataset.column_names if name not in split]
    return with_columns(dataset, split).select_columns([*split, *rest])


def with_templates(dataset: Dataset, config: DataBase, source: str) -> Dataset:
    """The columns that `templates` add; the rows' other columns stand in the braces, of messages the last one's text.

    They are text. A further prompt, such as `judged_prompt`, has the form of its row's prompt: behind a conversation it
    is the same conversation with another last message.
    """
    names = dataset.column_names
    for new, template in config.templates.items():
        if new in names:
            raise ValueError(f"{source}: templates make {new!r}, and there is a column {new!r} already")
        unknown = [name for name in re.findall(r"\{(\w+)\}", template) if name not in names]
        if unknown:
            raise ValueError(f"{source}: the template of {new!r} asks for {unknown[0]!r}, and there is only {names}")
    if not config.templates:
        return dataset
    rows = dataset.to_list()
    made = {
        new: [_further_prompt(text, row, config) if new in PROMPTS else _filled(text, row) for row in rows]
        for new, text in config.templates.items()
    }
    return with_columns(dataset, made)


def _filled(template: str, row: Row) -> str:
    def said(place: re.Match[str]) -> str:
        value = row[place[1]]
        return last_text(value) if is_messages(value) else str(value)

    return re.sub(r"\{(\w+)\}", said, template)


def _further_prompt(template: str, row: Row, config: DataBase) -> Any:
    prompt = row["prompt"]
    if config.chat and config.prompt_template is None and isinstance(prompt, str):
        prompt = dialogue_messages(prompt) or prompt_messages(prompt, None)
    text = _filled(template, {**row, "prompt": prompt})
    return text if isinstance(prompt, str) else with_last_text(prompt, text)


def renamed(dataset: Dataset, columns: Mapping[str, str], source: str) -> Dataset:
    """The columns under the names that `columns` gives them, new name first; the others behind them."""
    if not columns:
        return dataset
    names = dataset.column_names
    for new, old in columns.items():
        if old not in names:
            raise ValueError(f"{source}: columns maps {new!r} to {old!r}, and there is only {', '.join(names)}")
        if new in names and new not in columns.values():
            raise ValueError(
                f"{source}: columns maps {new!r} to {old!r}, and there is a column {new!r} already: "
                "give that one another name in `columns` too"
            )
    kept = {name: name for name in names if name not in columns.values()}
    table = dataset.data.table
    wanted = {**columns, **kept}
    table = pyarrow.table([table[old] for old in wanted.values()], names=list(wanted))
    return Dataset(InMemoryTable(table))


def selection(dataset: Dataset, config: DataBase, source: str) -> list[int]:
    """The positions that the range of hashes, shuffling, skipping and limiting leave."""
    size = len(dataset)
    if size == 0:
        raise ValueError(f"{source}: there are no rows")
    positions = list(range(size))
    if config.hash_range is not None:
        if "prompt" not in dataset.column_names:
            raise ValueError(
                f"{source}: hash_range reads prompts, and there are only {', '.join(dataset.column_names)}"
            )
        low, high = config.hash_range
        hashes = [_hash(prompt) for prompt in dataset["prompt"]]
        positions = [place for place in positions if low <= hashes[place] < high]
    if config.shuffle_seed is not None:
        random.Random(f"shuffle {config.shuffle_seed}").shuffle(positions)
    stop = None if config.limit is None else config.skip + config.limit
    positions = positions[config.skip : stop]
    if not positions:
        raise ValueError(f"{source}: no row is left of {size} after skip: {config.skip}")
    return positions


def _hash(prompt: Any) -> float:
    """A number in [0, 1) that depends on nothing but how a prompt opens."""
    text = opening(prompt) if isinstance(prompt, str) or is_messages(prompt) else repr(prompt)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
