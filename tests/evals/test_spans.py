"""Agreement of spans by hand-worked texts, and the lexicon that is the baseline."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.evals.spans import agreement, char_f1, lexicon, lexicon_spans, marked, mean_char_f1


@pytest.mark.parametrize(
    ("predicted", "gold", "expected"),
    [
        ([], [], 1.0),
        ([(0, 1)], [], 0.0),
        ([], [(0, 1)], 0.0),
        ([(0, 4)], [(2, 6)], 0.5),
        ([(0, 3), (5, 6)], [(0, 3)], 2 * 3 / (4 + 3)),
        ([(0, 4), (2, 4)], [(0, 4)], 1.0),
    ],
)
def test_character_f1_of_a_text(predicted, gold, expected) -> None:
    assert char_f1(predicted, gold) == pytest.approx(expected)
    assert char_f1(gold, predicted) == pytest.approx(expected)


def test_texts_count_the_same_whatever_their_length() -> None:
    assert mean_char_f1([[], [(0, 100)]], [[(0, 1)], [(0, 100)]]) == 0.5


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=12))
def test_precision_and_recall_are_shares_of_the_marked(pairs: list[tuple[int, int]]) -> None:
    found = agreement([ours for ours, _ in pairs], [theirs for _, theirs in pairs], 1)
    ours, theirs = [b == 1 for a, b in pairs if a == 1], [a == 1 for a, b in pairs if b == 1]
    assert found.precision == (sum(ours) / len(ours) if ours else 0.0)
    assert found.recall == (sum(theirs) / len(theirs) if theirs else 0.0)
    if found.precision and found.recall:
        assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))
    else:
        assert found.f1 == 0.0


def test_marked_neighbours_are_one_range_across_the_space_between_them() -> None:
    text = "you  bad dog, bad cat"
    segments = [(0, 3), (5, 8), (9, 12), (12, 13), (14, 17), (18, 21)]
    assert marked(text, segments, [0, 1, 1, 0, 1, 1], 1) == [(5, 12), (14, 21)]
    assert marked(text, segments, [2, 1, 2, 1, 0, 2], 2) == [(0, 3), (9, 12), (18, 21)]


def test_a_lexicon_has_the_words_that_are_mostly_annotated() -> None:
    texts = ["a bad dog", "Bad luck", "bad, he said", "a dog's day", "luck"]
    gold = [[(2, 9)], [(0, 3)], [], [], []]
    assert lexicon(texts, gold) == {"bad", "dog"}
    assert lexicon(texts, gold, least=0.9) == {"dog"}
    assert lexicon_spans("BAD dogs: a Dog!", frozenset({"bad", "dog"})) == [(0, 3), (12, 15)]


def test_half_of_the_occurrences_are_not_most_of_them() -> None:
    assert lexicon(["bad", "bad"], [[(0, 3)], []]) == frozenset()
