"""Log-probabilities of choices from the tokens that a server shows."""

from __future__ import annotations

from math import inf, log, nan

import pytest

from rlhf_kit.judges.choices import choice_log_probs


def shown(**probabilities: float) -> list[tuple[str, float]]:
    """Tokens, a leading `_` for a space, with their log-probabilities."""
    return [(token.replace("_", " "), log(p)) for token, p in probabilities.items()]


def test_the_surface_forms_of_a_choice_add_up() -> None:
    top = shown(Yes=0.4, _yes=0.1, YES=0.05, No=0.2, _no=0.1, Yesterday=0.05, Well=0.1)
    assert choice_log_probs(top, ["yes", "no"]) == pytest.approx([log(0.55), log(0.3)])


def test_a_token_that_is_shown_twice_counts_once() -> None:
    assert choice_log_probs([*shown(Yes=0.4, No=0.5), ("Yes", log(0.4))], ["Yes", "No"])[0] == pytest.approx(log(0.4))


def test_a_choice_that_is_not_shown_is_less_likely_than_what_is_not_shown() -> None:
    assert choice_log_probs(shown(Yes=0.9, Well=0.08), ["Yes", "No"]) == pytest.approx([log(0.9), log(0.02)])
    assert choice_log_probs(shown(Yes=0.5, Well=0.1), ["Yes", "No"]) == pytest.approx([log(0.5), log(0.1)])


def test_a_word_in_pieces_is_known_by_its_first_piece() -> None:
    top = shown(help=0.5, un=0.3, I=0.1)
    assert choice_log_probs(top, ["helpful", "unhelpful"]) == pytest.approx([log(0.5), log(0.3)])


def test_a_piece_does_not_count_beside_the_whole_word_nor_for_two_words() -> None:
    top = shown(Incorrect=0.3, In=0.2, Correct=0.4)
    assert choice_log_probs(top, ["correct", "incorrect"]) == pytest.approx([log(0.4), log(0.3)])
    with pytest.raises(ValueError, match="none of the choices 'great', 'good'"):
        choice_log_probs(shown(G=0.9, I=0.1), ["great", "good"])


def test_a_letter_keeps_its_case() -> None:
    top = shown(a=0.5, A=0.2, _B=0.1)
    assert choice_log_probs(top, ["A", "B"]) == pytest.approx([log(0.2), log(0.1)])


def test_without_any_choice_there_is_nothing_to_say() -> None:
    with pytest.raises(ValueError, match="'Yes', 'No' is among the 2 likeliest first tokens"):
        choice_log_probs(shown(Well=0.5, The=0.4), ["Yes", "No"])


@pytest.mark.parametrize("value", [nan, inf, 800.0, 0.5])
def test_what_is_no_log_probability_is_refused_wherever_it_stands(value: float) -> None:
    for top in ([("Yes", value), ("No", -1.0)], [("Yes", -0.5), ("No", -1.0), ("Well", value)]):
        with pytest.raises(ValueError, match=f"that of '(Yes|Well)' is {value:g}"):
            choice_log_probs(top, ["Yes", "No"])


def test_rounding_above_a_certainty_is_a_certainty_and_an_impossible_token_may_be_shown() -> None:
    assert choice_log_probs([("Yes", 1e-3), ("No", -inf)], ["Yes", "No"]) == [0.0, -inf]
