"""Two processes score rollouts with judges of their own; that of the second fails as planned. Writes what each sees."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parents[2]))

from rlhf_kit.errors import RunError
from rlhf_kit.judges import client
from rlhf_kit.judges.config import Server
from rlhf_kit.judges.server import ServerJudge
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rewards.outcome import outcome_rewards
from rlhf_kit.rollout import RewardSource, Rollout, Status, TokenRewards
from rlhf_kit.trainers.diagnostics import RolloutLog
from rlhf_kit.trainers.rollouts import Ranks
from rlhf_kit.trainers.scoring import Scoring
from tests.judges.conftest import question
from tests.judges.scripted import Reply, ScriptedServer, asked

FAULTS = {
    "none": Reply("1"),
    "hangs": Reply(how="hang"),
    "500": Reply(status=500),
    "nonsense": Reply(body=b"<html>"),
    "half": Reply(how="half"),
    "no verdict": Reply("I would rather not."),
}


class JudgedConfig(SourceConfig):
    """A source that asks a server for a number."""

    type: Literal["judged"] = "judged"
    judge: Server
    max_failure_rate: float = 0.4

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "process"

    def build(self, context: BuildContext | None = None) -> Judged:
        return Judged(self)


class Judged(RewardSource):
    """The number that the judge answers; a row without one has failed."""

    kind = "process"

    def __init__(self, config: JudgedConfig) -> None:
        self.name, self.judge, self._wait = config.source_name, config.judge.build(), None

    def begin(self, rollout: Rollout) -> None:
        self._wait = self.judge.ask([question(f"{rollout.step} {text}") for text in rollout.texts])

    def judges(self) -> dict[str, ServerJudge]:
        return {"judge": self.judge}

    def score(self, rollout: Rollout) -> TokenRewards:
        assert self._wait is not None
        answers = self._wait()
        scores = [float(one.text) if one.error is None and one.text.isdigit() else torch.nan for one in answers]
        return outcome_rewards(scores, rollout)


def rollout(step: int) -> Rollout:
    """Two completions of three tokens."""
    mask = torch.ones(2, 3, dtype=torch.bool)
    prompt = torch.zeros(2, 1, dtype=torch.long)
    texts = ["a b c", "d e f"]
    return Rollout(
        ["p", "p"], texts, prompt, prompt.bool(), torch.arange(6).view(2, 3), mask, mask,
        texts=texts, group_size=2, step=step,
    )  # fmt: skip


def scored(scoring: Scoring, log: RolloutLog, plan: list[str]) -> Iterator[dict[str, Any]]:
    """What this process knows after each rollout, until the run is stopped."""
    for step in range(len(plan)):
        one = rollout(step)
        scoring.begin(one)
        try:
            scores = scoring.score_outcomes(one)
            scoring.learn_and_score(one, scores)
        except RunError as error:
            yield {"stopped": str(error)}
            return
        [weighted] = scoring.weighted(one, scores)
        yield {
            "own": [Status(code).name for code in scores.rewards["judged"].status.tolist()],
            "valid": scores.valid.tolist(),
            "everyone": weighted.present.tolist(),
            "calls": log._common(scores)["rewards/judged/judge/calls"],
            "sums": weighted.tokens.sum(dim=1).tolist(),
        }


def main(folder: Path, plans: list[list[str]]) -> None:
    client.FIRST_WAIT = 0.01
    ranks = Ranks(accelerator := Accelerator())
    rank = accelerator.process_index
    seen = []
    for plan in plans:
        faults = plan if rank == 1 else ["none"] * len(plan)
        with ScriptedServer(lambda r, number, faults=faults: FAULTS[faults[int(asked(r).split()[0])]]) as server:
            judge = Server(type="server", base_url=server.base_url, model="m", timeout=2, attempts=2)
            config = JudgedConfig(judge=judge)
            log = RolloutLog(cast(Any, None), cast(Any, None), ranks, None)
            seen.append(list(scored(Scoring([config], [config.build()], None, ranks), log, plan)))
    (folder / f"{rank}.json").write_text(json.dumps(seen))
    accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


main(Path(sys.argv[1]), json.loads(sys.argv[2]))
