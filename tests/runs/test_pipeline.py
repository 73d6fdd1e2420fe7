"""A recipe is run stage by stage: what a run folder holds, what is not repeated, and whose folder it is."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kit.errors import RunError
from rlhf_kit.recipe import Recipe, load_recipe
from rlhf_kit.runs import pipeline
from rlhf_kit.runs.callbacks import ProgressCallback
from rlhf_kit.runs.manifest import read_manifest, write_manifest
from rlhf_kit.runs.metrics import read_metrics, read_samples
from rlhf_kit.runs.pipeline import run_pipeline

torch.set_num_threads(1)

UPDATES, SAVE_STEPS = 5, 2

PIPELINE = f"""
name: tiny
seed: 3
stages:
  sft:
    type: sft
    model: {{type: scratch, vocabulary: running_sums, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
            num_attention_heads: 2, max_position_embeddings: 32}}
    data: {{type: running_sums, size: 40, terms: 2, modulus: 5}}
    trainer:
      args: {{per_device_train_batch_size: 8, max_steps: 8, learning_rate: 1e-2, logging_steps: 1,
             gradient_checkpointing: false}}
  ppo:
    type: ppo
    model: {{path: "${{stages.sft.model}}"}}
    data: {{type: running_sums, size: 40, terms: 2, modulus: 5}}
    eval_data: {{type: running_sums, size: 8, terms: 2, modulus: 5, seed: 1}}
    evaluation: {{verifier: exact, max_new_tokens: 4, batch_size: 8}}
    rewards:
      - {{type: verifier, verifier: exact}}
      - {{type: function, function: watched, weight: 0.5}}
    credit: {{estimator: rloo}}
    samples: {{every: 1, count: 2}}
    trainer:
      args: {{per_device_train_batch_size: 8, num_generations: 4, max_completion_length: 4, max_steps: {UPDATES},
             learning_rate: 1e-2, logging_steps: 1, save_strategy: steps, save_steps: {SAVE_STEPS},
             gradient_checkpointing: false}}
"""

SINGLE = """
name: single
type: sft
model: {type: scratch, vocabulary: running_sums, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
        num_attention_heads: 2}
data: {type: running_sums, size: 8, terms: 2}
trainer: {args: {per_device_train_batch_size: 8, max_steps: 1, logging_steps: 1, gradient_checkpointing: false}}
"""


def load(folder: Path, text: str = PIPELINE, *overrides: str) -> Recipe:
    """The recipe, with its runs in `folder`."""
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_recipe(file, [f"runs_dir={folder / 'runs'}", *overrides])


def even(completions: list[str], **_: Any) -> list[float]:
    """The share of even numbers: an untrained policy has some of it."""
    numbers = [[word for word in completion.split() if word.isdecimal()] for completion in completions]
    return [sum(int(word) % 2 == 0 for word in words) / max(len(words), 1) for words in numbers]


def dying(at: int) -> Callable[..., list[float]]:
    """The same reward until the rollout after `at` updates, where the run is interrupted."""

    def watched(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        if trainer_state.global_step >= at:
            raise KeyboardInterrupt
        return even(completions)

    return watched


def untouchable(**_: Any) -> list[float]:
    raise AssertionError("a rollout was scored")


def run(recipe: Recipe, watched: Callable[..., list[float]] = even) -> dict[str, Any]:
    return run_pipeline(recipe, {"watched": watched})


def interrupted(folder: Path, at: int) -> Recipe:
    """A recipe whose run was interrupted in `ppo` after `at` updates."""
    recipe = load(folder)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, dying(at))
    return recipe


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    """When every file but the lock was written, and what it holds."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "ppo" / "model" / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def updates_logged(folder: Path) -> list[int]:
    """The steps of the lines of `ppo` that are logs of updates."""
    return [line["step"] for line in read_metrics(folder / "ppo") if "reward" in line]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    """A run that nothing interrupted, and what it returned; tests that change it take a `copy`."""
    recipe = load(tmp_path_factory.mktemp("finished"))
    return recipe, run(recipe)


@pytest.fixture
def copy(finished: tuple[Recipe, dict[str, Any]], tmp_path: Path) -> Recipe:
    """The finished run in a place of its own, by a recipe that differs in nothing but that."""
    recipe = load(tmp_path)
    shutil.copytree(finished[0].run_folder, recipe.run_folder)
    (recipe.run_folder / "recipe.resolved.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return recipe


# --- what a run leaves ---


def test_the_resolved_recipe_makes_the_same_run(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, _ = finished
    assert load_recipe(recipe.run_folder / "recipe.resolved.yaml") == recipe


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_each_stage_leaves_a_model_that_loads_anywhere(finished: tuple[Recipe, dict[str, Any]], stage: str) -> None:
    folder = finished[0].run_folder / stage / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.hidden_size == 16
    assert tokenizer.decode(tokenizer("1 2 =")["input_ids"]) == "1 2 ="


def test_the_later_stage_starts_from_the_earlier_and_learns(finished: tuple[Recipe, dict[str, Any]]) -> None:
    folder = finished[0].run_folder
    before, after = load_file(folder / "sft" / "model" / "model.safetensors"), weights(folder)
    distances = [(after[name] - before[name]).abs().max().item() for name in before]
    # Adam moves a weight by at most about its learning rate in an update; weights made anew would be further away.
    assert 0 < max(distances) < 1.5 * UPDATES * 1e-2


def test_each_stage_leaves_its_result_and_the_metrics_of_every_step(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, results = finished
    folder = recipe.run_folder
    assert list(results) == ["sft", "ppo"]
    assert {name: json.loads((folder / name / "result.json").read_text()) for name in results} == results
    assert (results["sft"]["updates"], results["ppo"]["updates"]) == (8, UPDATES)
    assert [line["step"] for line in read_metrics(folder / "sft") if "loss" in line] == list(range(1, 9))
    assert updates_logged(folder) == list(range(1, UPDATES + 1))
    evaluated = {
        line["step"]: line["eval_accuracy"] for line in read_metrics(folder / "ppo") if "eval_accuracy" in line
    }
    assert evaluated == {0: results["ppo"]["eval_accuracy_start"], UPDATES: results["ppo"]["eval_accuracy"]}


def test_samples_are_kept_with_the_credit_of_every_token(finished: tuple[Recipe, dict[str, Any]]) -> None:
    samples = read_samples(finished[0].run_folder / "ppo")
    assert len(samples) == UPDATES
    for row in (row for rows in samples.values() for row in rows):
        assert len(row["tokens"]) == len(row["advantages"]) == len(row["rewards"]["verifier"])
        assert row["rewards"]["watched"][-1] == pytest.approx(even([row["completion"]])[0])


def test_the_manifest_tells_what_the_run_was_made_of(finished: tuple[Recipe, dict[str, Any]]) -> None:
    folder = finished[0].run_folder
    manifest = read_manifest(folder)
    assert (manifest["name"], manifest["world_size"]) == ("tiny", 1)
    assert manifest["created"] < manifest["finished"]
    assert manifest["versions"]["torch"] == torch.__version__
    files = sorted(path for path in (folder / "sft" / "model").iterdir() if path.suffix in (".json", ".safetensors"))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in files}
    sft_model = b"".join(path.read_bytes() for path in files)
    assert manifest["stages"] == {
        "sft": {"parents": [], "inputs": {}},
        "ppo": {"parents": ["sft"], "inputs": {"model.path": f"sha256:{hashlib.sha256(sft_model).hexdigest()}"}},
    }


def test_the_report_shows_both_stages(finished: tuple[Recipe, dict[str, Any]], parse: Any) -> None:
    page = parse((finished[0].run_folder / "report.html").read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.elements].count("h2") >= 2
    assert ("li", {"class": "status finished"}) in page.elements
    assert page.tokens()


def test_a_single_stage_writes_into_the_run_folder_itself(tmp_path: Path) -> None:
    recipe = load(tmp_path, SINGLE)
    results = run_pipeline(recipe)
    assert results["sft"]["updates"] == 1
    names = {path.name for path in recipe.run_folder.iterdir()}
    assert {"recipe.resolved.yaml", "manifest.json", "metrics.jsonl", "result.json", "model", "report.html"} <= names
    assert "sft" not in names and not [name for name in names if name.endswith(".partial")]


# --- the same command again ---


def test_a_run_that_is_done_is_left_as_it_is(finished: tuple[Recipe, dict[str, Any]]) -> None:
    recipe, results = finished
    before = files(recipe.run_folder)
    assert run(recipe, untouchable) == results
    assert files(recipe.run_folder) == before


def test_a_report_that_was_removed_is_written_again_and_nothing_else(copy: Recipe) -> None:
    before = files(copy.run_folder)
    (copy.run_folder / "report.html").unlink()
    run(copy, untouchable)
    after = files(copy.run_folder)
    assert "report.html" in after
    assert {name: file for name, file in after.items() if name != "report.html"} == {
        name: file for name, file in before.items() if name != "report.html"
    }


def test_other_processes_than_the_first_write_nothing(
    finished: tuple[Recipe, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, results = finished
    before = files(recipe.run_folder)
    monkeypatch.setenv("RANK", "1")
    assert run(recipe, untouchable) == results
    assert files(recipe.run_folder) == before


@pytest.mark.parametrize("at", [1, 3, 4])
def test_an_interrupted_run_goes_on_and_ends_as_one_that_was_not(
    at: int, finished: tuple[Recipe, dict[str, Any]], tmp_path: Path, parse: Any
) -> None:
    whole, results = finished[0].run_folder, finished[1]
    recipe = interrupted(tmp_path, at)
    folder = recipe.run_folder
    assert not (folder / "ppo" / "result.json").exists() and "finished" not in read_manifest(folder)
    report = parse((folder / "report.html").read_text(encoding="utf-8"))
    assert ("li", {"class": "status interrupted"}) in report.elements
    sft = files(folder / "sft")

    scored_at = []

    def counted(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        scored_at.append(trainer_state.global_step)
        return even(completions)

    again = run(recipe, counted)
    assert scored_at == list(range(at // SAVE_STEPS * SAVE_STEPS, UPDATES))  # from the last checkpoint on
    assert files(folder / "sft") == sft
    assert same(weights(folder), weights(whole))
    assert {**again["ppo"], "minutes": 0} == {**results["ppo"], "minutes": 0}
    assert updates_logged(folder) == list(range(1, UPDATES + 1))
    assert read_samples(folder / "ppo") == read_samples(whole / "ppo")
    assert "finished" in read_manifest(folder)


def test_an_attempt_without_a_checkpoint_leaves_no_lines_behind(tmp_path: Path) -> None:
    recipe = interrupted(tmp_path, 1)
    lines = read_metrics(recipe.run_folder / "ppo")
    assert [line["step"] for line in lines if "reward" in line] == [1]
    with pytest.raises(KeyboardInterrupt):
        run(recipe, dying(1))
    again = read_metrics(recipe.run_folder / "ppo")
    assert [line["step"] for line in again] == [line["step"] for line in lines]
    assert all(after["time"] > before["time"] for before, after in zip(lines, again, strict=True))


def test_a_stage_stopped_between_its_last_update_and_its_result_takes_no_more_updates(
    copy: Recipe, finished: tuple[Recipe, dict[str, Any]]
) -> None:
    (copy.run_folder / "ppo" / "result.json").unlink()
    shutil.rmtree(copy.run_folder / "ppo" / "model")
    results = run(copy, untouchable)
    assert {**results["ppo"], "minutes": 0} == {**finished[1]["ppo"], "minutes": 0}
    assert same(weights(copy.run_folder), weights(finished[0].run_folder))
    assert updates_logged(copy.run_folder) == list(range(1, UPDATES + 1))
    evaluated = [line["step"] for line in read_metrics(copy.run_folder / "ppo") if "eval_accuracy" in line]
    assert len(evaluated) == len(set(evaluated))


# --- whose folder it is ---


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("stages.ppo.trainer.args.learning_rate=1e-3", "stages.ppo.trainer.args.learning_rate"),
        ("stages.ppo.rewards.1.weight=2", "stages.ppo.rewards.1.weight"),
        ("~stages.ppo.rewards.1", "stages.ppo.rewards"),
        ("stages.sft.trainer.args.weight_decay=0.1", "stages.sft.trainer.args.weight_decay"),
    ],
)
def test_another_recipe_in_the_folder_is_refused_by_the_field_that_differs(
    copy: Recipe, tmp_path: Path, override: str, field: str
) -> None:
    before = files(copy.run_folder)
    with pytest.raises(RunError) as caught:
        run(load(tmp_path, PIPELINE, override), untouchable)
    assert f"holds a run of another recipe (differs in {field});" in str(caught.value)
    assert str(copy.run_folder) in str(caught.value) and "name=..." in str(caught.value)
    assert files(copy.run_folder) == before


def test_of_many_fields_that_differ_the_first_are_named(copy: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"differs in stages(\.\w+)+(, stages(\.\w+)+){4}, \.\.\.\)"):
        run(load(tmp_path, PIPELINE, "stages.ppo.trainer.args={max_steps: 9, num_generations: 2}"), untouchable)


def test_a_folder_that_holds_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    recipe = load(tmp_path, SINGLE)
    recipe.run_folder.mkdir(parents=True)
    (recipe.run_folder / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is not empty and holds no run; give this run another name"):
        run_pipeline(recipe)
    assert {name: content for name, (_, content) in files(recipe.run_folder).items()} == {"notes.txt": b"mine"}


@pytest.mark.parametrize("left", [None, "recipe.resolved.partial"])
def test_an_empty_folder_or_one_in_which_the_recipe_was_being_written_is_taken(
    tmp_path: Path, left: str | None
) -> None:
    recipe = load(tmp_path, SINGLE)
    recipe.run_folder.mkdir(parents=True)
    if left:
        (recipe.run_folder / left).write_text("name: sin")
    assert run_pipeline(recipe)["sft"]["updates"] == 1
    assert load_recipe(recipe.run_folder / "recipe.resolved.yaml").run_folder == recipe.run_folder


def test_a_stage_that_has_begun_needs_as_many_processes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = interrupted(tmp_path, 3)
    before = files(recipe.run_folder)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RunError) as caught:
        run(recipe, untouchable)
    assert "stage 'ppo' was begun with 1 process (data parallel) and cannot go on with 2 processes" in str(caught.value)
    assert str(recipe.run_folder / "ppo" / "checkpoints") in str(caught.value)
    assert files(recipe.run_folder) == before


def test_a_stage_that_has_begun_needs_the_same_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = interrupted(tmp_path, 3)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(RunError, match=r"begun with 1 process \(data parallel\) and cannot .* 1 process \(ZeRO-2\)"):
        run(recipe, untouchable)


def test_between_stages_the_number_of_processes_may_change(tmp_path: Path) -> None:
    recipe = interrupted(tmp_path, 3)
    write_manifest(recipe.run_folder, world_size=2)  # as a run of two processes would have left it
    with pytest.raises(RunError, match=r"was begun with 2 processes .* and cannot go on with 1 process "):
        run(recipe, untouchable)
    shutil.rmtree(recipe.run_folder / "ppo" / "checkpoints")  # the remedy that the message names
    assert run(recipe)["ppo"]["updates"] == UPDATES
    assert read_manifest(recipe.run_folder)["world_size"] == 1


def test_a_finished_run_keeps_the_number_of_processes_that_it_was_made_with(copy: Recipe) -> None:
    write_manifest(copy.run_folder, world_size=2)  # as a run of two processes would have left it
    run(copy, untouchable)
    assert read_manifest(copy.run_folder)["world_size"] == 2


def test_an_interrupted_stage_takes_its_bar_off_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(pipeline, "ProgressCallback", partial(ProgressCallback, console=console))
    interrupted(tmp_path, 3)
    shown = console.file.getvalue()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert shown.count(hide) == shown.count(show) == 2  # of both stages


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_other_inputs_in_the_middle_of_a_stage_are_refused(name: str, tmp_path: Path) -> None:
    recipe = interrupted(tmp_path, 3)
    model = recipe.stage_folder("sft") / "model" / name
    before = model.read_bytes()
    model.write_bytes(before[:-4] + b"    ")
    with pytest.raises(RunError, match=r"stage 'ppo' was begun with other contents of model\.path"):
        run(recipe, untouchable)
    model.write_bytes(before)  # the remedy that the message names
    assert run(recipe)["ppo"]["updates"] == UPDATES


def test_a_second_launch_into_the_folder_is_refused_and_a_crash_leaves_no_lock(tmp_path: Path) -> None:
    recipe = load(tmp_path, SINGLE)
    holder = (
        "import sys, time\nfrom rlhf_kit.recipe import load_recipe\nfrom rlhf_kit.runs.folder import opened\n"
        "with opened(load_recipe(sys.argv[1], sys.argv[2:])):\n    print('open', flush=True)\n    time.sleep(600)"
    )
    command = [sys.executable, "-c", holder, str(tmp_path / "recipe.yaml"), f"runs_dir={tmp_path / 'runs'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as first:
        assert first.stdout is not None and first.stdout.readline() == "open\n"
        with pytest.raises(RunError, match=rf"is in use by process {first.pid} on "):
            run_pipeline(recipe)
        first.kill()
    assert run_pipeline(recipe)["sft"]["updates"] == 1


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("model.safetensors", "cut"),
        ("optimizer.pt", "cut"),
        ("kit/progress-0.pt", "cut"),
        ("trainer_state.json", "cut"),
        ("optimizer.pt", "gone"),
        ("trainer_state.json", "gone"),  # it is written last: without it, anything else may be missing
    ],
)
def test_a_broken_newest_checkpoint_falls_back_to_the_one_before(
    name: str, damage: str, finished: tuple[Recipe, dict[str, Any]], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = interrupted(tmp_path, 4)
    checkpoints = recipe.stage_folder("ppo") / "checkpoints"
    newest, before = (checkpoints / f"checkpoint-{step}" for step in (4, 2))
    assert newest.is_dir() and before.is_dir()
    file = newest / name
    content = file.read_bytes()
    file.unlink() if damage == "gone" else file.write_bytes(content[: len(content) // 2])

    scored_at = []

    def counted(completions: list[str], trainer_state: Any, **_: Any) -> list[float]:
        scored_at.append(trainer_state.global_step)
        return even(completions)

    run(recipe, counted)
    assert scored_at == [2, 3, 4]
    assert "checkpoint-4 is not whole" in caplog.text and "going on from checkpoint-2" in caplog.text
    assert same(weights(recipe.run_folder), weights(finished[0].run_folder))


# --- secrets ---


@pytest.mark.parametrize(
    ("field", "secret"),
    [("hub_token", "s3cretOfTheHub"), ("run_name", "hf_" + "a1B2" * 8), ("run_name", "hub_token=s3cretOfTheHub")],
)
def test_no_secret_is_written_into_the_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, secret: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlhf-kit", "train", "recipe.yaml", f"trainer.args.{field}={secret}"])
    recipe = with_argument(load(tmp_path, SINGLE), field, secret)
    run_pipeline(recipe)
    hidden = secret.removeprefix("hub_token=").encode()
    assert [name for name, (_, content) in files(recipe.run_folder).items() if hidden in content] == []
    written = yaml.safe_load((recipe.run_folder / "recipe.resolved.yaml").read_text())
    assert "<redacted>" in written["trainer"]["args"][field]
    assert written["trainer"]["args"]["max_steps"] == 1
    assert "<redacted>" in read_manifest(recipe.run_folder)["command"]


def test_a_run_goes_on_with_a_new_secret(tmp_path: Path) -> None:
    recipe = load(tmp_path, SINGLE)
    results = run_pipeline(with_argument(recipe, "hub_token", "s3cretOfTheHub"))
    assert run_pipeline(with_argument(recipe, "hub_token", "theNextOne")) == results


def with_argument(recipe: Recipe, field: str, value: str) -> Recipe:
    """The recipe as Python code would make it: a file with a secret in `trainer.args` is refused when it is loaded."""
    stage = recipe.stages["sft"].model_dump()
    stage["trainer"]["args"][field] = value
    return Recipe.model_validate({**recipe.model_dump(), "stages": {"sft": stage}})


# --- what is printed ---


def test_the_results_and_the_place_of_the_report_are_printed(
    finished: tuple[Recipe, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "60")  # a narrow terminal must not break the path in two
    recipe, results = finished
    run(recipe, untouchable)
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert next(row for row in rows if row[:1] == ["sft"])[:2] == ["sft", "8"]
    accuracies = [f"{results['ppo'][key]:.3f}" for key in ("eval_accuracy_start", "eval_accuracy")]
    assert ["ppo", str(UPDATES), *accuracies] == next(row for row in rows if row[:1] == ["ppo"])[:4]
    assert lines[-1] == f"report: {recipe.run_folder / 'report.html'}"
