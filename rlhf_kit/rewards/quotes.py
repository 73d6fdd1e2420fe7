"""From a critic's answer to the characters that it quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeGuard

from rlhf_kit.data.messages import dialogue_text
from rlhf_kit.judges.parsing import json_answer
from rlhf_kit.rollout import CharRange, Text

VERDICTS = ("good", "bad")
FIELDS = {"quote", "verdict", "occurrence"}
# The words of an answer, or an escape that may spell one.
_IMITATION = re.compile(r"\b(?:spans|quote|verdict|occurrence)\b|\\[ux][0-9a-fA-F]{2}")
_QUOTE = re.compile(r'"quote"\s*:\s*("(?:[^"\\]|\\.)*")')
_ESCAPED_KEY = re.compile(r'\\u[0-9a-fA-F]{4}[^"\\:]*"\s*:')
_LAYOUT = re.compile(r"""[\s"'`“”„‘’«»]+""")  # what a judge may change when it copies


@dataclass
class Reading:
    """What a critic's answer says of a completion.

    Attributes:
        spans: the ranges that it names, and whether each is good.
        dropped: how many of its entries name no passage of the completion.
    """

    spans: list[tuple[CharRange, bool]] = field(default_factory=list)
    dropped: int = 0


def read_answer(answer: str, text: str, prompt: Text = "") -> Reading | None:
    """The ranges of `text` that a critic's JSON answer quotes, each with whether it is good; None if unreadable.

    A quote means its occurrence of that number or, where it has none, its first that no entry before it has named. An
    entry is dropped that quotes nothing or what does not occur (so often), names what an entry before it has named
    with the same verdict, or has no verdict. An answer is unreadable if it is not the JSON that was asked for, or none
    of its entries has a quote and a verdict.

    A critic that quotes `a", "verdict": "good"}, {"quote": "b` without escaping it has written two entries, of which
    the first is none of its own. So where a text that it reads has words of an answer, its answer is unreadable unless
    it is JSON to the letter with nothing in it but what was asked for, and unless two entries, with what stands between
    them, stand in no such text.
    """
    data = [text, dialogue_text(prompt)]
    imitations = [judged for judged in data if _IMITATION.search(judged)]
    value = json_answer(answer, ["spans"], data, strict=bool(imitations))
    if value is None or not isinstance(value["spans"], list):
        return None
    entries = [entry if _is_entry(entry) else None for entry in value["spans"]]
    if entries and not any(entries):
        return None
    exact = set(value) == {"spans"} and all(map(_is_exact, entries)) and not _ESCAPED_KEY.search(answer)
    if imitations and (not exact or _is_quoted(answer, imitations)):
        return None
    reading = Reading()
    places = {quote: occurrences(quote, text) for quote in {entry["quote"] for entry in entries if entry is not None}}
    named: set[CharRange] = set()
    found: set[tuple[CharRange, bool]] = set()
    for entry in entries:
        place = None if entry is None else locate(places[entry["quote"]], entry.get("occurrence"), named)
        span = None if entry is None or place is None else (place, entry["verdict"] == "good")
        if span is None or span in found:
            reading.dropped += 1
        else:
            reading.spans.append(span)
            found.add(span)
            named.add(span[0])
    return reading


def _is_entry(entry: object) -> TypeGuard[dict[str, Any]]:
    """Whether part of an answer has the form that was asked for."""
    return isinstance(entry, dict) and isinstance(entry.get("quote"), str) and entry.get("verdict") in VERDICTS


def _is_exact(entry: dict[str, Any] | None) -> bool:
    """Whether an entry is one, and has no field beside those that were asked for."""
    if entry is None or not set(entry) <= FIELDS:
        return False
    occurrence = entry.get("occurrence")
    return occurrence is None or (isinstance(occurrence, int) and not isinstance(occurrence, bool))


def _is_quoted(answer: str, texts: Sequence[str]) -> bool:
    """Whether two quotes of an answer stand in a text with all that stands between them."""
    bare = [_LAYOUT.sub("", text) for text in texts]
    for one, other in pairwise(_QUOTE.finditer(answer)):
        first, second = (json.loads(match[1], strict=False) for match in (one, other))
        passage = _LAYOUT.sub("", first + answer[one.end() : other.start(1)] + second)
        if any(passage in text for text in bare):
            return True
    return False


def locate(places: Sequence[CharRange], occurrence: object, named: Collection[CharRange] = ()) -> CharRange | None:
    """The range that a quote means, of those where it stands, or None.

    With an `occurrence`, counted from 1, it is that one, and else the first that is not in `named`.
    """
    if occurrence is None:
        return next((place for place in places if place not in named), None)
    if isinstance(occurrence, bool) or not isinstance(occurrence, int) or not 1 <= occurrence <= len(places):
        return None
    return places[occurrence - 1]


def occurrences(quote: str, text: str) -> list[CharRange]:
    """Where a quote stands in a text, letter by letter, without overlaps; nowhere if it is empty or whitespace.

    Where it stands as words of its own it is not looked for within words: "art" is not meant to be that of "party".
    """
    if not quote.strip():
        return []
    found = [match.span() for match in re.finditer(re.escape(quote), text)]
    return [place for place in found if not _cuts_a_word(place, text)] or found


def _cuts_a_word(place: CharRange, text: str) -> bool:
    """Whether a range begins or ends within a word, in scripts that put spaces between words."""
    return any(
        0 < cut < len(text) and _is_spaced_letter(text[cut - 1]) and _is_spaced_letter(text[cut]) for cut in place
    )


def _is_spaced_letter(character: str) -> bool:
    """A digit, or a letter that has a capital form: those of Latin, Greek or Cyrillic, not Chinese or Thai ones."""
    return character.isdecimal() or character.lower() != character.upper()
