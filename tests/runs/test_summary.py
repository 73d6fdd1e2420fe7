"""Key numbers are what their labels say, written short."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_kit.runs.formatting import format_duration, format_number, parse_time
from rlhf_kit.runs.metrics import MetricsWriter
from rlhf_kit.runs.report import read_run
from rlhf_kit.runs.summary import headline, summary_rows, tail_mean


def test_rows_hold_start_end_and_extremes(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step, (accuracy, area) in enumerate([(0.25, 0.5), (None, 0.7), (0.75, 0.9)], start=1):
            writer.write(step, {"eval_accuracy": accuracy, "prm/p/step_auc": area, "time": 60.0 * step})
    rows = {label: cells for label, cells in summary_rows(read_run(tmp_path).stages)}
    assert rows == {
        "Accuracy, held-out": ["25.0% → 75.0%"],
        "Step AUC of p, mean": ["0.700"],
        "Step AUC of p, lowest": ["0.500"],
        "Updates": ["3"],
        "Time": ["2 min"],
    }


def test_noisy_numbers_are_means_of_the_last_tenth() -> None:
    series = [(step, 0.0) for step in range(18)] + [(18, 1.0), (19, 3.0)]
    assert tail_mean(series) == 2.0


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.41314, "0.4131"),
        (-2, "−2"),
        (0, "0"),
        (1.2e-6, "1.2e−6"),
        (12345, "12.3k"),
        (1234567, "1.23M"),
        (None, "–"),
    ],
)
def test_numbers_are_short(value: float | None, shown: str) -> None:
    assert format_number(value) == shown


def test_times_are_read_from_numbers_and_iso_texts() -> None:
    assert parse_time("1970-01-02T00:00:00Z") == parse_time("1970-01-02T01:00:00+01:00") == parse_time(86400) == 86400
    assert parse_time("yesterday") is None


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(42, "42 s"), (420, "7 min"), (12_000, "3 h 20 min"), (187_200, "2 d 4 h")],
)
def test_durations_are_short(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


def test_the_headline_is_of_the_last_stage_that_has_an_accuracy(tmp_path: Path) -> None:
    for stage, accuracy in (("a", 0.25), ("b", 0.5)):
        with MetricsWriter(tmp_path / stage) as writer:
            for step in (1, 2):
                writer.write(step, {"eval_accuracy": accuracy * step, "time": ord(stage)})
    assert headline(read_run(tmp_path).stages) == [("held-out accuracy", "100.0%", "from 50.0%")]
