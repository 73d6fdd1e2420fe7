import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_kit.data.tasks import (
    LARGE_EXPONENT,
    POWER_OF_POWER,
    _tag,
    _untag,
    reasoning_gym,
    reasoning_gym_score,
    running_sums,
    running_sums_vocabulary,
)


@settings(max_examples=50)
@given(st.integers(1, 8), st.integers(5, 40), st.integers())
def test_every_step_adds_the_next_number_modulo_the_modulus(terms, modulus, seed):
    for row in running_sums(10, terms, modulus, seed):
        assert row["prompt"].endswith(" =")
        numbers = [int(number) for number in row["prompt"].removesuffix(" =").split()]
        assert len(numbers) == terms + 1
        assert all(0 <= number < modulus for number in numbers)
        assert row["steps"] == [str(sum(numbers[: k + 2]) % modulus) for k in range(terms)]
        assert row["completion"] == " ".join(row["steps"])
        assert row["answer"] == str(sum(numbers) % modulus)


def test_running_sums_depend_on_the_seed_alone():
    assert running_sums(50, 6, 23, seed=3) == running_sums(50, 6, 23, seed=3)
    assert running_sums(20, 6, 23, seed=3) == running_sums(50, 6, 23, seed=3)[:20]


@pytest.mark.parametrize("seed", [-1, 1, 2**40])
def test_other_seeds_give_other_problems(seed):
    training = {row["prompt"] for row in running_sums(5000, 8, 23, seed=0)}
    held_out = {row["prompt"] for row in running_sums(1000, 8, 23, seed=seed)}
    assert not training & held_out


def test_a_seed_and_its_negative_differ():
    assert running_sums(20, 8, 23, seed=1) != running_sums(20, 8, 23, seed=-1)


def test_running_sums_are_distinct_to_the_last_problem():
    rows = running_sums(6, terms=1, modulus=3, seed=0)
    assert {row["prompt"] for row in rows} == {f"{a} {b} =" for a in range(3) for b in (1, 2)}
    with pytest.raises(ValueError, match="has 6 different problems, and size is 7"):
        running_sums(7, terms=1, modulus=3, seed=0)


def test_the_vocabulary_has_every_word_and_no_other():
    words = {word for row in running_sums(200, 4, 7, seed=0) for word in f"{row['prompt']} {row['completion']}".split()}
    assert sorted(words) == sorted(running_sums_vocabulary(7))


def test_reasoning_gym_rows_carry_question_answer_and_completion():
    rows = reasoning_gym("chain_sum", 5, 0, {"min_terms": 2, "max_terms": 2}, "Answer: {answer}")
    assert len(rows) == 5
    for row in rows:
        expression = json.loads(row["reasoning_gym_entry"])["metadata"]["expression"]
        left, sign, right = expression.split()
        assert expression in row["prompt"]
        assert int(row["answer"]) == int(left) + (int(right) if sign == "+" else -int(right))
        assert row["completion"] == f"Answer: {row['answer']}"


def test_neighbouring_seeds_share_no_reasoning_gym_entries():
    params = {"min_digits": 6, "max_digits": 6}
    first = {row["prompt"] for row in reasoning_gym("chain_sum", 100, 0, params)}
    second = {row["prompt"] for row in reasoning_gym("chain_sum", 100, 1, params)}
    assert len(first) == len(second) == 100
    assert not first & second


def test_a_task_without_one_right_answer_has_no_completion():
    (row,) = reasoning_gym("graph_color", 1, 0, {})
    assert row["answer"] is None
    assert "completion" not in row


def test_an_unknown_task_names_its_neighbours():
    with pytest.raises(ValueError, match="'chain_sums': did you mean chain_sum"):
        reasoning_gym("chain_sums", 1, 0, {})


@pytest.mark.parametrize("params", [{"min_term": 2}, {"min_terms": 5, "max_terms": 2}])
def test_parameters_that_the_task_refuses_are_named(params):
    with pytest.raises(ValueError, match=rf"'chain_sum' refuses params .*{next(iter(params))}"):
        reasoning_gym("chain_sum", 1, 0, params)


keys = st.text(alphabet="ab") | st.integers() | st.tuples(st.integers(), st.integers())
trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=10,
)


@settings(max_examples=30)
@given(trees)
def test_an_entry_survives_json_with_tuples_and_keys(tree):
    assert _untag(json.loads(json.dumps(_tag(tree)))) == tree


@pytest.mark.parametrize("modulus", [7, 23])
def test_multiplier_ten_gives_the_remainders_of_long_division(modulus):
    for row in running_sums(20, 6, modulus, seed=1, largest=min(9, modulus - 1), multiplier=10):
        numbers = row["prompt"].removesuffix(" =").split()
        # The first number may have two digits; the digits behind it are brought down one by one.
        remainders = [int(numbers[0] + "".join(numbers[1 : k + 2])) % modulus for k in range(6)]
        assert row["steps"] == [str(remainder) for remainder in remainders]


@pytest.mark.parametrize(
    "answer", ["9**9**9", "9**(9**9)", "9 ** 99999", "((9**999)**999)**999", "9^9^9", "9**(9*9**9)"]
)
def test_an_answer_that_could_not_be_computed_is_wrong(answer) -> None:
    (row,) = reasoning_gym("chain_sum", 1, 0, {})
    assert reasoning_gym_score(answer, row) == 0.0


@pytest.mark.parametrize("answer", ["3*x**2 + y**10 - 4", "(x + 1)**2", "x^2", "2**(-1)", "a ^ b"])
def test_ordinary_powers_are_left_to_the_scorer(answer) -> None:
    assert not (LARGE_EXPONENT.search(answer) or POWER_OF_POWER.search(answer))
