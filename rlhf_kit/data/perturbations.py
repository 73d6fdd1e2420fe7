"""Hard negatives made by editing texts, labelled by the diff (TLDR, arXiv 2410.04734).

TLDR lets a language model write the negatives; these edits need none: a number becomes another number, a name or a word
becomes one of another row, a sentence is negated, a stretch of words is deleted or repeated.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

from rlhf_kit.data.implicit_prompts import last_said
from rlhf_kit.data.messages import completion_text, content_text
from rlhf_kit.rollout import CharRange, Text

Row = dict[str, Any]

_PIECE = re.compile(r"\w+|[^\w\s]")
_NUMBER = re.compile(r"\d+")
# A capitalised word that opens no sentence, with those that follow it; "I" and "I'm" are no names.
_ENTITY = re.compile(r"(?<=[\w,;:()'\"] )(?!I\b)[A-Z][\w'-]*(?: (?!I\b)[A-Z][\w'-]*)*")
_WORD = re.compile(r"\b[^\W\d_]{4,}\b")
_AUXILIARY = "is|are|was|were|can|could|will|would|should|must|has|have|had|does|do|did"
# One that is neither contracted nor negated, nor stands behind another ("could do") or an infinitive's "to".
_VERB = re.compile(rf"(?<!\bto )(?<!['’-])\b(?:{_AUXILIARY})\b(?!['’-]|n['’]t\b| n['’]t\b| not\b)")
_BEHIND_VERB = re.compile(rf"\b(?:{_AUXILIARY}|cannot|\w+['’](?:t|ve|d|ll|re|s|m))\s+$", re.IGNORECASE)
_CONTRACTED = {"can": "can", "won": "will", "shan": "shall"}
_NEGATION = re.compile(
    rf"(?<=\w) (?:not|n['’]t)\b|\b(?:can|won|shan|(?:{_AUXILIARY}|need|might)n)['’]t\b|\bcannot\b", re.IGNORECASE
)
_TRIES = 8  # at a version of a text that is not there yet
_LONGEST_STRETCH = 6  # words that are deleted or repeated at once


@dataclass(frozen=True)
class Pool:
    """What the rows offer in place of a piece of text; all distinct, in order of appearance.

    A text gets only what it does not hold itself, which is then another row's.
    """

    entities: tuple[str, ...]
    words: tuple[str, ...]


def perturbed_rows(
    prompts: Sequence[Text], texts: Sequence[Text], edits: Sequence[str], per_text: int, originals: bool, seed: int
) -> list[Row]:
    """Rows `prompt, text, spans, edit` of `texts`: each as it is, without a span, and `per_text` edited versions.

    Each version is made by one edit, drawn from those of `edits` that this text allows: a text without a number has
    none to change. No two versions of a text are the same; a text that allows fewer gives fewer, or none. The same seed
    gives the same rows.
    """
    plain = [completion_text(text) for text in texts]
    pool = pool_of(plain)
    rows: list[Row] = []
    for number, (prompt, text) in enumerate(zip(prompts, plain, strict=True)):
        if originals:
            rows.append({"prompt": prompt, "text": text, "spans": [], "edit": ""})
        chance = random.Random(f"perturb {seed} {number}")
        versions: dict[str, str] = {}
        while len(versions) < per_text and (version := _new_version(text, edits, pool, chance, versions)) is not None:
            versions[version[0]] = version[1]
        for edited, edit in versions.items():
            spans = [{"start": a, "end": b, "label": edit} for a, b in changed_ranges(text, edited)]
            rows.append({"prompt": prompt, "text": edited, "spans": spans, "edit": edit})
    return rows


def _new_version(
    text: str, edits: Sequence[str], pool: Pool, chance: random.Random, versions: Collection[str]
) -> tuple[str, str] | None:
    """The text after one of the edits, and which; None where none gives a version that is not among `versions`."""
    for edit in chance.sample(list(edits), len(edits)):
        for _ in range(_TRIES):
            edited = perturb(text, edit, pool, chance)
            if edited is None:
                break
            if edited not in versions:
                return edited, edit
    return None


def corrupted_prompts(prompts: Sequence[Text], edits: Sequence[str], seed: int) -> list[Text | None]:
    """Each prompt after one edit of its `last_text`; None where no edit finds anything to change."""
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
    """A prompt, or of a conversation its last message, or of a dialogue in one text what the human says last."""
    if not isinstance(prompt, str):
        return content_text(prompt[-1])
    start, end = last_said(prompt)
    return prompt[start:end]


def with_last_text(prompt: Text, text: str) -> Text:
    """A prompt with another text in the place of `last_text`."""
    if not isinstance(prompt, str):
        return [*prompt[:-1], {**prompt[-1], "content": text}]
    start, end = last_said(prompt)
    return prompt[:start] + text + prompt[end:]


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


def _other(held: Collection[str], choices: Sequence[str], chance: random.Random) -> str | None:
    """One of `choices` that is none of `held`, whatever its case."""
    own = {piece.lower() for piece in held}
    enough = 8 + 3 * len(own)  # each may be there in small letters, capitalised and in capitals
    for choice in chance.sample(choices, min(len(choices), enough)):
        if choice.lower() not in own:
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
    return _put(text, match, _other([digits], [str(other) for other in others], chance))


def _entity(text: str, pool: Pool, chance: random.Random) -> str | None:
    match = _pick(_ENTITY, text, chance)
    return None if match is None else _put(text, match, _other(_ENTITY.findall(text), pool.entities, chance))


def _word(text: str, pool: Pool, chance: random.Random) -> str | None:
    match = _pick(_WORD, text, chance)
    if match is None:
        return None
    new = _other(_WORD.findall(text), pool.words, chance)
    return _put(text, match, new and (new.capitalize() if match[0][0].isupper() else new.lower()))


def _negate(text: str, pool: Pool, chance: random.Random) -> str | None:
    """Without a negation that is there ("not", "can't"), else with one behind an auxiliary verb."""
    match = _pick(_NEGATION, text, chance)
    if match is not None:
        return _put(text, match, _affirmed(match[0]))
    verbs = [
        verb for verb in _VERB.finditer(text) if not _BEHIND_VERB.search(text[max(0, verb.start() - 20) : verb.start()])
    ]
    match = chance.choice(verbs) if verbs else None
    return None if match is None else _put(text, match, f"{match[0]} not")


def _affirmed(negation: str) -> str:
    """What is left of a negation: "is" of "isn't", "will" of "won't", nothing of " not"."""
    if negation.startswith(" "):
        return ""
    if negation.lower() == "cannot":
        return negation[:-3]
    stem = negation[:-2]
    whole = _CONTRACTED.get(stem.lower(), stem[:-1])
    return whole.upper() if negation.isupper() else whole.capitalize() if negation[0].isupper() else whole


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
