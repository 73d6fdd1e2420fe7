"""Builder of pairs from the model's own completions, ranked by reward sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from rlhf_kit.errors import RunError
from rlhf_kit.pairs.builder import COMPLETIONS, PAIRED, SFT, UNPAIRED, Builder, BuilderBase, Built, Row
from rlhf_kit.pairs.selection import BestWorst, PairSelection, Threshold
from rlhf_kit.problems import Problem
from rlhf_kit.rollout import Status

if TYPE_CHECKING:
    from rlhf_kit.pairs.config import Pairs
    from rlhf_kit.pairs.context import PairsContext
    from rlhf_kit.pairs.scores import Scores
    from rlhf_kit.pairs.select import Pair


class Sampled(BuilderBase):
    """`num_generations` completions of each prompt, scored by `rewards`, of which `select` takes pairs or single ones.

    `normalize` and `length_debias` look at the completions of all prompts.
    """

    needs: ClassVar = frozenset({"model", "rewards", "select"})
    may_use: ClassVar = frozenset({"length_debias"})

    type: Literal["sampled"]

    def outputs(self, stage: Pairs) -> tuple[str, ...]:
        if stage.select is None or stage.select.makes_pairs:
            return PAIRED, UNPAIRED, COMPLETIONS
        return SFT, COMPLETIONS

    def problems(self, stage: Pairs) -> Iterator[Problem]:
        select, count = stage.select, stage.generation.num_generations
        if isinstance(select, PairSelection):
            if count < 2:
                yield Problem("generation.num_generations", "makes no pair", count, "write at least 2")
            yield from _margin_problems(select, [source.source_name for source in stage.rewards])
        if stage.rewards and all(source.weight_at(0) == 0 for source in stage.rewards):
            yield Problem("rewards", "all have weight 0, so that no completion is better", remedy="give one a weight")
        if isinstance(select, Threshold) and select.rejected >= select.chosen:
            what = f"must lie below chosen ({select.chosen:g})"
            yield Problem("select.rejected", what, select.rejected, "write less")
        if stage.length_debias != "none" and not isinstance(select, PairSelection | None):
            what = f"makes chosen and rejected equally long, and {select.type} rejects nothing"
            yield Problem("length_debias", what, stage.length_debias, "write none")

    def build(self, context: PairsContext) -> SampledPairs:
        return SampledPairs(context)


def _margin_problems(select: PairSelection, sources: Sequence[str]) -> Iterator[Problem]:
    name = select.margin_of
    if name not in (None, *sources):
        remedy = f"write one of {', '.join(sources)}" if sources else "add it to rewards"
        yield Problem("select.margin_of", "is no reward source of this stage", name, remedy)
    elif name is not None and isinstance(select, BestWorst):
        what = "is not what best and worst are by"
        yield Problem("select.margin_of", what, name, "write select.type: large_margin, or remove it")
    if select.max_margin is not None and select.max_margin < select.min_margin:
        what = f"must not lie below min_margin ({select.min_margin:g})"
        yield Problem("select.max_margin", what, select.max_margin, "write more")


class SampledPairs(Builder):
    """See `Sampled`."""

    def build_rows(self, prompts: Sequence[Row], first: int) -> list[Row]:
        """A row for each completion, with the `score` and the `status` of every source; NaN is no judgement."""
        context, count = self.context, self.context.stage.generation.num_generations
        sampled = context.complete(prompts)
        scored = context.scorer(sampled).sources
        sources = {config.source_name: scored[config.source_name] for config in context.stage.rewards}
        found = []
        for place, row in enumerate(sampled):
            facts: Row = {"prompt_index": first + place // count, **context.facts(row)}
            facts["outcome"] = self._outcome(sources, place)
            facts |= {f"score.{name}": float(of.totals[place]) for name, of in sources.items()}
            facts |= {f"status.{name}": int(of.status[place]) for name, of in sources.items()}
            found.append({**row, **facts})
        return found

    def _outcome(self, sources: Mapping[str, Any], place: int) -> float | None:
        """The mean label of the sources that give labels, None where none did."""
        names = [config.source_name for config in self.context.stage.rewards if config.labels_outcomes]
        known = [float(sources[name].totals[place]) for name in names if sources[name].status[place] == Status.OK]
        return fmean(known) if known else None

    def finish(self, rows: Sequence[Row]) -> Built:
        """Scores over all completions, and the choice among them.

        Raises:
            RunError: a prompt lacks completions, or nothing could be chosen.
        """
        from rlhf_kit.pairs.scores import scores_of

        stage = self.context.stage
        _check_complete(rows, stage.generation.num_generations)
        scores = scores_of(stage, rows)
        scored = [
            {**row, "score": score, **{f"share.{name}": value for name, value in share.items()}}
            for row, score, share in zip(rows, scores.totals, scores.shares, strict=True)
        ]
        facts = _facts(stage, scored, scores)
        files, more = self._pairs(scored, facts) if UNPAIRED in stage.outputs else self._singles(scored, facts)
        return Built({COMPLETIONS: scored, **files}, {**facts, **more})

    def _pairs(self, scored: Sequence[Row], facts: Mapping[str, Any]) -> tuple[dict[str, list[Row]], Row]:
        from rlhf_kit.pairs.rows import unpaired_rows, with_lineage
        from rlhf_kit.pairs.select import select_pairs

        stage, context = self.context.stage, self.context
        assert isinstance(stage.select, PairSelection)
        pairs = select_pairs(_candidates(scored, stage.select.margin_of), stage.select, stage.round, context.seed)
        _refuse_nothing(pairs, stage, facts)
        paired = [_paired(scored, pair) for pair in pairs]
        means = {f"length_{side}": fmean(row[f"length_{side}"] for row in paired) for side in ("chosen", "rejected")}
        found = {"pairs": len(pairs), "margin": fmean(pair.margin for pair in pairs), **means}
        files = {PAIRED: paired, UNPAIRED: unpaired_rows(paired)}
        return {name: with_lineage(rows, context.lineage) for name, rows in files.items()}, found

    def _singles(self, scored: Sequence[Row], facts: Mapping[str, Any]) -> tuple[dict[str, list[Row]], Row]:
        from rlhf_kit.pairs.rows import with_lineage
        from rlhf_kit.pairs.select import select_completions
        from rlhf_kit.pairs.selection import BestOfN, ExpertIteration

        stage = self.context.stage
        assert isinstance(stage.select, BestOfN | ExpertIteration)
        places = select_completions(_candidates(scored), stage.select)
        _refuse_nothing(places, stage, facts)
        kept = ("prompt", "completion", "prompt_index", "score", "completion_ids", "length")
        rows = [{name: scored[place][name] for name in kept} for place in places]
        return {SFT: with_lineage(rows, self.context.lineage)}, {"rows": len(rows)}


def _check_complete(rows: Sequence[Row], count: int) -> None:
    """Every prompt has all its completions, once."""
    found = [row["prompt_index"] for row in rows]
    if found != [number for number in range(len(rows) // count) for _ in range(count)]:
        raise RunError(
            f"the completions are not {count} for each prompt, in order: the files in work/ are not all of this run; "
            "remove that folder, and start the same command again"
        )


def _candidates(scored: Sequence[Row], margin_of: str | None = None) -> list[Any]:
    from rlhf_kit.pairs.select import Candidate

    names = ("score", "length", "text", "truncated")
    return [
        Candidate(
            row["prompt_index"],
            place,
            **{name: row[name] for name in names},
            measure=None if margin_of is None else row[f"score.{margin_of}"],
        )
        for place, row in enumerate(scored)
    ]


def _paired(scored: Sequence[Row], pair: Pair) -> Row:
    sides = {"chosen": scored[pair.chosen], "rejected": scored[pair.rejected]}
    chosen, rejected = sides["chosen"], sides["rejected"]
    row = {"prompt": chosen["prompt"], "chosen": chosen["completion"], "rejected": rejected["completion"]}
    row |= {"prompt_index": chosen["prompt_index"], "margin": pair.margin}
    for field in ("score", "length"):
        row |= {f"{field}_{side}": of[field] for side, of in sides.items()}
    shares = [name.removeprefix("share.") for name in chosen if name.startswith("share.")]
    row |= {f"share_{side}.{name}": of[f"share.{name}"] for name in shares for side, of in sides.items()}
    return row | {f"{side}_ids": of["completion_ids"] for side, of in sides.items()}


def _facts(stage: Pairs, scored: Sequence[Row], scores: Scores) -> Row:
    """What the report says of the completions."""
    finite = [score for score in scores.totals if score == score]
    facts: Row = {
        "prompts": len({row["prompt_index"] for row in scored}),
        "completions": len(scored),
        "failed": len(scored) - len(finite),
        "truncated": fmean(row["truncated"] for row in scored),
        "length": fmean(row["length"] for row in scored),
        "score": fmean(finite) if finite else None,
        "alpha": scores.debias.alpha,
    }
    for config in stage.rewards:
        known = [value for row in scored if (value := row[f"score.{config.source_name}"]) == value]
        facts[f"score/{config.source_name}"] = fmean(known) if known else None
    return facts


def _refuse_nothing(chosen: Sequence[Any], stage: Pairs, facts: Mapping[str, Any]) -> None:
    if not chosen:
        assert stage.select is not None
        raise RunError(
            f"select.{stage.select.type} chose nothing among {facts['completions']} completions of {facts['prompts']} "
            f"prompts ({facts['failed']} without a score, {facts['truncated']:.0%} cut off at max_new_tokens): raise "
            "generation.max_new_tokens or num_generations, or ask less of margins and lengths"
        )
