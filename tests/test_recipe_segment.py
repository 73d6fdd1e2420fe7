"""Recipes with a segment stage: what they may say, and a segment model that a later stage rewards with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.problems import RecipeError
from rlhf_kit.recipe import load_recipe
from rlhf_kit.recipe_data import check_data
from rlhf_kit.recipe_plan import plan

ROWS = [
    {"prompt": f"{k} =", "text": text, "spans": [{"start": 0, "end": 1, "label": "low"}] if text[0] in "01" else []}
    for k, text in enumerate(["0 1", "3 4", "1 1", "5 0", "2 2", "0 3", "4 4", "1 5"])
]


@pytest.fixture
def recipe(tmp_path: Path, small_policy: Path) -> Callable[..., Path]:
    """A file with a segment stage and a ppo stage that uses it; keyword arguments change the segment stage."""
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, ROWS)))

    def write(source: Any = (), **fields: Any) -> Path:
        args = {"per_device_train_batch_size": 4, "max_steps": 2, "logging_steps": 1, "gradient_checkpointing": False}
        segment = {
            "type": "segment",
            "model": {"path": str(small_policy)},
            "labels": ["low"],
            "data": {"type": "jsonl", "path": str(data)},
            "trainer": {"args": args},
            **fields,
        }
        ppo = {
            "type": "ppo",
            "model": {"path": str(small_policy)},
            "data": {"type": "jsonl", "path": str(data)},
            "rewards": [
                {"type": "segment_model", "path": "${stages.spans.model}", "labels": {"low": -1.0}, **dict(source)}
            ],
            "credit": {"estimator": "rloo"},
            "trainer": {"args": {**args, "num_generations": 2, "max_completion_length": 4}},
        }
        path = tmp_path / "recipe.yaml"
        path.write_text(json.dumps({"runs_dir": str(tmp_path / "runs"), "stages": {"spans": segment, "ppo": ppo}}))
        return path

    return write


def test_labels_are_those_of_the_stage_that_trains_the_model(recipe) -> None:
    with pytest.raises(RecipeError, match=r"stages.ppo.rewards.0.labels.lwo: is no class.*did you mean 'low'"):
        load_recipe(recipe(source={"labels": {"lwo": 1.0}}))
    load_recipe(recipe(source={"labels": {"none": 1.0, "low": -1.0}}))


def test_a_trained_segment_model_rewards_the_policy_of_the_next_stage(recipe, tmp_path) -> None:
    from rlhf_kit.runs.pipeline import run_pipeline

    results = run_pipeline(load_recipe(recipe()))
    assert {name: result["updates"] for name, result in results.items()} == {"spans": 2, "ppo": 2}
    logged = [
        json.loads(line) for line in (tmp_path / "runs" / "recipe" / "ppo" / "metrics.jsonl").read_text().splitlines()
    ]
    rewards = [line["rewards/segment_model/mean"] for line in logged if "rewards/segment_model/mean" in line]
    assert len(rewards) == 2 and all(reward < 0 for reward in rewards)
    assert all(line["rewards/segment_model/failed"] == 0 for line in logged if "rewards/segment_model/failed" in line)
    assert (tmp_path / "runs" / "recipe" / "report.html").is_file()


def test_a_label_that_no_span_of_the_data_has_is_found_without_a_model(recipe, tmp_path) -> None:
    path = recipe({"labels": {"Low": -1.0}}, labels=["Low"])
    with pytest.raises(RecipeError) as error:
        check_data(load_recipe(path), path)
    (problem,) = map(str, error.value.problems)
    said = "stages.spans.labels: no span of data has this label (value 'Low'); did you mean 'low'? (they have low)"
    assert problem == said
    rows = tmp_path / "sentences.jsonl"
    rows.write_text(json.dumps({"text": "0 1", "sentences": [{"text": "0 1", "label": "low"}]}))
    path = recipe(data={"type": "jsonl", "path": str(rows)})
    check_data(load_recipe(path), path)


def test_the_plan_says_what_is_learnt(recipe, tmp_path) -> None:
    spans = [{"start": 0, "end": 1, "label": label} for label in ("low", "a", "b")]
    (tmp_path / "odd.jsonl").write_text(json.dumps({"text": "0 1", "spans": spans}))
    data = {"type": "jsonl", "path": str(tmp_path / "odd.jsonl")}
    path = recipe(labels={"low": ["low"], "odd": ["a", "b"]}, segments={"by": "sentence"}, data=data)
    loaded = load_recipe(path)
    check_data(loaded, path)
    assert ("segments", "sentence: low, odd, or none") in plan(loaded, 1)[0][1]


@pytest.mark.parametrize(
    ("fields", "place", "message"),
    [
        ({"labels": []}, "labels", "at least 1"),
        ({"labels": ["none"]}, "labels", "class of what no span marks"),
        ({"labels": ["low", "low"]}, "labels", "stands for a class more than once (value 'low')"),
        ({"labels": {"a": ["low"], "b": ["high", "low"]}}, "labels", "stands for a class more than once (value 'low')"),
        ({"labels": {"a": ["low"], "b": []}}, "labels.b", "no label stands for this class"),
        ({"segments": {"by": "turn"}}, "segments.by", "one turn"),
        ({"segments": {"by": "step", "pattern": "("}}, "segments.pattern", "no regular expression"),
        ({"class_weights": {"high": 2.0}}, "class_weights.high", "the classes are none, low"),
        ({"prompt_template": "Q:"}, "prompt_template", "does not say where the {prompt} goes"),
        ({"min_overlap": 1.0}, "min_overlap", "less than 1"),
        ({"model": {"type": "scratch", "vocabulary": "running_sums"}}, "model", ""),
        ({"data": {"type": "qa_feedback", "path": "rows.jsonl", "paired": True}}, "data.paired", "pairs have no spans"),
        ({"data": {"type": "toxic_spans", "path": "no.csv"}}, "data.path", "no such file"),
        (
            {"data": {"type": "perturbed", "texts": {"type": "jsonl", "path": "no.jsonl"}}},
            "data.texts.path",
            "no such file",
        ),
        ({"trainer": {"args": {"max_length": 3}}}, "trainer.args.max_length", "transformers.TrainingArguments"),
    ],
)
def test_what_a_segment_stage_cannot_do_is_said_with_its_field(recipe, fields, place, message) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(**fields))
    lines = [str(problem) for problem in error.value.problems if problem.path.startswith(f"stages.spans.{place}")]
    assert any(message in line for line in lines), str(error.value)


def test_annotated_rows_are_for_segment_stages_and_these_need_them(recipe, tmp_path) -> None:
    path = tmp_path / "plain.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}))
    plain = recipe(data={"type": "jsonl", "path": str(path)})
    with pytest.raises(RecipeError, match="segment reads text, and there is only prompt, completion"):
        check_data(load_recipe(plain), plain)
    perturbed = {"type": "perturbed", "texts": {"type": "jsonl", "path": str(path)}}
    check_data(load_recipe(recipe({"labels": {"word": -1.0}}, data=perturbed, labels=["word"])), "recipe")
    broken = recipe(data={**perturbed, "column": "answer"})
    with pytest.raises(RecipeError, match=r"data\.column: there is no such column to edit"):
        check_data(load_recipe(broken), broken)
    with pytest.raises(RecipeError, match=r"stages\.ppo\.data\.type: annotated texts are for segment stages"):
        load_recipe(recipe(), [f"stages.ppo.data={{type: perturbed, texts: {{type: jsonl, path: {path}}}}}"])


def test_a_source_of_a_stage_that_wrote_other_labels_is_found_before_it_is_loaded(recipe, tmp_path) -> None:
    folder = tmp_path / "trained"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "none", "1": "low"}}))
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe({"path": str(folder), "labels": {"high": 1.0}}))
    assert {problem.path for problem in error.value.problems} == {
        "stages.ppo.rewards.0.segments",
        "stages.ppo.rewards.0.labels.high",
    }
