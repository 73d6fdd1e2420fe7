"""Metrics and samples of a stage as JSON lines; a kill loses at most the line that is being written."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlhf_kit.errors import RunError

METRICS_FILE = "metrics.jsonl"
SAMPLES_FOLDER = "samples"


class MetricsWriter:
    """Appends one JSON object a line to `<folder>/metrics.jsonl` and flushes each.

    A last line that a kill cut off is removed on opening, so that the next line starts afresh.

    Raises:
        RunError: a line before the last is not a JSON object.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / METRICS_FILE
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            _rewrite_unless_equal(self.path, _encode(_read_lines(self.path)))
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Append the metrics of `step`; not-a-number and infinities become null."""
        record = {"step": int(step), "time": time.time(), **metrics}
        self._file.write(json.dumps(_jsonable(record)) + "\n")
        self._file.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the lines of later steps, which a run resumed at `step` will write again."""
        self._file.close()
        kept = [line for line in _read_lines(self.path) if line.get("step", 0) <= step]
        _rewrite_unless_equal(self.path, _encode(kept))
        self._file = self.path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of `<folder>/metrics.jsonl` in order, without a cut-off last one; none without the file.

    Raises:
        RunError: a line before the last is not a JSON object.
    """
    path = Path(folder) / METRICS_FILE
    return _read_lines(path) if path.exists() else []


def write_samples(folder: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write a step's sampled completions to `<folder>/samples/step-<8 digits>.jsonl`, whole or not at all."""
    path = Path(folder) / SAMPLES_FOLDER / f"step-{int(step):08d}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    _rewrite_unless_equal(path, _encode([_jsonable({**row, "step": int(step)}) for row in rows]))
    return path


def read_samples(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """The sampled completions below `<folder>/samples`, by step in ascending order.

    Raises:
        RunError: a line before the last of a file is not a JSON object.
    """
    return {step: _read_lines(path) for step, path in _sample_files(folder)}


def truncate_samples_after(folder: Path, step: int) -> None:
    """Delete the samples of later steps, which a run resumed at `step` will write again."""
    for sampled_at, path in _sample_files(folder):
        if sampled_at > step:
            path.unlink()


def _sample_files(folder: Path) -> list[tuple[int, Path]]:
    found = []
    for path in (Path(folder) / SAMPLES_FOLDER).glob("step-*.jsonl"):
        digits = path.stem.removeprefix("step-")
        if digits.isdecimal():
            found.append((int(digits), path))
    return sorted(found)


def _read_lines(path: Path) -> list[dict[str, Any]]:
    lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError:  # cut off in the middle; a multi-byte character may be cut too
            record = None
        if isinstance(record, dict):
            records.append(record)
        elif number < len(lines):
            raise RunError(f"{path}: line {number} is not a JSON object; delete that line to go on")
    return records


def _encode(records: Iterable[Mapping[str, Any]]) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def _rewrite_unless_equal(path: Path, content: bytes) -> None:
    if path.exists() and path.read_bytes() == content:
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _jsonable(value: Any) -> Any:
    """`value` for strict JSON: scalars of array libraries become numbers, what is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if hasattr(value, "tolist"):  # tensors and arrays, without importing their library
        return _jsonable(value.tolist())
    raise TypeError(f"a metric or sample holds {value!r} of type {type(value).__name__}; give a number, text or list")
