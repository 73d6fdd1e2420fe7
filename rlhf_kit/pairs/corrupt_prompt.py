"""Builder of rows with a right and a corrupted prompt for one completion (I-ORPO; Suri, arXiv 2406.19371).

The data type `corrupted_prompts` makes such rows by one small edit of the text when they are read. Here a sentence or
the whole prompt may be violated as well, by rules or by a judge, and the rows are written with where they come from.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlhf_kit.data.config import Edit
from rlhf_kit.errors import RunError
from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.judges.parsing import json_answer
from rlhf_kit.judges.prompts import fenced, fill, read_prompt
from rlhf_kit.pairs.builder import SFT, Builder, Built, Row
from rlhf_kit.pairs.judged import PROMPTS, MayAsk
from rlhf_kit.problems import Problem
from rlhf_kit.rollout import CharRange

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs
    from rlhf_kit.pairs.context import PairsContext

SWAP, DROP, REPLACE = "swap", "drop_sentence", "replace_sentence"
REWRITTEN, FAILED, UNCHANGED = "rewritten", "failed", "unchanged"
_DRAWS = 16
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"prompt": {"type": "string"}},
    "required": ["prompt"],
    "additionalProperties": False,
}

Corruption = Edit | Literal["swap", "drop_sentence", "replace_sentence"]
DEFAULT: tuple[Corruption, ...] = (REPLACE, DROP, "number", "negate")


class CorruptPrompt(MayAsk):
    """Rows `prompt, corrupted_prompt, completion` of the data's `prompt` and `completion`.

    The paper lets a language model violate constraints of an instruction. So does a `judge` here, whose `prompt` file
    holds `{{prompt}}` and asks for `{"prompt": "..."}`. Without one, the prompt (of a conversation its last message,
    of a dialogue in one text what the human says last) is corrupted in one of the ways of `corruptions` that it allows,
    drawn anew for each row: a sentence is left out (`drop_sentence`) or becomes one of another row
    (`replace_sentence`), the whole becomes that of another row (`swap`), or it has one of the edits of `perturbed`
    data. A prompt that none changes is left out, and so is one that a judge fails at or leaves as it is.
    """

    placeholders: ClassVar = ("prompt",)

    type: Literal["corrupt_prompt"]
    corruptions: Annotated[tuple[Corruption, ...], Field(min_length=1)] = DEFAULT

    @property
    def columns(self) -> tuple[str, ...]:
        return ("completion",)

    def outputs(self, stage: Pairs) -> tuple[str, ...]:
        return (SFT,)

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        yield from super().problems(stage)
        if self.judge is not None and "corruptions" in self.model_fields_set:
            yield Problem("builder.corruptions", "are never used: the judge rewrites", remedy="remove one of the two")

    def build(self, context: PairsContext) -> CorruptPrompts:
        return CorruptPrompts(context, self)


class CorruptPrompts(Builder):
    """See `CorruptPrompt`."""

    def __init__(self, context: PairsContext, config: CorruptPrompt) -> None:
        super().__init__(context)
        self._config = config
        self._template = read_prompt(config.prompt, PROMPTS, "corrupt_prompt.txt")

    @cached_property
    def judge(self) -> Judge:
        """Who rewrites."""
        assert self._config.judge is not None
        return self.context.judge(self._config.judge)

    def build_rows(self, prompts: Sequence[Row], first: int) -> list[Row]:
        """The rows of the data, and where there is a judge its text and how it came to that (`corruption`)."""
        from rlhf_kit.data.perturbations import last_text

        texts = [last_text(row["prompt"]) for row in prompts]
        rewritten: list[tuple[str, str]] = [("", "")] * len(prompts)
        if self._config.judge is not None:
            answers = self.judge.ask([self._question(text) for text in texts])()
            rewritten = [_rewritten(answer, text) for answer, text in zip(answers, texts, strict=True)]
        return [
            {**row, "prompt_index": number, "rewritten": text, "corruption": how}
            for number, (row, (text, how)) in enumerate(zip(prompts, rewritten, strict=True), first)
        ]

    def _question(self, text: str) -> Question:
        content = fill(self._template, prompt=fenced(text, "prompt"))
        return Question([{"role": "user", "content": content}], SCHEMA)

    def finish(self, rows: Sequence[Row]) -> Built:
        """The rows whose prompt could be corrupted.

        Raises:
            RunError: there are none.
        """
        from rlhf_kit.data.perturbations import last_text, with_last_text
        from rlhf_kit.pairs.rows import with_lineage

        context, config = self.context, self._config
        found = [(row.get("rewritten", ""), row.get("corruption", "")) for row in rows]
        if config.judge is None:
            texts = [last_text(row["prompt"]) for row in rows]
            found = corrupted_texts(texts, config.corruptions, f"{context.seed} {context.stage.round}")
        counts = Counter(how for _, how in found)
        written = [
            {**row, "corrupted_prompt": with_last_text(row["prompt"], text), "corruption": how}
            for row, (text, how) in zip(rows, found, strict=True)
            if how not in (FAILED, UNCHANGED)
        ]
        if not written:
            raise RunError(
                f"builder corrupt_prompt could change none of {len(rows)} prompts ({counts[FAILED]} failed): "
                f"{'look at the judge' if config.judge else 'write other corruptions'}"
            )
        kept = [{name: value for name, value in row.items() if name != "rewritten"} for row in written]
        facts: Row = {"prompts": len(rows), "rows": len(kept), FAILED: counts[FAILED], UNCHANGED: counts[UNCHANGED]}
        facts |= {f"corruption/{how}": count for how, count in sorted(counts.items()) if how not in facts}
        return Built({SFT: with_lineage(kept, context.lineage)}, facts)


def _rewritten(answer: Answer, text: str) -> tuple[str, str]:
    """What a judge made of a text, and whether it did (`REWRITTEN`), `FAILED` or left it `UNCHANGED`."""
    found = None if answer.error is not None else json_answer(answer.text, ("prompt",), (text,))
    new = None if found is None else found["prompt"]
    if not isinstance(new, str) or not new.strip():
        return "", FAILED
    return new, UNCHANGED if _same(new, text) else REWRITTEN


def corrupted_texts(texts: Sequence[str], corruptions: Sequence[str], seed: str) -> list[tuple[str, str]]:
    """Each text after one of the corruptions that it allows, and which; `UNCHANGED` where it allows none."""
    from rlhf_kit.credit.segments import sentences
    from rlhf_kit.data.perturbations import EDITS, perturb, pool_of

    pool, ranges = pool_of(texts), [sentences(text) for text in texts]
    others = [text[start:end] for text, own in zip(texts, ranges, strict=True) for start, end in own]
    found: list[tuple[str, str]] = []
    for number, (text, own) in enumerate(zip(texts, ranges, strict=True)):
        chance = random.Random(f"corrupt prompt {seed} {number}")
        for how in chance.sample(list(corruptions), len(corruptions)):
            if how in EDITS:
                new = perturb(text, how, pool, chance)
            elif how == SWAP:
                new = _other(text, texts, chance)
            else:
                new = _without_sentence(text, own, others if how == REPLACE else None, chance)
            if new is not None and new.strip() and not _same(new, text):
                found.append((new, how))
                break
        else:
            found.append(("", UNCHANGED))
    return found


def _without_sentence(
    text: str, ranges: Sequence[CharRange], others: Sequence[str] | None, chance: random.Random
) -> str | None:
    """The text without one of its sentences, or with one of `others` in its place; None where it has but one."""
    if len(ranges) < 2:
        return None
    place = chance.randrange(len(ranges))
    start, end = ranges[place]
    if others is not None:
        new = _other(text[start:end], others, chance)
        return None if new is None else text[:start] + new + text[end:]
    if place == len(ranges) - 1:
        return text[: ranges[place - 1][1]]
    return text[:start] + text[ranges[place + 1][0] :]


def _other(text: str, choices: Sequence[str], chance: random.Random) -> str | None:
    """One of the choices that says something else; None where a few draws find none."""
    drawn = (chance.choice(choices) for _ in range(_DRAWS))
    return next((choice for choice in drawn if not _same(choice, text)), None)


def _same(one: str, other: str) -> bool:
    return one.casefold().split() == other.casefold().split()
