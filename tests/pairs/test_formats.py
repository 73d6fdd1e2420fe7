"""What is written: names, JSON lines, conversations; and what a recipe may refer to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_kit.cli import app
from rlhf_kit.data.config import Parquet
from rlhf_kit.data.load import load_data
from rlhf_kit.pairs.files import read_rows, write_rows
from rlhf_kit.pairs.stage import run_pairs
from rlhf_kit.problems import RecipeError
from rlhf_kit.recipe import load_recipe
from rlhf_kit.trainers.config import Preference

from .conftest import stage


def test_json_lines_say_what_parquet_says(fields: dict[str, Any], tmp_path: Path) -> None:
    for name in ("parquet", "jsonl"):
        run_pairs(stage(fields, format=name), tmp_path / name)
    for output in ("completions", "paired", "unpaired"):
        lines = (tmp_path / "jsonl" / f"{output}.jsonl").read_text().splitlines()
        assert list(map(json.loads, lines)) == read_rows(tmp_path / "parquet" / f"{output}.parquet")
    assert not list((tmp_path / "jsonl").glob("*.parquet")) + list(tmp_path.glob("*/*.partial"))


def test_a_number_that_is_none_is_null_in_json_lines(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"a": math.nan, "b": [1.5, math.inf], "c": [{"role": "user", "n": math.nan}]}])
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {
        "a": None, "b": [1.5, None], "c": [{"role": "user", "n": None}]
    }  # fmt: skip


def said(completions: list[Any], **_: Any) -> list[float]:
    """How many characters the assistant has said."""
    return [float(len(messages[-1]["content"])) for messages in completions]


def test_conversations_stay_conversations(fields: dict[str, Any], talker: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"film {n}"}) for n in range(4)))
    changes = {
        "model": {"path": str(talker)},
        "data": {"type": "jsonl", "path": str(file), "chat": True},
        "rewards": [{"type": "function", "function": "said"}],
    }
    run_pairs(stage(fields, **changes), tmp_path / "run", functions={"said": said})
    rows = load_data(Parquet(type="parquet", path=str(tmp_path / "run" / "paired.parquet"))).to_list()
    assert len(rows) > 1
    for row in rows:
        assert row["prompt"] == [{"content": f"film {row['prompt_index']}", "role": "user"}]
        for side in ("chosen", "rejected"):
            (message,) = row[side]
            assert message["role"] == "assistant" and len(message["content"]) == row[f"score_{side}"]


def recipe(tmp_path: Path, fields: dict[str, Any], path: str, kind: str = "parquet", **changes: Any) -> Path:
    dpo = {
        "type": "preference",
        "model": fields["model"],
        "objective": {"type": "dpo"},
        "data": {"type": kind, "path": path},
    }
    file = tmp_path / "recipe.yaml"
    stages = {"pairs": {**fields, **changes}, "dpo": dpo}
    file.write_text(json.dumps({"name": "run", "runs_dir": str(tmp_path), "stages": stages}))
    return file


def test_an_output_is_found_by_its_name_whatever_its_format(fields: dict[str, Any], tmp_path: Path) -> None:
    for kind in ("parquet", "jsonl"):
        loaded = load_recipe(recipe(tmp_path, fields, "${stages.pairs.paired}", kind, format=kind))
        dpo = loaded.stages["dpo"]
        assert isinstance(dpo, Preference)
        assert dpo.data.path == str(tmp_path / "run" / "pairs" / f"paired.{kind}")  # type: ignore[union-attr]
        assert Path(dpo.data.path) in loaded.outputs("pairs")  # type: ignore[union-attr]


def test_an_output_that_the_selection_does_not_write_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"has no output 'sft'.*paired, unpaired"):
        load_recipe(recipe(tmp_path, fields, "${stages.pairs.sft}"))
    with pytest.raises(RecipeError, match=r"has no output 'paired'.*sft"):
        load_recipe(recipe(tmp_path, fields, "${stages.pairs.paired}", select={"type": "best_of_n"}))


def test_the_command_runs_recipes_with_pairs_and_no_others(fields: dict[str, Any], tmp_path: Path) -> None:
    file = recipe(tmp_path, fields, "${stages.pairs.paired}")
    done = CliRunner().invoke(app, ["pairs", str(file), "~stages.dpo", "stages.pairs.data.size=4"])
    assert done.exit_code == 0, done.output
    assert len(read_rows(tmp_path / "run" / "pairs" / "completions.parquet")) == 16
    assert read_rows(tmp_path / "run" / "pairs" / "paired.parquet")[0]["recipe"] == "run"
    other = tmp_path / "other.yaml"
    dpo = json.loads(file.read_text())["stages"]["dpo"]
    paired = str(tmp_path / "run" / "pairs" / "paired.parquet")
    dpo["data"]["path"] = paired
    other.write_text(json.dumps({"name": "other", "stages": {"dpo": dpo}}))
    refused = CliRunner().invoke(app, ["pairs", str(other)])
    assert refused.exit_code == 2 and "no stage of type pairs" in refused.output
