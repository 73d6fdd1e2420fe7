"""What is wrong with a recipe's data is found without a model: each error names the field, and what to do."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlhf_kit import recipe_data
from rlhf_kit.cli import app
from rlhf_kit.data.config import RunningSums
from rlhf_kit.data.load import load_data
from rlhf_kit.problems import RecipeError
from rlhf_kit.recipe import load_recipe
from rlhf_kit.recipe_columns import RUNNING_SUMS
from rlhf_kit.recipe_data import check_data

MODEL = {"type": "scratch", "vocabulary": "running_sums"}
ROWS = [{"prompt": "1 + 1 =", "gold": "2", "said": "2"}]
GYM = {"type": "reasoning_gym", "task": "chain_sum", "size": 10}
SFT = {"type": "sft", "model": MODEL}
REWARD = {"type": "reward", "model": {"path": "owner/name"}}
PPO = {
    "type": "ppo",
    "model": {"path": "owner/name"},
    "credit": {"estimator": "rloo"},
    "trainer": {"args": {"per_device_train_batch_size": 4, "num_generations": 4}},
}

JUDGE = {"type": "server", "base_url": "http://127.0.0.1/v1", "model": "m"}


def verifier(name: str) -> dict[str, Any]:
    return {"rewards": [{"type": "verifier", "verifier": name}]}


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The lines that `check_data` says of a recipe, without its name; the folder has `rows.jsonl`."""
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))

    def check(content: dict[str, Any]) -> list[str]:
        Path("recipe.yaml").write_text(json.dumps(content))
        try:
            check_data(load_recipe("recipe.yaml"), "recipe.yaml")
        except RecipeError as error:
            return [str(problem) for problem in error.problems]
        return []

    return check


def jsonl(**fields: Any) -> dict[str, Any]:
    return {"type": "jsonl", "path": "rows.jsonl", **fields}


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ({**SFT, "data": jsonl()}, "data: sft reads completion, and there is only prompt, gold, said"),
        ({**REWARD, "data": jsonl(columns={"completion": "said"})}, "data: objective ce reads label"),
        ({**REWARD, "objective": "dpo", "data": jsonl(columns={"chosen": "said"})}, "objective dpo reads rejected"),
        ({**PPO, **verifier("math"), "data": jsonl()}, "data: verifier math reads answer"),
        ({**PPO, **verifier("reasoning_gym"), "data": jsonl()}, "verifier reasoning_gym reads reasoning_gym_entry"),
        (
            {**PPO, "rewards": [{"type": "gap", "judge": JUDGE, "column": "best"}], "data": jsonl()},
            "data: reward 'gap' reads best",
        ),
        (
            {**PPO, "rewards": [{"type": "follow_up", "model": {"path": "a/b"}, "column": "next"}], "data": jsonl()},
            "data: reward 'follow_up' reads next",
        ),
        ({**PPO, **verifier("exact"), "data": jsonl(columns={"answer": "golden"})}, "data: rows.jsonl: columns maps"),
        (
            {**PPO, **verifier("exact"), "data": jsonl(columns={"answer": "gold"}), "step_truth": {"column": "steps"}},
            "data: step_truth reads steps",
        ),
        (
            {
                **PPO,
                **verifier("exact"),
                "data": jsonl(columns={"answer": "gold"}),
                "eval_data": jsonl(),
                "evaluation": {"verifier": "math"},
            },
            "eval_data: verifier math reads answer",
        ),
        ({**SFT, "data": {**GYM, "task": "chain_sums"}}, "data: reasoning-gym has no task 'chain_sums': did you mean"),
        ({**SFT, "data": {**GYM, "params": {"min_term": 2}}}, "refuses params {'min_term': 2}"),
    ],
)
def test_what_a_stage_cannot_use_is_said_with_its_field(stage: dict[str, Any], said: str, problems: Any) -> None:
    (problem,) = problems(stage)
    assert said in problem


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({}, "item"),
        ({"judge": JUDGE, "decisions": ["buy", "go"]}, "item"),  # what comes of it says the marketplace's rule
        ({"judge": JUDGE, "world": "judge"}, "options"),
        ({"judge": JUDGE, "mode": "none"}, "options"),
    ],
)
def test_hindsight_needs_a_market_or_something_to_decide(fields: dict[str, Any], missing: str, problems: Any) -> None:
    stage = {**PPO, "rewards": [{"type": "hindsight", **fields}]}
    said = problems({**stage, "data": jsonl()})
    assert len(said) == (8 if missing == "item" else 1)
    assert said[0].startswith(f"data: reward 'hindsight' reads {missing}, and there is only prompt, gold, said")
    assert problems({**stage, "data": {"type": "marketplace", "size": 4}}) == []


def test_hindsight_with_decisions_or_options_of_its_own_needs_no_market(problems: Any) -> None:
    source = {"type": "hindsight", "judge": JUDGE, "world": "judge"}
    assert problems({**PPO, "rewards": [{**source, "decisions": ["buy", "go"]}], "data": jsonl()}) == []
    Path("rows.jsonl").write_text(json.dumps({"prompt": "p", "options": ["buy", "go"]}))
    assert problems({**PPO, "rewards": [source], "data": jsonl()}) == []


@pytest.mark.parametrize(
    ("columns", "remedy"),
    [
        ({"answer": "gold"}, "name the one that holds it, as in columns: {completion: answer}"),
        ({"response": "said", "answer": "gold"}, "name the one that holds it, as in columns: {completion: response}"),
        ({"model_completion": "said"}, "name the one that holds it, as in columns: {completion: model_completion}"),
        ({"completion_ids": "ids"}, "if another column holds it, name that in columns: {completion: ...}; or give"),
        ({"chosen": "gold", "rejected": "said"}, "if another column holds it, name that in columns: {completion: ...}"),
    ],
)
def test_the_remedy_names_a_column_where_its_name_says_so(columns: Any, remedy: str, problems: Any) -> None:
    Path("rows.jsonl").write_text(json.dumps({**ROWS[0], "ids": [1]}))
    (problem,) = problems({**SFT, "data": jsonl(columns=columns)})
    assert remedy in problem


def test_every_data_set_of_every_stage_is_read(problems: Any) -> None:
    sampled = {"type": "sampled", "model": "owner/name", "verifier": "exact", "prompts": jsonl()}
    found = problems({"stages": {"first": {**SFT, "data": jsonl()}, "second": {**REWARD, "data": sampled}}})
    assert [line.partition(":")[0] for line in found] == ["stages.first.data", "stages.second.data.prompts"]


@pytest.mark.parametrize(
    "stage",
    [
        {**SFT, "data": GYM},
        {**SFT, "data": jsonl(columns={"completion": "said"})},
        {**PPO, **verifier("reasoning_gym"), "data": GYM, "eval_data": GYM, "evaluation": {"verifier": "math"}},
        {**PPO, **verifier("exact"), "data": jsonl(columns={"answer": "gold"})},
        {**PPO, **verifier("exact"), "data": {"type": "hub", "path": "owner/data"}},  # not on this machine
    ],
)
def test_data_that_will_do_are_no_problem(stage: dict[str, Any], problems: Any) -> None:
    assert problems(stage) == []


SUMS = {"type": "running_sums", "modulus": 5, "terms": 2}  # 5 first numbers, 4 x 4 addends: 80 problems


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({**SUMS, "size": 81}, "data.size: is more than the 80 different problems of modulus 5, terms 2 and largest 4"),
        ({**SUMS, "size": 81}, "(value 81); write at most 80"),
        ({**SUMS, "size": 21, "largest": 2}, "data.size: is more than the 20 different problems"),
        ({**SUMS, "size": 6, "largest": 1, "terms": 1000}, "data.size: is more than the 5 different problems"),
        ({**SUMS, "size": 5, "largest": 5}, "data.largest: must be below modulus (5) (value 5); write at most 4"),
    ],
)
def test_running_sums_that_cannot_be_made_are_refused(data: dict[str, Any], said: str, problems: Any) -> None:
    (problem,) = problems({**SFT, "data": data})
    assert said in problem
    with pytest.raises(ValueError, match="running_sums"):
        load_data(RunningSums.model_validate(data))


def test_running_sums_are_counted_behind_sampled_data_too(problems: Any) -> None:
    sampled = {"type": "sampled", "model": "owner/name", "verifier": "exact", "prompts": {**SUMS, "size": 81}}
    (problem,) = problems({**REWARD, "data": sampled})
    assert problem.startswith("data.prompts.size: ")


@pytest.mark.parametrize(
    "data",
    [
        {**SUMS, "size": 80},
        {**SUMS, "size": 20, "largest": 2},
        {**SUMS, "size": 5, "largest": 1},
        {**SUMS, "size": 10**9, "terms": 10**9},  # more problems than could be counted
    ],
)
def test_running_sums_that_can_be_made_pass(data: dict[str, Any], problems: Any) -> None:
    assert problems({**SFT, "data": data}) == []
    if data["size"] <= 80:
        assert len(load_data(RunningSums.model_validate(data))) == data["size"]


OF_ONES_OWN = {**PPO, "data": {**SUMS, "size": 8}, "rewards": [{"type": "function", "function": "brevity"}]}


def installed(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    points = EntryPoints(EntryPoint(name, f"package:{name}", "rlhf_kit.rewards") for name in names)
    monkeypatch.setattr(recipe_data, "entry_points", lambda group: points.select(group=group))


def test_a_function_that_no_package_declares_is_refused(problems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    (problem,) = problems({"stages": {"ppo": OF_ONES_OWN}})
    assert problem.startswith("stages.ppo.rewards.0.function: is no entry point of the group rlhf_kit.rewards")
    assert "(none is installed) (value 'brevity'); declare it as one in your package, or run the recipe" in problem
    installed(monkeypatch, "brevety", "other")
    (problem,) = problems(OF_ONES_OWN)
    assert problem.endswith("(brevety, other) (value 'brevity'); did you mean 'brevety'?")


def test_a_function_that_a_package_declares_passes(problems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, "brevity")
    assert problems(OF_ONES_OWN) == []


def test_a_function_may_be_passed_in_python(problems: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    problems(OF_ONES_OWN)
    assert load_recipe("recipe.yaml").stages  # what run_pipeline(recipe, functions=...) is given


@pytest.mark.parametrize("command", ["check", "train"])
def test_the_commands_say_it_before_anything_runs(command: str, problems: Any) -> None:
    problems({**PPO, **verifier("math"), "data": jsonl()})
    result = CliRunner().invoke(app, [command, "recipe.yaml"])
    assert result.exit_code == 2
    assert "recipe.yaml: data: verifier math reads answer" in result.output
    assert not Path("runs").exists()


DPO = {"type": "preference", "model": {"path": "owner/name"}, "objective": {"type": "dpo"}}
KTO = {**DPO, "objective": {"type": "kto"}}
I_ORPO, CUT = ({**DPO, "objective": {"type": name}} for name in ("i_orpo", "cut"))
PAIRED_ROWS = jsonl(columns={"chosen": "gold", "rejected": "said"})
CORRUPTED = {"type": "corrupted_prompts", "rows": jsonl(columns={"completion": "gold"})}
SAMPLED = {"type": "sampled", "model": "owner/name", "verifier": "exact", "prompts": {**SUMS, "size": 8}}
SETS = {"type": "concatenated", "sets": [jsonl(), PAIRED_ROWS]}


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            {**DPO, "data": {**SUMS, "size": 8}},
            ["data: objective dpo reads chosen", "data: objective dpo reads rejected"],
        ),
        ({**DPO, "data": {**SUMS, "size": 8, "columns": {"chosen": "answer"}}}, ["data: objective dpo reads rejected"]),
        ({**CUT, "data": SAMPLED}, ["data: objective cut reads judged_prompt"]),
        ({**DPO, "data": SETS}, ["data: objective dpo reads chosen", "data: objective dpo reads rejected"]),
        (
            {**SFT, "data": {**SETS, "sets": [jsonl(), jsonl()]}},
            ["data: sft reads completion, and there is only prompt, gold"],
        ),
        ({**I_ORPO, "data": CORRUPTED["rows"]}, ["data: objective i_orpo reads corrupted_prompt"]),
        ({**I_ORPO, "data": {**CORRUPTED, "rows": jsonl()}}, ["data: objective i_orpo reads completion"]),
        ({**KTO, "data": CORRUPTED}, ["data: objective kto reads label"]),
        ({**CUT, "data": CORRUPTED}, ["data: objective cut reads judged_prompt"]),
        (
            {**KTO, "data": {**CORRUPTED, "columns": {"label": "right"}}},
            ["data.columns.label: there is no such column (value"],
        ),
        (
            {**DPO, "data": {"type": "mixed", "rows": PAIRED_ROWS, "replay": jsonl(columns={"chosen": "said"})}},
            ["data: objective dpo reads rejected, and there is only chosen, prompt"],
        ),
        (
            {**SFT, "data": {**SUMS, "size": 8, "columns": {"answer": "steps"}}},
            ["data.columns.answer: there is a column of that name already (value 'steps')"],
        ),
        (
            {**SFT, "data": {**SUMS, "size": 8, "columns": {"a": "answer"}, "templates": {"b": "{a} {answer}"}}},
            ["data.templates.b: there is no column answer to put in"],
        ),
        (
            {**SFT, "data": {**SUMS, "size": 8, "templates": {"answer": "{prompt}"}}},
            ["data.templates.answer: there is a column of that name already"],
        ),
        (
            {**SFT, "data": {**SETS, "sets": [jsonl(), jsonl(columns={"a": "b"})]}},
            ["data.sets.1: rows.jsonl: columns maps 'a' to 'b'"],
        ),
    ],
)
def test_what_data_made_of_data_lack_is_said(stage: dict[str, Any], said: list[str], problems: Any) -> None:
    found = problems(stage)
    assert [line[: len(start)] for line, start in zip(found, said, strict=True)] == said


def test_running_sums_have_the_columns_that_are_known_of_them() -> None:
    assert tuple(load_data(RunningSums(type="running_sums", size=1)).column_names) == RUNNING_SUMS


HUB = {"type": "hub", "path": "owner/data"}


@pytest.mark.parametrize(
    "stage",
    [
        {**DPO, "data": {**SETS, "sets": [PAIRED_ROWS, PAIRED_ROWS]}},
        {**DPO, "data": {"type": "mixed", "rows": PAIRED_ROWS, "replay": HUB}},
        {**DPO, "data": {**SUMS, "size": 8, "columns": {"chosen": "answer", "rejected": "completion"}, "skip": 4}},
        {**SFT, "data": {**SUMS, "size": 8, "terms": 10**9, "hash_range": [0.999, 1]}},
        {**SFT, "data": {**GYM, "hash_range": [0.999, 1]}},
        {**KTO, "data": SAMPLED},
        {**KTO, "data": {**SAMPLED, "prompts": HUB}},
        {**I_ORPO, "data": CORRUPTED},
        {**I_ORPO, "data": {**CORRUPTED, "rows": HUB}},
        {**CUT, "data": {**CORRUPTED, "templates": {"judged_prompt": "{prompt}"}}},
        {**CUT, "data": {**CORRUPTED, "columns": {"judged_prompt": "corrupted_prompt"}}},
        {**SFT, "data": {**SUMS, "size": 8, "columns": {"answer": "steps", "steps": "answer"}}},
        {**SFT, "data": {**SUMS, "size": 8, "columns": {"a": "answer"}, "templates": {"b": "{a}"}}},
    ],
)
def test_data_made_of_data_that_will_do_are_no_problem(stage: dict[str, Any], problems: Any) -> None:
    assert problems(stage) == []


PAIRS = {
    "type": "pairs",
    "model": {"path": "owner/name"},
    "data": {**SUMS, "size": 8},
    "rewards": [{"type": "verifier", "verifier": "exact"}],
    "select": {"type": "best_worst"},
}
BEST = {**PAIRS, "select": {"type": "best_of_n"}}
CORRUPT = {"type": "pairs", "builder": {"type": "corrupt_prompt"}, "data": {**SUMS, "size": 8}}


def behind(output: str, pairs: dict[str, Any], stage: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A recipe of a stage that reads what a stage `p` writes."""
    data = {"type": pairs.get("format", "parquet"), "path": f"${{stages.p.{output}}}", **fields}
    return {"stages": {"p": pairs, "last": {**stage, "data": data}}}


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (behind("paired", PAIRS, KTO), ["completion, and the rows are prompt, chosen, rejected", "label"]),
        (behind("unpaired", PAIRS, DPO), ["chosen, and the rows are prompt, completion, label", "rejected"]),
        (behind("sft", BEST, DPO), ["chosen, and the rows are prompt, completion", "rejected"]),
        (behind("sft", CORRUPT, CUT), ["judged_prompt"]),
        (behind("paired", {**PAIRS, "format": "jsonl"}, SFT), ["completion"]),
        (behind("paired", PAIRS, DPO, columns={"chosen": "chosen", "gone": "rejected"}), ["rejected"]),
    ],
)
def test_what_an_earlier_stage_does_not_write_is_said(recipe: dict[str, Any], said: list[str], problems: Any) -> None:
    found = problems(recipe)
    assert [line.partition(" reads ")[0].partition(": ")[0] for line in found] == ["stages.last.data"] * len(said)
    read = [line.partition(" reads ")[2] for line in found]
    assert [line[: len(start)] for line, start in zip(read, said, strict=True)] == said


@pytest.mark.parametrize(
    ("pairs", "kind", "remedy"),
    [(PAIRS, "jsonl", "parquet"), ({**PAIRS, "format": "jsonl"}, "parquet", "jsonl")],
)
def test_what_an_earlier_stage_writes_is_read_in_its_format(pairs: Any, kind: str, remedy: str, problems: Any) -> None:
    mixed = {"type": "mixed", "rows": {"type": kind, "path": "${stages.p.paired}"}, "replay": PAIRED_ROWS}
    found = problems({"stages": {"p": pairs, "a": {**DPO, "data": mixed["rows"]}, "b": {**DPO, "data": mixed}}})
    assert [line.partition(": ")[0] for line in found] == ["stages.a.data.type", "stages.b.data.rows.type"]
    assert f"stage 'p' writes {remedy} (value '{kind}'); write {remedy}, or format: {kind} in that stage" in found[0]


@pytest.mark.parametrize(
    "recipe",
    [
        behind("paired", PAIRS, DPO),
        behind("unpaired", PAIRS, KTO),
        behind("sft", BEST, SFT),
        behind("sft", CORRUPT, I_ORPO),
        behind("completions", PAIRS, DPO),  # what they hold is known when they are there
        behind("paired", PAIRS, {**DPO, "objective": {"type": "c3po"}}),  # and so is `scope`
        behind("paired", PAIRS, SFT, columns={"completion": "chosen"}),
        behind("unpaired", PAIRS, {**KTO, "eval_data": {"type": "parquet", "path": "${stages.p.paired}"}}),
    ],
)
def test_what_an_earlier_stage_writes_will_do(recipe: dict[str, Any], problems: Any) -> None:
    assert problems(recipe) == []
