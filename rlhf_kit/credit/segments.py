"""Segmenters: the parts of a text that are judged one by one, as character ranges.

Ranges are in order, do not overlap, hold no whitespace at their ends, and none is empty. Together they hold every
character of the text that is not whitespace. (`spans.segment` cuts a text into adjoining steps instead.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby, pairwise

from rlhf_kit.rollout import CharRange

# A blank line; a line break before "Step 3", "3.", "3)", "- ", "* " or "• "; the space between ". " and "Step 3:".
STEP_PATTERN = (
    r"\n[ \t\r]*\n\s*"
    r"|\n(?=[ \t]*(?:[#*_ \t]*(?:[Ss]tep|STEP)[ \t]+\d+\b|\d+[.)][ \t]|[-*•][ \t]))"
    r"|(?<=[.!?])[ \t]+(?=(?:[Ss]tep|STEP)[ \t]+\d+[:.])"
)
_LIST_NUMBER = re.compile(r"\s*\d+[.)]\s+")
_CLAUSE_ENDS = ",;!?"
# sentencex 1.0 panics on some texts where whitespace of several bytes stands before a full stop ("B\u00a0.").
_WIDE_SPACE = re.compile(r"[^\S\x00-\x7f]")


def completion(text: str) -> list[CharRange]:
    """The whole text, one range; none where there is only whitespace."""
    return trimmed(text, [(0, len(text))])


def steps(text: str, pattern: str = STEP_PATTERN) -> list[CharRange]:
    """Steps end where a regular expression has matched: at blank lines, and before "Step k" and list items.

    What a pattern matches belongs to the step that it ends; what a lookahead sees, to the next.
    """
    cuts = [0, *(match.end() for match in re.finditer(pattern, text)), len(text)]
    return trimmed(text, pairwise(cuts))


def sentences(text: str, language: str = "en") -> list[CharRange]:
    """Sentences, as the `sentencex` package finds them; a line break ends one too, and the number of a list item none.

    `language` is a code such as `en` or `de`, for its abbreviations; an unknown one is split as English is.
    """
    from sentencex import get_sentence_boundaries  # pyright: ignore[reportAttributeAccessIssue]

    found = []
    for line in re.finditer(r"[^\n]+", text):  # sentencex does not cut the items of a list that it sees as a whole
        start, words = line.start(), _WIDE_SPACE.sub(" ", line.group())
        ends = [boundary["end_index"] for boundary in get_sentence_boundaries(language, words)]
        number = _LIST_NUMBER.match(words)
        if number and len(ends) > 1 and ends[0] == number.end():
            del ends[0]
        found += trimmed(text, pairwise([start, *(start + end for end in ends)]))
    return found


def subsentences(text: str, min_words: int = 5, language: str = "en") -> list[CharRange]:
    """Sentences cut behind words that end in `, ; ! ?`, each part with at least `min_words` words (a shorter sentence
    is one part).

    The rule of Fine-Grained Human Feedback (arXiv 2306.01693, section 4.1): a part that is too short joins the one
    before it, the first of a sentence the one behind it. Its code leaves more than `min_words` words behind a cut.
    """
    found = []
    for start, end in sentences(text, language):
        words = [match.span() for match in re.compile(r"\S+").finditer(text, start, end)]
        firsts = [0]  # word that each part begins with
        for k in range(1, len(words) - min_words + 1):
            if text[words[k - 1][1] - 1] not in _CLAUSE_ENDS:
                continue
            if k - firsts[-1] >= min_words:
                firsts.append(k)
            elif len(firsts) > 1:
                firsts[-1] = k
        found += trimmed(text, pairwise([*(words[k][0] for k in firsts), end]))
    return found


def turns(text: str, offsets: Sequence[CharRange], action_mask: Sequence[bool]) -> list[CharRange]:
    """The text of each run of action tokens: what the policy said between two answers of tools."""
    found: list[CharRange] = []
    position = 0
    for action, run in groupby(zip(offsets, action_mask, strict=True), key=lambda token: token[1]):
        ranges = [span for span, _ in run]
        start, end = min(start for start, _ in ranges), max(end for _, end in ranges)
        if action:
            found.append((max(start, position), end))
        position = max(position, end)
    return trimmed(text, found)


def tokens(offsets: Sequence[CharRange], action_mask: Sequence[bool]) -> list[CharRange]:
    """The text of each action token that has any; ranges may hold whitespace, and share a split character."""
    pairs = zip(offsets, action_mask, strict=True)
    return [(start, end) for (start, end), action in pairs if action and start < end]


def trimmed(text: str, ranges: Iterable[CharRange]) -> list[CharRange]:
    """The ranges without whitespace at their ends, and without the empty ones."""
    found = []
    for start, end in ranges:
        part = text[start:end]
        start += len(part) - len(part.lstrip())
        if part := part.strip():
            found.append((start, start + len(part)))
    return found
