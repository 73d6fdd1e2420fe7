"""Recipes with tools: what loads, and what cannot work and is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_kit.recipe import RecipeError, load_recipe
from rlhf_kit.recipe_data import check_data

RECIPE = """
type: ppo
model: {type: scratch, vocabulary: tool_arithmetic}
data: {type: tool_arithmetic, size: 100}
tools: [calculator]
rewards:
  - {type: verifier, verifier: exact}
  - {type: turns}
credit: {estimator: gae}
trainer: {args: {per_device_train_batch_size: 8, num_generations: 4, max_steps: 5}}
"""
TEXT = "data={type: running_sums, size: 100}"
PRETRAINED = "model={path: some/model}"


@pytest.fixture(autouse=True)
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("recipe.yaml")
    path.write_text(RECIPE, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [TEXT, "data.chat=true", PRETRAINED],
        ["data={type: hub, path: some/data}", PRETRAINED],  # may hold messages: its stage looks
        ["tools=[]", "rewards=[{type: verifier, verifier: exact}]"],
        ["credit.estimator=prime"],
        ["accuracy_band={}"],
    ],
)
def test_what_works_loads(recipe: Path, overrides: list[str]) -> None:
    check_data(load_recipe(recipe, overrides), recipe)


@pytest.mark.parametrize(
    ("overrides", "fragment"),
    [
        (["tools=[calculators]"], "tools.0: "),
        (["tools=[calculator, calculator]"], "tools.1: is named twice (value 'calculator'); remove one"),
        (["tools=[]"], "rewards.1: turns rewards tool calls, and the stage has no tools; add tools: [calculator]"),
        ([TEXT, PRETRAINED], "data.chat: tools are called in conversations, and the prompts are text (value False)"),
        (["model.vocabulary=running_sums"], "model.vocabulary: has no template for tool calls (value 'running_sums')"),
        (["model.vocabulary=running_sums"], "data: has conversations, and the model's vocabulary has neither"),
        (["eval_data=${data}", "evaluation={verifier: exact}"], "evaluation: decodes without tools"),
        (["step_truth={column: steps, separator: ' '}"], "step_truth: looks for steps in the last turn alone"),
        (["credit.estimator=min_form"], "credit.estimator: looks for steps in the last turn alone (value 'min_form')"),
        (["accuracy_band={mode: resample}"], "accuracy_band.mode: generates without tools (value 'resample')"),
        (["data.size=9999"], "data: tool_arithmetic with 2 terms and largest 20 has few more than 8000"),
        (["data.largest=50"], "data.largest"),
    ],
)
def test_what_cannot_work_is_refused(recipe: Path, overrides: list[str], fragment: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_data(load_recipe(recipe, overrides), recipe)
    assert any(line.startswith(f"recipe.yaml: {fragment}") for line in str(caught.value).splitlines()), caught.value
