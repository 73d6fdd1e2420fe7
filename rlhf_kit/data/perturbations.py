"""Hard negatives made by editing texts, labelled by the diff (TLDR, arXiv 2410.04734).

TLDR lets a language model write the negatives; these edits need none: a number becomes another number, a name or a word
becomes one of another row, a sentence is negated, a stretch of words is deleted or repeated.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from rlhf_kit.data.messages import completion_text, content_text
from rlhf_kit.rollout import CharRange, Text

Row = dict[str, Any]

_PIECE = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+")
# A capitalised word that opens no sentence, with those that follow it.
_ENTITY = re.compile(r"(?<=[\w,;:()'\"] )[A-Z][\w'-]*(?: [A-Z][\w'-]*)*")
_WORD = re.compile(r"\b[^\W\d_]{4,}\b")
_VERB = re.compile(r"\b(?:is|are|was|were|can|could|will|would|should|must|has|have|had|does|do|did)\b(?! not\b|n't)")
_NEGATION = re.compile(r"(?<=\w) not\b")
_LONGEST_STRETCH = 6  # words that are deleted or repeated at once


@dataclass(frozen=True)
class Pool:
    """What the other rows offer in place of a piece of text; all distinct, in order of appearance."""

    entities: tuple[str, ...]
    words: tuple[str, ...]


def perturbed_rows(
    prompts: Sequence[Text], texts: Sequence[Text], edits: Sequence[str], per_text: int, originals: bool, seed: int
) -> list[Row]:
    """Rows `prompt, text, spans, edit` of `texts`: each as it is, without a span, and `per_text` edited versions.

    Each version is made by one edit, drawn from those of `edits` that this text allows: a text without a number has
    none to change. A text that allows none gives no edited version. The same seed gives the same rows.
    """
    plain = [completion_text(text) for text in texts]
    pool = pool_of(plain)
    rows: list[Row] = []
    for number, (prompt, text) in enumerate(zip(prompts, plain, strict=True)):
        if originals:
            rows.append({"prompt": prompt, "text": text, "spans": [], "edit": ""})
        chance = random.Random(f"perturb {seed} {number}")
        for _ in range(per_text):
            for edit in chance.sample(list(edits), len(edits)):
                edited = perturb(text, edit, pool, chance)
                if edited is not None:
                    spans = [{"start": a, "end": b, "label": edit} for a, b in changed_ranges(text, edited)]
                    rows.append({"prompt": prompt, "text": edited, "spans": spans, "edit": edit})
                    break
    return rows


def corrupted_prompts(prompts: Sequence[Text], edits: Sequence[str], seed: int) -> list[Text | None]:
    """Each prompt after one edit, of a conversation its last message; None where no edit finds anything to change."""
    plain = [last_text(prompt) for prompt in prompts]
    pool = pool_of(plain)
    corrupted: list[Text | None] = []
    for number, (prompt, text) in enumerate(zip(prompts, plain, strict=True)):
        chance = random.Random(f"corrupt {seed} {number}")
        tried = (perturb(text, edit, pool, chance) for edit in chance.sample(list(edits), len(edits)))
        edited = next((found for found in tried if found is not None), None)
        corrupted.append(None if edited is None else with_last_text(prompt, edited))
    return corrupted


def last_text(prompt: Text) -> str:
    """A prompt, or of a conversation its last message."""
    return prompt if isinstance(prompt, str) else content_text(prompt[-1])


def with_last_text(prompt: Text, text: str) -> Text:
    """A prompt with another text in the place of `last_text`."""
    return text if isinstance(prompt, str) else [*prompt[:-1], {**prompt[-1], "content": text}]


def pool_of(texts: Sequence[str]) -> Pool:
    """The names and words of texts."""
    return Pool(_found(_ENTITY, texts), _found(_WORD, texts))


def perturb(text: str, edit: str, pool: Pool, chance: random.Random) -> str | None:
    """The text after one edit; None where it has nothing to edit so."""
    return EDITS[edit](text, pool, chance)


def changed_ranges(original: str, edited: str) -> list[CharRange]:
    """The characters of `edited` that a diff of words and punctuation marks does not find in `original`.

    What was replaced or inserted is in the ranges; where something was only deleted, the piece behind the gap is (at
    the end of the text, the one before it), for that is where a reader stumbles. The ranges neither overlap nor touch.
    """
    before = _PIECE.findall(original)
    pieces = list(_PIECE.finditer(edited))
    after = [piece[0] for piece in pieces]
    found: list[CharRange] = []
    for kind, _, _, start, stop in SequenceMatcher(None, before, after, autojunk=False).get_opcodes():
        if kind == "delete":
            start, stop = (start, start + 1) if start < len(pieces) else (start - 1, start)
        if kind == "equal" or not 0 <= start < stop:
            continue
        first, last = pieces[start].start(), pieces[stop - 1].end()
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(last, found[-1][1]))
        else:
            found.append((first, last))
    return found


def _found(pattern: re.Pattern[str], texts: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(match[0] for text in texts for match in pattern.finditer(text)))


def _pick(pattern: re.Pattern[str], text: str, chance: random.Random) -> re.Match[str] | None:
    matches = list(pattern.finditer(text))
    return chance.choice(matches) if matches else None


def _other(found: str, choices: Sequence[str], chance: random.Random) -> str | None:
    """One of `choices` that is another word than `found`, whatever its case."""
    for choice in chance.sample(choices, min(len(choices), 8)):
        if choice.lower() != found.lower():
            return choice
    return None


def _put(text: str, match: re.Match[str], new: str | None) -> str | None:
    return None if new is None else text[: match.start()] + new + text[match.end() :]


def _number(text: str, pool: Pool, chance: random.Random) -> str | None:
    match = _pick(_NUMBER, text, chance)
    if match is None:
        return None
    digits = match[0]
    low = 10 ** (len(digits) - 1) if len(digits) > 1 else 0
    others = [low + (int(digits) + step - low) % (10 ** len(digits) - low) for step in (-3, -2, -1, 1, 2, 3, 10)]
    return _put(text, match, _other(digits, [str(other) for other in others], chance))


def _entity(text: str, pool: Pool, chance: random.Random) -> str | None:
    match = _pick(_ENTITY, text, chance)
    return None if match is None else _put(text, match, _other(match[0], pool.entities, chance))


def _word(text: str, pool: Pool, chance: random.Random) -> str | None:
    match = _pick(_WORD, text, chance)
    if match is None:
        return None
    new = _other(match[0], pool.words, chance)
    return _put(text, match, new and (new.capitalize() if match[0][0].isupper() else new.lower()))


def _negate(text: str, pool: Pool, chance: random.Random) -> str | None:
    """Without a "not" that is there, else with one behind an auxiliary verb."""
    match = _pick(_NEGATION, text, chance)
    if match is not None:
        return _put(text, match, "")
    match = _pick(_VERB, text, chance)
    return None if match is None else _put(text, match, f"{match[0]} not")


def _stretch(text: str, chance: random.Random) -> CharRange | None:
    """A few words that leave at least as many; with the space behind them."""
    words = list(re.finditer(r"\S+\s*", text))
    longest = min(_LONGEST_STRETCH, len(words) // 2)
    if longest == 0:
        return None
    count = chance.randint(1, longest)
    first = chance.randrange(len(words) - count + 1)
    return words[first].start(), words[first + count - 1].end()


def _delete(text: str, pool: Pool, chance: random.Random) -> str | None:
    place = _stretch(text, chance)
    return None if place is None else (text[: place[0]] + text[place[1] :]).rstrip()


def _duplicate(text: str, pool: Pool, chance: random.Random) -> str | None:
    place = _stretch(text, chance)
    if place is None:
        return None
    repeated = text[place[0] : place[1]]
    space = "" if repeated[-1].isspace() else " "
    return text[: place[1]] + space + repeated + text[place[1] :]


EDITS: dict[str, Callable[[str, Pool, random.Random], str | None]] = {
    "number": _number,
    "entity": _entity,
    "word": _word,
    "negate": _negate,
    "delete": _delete,
    "duplicate": _duplicate,
}
