"""Data sets from their configuration, with TRL's column names."""

from __future__ import annotations

import gzip
import json
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
from datasets import Dataset, load_dataset
from datasets.table import InMemoryTable

from rlhf_kit.data.annotations import qa_feedback_rows, toxic_spans_rows
from rlhf_kit.data.checks import Origins, check_rows, shown
from rlhf_kit.data.config import (
    Concatenated,
    CorruptedPrompts,
    DataBase,
    DataConfig,
    Gsm8kSolutions,
    Hub,
    Jsonl,
    Marketplace,
    Mixed,
    Parquet,
    Perturbed,
    QaFeedback,
    ReasoningGym,
    RunningSums,
    Sampled,
    ToolArithmetic,
    ToxicSpans,
)
from rlhf_kit.data.files import local_file
from rlhf_kit.data.formats import formatted
from rlhf_kit.data.gsm8k import gsm8k_rows
from rlhf_kit.data.marketplace import marketplace
from rlhf_kit.data.messages import completion_like
from rlhf_kit.data.mixing import with_replay
from rlhf_kit.data.names import in_common
from rlhf_kit.data.perturbations import corrupted_prompts, perturbed_rows
from rlhf_kit.data.shaping import Row, dataset_of, renamed, selection, with_prompts, with_spans, with_templates
from rlhf_kit.data.tasks import reasoning_gym, running_sums
from rlhf_kit.data.tool_tasks import tool_arithmetic
from rlhf_kit.data.verifiers import verify


class SampledCompletion(NamedTuple):
    """A completion's text, and the tokens that were sampled: through the one that ended it, if one did."""

    text: str
    ids: list[int]


Sampler = Callable[[Sampled, Dataset], Sequence[Sequence[SampledCompletion]]]


def load_data(config: DataConfig, sampler: Sampler | None = None) -> Dataset:
    """The data set of `config`: `prompt`, what it has of `completion, label, chosen, rejected`, and the rest.

    `sampler(config, prompts)` gives `config.num_generations` completions for each row of `prompts`; only
    `sampled` data needs it.

    Raises:
        ValueError: the data cannot be used; the message names the file, the row (from 1) and the field.
    """
    return load_with_origins(config, sampler)[0]


def load_with_origins(config: DataConfig, sampler: Sampler | None = None) -> tuple[Dataset, Origins]:
    """`load_data`, and how errors that show later name a row."""
    source = _source(config)
    dataset = _sampled(config, sampler) if isinstance(config, Sampled) else READERS[type(config)](config)
    dataset = renamed(dataset, config.columns, source)
    dataset = with_prompts(with_spans(dataset, source), source)
    numbers = selection(dataset, config, source)
    dataset = dataset.select(numbers)
    if isinstance(config, Gsm8kSolutions | QaFeedback):
        dataset, numbers = _expanded(dataset, numbers, config)
    origins = Origins(source, numbers)
    check_rows(dataset, origins)
    return formatted(with_templates(dataset, config, source), config, origins), origins


def _source(config: DataConfig) -> str:
    """What errors call the data set: its file where it has one."""
    if isinstance(config, Sampled):
        return f"sampled data, from {_source(config.prompts)}"
    if isinstance(config, Perturbed):
        return f"perturbed data, from {_source(config.texts)}"
    if isinstance(config, Mixed):
        return f"{_source(config.rows)} with replay of {_source(config.replay)}"
    if isinstance(config, CorruptedPrompts):
        return f"corrupted prompts, from {_source(config.rows)}"
    if isinstance(config, Concatenated):
        return " and ".join(_source(part) for part in config.sets)
    if isinstance(config, RunningSums | ToolArithmetic | Marketplace):
        return config.type
    return config.task if isinstance(config, ReasoningGym) else config.path


def _read_json(config: Jsonl | Gsm8kSolutions | QaFeedback) -> Dataset:
    """The rows of JSON lines, or of one JSON list; a name that ends in `.gz` is decompressed."""
    path = local_file(config.path)
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{config.path}: it is no UTF-8 text from byte {error.start} on") from error
    if text.lstrip().startswith("["):
        rows = _parse(text, config.path, 1)
    else:
        lines = enumerate(text.split("\n"), start=1)
        rows = [_parse(line, config.path, number) for number, line in lines if line.strip()]
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{config.path}, row {number}: it is not an object with fields but {shown(row)}")
    return _dataset(rows, config.path)


def _parse(text: str, path: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise ValueError(f"{path}, line {line}, column {error.colno}: broken JSON: {error.msg}") from error


def _read_parquet(config: Parquet) -> Dataset:
    return Dataset(InMemoryTable(pyarrow.parquet.read_table(local_file(config.path))))


def _read_hub(config: Hub) -> Dataset:
    dataset = load_dataset(
        config.path, config.name, data_dir=config.data_dir, split=config.split, revision=config.revision
    )
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{config.path}: split {config.split!r} is not one data set")
    return dataset


def _read_toxic_spans(config: ToxicSpans) -> Dataset:
    content = local_file(config.path).read_bytes().decode("utf-8-sig")
    try:
        return _dataset(list(toxic_spans_rows(content)), config.path)
    except ValueError as error:
        raise ValueError(f"{config.path}, {error}") from error


def _read_perturbed(config: Perturbed) -> Dataset:
    texts = load_data(config.texts)
    if config.column not in texts.column_names:
        have = ", ".join(texts.column_names)
        raise ValueError(f"{_source(config)}: there is no column {config.column!r} to edit, only {have}")
    prompts, given = texts["prompt"][:], texts[config.column][:]
    rows = perturbed_rows(prompts, given, config.edits, config.per_text, config.originals, config.seed)
    return _dataset(rows, _source(config))


def _read_mixed(config: Mixed) -> Dataset:
    rows, replay = load_data(config.rows).to_list(), load_data(config.replay).to_list()
    try:
        return _dataset(with_replay(rows, replay, config.share, config.seed), _source(config))
    except ValueError as error:
        raise ValueError(f"{_source(config)}: {error}") from error


def _read_corrupted_prompts(config: CorruptedPrompts) -> Dataset:
    rows = load_data(config.rows).to_list()
    corrupted = corrupted_prompts([row["prompt"] for row in rows], config.edits, config.seed)
    kept = [
        {**row, "corrupted_prompt": prompt} for row, prompt in zip(rows, corrupted, strict=True) if prompt is not None
    ]
    if not kept:
        raise ValueError(f"{_source(config)}: none of the edits {', '.join(config.edits)} changes any prompt")
    return _dataset(kept, _source(config))


def _read_concatenated(config: Concatenated) -> Dataset:
    sets = [load_data(part) for part in config.sets]
    columns = in_common([part.column_names for part in sets])
    if "prompt" not in columns:
        have = "; ".join(", ".join(part.column_names) for part in sets)
        raise ValueError(f"{_source(config)}: their columns ({have}) have no prompt in common")
    rows = [{name: row.get(name) for name in columns} for part in sets for row in part.to_list()]
    return _dataset(rows, _source(config))


def _read_running_sums(config: RunningSums) -> Dataset:
    rows = running_sums(config.size, config.terms, config.modulus, config.seed, config.largest, config.multiplier)
    return _dataset(rows, "running_sums")


def _read_tool_arithmetic(config: ToolArithmetic) -> Dataset:
    return _dataset(tool_arithmetic(config.size, config.terms, config.largest, config.seed), "tool_arithmetic")


def _read_marketplace(config: Marketplace) -> Dataset:
    options = config.model_dump(include={"options", "features", "base_rate", "visible", "honesty", "style", "seed"})
    return _dataset(marketplace(config.size, **options), "marketplace")


def _read_reasoning_gym(config: ReasoningGym) -> Dataset:
    rows = reasoning_gym(config.task, config.size, config.seed, config.params, config.completion_template)
    return _dataset(rows, config.task)


READERS: Mapping[type[DataBase], Callable[[Any], Dataset]] = {
    Jsonl: _read_json,
    Parquet: _read_parquet,
    Hub: _read_hub,
    Gsm8kSolutions: _read_json,
    QaFeedback: _read_json,
    ToxicSpans: _read_toxic_spans,
    Perturbed: _read_perturbed,
    Mixed: _read_mixed,
    CorruptedPrompts: _read_corrupted_prompts,
    Concatenated: _read_concatenated,
    RunningSums: _read_running_sums,
    ToolArithmetic: _read_tool_arithmetic,
    Marketplace: _read_marketplace,
    ReasoningGym: _read_reasoning_gym,
}


def _sampled(config: Sampled, sampler: Sampler | None) -> Dataset:
    """`num_generations` rows for each prompt, adjacent, labelled by the verifier."""
    if sampler is None:
        raise ValueError("sampled data need a model to sample from: pass load_data a sampler")
    prompts = load_data(config.prompts)
    completions = sampler(config, prompts)
    counts = [len(group) for group in completions]
    if counts != [config.num_generations] * len(prompts):
        raise ValueError(
            f"the sampler gave {counts[:8]}... completions for {len(prompts)} prompts, "
            f"where {config.num_generations} each were asked for"
        )
    rows = []
    for number, (row, group) in enumerate(zip(prompts.to_list(), completions, strict=True), start=1):
        for completion in group:
            score = verify(config.verifier, completion.text, row)
            if score is None:
                raise ValueError(
                    f"{_source(config)}, row {number}: verifier {config.verifier!r} cannot judge it, having "
                    f"only the columns {', '.join(row)}"
                )
            said = completion_like(row["prompt"], completion.text)
            rows.append({**row, "completion": said, "completion_ids": completion.ids, "label": score >= 0.5})
    return _dataset(rows, _source(config))


def _dataset(rows: Sequence[Row], source: str) -> Dataset:
    names = list(dict.fromkeys(name for row in rows for name in row))
    columns = {name: [row.get(name) for row in rows] for name in names}
    try:
        return dataset_of(columns)
    except (pyarrow.ArrowException, OverflowError) as error:
        for name, values in columns.items():
            count = bisect_left(range(len(values) + 1), True, key=lambda stop: not _one_type(values[:stop]))
            if count <= len(values):
                raise ValueError(
                    f"{source}, row {count}: field {name!r} is {shown(values[count - 1])}, which has another "
                    "type than in the rows before"
                ) from error
        raise


def _one_type(values: Sequence[Any]) -> bool:
    try:
        dataset_of({"values": values})
    except (pyarrow.ArrowException, OverflowError):
        return False
    return True


def _expanded(items: Dataset, numbers: list[int], config: Gsm8kSolutions | QaFeedback) -> tuple[Dataset, list[int]]:
    """The rows that each problem or question stands for, and the numbers of those that they come from."""
    rows, origins = [], []
    for number, item in zip(numbers, items.to_list(), strict=True):
        try:
            if isinstance(config, QaFeedback):
                expanded = qa_feedback_rows(item, config.passages, config.paired)
            else:
                expanded = gsm8k_rows(item, config.paired, config.calculator_annotations)
        except ValueError as error:
            raise ValueError(f"{config.path}, row {number + 1}: {error}") from error
        rows += expanded
        origins += [number] * len(expanded)
    if not rows:
        raise ValueError(f"{config.path}: no row has both a better and a worse answer to pair")
    return _dataset(rows, config.path), origins
