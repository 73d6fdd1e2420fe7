"""Which pairs a selection takes, against its definition on small tables and on random ones."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from rlhf_kit.pairs.select import Candidate, Pair, select_completions, select_pairs
from rlhf_kit.pairs.selection import SelectConfig

config = TypeAdapter(SelectConfig).validate_python


def candidates(*groups, truncated=(), lengths=None, texts=None) -> list[Candidate]:
    """Scores by prompt; places are counted through."""
    rows = [(prompt, score) for prompt, group in enumerate(groups) for score in group]
    return [
        Candidate(
            prompt,
            place,
            score,
            10 if lengths is None else lengths[place],
            f"text {place}" if texts is None else texts[place],
            place in truncated,
        )
        for place, (prompt, score) in enumerate(rows)
    ]


def chosen(rows, **selection) -> list[tuple[int, int]]:
    return [(pair.chosen, pair.rejected) for pair in select_pairs(rows, config(selection))]


TABLE = candidates([1.0, 4.0, 2.0], [5.0, 5.0], [0.0, 0.5])


def test_the_selections_on_a_hand_worked_table() -> None:
    assert chosen(TABLE, type="best_worst") == [(1, 0), (6, 5)]
    assert chosen(TABLE, type="large_margin", budget=1) == [(1, 0)]
    assert chosen(TABLE, type="small_margin") == [(2, 0), (6, 5)]
    assert chosen(TABLE, type="small_margin", budget=1) == [(6, 5)]
    assert chosen(TABLE, type="all_pairs") == [(1, 0), (2, 0), (1, 2), (6, 5)]
    assert chosen(TABLE, type="threshold", chosen=2.0, rejected=1.0) in ([(1, 0)], [(2, 0)])
    assert select_pairs(TABLE, config({"type": "best_worst"}))[0] == Pair(1, 0, 3.0)


def test_filters_take_out_pairs_and_not_prompts() -> None:
    assert chosen(TABLE, type="best_worst", min_margin=1.0) == [(1, 0)]
    assert chosen(TABLE, type="best_worst", max_margin=2.0) == [(1, 2), (6, 5)]
    unequal = candidates([1.0, 4.0, 2.0], lengths=[10, 90, 12])
    assert chosen(unequal, type="best_worst", max_length_gap=5) == [(2, 0)]
    assert chosen(unequal, type="best_worst", max_length_ratio=7.5) == [(1, 2)]
    assert chosen(unequal, type="best_worst", max_length_ratio=1.2) == [(2, 0)]
    cut = candidates([1.0, 4.0, 2.0], truncated={1})
    assert chosen(cut, type="best_worst") == [(2, 0)]
    assert chosen(cut, type="best_worst", truncated="keep") == [(1, 0)]


def test_a_completion_that_could_not_be_scored_is_in_no_pair() -> None:
    assert chosen(candidates([math.nan, 4.0, 2.0], [math.nan, 1.0]), type="all_pairs") == [(1, 2)]


def test_a_budget_by_round_and_the_last_for_all_later_ones() -> None:
    rows = candidates(*[[0.0, float(n)] for n in range(1, 7)])
    selection = config({"type": "large_margin", "budget": [4, 2]})
    assert [len(select_pairs(rows, selection, number)) for number in (1, 2, 3)] == [4, 2, 2]
    assert [pair.margin for pair in select_pairs(rows, selection, 2)] == [5.0, 6.0]


groups = st.lists(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=5), min_size=1, max_size=6)


@given(
    groups, st.sampled_from(["best_worst", "small_margin", "large_margin", "random", "all_pairs"]), st.integers(1, 4)
)
def test_every_pair_is_of_one_prompt_with_the_better_first_and_within_the_budget(given_groups, name, budget) -> None:
    rows = candidates(*given_groups)
    selection = config({"type": name, "budget": budget})
    pairs = select_pairs(rows, selection, seed=3)
    assert pairs == select_pairs(rows, selection, seed=3)
    assert len(pairs) <= budget
    for pair in pairs:
        best, worst = rows[pair.chosen], rows[pair.rejected]
        assert best.prompt == worst.prompt and pair.margin == best.score - worst.score > 0
    free = select_pairs(rows, config({"type": name}), seed=3)
    possible = [p for p in range(len(given_groups)) if len(set(given_groups[p])) > 1]
    if name == "all_pairs":
        assert len(free) == sum(a != b for group in given_groups for a, b in combinations(group, 2))
    else:
        assert [rows[pair.chosen].prompt for pair in free] == possible
    if name == "small_margin":
        least = [min(abs(a - b) for a, b in combinations(given_groups[p], 2) if a != b) for p in possible]
        assert [pair.margin for pair in free] == least
    if name in ("large_margin", "best_worst"):
        assert [pair.margin for pair in free] == [max(given_groups[p]) - min(given_groups[p]) for p in possible]


def test_random_pairs_are_not_always_the_same() -> None:
    rows = candidates(*[[0.0, 1.0, 2.0]] * 30)
    first, second = (
        [(p.chosen, p.rejected) for p in select_pairs(rows, config({"type": "random"}), seed=s)] for s in (1, 2)
    )
    assert first != second and len(set((c % 3, r % 3) for c, r in first)) == 3


def test_best_of_n_and_expert_iteration() -> None:
    best = config({"type": "best_of_n"})
    assert select_completions(TABLE, best) == [1, 3, 6]
    assert select_completions(TABLE, config({"type": "best_of_n", "min_score": 4.5})) == [3]
    same = candidates([1.0, 1.0, 0.0, 1.0], texts=["a", "a", "b", "c"])
    assert select_completions(same, config({"type": "expert_iteration", "min_score": 1.0})) == [0, 3]
    assert select_completions(same, config({"type": "expert_iteration", "min_score": 1.0, "per_prompt": 1})) == [0]


def test_margins_of_one_source_say_which_pairs_and_the_score_which_side() -> None:
    """Scores 0, 1, 0 and 1 of one prompt; the other source says 5, 4, -3 and nan."""
    measures = [5.0, 4.0, -3.0, math.nan]
    rows = [
        Candidate(0, place, score, 10, "", False, measure)
        for place, (score, measure) in enumerate(zip([0.0, 1.0, 0.0, 1.0], measures, strict=True))
    ]
    small, large = (select_pairs(rows, config({"type": f"{name}_margin"})) for name in ("small", "large"))
    assert (small, large) == ([Pair(1, 0, 1.0)], [Pair(1, 2, 7.0)])
    assert select_pairs(rows, config({"type": "all_pairs", "min_margin": 2.0})) == [Pair(1, 2, 7.0)]
    assert select_pairs(rows, config({"type": "all_pairs", "max_margin": 2.0})) == [Pair(1, 0, 1.0)]


@pytest.mark.parametrize("wrong", [{"type": "best"}, {"type": "threshold"}, {"type": "best_worst", "budget": 0}])
def test_what_no_selection_says_is_refused(wrong) -> None:
    with pytest.raises(ValueError, match=r"select|chosen|budget|type|tag"):
        config(wrong)
