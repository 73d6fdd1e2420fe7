"""Evaluations in the report: every figure with its interval, plots of any x axis, and text that stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.errors import RunError
from rlhf_kit.runs.evaluations import plot_drawing, read_evaluations, shown
from rlhf_kit.runs.report import render_report

from .conftest import HOSTILE


def figure(value: float | None, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "count": 7}


def content(name: str = "best") -> dict[str, Any]:
    return {
        "name": name,
        "type": "best_of_n",
        "fingerprint": "x",
        "figures": {"majority.4": figure(0.5, 0.4, 0.6)},
        "tables": [{"title": "Accuracy", "columns": ["", "n = 4"], "rows": [["majority", figure(0.5, 0.4, 0.6)]]}],
        "plots": [
            {"title": "Curve", "x": "root", "lines": [{"label": "gold", "points": [[0.25, figure(0.5, 0.4, 0.6)]]}]}
        ],
        "notes": ["256 prompts"],
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "eval" / "evals").mkdir(parents=True)
    (tmp_path / "recipe.resolved.yaml").write_text("stages: {eval: {type: eval}}\n")
    return tmp_path


def write(folder: Path, evaluation: dict[str, Any]) -> None:
    (folder / "eval" / "evals" / f"{evaluation['name']}.json").write_text(json.dumps(evaluation))


def test_a_report_shows_tables_plots_and_notes(folder):
    write(folder, content())
    page = render_report(folder)
    for text in ("Evaluation", "best", "Accuracy", "majority", "0.4 to 0.6", "against: root", "256 prompts"):
        assert text in page


def test_a_stage_that_is_half_done_is_shown(folder):
    write(folder, content())
    assert "Accuracy" in render_report(folder)
    (folder / "eval" / "result.json").write_text(json.dumps({"evals": {"best": content()["figures"]}, "minutes": 1}))
    page = render_report(folder)
    assert "evals.best.majority.4.value" not in page


def test_names_labels_and_notes_are_text(folder, parse):
    evil = content(name="evil")
    evil["notes"] = [HOSTILE]
    evil["tables"][0]["rows"][0][0] = HOSTILE
    evil["plots"][0]["title"] = HOSTILE
    evil["plots"][0]["lines"][0]["label"] = HOSTILE
    write(folder, evil)
    page = parse(render_report(folder))
    assert not any(name == "img" for name, _ in page.elements)
    assert not any("alert" in script for script in page.scripts)


def test_a_damaged_file_is_named(folder):
    (folder / "eval" / "evals" / "best.json").write_text("{")
    with pytest.raises(RunError, match=r"best\.json is damaged"):
        read_evaluations(folder / "eval")


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (figure(0.25, 0.1, 0.5), "0.25 (0.1 to 0.5)"),
        (figure(0.25), "0.25"),
        (None, "–"),
        ("gold", "gold"),
        (3, "3"),
        (figure(None), "–"),
    ],
)
def test_cells(cell, text):
    assert shown(cell) == text


def test_points_are_drawn_in_order_of_x_within_their_intervals():
    line = {
        "label": "gold",
        "points": [[2.0, figure(0.3, 0.2, 0.4)], [0.5, figure(0.1, 0.0, 0.2)], [1.0, figure(None)]],
    }
    drawn = plot_drawing({"title": "t", "x": "root", "lines": [line, {"label": "none", "points": []}]})
    (curve,) = drawn["curves"]
    places = [float(part.split()[0]) for part in curve["path"].strip("M").split("L")]
    assert len(places) == 2
    assert places == sorted(places)
    assert curve["final"] == "0.3"
    assert curve["band"].startswith("M")


def test_a_reliability_plot_is_a_square_with_its_diagonal():
    line = {"label": "right", "points": [[0.25, figure(0.5)]]}
    drawn = plot_drawing({"title": "t", "x": "p", "lines": [line], "diagonal": True})
    assert drawn["diagonal"]
    assert drawn["curves"][0]["path"] == "M250.0 150.0"
