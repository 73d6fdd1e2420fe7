"""What sources say of given completions, against log-probabilities of plain transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROWS = [
    {"prompt": "1 2 =", "completion": "3 5 1", "answer": "1"},
    {"prompt": "4 =", "completion": "6", "answer": "1"},
    {"prompt": "3 3 3 =", "completion": "6 2", "answer": "2"},
    {"prompt": "2 =", "completion": "0 0 0 1", "answer": "1"},
]
EVALS = {"e": {"type": "audit", "run_folder": "nowhere"}}  # a stage must have one; these tests only score
VERIFIER = {"type": "verifier", "verifier": "exact"}


def log_probs(folder: Path, row: dict[str, Any]) -> torch.Tensor:
    """Of a completion's tokens and the end-of-sequence token, one row at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer(row["prompt"])["input_ids"]
    completion = row.get("completion_ids")
    if completion is None:
        completion = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0]
    taken = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return taken.gather(1, torch.tensor(completion)[:, None])[:, 0]


def test_an_implicit_prm_gives_the_log_ratio_of_every_token(stage, context, small_policy, prm):
    scored = context(stage(evals=EVALS)).score(ROWS)
    found = scored.sources["implicit_prm"]
    for place, row in enumerate(ROWS):
        expected = 0.5 * (log_probs(prm, row) - log_probs(small_policy, row))
        assert found.tokens[place] == pytest.approx(expected.numpy(), abs=1e-5)
        assert found.totals[place] == pytest.approx(float(expected.sum()), abs=1e-5)
    assert scored.lengths == [4, 2, 3, 5]  # with the token that ends each
    assert scored.texts == [row["completion"] for row in ROWS]
    assert list(scored.sources) == ["implicit_prm"]


def test_tokens_that_were_sampled_are_not_encoded_again(stage, context, small_policy, prm):
    tokenizer = AutoTokenizer.from_pretrained(small_policy)
    ids = tokenizer("3 5", add_special_tokens=False)["input_ids"]  # no end
    cut = {**ROWS[0], "completion": "3 5", "completion_ids": ids}
    found = context(stage(evals=EVALS)).score([cut]).sources["implicit_prm"]
    expected = 0.5 * (log_probs(prm, cut) - log_probs(small_policy, cut))
    assert found.tokens[0] == pytest.approx(expected.numpy(), abs=1e-5)


def test_tokens_of_another_tokenizer_are_not_scored(stage, context, caplog):
    """The same numbers say something else, or nothing, here: what the row says is encoded, and that is said once."""
    score = context(stage(evals=EVALS, batch_size=1)).score
    foreign = [{**ROWS[0], "completion_ids": ids} for ids in ([0, 1], [10**6], [-1], [])]
    found, plain = score([*foreign, ROWS[1]]), score([ROWS[0]] * 4)
    assert found.texts == [*plain.texts, ROWS[1]["completion"]]
    for own, expected in zip(found.sources["implicit_prm"].tokens, plain.sources["implicit_prm"].tokens, strict=False):
        assert own.tolist() == pytest.approx(expected.tolist())
    assert (
        [record.message for record in caplog.records if "4 of 4 completions" in record.message]
        == [record.message for record in caplog.records]
        != []
    )


def test_steps_share_out_the_whole_reward(stage, context):
    scored = context(stage(evals=EVALS)).score(ROWS)
    tokens = scored.sources["implicit_prm"].tokens
    # "3 5 1": the words end at characters 1, 3, 5; the end of the sequence belongs to the last step.
    sums = scored.step_sums("implicit_prm", 0, [(0, 3), (3, 5)])
    assert sums == pytest.approx([tokens[0][0] + tokens[0][1], tokens[0][2] + tokens[0][3]])
    least = scored.least_step("implicit_prm", " ")
    expected = [min([*row[:-2], row[-2] + row[-1]]) for row in tokens]  # each word is a step
    assert least == pytest.approx(expected)


def test_the_sum_weighs_every_source(stage, context, prm):
    rewards = [VERIFIER | {"weight": 2.0}, {"type": "implicit_prm", "path": str(prm), "beta": 0.5, "weight": -1.0}]
    sources = context(stage(evals=EVALS, rewards=rewards)).score(ROWS).sources
    assert sources["verifier"].totals.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert sources["verifier"].tokens[0].tolist() == [0.0, 0.0, 0.0, 1.0]
    expected = 2 * sources["verifier"].totals - sources["implicit_prm"].totals
    assert sources["sum"].totals == pytest.approx(expected)
    assert (sources["sum"].kind, sources["verifier"].kind) == ("process", "outcome")


def test_a_normalised_source_is_divided_by_its_deviation_over_all_rows(stage, context, prm):
    rewards = [VERIFIER, {"type": "implicit_prm", "path": str(prm), "beta": 0.5, "normalize": "batch"}]
    sources = context(stage(evals=EVALS, rewards=rewards)).score(ROWS).sources
    prm_totals = sources["implicit_prm"].totals
    assert sources["sum"].totals == pytest.approx(sources["verifier"].totals + prm_totals / prm_totals.std())


def broken_on(place: int) -> Callable[..., list[float]]:
    def judge(prompts: list[str], **columns: Any) -> list[float]:
        return [math.nan if prompt == ROWS[place]["prompt"] else 1.0 for prompt in prompts]

    return judge


@pytest.mark.parametrize("required", [True, False])
def test_a_failure_is_missing_in_its_source_and_in_the_sum_if_required(stage, context, required):
    rewards = [VERIFIER, {"type": "function", "function": "f", "required": required}]
    sources = context(stage(evals=EVALS, rewards=rewards), {"f": broken_on(2)}).score(ROWS).sources
    assert np.isnan(sources["f"].totals).tolist() == [False, False, True, False]
    assert sources["f"].failed == 1
    assert np.isnan(sources["sum"].totals).tolist() == [False, False, required, False]
    if not required:
        assert sources["sum"].totals[2] == 1.0  # the verifier's alone


def test_a_failure_in_one_row_takes_nothing_from_a_row_of_another_task(stage, context):
    def judge(prompts: list[str], **columns: Any) -> list[float | None]:
        return [{ROWS[0]["prompt"]: None, ROWS[2]["prompt"]: math.nan}.get(prompt, 1.0) for prompt in prompts]

    rewards = [VERIFIER, {"type": "function", "function": "f"}]
    sources = context(stage(evals=EVALS, rewards=rewards), {"f": judge}).score(ROWS).sources
    assert (sources["f"].failed, sources["f"].not_applicable) == (1, 1)
    assert sources["sum"].totals[[0, 1, 3]].tolist() == [1.0, 1.0, 2.0]
    assert math.isnan(sources["sum"].totals[2])


def test_a_row_of_another_task_is_no_failure(stage, context):
    rows = [ROWS[0], {**ROWS[1], "answer": None}]
    scores = context(stage(evals=EVALS, rewards=[VERIFIER])).score(rows).sources["verifier"]
    assert (scores.failed, scores.not_applicable) == (0, 1)
    assert math.isnan(scores.totals[1])


def test_conversations_are_scored_behind_their_template(stage, context, talker):
    rewards = [{"type": "lexical", "measure": {"type": "length", "unit": "words", "target": 2}}]
    rows = [{"prompt": [{"role": "user", "content": "I like it"}], "completion": "good film"}]
    scored = context(stage(evals=EVALS, model={"path": str(talker)}, rewards=rewards)).score(rows)
    assert scored.texts == ["good film"]


def test_a_model_that_sampled_stands_in_for_the_policy(stage, context, small_policy, prm):
    made = context(stage(evals=EVALS))
    same = made.scorer.sampled_by(made.load_model(made.policy_config.model_copy(update={"path": str(prm)})))
    assert same(ROWS).sources["implicit_prm"].totals == pytest.approx(np.zeros(4), abs=1e-6)
