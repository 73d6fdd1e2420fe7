"""Reading of a judge's JSON answer: tolerant of what stands around it and of small errors, never a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

_THOUGHTS = re.compile(r"\s*<think>(?:.*?</think>|.*)", re.DOTALL)
_BRACE = re.compile("[{}]")
LONGEST_REPAIRED = 4_000  # characters; repairing takes time that grows with the square of the length
_DECODER = json.JSONDecoder(
    object_pairs_hook=lambda pairs: _without_duplicates(pairs), parse_constant=lambda name: _refuse(name)
)


class Twofold(ValueError):
    """A key of an object occurs twice: JSON, with two meanings."""


def json_answer(
    text: str, required: Collection[str], data: Sequence[str] = (), strict: bool = False
) -> dict[str, Any] | None:
    """The JSON object with the `required` keys that a judge answered, or None.

    The answer is the whole text, or an object in it that is not part of another: in a Markdown block, or among words.
    Where the JSON is slightly wrong (single quotes, a comma too many, a bracket too few), `json_repair` reads it, up to
    `LONGEST_REPAIRED` characters in all. A leading `<think>` block is no part of the answer.

    No answer is an object that stands in `data`, the texts that were judged, letter by letter, or as an object of the
    same value, at any depth: a judge that parrots or quotes a text has not judged it. An honest verdict of which the
    text happens to hold the same is lost with it, and is missing, not wrong.
    What could be read in two ways is no answer either, for a text that is judged may be written so that a careless
    quotation of it becomes a verdict: objects that disagree; a key that occurs twice; a closing brace too many, which
    shows that the object ended inside a quotation. An object that was cut off counts only if its last value is whole.
    If `strict`, the answer has to be JSON as it stands, and the judge's only object beside quotations of `data`.
    """
    text = _THOUGHTS.sub("", text, count=1).strip() if text.lstrip().startswith("<think>") else text.strip()
    pieces = [text] if _decoded(text) is not None else list(dict.fromkeys(_objects(text)))
    if "}" in pieces:
        return None
    own = [piece for piece in pieces if not any(piece in judged for judged in data)]
    if _length_to_repair(own) > (0 if strict else LONGEST_REPAIRED):
        return None
    quoted = _values(data, required) if own else set()
    values = [_value(piece, required) for piece in own]
    values = [value for value in values if not isinstance(value, dict) or _canonical(value) not in quoted]
    answers = [value for value in values if isinstance(value, dict) and set(required) <= set(value)]
    if strict and len(answers) < len(values):
        return None
    if any(answer[key] != answers[0][key] for answer in answers for key in required):
        return None
    return answers[-1] if answers else None


def has_whole_object(text: str) -> bool:
    """Whether there is a JSON object in a text, strictly read."""
    return any(isinstance(_decoded(piece), dict) for piece in _objects(text))


def _length_to_repair(pieces: Sequence[str]) -> int:
    return sum(len(piece) for piece in pieces if _decoded(piece) is None)


def _value(piece: str, required: Collection[str]) -> Any:
    """What a piece says, repaired if need be; None if that cannot be told."""
    value = _decoded(piece)
    if value is None and not any(_occurrences(key, piece) > 1 for key in required) and _is_whole(piece):
        value = _repaired(piece)
    return value


def _values(data: Sequence[str], required: Collection[str]) -> set[str]:
    """Every object that stands in the texts, or within one that does, in canonical form."""
    found: set[str] = set()
    for judged in data:
        left = LONGEST_REPAIRED
        for piece in dict.fromkeys(_objects(judged)):
            value = _decoded(piece)
            if value is None and len(piece) <= left and all(key in piece for key in required):
                left -= len(piece)
                value = _repaired(piece)
            within = [value]
            while within:
                value = within.pop()
                if isinstance(value, dict):
                    found.add(_canonical(value))
                within += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return found


def _canonical(value: Any) -> str:
    """The same text for the same value: keys in order, 10.0 as 10."""
    return re.sub(r"(?<=\d)\.0+(?!\d)", "", json.dumps(value, sort_keys=True))


def _objects(text: str) -> Iterator[str]:
    """Pieces that may be objects, in order, none within another; "}" for each closing brace too many."""
    place = 0
    while (match := _BRACE.search(text, place)) is not None:
        place = match.start()
        end = place + 1 if match[0] == "}" else _object_end(text, place)
        yield text[place:end]
        place = end


def _object_end(text: str, start: int) -> int:
    """Where the object that opens at `start` ends: as JSON, or else where its braces balance, or the text ends."""
    try:
        return _DECODER.raw_decode(text, start)[1]
    except (ValueError, RecursionError):
        depth = 0
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return place + 1
    return len(text.removesuffix("```").rstrip())


def _is_whole(piece: str) -> bool:
    """Whether a piece ends with a bracket or a closed string: a number may have been cut in the middle."""
    return piece.endswith(("}", "]", '"', "'"))


def _occurrences(key: str, piece: str) -> int:
    return len(re.findall(rf"[\"']?\b{re.escape(key)}\b[\"']?\s*:", piece))


def _decoded(text: str) -> Any:
    """The value of a text that is JSON, strictly; None if it is not; `Twofold` if a key of an object occurs twice."""
    try:
        return _DECODER.decode(text)
    except Twofold as twofold:
        return twofold
    except (ValueError, RecursionError):
        return None


def _repaired(piece: str) -> Any:
    import json_repair

    try:
        value = json_repair.loads(piece)
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError):
        return None
    return value


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        raise Twofold
    return value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
