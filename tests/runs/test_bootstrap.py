"""Rounds of pairs and DPO: killed anywhere they go on to the same models, and repeat what a change touches alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from rlhf_kit.errors import RunError
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_tokenizer
from rlhf_kit.pairs.files import read_rows
from rlhf_kit.problems import RecipeError
from rlhf_kit.recipe import load_recipe
from rlhf_kit.runs.bootstrap import _copy, should_stop
from rlhf_kit.runs.folder import opened
from rlhf_kit.runs.manifest import read_manifest, write_manifest
from rlhf_kit.runs.pipeline import run_pipeline
from rlhf_kit.trainers.config import Bootstrap, Stop

from ..distributed.conftest import launch
from ..sums import save_policy_of_sums

SUMS = {"type": "running_sums", "terms": 2, "modulus": 5}
ARGS = {
    "per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-2, "max_length": 32, "logging_steps": 1,
    "gradient_checkpointing": False, "save_strategy": "steps", "save_steps": 1,
}  # fmt: skip

BY_VERIFIER = {
    "data": {**SUMS, "size": 8},
    "generation": {"num_generations": 4, "max_new_tokens": 5},
    "rewards": [{"type": "verifier", "verifier": "exact"}],
    "select": {"type": "best_worst"},
}


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the model that the first round's implicit reward is compared with."""
    folder = tmp_path_factory.mktemp("older")
    save_policy_of_sums(folder, modulus=5, terms=2, updates=3)
    return str(folder)


@pytest.fixture
def recipe(tmp_path: Path, older: str) -> Callable[..., Path]:
    """A file with two rounds from a model that has seen a little of the task; keyword arguments change the rounds."""

    def write(name: str = "run", **fields: Any) -> Path:
        scratch = {"type": "scratch", "vocabulary": [*map(str, range(5)), "="], "hidden_size": 16}
        sizes = {"intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        args = {
            "per_device_train_batch_size": 20,
            "max_steps": 12,
            "learning_rate": 1e-2,
            "gradient_checkpointing": False,
        }
        sft = {
            "type": "sft",
            "model": {**scratch, **sizes},
            "data": {**SUMS, "size": 60, "seed": 9},
            "trainer": {"args": args},
        }
        old = tmp_path / "old.jsonl"
        pairs = [{"prompt": f"{k} 1 =", "chosen": "1 2", "rejected": "4"} for k in range(4)]
        if not old.exists():
            old.write_text("\n".join(map(json.dumps, pairs)))
        rounds = {
            "type": "bootstrap",
            "model": {"path": "${stages.sft.model}"},
            "reference": older,
            "rounds": 2,
            "pairs": {
                "data": {**SUMS, "size": 8},
                "generation": {"num_generations": 4, "max_new_tokens": 5, "prompts_at_once": 4},
                "rewards": [{"type": "verifier", "verifier": "exact"}, {"type": "dpo_implicit", "weight": 0.1}],
                "select": {"type": "best_worst", "truncated": "keep"},
            },
            "replay": {"data": {"type": "jsonl", "path": str(old)}, "share": 0.3},
            "preference": {"objective": {"type": "dpo"}, "trainer": {"args": ARGS}},
            "evaluation": {"data": {**SUMS, "size": 12, "seed": 3}, "verifier": "exact", "max_new_tokens": 5},
        }
        file = tmp_path / f"{name}.yaml"
        behind = fields.pop("behind", {})
        stages = {"sft": sft, "dice": {**rounds, **fields}, **behind}
        file.write_text(json.dumps({"name": name, "runs_dir": str(tmp_path / "runs"), "stages": stages}))
        return file

    return write


def weights(run: Path, number: int = 2) -> dict[str, Any]:
    return load_file(run / "dice" / f"round-{number}" / "preference" / "model" / "model.safetensors")


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def done_at(run: Path) -> dict[str, int]:
    """When each step was done."""
    folder = run / "dice"
    return {str(p.parent.relative_to(folder)): p.stat().st_mtime_ns for p in folder.glob("round-*/*/result.json")}


def made_at(run: Path) -> dict[str, int]:
    """When the model of each stage was made."""
    return {path.parent.name: path.stat().st_mtime_ns for path in run.glob("*/model") if "." not in path.parent.name}


def test_each_round_goes_on_from_the_one_before(recipe, older, tmp_path) -> None:
    results = run_pipeline(load_recipe(recipe(), ["seed=3"]))["dice"]
    run = tmp_path / "runs" / "run"
    first, second = (json.loads((run / "dice" / f"round-{n}" / "preference" / "step.json").read_text()) for n in (1, 2))
    assert first["settings"]["model"]["path"] == str(run / "sft" / "model")
    assert second["settings"]["model"]["path"] == str(run / "dice" / "round-1" / "preference" / "model")
    pairs = [json.loads((run / "dice" / f"round-{n}" / "pairs" / "step.json").read_text())["settings"] for n in (1, 2)]
    assert [step["rewards"][1]["reference"] for step in pairs] == [older, str(run / "sft" / "model")]
    assert [step["round"] for step in pairs] == [1, 2]
    stage = load_recipe(recipe()).stages["dice"]
    replayed = [stage.preference_of(n, Path("f"), 3).data.seed for n in (1, 2)]
    assert [step["settings"]["data"]["seed"] for step in (first, second)] == replayed
    assert not same(weights(run, 1), weights(run, 2))
    assert same(load_file(run / "dice" / "model" / "model.safetensors"), weights(run))
    assert [row["round"] for row in results["rounds"]] == [1, 2] and results["updates"] == 4
    assert results["eval_accuracy"] == results["rounds"][-1]["eval_accuracy"]
    assert "round-2 preference" in (run / "report.html").read_text()
    before = done_at(run)
    assert run_pipeline(load_recipe(recipe(), ["seed=3"]))["dice"]["rounds"] == results["rounds"]
    assert done_at(run) == before and len(before) == 7


def test_no_two_rounds_of_any_seeds_replay_by_one_seed(recipe) -> None:
    stage = load_recipe(recipe()).stages["dice"]
    seeds = [stage.preference_of(number, Path("f"), seed).data.seed for number in range(1, 9) for seed in range(8)]
    assert len(set(seeds)) == 64


def test_a_change_repeats_what_depends_on_it_and_puts_the_old_aside(recipe, tmp_path) -> None:
    run = tmp_path / "runs" / "run"
    run_pipeline(load_recipe(recipe()))
    before, old = done_at(run), weights(run, 1)
    args = {**ARGS, "learning_rate": 1e-3}
    run_pipeline(load_recipe(recipe(preference={"objective": {"type": "dpo"}, "trainer": {"args": args}})))
    after = done_at(run)
    kept = {"round-0/evaluation", "round-1/pairs"}
    assert {step for step in after if after[step] == before.get(step)} == kept
    assert not same(weights(run, 1), old)
    aside = run / "dice" / "round-1" / "preference.superseded-1" / "model" / "model.safetensors"
    assert same(load_file(aside), old)

    run_pipeline(load_recipe(recipe("fresh", preference={"objective": {"type": "dpo"}, "trainer": {"args": args}})))
    assert same(weights(tmp_path / "runs" / "fresh"), weights(run))


def test_a_changed_file_repeats_what_read_it(recipe, tmp_path) -> None:
    run = tmp_path / "runs" / "run"
    run_pipeline(load_recipe(recipe()))
    before = done_at(run)
    old = tmp_path / "old.jsonl"
    old.write_text(old.read_text().replace("1 2", "3 3"))
    run_pipeline(load_recipe(recipe()))
    after = done_at(run)
    assert {step for step in before if after.get(step) == before[step]} == {"round-0/evaluation", "round-1/pairs"}


def test_a_later_stage_is_made_anew_where_the_kept_model_has_changed(recipe, tmp_path) -> None:
    run = tmp_path / "runs" / "run"
    behind = {
        "second": {
            "type": "preference",
            "model": {"path": "${stages.dice.model}"},
            "objective": {"type": "dpo"},
            "data": {"type": "jsonl", "path": str(tmp_path / "old.jsonl")},
            "trainer": {"args": {**ARGS, "max_steps": 1}},
        },
        "third": {"type": "sft", "model": {"path": "${stages.second.model}"}, "data": {**SUMS, "size": 4}},
        "beside": {"type": "sft", "model": {"path": "${stages.sft.model}"}, "data": {**SUMS, "size": 4}},
    }
    for name in ("third", "beside"):
        behind[name]["trainer"] = {"args": {"max_steps": 1, "gradient_checkpointing": False}}
    rounds = {"rounds": 1, "evaluation": None, "behind": behind}
    run_pipeline(load_recipe(recipe(**rounds)))
    before = made_at(run)
    assert before.keys() == {"sft", "dice", "second", "third", "beside"}
    finished = read_manifest(run)["finished"]
    assert run_pipeline(load_recipe(recipe(**rounds))).keys() == before.keys()
    assert made_at(run) == before and read_manifest(run)["finished"] == finished

    args = {**ARGS, "learning_rate": 1e-3}
    rounds["preference"] = {"objective": {"type": "dpo"}, "trainer": {"args": args}}
    run_pipeline(load_recipe(recipe(**rounds)))
    after = made_at(run)
    assert {name for name in before if after[name] == before[name]} == {"sft", "beside"}
    assert {path.name for path in run.glob("*.superseded-*")} == {"second.superseded-1", "third.superseded-1"}
    assert read_manifest(run)["finished"] > finished
    run_pipeline(load_recipe(recipe("fresh", **rounds)))
    for name in ("second", "third"):
        model = Path(name) / "model" / "model.safetensors"
        assert same(load_file(run / model), load_file(tmp_path / "runs" / "fresh" / model))


KILLED = """
import os, signal, sys
from rlhf_kit.recipe import load_recipe
from rlhf_kit.runs import pipeline
import rlhf_kit.pairs.stage as stage
import rlhf_kit.runs.bootstrap as bootstrap
from rlhf_kit.trainers import setup
where, number = sys.argv[2], int(sys.argv[3])
calls = []
def dying(function):
    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
if where == "chunk":
    stage.write_rows = dying(stage.write_rows)
elif where == "step":
    bootstrap._begin = dying(bootstrap._begin)
elif where == "copy":
    bootstrap._copy = dying(bootstrap._copy)
else:
    from transformers import Trainer
    Trainer._save_checkpoint = dying(Trainer._save_checkpoint)
pipeline.run_pipeline(load_recipe(sys.argv[1]))
"""


def test_killed_anywhere_it_goes_on_to_the_same_models(recipe, tmp_path) -> None:
    runs = tmp_path / "runs"
    run_pipeline(load_recipe(recipe("whole")))
    file = recipe("killed")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for where, number in (("chunk", 2), ("checkpoint", 2), ("copy", 1)):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(file), where, str(number)], env=environment, check=False
        )
        assert done.returncode == -signal.SIGKILL, where
    results = run_pipeline(load_recipe(file))["dice"]
    assert same(weights(runs / "killed"), weights(runs / "whole"))
    whole = json.loads((runs / "whole" / "dice" / "result.json").read_text())
    assert results["rounds"] == whole["rounds"]
    first, second = (
        read_rows(runs / name / "dice" / "round-1" / "pairs" / "completions.parquet") for name in ("killed", "whole")
    )
    assert first == second
    assert not list((runs / "killed").rglob("*.superseded-*"))


def test_the_rule_that_stops() -> None:
    stop = Stop(patience=2, min_delta=0.1)
    assert not should_stop([0.5, 0.4], stop)
    assert should_stop([0.5, 0.4, 0.6], stop) and not should_stop([0.5, 0.4, 0.61], stop)
    assert should_stop([0.1, 0.5, 0.5, 0.6], stop)


def test_a_bootstrap_that_does_not_rise_stops_and_keeps_the_best(recipe, tmp_path) -> None:
    args = {**ARGS, "learning_rate": 0.0}
    fields = {"stop": {"patience": 1}, "keep": "best", "rounds": 5}
    results = run_pipeline(
        load_recipe(recipe(**fields, preference={"objective": {"type": "dpo"}, "trainer": {"args": args}}))
    )["dice"]
    assert len(results["rounds"]) == 1 and results["kept_round"] == 0
    run = tmp_path / "runs" / "run"
    assert same(
        load_file(run / "dice" / "model" / "model.safetensors"), load_file(run / "sft" / "model" / "model.safetensors")
    )


@pytest.fixture
def hub(older, tmp_path, monkeypatch) -> str:
    """The id of a model on the hub, in the cache alone: its revision `v1` is `older`, `main` has other weights."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    folder = tmp_path / "hub" / "models--owner--start"
    (folder / "refs").mkdir(parents=True)
    for revision, updates in (("v1", None), ("main", 6)):
        commit = revision.encode().hex().ljust(40, "0")
        (folder / "refs" / revision).write_text(commit)
        snapshot = folder / "snapshots" / commit
        if updates is None:
            shutil.copytree(older, snapshot)
        else:
            snapshot.mkdir()
            save_policy_of_sums(snapshot, modulus=5, terms=2, updates=updates)
    return "owner/start"


def test_a_revision_on_the_hub_is_compared_with_and_kept(recipe, hub, older, tmp_path) -> None:
    before = tmp_path / "before"
    save_policy_of_sums(before, modulus=5, terms=2, updates=1)
    args = {**ARGS, "learning_rate": 0.0}
    fields = {
        "model": {"path": hub, "revision": "v1"},
        "reference": str(before),
        "keep": "best",
        "preference": {"objective": {"type": "dpo"}, "trainer": {"args": args}},
        "behind": {"next": {"type": "sft", "model": {"path": "${stages.dice.model}"}, "data": {**SUMS, "size": 4}}},
    }
    fields["behind"]["next"]["trainer"] = {"args": {"max_steps": 1, "gradient_checkpointing": False}}
    results = run_pipeline(load_recipe(recipe(**fields)))
    run, right = tmp_path / "runs" / "run", load_file(Path(older) / "model.safetensors")
    (newest,) = (tmp_path / "hub").glob(f"*/snapshots/{b'main'.hex()}*/model.safetensors")
    assert not same(load_file(newest), right)
    assert results["dice"]["kept_round"] == 0 and "next" in results
    assert same(load_file(run / "dice" / "model" / "model.safetensors"), right)
    settings = json.loads((run / "dice" / "round-2" / "pairs" / "step.json").read_text())["settings"]
    compared = Path(settings["rewards"][1]["reference"])
    assert compared == run / "dice" / "round-0" / "start" / "model"
    assert same(load_file(compared / "model.safetensors"), right)
    done = done_at(run)
    run_pipeline(load_recipe(recipe(**fields)))
    assert done_at(run) == done and "round-0/start" in done and not list(run.rglob("*.superseded-*"))


def test_each_model_of_a_round_that_lags_has_its_own_revision(tmp_path) -> None:
    content = {
        "type": "bootstrap",
        "model": {"path": "owner/start", "revision": "abc"},
        "reference": "owner/before",
        "samples_from": "reference",
        "pairs": {"data": {**SUMS, "size": 5}, "rewards": [{"type": "dpo_implicit"}], "select": {"type": "best_worst"}},
        "preference": {"objective": {"type": "dpo"}},
    }
    stage = Bootstrap.model_validate(content)
    models, rewards = [], []
    for number in (1, 2, 3):
        pairs = stage.pairs_of(number, tmp_path)
        assert pairs.model is not None
        models.append((pairs.model.path, pairs.model.revision))
        (reward,) = pairs.rewards
        rewards.append((reward.path, reward.reference))
    first, second = (str(tmp_path / f"round-{number}" / "preference" / "model") for number in (1, 2))
    assert models == [("owner/before", None), ("owner/start", "abc"), (first, None)]
    copy = str(tmp_path / "round-0" / "start" / "model")
    # The second round's reference is the model that samples, which a source takes for the policy, revision and all.
    assert rewards == [(copy, "owner/before"), (first, "owner/start"), (second, first)]
    assert stage.copies_start
    plain = Bootstrap.model_validate({**content, "model": {"path": "owner/start"}})
    assert not plain.copies_start and plain.pairs_of(1, tmp_path).rewards[0].path == "owner/start"
    by_verifier = {**content["pairs"], "rewards": [{"type": "verifier", "verifier": "exact"}]}
    assert not Bootstrap.model_validate({**content, "pairs": by_verifier}).copies_start


def test_the_kept_folder_has_the_tokenizer_that_the_recipe_names(older, tmp_path) -> None:
    source = tmp_path / "bare"
    shutil.copytree(older, source)
    for file in source.glob("tokenizer*"):
        file.unlink()
    named = Pretrained(path=str(source), tokenizer=older, chat_template="{{ messages }}")
    _copy(named, tmp_path / "model")
    assert same(load_file(tmp_path / "model" / "model.safetensors"), load_file(Path(older) / "model.safetensors"))
    kept = load_tokenizer(Pretrained(path=str(tmp_path / "model")))
    assert kept.get_vocab() == load_tokenizer(Pretrained(path=older)).get_vocab()
    assert kept.chat_template == "{{ messages }}"


def test_a_kept_model_is_replaced_only_by_a_whole_one(older, tmp_path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "former").touch()
    with pytest.raises(Exception, match="nowhere"):
        _copy(Pretrained(path=older, tokenizer=str(tmp_path / "nowhere")), target)
    assert [path.name for path in target.iterdir()] == ["former"]
    for _ in range(2):
        _copy(Pretrained(path=older), target)
        assert {path.name for path in target.iterdir()} == {path.name for path in Path(older).iterdir()}
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_round_that_has_begun_needs_the_same_number_of_processes(recipe, tmp_path, monkeypatch) -> None:
    loaded, training = load_recipe(recipe()), tmp_path / "runs" / "run" / "dice" / "round-1" / "preference"
    with opened(loaded):
        (training / "checkpoints" / "checkpoint-1").mkdir(parents=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        RunError, match=r"'dice' was begun with 1 process .* with 2 processes .* begin the round"
    ) as caught:
        opened(loaded).__enter__()
    assert str(training / "checkpoints") in str(caught.value)
    (loaded.stage_folder("dice") / "result.json").write_text("{}")  # of fewer rounds than the recipe has now
    with pytest.raises(RunError, match="begin the round anew"):
        opened(loaded).__enter__()
    (training / "result.json").write_text("{}")
    with opened(loaded):
        assert read_manifest(loaded.run_folder)["world_size"] == 2


def test_evaluations_alone_take_a_bootstrap_as_it_is(recipe, tmp_path) -> None:
    run = tmp_path / "runs" / "run"
    right = tmp_path / "right.jsonl"
    rows = [{"prompt": "1 =", "completion": str(k), "label": k % 2, "answer": "1"} for k in range(4)]
    right.write_text("\n".join(map(json.dumps, rows)))
    behind = {
        "next": {"type": "sft", "model": {"path": "${stages.dice.model}"}, "data": {**SUMS, "size": 4}},
        "eval": {
            "type": "eval",
            "evals": {"votes": {"type": "best_of_n", "data": {"type": "jsonl", "path": str(right)}}},
        },
    }
    behind["next"]["trainer"] = {"args": {"max_steps": 1, "gradient_checkpointing": False}}
    fields = {"rounds": 1, "evaluation": None, "behind": behind}
    results = run_pipeline(load_recipe(recipe(**fields)))
    config = run / "dice" / "model" / "config.json"
    config.write_text(config.read_text() + "\n")  # what is behind it has read another model
    write_manifest(run, world_size=2)  # as a run of two processes would have left it
    before = {
        path: path.stat().st_mtime_ns for path in run.rglob("*") if path.parent.name in ("dice", "next", "round-1")
    }
    changed = {**fields, "rounds": 2}
    assert run_pipeline(load_recipe(recipe(**changed)), evaluations_alone=True).keys() == results.keys()
    after = {
        path: path.stat().st_mtime_ns for path in run.rglob("*") if path.parent.name in ("dice", "next", "round-1")
    }
    assert after == before and not list(run.rglob("*.superseded-*"))

    run_pipeline(load_recipe(recipe(**changed)))
    assert (run / "dice" / "round-2").is_dir() and (run / "next.superseded-1").is_dir()
    assert read_manifest(run)["world_size"] == 1  # by which the second round was trained


def test_a_row_that_cannot_be_judged_is_refused_as_elsewhere(recipe, tmp_path) -> None:
    rows = [{"prompt": "1 1 =", "answer": "2"}, {"prompt": "1 2 =", "answer": None}]
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"type": "jsonl", "path": str(tmp_path / "held.jsonl")}
    file = recipe(evaluation={"data": data, "verifier": "exact", "max_new_tokens": 5})
    with pytest.raises(ValueError, match="verifier 'exact' cannot judge row 2 of the held-out data"):
        run_pipeline(load_recipe(file))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"samples_from": "reference", "reference": None, "pairs": BY_VERIFIER},
            "stages.dice.reference: samples in the first round, and there is none",
        ),
        ({"stop": {}, "evaluation": None}, "stages.dice.stop: asks for an accuracy"),
        ({"keep": "best", "evaluation": None}, "stages.dice.keep"),
        ({"reference": None}, "stages.dice.reference: is what the first round's implicit reward"),
        (
            {"reference": "${stages.sft.model}"},
            "stages.dice.reference: is the model itself: the first round's implicit",
        ),
        (
            {"samples_from": "reference", "reference": "${stages.sft.model}"},
            "stages.dice.reference: is the model itself",
        ),
        ({"preference": {"objective": {"type": "cut"}}}, "stages.dice.preference.objective.type: learns from"),
        (
            {"preference": {"objective": {"type": "dpo"}, "trainer": {"args": {"max_stpes": 1}}}},
            "did you mean 'max_steps'",
        ),
    ],
)
def test_what_cannot_work_is_said_in_the_recipes_words(recipe, fields, said) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(**fields))
    assert said in str(error.value)


def test_two_processes_go_on_after_a_kill_and_end_as_one(recipe, older, tmp_path) -> None:
    """The update is the same up to the order of sums, so that its size is compared; what is sampled is the same."""
    runs, script = tmp_path / "runs", str(Path(__file__).parent / "launched.py")
    start = tmp_path / "start"
    save_policy_of_sums(start, modulus=5, terms=2, updates=10)
    args = {**ARGS, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}

    def rounds(name: str, batch: int) -> Path:
        given = {**args, "per_device_train_batch_size": batch}
        file = recipe(
            name, model={"path": str(start)}, preference={"objective": {"type": "dpo"}, "trainer": {"args": given}}
        )
        content = json.loads(file.read_text())
        del content["stages"]["sft"]
        file.write_text(json.dumps(content))
        return file

    alone = run_pipeline(load_recipe(rounds("alone", 2)))["dice"]
    both = rounds("both", 1)
    launch("cpu_ddp", script, str(both), "2", succeeds=False)
    assert (runs / "both" / "dice" / "round-1" / "preference" / "checkpoints" / "checkpoint-1").is_dir()
    sampled = done_at(runs / "both")
    with pytest.raises(RunError, match=r"begun with 2 processes \(data parallel\) and cannot go on with 1 process "):
        run_pipeline(load_recipe(both))
    launch("cpu_ddp", script, str(both))
    after = done_at(runs / "both")
    assert {step: after[step] for step in sampled} == sampled and after.keys() == done_at(runs / "alone").keys()
    together = json.loads((runs / "both" / "dice" / "result.json").read_text())
    assert read_manifest(runs / "both")["world_size"] == 2
    for name in ("pairs/completions", "pairs/paired"):
        first, second = (read_rows(runs / of / "dice" / "round-1" / f"{name}.parquet") for of in ("alone", "both"))
        assert rounded(first) == rounded(second)
    begun, kept = load_file(start / "model.safetensors"), "dice/model/model.safetensors"
    one, two = (load_file(runs / of / kept) for of in ("alone", "both"))
    moved = sum((one[name] - begun[name]).square().sum() for name in one).sqrt()
    apart = sum((one[name] - two[name]).square().sum() for name in one).sqrt()
    assert apart < 1e-3 * moved
    assert rounded(together["rounds"]) == rounded(alone["rounds"])


def rounded(content: Any) -> Any:
    """Numbers to four digits, and no names of runs."""
    if isinstance(content, dict):
        return {key: rounded(value) for key, value in content.items() if key not in ("recipe", "model")}
    if isinstance(content, list):
        return [rounded(value) for value in content]
    return round(content, 4) if isinstance(content, float) else content
