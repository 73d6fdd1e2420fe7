"""What watches a stage: the run folder's metrics, and a progress bar for the person in front of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from transformers import TrainerCallback

from rlhf_kit.runs.metrics import MetricsWriter, read_metrics, truncate_samples_after

WORTH_SHOWING = 2.0  # seconds; work that is done sooner gives no output
LINE_INTERVAL = (10.0, 60.0)  # seconds between lines: the least, and the most while there is less than a tenth more
SHOWN = {"accuracy": "accuracy", "eval_accuracy": "held-out", "kl": "KL", "loss": "loss"}


class MetricsCallback(TrainerCallback):
    """Writes every logged number to `metrics.jsonl`; on resume, drops what will be logged again."""

    def __init__(self, folder: Path) -> None:
        self._writer = MetricsWriter(folder)
        self._folder = folder
        self._logged: tuple[int, set[str]] = (-1, set())

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and state.global_step > 0:
            self._writer.truncate_after(state.global_step)
            truncate_samples_after(self._folder, state.global_step)
            before = [line for line in read_metrics(self._folder) if line.get("step") == state.global_step]
            self._logged = state.global_step, {name for line in before for name in line}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        numbers = {key: value for key, value in (logs or {}).items() if _is_number(value)}
        step, known = self._logged
        again = state.global_step == step and numbers.keys() <= known  # it was stopped behind its last checkpoint
        if state.is_world_process_zero and numbers and not again:
            self._writer.write(state.global_step, numbers)

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class ProgressCallback(TrainerCallback):
    """A bar with the numbers that matter; a line per log where there is no terminal. Main process only.

    `show_work` shows what else takes long (sampling, evaluation), as a bar below that of the training if there is one.
    """

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._title = title
        self._console = console or Console(file=sys.stderr)
        self._progress: Progress | None = None
        self._numbers: dict[str, str] = {}
        self._tokens: tuple[float, float] | None = None
        self._work = _Work("", 0.0)
        self._task: TaskID | None = None
        self._work_task: TaskID | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not self._console.is_terminal:
            return
        self.close()
        self._progress = _bars(self._console)
        self._task = self._progress.add_task(
            self._title, total=state.max_steps, completed=state.global_step, numbers=""
        )
        self._progress.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=state.global_step)

    def on_prediction_step(
        self, args: Any, state: Any, control: Any, done: int | None = None, total: int | None = None, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and done is not None and total is not None:
            self.show_work("evaluation", done, total)

    def show_work(self, what: str, done: int, total: int) -> None:
        """Show that `done` of `total` is done of `what`; to be called with 0 when it begins."""
        if done == 0 or what != self._work.what:
            self._close_work()
            self._work = _Work(what, time.monotonic())
        name = f"{self._title} {what}"
        if not self._console.is_terminal:
            if self._work.line_is_due(done, total, time.monotonic()):
                self._console.print(f"{name} {done}/{total}", soft_wrap=True, markup=False, highlight=False)
        elif done >= total:
            self._close_work()
        elif time.monotonic() - self._work.began >= WORTH_SHOWING:
            self._show_work_bar(name, done, total)

    def _show_work_bar(self, name: str, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = _bars(self._console, transient=True)
            self._progress.start()
        if self._work_task is None:
            self._work_task = self._progress.add_task(name, total=total, completed=done, numbers="")
        else:
            self._progress.update(self._work_task, completed=done)

    def _close_work(self) -> None:
        if self._progress is None or self._work_task is None:
            return
        self._progress.remove_task(self._work_task)
        self._work_task = None
        if self._task is None:
            self.close()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        new = self._pick(logs or {})
        self._numbers |= new
        line = "  ".join(f"{name} {value}" for name, value in self._numbers.items())
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, numbers=line)
        elif new and not self._console.is_terminal:
            known = state.max_steps > 0  # not in an evaluation before the training
            at = f"{self._title} {state.global_step}/{state.max_steps}" if known else self._title
            self._console.print(f"{at}  {line}", soft_wrap=True, markup=False, highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen and give the cursor back, however the stage ended."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = self._task = self._work_task = None

    def _pick(self, logs: Mapping[str, Any]) -> dict[str, str]:
        picked = {label: f"{logs[key]:.3f}" for key, label in SHOWN.items() if _is_number(logs.get(key))}
        for key, value in logs.items():
            if key.startswith("rewards/") and key.endswith("/mean") and _is_number(value):
                picked[key.split("/")[1]] = f"{value:.3f}"
            if key.startswith("prm/") and key.endswith("/step_auc") and _is_number(value):
                picked["step AUC"] = f"{value:.2f}"
        tokens = logs.get("num_tokens")
        if _is_number(tokens):
            now = time.monotonic()
            if self._tokens is not None and now > self._tokens[1]:
                picked["tokens/s"] = f"{(tokens - self._tokens[0]) / (now - self._tokens[1]):.0f}"
            self._tokens = (tokens, now)
        return picked


class _Work:
    """Work beside training, and when a line about it was last written."""

    def __init__(self, what: str, began: float) -> None:
        self.what = what
        self.began = began
        self._last: tuple[float, int] | None = None

    def line_is_due(self, done: int, total: int, now: float) -> bool:
        """Whether to write one now, which is then taken to be written."""
        if self._last is None:
            due = now - self.began >= WORTH_SHOWING
        else:
            passed, more = now - self._last[0], done - self._last[1]
            least, most = LINE_INTERVAL
            due = passed >= least and (10 * more >= total or passed >= most)
        if due:
            self._last = now, done
        return due


class _Numbers(ProgressColumn):
    """The numbers of a task, cut where the terminal ends: other columns keep their width as long as they can."""

    def render(self, task: Task) -> Text:
        return Text(task.fields["numbers"], no_wrap=True, overflow="ellipsis")


def _bars(console: Console, transient: bool = False) -> Progress:
    return Progress(
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        _Numbers(),
        console=console,
        transient=transient,
    )


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
