"""Reading of a judge's JSON answer: tolerant of what stands around it and of small errors, never a guess."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

_THOUGHTS = re.compile(r"\s*<think>(?:.*?</think>|.*)", re.DOTALL)
_BRACE = re.compile("[{}]")
_DECODER = json.JSONDecoder(
    object_pairs_hook=lambda pairs: _without_duplicates(pairs), parse_constant=lambda name: _refuse(name)
)


class Twofold(ValueError):
    """A key of an object occurs twice: JSON, with two meanings."""


def json_answer(text: str, required: Collection[str], data: Sequence[str] = ()) -> dict[str, Any] | None:
    """The JSON object with the `required` keys that a judge answered, or None.

    The answer is the whole text, or an object in it that is not part of another: in a Markdown block, or among words.
    Where the JSON is slightly wrong (single quotes, a comma too many, a bracket too few), `json_repair` reads it. A
    leading `<think>` block is no part of the answer.

    Among words an object counts unless it, or one of the same value, stands in `data`, the texts that were judged: the
    judge quotes it.
    What could be read in two ways is no answer, for a text that is judged may be written so that a careless quotation
    of it becomes a verdict: objects that disagree; a key that occurs twice; a closing brace too many, which
    shows that the object ended inside a quotation. An object that was cut off counts only if its last value is whole.
    """
    text = _THOUGHTS.sub("", text, count=1).strip() if text.lstrip().startswith("<think>") else text.strip()
    whole = _decoded(text)
    if whole is not None:
        return whole if isinstance(whole, dict) and set(required) <= set(whole) else None
    pieces = list(_objects(text))
    if "}" in pieces:
        return None
    quoted = [value for judged in data for piece in _objects(judged) if (value := _with_keys(piece, ())) is not None]
    own = [piece for piece in pieces if piece == text or not any(piece in judged for judged in data)]
    answers = [
        answer
        for piece in own
        if (answer := _with_keys(piece, required)) is not None and (piece == text or answer not in quoted)
    ]
    if any(answer[key] != answers[0][key] for answer in answers for key in required):
        return None
    return answers[-1] if answers else None


def has_whole_object(text: str) -> bool:
    """Whether there is a JSON object in a text, strictly read."""
    return any(isinstance(_decoded(piece), dict) for piece in _objects(text))


def _with_keys(piece: str, required: Collection[str]) -> dict[str, Any] | None:
    value = _decoded(piece)
    if value is None and not any(_occurrences(key, piece) > 1 for key in required) and _is_whole(piece):
        value = _repaired(piece)
    return value if isinstance(value, dict) and set(required) <= set(value) else None


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
