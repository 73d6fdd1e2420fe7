"""What a `bootstrap` stage must say together: the stages that its rounds are made of, checked as if written out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from rlhf_kit.data.config import DataConfig
from rlhf_kit.evals.config import VERIFIER_COLUMN
from rlhf_kit.models.config import same_model
from rlhf_kit.pairs.selection import PairSelection
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.dpo_implicit import DpoImplicitConfig
from rlhf_kit.trainers.config import START, Bootstrap, Stage

HERE = Path("round-0")  # the outputs of earlier rounds, which are there by then
PAIR_COLUMNS = {"prompt", "chosen", "rejected", "completion", "label"}


def check_bootstrap(
    stage: Bootstrap, earlier: Collection[Path], check: Callable[[Stage, Collection[Path]], list[Problem]]
) -> Iterator[Problem]:
    """All that is wrong with the first round, in the bootstrap's own words, and with what the rounds share."""
    if stage.stop is not None and stage.evaluation is None:
        yield Problem("stop", "asks for an accuracy, and nothing measures it", remedy="add evaluation")
    if stage.keep == "best" and stage.evaluation is None:
        yield Problem("keep", "best is by accuracy, and nothing measures it", "best", "add evaluation, or write last")
    if not isinstance(stage.pairs.select, PairSelection):
        remedy = "choose pairs, e.g. best_worst"
        yield Problem("pairs.select.type", "makes no pairs to learn from", stage.pairs.select.type, remedy)
    if stage.samples_from == "reference" and stage.reference is None:
        what = "samples in the first round, and there is none"
        yield Problem("reference", what, remedy="name the model that `model` was trained from, or remove samples_from")
        return
    sources = (source for source in stage.pairs.rewards if isinstance(source, DpoImplicitConfig))
    if any(source.path is None and source.reference is None for source in sources):
        remedy = "name the model that `model` was trained from"
        if stage.reference is None:
            yield Problem("reference", "is what the first round's implicit reward is compared with", remedy=remedy)
            return
        if same_model(stage.reference, stage.model.path):
            what = "is the model itself: the first round's implicit reward would be 0 everywhere"
            yield Problem("reference", what, stage.reference, remedy)
            return
    lacking = [name for name in stage.preference.objective.columns_read if name not in PAIR_COLUMNS]
    if lacking:
        what = f"learns from {', '.join(lacking)}, which pairs do not have"
        yield Problem("preference.objective.type", what, stage.preference.objective.type, "choose dpo, orpo or kto")
        return
    pairs, training = stage.pairs_of(1, HERE), stage.preference_of(1, HERE)
    sampled = HERE / "round-1" / "pairs"
    known = {*earlier, HERE / START, sampled / "paired.parquet", sampled / "unpaired.parquet"}
    for problem in check(pairs, known):
        yield problem if problem.path.startswith("model") else replace(problem, path=f"pairs.{problem.path}")
    for problem in check(training, known):
        if not problem.path.startswith("model"):
            place = f"preference.{problem.path}".replace("preference.data.replay", "replay.data")
            yield replace(problem, path=place)


def bootstrap_data(stage: Bootstrap) -> Iterator[tuple[str, DataConfig, dict[str, str]]]:
    """Its data sets: the field, the configuration, and who reads which column."""
    objective = stage.preference.objective
    read = dict.fromkeys(objective.columns_read, f"objective {objective.type}")
    if stage.replay is not None:
        yield "replay.data", stage.replay.data, read
    if stage.evaluation is not None:
        verifier = stage.evaluation.verifier
        yield "evaluation.data", stage.evaluation.data, {VERIFIER_COLUMN[verifier]: f"verifier {verifier}"}
