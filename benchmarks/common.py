"""What the benchmarks share: trainers built alike, clocks, peak memory, and the printing of results."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import datasets
import torch
from torch import nn
from transformers import PrinterCallback, Trainer, set_seed
from transformers.utils import logging
from trl.trainer.grpo_trainer import GRPOTrainer

from rlhf_kit.data.load import load_data
from rlhf_kit.models.config import Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.rewards.implicit_prm import ImplicitPrm
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.ppo import PpoTrainer
from rlhf_kit.trainers.run_ppo import build_ppo_trainer, ppo_args
from rlhf_kit.trainers.setup import StageRun

ROOT = Path(__file__).parents[1]
MIB = 2**20
QUICKSTART_PROMPTS = {"type": "running_sums", "terms": 12, "largest": 9, "multiplier": 10, "size": 2048, "seed": 3}
Result = TypeVar("Result")

# --- trainers built alike ---


def odd(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """An outcome that about half of the completions of any model have, so that every group has a gradient."""
    return [float(sum(ids) % 2) for ids in completion_ids]


OUTCOME = {"type": "function", "function": "odd", "bounded": True}


def ppo_stage(
    policy: str | Path,
    data: Mapping[str, Any],
    args: Mapping[str, Any],
    rewards: Sequence[Mapping[str, Any]] = (OUTCOME,),
    credit: Mapping[str, Any] | None = None,
    lora: bool = False,
) -> Ppo:
    """A `ppo` stage whose completions all have `max_completion_length` tokens; no checkpointing unless asked for."""
    trainer_args = {
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "generation_kwargs": {"min_new_tokens": args["max_completion_length"]},
        **args,
    }
    return Ppo.model_validate(
        {
            "type": "ppo",
            "model": {"path": str(policy), **({"peft": {"type": "lora"}} if lora else {})},
            "data": dict(data),
            "rewards": list(rewards),
            "credit": credit or {"estimator": "group", "scale": "group", "whiten": False},
            "trainer": {"args": trainer_args},
        }
    )


def build_ours(stage: Ppo, folder: Path, functions: Mapping[str, Callable[..., Any]] | None = None) -> PpoTrainer:
    """The kit's trainer of a stage."""
    quieten()
    trainer = build_ppo_trainer(stage, StageRun(folder, functions={"odd": odd, **(functions or {})}))
    trainer.remove_callback(PrinterCallback)
    return trainer


def build_trl(stage: Ppo, folder: Path) -> GRPOTrainer:
    """TRL's own trainer with the stage's model, data and arguments, and the outcome as its reward."""
    quieten()
    args = ppo_args(stage, StageRun(folder))
    set_seed(args.seed)
    trainer = GRPOTrainer(
        model=cast(Any, load_model(stage.model)),
        reward_funcs=cast(Any, odd),
        args=args,
        train_dataset=load_data(stage.data),
        processing_class=load_tokenizer(stage.model),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def quieten() -> None:
    """No progress bars between the numbers."""
    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def save_scratch_policy(folder: Path, **fields: Any) -> Path:
    """A Llama with random weights as a folder (a PRM can only start from one); the quickstart's, unless `fields`."""
    quieten()
    torch.manual_seed(0)
    shape = {"vocabulary": "running_sums", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = Scratch.model_validate({"type": "scratch", **shape, **fields})
    load_model(config).save_pretrained(str(folder))
    load_tokenizer(config).save_pretrained(folder)
    return folder


def models_of(trainer: Trainer) -> dict[str, nn.Module]:
    """The models of a trainer: `policy`, `reference`, PRMs by source; one module may be there several times."""
    models: dict[str, Any] = {"policy": trainer.model}
    if isinstance(trainer, PpoTrainer):
        models |= {s.name: s.scorer.model for s in trainer.scoring.sources if isinstance(s, ImplicitPrm)}
        models |= {} if trainer.reference is None else {"reference": trainer.reference.model}
    return models


def check_lengths(trainer: Trainer, length: int) -> None:
    """Fail unless every completion had the same length: otherwise the arms have not done the same work."""
    found = [entry["completions/min_length"] for entry in trainer.state.log_history if "reward" in entry]
    if not found or min(found) != length:
        raise RuntimeError(f"completions of {length} tokens were asked for, and the shortest had {found}")


# --- clocks ---


def now() -> float:
    """Seconds, when all that was started on an accelerator is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function: Callable[[], object]) -> float:
    """How long one call takes."""
    start = now()
    function()
    return now() - start


class Stopwatch:
    """Time by part; what runs inside another part counts for the inner one alone."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._mark = 0.0

    def enter(self, part: str) -> None:
        """From now on time belongs to `part`."""
        self._charge()
        self._open.append(part)

    def leave(self) -> None:
        """The innermost part ends."""
        self._charge()
        self._open.pop()

    def wrap(self, owner: Any, method: str, part: str) -> None:
        """Count the time of a method of this one object as `part`."""
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(part)
            try:
                return original(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, method, timed)

    def take(self) -> dict[str, float]:
        """What was counted since the last call."""
        counted, self.seconds = dict(self.seconds), defaultdict(float)
        return counted

    def _charge(self) -> None:
        moment = now()
        if self._open:
            self.seconds[self._open[-1]] += moment - self._mark
        self._mark = moment


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


# --- peak memory ---


def fresh_process(function: Callable[..., Result], *args: Any, preloaded: bool = False) -> Result:
    """Call a function in a new process, whose peak memory is its own.

    glibc keeps freed memory for later, which would hide peaks and leave others standing: there it gives every block
    of 1 MiB or more back at once. With `preloaded` the process is forked from one that has imported everything and
    done nothing, which saves ten seconds; not with a GPU, for CUDA does not outlive a fork.
    """
    method = "forkserver" if preloaded and not torch.cuda.is_available() else "spawn"
    glibc = {"MALLOC_MMAP_THRESHOLD_": str(MIB), "MALLOC_TRIM_THRESHOLD_": str(MIB)}
    before = {name: os.environ.get(name) for name in glibc}
    os.environ.update(glibc)
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context(method)) as pool:
            return pool.submit(function, *args).result()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def memory_now() -> int:
    """Bytes in use: on the accelerator where there is one, else this process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def reset_peak() -> None:
    """Let the peak start from what is in use now: loading a model takes more than the model."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def memory_peak() -> int:
    """The most bytes in use since `reset_peak`."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- processes ---


def run_worker(script: str, *arguments: str, processes: int = 1, threads: int = 1) -> None:
    """Run a script in one process, or in several with the project's configuration for the device.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    command = [script, *arguments]
    if processes > 1:
        world = "ddp" if torch.cuda.is_available() else "cpu_ddp"
        environment |= {} if torch.cuda.is_available() else {"ACCELERATE_USE_CPU": "true"}
        config = str(ROOT / "accelerate_configs" / f"{world}.yaml")
        launcher = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", str(processes)]
        command = [*launcher, *command]
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} exited with {done.returncode}:\n{done.stderr[-4000:]}")


# --- results ---


@contextmanager
def report(arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A dictionary for the results, beside what they were measured on; written to `--out` at the end."""
    start = time.perf_counter()
    results: dict[str, Any] = {"arguments": {k: v for k, v in vars(arguments).items() if k != "out"}}
    results["machine"] = machine()
    print(f"machine: {results['machine']}", flush=True)
    yield results
    results["total_seconds"] = round(time.perf_counter() - start, 1)
    print(f"\nin all {results['total_seconds']} s")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = next((line.split(":")[1].strip() for line in _cpu_info() if line.startswith("model name")), "")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu or platform.processor()
    versions = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    return {"device": device, "cores": os.cpu_count(), "threads": torch.get_num_threads(), **versions}


def _cpu_info() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.is_file() else []


def print_table(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A Markdown table; the first row's keys are its head."""
    head = list(rows[0])
    cells = [[_cell(row.get(name, "")) for name in head] for row in rows]
    widths = [max(len(name), *(len(line[i]) for line in cells)) for i, name in enumerate(head)]
    lines = [head, ["-" * width for width in widths], *cells]
    print(f"\n{title}\n")
    for line in lines:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |")
    sys.stdout.flush()


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options of every benchmark."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--out", type=Path, help="write all numbers to this JSON file")
    return options


def parsed(
    options: argparse.ArgumentParser,
    sizes: Mapping[str, str],
    defaults: Mapping[str, Mapping[str, int]],
    arguments: Sequence[str] | None = None,
) -> argparse.Namespace:
    """The arguments with `sizes`, by their help texts; `defaults` differ for the model `tiny` and one at a `path`."""
    for name, text in sizes.items():
        options.add_argument(f"--{name}", type=int, help=text)
    found = options.parse_args(arguments)
    for name, value in defaults["tiny" if found.model == "tiny" else "path"].items():
        if getattr(found, name) is None:
            setattr(found, name, value)
    return found
