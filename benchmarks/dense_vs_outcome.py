"""Dense against outcome-only credit on the quickstart's task, at equal rollouts and each at its best learning rate.

Protocol (fixed before the arms were compared):

- Arms: `dense`, the quickstart with 200 updates; `outcome`, the same without the PRM, advantages from the verifier
  alone (RLOO is what PRIME's estimator is without process rewards). The PRM was pretrained on 16,384 completions, so
  `outcome` trains for 128 updates more (128 completions each): both have sampled 41,984 completions at the end.
- Learning rates: each arm takes its own from {5e-5, 1e-4, 2e-4, 4e-4}, by held-out accuracy at the end on seed 100.
- Metric: held-out greedy accuracy (512 problems that no stage trains on) at the end, on seeds 0 to 4.
- Result: the mean over seeds of the difference `dense - outcome`, paired by seed (same SFT start), with its 95 %
  t-interval.

    python benchmarks/dense_vs_outcome.py tune OUT     # the grid on the tuning seed
    python benchmarks/dense_vs_outcome.py compare OUT  # the arms, each at its best rate
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TASK = {"terms": 12, "largest": 9, "multiplier": 10}
RATES = ("5e-5", "1e-4", "2e-4", "4e-4")
TUNING_SEED = 100
SEEDS = range(5)
PINNED = {  # the task, the model's start and the batch as they were when the protocol was fixed
    **{f"stages.{stage}.data.{key}": value for stage in ("sft", "ppo") for key, value in TASK.items()},
    **{f"stages.{stage}.eval_data.{key}": value for stage in ("sft", "ppo") for key, value in TASK.items()},
    **{f"stages.prm.data.prompts.{key}": value for key, value in TASK.items()},
    "stages.sft.data.size": 380,
    "stages.sft.trainer.args.max_steps": 300,
    "stages.prm.data.prompts.size": 4096,
    "stages.prm.data.num_generations": 4,
    "stages.ppo.trainer.args.per_device_train_batch_size": 128,
    "stages.ppo.trainer.args.num_generations": 4,
}
ARMS = {
    "dense": ["stages.ppo.trainer.args.max_steps=200", "stages.ppo.rewards.1.online.learning_rate=3e-4"],
    "outcome": [
        "~stages.prm",
        "~stages.ppo.rewards.1",
        "stages.ppo.credit.estimator=rloo",
        "stages.ppo.trainer.args.max_steps=328",
    ],
}
T_95 = 2.776  # two-sided, 4 degrees of freedom
RECIPE = Path(__file__).parent.parent / "recipes" / "quickstart.yaml"


def run(out: Path, arm: str, rate: str, seed: int) -> dict[str, float]:
    """One run with one thread, unless it is there already; its PPO stage's results."""
    name = f"{arm}-{rate}-{seed}"
    command = [sys.executable, "-m", "rlhf_kit", "train", str(RECIPE), f"runs_dir={out}", f"name={name}"]
    command += [f"seed={seed}", f"stages.ppo.trainer.args.learning_rate={rate}"]
    command += [*(f"{key}={value}" for key, value in PINNED.items()), *ARMS[arm]]
    with (out / f"{name}.log").open("w") as log:
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=log)
    return json.loads((out / name / "ppo" / "result.json").read_text())


def all_runs(out: Path, jobs: list[tuple[str, str, int]]) -> dict[tuple[str, str, int], dict[str, float]]:
    """The results of all jobs, two at a time."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        return dict(zip(jobs, pool.map(lambda job: run(out, *job), jobs), strict=True))


def tune(out: Path) -> None:
    """Choose each arm's learning rate on the tuning seed; writes `best.json`."""
    results = all_runs(out, [(arm, rate, TUNING_SEED) for rate in RATES for arm in ARMS])
    for (arm, rate, _), result in sorted(results.items()):
        print(f"{arm:8s} {rate}  {result['eval_accuracy_start']:.3f} -> {result['eval_accuracy']:.3f}")
    best = {arm: max(RATES, key=lambda rate: results[arm, rate, TUNING_SEED]["eval_accuracy"]) for arm in ARMS}
    (out / "best.json").write_text(json.dumps(best))
    print("best:", best)


def compare(out: Path) -> None:
    """The arms on the seeds of the comparison, each at its best rate."""
    best = json.loads((out / "best.json").read_text())
    results = all_runs(out, [(arm, best[arm], seed) for seed in SEEDS for arm in ARMS])
    differences = []
    for seed in SEEDS:
        ends = {arm: results[arm, best[arm], seed] for arm in ARMS}
        differences.append(ends["dense"]["eval_accuracy"] - ends["outcome"]["eval_accuracy"])
        row = "  ".join(f"{arm} {end['eval_accuracy']:.3f}" for arm, end in ends.items())
        print(f"seed {seed}  start {ends['dense']['eval_accuracy_start']:.3f}  {row}  {differences[-1]:+.3f}")
    mean = statistics.mean(differences)
    half = T_95 * statistics.stdev(differences) / len(differences) ** 0.5
    print(f"dense - outcome: {mean:+.3f}, 95 % interval [{mean - half:+.3f}, {mean + half:+.3f}]")


if __name__ == "__main__":
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    {"tune": tune, "compare": compare}[sys.argv[1]](folder)
