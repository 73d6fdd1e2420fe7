import hashlib
import itertools
import json
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kit.evals.steps import (
    Solution,
    accuracy_interval,
    auc,
    baseline_scores,
    best_threshold,
    bootstrap_interval,
    first_below,
    first_error_f1,
    first_error_report,
    load_processbench,
    step_auc,
    step_labels,
    threshold_split,
)


@pytest.mark.parametrize(
    ("completion", "separator", "labels"),
    [
        ("1 22 3", " ", [("1", True), ("22", True), ("3", True)]),
        ("1 22", " ", [("1", True), ("22", True)]),
        ("1 23 3", " ", [("1", True), ("23", False)]),
        ("2 22 3", " ", [("2", False)]),
        ("1 22 3 4 5", " ", [("1", True), ("22", True), ("3", True), ("4", False)]),
        (" 1  22 3", " ", [("1", True), ("22", True), ("3", True)]),
        ("1\n\n 22 \n3", "\n", [("1", True), ("22", True), ("3", True)]),
        ("1; 22", "; ", [("1", True), ("22", True)]),
        ("", " ", []),
    ],
)
def test_steps_are_right_until_one_is_wrong(completion, separator, labels):
    found = step_labels(completion, ["1", "22", "3"], separator)
    assert [(completion[start:end], right) for start, end, right in found] == labels


@given(st.lists(st.text("ab", min_size=1), min_size=1), st.lists(st.text("ab", min_size=1)))
def test_step_ranges_hold_the_steps_in_order(steps, gold):
    completion = "\n".join(steps)
    found = step_labels(completion, gold, "\n")
    agreeing = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(steps, gold, strict=False))))
    assert [right for _, _, right in found] == [True] * agreeing + [False] * (agreeing < len(steps))
    assert [completion[start:end] for start, end, _ in found] == steps[: len(found)]
    assert all(first[1] < second[0] for first, second in itertools.pairwise(found))


scores = st.lists(st.integers(-3, 3).map(float) | st.floats(-3, 3), min_size=1, max_size=12)


@given(scores, scores)
def test_auc_is_the_probability_that_a_positive_outscores_a_negative(positives, negatives):
    pairs = [1.0 if p > n else 0.5 if p == n else 0.0 for p in positives for n in negatives]
    assert auc(positives, negatives) == pytest.approx(sum(pairs) / len(pairs))


def test_auc_of_nothing_is_missing():
    assert auc([], [1.0]) is None
    assert auc([1.0], []) is None


@given(st.integers(1, 400), st.data())
def test_wilson_bounds_are_the_shares_whose_test_just_rejects(count, data):
    successes = data.draw(st.integers(0, count))
    low, high = accuracy_interval([True] * successes + [False] * (count - successes))
    share = successes / count
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1
    for bound in (low, high):
        # The bounds solve |share - bound| = 1.96 * sqrt(bound * (1 - bound) / count).
        assert abs(share - bound) == pytest.approx(
            1.959964 * math.sqrt(max(bound * (1 - bound), 0.0) / count), rel=1e-5, abs=1e-7
        )


def test_wilson_interval_of_a_published_example():
    # 81 of 263 (Newcombe, *Two-sided confidence intervals for the single proportion*, 1998, table I).
    low, high = accuracy_interval([True] * 81 + [False] * 182)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    with pytest.raises(ValueError, match="no trials"):
        accuracy_interval([])


def row(problem, steps, label):
    return {"problem": problem, "steps": steps, "label": label, "final_answer_correct": label < 0}


def processbench(folder, rows):
    path = folder / "rows.json"
    path.write_text(json.dumps(rows))
    return path


def test_one_solution_a_problem_whatever_the_order(tmp_path):
    rows = [row(f"problem {number % 7}", [f"step {number}", "end"], number % 3 - 1) for number in range(20)]
    solutions = load_processbench(processbench(tmp_path, rows))
    assert sorted(solution.problem for solution in solutions) == [f"problem {number}" for number in range(7)]
    known = {(each["problem"], tuple(each["steps"]), each["label"]) for each in rows}
    assert all((solution.problem, solution.steps, solution.label) in known for solution in solutions)
    random.Random(0).shuffle(rows)
    assert load_processbench(processbench(tmp_path, rows)) == solutions
    assert load_processbench(processbench(tmp_path, rows), limit=3) == solutions[:3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("p", ["s"], 0), row("p", ["s"], 1)], "row 2: label 1 is no step of 1"),
        ([row("p", ["s"], -2)], "row 1: label -2"),
        ([{"problem": "p"}], "row 1: there is no steps and no label"),
        ({"problem": "p"}, "a list of rows, and this is dict"),
        ([], "a list of rows"),
    ],
)
def test_broken_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        load_processbench(processbench(tmp_path, rows))


def test_first_error_f1_by_hand():
    # Of three erroneous solutions one is located; of two right ones, both are passed.
    result = first_error_f1([1, 0, -1, -1, -1], [1, 1, 2, -1, -1])
    assert result is not None
    assert (result.error_accuracy, result.correct_accuracy) == (pytest.approx(1 / 3), 1.0)
    assert result.f1 == pytest.approx(2 / (3 + 1))
    nothing = first_error_f1([-1, 0], [0, -1])
    assert nothing is not None
    assert nothing.f1 == 0.0
    assert first_error_f1([0], [0]) is None
    assert first_error_f1([-1], [-1]) is None


def test_the_first_step_below_the_threshold():
    assert first_below([0.9, 0.4, 0.1], 0.5) == 1
    assert first_below([0.9, 0.5], 0.5) == -1
    assert first_below([], 0.5) == -1


@given(
    st.lists(st.lists(st.sampled_from([0.1, 0.3, 0.6, 0.9]), min_size=1, max_size=4), min_size=2, max_size=8),
    st.data(),
)
def test_no_threshold_beats_the_best(step_scores, data):
    labels = [data.draw(st.integers(-1, len(each) - 1)) for each in step_scores[2:]]
    labels = [-1, 0, *labels]

    def f1(threshold):
        result = first_error_f1([first_below(each, threshold) for each in step_scores], labels)
        assert result is not None
        return result.f1

    grid = [threshold / 20 for threshold in range(-5, 30)]
    assert f1(best_threshold(step_scores, labels)) == max(map(f1, grid))


def test_a_threshold_needs_both_kinds():
    with pytest.raises(ValueError, match="2 have 2 erroneous ones"):
        best_threshold([[0.1], [0.2]], [0, 0])
    with pytest.raises(ValueError, match="needs both erroneous and right solutions, and 0 have 0"):
        best_threshold([], [])


def test_step_auc_compares_right_steps_with_first_wrong_ones():
    # Right: 0.9, 0.8 and 0.3; first wrong: 0.5. The step behind the wrong one, 0.0, is left out.
    assert step_auc([[0.9, 0.5, 0.0], [0.8, 0.3]], [1, -1]) == pytest.approx(2 / 3)
    assert step_auc([[0.9]], [-1]) is None


def test_the_split_keeps_problems_together_and_its_share():
    problems = [f"problem {number // 2}" for number in range(40)]
    chosen = threshold_split(problems, 0.25)
    assert chosen[::2] == chosen[1::2]
    assert sum(chosen) == 10
    assert dict(zip(problems, chosen, strict=True)) == dict(
        zip(reversed(problems), threshold_split(problems[::-1], 0.25), strict=True)
    )


def test_the_bootstrap_of_a_mean_has_its_standard_error():
    values = [math.sin(number) for number in range(400)]
    mean = sum(values) / 400
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / 400 / 400)
    interval = bootstrap_interval(lambda drawn: sum(values[i] for i in drawn) / 400, 400, resamples=2000)
    assert interval is not None
    assert interval[0] == pytest.approx(mean - 1.96 * error, abs=0.2 * error)
    assert interval[1] == pytest.approx(mean + 1.96 * error, abs=0.2 * error)


def test_undefined_resamples_are_left_out():
    assert bootstrap_interval(lambda drawn: None, 10, resamples=5) is None
    assert bootstrap_interval(lambda drawn: 1.0 if drawn[0] % 2 else None, 10, resamples=50) == (1.0, 1.0)


def solutions_of(count):
    """Solutions of 3 to 6 steps of varied length, half of them with a wrong step somewhere."""
    draw = random.Random(0)
    made = []
    for number in range(count):
        steps = tuple(
            hashlib.sha256(f"{number} {k}".encode()).hexdigest() * draw.randint(1, 4) for k in range(3 + number % 4)
        )
        made.append(Solution(f"problem {number}", steps, draw.randrange(len(steps)) if number % 2 else -1))
    return made


def test_scores_that_know_the_labels_are_perfect():
    solutions = solutions_of(60)
    known = [[float(step != each.label) for step in range(len(each.steps))] for each in solutions]
    report = first_error_report(solutions, known)
    assert report.result.f1 == report.step_auc == 1.0
    assert report.interval == (1.0, 1.0)
    assert 0.0 < report.threshold < 1.0
    assert report.count == 30


def test_the_threshold_is_not_set_on_the_problems_evaluated():
    solutions = solutions_of(60)
    fitted = threshold_split([each.problem for each in solutions], 0.5)
    known = [[float(step != each.label) for step in range(len(each.steps))] for each in solutions]
    # The evaluated problems' scores lie all above the threshold of the others, so no error is found.
    shifted = [each if fit else [score + 5 for score in each] for each, fit in zip(known, fitted, strict=True)]
    report = first_error_report(solutions, shifted)
    assert report.result.error_accuracy == 0.0
    assert report.result.correct_accuracy == 1.0


@settings(max_examples=5)
@given(st.integers(0, 1000))
def test_chance_stays_far_from_knowledge(seed):
    solutions = solutions_of(200)
    report = first_error_report(solutions, baseline_scores(solutions, seed)["chance"], resamples=200)
    assert report.result.f1 < 0.5
    assert report.interval is not None
    assert report.interval[0] <= report.result.f1 <= report.interval[1]
    assert report.step_auc == pytest.approx(0.5, abs=0.15)


def test_baselines_are_what_they_say():
    solutions = [Solution("p", ("aa", "bbbb", "c"), 1)]
    assert baseline_scores(solutions)["length"] == [[-2.0, -4.0, -1.0]]
    assert baseline_scores(solutions)["position"] == [[0.0, -1.0, -2.0]]
    assert baseline_scores(solutions, 1)["chance"] == baseline_scores(solutions, 1)["chance"]
    assert baseline_scores(solutions, 1)["chance"] != baseline_scores(solutions, 2)["chance"]


@pytest.mark.parametrize("scores", [[0.5], [0.5, 0.5, 0.5], [0.5, math.nan], [0.5, math.inf]])
def test_scores_that_do_not_fit_the_steps_are_refused(scores):
    with pytest.raises(ValueError, match="solution 1 has 2 steps, whose scores are"):
        first_error_report([Solution("p", ("a", "b"), 1)], [scores])
