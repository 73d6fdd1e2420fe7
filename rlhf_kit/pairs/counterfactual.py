"""Builder of pairs whose sides were sampled under different instructions (counterfactual DPO, arXiv 2401.09566)."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import PositiveInt, StringConstraints

from rlhf_kit.data.messages import prompt_text
from rlhf_kit.errors import RunError
from rlhf_kit.pairs.builder import PAIRED, Builder, BuilderBase, Built, Row
from rlhf_kit.pairs.compared import IDENTICAL, SIDES, TRUNCATED
from rlhf_kit.problems import Problem
from rlhf_kit.rollout import Message, Text

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs
    from rlhf_kit.pairs.context import PairsContext

Instruction = Annotated[str, StringConstraints(strip_whitespace=True, pattern=r"\w")]
# Where words are not set apart by spaces, every character is one.
_UNSPACED = r"[\u3040-\u30ff\u3400-\u9fff]"
_WORD = re.compile(rf"{_UNSPACED}|(?:(?!{_UNSPACED})\w)+")

IN_PROMPT, LEAKED = "in_prompt", "leaked"
DROPPED = (IN_PROMPT, TRUNCATED, LEAKED, IDENTICAL)


class Counterfactual(BuilderBase):
    """`num_generations` pairs a prompt, one side or both written under an instruction that the row does not show.

    What is written under `encourage` is chosen over what is written under the prompt alone (the paper's ENC); that is
    chosen over what is written under `discourage` (DIS); with both instructions the one is chosen over the other
    (contrastive). The instruction stands in front of the text, or of the last message of the user; with `place: system`
    at the end of the system's message, which is made where there is none. The rows have the prompt as the data has it.

    A pair is dropped, and counted by the first reason that holds: its prompt has the instruction already
    (`in_prompt`), a side was cut off at `max_new_tokens` (unless `truncated: keep`), a side repeats the instruction or
    `leaked_words` words of it in a row (`leaked`), both sides say the same (`identical`).

    The paper's instruction negation is left out: it trains on the prompt with the instruction.
    """

    needs: ClassVar = frozenset({"model"})

    type: Literal["counterfactual"]
    encourage: Instruction | None = None
    discourage: Instruction | None = None
    place: Literal["user", "system"] = "user"
    leaked_words: PositiveInt = 6
    truncated: Literal["drop", "keep"] = "drop"

    @property
    def instructions(self) -> list[str]:
        """Those that are given."""
        return [told for told in (self.encourage, self.discourage) if told is not None]

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        if not self.instructions:
            what = "with discourage missing too, both sides of a pair would be alike"
            yield Problem("builder.encourage", what, remedy="write an instruction, such as Answer in one sentence.")
        if len({tuple(_words(told)) for told in self.instructions}) < len(self.instructions):
            what = "is the instruction that encourage has"
            yield Problem("builder.discourage", what, self.discourage, "write another, or remove it")

    def build(self, context: PairsContext) -> CounterfactualPairs:
        return CounterfactualPairs(context, self)


class CounterfactualPairs(Builder):
    """See `Counterfactual`."""

    def __init__(self, context: PairsContext, config: Counterfactual) -> None:
        super().__init__(context)
        self._config = config

    def build_rows(self, prompts: Sequence[Row], first: int) -> list[Row]:
        """The pairs of each prompt, also those that are dropped: `dropped` says why."""
        context, config = self.context, self._config
        chosen, rejected = (
            context.complete([{"prompt": with_instruction(row["prompt"], told, config.place)} for row in prompts])
            for told in (config.encourage, config.discourage)
        )
        count = context.stage.generation.num_generations
        rows: list[Row] = []
        for place, sides in enumerate(zip(chosen, rejected, strict=True)):
            facts = [context.facts(side) for side in sides]
            prompt = prompts[place // count]["prompt"]
            row: Row = {"prompt": prompt, "prompt_index": first + place // count}
            for name, side, of in zip(SIDES, sides, facts, strict=True):
                row |= {name: side["completion"], f"{name}_ids": side["completion_ids"], f"length_{name}": of["length"]}
            rows.append({**row, "dropped": self._reason(prompt, facts)})
        return rows

    def _reason(self, prompt: Text, sides: Sequence[Row]) -> str:
        """Why a pair is dropped, of `DROPPED`; "" where it is not."""
        config, texts = self._config, [side["text"] for side in sides]
        if any(repeats(prompt_text(prompt), told) for told in config.instructions):
            return IN_PROMPT
        if config.truncated == "drop" and any(side["truncated"] for side in sides):
            return TRUNCATED
        if any(repeats(text, told, config.leaked_words) for text in texts for told in config.instructions):
            return LEAKED
        return IDENTICAL if texts[0] == texts[1] else ""

    def finish(self, rows: Sequence[Row]) -> Built:
        """The pairs that are kept.

        Raises:
            RunError: none is.
        """
        from rlhf_kit.pairs.rows import with_lineage

        counts = Counter(row["dropped"] for row in rows)
        kept = [{name: value for name, value in row.items() if name != "dropped"} for row in rows if not row["dropped"]]
        if not kept:
            said = ", ".join(f"{counts[reason]} {reason}" for reason in DROPPED)
            raise RunError(
                f"builder counterfactual keeps none of {len(rows)} pairs ({said}): raise generation.max_new_tokens or "
                "temperature, or write another instruction"
            )
        facts: Row = {"pairs": len(kept)} | {reason: counts[reason] for reason in DROPPED}
        facts |= {f"length_{side}": fmean(row[f"length_{side}"] for row in kept) for side in SIDES}
        return Built({PAIRED: with_lineage(kept, self.context.lineage)}, facts)


def with_instruction(prompt: Text, instruction: str | None, place: Literal["user", "system"]) -> Text:
    """The prompt as it is sampled from; see `Counterfactual`. Without an instruction it is as it was."""
    if instruction is None:
        return prompt
    if isinstance(prompt, str):
        return f"{instruction}\n\n{prompt}"
    roles = [message["role"] for message in prompt]
    if place == "user" and "user" in roles:
        last = len(roles) - 1 - roles[::-1].index("user")
        return [*prompt[:last], _joined(prompt[last], instruction, in_front=True), *prompt[last + 1 :]]
    if roles[:1] == ["system"]:
        return [_joined(prompt[0], instruction, in_front=False), *prompt[1:]]
    return [{"role": "system", "content": instruction}, *prompt]


def _joined(message: Message, instruction: str, in_front: bool) -> Message:
    """A message, of text or of parts, with an instruction in front of it or behind it."""
    content = message["content"]
    if content is None or isinstance(content, str):
        pieces = [instruction, content or ""] if in_front else [content or "", instruction]
        return {**message, "content": "\n\n".join(piece for piece in pieces if piece)}
    part = {"type": "text", "text": f"{instruction}\n\n" if in_front else f"\n\n{instruction}"}
    return {**message, "content": [part, *content] if in_front else [*content, part]}


def repeats(text: str, instruction: str, in_a_row: int | None = None) -> bool:
    """Whether a text has the words of an instruction in a row, all of them or `in_a_row`, whatever stands between."""
    told, said = _words(instruction), _words(text)
    size = min(in_a_row or len(told), len(told))
    runs = {tuple(told[start : start + size]) for start in range(len(told) - size + 1)}
    return any(tuple(said[start : start + size]) in runs for start in range(len(said) - size + 1))


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())
