"""How step time and peak memory of the kit's PPO step grow: completion length, batch, vocabulary, sources, processes.

One base setting, from which one thing at a time is varied; each point runs in processes of its own. The step has an
outcome reward and an online implicit PRM on a Llama of width 128 with random weights; more sources are more reward
functions. Every process has `--threads` threads. With two processes each has the base setting's batch (weak scaling):
efficiency is the time of one process over that of two, and 1 would be perfect.

    python benchmarks/scaling.py [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import (
    MIB,
    OUTCOME,
    build_ours,
    check_lengths,
    memory_now,
    memory_peak,
    now,
    odd,
    parser,
    ppo_stage,
    print_table,
    report,
    reset_peak,
    run_worker,
    save_scratch_policy,
    spread,
)
from transformers import TrainerCallback

PRM = {"type": "implicit_prm", "beta": 0.05, "online": {"learning_rate": 1e-6}}
PROMPT_WORDS = 16
SMALLEST_VOCABULARY = 256


@dataclass(frozen=True)
class Point:
    """A setting: `length` tokens a completion, `batch` completions a process, `sources` reward functions and a PRM."""

    length: int = 32
    batch: int = 32
    vocabulary: int = 1024
    sources: int = 1
    processes: int = 1


VARIED = {
    "length": (16, 32, 64, 128),
    "batch": (16, 32, 64, 128),
    "vocabulary": (256, 1024, 8192, 32768),
    "sources": (1, 2, 4, 8),
    "processes": (1, 2),
}

# --- one point, in its own processes ---


class Steps(TrainerCallback):
    """The time of every step, and the peak memory after the warm-up."""

    def __init__(self, warmup: int) -> None:
        self.seconds: list[float] = []
        self._warmup = warmup
        self._last = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        self._last = now()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """See `TrainerCallback`."""
        moment = now()
        if state.global_step > self._warmup:
            self.seconds.append(moment - self._last)
        elif state.global_step == self._warmup:
            reset_peak()
        self._last = now()


def work(case: dict[str, Any]) -> None:
    """Train the case's point for a few steps, and write what this process saw to `<folder>/<rank>.json`."""
    point = Point(**case["point"])
    before = memory_now()
    args = {
        "per_device_train_batch_size": point.batch,
        "num_generations": 4,
        "max_completion_length": point.length,
        "max_steps": case["warmup"] + case["steps"],
    }
    names = [f"odd_{number}" for number in range(1, point.sources)]
    rewards = (OUTCOME, *({"type": "function", "function": name} for name in names), PRM)
    data = {"type": "jsonl", "path": case["prompts"]}
    stage = ppo_stage(case["policy"], data, args, rewards, {"estimator": "prime"})
    folder = Path(case["folder"])
    trainer = build_ours(stage, folder / "checkpoints", dict.fromkeys(names, odd))
    if trainer.accelerator.num_processes != point.processes:  # a launcher may silently start a single one
        raise RuntimeError(f"{trainer.accelerator.num_processes} processes, not {point.processes}")
    steps = Steps(case["warmup"])
    trainer.add_callback(steps)
    trainer.train()
    check_lengths(trainer, point.length)
    found = {"seconds": steps.seconds, "peak": memory_peak() - before}
    (folder / f"{trainer.accelerator.process_index}.json").write_text(json.dumps(found))
    if torch.distributed.is_initialized():
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()


def measure(point: Point, policies: dict[int, Path], options: argparse.Namespace) -> dict[str, Any]:
    """Run a point; its step times (of the slowest process) and the largest peak of a process."""
    with tempfile.TemporaryDirectory() as temporary:
        case = {
            "point": asdict(point),
            "policy": str(policies[point.vocabulary]),
            "prompts": str(policies[point.vocabulary].parent / "prompts.jsonl"),
            "folder": temporary,
            "steps": options.steps,
            "warmup": options.warmup,
        }
        run_worker(__file__, "--worker", json.dumps(case), processes=point.processes, threads=options.threads)
        found = [json.loads((Path(temporary) / f"{rank}.json").read_text()) for rank in range(point.processes)]
    seconds = [max(times) for times in zip(*(process["seconds"] for process in found), strict=True)]
    return {**asdict(point), "seconds": seconds, "peak": max(process["peak"] for process in found)}


# --- the benchmark ---


def save_inputs(folder: Path, vocabularies: set[int]) -> dict[int, Path]:
    """A policy for every vocabulary, and prompts of words that all of them have."""
    words = [f"w{number}" for number in range(max(*vocabularies, SMALLEST_VOCABULARY))]
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(words[: SMALLEST_VOCABULARY // 2], k=PROMPT_WORDS)) for _ in range(1024)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    save = partial(save_scratch_policy, hidden_size=128, intermediate_size=256, max_position_embeddings=512)
    # Four ids are the special tokens.
    return {size: save(folder / str(size), vocabulary=words[: size - 4]) for size in vocabularies}


def points(options: argparse.Namespace) -> dict[str, list[Point]]:
    """What is varied, and its points; the base setting is in every list."""
    varied = {name: VARIED[name] for name in options.vary}
    if options.small:
        varied = {name: values[:2] for name, values in varied.items()}
    base = Point(length=16, batch=16) if options.small else Point()
    return {name: [replace(base, **{name: value}) for value in values] for name, values in varied.items()}


def run(options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Measure every point once."""
    by_name = points(options)
    measured: dict[Point, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        policies = save_inputs(Path(temporary), {p.vocabulary for group in by_name.values() for p in group})
        for point in (point for group in by_name.values() for point in group):
            if point not in measured:
                measured[point] = measure(point, policies, options)
                print(f"{point}: done", flush=True)
    return {name: [measured[point] for point in group] for name, group in by_name.items()}


def table(name: str, measured: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every value, with growth over the first."""
    rows = []
    first = statistics.median(measured[0]["seconds"])
    for entry in measured:
        step = spread(entry["seconds"])
        row = {
            name: entry[name],
            "step s": step["median"],
            "min": step["min"],
            "max": step["max"],
            "x first": step["median"] / first,
            "peak MiB": entry["peak"] / MIB,
        }
        if name == "processes":
            row["efficiency"] = first / step["median"]
        rows.append(row)
    return rows


def plot(results: dict[str, list[dict[str, Any]]], file: Path) -> None:
    """Step time and peak memory against each thing that is varied, on logarithmic axes; skipped without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no plot: matplotlib is not installed (pip install matplotlib)")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    figure, axes = pyplot.subplots(2, len(results), figsize=(3 * len(results), 5), squeeze=False, sharey="row")
    for column, (name, measured) in enumerate(results.items()):
        values = [entry[name] for entry in measured]
        lines = {
            "step (s)": [statistics.median(entry["seconds"]) for entry in measured],
            "peak memory (MiB)": [entry["peak"] / MIB for entry in measured],
        }
        for row, (label, line) in enumerate(lines.items()):
            axis = axes[row][column]
            axis.plot(values, line, marker="o")
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.yaxis.set_major_locator(ticker.LogLocator(base=2, subs=(1.0, 1.5)))
            axis.set_xticks(values, [str(value) for value in values])
            axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
            axis.set_xlabel(name if row == 1 else "")
            axis.set_ylabel(label if column == 0 else "")
            axis.grid(alpha=0.3)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    print(f"plot: {file}")


def main() -> None:
    """Measure, print, plot, write."""
    options = parser(__doc__)
    options.add_argument("--vary", nargs="+", choices=VARIED, default=list(VARIED))
    options.add_argument("--steps", type=int, default=10, help="steps that are measured")
    options.add_argument("--warmup", type=int, default=2, help="steps before them")
    options.add_argument("--threads", type=int, default=1, help="threads of each process")
    options.add_argument("--small", action="store_true", help="few and small points, to try it out")
    options.add_argument("--plot", type=Path, default=Path(__file__).with_name("scaling.png"))
    arguments = options.parse_args()
    with report(arguments) as results:
        results["points"] = run(arguments)
        for name, measured in results["points"].items():
            print_table(f"Against {name}", table(name, measured))
        plot(results["points"], arguments.plot)


if __name__ == "__main__":
    if "--worker" in sys.argv:
        work(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
    else:
        main()
