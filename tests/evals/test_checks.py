"""What `check` says of an `eval` stage before a model is loaded, and what `eval` does in a run folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.errors import RunError
from rlhf_kit.problems import RecipeError
from rlhf_kit.recipe import load_recipe
from rlhf_kit.recipe_data import check_data
from rlhf_kit.recipe_plan import plan
from rlhf_kit.recipe_warnings import warnings
from rlhf_kit.runs.config import Recipe
from rlhf_kit.runs.pipeline import run_pipeline

PAIRS = [{"prompt": "1 2 =", "chosen": "3", "rejected": "5 5"}, {"prompt": "4 =", "chosen": "6", "rejected": "0"}]


@pytest.fixture
def recipe(tmp_path: Path, small_policy: Path, prm: Path) -> Callable[..., Recipe]:
    """Loads and checks a recipe of one `eval` stage, as the command line does."""

    def load(world_size: int = 1, **fields: Any) -> Recipe:
        content = {
            "name": "evaluated",
            "runs_dir": str(tmp_path / "runs"),
            "type": "eval",
            "model": {"path": str(small_policy)},
            "rewards": [{"type": "implicit_prm", "path": str(prm)}],
            **fields,
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
        loaded = load_recipe(path, world_size=world_size)
        check_data(loaded, path)
        return loaded

    return load


def pairs(data: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"pairs": {"type": "preference_accuracy", "data": data, **fields}}


def refusals(load: Callable[..., Recipe], **fields: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(**fields)
    return [str(problem) for problem in caught.value.problems]


def test_a_valid_stage_is_planned(recipe, jsonl):
    loaded = recipe(evals=pairs(jsonl(PAIRS)))
    ((title, rows),) = plan(loaded, 1)
    assert title == "1. eval"
    assert [topic for topic, _ in rows] == ["model", "reward", "evaluation", "writes"]
    assert warnings(loaded) == []
    assert load_recipe_of(loaded) == loaded


def load_recipe_of(recipe: Recipe) -> Recipe:
    """The recipe that its resolved form gives."""
    return load_recipe(recipe.write_resolved(recipe.run_folder))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1 =", "chosen": None, "rejected": "2"}, "row 3: 'chosen' is neither text nor a list of messages"),
        ({"prompt": "1 =", "chosen": "1"}, "row 3: 'rejected' is neither text"),
    ],
)
def test_a_row_that_cannot_be_compared_is_named(recipe, jsonl, row, message):
    (problem,) = refusals(recipe, evals=pairs(jsonl([*PAIRS, row])))
    assert message in problem
    assert "rows.jsonl" in problem
    assert problem.startswith("evals.pairs.data: ")


def test_a_label_that_is_none_is_named(recipe, jsonl):
    rows = [{"prompt": "1 =", "completion": "1", "label": 1}, {"prompt": "1 =", "completion": "1", "label": 7}]
    evals = {"cal": {"type": "calibration", "data": jsonl(rows)}}
    (problem,) = refusals(recipe, evals=evals)
    assert "row 2: 'label' says whether the completion is right" in problem


def test_a_column_that_only_an_evaluation_reads_is_looked_at_too(recipe, jsonl):
    rows = [
        {"prompt": "1 =", "reference": "1"},
        {"prompt": "1 =", "reference": ""},
        {"prompt": "2 =", "reference": None},
    ]
    (problem,) = refusals(recipe, evals={"e": {"type": "win_rate", "judge": {"type": "policy"}, "data": jsonl(rows)}})
    assert "rows.jsonl, row 3: reference is None, and must be text or messages" in problem
    rows = [{"prompt": "1 =", "completion": "1", "steps": ["1"]}, {"prompt": "1 =", "completion": "1", "steps": None}]
    truth = {"column": "steps", "separator": " "}
    (problem,) = refusals(recipe, evals={"e": {"type": "first_error", "data": jsonl(rows), "truth": truth}})
    assert "row 2: steps is None, and must be a list of steps" in problem


@pytest.mark.parametrize(
    ("kind", "fields", "missing"),
    [
        ("preference_accuracy", {}, "chosen"),
        ("preference_accuracy", {"pairs": "labelled"}, "completion"),
        ("calibration", {}, "label"),
        ("best_of_n", {}, "completion"),
        ("best_of_n", {"verifier": "exact"}, "answer"),
        ("win_rate", {"judge": {"type": "policy"}}, "reference"),
        ("first_error", {"truth": {"column": "steps", "separator": " "}}, "steps"),
    ],
)
def test_a_column_that_is_not_there_is_named(recipe, jsonl, kind, fields, missing):
    problems = refusals(recipe, evals={"e": {"type": kind, "data": jsonl([{"prompt": "1 ="}]), **fields}})
    assert any(f"evals.e.data: {kind} reads {missing}, and there is only prompt" in problem for problem in problems)


def test_a_broken_processbench_file_is_said(recipe, tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([{"problem": "1 =", "steps": ["1"], "label": 4}]))
    (problem,) = refusals(recipe, evals={"e": {"type": "first_error", "path": str(path)}})
    assert "row 1: label 4 is no step of 1" in problem


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": None}, "evals.pairs: preference_accuracy needs a model"),
        ({"rewards": None}, "evals.pairs: preference_accuracy needs reward sources"),
        ({"world_size": 2}, "type: runs in one process, and here are 2"),
        ({"trainer": {}}, "trainer: unknown key"),
        ({"data": {}}, "data: unknown key"),
        ({"rewards": [{"type": "implicit_prm", "path": "a/b"}] * 2}, "rewards.1.name: has the same name as rewards.0"),
    ],
)
def test_what_a_stage_cannot_do_without(recipe, jsonl, fields, message):
    assert any(message in problem for problem in refusals(recipe, evals=pairs(jsonl(PAIRS)), **fields))


@pytest.mark.parametrize(
    ("evaluation", "message"),
    [
        ({"type": "first_error"}, "evals.e: needs one of path and data"),
        ({"type": "calibration", "data": {"type": "running_sums", "size": 4}, "sources": ["prm"]}, "no such source"),
        ({"type": "audit", "run_folder": "nowhere"}, "evals.e.run_folder: no such file (value 'nowhere')"),
        ({"type": "audit", "run_folder": "."}, "evals.e.run_folder: holds no metrics.jsonl"),
        (
            {"type": "best_of_n", "data": {"type": "running_sums", "size": 4}, "step_pattern": "("},
            "evals.e.step_pattern: is no regular expression",
        ),
        ({"type": "bestofn", "data": {}}, "evals.e.type"),
    ],
)
def test_what_an_evaluation_cannot_do_without(recipe, evaluation, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert any(message in problem for problem in refusals(recipe, evals={"e": evaluation}))


VOTES = [{"prompt": f"{row // 3} =", "completion": "1", "label": row % 2} for row in range(6)]
BEST = {"type": "best_of_n"}


def test_best_of_n_without_rewards_needs_no_model_and_with_them_does(recipe, jsonl):
    evals = {"e": {**BEST, "data": jsonl(VOTES)}}
    assert recipe(model=None, rewards=None, evals=evals).stages
    (problem,) = refusals(recipe, model=None, evals=evals)
    assert problem.startswith("evals.e: best_of_n needs a model for its rewards")


def test_best_of_n_reads_the_columns_of_its_sources(recipe, jsonl):
    rewards = [{"type": "verifier", "verifier": "exact"}]
    (problem,) = refusals(recipe, rewards=rewards, evals={"e": {**BEST, "data": jsonl(VOTES)}})
    assert problem.startswith("evals.e.data: verifier exact reads answer, and there is only prompt, completion, label")


@pytest.mark.parametrize(("asked", "rows", "most"), [(4, VOTES, 3), (None, VOTES[::3], 1)])
def test_more_completions_than_any_prompt_has_are_refused(recipe, jsonl, asked, rows, most):
    (problem,) = refusals(recipe, evals={"e": {**BEST, "num_completions": asked, "data": jsonl(rows)}})
    needed = f"evals.e.data: best_of_n chooses among several completions of a prompt, and no prompt has {asked or 2} "
    assert problem.startswith(f"{needed}(the most is {most})")
    assert recipe(evals={"e": {**BEST, "num_completions": 3, "data": jsonl(VOTES)}}).stages


def test_more_completions_than_are_sampled_are_refused(recipe, small_policy):
    prompts = {"type": "running_sums", "size": 4, "terms": 2, "modulus": 7}
    data = {"type": "sampled", "model": str(small_policy), "prompts": prompts, "verifier": "exact"}
    best = {**BEST, "num_completions": 5, "data": {**data, "num_generations": 4}}
    (problem,) = refusals(recipe, evals={"e": best})
    assert problem.startswith("evals.e.data.num_generations: is less than the 5 completions")
    assert recipe(evals={"e": {**best, "num_completions": 4}}).stages


@pytest.mark.parametrize("share", [0, 1])
def test_a_threshold_is_set_on_a_part_of_the_problems(recipe, jsonl, share):
    rows = jsonl([{"prompt": "1 =", "completion": "1", "steps": ["1"]}])
    errors = {"type": "first_error", "data": rows, "truth": {"column": "steps"}, "threshold_fraction": share}
    (problem,) = refusals(recipe, evals={"e": errors})
    assert problem.startswith("evals.e.threshold_fraction: must be")


def test_another_beta_than_the_trained_one_is_doubted(recipe, jsonl, prm, small_policy):
    record = prm / "prm.json"
    record.write_text(json.dumps({"beta": 0.3, "reference": str(small_policy)}))
    try:
        (doubt,) = warnings(recipe(evals=pairs(jsonl(PAIRS))))
    finally:
        record.unlink()
    assert str(doubt).startswith("rewards.0.beta: is not the 0.3 that")


# --- run folders ---


def test_eval_writes_figures_and_a_report_and_takes_more_evaluations_later(recipe, jsonl):
    loaded = recipe(evals=pairs(jsonl(PAIRS)))
    results = run_pipeline(loaded, evaluations_alone=True)
    folder = loaded.run_folder
    figure = results["eval"]["evals"]["pairs"]["implicit_prm.accuracy"]
    assert json.loads((folder / "result.json").read_text())["evals"]["pairs"]["implicit_prm.accuracy"] == figure
    assert "Accuracy on pairs" in (folder / "report.html").read_text()
    written = (folder / "evals" / "pairs.json").stat().st_mtime_ns
    labelled = [{"prompt": "1 =", "completion": str(number), "label": number % 2, "answer": "1"} for number in range(4)]
    more = recipe(evals={**pairs(jsonl(PAIRS)), "votes": {"type": "best_of_n", "data": jsonl(labelled, "labelled")}})
    assert set(run_pipeline(more, evaluations_alone=True)["eval"]["evals"]) == {"pairs", "votes"}
    assert (folder / "evals" / "pairs.json").stat().st_mtime_ns == written
    assert "majority vote" in (folder / "report.html").read_text()


def test_eval_of_what_is_not_trained_says_so(tmp_path, small_policy, jsonl):
    rows = jsonl([{"prompt": "1 =", "completion": "1", "label": True}] * 4)
    content = {
        "name": "both",
        "runs_dir": str(tmp_path / "runs"),
        "stages": {
            "sft": {"type": "sft", "model": {"path": str(small_policy)}, "data": rows},
            "eval": {"type": "eval", "evals": {"votes": {"type": "best_of_n", "data": rows}}},
        },
    }
    path = tmp_path / "both.yaml"
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match=r"stage 'sft' is not done in .*: run `rlhf-kit train` with this recipe first"):
        run_pipeline(load_recipe(path), evaluations_alone=True)
    del content["stages"]["eval"]
    path.write_text(json.dumps(content))
    with pytest.raises(RunError, match="the recipe has no stage of type eval"):
        run_pipeline(load_recipe(path), evaluations_alone=True)


def test_another_recipe_of_training_is_still_refused(recipe, jsonl, tmp_path):
    loaded = recipe(evals=pairs(jsonl(PAIRS)))
    run_pipeline(loaded)
    with pytest.raises(RunError, match="holds a run of another recipe"):
        run_pipeline(loaded.model_copy(update={"seed": 1}))
