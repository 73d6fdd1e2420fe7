"""Audit for reward hacking: what else changed while the reward rose."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import NonNegativeFloat, PositiveInt

from rlhf_kit.config import Config, Location, Place
from rlhf_kit.data.config import DataConfig
from rlhf_kit.evals.base import Columns, EvaluationConfig
from rlhf_kit.evals.config import VERIFIER_COLUMN
from rlhf_kit.evals.result import Result
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.text import pattern_problems

if TYPE_CHECKING:
    from rlhf_kit.evals.context import EvalContext
    from rlhf_kit.evals.stage import Eval

METRICS_FILE, SAMPLES_FOLDER, CHECKPOINTS_FOLDER, MODEL_FOLDER = "metrics.jsonl", "samples", "checkpoints", "model"


class Resampled(Config):
    """Checkpoints that sample afresh on the prompts `data`.

    The stage's model is the policy before training, its `rewards` the proxy, `gold` the verifier that is held out from
    training or, as `gold_source`, one of the rewards (which then leaves the proxy). Every `num_completions` of a prompt
    are sampled at temperature 1. `checkpoints` are model folders; without them those of the run and its model.
    """

    data: DataConfig
    gold: Literal["exact", "math", "reasoning_gym", "marketplace"] | None = None
    gold_source: str | None = None
    checkpoints: tuple[Location, ...] = ()
    num_completions: PositiveInt = 1
    max_new_tokens: PositiveInt = 256
    batch_size: PositiveInt = 64


class Audit(EvaluationConfig):
    """What a training run's folder, and its checkpoints if `resample` says how, show of reward hacking.

    From the `run_folder` of a `ppo` stage (the folder of its model does as well): reward against length, repetition,
    refusals (`refusal_pattern`), the held-out score, the KL divergence and each source's share of the advantage, over
    training. From checkpoints: proxy and gold reward, KL, length, repetition, refusals, and two out-of-distribution
    scores, the mean log-probability of a token under the policy before training and the Mahalanobis distance of the
    mean last hidden state from that policy's completions; and the over-optimisation plot of Gao et al. (arXiv
    2210.10760). A fall of the held-out score counts as over-optimisation from `gold_drop` on.

    Intervals are bootstrapped: over blocks of neighbouring updates, the first and the last of them independently, and
    over prompts for checkpoints. Of the held-out score a run has no more than the share of rows: it has Wilson's
    interval, and its fall a normal one.
    """

    type: Literal["audit"]
    run_folder: Place
    resample: Resampled | None = None
    refusal_pattern: str | None = None
    repetition_words: PositiveInt = 4
    gold_drop: NonNegativeFloat = 0.02

    @property
    def runs_model(self) -> bool:
        return self.resample is not None

    @property
    def asks_sources(self) -> bool:
        return self.resample is not None

    def data_sets(self) -> Iterator[tuple[str, DataConfig, Columns]]:
        if self.resample is not None:
            gold = self.resample.gold
            yield "resample.data", self.resample.data, {VERIFIER_COLUMN[gold]: f"verifier {gold}"} if gold else {}

    def files(self) -> Iterator[tuple[str, str, bool]]:
        yield "run_folder", self.run_folder, False
        for index, path in enumerate(self.resample.checkpoints if self.resample else ()):
            yield f"resample.checkpoints.{index}", path, True

    def problems(self, stage: Eval) -> Iterator[Problem]:
        folder = stage_folder(self.run_folder)
        if Path(self.run_folder).is_dir() and not (folder / METRICS_FILE).is_file():
            remedy = "give the folder of a stage, such as runs/quickstart/ppo"
            yield Problem("run_folder", f"holds no {METRICS_FILE}", self.run_folder, remedy)
        if self.refusal_pattern is not None:
            found = pattern_problems(self.refusal_pattern)
            yield from (Problem("refusal_pattern", p.message, p.value, p.remedy) for p in found)
        if self.resample is None:
            return
        gold, source = self.resample.gold, self.resample.gold_source
        if (gold is None) == (source is None):
            remedy = "name a verifier, or one of the rewards as gold_source"
            yield Problem("resample.gold", "needs one of gold and gold_source", remedy=remedy)
        names = [reward.source_name for reward in stage.rewards]
        if source is not None and source not in names:
            yield Problem("resample.gold_source", "there is no such source", source, f"there are {', '.join(names)}")
        if source is not None and names == [source]:
            remedy = "add the sources that were trained on"
            yield Problem("resample.gold_source", "leaves no source as the proxy", source, remedy)

    def run(self, context: EvalContext) -> Result:
        """Read the run folder, then look at its checkpoints."""
        from rlhf_kit.evals.audit_checkpoints import audit_checkpoints
        from rlhf_kit.evals.audit_run import audit_run

        result = Result()
        audit_run(self, stage_folder(self.run_folder), result)
        if self.resample is not None:
            audit_checkpoints(self, self.resample, context, result)
        return result


def stage_folder(path: str) -> Path:
    """The folder of a stage: the path itself, or its parent where the path is the stage's model."""
    folder = Path(path)
    if not (folder / METRICS_FILE).is_file() and (folder.parent / METRICS_FILE).is_file():
        return folder.parent
    return folder


def input_files(config: Audit) -> Iterator[str]:
    """The files of a run folder that an audit depends on."""
    folder = stage_folder(config.run_folder)
    yield str(folder / METRICS_FILE)
    yield from map(str, sorted((folder / SAMPLES_FOLDER).glob("*")))
    if config.resample is not None:
        yield from config.resample.checkpoints or (str(path) for _, path in checkpoints_of(folder))


def checkpoints_of(folder: Path) -> list[tuple[int, Path]]:
    """The checkpoints of a stage by their step, and behind the last its model; whole models and LoRA adapters alike."""
    found: dict[int, Path] = {}
    done = folder / "result.json"
    if done.is_file() and (folder / MODEL_FOLDER).is_dir():
        found[int(json.loads(done.read_text(encoding="utf-8"))["updates"])] = folder / MODEL_FOLDER
    for path in (folder / CHECKPOINTS_FOLDER).glob("checkpoint-*"):
        step = path.name.removeprefix("checkpoint-")
        if step.isdigit() and any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
            found[int(step)] = path
    return sorted(found.items())


def refusal_of(config: Audit) -> Mapping[str, Any]:
    """Keyword arguments of `refuses`."""
    return {} if config.refusal_pattern is None else {"pattern": config.refusal_pattern}
