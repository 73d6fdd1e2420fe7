"""What a critic on a server costs: throughput, replay from the cache, and a PPO step with and without it.

The server is a process of its own on loopback that answers every request after the same latency, so that the ideal is
known: `concurrency / latency` judgements a second (target: within 10 % of it). A judgement is what `llm_critic` does
for a completion: the question, the answer, its parsing, and the quoted passage as a span. Replay answers the same
questions from the cache (target: over 2,000 a second).

The step's arms take turns on the same prompts, with an outcome and an online PRM as the other sources:

- `without`: no critic.
- `overlapped`: the critic as well; its answers arrive while the models score.
- `in turn`: the same critic, asked when the others are done.

    python benchmarks/judges.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from common import (
    OUTCOME,
    QUICKSTART_PROMPTS,
    build_ours,
    check_lengths,
    parser,
    ppo_stage,
    print_table,
    report,
    save_scratch_policy,
    seconds,
    spread,
)
from step_time import PRM, Arm

from rlhf_kit.rewards.llm_critic import LlmCritic, LlmCriticConfig
from rlhf_kit.rollout import Rollout, Status
from rlhf_kit.trainers.ppo import PpoTrainer

CONCURRENCY = (1, 8, 32)
TASK = "Go on with the numbers of the prompt."
WORDS = 120  # of a completion
PARTS = ("generation", "scoring", "PRM update", "policy update")


@contextmanager
def slow_server(latency: float) -> Iterator[str]:
    """The address of a server that answers after `latency` seconds."""
    command = [sys.executable, str(Path(__file__).parent / "slow_server.py"), str(latency)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.kill()


def critic(base_url: str, **fields: Any) -> LlmCriticConfig:
    """A critic on that server."""
    judge = {"type": "server", "base_url": base_url, "model": "m", **fields}
    return LlmCriticConfig.model_validate({"type": "llm_critic", "task": TASK, "judge": judge})


def build(config: LlmCriticConfig) -> LlmCritic:
    """A critic alone; on a server it needs nothing of the policy."""
    return config.build(cast(Any, None))


def rollout(rows: int, first: int) -> Rollout:
    """Completions of `WORDS` words, each another; a critic reads nothing else of them."""
    texts = [" ".join(f"w{first + row}x{word}" for word in range(WORDS)) for row in range(rows)]
    empty = torch.zeros(rows, 1, dtype=torch.long)
    return Rollout(["p"] * rows, texts, empty, empty.bool(), empty, empty.bool(), empty.bool(), texts=texts)


def judge_all(source: LlmCritic, judged: Rollout) -> None:
    """Judge a rollout, and make sure that every completion has its span."""
    rows = source.judge(judged).rows
    if not all(not isinstance(row, Status) and len(row) == 1 for row in rows):
        raise RuntimeError("the critic has failed in some of the completions; see the warnings above")


def throughput(base_url: str, latency: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Judgements a second at each concurrency, and their share of the latency-bound ideal."""
    table = []
    for concurrency in CONCURRENCY:
        source, rows = build(critic(base_url, concurrency=concurrency)), concurrency * options.waves
        judge_all(source, rollout(concurrency, 10**6))  # opens the connections
        rollouts = [rollout(rows, number * rows) for number in range(options.repeats)]
        rates = spread([rows / seconds(partial(judge_all, source, judged)) for judged in rollouts])
        ideal = concurrency / latency
        table.append(
            {
                "concurrency": concurrency,
                "judgements": rows,
                "a second": rates["median"],
                "min": rates["min"],
                "max": rates["max"],
                "ideal": ideal,
                "of ideal": rates["median"] / ideal,
                "target": ">= 0.9",
            }
        )
    print_table(f"Throughput at a latency of {latency * 1000:.0f} ms", table)
    return table


def replay(base_url: str, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Judgements a second that come from the cache, by the judge alone and by the critic as a whole."""
    cache = str(folder / "answers.sqlite")
    recorded = rollout(options.replayed, 0)
    judge_all(build(critic(base_url, concurrency=256, cache=cache)), recorded)
    config = critic("http://127.0.0.1:9/v1", cache=cache, replay_only=True)
    source, judge = build(config), config.judge.build(cast(Any, None))
    questions = source._questions(recorded)
    calls = {
        "ask() and its answers": lambda: judge.ask(questions)(),
        "llm_critic": lambda: judge_all(source, recorded),
    }
    table = []
    for name, call in calls.items():
        rates = spread([options.replayed / seconds(call) for _ in range(options.repeats)])
        found = {"a second": rates["median"], "min": rates["min"], "max": rates["max"]}
        table.append({"replayed by": name, "judgements": options.replayed, **found, "target": "> 2000"})
    print_table("Replay from the cache", table)
    return table


def arms(base_url: str, folder: Path, options: argparse.Namespace) -> list[Arm]:
    """The trainers; a critic stands last, so that the others score before it is waited for."""
    policy = save_scratch_policy(
        folder / "policy", hidden_size=options.hidden, intermediate_size=2 * options.hidden, num_hidden_layers=4
    )
    args = {
        "per_device_train_batch_size": options.batch,
        "num_generations": 4,
        "max_completion_length": options.length,
        "max_steps": options.warmup + options.steps,
    }
    judge = {"type": "server", "base_url": base_url, "model": "m", "concurrency": options.batch}
    asked = {"type": "llm_critic", "task": TASK, "judge": judge}
    made = []
    for name in ("without", "overlapped", "in turn"):
        rewards = (OUTCOME, PRM) if name == "without" else (OUTCOME, PRM, asked)
        stage = ppo_stage(policy, QUICKSTART_PROMPTS, args, rewards=rewards, credit={"estimator": "prime"})
        trainer = build_ours(stage, folder / name.replace(" ", "-"))
        if name == "in turn":
            trainer.scoring.sources[-1].begin = lambda rollout: None
        made.append(Arm(name, trainer))
    return made


def steps(base_url: str, latency: float, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of a step of each arm, and what it takes more than without a critic."""
    running = arms(base_url, folder, options)
    rounds: dict[str, list[dict[str, float]]] = {arm.name: [] for arm in running}
    for number in range(options.warmup + options.steps):
        for arm in running[number % len(running) :] + running[: number % len(running)]:
            rounds[arm.name].append(arm.step())
    for arm in running:
        arm.finish()
        check_lengths(arm.trainer, options.length)
    measured = {name: entries[options.warmup :] for name, entries in rounds.items()}
    table = [step_row(arm, measured[arm.name], measured["without"]) for arm in running]
    print_table(f"PPO step with a critic of {latency * 1000:.0f} ms for each of {options.batch} completions", table)
    return table


def step_row(arm: Arm, rounds: list[dict[str, float]], others: list[dict[str, float]]) -> dict[str, Any]:
    """An arm's steps, compared with those without a critic in the same rounds; medians."""
    taken = spread([entry["step"] for entry in rounds])
    pairs = [(mine["step"], other["step"]) for mine, other in zip(rounds, others, strict=True)]
    return {
        "arm": arm.name,
        "step s": taken["median"],
        "min": taken["min"],
        "max": taken["max"],
        "x without": statistics.median(mine / other for mine, other in pairs),
        "more s": statistics.median(mine - other for mine, other in pairs),
        "waited s": _logged(arm, "rewards/llm_critic/judge/waited"),
        **{part: statistics.median(entry[part] for entry in rounds) for part in PARTS},
    }


def _logged(arm: Arm, name: str) -> float:
    """Median of a metric of the arm's steps; 0 if it has none."""
    assert isinstance(arm.trainer, PpoTrainer)
    found = [entry[name] for entry in arm.trainer.state.log_history if name in entry]
    return statistics.median(found) if found else 0.0


def main() -> None:
    """Run the benchmark."""
    options = parser(__doc__)
    options.add_argument("--latency", type=float, default=0.2, help="seconds")
    options.add_argument("--waves", type=int, default=40, help="rounds of `concurrency` questions")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--replayed", type=int, default=4096, help="judgements")
    options.add_argument("--hidden", type=int, default=128, help="of the policy")
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--length", type=int, default=48, help="tokens of a completion")
    options.add_argument("--steps", type=int, default=15)
    options.add_argument("--warmup", type=int, default=2)
    chosen = options.parse_args()
    if not math.isfinite(chosen.latency) or chosen.latency <= 0:
        options.error("--latency must be positive")
    with report(chosen) as results, tempfile.TemporaryDirectory() as folder, slow_server(chosen.latency) as url:
        results["throughput"] = throughput(url, chosen.latency, chosen)
        results["replay"] = replay(url, Path(folder), chosen)
        results["step"] = steps(url, chosen.latency, Path(folder), chosen)


if __name__ == "__main__":
    main()
