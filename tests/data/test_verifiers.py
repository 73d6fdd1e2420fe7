import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.data.tasks import reasoning_gym as reasoning_gym_rows
from rlhf_kit.data.verifiers import marked_answer, verify


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("3 + 4 is 7\n#### 7", "7"),
        ("A: 5\nNo.\nA: 7", "7"),
        ("The answer: 7\nThat was easy.", "7"),
        ("Answer:\n7", "7"),
        (r"So \boxed{7} it is", "7"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("22 2 7", "7"),
        ("it is blue whale", "blue whale"),
        ("A: 1,234,567", "1234567"),
        ("A: $12.50.", "12.5"),
        (r"A: \$7", "7"),
        ("A: 007", "7.0"),
        ("A: -.5", "-0.5"),
        ("#### 18", "She sells 9.\nShe makes 9 * 2 = $<<9*2=18>>18.\n#### 18"),
        ("7", 7),
    ],
)
def test_exact_accepts_the_right_answer(completion, answer):
    assert verify("exact", completion, {"answer": answer}) == 1.0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("A: 7\nA: 8", "7"),
        ("7 8", "7"),
        ("A:", "7"),
        ("", "7"),
        ("A: 17", "7"),
        ("A: 7 or 8", "7"),
        ("QA: 7 and then 8", "7"),
        ("A: 1,2", "12"),
        ("A: 7.01", "7"),
        ("A: 1e400000000", "7"),
        ("A: nan", "7"),
        (r"\boxed{8", "7"),
    ],
)
def test_exact_rejects_a_wrong_answer(completion, answer):
    assert verify("exact", completion, {"answer": answer}) == 0.0


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_exact_is_equality_on_integers(answer, gold):
    assert verify("exact", f"A: {answer:,}", {"answer": str(gold)}) == float(answer == gold)
    assert verify("exact", f"so it is {gold}.0", {"answer": str(gold)}) == 1.0


@given(st.text())
def test_any_completion_gets_a_verdict(completion):
    assert verify("exact", completion, {"answer": "7"}) in (0.0, 1.0)


def test_an_answer_is_marked_or_none():
    assert marked_answer("no marker at all") is None
    assert marked_answer("A: yes  ") == "yes"


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        (r"Thus \boxed{\frac{1}{2}}.", "0.5", 1.0),
        (r"Thus \boxed{\frac{2}{4}}.", "1/2", 1.0),
        (r"Thus $2x + x^2$", "x^2+2x", 1.0),
        (r"Thus \boxed{(1, 2)}", "(1,2)", 1.0),
        ("A: 18", "She makes 9 * 2 = <<9*2=18>>18.\n#### 18", 1.0),
        (r"Thus \boxed{\frac{1}{3}}.", "0.5", 0.0),
        (r"Thus \boxed{(2, 1)}", "(1,2)", 0.0),
        ("I do not know", "0.5", 0.0),
        ("", "0.5", 0.0),
    ],
)
def test_math_compares_values_not_strings(completion, answer, score):
    assert verify("math", completion, {"answer": answer}) == score


def test_math_works_outside_the_main_thread():
    scores = []
    thread = threading.Thread(
        target=lambda: scores.append(verify("math", r"\boxed{1/2}", {"answer": "0.5"})),
    )
    thread.start()
    thread.join()
    assert scores == [1.0]


# `letter_counting` has short answers, `spiral_matrix` several numbers, `rotate_matrix` several lines,
# `decimal_arithmetic` a scorer that reads its parameters.
TASKS = ["letter_counting", "spiral_matrix", "rotate_matrix", "decimal_arithmetic"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "template",
    ["{answer}", "<answer>{answer}</answer> Done.", "I think.\nAnswer: {answer}", "Well:\n{answer}"],
)
def test_the_answer_of_an_entry_scores_one_in_every_form(task, template):
    for row in reasoning_gym_rows(task, 3, 0, {}, template):
        assert verify("reasoning_gym", row["completion"], row) == 1.0


def test_a_scorer_that_compares_tuples_gets_tuples():
    (row,) = reasoning_gym_rows("arc_agi", 1, 0, {})
    assert verify("reasoning_gym", row["completion"], row) == 1.0


@pytest.mark.parametrize("task", [*TASKS, "prime_factorization"])
@pytest.mark.parametrize("completion", ["", "rubbish", "<answer></answer>", "Answer:"])
def test_what_a_scorer_cannot_read_is_wrong(task, completion):
    for row in reasoning_gym_rows(task, 2, 0, {}):
        score = verify("reasoning_gym", completion, row)
        assert score is not None
        assert 0.0 <= score < 0.5


def test_the_last_tag_counts():
    (row,) = reasoning_gym_rows("chain_sum", 1, 0, {})
    right, wrong = f"<answer>{row['answer']}</answer>", "<answer>0.123</answer>"
    assert verify("reasoning_gym", wrong + right, row) == 1.0
    assert verify("reasoning_gym", right + wrong, row) != 1.0


def test_a_completion_cannot_run_code(tmp_path):
    (row,) = reasoning_gym_rows("countdown", 1, 0, {})
    trace = tmp_path / "trace"
    attack = f"<answer>__import__('pathlib').Path({str(trace)!r}).touch()</answer>"
    assert verify("reasoning_gym", attack, row) == 0.0
    assert not trace.exists()


@pytest.mark.parametrize("name", ["exact", "math", "reasoning_gym"])
@pytest.mark.parametrize("row", [{}, {"prompt": "hi"}, {"answer": None, "reasoning_gym_entry": None}])
def test_a_row_of_another_task_has_no_score(name, row):
    assert verify(name, "A: 7", row) is None


def test_an_unknown_verifier_is_refused():
    with pytest.raises(ValueError, match="no verifier is called 'exactly': choose one of exact, math"):
        verify("exactly", "7", {"answer": "7"})
