import itertools
import os
from pathlib import Path

import pytest

from rlhf_kit.data.config import Gsm8kSolutions
from rlhf_kit.data.gsm8k import GENERATORS, gsm8k_rows
from rlhf_kit.data.load import load_data
from rlhf_kit.data.verifiers import verify


def problem(*correct):
    solutions = {
        name: {"is_correct": right, "solution": f"{name}: 2 * 2 = <<2*2=4>>4\nA: {4 if right else 5}"}
        for name, right in zip(GENERATORS, correct, strict=True)
    }
    return {"question": "Twice two?", "ground_truth": "2 * 2 = <<2*2=4>>4\nA: 4", **solutions}


def test_every_solution_is_a_row_with_its_label():
    rows = gsm8k_rows(problem(True, False, False, True), paired=False, calculator_annotations=False)
    assert [row["label"] for row in rows] == [True, False, False, True]
    assert [row["generator"] for row in rows] == list(GENERATORS)
    assert rows[1] == {
        "prompt": "Twice two?",
        "answer": "4",
        "completion": "6b_verification: 2 * 2 = 4\nA: 5",
        "label": False,
        "generator": "6b_verification",
    }


def test_annotations_stay_when_asked_for():
    (row, *_) = gsm8k_rows(problem(True, False, False, True), paired=False, calculator_annotations=True)
    assert row["completion"] == "6b_finetuning: 2 * 2 = <<2*2=4>>4\nA: 4"


def test_an_annotation_that_was_cut_off_goes_too():
    cut = problem(True, False, False, True)
    cut["6b_finetuning"]["solution"] = "2 * 2 = <<2*2=4>>4 and 4 / 3 = <<4/3=1.33"
    (row, *_) = gsm8k_rows(cut, paired=False, calculator_annotations=False)
    assert row["completion"] == "2 * 2 = 4 and 4 / 3 = "


@pytest.mark.parametrize("correct", itertools.product([True, False], repeat=4))
def test_pairs_are_all_combinations_of_right_and_wrong(correct):
    rows = gsm8k_rows(problem(*correct), paired=True, calculator_annotations=False)
    names = [name for name, right in zip(GENERATORS, correct, strict=True) if right]
    others = [name for name in GENERATORS if name not in names]
    pairs = [(row["chosen_generator"], row["rejected_generator"]) for row in rows]
    assert pairs == list(itertools.product(names, others))
    assert all(verify("exact", row["chosen"], row) == 1.0 for row in rows)
    assert all(verify("exact", row["rejected"], row) == 0.0 for row in rows)


def test_a_missing_field_is_named():
    row = problem(True, False, False, True)
    del row["ground_truth"]
    with pytest.raises(ValueError, match="lacks ground_truth"):
        gsm8k_rows(row, paired=False, calculator_annotations=False)


def test_the_exact_verifier_agrees_with_the_published_labels():
    path = Path(os.environ.get("RLHF_KIT_DATA", "")) / "gsm8k" / "example_model_solutions.jsonl"
    if not path.is_file():
        pytest.skip("RLHF_KIT_DATA names no folder with gsm8k/example_model_solutions.jsonl")
    data = load_data(Gsm8kSolutions(type="gsm8k_solutions", path=str(path), limit=300))
    assert len(data) == 1200
    for row in data.to_list():
        assert (verify("exact", row["completion"], row) == 1.0) == row["label"]
