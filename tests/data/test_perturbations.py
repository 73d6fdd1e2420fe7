"""Edited texts: each edit does what it says, and the diff marks what was changed and nothing else."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.data.config import Perturbed
from rlhf_kit.data.load import load_data
from rlhf_kit.data.perturbations import (
    EDITS,
    Pool,
    changed_ranges,
    corrupted_prompts,
    last_text,
    perturb,
    perturbed_rows,
    with_last_text,
)

POOL = Pool(entities=("Lake Garda", "Otto"), words=("window", "yellow"))
TEXT = "In 1912 the ship of Captain Smith was late, and nobody could say why."
TEXTS = [TEXT, "A red door is open.", "Later on Otto saw Lake Garda with 3 friends.", "", "yes"]


def marked(original: str, edited: str) -> list[str]:
    return [edited[start:end] for start, end in changed_ranges(original, edited)]


@pytest.mark.parametrize(
    ("original", "edited", "expected"),
    [
        ("a b c", "a b c", []),
        ("in 1912 it sank", "in 1913 it sank", ["1913"]),
        ("it was late", "it was not late", ["not"]),
        ("it was not late.", "it was late.", ["late"]),
        ("it was late", "it was", ["was"]),
        ("one two three", "one two one two three", ["one two"]),
        ("a, b and c", "x, b and y", ["x", "y"]),
        ("", "new text", ["new text"]),
        ("all gone", "", []),
        ("tea for two", "tea  for\ntwo", []),
    ],
)
def test_the_diff_marks_words_that_are_new_or_stand_behind_a_gap(
    original: str, edited: str, expected: list[str]
) -> None:
    assert marked(original, edited) == expected


@given(st.sampled_from(TEXTS[:3]), st.sampled_from(sorted(EDITS)), st.integers(0, 10_000))
def test_an_edit_changes_the_text_and_the_rest_of_it_is_the_original(text: str, edit: str, seed: int) -> None:
    edited = perturb(text, edit, POOL, random.Random(seed))
    if edited is None:
        assert edit in ("number", "entity", "negate")
        return
    assert edited != text
    ranges = changed_ranges(text, edited)
    assert ranges and all(0 <= start < end <= len(edited) for start, end in ranges)
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))
    if edit in ("number", "entity", "word"):
        assert len(ranges) == 1
        start, end = ranges[0]
        assert text.startswith(edited[:start]) and text.endswith(edited[end:])


@pytest.mark.parametrize("seed", range(30))
def test_each_edit_does_what_it_is_called(seed: int) -> None:
    def edited(edit: str, text: str = TEXT) -> str:
        found = perturb(text, edit, POOL, random.Random(seed))
        assert found is not None
        return found

    (number,) = marked(TEXT, edited("number"))
    assert number.isdigit() and len(number) == 4 and number != "1912"
    assert marked(TEXT, edited("entity"))[0] in POOL.entities
    assert marked(TEXT, edited("word"))[0].lower() in POOL.words
    assert edited("negate") in (TEXT.replace("was", "was not"), TEXT.replace("could", "could not"))
    assert edited("negate", "It was not late") == "It was late"
    words, fewer, more = TEXT.split(), edited("delete").split(), edited("duplicate").split()
    gap = next((k for k in range(len(fewer)) if fewer[k] != words[k]), len(fewer))
    assert fewer == words[:gap] + words[gap + len(words) - len(fewer) :]
    extra = len(more) - len(words)
    assert extra > 0 and any(more == words[:k] + words[k - extra : k] + words[k:] for k in range(extra, len(words) + 1))


def test_a_text_that_has_nothing_to_edit_so_gives_none() -> None:
    chance = random.Random(0)
    assert [perturb("yes", edit, POOL, chance) for edit in ("number", "entity", "word", "negate")] == [None] * 4
    assert perturb("yes", "delete", POOL, chance) is None
    assert perturb("", "duplicate", POOL, chance) is None
    assert perturb("a wise word", "word", Pool((), ("Word", "wise")), chance) is None
    assert perturb("a wise word", "word", Pool((), ("Word", "wise", "king")), chance) in ("a king word", "a wise king")


def test_rows_are_the_originals_and_their_edits_the_same_for_a_seed() -> None:
    def make(seed: int, **options: Any) -> list[dict[str, Any]]:
        given = {"edits": tuple(EDITS), "per_text": 2, "originals": True, **options}
        return perturbed_rows(["p"] * len(TEXTS), TEXTS, seed=seed, **given)

    rows = make(0)
    assert rows == make(0) and rows != make(1)
    plain = [row for row in rows if not row["edit"]]
    assert [row["text"] for row in plain] == TEXTS and all(row["spans"] == [] for row in plain)
    edited = [row for row in rows if row["edit"]]
    assert all({span["label"] for span in row["spans"]} == {row["edit"]} for row in edited)
    assert {row["edit"] for row in make(0, edits=("negate",), originals=False)} == {"negate"}
    assert len(make(0, edits=("negate",), originals=False)) == 3  # one text has two auxiliary verbs, another one


def test_any_column_of_texts_becomes_annotated_rows(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": "When?", "completion": f"It was in 19{k}."}) for k in range(10, 15))
    )
    texts = {"type": "jsonl", "path": str(path), "limit": 2}
    config = Perturbed.model_validate({"type": "perturbed", "texts": texts, "edits": ["number"]})
    rows = load_data(config).to_list()
    assert [row["edit"] for row in rows] == ["", "number", "", "number"]
    assert rows[1]["prompt"] == "When?"
    (span,) = rows[1]["spans"]
    assert rows[1]["text"][span["start"] : span["end"]].isdigit() and span["start"] == 10
    broken = config.model_copy(update={"column": "answer"})
    with pytest.raises(ValueError, match="no column 'answer' to edit, only prompt, completion"):
        load_data(broken)


NEGATED = {
    "I can't do it.": {"I can do it."},
    "I can’t do it.": {"I can do it."},
    "I won't go, you shouldn't.": {"I will go, you shouldn't.", "I won't go, you should."},
    "Won't it?": {"Will it?"},
    "IT ISN'T SO": {"IT IS SO"},
    "It is NOT so.": {"It is so."},
    "He is n't here.": {"He is here."},
    "They cannot swim.": {"They can swim."},
    "They could've done it.": {None},
    "They could do it.": {"They could not do it."},
    "They would have gone.": {"They would not have gone."},
    "It's all that I've had to do.": {None},
    "A can-do mood.": {None},
    "It is late.": {"It is not late."},
}


@pytest.mark.parametrize("text", NEGATED)
def test_a_negation_is_taken_away_whole_or_added_where_one_may_stand(text: str) -> None:
    assert {perturb(text, "negate", POOL, random.Random(seed)) for seed in range(20)} == NEGATED[text]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("Then I left.", []),
        ("Yes, I'm glad, and I’m here.", []),
        ("Then I met Ida Ibsen.", ["Ida Ibsen"]),
        ("In World War I it fell to King Otto I of York.", ["World War", "King Otto", "York"]),
        ("Bob said hi to Ann-Marie.", ["Ann-Marie"]),
    ],
)
def test_i_is_no_name(text: str, names: list[str]) -> None:
    edited = {perturb(text, "entity", Pool(("Zoe",), ()), random.Random(seed)) for seed in range(30)}
    assert edited == ({text.replace(name, "Zoe") for name in names} or {None})


@pytest.mark.parametrize("edit", ["entity", "word"])
def test_names_and_words_come_from_other_rows(edit: str) -> None:
    texts = ["We met in Paris, later in London.", "She went to Rome later.", "They like Paris and Rome."]
    rows = perturbed_rows(texts, texts, [edit], 2, originals=False, seed=0)  # the prompt tells whose version it is
    assert {row["prompt"] for row in rows} == {*texts}
    for row in rows:
        own, others = row["prompt"].lower(), " ".join(text for text in texts if text != row["prompt"]).lower()
        (new,) = marked(row["prompt"], row["text"])
        assert new.lower() in others and new.lower() not in own


@pytest.mark.parametrize(
    ("prompt", "last", "other"),
    [
        (
            "\n\nHuman: a 1\n\nAssistant: b\n\nHuman: c 2 \n\nAssistant:",
            "c 2",
            "\n\nHuman: a 1\n\nAssistant: b\n\nHuman: X \n\nAssistant:",
        ),
        ("\n\nHuman: c 2\n\nAssistant: Well", "c 2", "\n\nHuman: X\n\nAssistant: Well"),
        ("\n\nHuman: c 2", "c 2", "\n\nHuman: X"),
        (" Say \n\nHuman: 2 ", " Say \n\nHuman: 2 ", "X"),
        ([{"role": "user", "content": "c 2"}], "c 2", [{"role": "user", "content": "X"}]),
    ],
)
def test_the_last_text_of_a_dialogue_in_one_text_is_what_the_human_says_last(
    prompt: Any, last: str, other: Any
) -> None:
    assert last_text(prompt) == last and with_last_text(prompt, "X") == other
    assert with_last_text(prompt, last) == prompt
    (corrupted,) = corrupted_prompts([prompt], ["number"], 0)
    assert corrupted is not None and with_last_text(corrupted, last) == prompt != corrupted


def test_the_versions_of_a_text_differ() -> None:
    rows = perturbed_rows(
        ["p", "p"], ["one one one one one one", "It is late."], ["delete", "duplicate", "negate"], 6, True, 1
    )
    versions = [row["text"] for row in rows]
    assert len(versions) == len(set(versions))
    assert [row["text"] for row in perturbed_rows(["p"], ["It is so"], ["negate"], 5, False, 0)] == ["It is not so"]
