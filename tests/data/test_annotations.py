"""Annotated texts: two human data sets are read exactly, and characters become the classes of segments."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.data.annotations import (
    check_spans,
    contiguous,
    covered,
    labels_of,
    nearest,
    qa_feedback_rows,
    ranges_of,
    segment_labels,
    sentence_spans,
    toxic_spans_rows,
)
from rlhf_kit.data.config import Jsonl, QaFeedback, ToxicSpans
from rlhf_kit.data.load import load_data
from rlhf_kit.rollout import CharRange

HEADER = "spans,text\n"


def span(start: int, end: int, label: str = "bad") -> dict[str, Any]:
    return {"start": start, "end": end, "label": label}


def question(name: str = "Who?", **fields: Any) -> dict[str, Any]:
    given = {
        "question": name,
        "passages": [["Who danced, Bob?", "Ann sang.", "Bob danced."], ["Other", "Who? Ann."]],
        **{f"prediction {k}": f"answer {k}" for k in (1, 2, 3, 4)},
        "feedback": {
            "errors": [{"error type": "Irrelevant", "start": 0, "end": 6}],
            "missing-info": [{"error type": "Missing-Answer"}, {"error type": "Missing-Answer"}],
        },
        "preference": [1, 2, 0, 0, 2, 1],
    }
    return {**given, **fields}


# --- SemEval-2021 task 5 ---


@given(st.sets(st.integers(0, 40)))
def test_ranges_hold_exactly_the_indices_and_none_touches_the_next(indices: set[int]) -> None:
    ranges = contiguous([*indices, *indices])
    assert [k for start, end in ranges for k in range(start, end)] == sorted(indices)
    assert all(end < start for (_, end), (start, _) in pairwise(ranges))


def test_characters_become_spans_and_texts_stay_as_they_are() -> None:
    content = HEADER + '"[0, 1, 2, 9, 8]","Bad, or a\r\n""mess"""\n[],fine\n'
    first, second = toxic_spans_rows(content)
    assert first["text"] == 'Bad, or a\r\n"mess"'
    assert first["spans"] == [span(0, 3, "toxic"), span(8, 10, "toxic")]
    assert second == {"prompt": "", "text": "fine", "spans": []}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('"[1, 2",bad', "no list of character indices but '\\[1, 2'"),
        ('"[1.5]",bad', "no list of character indices"),
        ('"(1, 2)",bad', "no list of character indices"),
        ("[True],bad", "no list of character indices"),
        ("__import__('os').getcwd(),bad", "no list of character indices"),
        ("[3],bad", "has the index 3, and the text has 3 characters"),
        ("[-1],bad", "has the index -1"),
        (",bad", "no list of character indices"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(row: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"row 2: spans (is|has).*{message.removeprefix('has ')}"):
        list(toxic_spans_rows(f"{HEADER}[0],ok\n{row}\n"))


def test_a_file_without_the_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "posts.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"posts\.csv, its columns are a, b, and must be spans and text"):
        load_data(ToxicSpans(type="toxic_spans", path=str(path)))


def test_a_toxic_spans_file_is_a_data_set(tmp_path: Path) -> None:
    path = tmp_path / "posts.csv"
    path.write_text(HEADER + '"[0, 1]",no way\n[],fine\n', encoding="utf-8-sig")
    data = load_data(ToxicSpans(type="toxic_spans", path=str(path)))
    assert data.to_list() == [
        {"prompt": "", "text": "no way", "spans": [span(0, 2, "toxic")]},
        {"prompt": "", "text": "fine", "spans": []},
    ]


# --- Fine-Grained RLHF ---


def test_errors_are_spans_and_what_is_missing_marks_the_whole_text() -> None:
    (row,) = qa_feedback_rows(question(), passages=0, paired=False)
    assert row == {
        "prompt": "Who?",
        "text": "answer 1",
        "spans": [span(0, 6, "Irrelevant"), span(0, 8, "Missing-Answer")],
    }


def test_pairs_are_the_comparisons_that_somebody_won() -> None:
    rows = qa_feedback_rows(question(), passages=0, paired=True)
    assert [(row["chosen"][-1], row["rejected"][-1]) for row in rows] == [
        ("1", "2"),
        ("3", "1"),
        ("4", "2"),
        ("3", "4"),
    ]
    assert {row["prompt"] for row in rows} == {"Who?"}


def test_the_sentences_that_share_words_with_the_question_stand_before_it_in_their_order() -> None:
    (row,) = qa_feedback_rows(question("Who danced, Bob?"), passages=2, paired=False)
    assert row["prompt"] == "Bob danced.\n\nWho? Ann.\n\nWho danced, Bob?"
    assert nearest("a b", ["x", "a", "B A a", "b"], 2) == ["a", "B A a"]
    assert nearest("a", ["x"], 3) == ["x"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preference": [1, 2, 0]}, r"preference is \[1, 2, 0\], and must be six of 0, 1 and 2"),
        ({"preference": [1, 2, 0, 0, 3, 1]}, "must be six"),
    ],
)
def test_preferences_that_are_none_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        qa_feedback_rows(question(**fields), passages=0, paired=True)


def test_a_broken_question_is_named_by_its_row(tmp_path: Path) -> None:
    outside = {"errors": [{"error type": "Irrelevant", "start": 0, "end": 99}], "missing-info": []}
    path = tmp_path / "feedback.json"
    path.write_text(json.dumps([question("a"), question("b", feedback=outside)]))
    with pytest.raises(ValueError, match=r"row 2: spans has .*99.*and the text has 8 characters"):
        load_data(QaFeedback(type="qa_feedback", path=str(path)))
    path.write_text(json.dumps([{"question": "a"}]))
    with pytest.raises(ValueError, match="row 1: it lacks passages, prediction 1, feedback, preference"):
        load_data(QaFeedback(type="qa_feedback", path=str(path)))


def test_no_question_lies_on_both_sides_of_a_split(tmp_path: Path) -> None:
    path = tmp_path / "feedback.json"
    path.write_text(json.dumps([question(f"question {k}") for k in range(10)]))
    sides = [
        {row["prompt"] for row in load_data(QaFeedback.model_validate({**base, "paired": paired})).to_list()}
        for base in (
            {"type": "qa_feedback", "path": str(path), "shuffle_seed": 3, "limit": 6},
            {"type": "qa_feedback", "path": str(path), "shuffle_seed": 3, "skip": 6},
        )
        for paired in (False, True)
    ]
    assert sides[0] == sides[1] and sides[2] == sides[3]
    assert sides[0].isdisjoint(sides[2]) and len(sides[0] | sides[2]) == 10


# --- any annotated text ---


def test_annotated_rows_of_ones_own_need_no_prompt(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(json.dumps({"answer": "all wrong", "spans": [span(4, 9)]}) + "\n")
    (row,) = load_data(Jsonl(type="jsonl", path=str(path), columns={"text": "answer"})).to_list()
    assert row == {"text": "all wrong", "spans": [span(4, 9)], "prompt": ""}
    path.write_text(json.dumps({"text": "all wrong", "spans": [span(4, 10)]}) + "\n")
    with pytest.raises(ValueError, match=r"row 1: spans has .* and the text has 9 characters"):
        load_data(Jsonl(type="jsonl", path=str(path)))


@pytest.mark.parametrize("spans", ["[0]", [3], [{"start": 0}], [span(2, 1)], [span(0, True)], [span(-1, 2)]])
def test_what_is_no_span_within_the_text_is_refused(spans: Any) -> None:
    with pytest.raises(ValueError, match="spans"):
        check_spans("text", spans)
    with pytest.raises(ValueError, match="text is no text but 3"):
        check_spans(3, [])


SPANS = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)).map(lambda pair: span(min(pair), max(pair))))


@given(SPANS, st.tuples(st.integers(0, 6), st.integers(7, 12)))
def test_coverage_counts_each_character_once(spans: list[dict[str, Any]], segment: CharRange) -> None:
    inside = {k for s in spans for k in range(s["start"], s["end"])}
    assert covered(ranges_of(spans, ["bad"]), segment) == len(inside & set(range(*segment)))
    assert ranges_of(spans, ["other"]) == []


def test_a_segment_has_the_class_that_covers_most_of_it() -> None:
    segments = [(0, 10), (10, 20), (20, 30), (30, 40)]
    spans = [span(0, 4, "a"), span(3, 8, "b"), span(12, 14, "c"), span(20, 22, "b"), span(25, 27, "a")]
    classes = [("a", "c"), ("b",)]
    assert segment_labels(segments, spans, classes) == [2, 1, 1, 0]
    assert segment_labels(segments, spans, classes, min_overlap=0.2) == [2, 0, 0, 0]


# --- sentences ---


def test_sentences_stand_where_they_follow_each_other(tmp_path: Path) -> None:
    rows = [
        {"text": "No. No. Yes!", "sentences": [{"text": "No.", "label": None}, {"text": "No.", "label": "wrong"}]},
        {"text": "Yes!", "sentences": None},
        {"text": " Yes!", "sentences": [{"text": "Yes!", "label": "wrong"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    read = load_data(Jsonl(type="jsonl", path=str(tmp_path / "rows.jsonl")))
    spans = [[(span["start"], span["end"], span["label"]) for span in row] for row in read["spans"]]
    assert spans == [[(4, 7, "wrong")], [], [(1, 5, "wrong")]]
    assert read["prompt"][:] == ["", "", ""]
    assert labels_of(read["spans"]) == ["wrong"]


@pytest.mark.parametrize(
    ("sentences", "said"),
    [
        ([{"text": "No.", "label": "a"}, {"text": "It is.", "label": "b"}], "'It is.', which text has not, behind"),
        ([{"text": "", "label": "a"}], "which is no {text, label}"),
        ([{"text": "It is."}], "which is no {text, label}"),
        ("It is.", "no list of {text, label}"),
    ],
)
def test_what_is_no_sentence_of_the_text_is_refused(sentences: Any, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        sentence_spans("It is. No.", sentences)


def test_the_row_of_a_wrong_sentence_is_named_and_other_columns_of_that_name_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "Yes.", "sentences": [{"text": said, "label": "a"}]} for said in ("Yes.", "No.")]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"rows\.jsonl, row 2: sentences has 'No\.', which text has not"):
        load_data(Jsonl(type="jsonl", path=str(path)))
    for other in (3, ["Yes."], [{"text": "Yes."}], []):
        path.write_text(json.dumps({"prompt": "p", "text": "Yes.", "sentences": other}))
        assert "spans" not in load_data(Jsonl(type="jsonl", path=str(path))).column_names
