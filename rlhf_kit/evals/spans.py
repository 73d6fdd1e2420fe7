"""How well predicted spans agree with annotated ones, and baselines that need no model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rlhf_kit.rollout import CharRange

_WORD = re.compile(r"\w+(?:['’]\w+)*")


@dataclass(frozen=True)
class Agreement:
    """Precision, recall and their harmonic mean."""

    precision: float
    recall: float
    f1: float


def char_f1(predicted: Sequence[CharRange], gold: Sequence[CharRange]) -> float:
    """F1 of the characters of one text that were predicted: `2 |P & G| / (|P| + |G|)`.

    1 where neither has any, and 0 where only one has (SemEval-2021 task 5, Pavlopoulos et al., section 3).
    """
    ours, theirs = characters(predicted), characters(gold)
    if not ours and not theirs:
        return 1.0
    return 2 * len(ours & theirs) / (len(ours) + len(theirs))


def mean_char_f1(predicted: Sequence[Sequence[CharRange]], gold: Sequence[Sequence[CharRange]]) -> float:
    """`char_f1` averaged over texts, which all count the same."""
    scores = [char_f1(ours, theirs) for ours, theirs in zip(predicted, gold, strict=True)]
    return sum(scores) / len(scores)


def characters(ranges: Sequence[CharRange]) -> set[int]:
    """The characters that lie in one of the ranges."""
    return {position for start, end in ranges for position in range(start, end)}


def agreement(predicted: Sequence[int], gold: Sequence[int], label: int) -> Agreement:
    """Precision, recall and F1 of one class over the segments of all texts; each is 0 where it has no case."""
    both = sum(ours == theirs == label for ours, theirs in zip(predicted, gold, strict=True))
    ours, theirs = list(predicted).count(label), list(gold).count(label)
    precision, recall = both / ours if ours else 0.0, both / theirs if theirs else 0.0
    total = ours + theirs
    return Agreement(precision, recall, 2 * both / total if total else 0.0)


def marked(text: str, segments: Sequence[CharRange], labels: Sequence[int], label: int) -> list[CharRange]:
    """The characters of the segments with a label; neighbours with only whitespace in between are one range."""
    ranges: list[CharRange] = []
    for (start, end), given in zip(segments, labels, strict=True):
        if given != label:
            continue
        if ranges and not text[ranges[-1][1] : start].strip():
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((start, end))
    return ranges


def lexicon(texts: Sequence[str], gold: Sequence[Sequence[CharRange]], least: float = 0.5) -> frozenset[str]:
    """The words, in lower case, of which more than the share `least` of the occurrences touch an annotated span."""
    seen: Counter[str] = Counter()
    inside: Counter[str] = Counter()
    for text, ranges in zip(texts, gold, strict=True):
        annotated = characters(ranges)
        for match in _WORD.finditer(text):
            word = match[0].lower()
            seen[word] += 1
            inside[word] += not annotated.isdisjoint(range(*match.span()))
    return frozenset(word for word, count in inside.items() if count > least * seen[word])


def lexicon_spans(text: str, words: frozenset[str]) -> list[CharRange]:
    """Where the words of a lexicon stand in a text."""
    return [match.span() for match in _WORD.finditer(text) if match[0].lower() in words]
