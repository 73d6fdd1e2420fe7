"""Recipes with a preference stage: what cannot work is refused before a model is loaded, with the field and the row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest

from rlhf_kit.objectives.trl import DpoLoss
from rlhf_kit.problems import RecipeError
from rlhf_kit.recipe import load_recipe
from rlhf_kit.recipe_data import check_data

PAIRS = [{"prompt": f"{number} =", "chosen": "1", "rejected": "2"} for number in range(3)]
SINGLE = [{"prompt": f"{number} =", "completion": "1", "label": number % 2} for number in range(3)]
SUMS = {"type": "running_sums", "size": 8, "terms": 2, "modulus": 5}
SAMPLED = {"type": "sampled", "model": "owner/name", "prompts": SUMS, "verifier": "exact"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "pairs.jsonl", PAIRS)
    write(tmp_path / "single.jsonl", SINGLE)
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("\n".join(map(json.dumps, rows)))


def problems(folder: Path, stage: dict[str, Any]) -> list[str]:
    """What `check` finds wrong; names of files are those in `folder`."""
    path = folder / "recipe.json"
    path.write_text(json.dumps(stage).replace("FOLDER", str(folder)))
    try:
        check_data(load_recipe(path), path)
    except RecipeError as error:
        return [str(problem).replace(f"{folder}/", "") for problem in error.problems]
    return []


def preference(objective: str, args: dict[str, Any] | None = None, data: str = "", **fields: Any) -> dict[str, Any]:
    """A stage; `fields` that no stage has are the objective's."""
    own = {name: fields.pop(name) for name in list(fields) if name not in ("reference", "data", "eval_data")}
    single = objective in ("kto", "cringe", "pmpo", "ce")
    return {
        "type": "preference",
        "model": {"path": "owner/name"},
        "objective": {"type": objective, **own},
        "data": {"type": "jsonl", "path": f"FOLDER/{data or ('single.jsonl' if single else 'pairs.jsonl')}"},
        "trainer": {"args": {"max_steps": 1, **(args or {})}},
        **fields,
    }


def file(name: str) -> dict[str, str]:
    return {"type": "jsonl", "path": f"FOLDER/{name}"}


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (preference("pmpo", beta=0), "objective.beta: leaves out the KL that keeps negatives"),
        (preference("pmpo", beta=0, alpha=0.9), "objective.beta: leaves out the KL"),
        (preference("dpo", loss_type=["sigmoi"]), "objective.loss_type.0: not a valid choice (value 'sigmoi')"),
        (preference("dpo", loss_type=[]), "objective.loss_type: "),
        (preference("dpo", loss_weights=[1.0, 2.0]), "objective.loss_weights: has no weight for each loss of sigmoid"),
        (preference("dpo", loss_type=["exo_pair"]), "objective.label_smoothing: must be greater than 0 for exo_pair"),
        (preference("dpo", label_smoothing=0.1), "objective.label_smoothing: is never read by sigmoid"),
        (preference("dpo", loss_type=["robust"], label_smoothing=0.5), "objective.label_smoothing: must be less than"),
        (preference("dpo", beta=0), "objective.beta: must be greater than 0"),
        (preference("kto", beta=0), "objective.beta: must be greater than 0"),
        (preference("orpo", reference={"path": "owner/b"}), "reference: is never read by objective orpo (value"),
        (preference("cringe", reference={"path": "owner/b"}), "reference: is never read by objective cringe"),
        (preference("kto", {"per_device_train_batch_size": 1}), "trainer.args.per_device_train_batch_size: leaves kto"),
        (preference("kto", {"train_sampling_strategy": "random"}), "trainer.args.train_sampling_strategy: would break"),
        ({**preference("orpo"), "data": SAMPLED}, "data.type: objective orpo learns from pairs"),
        ({**preference("dpo"), "eval_data": SAMPLED}, "eval_data.type: objective dpo learns from pairs"),
    ],
)
def test_fields_that_cannot_work_are_refused(folder: Path, stage: dict[str, Any], expected: str) -> None:
    (found,) = problems(folder, stage)
    assert found.startswith(expected)


@pytest.mark.parametrize(
    "stage",
    [
        preference("pmpo"),
        preference("pmpo", beta=0, alpha=1),
        preference("dpo", loss_type=["exo_pair", "sft"], label_smoothing=1e-3, loss_weights=[1.0, 0.5]),
        preference("dpo", loss_type=list(get_args(DpoLoss)), label_smoothing=0.1),
        preference("nca", reference={"path": "owner/b"}),
        preference("pmpo", reference={"path": "owner/b"}),
        preference("dpo", reference={"path": "owner/b"}),
        preference("orpo", {"per_device_train_batch_size": 1}),
        preference("kto", {"per_device_train_batch_size": 2}),
        {**preference("kto"), "data": SAMPLED},
    ],
)
def test_fields_that_work_are_not(folder: Path, stage: dict[str, Any]) -> None:
    assert problems(folder, stage) == []


def test_the_losses_of_dpo_are_trls() -> None:
    """TRL says in its source which there are, where it refuses another."""
    from trl.trainer import dpo_trainer

    source = Path(str(dpo_trainer.__file__)).read_text(encoding="utf-8")
    compared = source.count('loss_type == "')
    assert compared == len(get_args(DpoLoss))
    assert all(f'loss_type == "{name}"' in source for name in get_args(DpoLoss))


def test_kto_as_a_reward_needs_a_batch_too(folder: Path) -> None:
    stage = {**preference("kto", {"per_device_train_batch_size": 1}), "type": "reward", "objective": "kto"}
    (found,) = problems(folder, stage)
    assert found.startswith("trainer.args.per_device_train_batch_size: leaves kto no other completion")


@pytest.mark.parametrize("objective", ["kto", "cringe", "pmpo", "ce"])
def test_held_out_pairs_are_judged_whatever_is_learnt_from(folder: Path, objective: str) -> None:
    """Also in a bootstrap; a loss on them is another thing."""
    stage = preference(objective, eval_data=file("pairs.jsonl"))
    assert problems(folder, stage) == []
    for args in ({"eval_strategy": "steps", "eval_steps": 1}, {"eval_on_start": True}):
        (name, value), *_ = args.items()
        measured = preference(objective, args, eval_data=file("pairs.jsonl"))
        (found,) = problems(folder, measured)
        what = f"trainer.args.{name}: objective {objective} has a loss on rows with completion, label, and eval_data"
        assert found.startswith(what) and f"(value {value!r})" in found
        assert problems(folder, preference("dpo", args, eval_data=file("pairs.jsonl"))) == []
        assert problems(folder, preference(objective, args, eval_data=file("single.jsonl"))) == []
        training = {"objective": {"type": objective}, "eval_data": file("pairs.jsonl")}
        (found,) = problems(folder, bootstrap({**training, "trainer": {"args": args}}))
        assert found.startswith(f"preference.trainer.args.{name}: objective {objective} has a loss on rows with")
        assert problems(folder, bootstrap(training)) == []


def bootstrap(training: dict[str, Any]) -> dict[str, Any]:
    pairs = {"data": SUMS, "rewards": [{"type": "verifier", "verifier": "exact"}], "select": {"type": "best_worst"}}
    return {"type": "bootstrap", "model": {"path": "owner/name"}, "pairs": pairs, "preference": training}


def test_held_out_rows_of_a_bootstrap_that_are_neither_are_refused(folder: Path) -> None:
    write(folder / "other.jsonl", [{"prompt": "1 =", "answer": "1"}])
    found = problems(folder, bootstrap({"objective": {"type": "kto"}, "eval_data": file("other.jsonl")}))
    assert [text.partition(",")[0] for text in found] == [
        "preference.eval_data: objective kto reads completion",
        "preference.eval_data: objective kto reads label",
    ]


def test_what_a_bootstrap_trains_with_is_checked_as_a_stage_is(folder: Path) -> None:
    (found,) = problems(folder, bootstrap({"objective": {"type": "dpo", "label_smoothing": 0.1}}))
    assert found.startswith("preference.objective.label_smoothing: is never read")
    (found,) = problems(folder, bootstrap({"objective": {"type": "orpo"}, "reference": {"path": "owner/b"}}))
    assert found.startswith("preference.reference: is never read")


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize(
    ("scope", "said"),
    [
        ("in", "'scope' is 'in', and no number"),
        (7, "'scope' is 7, and neither 0 (in scope) nor 1 (near it) nor 2"),
        (0.5, "'scope' is 0.5, and neither 0"),
        (float("nan"), "'scope' is nan, and no number"),
        (None, "'scope' is missing"),
    ],
)
def test_a_row_that_is_in_no_scope_is_named(folder: Path, scope: Any, said: str, skip: int) -> None:
    given = "0" if isinstance(scope, str) else 0
    rows = [{**PAIRS[0], "scope": given}, {**PAIRS[1], "scope": given}, {**PAIRS[2], "scope": scope}]
    write(folder / "scopes.jsonl", rows)
    stage = preference("c3po", data="scopes.jsonl")
    stage["data"]["skip"] = skip
    (found,) = problems(folder, stage)
    assert found.startswith(f"data: scopes.jsonl, row 3: {said}")
    write(folder / "right.jsonl", [{**row, "scope": number} for number, row in enumerate(PAIRS)])
    good = preference("c3po", data="right.jsonl")
    assert problems(folder, good) == []
    assert problems(folder, {**good, "eval_data": file("scopes.jsonl")}) == []  # pairs, of which no scope is read
    measured = {**good, "trainer": {"args": {"max_steps": 1, "eval_strategy": "steps"}}}
    (found,) = problems(folder, {**measured, "eval_data": file("scopes.jsonl")})
    assert found.startswith(f"eval_data: scopes.jsonl, row 3: {said}")
