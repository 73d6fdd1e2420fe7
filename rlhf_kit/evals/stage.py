"""The `eval` stage: which model, which sources, which evaluations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, StringConstraints

from rlhf_kit.config import Config
from rlhf_kit.evals.audit import Audit
from rlhf_kit.evals.best_of_n import BestOfN
from rlhf_kit.evals.calibration import Calibration
from rlhf_kit.evals.first_error import FirstError
from rlhf_kit.evals.preference_accuracy import PreferenceAccuracy
from rlhf_kit.evals.win_rate import WinRate
from rlhf_kit.models.config import Pretrained
from rlhf_kit.problems import Problem
from rlhf_kit.rewards import RewardConfig
from rlhf_kit.rewards.config import source_problems

EvalConfig = Annotated[
    PreferenceAccuracy | FirstError | BestOfN | WinRate | Calibration | Audit, Field(discriminator="type")
]
EvalName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


class Eval(Config):
    """Evaluations of a model and of reward sources; nothing is trained.

    `model` is the policy: it samples where completions are asked for, and it stands for the policy that a source may
    compare with (`reference: behaviour`, `initial` or `ema`, which are all the same here). `rewards` are the sources
    that score, with their weights where their sum is looked at. Each of `evals` is kept in `evals/<name>.json` once it
    is done, and repeated only where it, or something it reads, has changed.
    """

    type: Literal["eval"]
    model: Pretrained | None = None
    rewards: tuple[RewardConfig, ...] = ()
    evals: Annotated[dict[EvalName, EvalConfig], Field(min_length=1)]
    batch_size: PositiveInt = 16

    def problems(self) -> Iterator[Problem]:
        """What cannot work, said before anything is loaded; paths start at the stage."""
        if self.model is not None and self.model.peft is not None:
            yield Problem("model.peft", "adds an adapter to train, and nothing trains here", remedy="remove it")
        yield from source_problems(self.rewards, self.model, {"sum": "what the sum of all sources is called"})
        for name, evaluation in self.evals.items():
            path = f"evals.{name}"
            scored = bool(self.rewards) and evaluation.may_ask_sources
            if (evaluation.runs_model or scored) and self.model is None:
                what = f"{evaluation.type} needs a model" + ("" if evaluation.runs_model else " for its rewards")
                yield Problem(path, what, remedy="add model: {path: ...} to the stage: the policy")
            if evaluation.asks_sources and not self.rewards:
                what = f"{evaluation.type} needs reward sources"
                yield Problem(path, what, remedy="add rewards to the stage, e.g. {type: implicit_prm, path: ...}")
            yield from (problem.under(path) for problem in evaluation.problems(self))
