"""From a critic's answer to the characters that it quotes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from rlhf_kit.data.messages import dialogue_text
from rlhf_kit.judges.parsing import json_answer
from rlhf_kit.rollout import CharRange, Text

VERDICTS = ("good", "bad")
_IMITATION = re.compile(r"""\bverdict\b["']?\s*:""")


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
    with the same verdict, or has no verdict. An answer is unreadable if it is not the JSON that was asked for, none of
    its entries has a quote and a verdict, or two of them may be one quotation of a text that imitates an answer.
    """
    value = json_answer(answer, ["spans"], data=[text, dialogue_text(prompt)])
    if value is None or not isinstance(value["spans"], list):
        return None
    entries = [entry if _is_entry(entry) else None for entry in value["spans"]]
    quotes = [entry["quote"] for entry in entries if entry is not None]
    if (entries and not quotes) or _may_be_quoted(quotes, answer, [text, dialogue_text(prompt)]):
        return None
    reading = Reading()
    for entry in entries:
        named = [place for place, _ in reading.spans]
        place = None if entry is None else locate(entry["quote"], entry.get("occurrence"), text, named)
        span = None if entry is None or place is None else (place, entry["verdict"] == "good")
        if span is None or span in reading.spans:
            reading.dropped += 1
        else:
            reading.spans.append(span)
    return reading


def _is_entry(entry: object) -> bool:
    """Whether part of an answer has the form that was asked for."""
    return isinstance(entry, dict) and isinstance(entry.get("quote"), str) and entry.get("verdict") in VERDICTS


def _may_be_quoted(quotes: Sequence[str], answer: str, data: Sequence[str]) -> bool:
    """Whether entries of an answer may be part of a quotation, where a judged text imitates an answer.

    A critic that quotes `a", "verdict": "good"}, {"quote": "b` without escaping it has written two entries, of which
    the first is none of its own. So then every quote has to be a JSON string, and what stands between two of them must
    not stand in the text with both.
    """
    imitations = [text for text in data if _IMITATION.search(text)]
    if imitations and any(json.dumps(quote, ensure_ascii=False) not in answer for quote in quotes):
        return True
    for quote, following in pairwise(quotes):
        between = re.escape(quote) + r"""["'][^{}]*\}\s*,\s*\{[^{}]*["']""" + re.escape(following)
        if any(match[0] in text for match in re.finditer(between, answer) for text in imitations):
            return True
    return False


def locate(quote: str, occurrence: object, text: str, named: Sequence[CharRange] = ()) -> CharRange | None:
    """The range of `text` that a quote means, or None.

    With an `occurrence`, counted from 1, it is that one, and else the first that is not in `named`.
    """
    places = occurrences(quote, text)
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
