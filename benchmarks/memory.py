"""Peak memory of a PPO step with LoRA: one frozen base with many heads, separate models, and LoRA GRPO of TRL.

- `trl grpo, LoRA`: TRL's GRPOTrainer with an outcome reward; neither a reference nor a PRM nor a critic.
- `shared base`: the kit with policy, reference, online PRM and value head on one frozen base: two adapters, none for
  the reference, and a linear head (target: at most 1.15x TRL's peak).
- `separate models`: the same, but with a whole frozen reference and a whole PRM that learns.

Each runs in a process of its own. `weights` is what is in use when training starts, `peak` the most from then to the
end of the last step; both are above what the process used before it loaded a model.

    python benchmarks/memory.py --model PATH [--checkpointing]     # e.g. SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    OUTCOME,
    QUICKSTART_PROMPTS,
    build_ours,
    build_trl,
    check_lengths,
    fresh_process,
    memory_now,
    memory_peak,
    models_of,
    parser,
    ppo_stage,
    print_table,
    report,
    reset_peak,
)
from transformers import Trainer, TrainerCallback

from rlhf_kit.models.loading import load_copy
from rlhf_kit.models.scorer import Scorer, add_log_prob_head
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.ppo import PpoTrainer

TRL, SHARED, SEPARATE = "trl grpo, LoRA", "shared base", "separate models"
CREDIT = {"estimator": "gae", "kl": {"coefficient": 0.01}}


def stage_of(arm: str, options: argparse.Namespace) -> Ppo:
    """The stage of an arm: with the model's path a PRM is a model of its own, without one an adapter."""
    args = {
        "per_device_train_batch_size": options.batch,
        "num_generations": options.generations,
        "max_completion_length": options.length,
        "max_steps": options.steps,
        "gradient_checkpointing": options.checkpointing,
    }
    if arm == TRL:
        return ppo_stage(options.model, QUICKSTART_PROMPTS, args, lora=True)
    own = {"path": options.model} if arm == SEPARATE else {}
    prm = {"type": "implicit_prm", "reference": "initial", "online": {"learning_rate": 1e-6}, **own}
    return ppo_stage(options.model, QUICKSTART_PROMPTS, args, (OUTCOME, prm), CREDIT, lora=True)


def build(arm: str, options: argparse.Namespace, folder: Path) -> Trainer:
    """The arm's trainer."""
    stage = stage_of(arm, options)
    if arm == TRL:
        return build_trl(stage, folder)
    trainer = build_ours(stage, folder)
    if arm == SEPARATE:
        use_whole_reference(trainer, stage)
    check_sharing(trainer, shared=arm == SHARED)
    return trainer


def use_whole_reference(trainer: PpoTrainer, stage: Ppo) -> None:
    """A second copy of the base as the reference, which with LoRA is otherwise the policy without its adapter."""
    copy = load_copy(stage.model)
    add_log_prob_head(copy, trainer.temperature)
    trainer.reference = Scorer(copy.to(trainer.accelerator.device), [])


def check_sharing(trainer: PpoTrainer, shared: bool) -> None:
    """Fail unless reference and PRM are on the policy's base, or not, as the arm's name says."""
    assert trainer.reference is not None
    prm: Any = trainer.scoring.sources[-1]
    found = [trainer.reference.model is trainer.model, prm.scorer.model is trainer.model]
    if found != [shared, shared]:
        raise RuntimeError(f"reference and PRM on the policy's base: {found}, expected {shared}")


class PeakFromStart(TrainerCallback):
    """Lets the peak start with training."""

    def __init__(self, trainer: Trainer) -> None:
        self.weights = 0
        self._models = models_of(trainer)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        for model in self._models.values():  # a file of weights is mapped, and not in memory before it is read
            for parameter in model.parameters():
                parameter.detach().sum()
        self.weights = memory_now()
        reset_peak()


def measure(arm: str, options: argparse.Namespace) -> dict[str, float]:
    """Bytes above what this process used before it loaded a model; for a process of its own."""
    torch.set_num_threads(options.threads)
    before, start = memory_now(), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(arm, options, Path(folder))
        watch = PeakFromStart(trainer)
        trainer.add_callback(watch)
        trainer.train()
    peak = memory_peak()
    check_lengths(trainer, options.length)
    return {"weights": watch.weights - before, "peak": peak - before, "seconds": time.perf_counter() - start}


def table(measured: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """One row an arm: medians over repeats, and ratios to TRL."""
    peaks = {arm: statistics.median(run["peak"] for run in runs) for arm, runs in measured.items()}
    weights = {arm: statistics.median(run["weights"] for run in runs) for arm, runs in measured.items()}
    return [
        {
            "arm": arm,
            "weights MiB": weights[arm] / MIB,
            "peak MiB": peak / MIB,
            "peak x TRL": peak / peaks[TRL],
            "target": "<= 1.15" if arm == SHARED else "",
            "s": statistics.median(run["seconds"] for run in measured[arm]),
        }
        for arm, peak in peaks.items()
    ]


def main() -> None:
    """Measure, print, write."""
    options = parser(__doc__)
    options.add_argument("--model", required=True, help="the path of a whole model")
    options.add_argument("--checkpointing", action="store_true", help="with gradient checkpointing, TRL's default")
    options.add_argument("--batch", type=int, default=8, help="completions of a step")
    options.add_argument("--length", type=int, default=48, help="tokens of every completion")
    options.add_argument("--generations", type=int, default=4, help="completions per prompt")
    options.add_argument("--steps", type=int, default=2, help="the optimiser's state is there from the second step on")
    options.add_argument("--repeats", type=int, default=1, help="processes of each arm")
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = options.parse_args()
    with report(arguments) as results:
        run = partial(fresh_process, measure)
        arms = (TRL, SHARED, SEPARATE)
        results["runs"] = {arm: [run(arm, arguments) for _ in range(arguments.repeats)] for arm in arms}
        results["table"] = table(results["runs"])
        print_table("Peak memory of a PPO step with LoRA", results["table"])


if __name__ == "__main__":
    main()
