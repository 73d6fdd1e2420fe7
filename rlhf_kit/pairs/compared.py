"""What builders share that compare every two completions of a prompt: which are asked about, kept, and written."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import NonNegativeFloat

from rlhf_kit.data.messages import completion_like, completion_text, is_messages
from rlhf_kit.errors import RunError
from rlhf_kit.evals.verdicts import Compared
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.pairs.builder import PAIRED, UNPAIRED, Builder, BuilderBase, Built, Row
from rlhf_kit.problems import Problem

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs
    from rlhf_kit.pairs.context import PairsContext

TRUNCATED, IDENTICAL, NOT_APPLICABLE = "truncated", "identical", "not_applicable"
FAILED, CONTRADICTORY, TIED, CLOSE = "failed", "contradictory", "tied", "close"
DROPPED = (TRUNCATED, IDENTICAL, NOT_APPLICABLE, FAILED, CONTRADICTORY, TIED, CLOSE)
SIDES = ("chosen", "rejected")
SAMPLED = ("length", "truncated", "completion_ids")  # what only a sampled completion has, whatever the data call so


class Comparing(BuilderBase):
    """Fields of builders that compare every two of a prompt's `num_generations` completions.

    Instead of sampled ones, `completions` names a column with a list of them. A pair is dropped, and counted by the
    first reason that holds: a side was cut off at `max_new_tokens` (unless `truncated: keep`), both sides say the same
    (`identical`), there is nothing to compare them by (`not_applicable`), a judgement is missing (`failed`), the two
    orders of presentation prefer different sides (`contradictory`), they prefer none (`tied`), the margin lies below
    `min_margin` (`close`).
    """

    may_use: ClassVar = frozenset({"model"})

    completions: str | None = None
    truncated: Literal["drop", "keep"] = "drop"
    min_margin: NonNegativeFloat = 0.0

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.completions is None else (self.completions,)

    @property
    def judged_by(self) -> tuple[JudgeConfig, ...]:
        """The language models that are asked."""
        return ()

    def outputs(self, stage: Pairs) -> tuple[str, ...]:
        return PAIRED, UNPAIRED

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        needed = self.completions is None or any(judge.type == "policy" for judge in self.judged_by)
        if needed and stage.model is None:
            use = "samples from" if self.completions is None else "asks as the judge"
            yield Problem("model", f"is what builder {self.type} {use}", remedy="add model: {path: ...}")
        if not needed and stage.model is not None:
            yield Problem("model", f"is never used: completions are those of {self.completions}", remedy="remove it")
        count = stage.generation.num_generations
        if self.completions is None and count < 2:
            yield Problem("generation.num_generations", "makes no pair", count, "write at least 2")


@dataclass(frozen=True)
class Judged:
    """What was found of two completions.

    Attributes:
        scores: of each; the higher one is preferred. NaN where there is none.
        dropped: why there is no preference, of `DROPPED`; "" where there is one.
        facts: further columns of each, which `ComparedPairs.facts_of_sides` names.
        common: further columns of the pair, which `ComparedPairs.facts_of_pairs` names.
        first_place: how often a judge preferred what stood first, of both orders.
    """

    scores: tuple[float, float] = (math.nan, math.nan)
    dropped: str = ""
    facts: tuple[Row, Row] = field(default_factory=lambda: ({}, {}))
    common: Row = field(default_factory=dict)
    first_place: float | None = None


def judged(odds: tuple[float, float] | None, facts: tuple[Row, Row], common: Row | None = None) -> Judged:
    """What a judge said in both orders: log-odds of what stands first, the first completion in front, and the second.

    The scores are the probabilities of being preferred, which add up to 1.
    """
    if odds is None or any(math.isnan(value) for value in odds):
        return Judged(dropped=FAILED, facts=facts, common=common or {})
    compared = Compared(*odds)
    probability = compared.probability
    dropped = CONTRADICTORY if compared.contradicts else "" if compared.consistent else TIED
    return Judged((probability, 1 - probability), dropped, facts, common or {}, compared.first_place)


class ComparedPairs(Builder):
    """See `Comparing`; `compare` says what is preferred."""

    facts_of_sides: ClassVar[tuple[str, ...]] = ()
    facts_of_pairs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, context: PairsContext, config: Comparing) -> None:
        super().__init__(context)
        self._compared_by = config

    @abstractmethod
    def compare(self, rows: Sequence[Row], pairs: Sequence[tuple[int, int]]) -> list[Judged]:
        """What is preferred in each pair of `rows`, which are those of the data with a `completion` each."""

    def build_rows(self, prompts: Sequence[Row], first: int) -> list[Row]:
        """A row for every two completions of a prompt; `dropped` says why it will not be written."""
        rows = self._completions(prompts, first)
        places: dict[int, list[int]] = {}
        for place, row in enumerate(rows):
            places.setdefault(row["prompt_index"], []).append(place)
        pairs = [pair for group in places.values() for pair in combinations(group, 2)]
        reasons = [self._unasked(rows[one], rows[other]) for one, other in pairs]
        asked = [pair for pair, reason in zip(pairs, reasons, strict=True) if not reason]
        found = dict(zip(asked, self.compare(rows, asked) if asked else [], strict=True))
        return [
            self._row(rows[pair[0]], rows[pair[1]], found.get(pair) or Judged(dropped=reason))
            for pair, reason in zip(pairs, reasons, strict=True)
        ]

    def _completions(self, prompts: Sequence[Row], first: int) -> list[Row]:
        """A row for each completion, with its `text`, `length` and whether it is `truncated`."""
        column, context = self._compared_by.completions, self.context
        if column is None:
            count = context.stage.generation.num_generations
            sampled = enumerate(context.complete(prompts))
            return [{**row, "prompt_index": first + place // count, **context.facts(row)} for place, row in sampled]
        return [
            {
                **{name: value for name, value in row.items() if name not in SAMPLED},
                "prompt_index": number,
                "completion": completion_like(row["prompt"], given),
                "text": completion_text(given),
            }
            for number, row in enumerate(prompts, first)
            for given in _given(row, column, number)
        ]

    def _unasked(self, one: Row, other: Row) -> str:
        """Why a pair need not be compared; "" where it must."""
        cut = one.get("truncated") or other.get("truncated")
        if cut and self._compared_by.truncated == "drop":
            return TRUNCATED
        return IDENTICAL if one["text"] == other["text"] else ""

    def _row(self, one: Row, other: Row, found: Judged) -> Row:
        sides = [
            {**row, "score": score, **dict.fromkeys(self.facts_of_sides), **facts}
            for row, score, facts in zip((one, other), found.scores, found.facts, strict=True)
        ]
        chosen, rejected = ordered = sorted(sides, key=lambda side: -side["score"])
        margin = chosen["score"] - rejected["score"]
        dropped = found.dropped or (TIED if margin == 0 else CLOSE if margin < self._compared_by.min_margin else "")
        row = {"prompt": one["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]}
        row |= {"prompt_index": one["prompt_index"], "margin": margin}
        for name in ("score", "length", *self.facts_of_sides):
            row |= {f"{name}_{side}": of.get(name) for side, of in zip(SIDES, ordered, strict=True)}
        row |= {f"{side}_ids": of.get("completion_ids") for side, of in zip(SIDES, ordered, strict=True)}
        row |= {**dict.fromkeys(self.facts_of_pairs), **found.common}
        return {**row, "first_place": found.first_place, "dropped": dropped}

    def finish(self, rows: Sequence[Row]) -> Built:
        """The pairs with a preference.

        Raises:
            RunError: there is none.
        """
        from rlhf_kit.pairs.rows import unpaired_rows, with_lineage

        counts = Counter(row["dropped"] for row in rows)
        kept = [row for row in rows if not row["dropped"]]
        if not kept:
            said = ", ".join(f"{counts[reason]} {reason}" for reason in DROPPED if counts[reason])
            raise RunError(
                f"builder {self._compared_by.type} keeps none of {len(rows)} pairs ({said}): look at the judge and at "
                "generation.max_new_tokens, remove the folder work/ of this stage, and start the same command again"
            )
        named = [name for name in kept[0] if name not in ("dropped", "first_place")]
        written = [name for name in named if any(row[name] is not None for row in kept)]
        paired = [{name: row[name] for name in written} for row in kept]
        files = {PAIRED: paired, UNPAIRED: unpaired_rows(paired)}
        facts: dict[str, Any] = {"prompts": len({row["prompt_index"] for row in rows}), "compared": len(rows)}
        facts |= {"pairs": len(kept), **{reason: counts[reason] for reason in DROPPED}}
        measured = ["margin", *(f"{name}_{side}" for name in ("length", *self.facts_of_sides) for side in SIDES)]
        facts |= _means(kept, measured) | _means(rows, ["first_place"])
        return Built({name: with_lineage(of, self.context.lineage) for name, of in files.items()}, facts)


def _given(row: Row, column: str, number: int) -> list[Any]:
    """The completions that a row's column holds."""
    given = row[column]
    if given is None:
        return []
    if not isinstance(given, list | tuple) or not all(isinstance(one, str) or is_messages(one) for one in given):
        raise RunError(f"prompt {number + 1} holds {given!r} in {column}: give a list of texts, or of messages each")
    return list(given)


def _means(rows: Sequence[Row], names: Sequence[str]) -> dict[str, float]:
    """The means of the columns that hold numbers."""
    known = {name: [row[name] for row in rows if isinstance(row[name], int | float)] for name in names}
    return {name: fmean(values) for name, values in known.items() if values}
