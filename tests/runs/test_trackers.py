"""Each stage has a wandb run and tensorboard events of its own, with the numbers of its run folder and no secrets."""

from __future__ import annotations

import json
import os
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from rlhf_kit.errors import RunError
from rlhf_kit.recipe import Recipe, load_recipe
from rlhf_kit.runs.metrics import read_metrics, read_samples
from rlhf_kit.runs.pipeline import run_pipeline
from rlhf_kit.runs.trackers import tracked

torch.set_num_threads(1)

SECRETS = {"HF_TOKEN": "hf_abcdefghijklmnopqrstuvwxyz", "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567"}
VARIABLES = ("WANDB_PROJECT", "WANDB_DIR", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_RUN_ID", "TENSORBOARD_LOGGING_DIR")
# What wandb shows of the end of a run, in its summary alone.
OF_THE_END = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss", "total_flos"}

COMMON = """
    data: {type: running_sums, size: 40, terms: 2, modulus: 5}
    eval_data: {type: running_sums, size: 8, terms: 2, modulus: 5, seed: 1}
    evaluation: {verifier: exact, max_new_tokens: 4, batch_size: 8}
"""
PIPELINE = f"""
name: tiny
stages:
  sft:
    type: sft
    model: {{type: scratch, vocabulary: running_sums, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
            num_attention_heads: 2, max_position_embeddings: 32}}
{COMMON}
    trainer:
      args: {{per_device_train_batch_size: 8, max_steps: 2, logging_steps: 1, gradient_checkpointing: false,
             report_to: [wandb, tensorboard]}}
  ppo:
    type: ppo
    model: {{path: "${{stages.sft.model}}"}}
{COMMON}
    rewards: [{{type: verifier, verifier: exact}}]
    credit: {{estimator: rloo}}
    samples: {{every: 1, count: 2}}
    trainer:
      args: {{per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 4, max_steps: 2,
             logging_steps: 1, gradient_checkpointing: false, report_to: [wandb, tensorboard]}}
"""
SINGLE = """
name: single
type: sft
model: {type: scratch, vocabulary: running_sums}
data: {type: running_sums, size: 8}
"""
STAGES = ("sft", "ppo")


def load(folder: Path, text: str, *overrides: str) -> Recipe:
    """The recipe, with its runs in `folder`."""
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, [f"runs_dir={folder / 'runs'}", *overrides])


@pytest.fixture(scope="module", autouse=True)
def offline() -> Iterator[None]:
    """wandb writes its runs to disk alone; it reads its environment once, when it starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name in VARIABLES:
            patch.delenv(name, raising=False)
        for name, value in {**SECRETS, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
            patch.setenv(name, value)
        wandb.teardown()
        yield
        wandb.teardown()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, offline: None) -> Recipe:
    """A recipe of two tracked stages that has been run."""
    recipe = load(tmp_path_factory.mktemp("tracked"), PIPELINE)
    run_pipeline(recipe)
    return recipe


class WandbRun:
    """What the offline run of a stage holds."""

    def __init__(self, folder: Path) -> None:
        (self.file,) = folder.glob("wandb/offline-run-*/*.wandb")  # one run, and no other
        records = list(_records(self.file.read_bytes()))
        (self.run,) = (record.run for record in records if record.HasField("run") and record.run.project)
        self.exit_codes = [record.exit.exit_code for record in records if record.HasField("exit")]
        self.history: list[dict[str, Any]] = []
        for record in records:
            if record.HasField("history"):
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                self.history.append({key: json.loads(value) for key, value in items.items()})
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}


def _records(content: bytes) -> Iterator[Record]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    block, at, whole = 32768, 7, b""
    while at + 7 <= len(content):
        if block - at % block < 7:  # no room for a header: the rest of a block is padding
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        whole += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # full, or the last part
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def tracker_name(name: str) -> str:
    """What transformers calls a number in its trackers."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def numbers(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The steps and values of every number of `metrics.jsonl`, under its tracker's name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for line in read_metrics(folder):
        for name, value in line.items():
            if name not in {"step", "time", *OF_THE_END} and value is not None:
                found.setdefault(tracker_name(name), []).append((line["step"], value))
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_a_finished_wandb_run_in_its_own_folder(recipe: Recipe, stage: str) -> None:
    tracked_run = WandbRun(recipe.stage_folder(stage))
    run = tracked_run.run
    assert (run.project, run.run_group, run.display_name) == ("rlhf_kit", "tiny", f"tiny/{stage}")
    assert tracked_run.exit_codes == [0]
    assert tracked_run.config["stage"]["type"] == stage
    assert wandb.run is None


@pytest.mark.parametrize("stage", STAGES)
def test_wandb_has_the_numbers_of_the_run_folder(recipe: Recipe, stage: str) -> None:
    expected = numbers(recipe.stage_folder(stage))
    assert {"train/loss", "eval/accuracy"} < expected.keys()
    assert stage != "ppo" or "train/rewards/verifier/mean" in expected
    history = WandbRun(recipe.stage_folder(stage)).history
    for name, values in expected.items():
        logged = [(entry["train/global_step"], entry[name]) for entry in history if name in entry]
        assert logged == [(step, pytest.approx(value)) for step, value in values], name


@pytest.mark.parametrize("stage", STAGES)
def test_tensorboard_has_the_numbers_of_the_run_folder(recipe: Recipe, stage: str) -> None:
    events = EventAccumulator(str(recipe.stage_folder(stage) / "tensorboard"))
    events.Reload()
    for name, values in numbers(recipe.stage_folder(stage)).items():
        logged = [(event.step, event.value) for event in events.Scalars(name)]
        assert logged == [(step, pytest.approx(value, rel=1e-5)) for step, value in values], name  # it keeps float32


def test_tensorboard_events_lie_nowhere_else(recipe: Recipe) -> None:
    folders = {file.parent for file in recipe.run_folder.rglob("events.out.tfevents*")}
    assert folders == {recipe.stage_folder(stage) / "tensorboard" for stage in STAGES}
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ


def test_wandb_shows_the_heat_map_of_every_rollout_with_samples(recipe: Recipe, parse: type) -> None:
    folder = recipe.stage_folder("ppo")
    run = WandbRun(folder)
    shown = [entry["samples/path"] for entry in run.history if entry.get("samples/_type") == "html-file"]
    samples = read_samples(folder)
    assert len(shown) == len(samples) > 0
    for path, rows in zip(shown, samples.values(), strict=True):
        page = parse((run.file.parent / "files" / path).read_text(encoding="utf-8"))
        assert len(page.tokens()) == sum(len(row["tokens"]) for row in rows)


def test_no_file_of_the_run_holds_a_secret_of_the_environment(recipe: Recipe) -> None:
    files = [path for path in recipe.run_folder.rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    assert [path for path in files for secret in SECRETS.values() if secret.encode() in path.read_bytes()] == []


def test_a_stage_that_raises_ends_its_run_as_failed(tmp_path: Path) -> None:
    recipe = load(tmp_path, PIPELINE)
    with pytest.raises(KeyboardInterrupt), tracked(recipe, "sft", recipe.stages["sft"], tmp_path / "sft"):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / "sft" / "tensorboard")
        raise KeyboardInterrupt
    assert wandb.run is None and "TENSORBOARD_LOGGING_DIR" not in os.environ
    with tracked(recipe, "ppo", recipe.stages["ppo"], tmp_path / "ppo"):
        pass
    wandb.teardown()  # its own process has then written how the runs ended
    assert WandbRun(tmp_path / "sft").exit_codes == [1]
    assert WandbRun(tmp_path / "ppo").exit_codes == [0]


def test_the_environment_names_project_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(tmp_path, SINGLE, "trainer.args.report_to=all")
    (tmp_path / "mine").mkdir()
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "mine"))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "events")
    with tracked(recipe, "sft", recipe.stages["sft"], tmp_path / "stage"):
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == "events"
    assert os.environ["TENSORBOARD_LOGGING_DIR"] == "events"
    assert list((tmp_path / "stage").glob("wandb")) == []
    run = WandbRun(tmp_path / "mine").run
    assert (run.project, run.run_group, run.display_name) == ("mine", "single", "single")


def test_a_run_that_the_caller_opened_is_used_and_left_open(tmp_path: Path) -> None:
    recipe = load(tmp_path, PIPELINE)
    with wandb.init(dir=str(tmp_path)) as run:
        with tracked(recipe, "ppo", recipe.stages["ppo"], tmp_path / "ppo"):
            assert wandb.run is run
        assert wandb.run is run
    assert not (tmp_path / "ppo" / "wandb").exists()


def test_a_run_that_cannot_be_opened_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load(tmp_path, SINGLE, "trainer.args.report_to=wandb")
    monkeypatch.setenv("WANDB_PROJECT", "no/project")
    with (
        pytest.raises(RunError, match="WANDB_MODE=offline"),
        tracked(recipe, "sft", recipe.stages["sft"], tmp_path / "stage"),
    ):
        pytest.fail("the stage was begun")


@pytest.mark.parametrize("report_to", [None, "none", "[]", "[tensorboard]"])
def test_wandb_is_imported_only_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report_to: str | None
) -> None:
    recipe = load(tmp_path, SINGLE, *([] if report_to is None else [f"trainer.args.report_to={report_to}"]))
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises
    with tracked(recipe, "sft", recipe.stages["sft"], tmp_path / "stage"):
        assert ("TENSORBOARD_LOGGING_DIR" in os.environ) == (report_to == "[tensorboard]")
