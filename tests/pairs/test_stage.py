"""A `pairs` stage on a tiny model whose truth is known: every prompt once, what is written, DPO and KTO read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rlhf_kit.data.tasks import running_sums
from rlhf_kit.data.verifiers import verify
from rlhf_kit.errors import RunError
from rlhf_kit.models.loading import load_tokenizer
from rlhf_kit.pairs.files import read_rows
from rlhf_kit.pairs.stage import run_pairs
from rlhf_kit.problems import RecipeError
from rlhf_kit.recipe import load_recipe

from .conftest import contents, stage


def test_every_prompt_has_its_completions_and_their_scores_are_what_the_sources_say(fields, tmp_path) -> None:
    results = run_pairs(stage(fields), tmp_path)
    rows = read_rows(tmp_path / "completions.parquet")
    prompts, end = running_sums(10, 2, 5, 0), load_tokenizer(stage(fields).model).eos_token_id
    assert [row["prompt_index"] for row in rows] == [n for n in range(10) for _ in range(4)]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in prompts for _ in range(4)]
    for row in rows:
        right = verify("exact", row["completion"], row)
        length = -abs(row["length"] - 2) / 2
        assert row["score.verifier"] == right and row["score.length"] == pytest.approx(length)
        assert row["score"] == pytest.approx(right + 0.25 * length)
        assert row["length"] == len(row["completion_ids"]) <= 5
        assert row["truncated"] == (row["completion_ids"][-1] != end) and row["outcome"] == right
    assert {row["truncated"] for row in rows} == {True, False}
    assert len({row["text"] for row in rows}) > 4
    assert results["prompts"] == 10 and results["completions"] == 40
    assert 0 < results["score/verifier"] < 1


def test_pairs_have_their_scores_shares_ids_and_lineage(fields, tmp_path) -> None:
    results = run_pairs(stage(fields, round=2), tmp_path, seed=7)
    rows, pairs = read_rows(tmp_path / "completions.parquet"), read_rows(tmp_path / "paired.parquet")
    assert len(pairs) == results["pairs"] > 3
    for pair in pairs:
        group = [row for row in rows if row["prompt_index"] == pair["prompt_index"]]
        scores = [row["score"] for row in group]
        assert (pair["score_chosen"], pair["score_rejected"]) == (max(scores), min(scores))
        assert pair["margin"] == pytest.approx(max(scores) - min(scores))
        best = next(row for row in group if row["completion_ids"] == pair["chosen_ids"])
        assert best["completion"] == pair["chosen"] and best["prompt"] == pair["prompt"]
        for side in ("chosen", "rejected"):
            shares = [pair[f"share_{side}.verifier"], pair[f"share_{side}.length"]]
            assert sum(shares) == pytest.approx(pair[f"score_{side}"])
            assert pair[f"length_{side}"] == len(pair[f"{side}_ids"])
        assert (pair["model"], pair["round"], pair["seed"]) == (fields["model"]["path"], 2, 7)
    unpaired = read_rows(tmp_path / "unpaired.parquet")
    assert sum(row["label"] for row in unpaired) == sum(not row["label"] for row in unpaired) == len(pairs)


def test_a_source_of_weight_0_can_give_the_margin(fields, tmp_path) -> None:
    """The verifier says which is chosen, the length which pair of each prompt."""
    verifier, length = fields["rewards"]
    select = {"type": "small_margin", "truncated": "keep", "margin_of": "length"}
    run_pairs(stage(fields, rewards=[verifier, {**length, "weight": 0}], select=select), tmp_path, seed=1)
    rows, pairs = read_rows(tmp_path / "completions.parquet"), read_rows(tmp_path / "paired.parquet")
    assert len(pairs) > 3
    for pair in pairs:
        group = [row for row in rows if row["prompt_index"] == pair["prompt_index"]]
        gaps = {
            abs(right["score.length"] - wrong["score.length"])
            for right in group
            for wrong in group
            if right["score"] > wrong["score"]
        }
        assert pair["margin"] == min(gaps) and (pair["score_chosen"], pair["score_rejected"]) == (1, 0)


def test_chunks_of_other_settings_are_not_taken(fields, tmp_path, caplog) -> None:
    run_pairs(stage(fields), tmp_path / "one", seed=1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    (tmp_path / "two" / "work" / "left").mkdir()
    assert not caplog.messages
    run_pairs(stage(fields, round=2), tmp_path / "two", seed=1)
    work, aside = tmp_path / "two" / "work", tmp_path / "two" / "work.superseded-1"
    (message,) = caplog.messages
    assert f"{work} holds" in message and str(aside) in message
    for chunk in (tmp_path / "one" / "work").iterdir():
        assert (aside / chunk.name).read_bytes() == chunk.read_bytes()
    assert not (work / "left").exists()
    completions = [contents(tmp_path / name)[0] for name in ("one", "two")]
    assert completions[0] != completions[1]
    run_pairs(stage(fields), tmp_path / "two", seed=1)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_debiased_scores_have_no_gap_of_lengths(fields, tmp_path) -> None:
    by_length = {"type": "lexical", "measure": {"type": "length", "target": 50}, "name": "long"}
    selection = {"type": "best_worst", "truncated": "keep"}
    plain = run_pairs(stage(fields, rewards=[by_length], select=selection), tmp_path / "plain")
    assert plain["length_chosen"] > plain["length_rejected"] and plain["alpha"] == 0
    rewards = [by_length, fields["rewards"][0]]
    debiased = run_pairs(
        stage(fields, rewards=rewards, select=selection, length_debias="tokens"), tmp_path / "debiased"
    )
    assert debiased["alpha"] > 0
    gaps = [result["length_chosen"] - result["length_rejected"] for result in (plain, debiased)]
    assert abs(gaps[1]) < abs(gaps[0]) / 2


def test_expert_iteration_writes_right_completions_alone(fields, tmp_path) -> None:
    select = {"type": "expert_iteration", "min_score": 1.0, "per_prompt": 2, "truncated": "keep"}
    results = run_pairs(stage(fields, rewards=fields["rewards"][:1], select=select), tmp_path)
    rows = read_rows(tmp_path / "sft.parquet")
    answers = {row["prompt"]: row for row in running_sums(10, 2, 5, 0)}
    assert len(rows) == results["rows"] > 0
    assert all(verify("exact", row["completion"], answers[row["prompt"]]) == 1 for row in rows)
    assert not (tmp_path / "paired.parquet").exists()


def test_nothing_to_choose_is_an_error_that_says_why(fields, tmp_path) -> None:
    with pytest.raises(
        RunError, match=r"best_worst chose nothing among 40 completions of 10 prompts \(0 without a score"
    ):
        run_pairs(stage(fields, select={"type": "best_worst", "min_margin": 100}), tmp_path)


def recipe(fields: dict[str, Any], folder: Path, **changes: Any) -> Path:
    args = {"per_device_train_batch_size": 2, "max_steps": 2, "learning_rate": 1e-3, "gradient_checkpointing": False}
    dpo = {
        "type": "preference",
        "model": fields["model"],
        "objective": {"type": "dpo"},
        "data": {"type": "parquet", "path": "${stages.pairs.paired}"},
        "trainer": {"args": {**args, "max_length": 32}},
    }
    kto = {**dpo, "objective": {"type": "kto"}, "data": {"type": "parquet", "path": "${stages.pairs.unpaired}"}}
    file = folder / "recipe.yaml"
    stages = {"pairs": {**fields, **changes}, "dpo": dpo, "kto": kto}
    file.write_text(json.dumps({"name": "run", "runs_dir": str(folder), "stages": stages}))
    return file


def test_dpo_and_kto_train_on_what_was_written(fields, tmp_path) -> None:
    from rlhf_kit.runs.pipeline import run_pipeline

    results = run_pipeline(load_recipe(recipe(fields, tmp_path)))
    assert results["dpo"]["updates"] == results["kto"]["updates"] == 2
    assert (tmp_path / "run" / "pairs" / "paired.parquet").is_file()
    assert (tmp_path / "run" / "report.html").is_file()


def test_dpo_on_the_pairs_makes_the_model_right_more_often(fields, tmp_path) -> None:
    from rlhf_kit.runs.pipeline import run_pipeline

    sums = {**fields["data"], "size": 40}
    generation = {**fields["generation"], "num_generations": 8, "prompts_at_once": 40}
    changes = {"data": sums, "generation": generation, "rewards": fields["rewards"][:1]}
    file = recipe(fields, tmp_path, **changes)
    content = json.loads(file.read_text())
    content["stages"]["after"] = {**content["stages"]["pairs"], "model": {"path": "${stages.dpo.model}"}}
    args = {"per_device_train_batch_size": 40, "max_steps": 150, "learning_rate": 2e-3}
    content["stages"]["dpo"]["objective"] |= {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
    content["stages"]["dpo"]["trainer"]["args"] |= args
    file.write_text(json.dumps(content))
    results = run_pipeline(load_recipe(file, ["~stages.kto"]))
    pairs = read_rows(tmp_path / "run" / "pairs" / "paired.parquet")
    answers = {row["prompt"]: row for row in running_sums(40, 2, 5, 0)}
    for side, right in (("chosen", 1), ("rejected", 0)):
        assert all(verify("exact", pair[side], answers[pair["prompt"]]) == right for pair in pairs)
    assert results["after"]["score/verifier"] > results["pairs"]["score/verifier"] + 0.05


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"generation": {"num_generations": 1}}, "generation.num_generations: makes no pair"),
        (
            {"select": {"type": "best_worst", "margin_of": "length"}},
            "select.margin_of: is not what best and worst are by",
        ),
        (
            {"select": {"type": "random", "min_margin": 2.0, "max_margin": 1.0}},
            "select.max_margin: must not lie below min_margin (2)",
        ),
        ({"select": {"type": "random", "budget": []}}, "select.budget"),
        ({"rewards": [{"type": "verifier", "verifier": "exact", "weight": 0}]}, "rewards: all have weight 0"),
        ({"select": {"type": "random", "margin_of": "critic"}}, "select.margin_of: is no reward source of this stage"),
        ({"select": {"type": "threshold", "chosen": 0, "rejected": 1}}, "select.rejected: must lie below chosen"),
        ({"rewards": [{"type": "implicit_prm", "online": {}}]}, "rewards.0.online"),
        (
            {"rewards": [{"type": "implicit_prm", "path": ".", "reference": "ema"}]},
            "rewards.0.reference: is an average",
        ),
        ({"generation": {"use_vllm": True}}, "generation.use_vllm: needs the package vllm"),
        ({"select": {"type": "best_of_n"}, "length_debias": "tokens"}, "length_debias: makes chosen and rejected"),
        ({"select": None}, "select: is what builder sampled needs"),
        ({"rewards": [{"type": "verifier", "verifier": "exact"}] * 2}, "rewards.1.name: has the same name"),
    ],
)
def test_what_cannot_work_is_said_before_a_model_is_loaded(fields, tmp_path, changes, said) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(recipe(fields, tmp_path, **changes))
    assert f"stages.pairs.{said}" in str(error.value)
