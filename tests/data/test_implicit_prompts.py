"""Prompts that stand inside both completions, dialogues in one text, and the ways to divide and build rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from pydantic import TypeAdapter, ValidationError

from rlhf_kit.data.config import DataConfig
from rlhf_kit.data.implicit_prompts import split_pair
from rlhf_kit.data.load import load_data, load_with_origins

START = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea or coffee?\n\nAssistant:"
USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def config(**fields: Any) -> Any:
    return TypeAdapter(DataConfig).validate_python(fields)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def test_a_dialogue_is_split_behind_the_last_turn_that_both_share() -> None:
    """Both answers begin with "T", which is no part of the prompt."""
    assert split_pair(f"{START} Tea.", f"{START} The latter.") == (START, " Tea.", " The latter.")


def test_where_the_dialogues_part_earlier_the_later_turns_stay_with_the_answers() -> None:
    first = "\n\nHuman: Hi\n\nAssistant:"
    chosen, rejected = f"{first} Yo.\n\nHuman: Bye\n\nAssistant: Bye", f"{first} Hey."
    assert split_pair(chosen, rejected) == (first, " Yo.\n\nHuman: Bye\n\nAssistant: Bye", " Hey.")


def test_other_texts_are_split_at_white_space() -> None:
    assert split_pair("Say one: therefore", "Say one: there") == ("Say one: ", "therefore", "there")
    assert split_pair("a b c", "a b c") == ("a b ", "c", "c")


def test_conversations_are_split_behind_the_messages_that_both_share() -> None:
    other = {"role": "assistant", "content": "Go away"}
    assert split_pair([USER, ASSISTANT], [USER, other]) == ([USER], [ASSISTANT], [other])
    assert split_pair([USER, ASSISTANT], [USER, ASSISTANT]) == ([USER], [ASSISTANT], [ASSISTANT])


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        ("yes", "no", "do not begin alike"),
        ([ASSISTANT], [{**ASSISTANT, "content": "x"}], "begin with different messages"),
        ("yes", [ASSISTANT], "two texts or two lists of messages"),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_row_without_a_common_prompt_is_named(
    chosen: Any, rejected: Any, message: str, suffix: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        split_pair(chosen, rejected)
    if isinstance(chosen, str) and isinstance(rejected, str):
        good = {"chosen": f"{START} A", "rejected": f"{START} B"}
        path = write(tmp_path / f"rows.{suffix}", [good] * 16 + [{"chosen": chosen, "rejected": rejected}])
        with pytest.raises(ValueError, match=rf"rows.{suffix}, row 17: .*{message}"):
            load_data(config(type=suffix, path=path))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_dialogue_becomes_its_turns(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows.{suffix}", [{"chosen": f"{START} Tea", "rejected": f"{START} Gin", "id": 7}])
    (row,) = load_data(config(type=suffix, path=path)).to_list()
    assert row == {"prompt": START, "chosen": " Tea", "rejected": " Gin", "id": 7}
    (row,) = load_data(config(type=suffix, path=path, chat=True, system="Be kind.")).to_list()
    said = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Tea or coffee?")]
    assert row["prompt"] == [{"role": role, "content": content} for role, content in said]
    assert row["chosen"] == [{"role": "assistant", "content": "Tea"}]
    assert row["rejected"] == [{"role": "assistant", "content": "Gin"}]


def test_an_ordinary_prompt_that_speaks_of_humans_stays_one_message(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "What is\n\nHuman: to Assistant:", "completion": "A turn"}])
    (row,) = load_data(config(type="jsonl", path=path, chat=True)).to_list()
    assert row["prompt"] == [{"role": "user", "content": "What is\n\nHuman: to Assistant:"}]


def test_a_folder_of_a_hub_data_set(tmp_path: Path) -> None:
    (tmp_path / "harmless").mkdir()
    (tmp_path / "helpful").mkdir()
    write(tmp_path / "harmless" / "test.jsonl", [{"chosen": f"{START} Tea", "rejected": f"{START} Gin"}])
    write(tmp_path / "helpful" / "test.jsonl", [{"chosen": f"{START} a", "rejected": f"{START} b"}] * 3)
    data = load_data(config(type="hub", path=str(tmp_path), data_dir="harmless", split="test"))
    assert data.to_list() == [{"prompt": START, "chosen": " Tea", "rejected": " Gin"}]


def test_ranges_of_hashes_divide_the_rows_and_no_opening_is_on_both_sides(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"\n\nHuman: question {i % 40}\n\nAssistant: reply {i}\n\nHuman: go on\n\nAssistant:", "n": i}
        for i in range(120)
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    parts = [load_data(config(type="jsonl", path=path, hash_range=r)) for r in ([0, 0.6], [0.6, 1])]
    assert sorted(parts[0]["n"][:] + parts[1]["n"][:]) == list(range(120))
    openings = [{prompt.split("\n\nAssistant:")[0] for prompt in part["prompt"]} for part in parts]
    assert openings[0] and openings[1] and not openings[0] & openings[1]
    reordered = write(tmp_path / "reordered.jsonl", rows[::-1])
    again = load_data(config(type="jsonl", path=reordered, hash_range=[0, 0.6]))
    assert sorted(again["n"][:]) == sorted(parts[0]["n"][:])
    chats = load_data(config(type="jsonl", path=path, hash_range=[0, 0.6], chat=True))
    assert chats["n"][:] == parts[0]["n"][:]


def test_limits_count_what_the_range_leaves_and_rows_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": f"p{i}", "n": i} for i in range(50)])
    whole = load_data(config(type="jsonl", path=path, hash_range=[0, 0.5]))["n"][:]
    data, origins = load_with_origins(config(type="jsonl", path=path, hash_range=[0, 0.5], skip=2, limit=3))
    assert data["n"][:] == whole[2:5]
    assert origins.name(1) == f"{path}, row {whole[3] + 1}"


def test_an_empty_range_is_refused() -> None:
    with pytest.raises(ValidationError, match="smaller number first"):
        config(type="jsonl", path="rows.jsonl", hash_range=[0.5, 0.5])


def test_templates_add_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": "p {x}", "label": True}])
    (row,) = load_data(config(type="jsonl", path=path, templates={"judged_prompt": "{label}: {prompt}"})).to_list()
    assert row["judged_prompt"] == "True: p {x}"
    with pytest.raises(ValueError, match="'judged' asks for 'verdict'"):
        load_data(config(type="jsonl", path=path, templates={"judged": "{verdict}"}))
    with pytest.raises(ValueError, match="a column 'label' already"):
        load_data(config(type="jsonl", path=path, templates={"label": "1"}))


def test_data_sets_are_put_under_each_other(tmp_path: Path) -> None:
    one = write(tmp_path / "one.jsonl", [{"prompt": "a", "chosen": "x", "rejected": "y", "id": 1}])
    two = write(tmp_path / "two.parquet", [{"prompt": "b", "chosen": "z", "rejected": "w"}])
    sets = [
        {"type": "jsonl", "path": one, "templates": {"scope": "0"}},
        {"type": "parquet", "path": two, "templates": {"scope": "2"}},
    ]
    assert load_data(config(type="concatenated", sets=sets)).to_list() == [
        {"prompt": "a", "chosen": "x", "rejected": "y", "scope": "0"},
        {"prompt": "b", "chosen": "z", "rejected": "w", "scope": "2"},
    ]


def test_corrupted_prompts_differ_from_theirs_and_rows_without_one_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "1 2 3 =", "completion": "6"}, {"prompt": "none", "completion": "0"}]
    path = write(tmp_path / "rows.jsonl", [*rows, {"prompt": "4 5 =", "completion": "9"}])
    given = {"type": "corrupted_prompts", "rows": {"type": "jsonl", "path": path}, "edits": ["number"]}
    found = load_data(config(**given)).to_list()
    assert [row["prompt"] for row in found] == ["1 2 3 =", "4 5 ="]
    for row in found:
        pairs = zip(row["prompt"].split(), row["corrupted_prompt"].split(), strict=True)
        assert sum(before != after for before, after in pairs) == 1
    assert load_data(config(**given)).to_list() == found
    with pytest.raises(ValueError, match="none of the edits negate"):
        load_data(config(**{**given, "edits": ["negate"]}))


def test_the_last_message_of_a_conversation_is_corrupted(tmp_path: Path) -> None:
    prompt = [{"role": "system", "content": "Add 2 numbers."}, {"role": "user", "content": "4 5"}]
    path = write(tmp_path / "rows.jsonl", [{"prompt": prompt, "completion": "9"}])
    rows = {"type": "jsonl", "path": path}
    (row,) = load_data(config(type="corrupted_prompts", rows=rows, edits=["number"])).to_list()
    assert row["corrupted_prompt"][0] == prompt[0]
    assert row["corrupted_prompt"][1]["content"] != "4 5"


ADD, JUDGED = {"prompt": "add 3 and 7", "completion": "10", "judgment": "wrong"}, "{judgment}: {prompt}"
FURTHER = [{"type": "corrupted_prompts", "edits": ["number"]}, {"templates": {"judged_prompt": JUDGED}}]


@pytest.mark.parametrize("further", FURTHER, ids=["corrupted_prompt", "judged_prompt"])
@pytest.mark.parametrize(
    "fields",
    [
        {"chat": True},
        {"chat": True, "system": "Be brief."},
        {"prompt_template": "Q: {prompt}\nA:"},
        {"prompt_template": "Q: {prompt}\nA:", "chat": True, "system": "Be brief."},
        {},
    ],
)
def test_a_further_prompt_has_the_form_of_the_prompt(fields: Any, further: Any, tmp_path: Path) -> None:
    """Where the text of the one stands in the prompt, the other has its own, and nothing else differs."""
    jsonl = {"type": "jsonl", "path": write(tmp_path / "rows.jsonl", [ADD])}
    data = {**further, "rows": jsonl} if "type" in further else {**jsonl, **further}
    (plain,) = load_data(config(**data)).to_list()
    (row,) = load_data(config(**data, **fields)).to_list()
    (name,) = {"corrupted_prompt", "judged_prompt"} & set(row)
    assert plain["prompt"] == ADD["prompt"] and plain[name] != plain["prompt"]
    assert json.dumps(row[name]) == json.dumps(row["prompt"]).replace(plain["prompt"], plain[name])
    assert isinstance(row[name], list) == ("chat" in fields)


@pytest.mark.parametrize("fields", [{}, {"chat": True, "system": "Be brief."}])
def test_the_last_message_of_a_conversation_is_judged(fields: Any, tmp_path: Path) -> None:
    said = [{"role": "assistant", "content": "One."}, {"role": "assistant", "content": "Two."}]
    rows = [{"prompt": [USER, ASSISTANT, {**USER, "content": "Tea?"}], "completion": said, "judgment": "vague"}]
    templates = {"judged_prompt": "{judgment}: {prompt} {completion}"}
    data = config(type="jsonl", path=write(tmp_path / "rows.jsonl", rows), templates=templates, **fields)
    (row,) = load_data(data).to_list()
    assert row["judged_prompt"] == [*row["prompt"][:-1], {**USER, "content": "vague: Tea? Two."}]
    assert len(row["prompt"]) == 3 + ("system" in fields)


def test_a_dialogue_in_one_text_is_judged_in_its_last_turn(tmp_path: Path) -> None:
    rows = [{"prompt": START, "completion": " Tea", "judgment": "rude"}, {**ADD}]
    data = {"type": "jsonl", "path": write(tmp_path / "rows.jsonl", rows), "templates": {"judged_prompt": JUDGED}}
    first, second = load_data(config(**data, chat=True, system="Be brief.")).to_list()
    assert [message["content"] for message in first["prompt"]] == ["Be brief.", "Hi", "Hello", "Tea or coffee?"]
    assert first["judged_prompt"] == [*first["prompt"][:3], {**USER, "content": "rude: Tea or coffee?"}]
    assert second["judged_prompt"] == [second["prompt"][0], {**USER, "content": "wrong: add 3 and 7"}]


@pytest.mark.parametrize(
    ("prompt", "corrupted", "fields", "message"),
    [
        ([USER], "Hi", {}, "'corrupted_prompt' is text, and 'prompt' is not"),
        ("Hi", [USER], {}, "'prompt' is text, and 'corrupted_prompt' is not"),
        (START, f"Well. {START}", {"chat": True}, "'prompt' is a dialogue in one text, and 'corrupted_prompt' is not"),
        ("Hi", START, {"chat": True}, "'corrupted_prompt' is a dialogue in one text, and 'prompt' is not"),
        ("Hi", None, {}, "'corrupted_prompt' is neither text nor a list of messages"),
    ],
)
def test_prompts_of_two_forms_are_refused(
    prompt: Any, corrupted: Any, fields: Any, message: str, tmp_path: Path
) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": prompt, "corrupted_prompt": corrupted, "completion": "x"}])
    with pytest.raises(ValueError, match=rf"rows.jsonl, row 1: {message}"):
        load_data(config(type="jsonl", path=path, **fields))


def test_text_becomes_a_conversation_beside_one(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"prompt": [USER], "corrupted_prompt": "Ho", "completion": "x"}])
    (row,) = load_data(config(type="jsonl", path=path, chat=True)).to_list()
    assert row["corrupted_prompt"] == [{**USER, "content": "Ho"}]
