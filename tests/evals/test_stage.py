"""An `eval` stage from end to end on small models: every figure against the rows that it is of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf_kit.errors import RunError
from rlhf_kit.evals.best_of_n import final_answer
from rlhf_kit.evals.reliability import brier, calibration_error
from rlhf_kit.evals.run import run_eval
from rlhf_kit.evals.stage import Eval
from rlhf_kit.evals.steps import Solution, first_error_report
from rlhf_kit.trainers.sampling import sample_completions

PAIRS = [
    {"prompt": "1 2 =", "chosen": "3 5 1", "rejected": "3", "subset": "a"},
    {"prompt": "1 2 =", "chosen": "4 1", "rejected": "0 6", "subset": "a"},
    {"prompt": "4 =", "chosen": "6 6 6", "rejected": "6 6 6", "subset": "b"},
    {"prompt": "3 3 =", "chosen": "2", "rejected": "1 1 1 1", "subset": "b"},
    {"prompt": "5 =", "chosen": "2 2", "rejected": "1 0", "subset": "b"},
]
LABELLED = [
    {"prompt": prompt, "completion": completion, "label": label, "answer": answer}
    for prompt, answer, group in [
        ("1 2 =", "3", [("3", 1), ("0 3", 1), ("4", 0), ("4 4", 0)]),
        ("4 =", "6", [("6 6", 1), ("5", 0), ("5 5", 0), ("2 6 1", 0)]),
        ("3 3 =", "1", [("1", 1), ("2 1", 1), ("1 0", 0), ("1 1", 1)]),
    ]
    for completion, label in group
]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs a stage in one folder; gives what is in the files of its evaluations."""

    def go(stage: Eval, **options: Any) -> dict[str, Any]:
        run_eval(stage, tmp_path / "stage", sampler=sample_completions, **options)
        return read(tmp_path / "stage")

    return go


def read(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "evals").glob("*.json")}


def test_preference_accuracy(stage, context, run, jsonl):
    own = stage(evals={"pairs": {"type": "preference_accuracy", "data": jsonl(PAIRS)}})
    sides = [{"prompt": row["prompt"], "completion": row[side]} for row in PAIRS for side in ("chosen", "rejected")]
    totals = context(own).score(sides).sources["implicit_prm"].totals.reshape(-1, 2)
    hits = np.where(totals[:, 0] == totals[:, 1], 0.5, totals[:, 0] > totals[:, 1])
    figures = run(own)["pairs"]["figures"]
    assert figures["implicit_prm.accuracy"]["value"] == pytest.approx(hits.mean())
    assert figures["implicit_prm.accuracy"]["count"] == 4  # prompts, one of which has two pairs
    assert figures["implicit_prm.accuracy.a"]["value"] == pytest.approx(hits[:2].mean())
    assert figures["implicit_prm.accuracy.b"]["value"] == pytest.approx(hits[2:].mean())
    assert figures["implicit_prm.ties"]["value"] == pytest.approx(0.2)  # the pair of equal texts
    # Longer in tokens: right, equal, equal, wrong, equal.
    assert figures["length only.accuracy"]["value"] == pytest.approx((1 + 0.5 + 0.5 + 0 + 0.5) / 5)
    assert figures["length only.ties"]["value"] == pytest.approx(0.6)
    assert figures["implicit_prm.minus_length"]["value"] == pytest.approx(hits.mean() - 0.5)


def test_pairs_are_scored_by_the_tokens_that_were_sampled(stage, context, run, jsonl):
    """One completion was cut off, so that its ids lack the end of sequence, which its text alone would be given."""
    row = {"prompt": "1 2 =", "chosen": "3 5", "rejected": "4 1"}
    own = stage(evals={"pairs": {"type": "preference_accuracy", "data": jsonl([row])}})
    assert run(own)["pairs"]["figures"]["length only.accuracy"]["value"] == 0.5
    tokenizer = context(own).tokenizer
    ids = {side: tokenizer(row[side])["input_ids"] for side in ("chosen", "rejected")}
    jsonl([{**row, "chosen_ids": ids["chosen"], "rejected_ids": [*ids["rejected"], tokenizer.eos_token_id]}])
    figures = run(own)["pairs"]["figures"]
    assert figures["length only.accuracy"]["value"] == 0.0
    sampled = [
        {"prompt": "1 2 =", "completion": "3 5", "completion_ids": ids["chosen"]},
        {"prompt": "1 2 =", "completion": "4 1"},
    ]
    chosen, rejected = context(own).score(sampled).sources["implicit_prm"].totals
    assert figures["implicit_prm.accuracy"]["value"] == float(chosen > rejected)


def test_pairs_of_labelled_completions_are_all_right_ones_against_all_wrong_ones(stage, context, run, jsonl):
    own = stage(evals={"pairs": {"type": "preference_accuracy", "pairs": "labelled", "data": jsonl(LABELLED)}})
    totals = context(own).score(LABELLED).sources["implicit_prm"].totals
    hits = [
        float(totals[i] > totals[j])
        for i, right in enumerate(LABELLED)
        for j, wrong in enumerate(LABELLED)
        if right["prompt"] == wrong["prompt"] and right["label"] == 1 and wrong["label"] == 0
    ]
    figures = run(own)["pairs"]["figures"]
    assert len(hits) == 4 + 3 + 3
    assert figures["implicit_prm.accuracy"]["value"] == pytest.approx(np.mean(hits))


def test_a_pair_with_a_failed_completion_is_left_out_and_counted(stage, run, jsonl):
    own = stage(
        rewards=[{"type": "function", "function": "f"}],
        evals={"pairs": {"type": "preference_accuracy", "data": jsonl(PAIRS)}},
    )

    def judge(completions: list[str], **columns: Any) -> list[float]:
        return [float("nan") if text == "4 1" else float(len(text)) for text in completions]

    figures = run(own, functions={"f": judge})["pairs"]["figures"]
    assert figures["f.left_out"]["value"] == pytest.approx(1 / 5)
    assert figures["f.accuracy"]["value"] == pytest.approx((1 + 0.5 + 0 + 0.5) / 4)


def chosen(scores: np.ndarray, labels: np.ndarray, size: int) -> float:
    """The mean label of the best of every subset; equal scores share."""
    subsets = [list(subset) for subset in combinations(range(len(scores)), size)]
    return float(np.mean([labels[own][scores[own] == scores[own].max()].mean() for own in subsets]))


def test_best_of_n(stage, context, run, jsonl):
    own = stage(evals={"best": {"type": "best_of_n", "data": jsonl(LABELLED), "step_pattern": " "}})
    scored = context(own).score(LABELLED)
    totals = scored.sources["implicit_prm"].totals.reshape(3, 4)
    least = scored.least_step("implicit_prm", " ").reshape(3, 4)
    labels = np.array([row["label"] for row in LABELLED]).reshape(3, 4)
    figures = run(own)["best"]["figures"]
    assert figures["any right (oracle).1"]["value"] == pytest.approx(labels.mean())
    assert figures["any right (oracle).4"]["value"] == 1.0
    for name, scores in (("implicit_prm", totals), ("implicit_prm, least step", least)):
        means = {n: np.mean([chosen(scores[row], labels[row], n) for row in range(3)]) for n in (1, 2, 4)}
        for size, mean in means.items():
            assert figures[f"best by {name}.{size}"]["value"] == pytest.approx(mean)
        assert figures[f"best by {name}.gain"]["value"] == pytest.approx(means[4] - means[1])
    # Answers are the last words: 3 3 4 4 is a draw, 6 5 5 1 is won by 5, 1 1 0 1 by 1.
    assert figures["majority vote.4"]["value"] == pytest.approx((0.5 + 0 + 1) / 3)


def test_best_of_n_by_a_source_that_judges_nothing_is_refused(stage, run, jsonl):
    rows = [{name: value for name, value in row.items() if name != "answer"} for row in LABELLED]
    rewards = [{"type": "verifier", "verifier": "exact"}]
    own = stage(rewards=rewards, evals={"best": {"type": "best_of_n", "data": jsonl(rows)}})
    with pytest.raises(RunError, match=r"evals.best: source 'verifier' could judge no completion"):
        run(own)


def test_best_of_n_by_a_verifier_and_without_a_model(run, jsonl):
    rows = [{name: value for name, value in row.items() if name != "label"} for row in LABELLED]
    content = {"type": "eval", "evals": {"best": {"type": "best_of_n", "data": jsonl(rows), "verifier": "exact"}}}
    figures = run(Eval.model_validate(content))["best"]["figures"]
    # By the last word: 3 3 4 4, 6 5 5 1, 1 1 0 1 against 3, 6, 1.
    assert figures["any right (oracle).1"]["value"] == pytest.approx((2 + 1 + 3) / 12)
    assert sorted({name.partition(".")[0] for name in figures}) == ["any right (oracle)", "majority vote"]


def test_prompts_with_fewer_completions_are_left_out_and_counted(run, jsonl):
    rows = [*LABELLED, {"prompt": "0 =", "completion": "0", "label": 1, "answer": "0"}]
    content = {"type": "eval", "evals": {"best": {"type": "best_of_n", "data": jsonl(rows)}}}
    found = run(Eval.model_validate(content))["best"]
    assert found["figures"]["majority vote.1"]["count"] == 3
    assert any(note.startswith("1 prompts have fewer") for note in found["notes"])


@pytest.mark.parametrize(
    ("text", "pattern", "answer"),
    [
        ("so it is 7.", None, "7"),
        ("7\n#### 1,200.50", None, "1200.5"),
        (r"\boxed{x+1} is it", None, "x+1"),
        ("007", None, "7"),
        ("", None, ""),
        ("a=1 b=2", r"=(\d)", "2"),
        ("nothing", r"=(\d)", ""),
    ],
)
def test_final_answers(text, pattern, answer):
    assert final_answer(text, pattern) == answer


@pytest.mark.parametrize("offset", ["none", "base_rate", 0.7])
def test_calibration(stage, context, run, jsonl, offset):
    rows = LABELLED[:-1]  # 5 of 11 are right
    own = stage(evals={"cal": {"type": "calibration", "data": jsonl(rows), "bins": 3, "offset": offset}})
    totals = context(own).score(rows).sources["implicit_prm"].totals
    labels = np.array([row["label"] for row in rows], dtype=float)
    rate = labels.mean()
    added = {"none": 0.0, "base_rate": np.log(rate / (1 - rate))}.get(offset, offset)
    probabilities = 1 / (1 + np.exp(-(totals + added)))
    figures = run(own)["cal"]["figures"]
    assert figures["implicit_prm.brier"]["value"] == pytest.approx(brier(probabilities, labels))
    assert figures["implicit_prm.ece_mass"]["value"] == pytest.approx(
        calibration_error(probabilities, labels, 3, "mass")
    )
    assert figures["implicit_prm.ece_width"]["value"] == pytest.approx(
        calibration_error(probabilities, labels, 3, "width")
    )
    assert figures["implicit_prm.brier_base_rate"]["value"] == pytest.approx(rate * (1 - rate))


def test_the_share_of_a_bin_has_an_interval_over_prompts(stage, run, jsonl):
    """Ten rows of one prompt are all right and ten of another all wrong: drawn two at a time, their share is 0 or 1."""
    rows = [{"prompt": f"{k} =", "completion": "1", "label": k} for k in (0, 1) for _ in range(10)]
    rows += [{"prompt": "2 =", "completion": "3", "label": 1}] * 5
    evals = {"cal": {"type": "calibration", "data": jsonl(rows), "bins": 2}}
    own = stage(rewards=[{"type": "function", "function": "f"}], evals=evals)

    def judge(completions: list[str], **columns: Any) -> list[float]:
        return [-1.0 if text == "1" else 2.0 for text in completions]

    (table,) = [t for t in run(own, functions={"f": judge})["cal"]["tables"] if t["title"].startswith("Reliability")]
    (_, count, _, low), (_, few, _, high) = table["rows"]
    assert (count, low) == (20, {"value": 0.5, "low": 0.0, "high": 1.0, "count": 2})
    assert (few, high) == (5, {"value": 1.0, "low": None, "high": None, "count": 1})


def test_scores_that_are_no_probabilities_are_refused(stage, run, jsonl):
    own = stage(evals={"cal": {"type": "calibration", "data": jsonl(LABELLED), "scores": "probability"}})
    with pytest.raises(RunError, match=r"evals.cal: source 'implicit_prm' gives scores from .* no probabilities"):
        run(own)


def test_first_error_on_a_processbench_file(stage, context, run, tmp_path):
    generator = np.random.default_rng(0)
    solutions = []
    for number in range(24):
        steps = tuple(str(generator.integers(7)) for _ in range(3))
        problem = f"{number // 7} {number % 7} ="
        solutions.append(Solution(problem, steps, int(generator.integers(3)) if number % 2 else -1))
    path = tmp_path / "bench.json"
    path.write_text(json.dumps([{"problem": s.problem, "steps": s.steps, "label": s.label} for s in solutions]))
    own = stage(evals={"errors": {"type": "first_error", "path": str(path), "separator": " "}})
    rows = [{"prompt": s.problem, "completion": " ".join(s.steps)} for s in solutions]
    tokens = context(own).score(rows).sources["implicit_prm"].tokens
    sums = [[row[0], row[1], row[2] + row[3]] for row in tokens]  # a word a step, the end with the last
    report = first_error_report(solutions, sums)
    figures = run(own)["errors"]["figures"]
    assert figures["implicit_prm.f1"]["value"] == pytest.approx(report.result.f1)
    assert figures["implicit_prm.erroneous"]["value"] == pytest.approx(report.result.error_accuracy)
    assert figures["implicit_prm.correct"]["value"] == pytest.approx(report.result.correct_accuracy)
    assert figures["implicit_prm.step_auc"]["value"] == pytest.approx(report.step_auc)
    assert {"chance alone.f1", "length alone.f1", "position alone.f1"} <= set(figures)


def test_first_error_on_completions_with_known_steps(stage, context, run, jsonl):
    steps = ["3", "5", "1"]
    said = ["3 5 1", "3 6 1", "2 5 1", "3 5 1 4", "3 5 1"]
    # Right, wrong in the second step, in the first, one step too many, right: cut behind the first wrong one.
    cut = [("3 5 1", -1), ("3 6", 1), ("2", 0), ("3 5 1 4", 3), ("3 5 1", -1)] * 4
    rows = [
        {"prompt": f"{number // 7} {number % 7} =", "completion": text, "steps": steps}
        for number, text in enumerate(said * 4)
    ]
    rows += [{**row, "completion": "6"} for row in rows]  # a second completion of a prompt does not count
    truth = {"column": "steps", "separator": " "}
    own = stage(evals={"errors": {"type": "first_error", "data": jsonl(rows), "truth": truth}})
    solutions = [
        Solution(row["prompt"], tuple(text.split()), label) for row, (text, label) in zip(rows, cut, strict=False)
    ]
    shown = [{"prompt": s.problem, "completion": " ".join(s.steps)} for s in solutions]
    tokens = context(own).score(shown).sources["implicit_prm"].tokens
    report = first_error_report(solutions, [[*row[:-2], row[-2] + row[-1]] for row in tokens])
    figures = run(own)["errors"]["figures"]
    assert figures["implicit_prm.f1"]["value"] == pytest.approx(report.result.f1)
    assert figures["implicit_prm.f1"]["count"] == report.count == 10


# --- keeping ---


def test_what_is_done_is_not_repeated_and_a_change_repeats_what_depends_on_it(stage, run, jsonl, tmp_path):
    evals = {
        "pairs": {"type": "preference_accuracy", "data": jsonl(PAIRS, "pairs")},
        "best": {"type": "best_of_n", "data": jsonl(LABELLED, "labelled")},
    }
    run(stage(evals=evals))
    files = {name: tmp_path / "stage" / "evals" / f"{name}.json" for name in evals}
    for file in files.values():
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "notes": ["kept"]}))
    assert all(found["notes"] == ["kept"] for found in run(stage(evals=evals)).values())
    jsonl(PAIRS[:4], "pairs")  # the same file with other contents
    found = run(stage(evals=evals))
    assert found["best"]["notes"] == ["kept"]
    assert found["pairs"]["notes"] != ["kept"]
    evals["best"]["num_completions"] = 3
    assert run(stage(evals=evals))["best"]["notes"] != ["kept"]
    del evals["pairs"]
    assert set(run(stage(evals=evals))) == {"best"}


def test_other_sources_repeat_the_best_of_n_that_they_choose_in(stage, run, jsonl, prm):
    evals = {"best": {"type": "best_of_n", "data": jsonl(LABELLED)}}
    first = run(stage(evals=evals))["best"]["fingerprint"]
    assert run(stage(evals=evals))["best"]["fingerprint"] == first
    other = [{"type": "implicit_prm", "path": str(prm), "beta": 0.1}]
    assert run(stage(evals=evals, rewards=other))["best"]["fingerprint"] != first


def test_completions_are_sampled_once_for_all_evaluations_that_name_them(stage, run, small_policy, tmp_path):
    prompts = {"type": "running_sums", "size": 6, "terms": 2, "modulus": 7}
    data = {"type": "sampled", "model": str(small_policy), "prompts": prompts, "verifier": "exact"}
    data |= {"num_generations": 4, "max_new_tokens": 4}
    evals = {"best": {"type": "best_of_n", "data": data}, "cal": {"type": "calibration", "data": data}}
    found = run(stage(evals=evals))
    assert len(list((tmp_path / "stage" / "sampled").iterdir())) == 1
    assert found["best"]["figures"]["majority vote.1"]["count"] == 6


DRIVER = """
import json, os, signal, sys
from pathlib import Path
from rlhf_kit.evals import calibration
from rlhf_kit.evals.run import run_eval
from rlhf_kit.evals.stage import Eval

stage, folder = Eval.model_validate(json.loads(sys.argv[1])), Path(sys.argv[2])
calibration.Calibration.run = lambda self, context: os.kill(os.getpid(), signal.SIGKILL)
run_eval(stage, folder)
"""


def test_a_killed_stage_goes_on_with_what_is_left(stage, run, jsonl, tmp_path):
    evals = {
        "pairs": {"type": "preference_accuracy", "data": jsonl(PAIRS, "pairs")},
        "cal": {"type": "calibration", "data": jsonl(LABELLED, "labelled")},
    }
    own = stage(evals=evals)
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    arguments = [sys.executable, "-c", DRIVER, own.model_dump_json(), str(tmp_path / "stage")]
    killed = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr[-2000:]
    assert set(read(tmp_path / "stage")) == {"pairs"}
    written = (tmp_path / "stage" / "evals" / "pairs.json").stat().st_mtime_ns
    assert set(run(own)) == {"pairs", "cal"}
    assert (tmp_path / "stage" / "evals" / "pairs.json").stat().st_mtime_ns == written


def test_a_damaged_file_is_evaluated_again(stage, run, jsonl, tmp_path):
    own = stage(evals={"pairs": {"type": "preference_accuracy", "data": jsonl(PAIRS)}})
    run(own)
    (tmp_path / "stage" / "evals" / "pairs.json").write_text('{"figures"')
    assert run(own)["pairs"]["figures"]
