"""Metrics and samples come back as they were written, whatever a kill left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from rlhf_kit.errors import RunError
from rlhf_kit.runs.metrics import (
    MetricsWriter,
    read_metrics,
    read_samples,
    truncate_samples_after,
    write_samples,
)


def write_steps(folder: Path, *steps: int) -> None:
    with MetricsWriter(folder) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 4, "time": 0.0})


def steps_of(folder: Path) -> list[int]:
    return [line["step"] for line in read_metrics(folder)]


def test_lines_come_back_in_order(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    assert read_metrics(tmp_path) == [
        {"step": 1, "time": 0.0, "loss": 0.25},
        {"step": 2, "time": 0.0, "loss": 0.5},
    ]


def test_a_line_is_on_disk_before_the_writer_closes(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write(3, {"loss": 1.0})
    (line,) = read_metrics(tmp_path)
    writer.close()
    assert line["loss"] == 1.0
    assert line["time"] > 1.7e9  # seconds since 1970, of some moment after 2023


def test_what_is_not_finite_becomes_null_in_strict_json(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float32("nan"), "e": np.float64(0.5)})
    text = (tmp_path / "metrics.jsonl").read_text()
    line = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [line[key] for key in "abcde"] == [None, None, None, None, 0.5]


def test_array_scalars_become_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, {"count": np.int64(7), "share": np.float32(0.25), "flag": np.bool_(True)})
    (line,) = read_metrics(tmp_path)
    assert (line["count"], line["share"], line["flag"]) == (7, 0.25, True)


def test_a_metric_that_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer, pytest.raises(TypeError, match="set"):
        writer.write(1, {"loss": {1, 2}})
    assert read_metrics(tmp_path) == []


def test_every_cut_of_the_last_line_is_survived(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2)
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first_line = whole.index(b"\n") + 1
    for length in range(first_line, len(whole)):
        path.write_bytes(whole[:length])
        # Without its line break alone, the second line is whole.
        expected = [1, 2] if length == len(whole) - 1 else [1]
        assert steps_of(tmp_path) == expected
        write_steps(tmp_path, 3)
        assert steps_of(tmp_path) == [*expected, 3]


def test_a_cut_inside_a_character_is_survived(tmp_path: Path) -> None:
    write_steps(tmp_path, 1)
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 2, "note": "é'.encode()[:-1])
    assert steps_of(tmp_path) == [1]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(RunError, match=r"metrics\.jsonl: line 2 is not a JSON object"):
        read_metrics(tmp_path)


def test_a_resumed_run_drops_later_steps_and_goes_on(tmp_path: Path) -> None:
    write_steps(tmp_path, 1, 2, 3, 4)
    with MetricsWriter(tmp_path) as writer:
        writer.truncate_after(2)
        writer.write(3, {"loss": 9.0})
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, 0.25),
        (2, 0.5),
        (3, 9.0),
    ]


def test_no_file_is_no_metrics(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    assert read_samples(tmp_path) == {}


def test_samples_come_back_by_step(tmp_path: Path) -> None:
    row = {
        "prompt": "2 + 2",
        "tokens": ["4", "é"],
        "advantages": [0.5, math.nan],
        "rewards": {"verifier": [0, 1.0]},
    }
    for step in (100, 5):
        write_samples(tmp_path, step, [row, row])
    samples = read_samples(tmp_path)
    assert list(samples) == [5, 100]
    assert samples[5] == [{**row, "advantages": [0.5, None], "step": 5}] * 2
    assert (tmp_path / "samples" / "step-00000100.jsonl").exists()


def test_samples_of_later_steps_are_dropped(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_samples(tmp_path, step, [{"prompt": ""}])
    truncate_samples_after(tmp_path, 20)
    assert list(read_samples(tmp_path)) == [10, 20]


def test_an_interrupted_write_of_samples_is_not_read(tmp_path: Path) -> None:
    path = write_samples(tmp_path, 10, [{"prompt": "whole"}])
    path.with_name("step-00000020.jsonl.partial").write_text('{"prompt": "ha')
    assert list(read_samples(tmp_path)) == [10]
