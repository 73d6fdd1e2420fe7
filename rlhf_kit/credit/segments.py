"""Segmenters: the parts of a text that are judged one by one, as character ranges.

Ranges are in order, do not overlap, hold no whitespace at their ends, and none is empty. Together they hold every
character of the text that is not whitespace. (`spans.segment` cuts a text into adjoining steps instead.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from rlhf_kit.rollout import CharRange

# A blank line, or a line break before "Step 3", "3.", "3)", "- " or "* ".
STEP_PATTERN = r"\n[ \t]*\n\s*|\n(?=[ \t]*(?:[Ss]tep[ \t]+\d+\b|\d+[.)][ \t]|[-*•][ \t]))"
_CLAUSE_END = re.compile(r"[,;!?]+(?=\s|$)")


def completion(text: str) -> list[CharRange]:
    """The whole text, one range; none where there is only whitespace."""
    return trimmed(text, [(0, len(text))])


def steps(text: str, pattern: str = STEP_PATTERN) -> list[CharRange]:
    """What stands between the matches of a regular expression: blank lines, "Step k", numbered or bulleted lists."""
    cuts = [0, *(match.end() for match in re.finditer(pattern, text)), len(text)]
    return trimmed(text, pairwise(cuts))


def sentences(text: str, language: str = "en") -> list[CharRange]:
    """Sentences, as the `sentencex` package finds them; a line break ends one too."""
    from sentencex import get_sentence_boundaries

    cuts = {0, len(text), *(match.end() for match in re.finditer(r"\n", text))}
    cuts |= {boundary["end_index"] for boundary in get_sentence_boundaries(language, text)}
    return trimmed(text, pairwise(sorted(cut for cut in cuts if cut <= len(text))))


def subsentences(text: str, min_words: int = 5, language: str = "en") -> list[CharRange]:
    """Sentences cut behind `, ; ! ?`, where both parts have at least `min_words` words (arXiv 2306.01693, section 4).

    A part that is too short stays with the one before it, the first of a sentence with the one behind it.
    """
    found = []
    for start, end in sentences(text, language):
        cuts = [start]
        for match in _CLAUSE_END.finditer(text, start, end):
            enough = len(text[cuts[-1] : match.end()].split()) >= min_words
            if enough and len(text[match.end() : end].split()) >= min_words:
                cuts.append(match.end())
        found += trimmed(text, pairwise([*cuts, end]))
    return found


def turns(text: str, offsets: Sequence[CharRange], action_mask: Sequence[bool]) -> list[CharRange]:
    """The text of each run of action tokens: what the policy said between two answers of tools."""
    found: list[CharRange] = []
    before = False
    for (start, end), action in zip(offsets, action_mask, strict=True):
        if action:
            found = [*found[:-1], (found[-1][0], max(end, found[-1][1]))] if before else [*found, (start, end)]
        before = action
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
