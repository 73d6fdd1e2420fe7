"""What watches a stage: the file of its metrics, and the display for the person in front of it."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState

from rlhf_kit.runs import callbacks
from rlhf_kit.runs.callbacks import MetricsCallback, ProgressCallback
from rlhf_kit.runs.metrics import MetricsWriter, read_metrics, read_samples, write_samples


def state(step: int = 0, updates: int = 4, zero: bool = True) -> TrainerState:
    return TrainerState(global_step=step, max_steps=updates, is_world_process_zero=zero)


def tell(callback: Any, event: str, at: TrainerState, **kwargs: Any) -> None:
    """Call one of the trainer's events."""
    getattr(callback, event)(None, at, TrainerControl(), **kwargs)


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    file = io.StringIO()
    return Console(file=file, force_terminal=terminal, width=120), file


def progress(terminal: bool = False, title: str = "ppo") -> tuple[ProgressCallback, io.StringIO]:
    shown, file = console(terminal)
    return ProgressCallback(title, shown), file


class TestLines:
    def test_there_is_one_a_log(self) -> None:
        callback, file = progress()
        tell(callback, "on_train_begin", state())
        for step in (1, 2, 3):
            tell(callback, "on_step_end", state(step))
            tell(callback, "on_log", state(step), logs={"loss": step / 4})
        tell(callback, "on_train_end", state(3))
        assert file.getvalue() == "ppo 1/4  loss 0.250\nppo 2/4  loss 0.500\nppo 3/4  loss 0.750\n"

    def test_a_log_of_nothing_that_is_shown_gives_none(self) -> None:
        callback, file = progress()
        for logs in ({}, None, {"learning_rate": 1e-3}, {"loss": "0.5"}, {"loss": None}, {"loss": True}):
            tell(callback, "on_log", state(1), logs=logs)
        assert file.getvalue() == ""

    def test_what_was_logged_before_stays_with_it(self) -> None:
        callback, file = progress()
        tell(callback, "on_log", state(1), logs={"eval_accuracy": 0.5})
        tell(callback, "on_log", state(2), logs={"kl": 0.125, "accuracy": 1})
        tell(callback, "on_log", state(3), logs={"eval_accuracy": 0.75})
        last = file.getvalue().splitlines()[-1]
        assert last == "ppo 3/4  held-out 0.750  accuracy 1.000  KL 0.125"

    def test_sources_are_shown_by_their_names(self) -> None:
        callback, file = progress()
        logs = {"rewards/verifier/mean": 0.5, "rewards/verifier/std": 0.1, "prm/implicit_prm/step_auc": 0.875}
        tell(callback, "on_log", state(1), logs=logs)
        assert file.getvalue() == "ppo 1/4  verifier 0.500  step AUC 0.88\n"

    def test_tokens_a_second_are_those_between_two_logs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = iter([10.0, 12.0, 12.5])
        monkeypatch.setattr(callbacks.time, "monotonic", lambda: next(clock))
        callback, file = progress()
        for step, tokens in enumerate((1000, 1100, 1200), start=1):
            tell(callback, "on_log", state(step), logs={"loss": 0.5, "num_tokens": tokens})
        rates = [line.partition("tokens/s ")[2] for line in file.getvalue().splitlines()]
        assert rates == ["", "50", "200"]

    def test_before_the_number_of_updates_is_known_there_is_none(self) -> None:
        callback, file = progress()
        tell(callback, "on_log", state(0, updates=0), logs={"eval_accuracy": 0.25})
        assert file.getvalue() == "ppo  held-out 0.250\n"

    def test_markup_in_a_title_is_text_and_a_long_line_is_one_line(self) -> None:
        callback, file = progress(title="[red]" + "x" * 200)
        tell(callback, "on_log", state(1), logs={"loss": 0.5})
        assert file.getvalue() == f"[red]{'x' * 200} 1/4  loss 0.500\n"

    def test_without_a_console_they_go_to_standard_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        callback = ProgressCallback("sft")
        tell(callback, "on_log", state(1), logs={"loss": 0.5})
        assert capsys.readouterr() == ("", "sft 1/4  loss 0.500\n")


class TestBar:
    @pytest.fixture(autouse=True)
    def capable_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TERM", "xterm-256color")

    def last_shown(self, text: str) -> str:
        """What the bar shows when it is left."""
        lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r", "\n").splitlines()
        return [line for line in lines if line.strip()][-1]

    def test_shows_the_updates_and_the_numbers(self) -> None:
        callback, file = progress(terminal=True)
        tell(callback, "on_train_begin", state())
        for step in (1, 2, 3):
            tell(callback, "on_step_end", state(step))
            tell(callback, "on_log", state(step), logs={"loss": step / 4})
        tell(callback, "on_train_end", state(3))
        shown = self.last_shown(file.getvalue())
        assert "ppo" in shown and "3/4" in shown and "loss 0.750" in shown
        assert "ppo 3/4" not in file.getvalue()  # no lines beside the bar

    def test_of_a_resumed_stage_starts_where_the_stage_does(self) -> None:
        callback, file = progress(terminal=True)
        tell(callback, "on_train_begin", state(2))
        tell(callback, "on_train_end", state(2))
        assert "2/4" in file.getvalue() and "0/4" not in file.getvalue()

    def test_leaves_the_terminal_as_it_was(self) -> None:
        callback, file = progress(terminal=True)
        tell(callback, "on_train_begin", state())
        tell(callback, "on_train_end", state(4))
        hide, show = "\x1b[?25l", "\x1b[?25h"
        assert file.getvalue().count(hide) == file.getvalue().count(show) == 1
        length = len(file.getvalue())
        tell(callback, "on_log", state(4), logs={"eval_accuracy": 0.5})  # evaluations come after the training too
        tell(callback, "on_train_end", state(4))
        assert len(file.getvalue()) == length


class TestWorkBesideTraining:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        monkeypatch.setenv("TERM", "xterm-256color")
        clock = SimpleNamespace(now=100.0)
        monkeypatch.setattr(callbacks.time, "monotonic", lambda: clock.now)
        return clock

    def work(self, callback: ProgressCallback, clock: SimpleNamespace, seconds: float, batches: int) -> None:
        """Work of 10 rows a batch that takes `seconds`."""
        for batch in range(batches + 1):
            callback.show_work("sampling", 10 * batch, 10 * batches)
            clock.now += seconds / batches

    @pytest.mark.parametrize("terminal", [False, True])
    def test_of_under_two_seconds_is_not_shown(self, clock: SimpleNamespace, terminal: bool) -> None:
        callback, file = progress(terminal)
        for _ in range(20):
            self.work(callback, clock, 1.9, 5)
        assert file.getvalue() == ""

    def test_gives_lines_ten_seconds_apart(self, clock: SimpleNamespace) -> None:
        callback, file = progress(title="prm")
        self.work(callback, clock, 40, 80)
        lines = [f"prm sampling {done}/800" for done in (40, 240, 440, 640)]
        assert file.getvalue().splitlines() == lines

    def test_that_takes_an_hour_gives_a_line_a_minute(self, clock: SimpleNamespace) -> None:
        callback, file = progress(title="prm")
        self.work(callback, clock, 3600, 3600)
        assert len(file.getvalue().splitlines()) == 60

    def test_has_a_bar_of_its_own_that_goes_when_it_is_done(self, clock: SimpleNamespace) -> None:
        callback, file = progress(terminal=True, title="prm")
        self.work(callback, clock, 10, 5)
        text = file.getvalue()
        assert "prm sampling" in text and "10/50" in text
        hide, show = "\x1b[?25l", "\x1b[?25h"
        assert text.count(hide) == text.count(show) == 1
        self.work(callback, clock, 10, 5)
        assert file.getvalue().count(hide) == file.getvalue().count(show) == 2

    def test_in_the_middle_of_training_has_a_second_bar_of_the_same_display(self, clock: SimpleNamespace) -> None:
        callback, file = progress(terminal=True)
        tell(callback, "on_train_begin", state())
        for done in range(5):
            tell(callback, "on_prediction_step", state(1), done=done, total=4)
            clock.now += 3
        tell(callback, "on_prediction_step", state(1))  # transformers' own, of a loss
        tell(callback, "on_step_end", state(2))
        tell(callback, "on_log", state(2), logs={"loss": 0.5})
        assert file.getvalue().count("\x1b[?25h") == 0
        tell(callback, "on_train_end", state(2))
        assert "ppo evaluation" in file.getvalue()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).replace("\r", "\n").splitlines()
        last = [line for line in shown if line.strip()][-1]
        assert "2/4" in last and "loss 0.500" in last and "evaluation" not in last

    def test_is_readable_on_a_narrow_terminal(self, clock: SimpleNamespace) -> None:
        file = io.StringIO()
        callback = ProgressCallback("ppo", Console(file=file, force_terminal=True, width=80))
        tell(callback, "on_train_begin", state())
        tell(callback, "on_log", state(1), logs={f"rewards/source{number}/mean": 0.5 for number in range(9)})
        callback.show_work("evaluation", 0, 512)
        clock.now += 3
        callback.show_work("evaluation", 256, 512)
        callback.close()
        shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue()).splitlines()
        last = [line for line in shown if line.strip()][-2:]
        assert "ppo " in last[0] and "0/4" in last[0] and "source0" in last[0] and "…" in last[0]
        assert "ppo evaluation" in last[1] and "256/512" in last[1] and "━" in last[1]

    def test_that_is_interrupted_leaves_the_terminal_as_it_was(self, clock: SimpleNamespace) -> None:
        callback, file = progress(terminal=True)
        callback.show_work("sampling", 0, 8)
        clock.now += 5
        callback.show_work("sampling", 4, 8)
        callback.close()
        assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


@pytest.mark.parametrize("terminal", [False, True])
def test_nothing_is_shown_by_a_process_that_is_not_the_first(terminal: bool) -> None:
    callback, file = progress(terminal)
    tell(callback, "on_train_begin", state(zero=False))
    tell(callback, "on_step_end", state(1, zero=False))
    tell(callback, "on_log", state(1, zero=False), logs={"loss": 0.5})
    tell(callback, "on_train_end", state(1, zero=False))
    assert file.getvalue() == ""


class TestMetrics:
    def attempt(self, folder: Path, steps: int) -> None:
        """What a stage leaves that was interrupted after `steps` updates, with samples at each."""
        with MetricsWriter(folder) as writer:
            for step in range(steps + 1):
                writer.write(step, {"loss": 1.0})
                write_samples(folder, step, [{"completion": "first"}])

    def test_every_number_that_is_logged_is_written_with_its_step(self, tmp_path: Path) -> None:
        callback = MetricsCallback(tmp_path)
        tell(callback, "on_train_begin", state())
        tell(callback, "on_log", state(1), logs={"loss": 0.5, "epoch": 1, "note": "text", "flag": True})
        tell(callback, "on_log", state(2), logs={"note": "text"})
        tell(callback, "on_log", state(3), logs={"loss": float("nan")})
        lines = [{key: value for key, value in line.items() if key != "time"} for line in read_metrics(tmp_path)]
        assert lines == [{"step": 1, "loss": 0.5, "epoch": 1}, {"step": 3, "loss": None}]

    def test_a_resumed_stage_drops_what_it_will_log_again(self, tmp_path: Path) -> None:
        self.attempt(tmp_path, 5)
        callback = MetricsCallback(tmp_path)
        tell(callback, "on_train_begin", state(3))
        assert [line["step"] for line in read_metrics(tmp_path)] == [0, 1, 2, 3]
        assert list(read_samples(tmp_path)) == [0, 1, 2, 3]
        tell(callback, "on_log", state(4), logs={"loss": 2.0})
        assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)][-2:] == [(3, 1.0), (4, 2.0)]

    def test_what_was_evaluated_before_the_first_update_stays(self, tmp_path: Path) -> None:
        callback = MetricsCallback(tmp_path)
        tell(callback, "on_log", state(0), logs={"eval_accuracy": 0.25})
        tell(callback, "on_train_begin", state(0))
        assert [line["eval_accuracy"] for line in read_metrics(tmp_path)] == [0.25]

    def test_a_process_that_is_not_the_first_writes_and_drops_nothing(self, tmp_path: Path) -> None:
        self.attempt(tmp_path, 2)
        before = (tmp_path / "metrics.jsonl").read_bytes()
        callback = MetricsCallback(tmp_path)
        tell(callback, "on_train_begin", state(1, zero=False))
        tell(callback, "on_log", state(2, zero=False), logs={"loss": 2.0})
        assert (tmp_path / "metrics.jsonl").read_bytes() == before
        assert list(read_samples(tmp_path)) == [0, 1, 2]
