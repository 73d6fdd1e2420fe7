"""Builder of pairs and labelled completions from logs of dialogues, by what users say next.

WildFeedback (arXiv 2408.15549) and naturally occurring feedback (arXiv 2407.10944).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from rlhf_kit.config import Location
from rlhf_kit.data.implicit_prompts import ASSISTANT, answer_messages, dialogue_messages
from rlhf_kit.data.messages import completion_messages, completion_text, dialogue_text, without_nulls
from rlhf_kit.errors import RunError
from rlhf_kit.judges.base import Answer, Judge, Question
from rlhf_kit.judges.prompts import fenced, fill, read_prompt
from rlhf_kit.pairs.builder import PAIRED, UNPAIRED, Builder, Built, Row
from rlhf_kit.pairs.feedback import (
    DISSATISFIED,
    LABELS,
    NEITHER,
    SATISFIED,
    Exchange,
    exchanges,
    read_rules,
    redacted_message,
)
from rlhf_kit.pairs.judged import PROMPTS, MayAsk
from rlhf_kit.problems import Problem
from rlhf_kit.rollout import Message, Text

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs
    from rlhf_kit.pairs.context import PairsContext

LETTERS = ("A", "B", "C")  # of LABELS, in the prompt
FAILED = "failed"
APOLOGY, IDENTICAL, REPEATED, CONTRADICTORY = DROPPED = ("apology", "identical", "repeated", "contradictory")
TURN, PAIR = "turn", "pair"

Verdict = tuple[str, str]  # a label or `FAILED`, and the rule that gave it


class FeedbackMining(MayAsk):
    """Answers that users were satisfied or dissatisfied with, and answers against their revisions.

    A prompt of the data is a whole dialogue (`columns: {prompt: messages}`), messages or `\\n\\nHuman: ...\\n\\n
    Assistant: ...`; a `completion` continues it. Every turn of the user behind an answer is satisfied, dissatisfied or
    neither with it, by the `rules` of a file (by default the kit's) or by a `judge`, whose label must have at least the
    probability `sure`; its `prompt` file holds `{{prompt}}`, `{{completion}}` and `{{feedback}}`.

    `unpaired` are the answers that a user was satisfied (`label` true) or dissatisfied with. `paired` are first answers
    (rejected) that a user complained about, each with the answer that ended the complaints (chosen): the user was
    `satisfied` with it, or with `accept: no_complaint` at least did not complain, also where the dialogue ends. Both
    answer the prompt up to the first answer, which tells nothing of the complaint: a revision that opens with an
    apology is dropped, unless `apologies: keep`.

    All texts are redacted before anything reads them: e-mail addresses, phone numbers, keys. Equal rows are written
    once, and an answer that pleased in one dialogue and displeased in another not at all.
    """

    placeholders: ClassVar = ("prompt", "completion", "feedback")

    type: Literal["feedback_mining"]
    rules: Location | None = None
    sure: Annotated[float, Field(gt=0, lt=1)] = 0.5
    accept: Literal["satisfied", "no_complaint"] = "no_complaint"
    apologies: Literal["drop", "keep"] = "drop"

    def outputs(self, stage: Pairs) -> tuple[str, ...]:
        return PAIRED, UNPAIRED

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        yield from super().problems(stage)
        try:
            read_rules(self.rules)  # which say also what an apology is
        except (OSError, ValueError) as error:
            yield Problem("builder.rules", str(error), self.rules)

    def files(self) -> Iterator[tuple[str, str, bool]]:
        if self.rules is not None:
            yield "rules", self.rules, False
        yield from super().files()

    def build(self, context: PairsContext) -> MinedFeedback:
        return MinedFeedback(context, self)


class MinedFeedback(Builder):
    """See `FeedbackMining`."""

    def __init__(self, context: PairsContext, config: FeedbackMining) -> None:
        super().__init__(context)
        self._config = config
        self._rules = read_rules(config.rules)
        self._prompt = read_prompt(config.prompt, PROMPTS, "feedback_mining.txt")

    @cached_property
    def judge(self) -> Judge:
        """Who reads the users' turns."""
        assert self._config.judge is not None
        judge = self.context.judge(self._config.judge)
        judge.check_choices(LETTERS)
        return judge

    def build_rows(self, prompts: Sequence[Row], first: int) -> list[Row]:
        """A row for each turn behind an answer, and one for each revision.

        Raises:
            RunError: a prompt is no dialogue.
        """
        found: list[Row] = []
        logs = [exchanges(dialogue_of(row, number)) for number, row in enumerate(prompts, first)]
        turns = [exchange for log in logs for exchange in log if exchange.feedback is not None]
        verdicts = iter(self._verdicts(turns))
        for number, log in enumerate(logs, first):
            own = [None if exchange.feedback is None else next(verdicts) for exchange in log]
            for exchange, verdict in zip(log, own, strict=True):
                if verdict is not None:
                    found.append(self._row(TURN, number, exchange, *verdict))
            for start, revision in revisions([None if one is None else one[0] for one in own], self._config.accept):
                rule = (own[start] or ("", ""))[1]
                found.append(self._row(PAIR, number, log[start], DISSATISFIED, rule, log[revision].completion))
        return found

    def _row(
        self, kind: str, number: int, exchange: Exchange, label: str, rule: str, revision: Sequence[Message] = ()
    ) -> Row:
        """A turn, with its answer where it says something of that; or an answer and its revision."""
        row = {"prompt_index": number, "kind": kind, "feedback_label": label, "feedback_rule": rule, "dropped": ""}
        texts: Row = {"prompt": None, "completion": None, "feedback": None, "revision": None}
        if label in (SATISFIED, DISSATISFIED):
            texts |= {"prompt": exchange.prompt, "completion": exchange.completion, "feedback": exchange.feedback}
        if kind == PAIR:
            texts["revision"] = list(revision)
            said = completion_text(revision)
            if said == completion_text(exchange.completion):
                row["dropped"] = IDENTICAL
            elif self._config.apologies == "drop" and self._rules.apologises(said):
                row["dropped"] = APOLOGY
        return {**row, **texts}

    def _verdicts(self, turns: Sequence[Exchange]) -> list[Verdict]:
        if self._config.judge is None:
            return [self._rules.classify(turn) for turn in turns]
        questions = [Question([{"role": "user", "content": self._question(turn)}], choices=LETTERS) for turn in turns]
        return [(label_of(answer, self._config.sure), "") for answer in self.judge.ask(questions)()]

    def _question(self, turn: Exchange) -> str:
        return fill(
            self._prompt,
            prompt=fenced(dialogue_text(turn.prompt), "dialogue"),
            completion=fenced(dialogue_text(turn.completion), "answer"),
            feedback=fenced(turn.feedback or "", "message"),
        )

    def finish(self, rows: Sequence[Row]) -> Built:
        """The rows that are written.

        Raises:
            RunError: there are none.
        """
        from rlhf_kit.pairs.rows import with_lineage

        rows = without_nulls(rows)
        turns = [row for row in rows if row["kind"] == TURN]
        pairs = [row for row in rows if row["kind"] == PAIR]
        labels = Counter(row["feedback_label"] for row in turns)
        dropped = Counter(row["dropped"] for row in pairs)
        unpaired = [_unpaired(row) for row in turns if "prompt" in row]
        paired = [_paired(row) for row in pairs if not row["dropped"]]
        files = {PAIRED: _once(paired, dropped), UNPAIRED: _once(unpaired, dropped)}
        if not any(files.values()):
            said = ", ".join(f"{labels[name]} {name}" for name in (*LABELS, FAILED))
            raise RunError(
                f"builder feedback_mining found nothing among {len(turns)} turns that follow an answer ({said}): give "
                "dialogues of several turns, other rules or another judge"
            )
        facts: dict[str, Any] = {"turns": len(turns)} | {name: labels[name] for name in (*LABELS, FAILED)}
        facts |= {"pairs": len(files[PAIRED]), "rows": len(files[UNPAIRED])}
        facts |= {reason: dropped[reason] for reason in DROPPED}
        by_rule = Counter(row["feedback_rule"] for row in turns if row["feedback_rule"])
        facts |= {f"rule/{name}": count for name, count in sorted(by_rule.items())}
        return Built({name: with_lineage(of, self.context.lineage) for name, of in files.items()}, facts)


def dialogue_of(row: Row, number: int) -> list[Message]:
    """The redacted messages of a row's dialogue.

    Raises:
        RunError: it is text that is no dialogue.
    """
    prompt: Text = row["prompt"]
    completion: Text = row.get("completion") or []
    if isinstance(prompt, str):
        ended = prompt.rstrip().endswith(ASSISTANT.strip())
        turns = dialogue_messages(prompt if ended else prompt + ASSISTANT)
        if turns is None:
            raise RunError(
                f"prompt {number + 1} is no dialogue but text ({prompt[:40]!r}): give messages, as in "
                "columns: {prompt: messages}, or text of turns that open with \\n\\nHuman: and \\n\\nAssistant:"
            )
        later = answer_messages(completion) if isinstance(completion, str) else completion
        return [redacted_message(message) for message in (*turns, *later)]
    return [redacted_message(message) for message in (*prompt, *completion_messages(completion))]


def revisions(labels: Sequence[str | None], accept: str) -> Iterator[tuple[int, int]]:
    """The places of first answers that were complained about, each with that of the answer which ended the complaints.

    `labels` are what users said of each answer; None where the dialogue ends.
    """
    accepted = {SATISFIED} if accept == "satisfied" else {SATISFIED, NEITHER, None}
    for start, label in enumerate(labels):
        if label != DISSATISFIED or (start > 0 and labels[start - 1] == DISSATISFIED):
            continue
        end = next((place for place in range(start, len(labels)) if labels[place] != DISSATISFIED), None)
        if end is not None and labels[end] in accepted:
            yield start, end


def label_of(answer: Answer, sure: float) -> str:
    """The label that a judge finds likeliest, `NEITHER` where its probability among the three is below `sure`."""
    if answer.error is not None:
        return FAILED
    highest = max(answer.log_probs)
    weights = [math.exp(value - highest) for value in answer.log_probs]
    return LABELS[weights.index(1.0)] if 1.0 / sum(weights) >= sure else NEITHER


def _unpaired(row: Row) -> Row:
    kept = {name: row[name] for name in ("prompt", "completion", "prompt_index", "feedback", "feedback_rule")}
    return {**kept, "label": row["feedback_label"] == SATISFIED}


def _paired(row: Row) -> Row:
    sides = {"prompt": row["prompt"], "chosen": row["revision"], "rejected": row["completion"]}
    return {**sides, **{name: row[name] for name in ("prompt_index", "feedback", "feedback_rule")}}


def _once(rows: Sequence[Row], dropped: Counter[str]) -> list[Row]:
    """The rows without repetitions; an answer with both labels is left out. Adds what is left out to `dropped`."""
    names = ("prompt", "chosen", "rejected", "completion")
    keys = [repr([row[name] for name in names if name in row]) for row in rows]
    labels: dict[str, set[Any]] = {}
    for key, row in zip(keys, rows, strict=True):
        labels.setdefault(key, set()).add(row.get("label"))
    written: dict[str, Row] = {}
    for key, row in zip(keys, rows, strict=True):
        if len(labels[key]) > 1:
            dropped[CONTRADICTORY] += 1
        elif key in written:
            dropped[REPEATED] += 1
        else:
            written[key] = row
    return list(written.values())
