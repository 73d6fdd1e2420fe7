"""Panels show the numbers of a metrics file, and geometry maps them where they belong."""

from __future__ import annotations

import math
import re

import pytest

from rlhf_kit.runs.curves import Point, build_panels, collect, downsample, drawing, smooth, ticks, value_range


def test_downsampling_keeps_ends_and_spikes() -> None:
    points: list[Point] = [(step, 0.0) for step in range(10_000)]
    points[4321] = (4321, 7.0)
    points[8765] = (8765, -7.0)
    kept = downsample(points, limit=500)
    assert len(kept) <= 500
    assert {(0, 0.0), (4321, 7.0), (8765, -7.0), (9999, 0.0)} <= set(kept)
    assert kept == sorted(kept)


def test_short_series_are_whole() -> None:
    points: list[Point] = [(1, 0.5), (2, None), (3, 0.25)]
    assert downsample(points, limit=500) == points


def test_a_missing_value_breaks_the_line() -> None:
    rows = [{"step": step, "kl": value} for step, value in enumerate([1.0, 2.0, None, 3.0, 4.0])]
    (panel,), _ = build_panels(rows)
    path = drawing(panel, (0, 4))["curves"][0]["path"]
    assert path.count("M") == 2
    assert path.count("L") == 2


def test_a_path_maps_the_axes_to_the_box() -> None:
    (panel,), _ = build_panels([{"step": 0, "kl": 10.0}, {"step": 5, "kl": 30.0}])
    low, high = value_range(panel)
    expected = [(0.0, 300 * (high - 10) / (high - low)), (500.0, 300 * (high - 30) / (high - low))]
    numbers = [float(n) for n in re.findall(r"[-\d.]+", drawing(panel, (0, 10))["curves"][0]["path"])]
    assert numbers == pytest.approx([n for point in expected for n in point], abs=0.06)
    assert low < 10 < 30 < high


def test_the_last_line_of_a_step_counts() -> None:
    assert collect([{"step": 1, "loss": 1.0}, {"step": 1, "loss": 2.0}]) == {"loss": [(1, 2.0)]}


def test_a_bad_start_of_the_critic_does_not_flatten_the_rest() -> None:
    (panel,), _ = build_panels([{"step": s, "value/explained_variance": v} for s, v in enumerate([-500.0, 0.9])])
    assert value_range(panel)[0] >= -1.2


def test_each_source_has_its_panel_and_keeps_its_colour() -> None:
    names = ("rewards/a/mean", "rewards/b/mean", "credit/share/a", "credit/share/b", "prm/b/loss")
    panels, other = build_panels([{"step": s, **dict.fromkeys(names, 0.5)} for s in (1, 2)])
    colours = {(series.label, series.colour) for panel in panels for series in panel.series}
    assert colours == {("a", 0), ("b", 1)}
    assert [panel.title for panel in panels if panel.group == "Reward"] == ["a", "b"]
    assert other == []


def test_unknown_metrics_are_kept_apart() -> None:
    known, other = build_panels([{"step": s, "tools/calls": 1.0 * s, "epoch": 0.1} for s in (1, 2)])
    assert known == []
    assert [panel.title for panel in other] == ["tools/calls"]


def test_smoothing_keeps_a_constant_and_does_not_lag() -> None:
    assert all(value == pytest.approx(3.0) for _, value in smooth([(step, 3.0) for step in range(100)]))
    line = smooth([(step, float(step)) for step in range(201)])
    assert line[100][1] == pytest.approx(100.0)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 7.9), (1e-6, 9e-6), (1, 100_000), (0.71, 0.73)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high)
    assert 2 <= len(found) <= 7
    assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)
    unit = found[1] - found[0]
    mantissa = unit / 10 ** math.floor(math.log10(unit) + 1e-9)
    assert min(abs(mantissa - round_number) for round_number in (1, 2, 2.5, 5)) < 1e-6
