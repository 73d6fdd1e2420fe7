"""Files of rows, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from datasets import Dataset
from datasets.table import InMemoryTable

from rlhf_kit.data.shaping import dataset_of
from rlhf_kit.errors import RunError
from rlhf_kit.pairs.builder import Row


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a Parquet file, or with the suffix `.jsonl` JSON lines, in which a number that is none is null.

    Conversations and tools whose values no column can hold, such as arguments that are a number here and text there,
    are JSON in Parquet, as `datasets` reads it.
    """
    partial = path.with_suffix(".partial")
    if path.suffix == ".jsonl":
        lines = (json.dumps(_without_nan(row), ensure_ascii=False, allow_nan=False, default=str) for row in rows)
        partial.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    else:
        try:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), partial)
        except pyarrow.ArrowException:
            names = dict.fromkeys(name for row in rows for name in row)
            dataset_of({name: [row.get(name) for row in rows] for name in names}).to_parquet(str(partial))
    os.replace(partial, path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    return [_without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def read_rows(path: Path) -> list[Row]:
    """Read back what `write_rows` wrote as Parquet.

    Raises:
        RunError: the file is broken.
    """
    try:
        table = pyarrow.parquet.read_table(path)
        as_datasets = b"huggingface" in (table.schema.metadata or {})
        return Dataset(InMemoryTable(table)).to_list() if as_datasets else table.to_pylist()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise RunError(f"{path} cannot be read ({error}): remove it, and start the same command again") from error
