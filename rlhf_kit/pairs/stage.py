"""Running of a `pairs` stage: prompts are worked off in chunks, each kept once it is done; then rows are chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import set_seed

from rlhf_kit.config import SEED_STRIDE
from rlhf_kit.data.files import put_aside
from rlhf_kit.data.load import load_data
from rlhf_kit.errors import RunError
from rlhf_kit.evals.fingerprint import config_fingerprint
from rlhf_kit.evals.policy import Progress
from rlhf_kit.pairs.builder import OUTPUTS, Builder, Row
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.context import PairsContext
from rlhf_kit.pairs.files import read_rows, write_rows
from rlhf_kit.processes import agreed, of_main, processes

WORK_FOLDER, KEY_FILE = "work", "key"

logger = logging.getLogger(__name__)
Chunk = tuple[int, int, list[Row]]


def run_pairs(
    stage: Pairs,
    folder: Path,
    *,
    seed: int = 0,
    recipe: str = "",
    functions: Mapping[str, Callable[..., Any]] | None = None,
    progress: Progress = lambda what: lambda done, total: None,
) -> dict[str, Any]:
    """Build the rows of all prompts, choose, write the files, and return the stage's results.

    `seed` and `recipe` are the recipe's seed and name.

    Raises:
        RunError: a process failed, a file is broken, or nothing could be chosen.
    """
    state = processes()
    rows = agreed(lambda: load_data(stage.data).to_list())
    chunks = list(_chunks(rows, stage.generation.prompts_at_once))
    builder = stage.builder.build(PairsContext(stage, seed, recipe, functions))
    work = folder / WORK_FOLDER
    missing = of_main(agreed(lambda: _missing(stage, work, seed, len(chunks)) if state.is_main_process else []))
    own = [chunks[number] for number in missing[state.process_index :: state.num_processes]]
    agreed(lambda: _work_off(builder, work, own, progress("building rows")))
    results = agreed(lambda: _finish(builder, folder, chunks) if state.is_main_process else {})
    return of_main(results)


def _chunks(rows: list[Row], size: int) -> Iterator[Chunk]:
    """The number of a chunk, that of its first prompt, and its prompts."""
    for number, first in enumerate(range(0, len(rows), size)):
        yield number, first, rows[first : first + size]


def _missing(stage: Pairs, work: Path, seed: int, count: int) -> list[int]:
    """The numbers of the chunks that are not kept yet."""
    work.mkdir(parents=True, exist_ok=True)
    _claim(work, config_fingerprint(stage, seed=seed))
    return [number for number in range(count) if not chunk_file(work, number).is_file()]


def _claim(work: Path, key: str) -> None:
    """Chunks of other settings, models or data are not taken for this stage's, but put aside."""
    written = work / KEY_FILE
    if written.is_file() and written.read_text() == key:
        return
    if any(path != written for path in work.iterdir()):
        aside = put_aside(work)
        logger.warning("%s holds what was built with other settings, models or data, and is now %s", work, aside)
        work.mkdir()
    written.write_text(key)


def chunk_file(work: Path, number: int) -> Path:
    """Where a chunk is kept."""
    return work / f"chunk-{number:06d}.parquet"


def chunk_seed(seed: int, round_number: int, chunk: int) -> int:
    """The seed of all that is drawn for a chunk."""
    return (seed * SEED_STRIDE + round_number * 1_009 + chunk * 7_919) % 2**32


def _work_off(builder: Builder, work: Path, chunks: Sequence[Chunk], on_batch: Callable[[int, int], object]) -> None:
    """Build and keep the rows of this process's chunks."""
    context = builder.context
    for done, (number, first, prompts) in enumerate(chunks):
        on_batch(done, len(chunks))
        set_seed(chunk_seed(context.seed, context.stage.round, number))
        rows = builder.build_rows(prompts, first)
        _check_numbers(rows, number, range(first, first + len(prompts)), context.stage)
        write_rows(chunk_file(work, number), rows)
    on_batch(len(chunks), len(chunks))


def _finish(builder: Builder, folder: Path, chunks: Sequence[Chunk]) -> dict[str, Any]:
    """Put the chunks together, choose, and write."""
    stage, work = builder.context.stage, folder / WORK_FOLDER
    rows: list[Row] = []
    for number, first, prompts in chunks:
        if not chunk_file(work, number).is_file():
            raise RunError(f"{chunk_file(work, number)} is missing: all processes must write to one folder")
        found = read_rows(chunk_file(work, number))
        _check_numbers(found, number, range(first, first + len(prompts)), stage)
        rows += found
    built = builder.finish(rows)
    if set(built.files) != set(stage.outputs):
        raise RunError(f"builder {stage.builder.type} announced {stage.outputs} and wrote {tuple(built.files)}")
    for output, content in built.files.items():
        write_rows(output_file(folder, output, stage), content)
    return dict(built.facts)


def output_file(folder: Path, output: str, stage: Pairs) -> Path:
    """Where an output is written."""
    assert output in OUTPUTS
    return folder / f"{output}.{stage.format}"


def _check_numbers(rows: Sequence[Row], number: int, prompts: range, stage: Pairs) -> None:
    """No row of a chunk is another chunk's."""
    strange = [row.get("prompt_index") for row in rows if row.get("prompt_index") not in prompts]
    if strange:
        raise RunError(
            f"chunk {number} has the prompts {prompts.start} to {prompts.stop - 1}, and a row of builder "
            f"{stage.builder.type} has prompt_index {strange[0]}"
        )
