"""The columns of a recipe's data sets, as far as they are known before anything runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from rlhf_kit.data.config import (
    Concatenated,
    CorruptedPrompts,
    DataBase,
    DataConfig,
    Gsm8kSolutions,
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
from rlhf_kit.data.names import COMPLETIONS, PROMPTS, in_common
from rlhf_kit.pairs.builder import PAIRED, SFT, UNPAIRED
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.problems import Problem, listed
from rlhf_kit.runs.config import Recipe, file_of

if TYPE_CHECKING:
    from rlhf_kit.data.checks import Origins

LARGEST_FILE = 64 * 2**20  # bytes; a larger one is read when its stage begins
TEXTS = {*PROMPTS, *COMPLETIONS, "label"}
WRITTEN = {
    PAIRED: ("prompt", "chosen", "rejected", "chosen_ids", "rejected_ids"),
    UNPAIRED: ("prompt", "completion", "label", "completion_ids"),
    SFT: ("prompt", "completion", "completion_ids"),
}
RUNNING_SUMS = ("prompt", "completion", "answer", "steps")


class Columns(NamedTuple):
    """Columns that a data set has; unless they are the `whole`, it may have others that are no text or label."""

    names: tuple[str, ...]
    whole: bool = True

    def lack(self, column: str) -> bool:
        """Whether it surely has no such column."""
        return column not in self.names and (self.whole or column in TEXTS)

    def __str__(self) -> str:
        return f"there is only {listed(self.names)}" if self.whole else f"the rows are {listed(self.names)}"


class Written(NamedTuple):
    """A file that a `pairs` stage of the recipe writes: the stage's name, the stage, and which output it is."""

    name: str
    stage: Pairs
    output: str


Known = Columns | Problem | None
Files = Mapping[Path, Written]


def written_files(recipe: Recipe) -> dict[Path, Written]:
    """The files of rows that the recipe's stages write."""
    pairs = {name: stage for name, stage in recipe.stages.items() if isinstance(stage, Pairs)}
    return {
        recipe.stage_folder(name) / file_of(output, stage.format): Written(name, stage, output)
        for name, stage in pairs.items()
        for output in stage.outputs
    }


def columns_of(config: DataConfig, files: Files) -> Known:
    """The columns of a data set; None where it is not at hand; or what is wrong with it.

    `files` are those that the recipe's own stages write (`written_files`).
    """
    if isinstance(config, Jsonl | Parquet) and Path(config.path) in files:
        return _shaped(_of_stage(config, files), config)
    parts = {name: columns_of(cast(DataConfig, part), files) for name, part in config.parts.items()}
    for name, columns in parts.items():
        if isinstance(columns, Problem):
            # A problem of the prompts to sample from is said of these.
            return None if isinstance(config, Sampled) else columns.under(name)
    if parts:
        known = [columns for columns in parts.values() if isinstance(columns, Columns)]
        return _shaped(_made(config, known), config) if len(known) == len(parts) else None
    return _loaded(config)


def _of_stage(config: Jsonl | Parquet, files: Files) -> Known:
    name, stage, output = files[Path(config.path)]
    if config.type != stage.format:
        remedy = f"write {stage.format}, or format: {config.type} in that stage"
        return Problem("type", f"stage {name!r} writes {stage.format}", config.type, remedy)
    if stage.builder.type == "corrupt_prompt":  # the data's own columns are taken along
        data = columns_of(stage.data, files)
        return Columns((*data.names, "corrupted_prompt"), False) if isinstance(data, Columns) else None
    return Columns(WRITTEN[output], False) if output in WRITTEN else None


def _made(config: DataConfig, parts: list[Columns]) -> Columns | Problem | None:
    """The columns of what is made of data sets with known columns."""
    whole = all(part.whole for part in parts)
    if isinstance(config, Mixed | Concatenated):
        return Columns(tuple(in_common([part.names for part in parts])), whole)
    (names, _) = parts[0]
    if isinstance(config, Sampled):
        return Columns(_with(names, "completion", "completion_ids", "label"), whole)
    if isinstance(config, CorruptedPrompts):
        return Columns(_with(names, "corrupted_prompt"), whole)
    if isinstance(config, Perturbed):
        if parts[0].lack(config.column):
            return Problem(
                "column", "there is no such column to edit", config.column, f"the columns are {listed(names)}"
            )
        return Columns(("prompt", "text", "spans", "edit"))
    return None


def _with(names: Iterable[str], *more: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*names, *more)))


def _shaped(columns: Known, config: DataBase) -> Known:
    """The columns under the names that the data set's `columns` give them, and those of its `templates`."""
    if not isinstance(columns, Columns):
        return columns
    have = f"the columns are {listed(columns.names)}"
    for new, old in config.columns.items():
        if columns.lack(old):
            return Problem(f"columns.{new}", "there is no such column", old, have)
        if new in columns.names and new not in config.columns.values():
            remedy = "give that one another name in columns too"
            return Problem(f"columns.{new}", "there is a column of that name already", old, remedy)
    kept = (name for name in columns.names if name not in config.columns.values())
    named = columns._replace(names=_with(config.columns, *kept))
    for new, template in config.templates.items():
        if new in named.names:
            return Problem(
                f"templates.{new}", "there is a column of that name already", template, "choose another name"
            )
        unknown = [name for name in re.findall(r"\{(\w+)\}", template) if named.lack(name)]
        if unknown:
            return Problem(f"templates.{new}", f"there is no column {unknown[0]} to put in", template, have)
    return named._replace(names=_with(named.names, *config.templates))


def _loaded(config: DataConfig) -> Known:
    """The columns of data that are on this machine, or are made there; of large tasks one row is made."""
    if isinstance(config, RunningSums):
        return running_sums_problem(config) or _shaped(Columns(RUNNING_SUMS), config)
    changed = 0
    if isinstance(config, Jsonl | Parquet | Gsm8kSolutions | ToxicSpans | QaFeedback):
        path = Path(config.path)
        if not path.is_file() or path.stat().st_size > LARGEST_FILE:
            return None
        changed = path.stat().st_mtime_ns
    elif isinstance(config, ReasoningGym):
        config = config.model_copy(update={"size": 1, "skip": 0, "limit": None, "hash_range": None})
    elif not isinstance(config, ToolArithmetic | Marketplace):
        return None
    return _read(type(config), config.model_dump_json(), changed)


@lru_cache(maxsize=64)  # several checks ask for the same data
def _read(kind: type[DataBase], settings: str, changed: int) -> Known:
    """The columns of data at hand, whose file last changed at `changed` (ns)."""
    from rlhf_kit.data.load import load_data

    try:
        return Columns(tuple(load_data(cast(DataConfig, kind.model_validate_json(settings))).column_names))
    except (ValueError, OSError) as error:
        return Problem("", str(error))


def first_row_problem(
    rows: Sequence[Mapping[str, Any]], origins: Origins, problem: Callable[[Mapping[str, Any]], str | None]
) -> Problem | None:
    """The first row that `problem` says something of, by the name that `origins` gives it."""
    found = ((place, text) for place, row in enumerate(rows) if (text := problem(row)) is not None)
    first = next(found, None)
    if first is None:
        return None
    return Problem("", f"{origins.name(first[0])}: {first[1]}", remedy="mend the row, or leave it out")


def running_sums_problem(config: RunningSums) -> Problem | None:
    """Why the generator would refuse: it has fewer different problems than rows, or numbers beyond the modulus."""
    modulus, terms, size = config.modulus, config.terms, config.size
    largest = modulus - 1 if config.largest is None else config.largest
    if largest >= modulus:
        return Problem("largest", f"must be below modulus ({modulus})", largest, f"write at most {modulus - 1}")
    # A factor of at least 2 for each bit of `size` is enough for any size, and a power of a million terms is slow.
    problems = modulus * largest ** min(terms, size.bit_length())
    if problems >= size:
        return None
    what = f"is more than the {problems} different problems of modulus {modulus}, terms {terms} and largest {largest}"
    return Problem("size", what, size, f"write at most {problems}, or raise terms, modulus or largest")
