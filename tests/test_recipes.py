"""The recipes that are shipped: each is valid, says what it is, and the quickstart runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_kit.recipe import load_recipe
from rlhf_kit.recipe_data import check_data

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path for path in (ROOT / "recipes").rglob("*.yaml"))
WORLDS = {"zero3": 8}  # a recipe for a node says so in its name

SMALLER = [
    "stages.sft.trainer.args.max_steps=3",
    "stages.sft.eval_data.size=8",
    "stages.prm.data.prompts.size=32",
    "stages.ppo.data.size=64",
    "stages.ppo.eval_data.size=8",
    "stages.ppo.trainer.args.max_steps=2",
    "stages.ppo.trainer.args.eval_steps=1",
    "stages.ppo.trainer.args.save_steps=1",
    "stages.ppo.trainer.args.logging_steps=1",
]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: str(path.relative_to(ROOT / "recipes")))
def test_a_recipe_is_valid_and_says_what_it_is(path: Path) -> None:
    processes = next((number for word, number in WORLDS.items() if word in path.stem), 1)
    check_data(load_recipe(path, world_size=processes), path)
    header = [line for line in path.read_text(encoding="utf-8").split("\nname:")[0].splitlines() if line]
    assert all(line.startswith("# ") for line in header)
    for topic in ("What it shows", "Paper", "Tested on", "Command"):
        assert any(line.startswith(f"# {topic}: ") for line in header), topic
    assert str(path.relative_to(ROOT / "recipes")) in (ROOT / "recipes" / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_quickstart_runs(tmp_path: Path) -> None:
    from rlhf_kit.runs.pipeline import run_pipeline

    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [f"runs_dir={tmp_path}", *SMALLER])
    results = run_pipeline(recipe)
    assert {name: result["updates"] for name, result in results.items()} == {"sft": 3, "prm": 2, "ppo": 2}
    assert (tmp_path / "quickstart" / "report.html").is_file()
    assert (tmp_path / "quickstart" / "ppo" / "prm" / "model.safetensors").is_file()
