"""Files of rows hold whatever data may hold, and give it back."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.data.config import Parquet
from rlhf_kit.data.load import load_data
from rlhf_kit.pairs.files import read_rows, write_rows


def asked(*messages: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "Hi"}, *messages]


def call(arguments: dict[str, Any]) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": function}]}


def tool(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "f", "parameters": parameters}}]


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("prompt", [asked(), asked()]),
        ("prompt", [asked(call({"x": 1})), asked(call({"x": "a"}))]),
        ("prompt", [asked(call({}))]),
        ("prompt", [asked(), [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]]),
        ("tools", [tool({"properties": {"x": {"default": 5}}}), tool({"properties": {"x": {"default": "x"}}})]),
        ("tools", [tool({"properties": {}}), None]),
    ],
)
def test_conversations_and_tools_come_back_as_they_were(name, values, tmp_path: Path) -> None:
    rows = [{"prompt": "p", name: value, "prompt_index": place, "score": 0.5} for place, value in enumerate(values)]
    write_rows(tmp_path / "rows.parquet", rows)
    assert read_rows(tmp_path / "rows.parquet") == rows
    loaded = load_data(Parquet(type="parquet", path=str(tmp_path / "rows.parquet"))).to_list()
    assert [row[name] for row in loaded] == values


def test_json_lines_hold_dates_as_text(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "p", "said": datetime.date(2024, 5, 1), "score": float("nan")}])
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == {"prompt": "p", "said": "2024-05-01", "score": None}
