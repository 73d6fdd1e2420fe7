"""Texts with annotated spans: reading of two human data sets, and from characters to the labels of segments.

A row is `prompt, text, spans`; a span is `{start, end, label}` and counts the characters of `text`. Instead of spans it
may have `sentences`, each `{text, label}`.
"""

from __future__ import annotations

import ast
import csv
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rlhf_kit.rollout import CharRange

Row = dict[str, Any]

TOXIC = "toxic"
# The six comparisons of qa_feedback's `preference`: 1 prefers the first, 2 the second, 0 neither.
COMPARED = ((1, 2), (1, 3), (1, 4), (2, 3), (2, 4), (3, 4))


def toxic_spans_rows(content: str) -> Iterator[Row]:
    """Rows of the CSV of SemEval-2021 task 5: `spans` lists the toxic characters one by one, `text` is the post.

    Raises:
        ValueError: a row cannot be read; the message has its number, from 1, without the header.
    """
    reader = csv.DictReader(io.StringIO(content, newline=""))
    if not {"spans", "text"} <= set(reader.fieldnames or ()):
        raise ValueError(f"its columns are {', '.join(reader.fieldnames or ())}, and must be spans and text")
    for number, row in enumerate(reader, start=1):
        try:
            indices = _indices(row["spans"], len(row["text"] or ""))
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
        spans = [{"start": start, "end": end, "label": TOXIC} for start, end in contiguous(indices)]
        yield {"prompt": "", "text": row["text"], "spans": spans}


def _indices(written: str | None, length: int) -> list[int]:
    """The character indices that a Python list spells out."""
    try:
        indices = ast.literal_eval(written or "")
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        raise ValueError(f"spans is no list of character indices but {_shown(written)}") from error
    if not isinstance(indices, list) or any(type(index) is not int for index in indices):
        raise ValueError(f"spans is no list of character indices but {_shown(written)}")
    outside = [index for index in indices if not 0 <= index < length]
    if outside:
        raise ValueError(f"spans has the index {outside[0]}, and the text has {length} characters")
    return indices


def contiguous(indices: Sequence[int]) -> list[CharRange]:
    """Ranges `[start, end)` of indices that follow one another; their order and repetitions do not matter."""
    ranges: list[CharRange] = []
    for index in sorted(set(indices)):
        if ranges and ranges[-1][1] == index:
            ranges[-1] = (ranges[-1][0], index + 1)
        else:
            ranges.append((index, index + 1))
    return ranges


def qa_feedback_rows(item: Mapping[str, Any], passages: int, paired: bool) -> list[Row]:
    """The rows of one question of Fine-Grained RLHF's `*_feedback.json` (arXiv 2306.01693).

    Unpaired, one row: its first prediction with the spans of its errors by error type, and a span over the whole text
    for each kind of information that it lacks. Paired, a row `prompt, chosen, rejected` for each comparison of two of
    its four predictions that has a winner. The prompt is the question, behind `passages` sentences of its passages.

    Raises:
        ValueError: a field is missing, or a span lies outside the text.
    """
    needed = ("question", "passages", "prediction 1", "feedback", "preference")
    missing = [name for name in needed if name not in item]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}, which every question of dev_feedback.json has")
    sentences = [sentence for passage in item["passages"] for sentence in passage[1:]]  # the first is a title
    prompt = "\n\n".join([*nearest(item["question"], sentences, passages), item["question"]])
    if paired:
        return [
            {"prompt": prompt, "chosen": item[f"prediction {chosen}"], "rejected": item[f"prediction {rejected}"]}
            for chosen, rejected in _preferred(item["preference"])
        ]
    text, feedback = item["prediction 1"], item["feedback"]
    spans = [{"start": e["start"], "end": e["end"], "label": e["error type"]} for e in feedback["errors"]]
    lacks = sorted({info["error type"] for info in feedback["missing-info"]})
    spans += [{"start": 0, "end": len(text), "label": kind} for kind in lacks]
    check_spans(text, spans)
    return [{"prompt": prompt, "text": text, "spans": spans}]


def nearest(question: str, sentences: Sequence[str], count: int) -> list[str]:
    """The `count` sentences with the most different words of the question, in their order; of equals, the first."""
    asked = set(_words(question))
    ranked = sorted(range(len(sentences)), key=lambda k: -len(asked.intersection(_words(sentences[k]))))
    return [sentences[k] for k in sorted(ranked[:count])]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _preferred(preference: Sequence[int]) -> list[tuple[int, int]]:
    """The (better, worse) predictions; comparisons without a winner are left out."""
    if len(preference) != len(COMPARED) or any(verdict not in (0, 1, 2) for verdict in preference):
        raise ValueError(f"preference is {_shown(preference)}, and must be six of 0, 1 and 2")
    pairs = zip(COMPARED, preference, strict=True)
    return [(pair[verdict - 1], pair[2 - verdict]) for pair, verdict in pairs if verdict]


def check_spans(text: Any, spans: Any) -> None:
    """Refuse what is no text with a list of spans within it.

    Raises:
        ValueError: with the text or the span.
    """
    if not isinstance(text, str):
        raise ValueError(f"text is no text but {_shown(text)}")
    if not isinstance(spans, Sequence) or isinstance(spans, str):
        raise ValueError(f"spans is no list of {{start, end, label}} but {_shown(spans)}")
    for span in spans:
        if not isinstance(span, Mapping) or not {"start", "end", "label"} <= span.keys():
            raise ValueError(f"spans has {_shown(span)}, which is no {{start, end, label}}")
        if not isinstance(span["label"], str | None):
            raise ValueError(f"spans has {_shown(span)}, whose label is no text")
        start, end = span["start"], span["end"]
        if type(start) is not int or type(end) is not int or not 0 <= start <= end <= len(text):
            raise ValueError(f"spans has {_shown(span)}, and the text has {len(text)} characters")


def has_sentences(rows: Iterable[Any]) -> bool:
    """Whether a column `sentences` holds labelled ones: what it holds first is a list of `{text, label}`, or empty."""
    first = next((sentences for sentences in rows if sentences), None)
    return isinstance(first, list) and isinstance(first[0], Mapping) and {"text", "label"} <= first[0].keys()


def sentence_spans(text: Any, sentences: Any) -> list[dict[str, Any]]:
    """The spans of labelled sentences; one whose label is null has none.

    A sentence stands in `text` where it is found first behind the one before.

    Raises:
        ValueError: it is no `{text, label}`, or does not stand there.
    """
    if not isinstance(text, str):
        raise ValueError(f"text is no text but {_shown(text)}")
    if not isinstance(sentences, Sequence | None) or isinstance(sentences, str):
        raise ValueError(f"sentences is no list of {{text, label}} but {_shown(sentences)}")
    spans, place = [], 0
    for sentence in sentences or ():
        if not isinstance(sentence, Mapping) or not sentence.get("text") or "label" not in sentence:
            raise ValueError(f"sentences has {_shown(sentence)}, which is no {{text, label}}")
        start = text.find(sentence["text"], place)
        if start < 0:
            raise ValueError(f"sentences has {_shown(sentence['text'])}, which text has not, behind those before")
        place = start + len(sentence["text"])
        if sentence["label"] is not None:
            spans.append({"start": start, "end": place, "label": sentence["label"]})
    return spans


def labels_of(rows: Iterable[Sequence[Mapping[str, Any]]]) -> list[str]:
    """The labels of all spans, each once, in the order in which they occur."""
    return list(dict.fromkeys(label for spans in rows for span in spans if (label := span["label"]) is not None))


def segment_labels(
    segments: Sequence[CharRange],
    spans: Sequence[Mapping[str, Any]],
    classes: Sequence[Sequence[str]],
    min_overlap: float = 0.0,
) -> list[int]:
    """The class of each segment: 0 for none, k for one that spans with a label of `classes[k - 1]` mark.

    A class counts where its spans cover more than `min_overlap` of the segment's characters; of several, the one that
    covers most, and of equals the first.
    """
    marked = [ranges_of(spans, labels) for labels in classes]
    found = []
    for start, end in segments:
        shares = [covered(ranges, (start, end)) / (end - start) for ranges in marked]
        best = max(range(len(shares)), key=shares.__getitem__)
        found.append(best + 1 if shares[best] > min_overlap else 0)
    return found


def ranges_of(spans: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> list[CharRange]:
    """The characters that spans with one of `labels` cover: ranges in order that neither overlap nor touch."""
    ranges: list[CharRange] = []
    for start, end in sorted((span["start"], span["end"]) for span in spans if span["label"] in labels):
        if ranges and start <= ranges[-1][1]:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        elif start < end:
            ranges.append((start, end))
    return ranges


def covered(ranges: Sequence[CharRange], segment: CharRange) -> int:
    """How many characters of a segment lie in `ranges`, which do not overlap."""
    return sum(max(0, min(end, segment[1]) - max(start, segment[0])) for start, end in ranges)


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text[:80]}..." if len(text) > 80 else text
