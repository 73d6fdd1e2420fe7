"""Return decomposition: the loss on hand-worked rows, and what sampling of segments leaves as it is."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from rlhf_kit.credit.decomposition import adjoining, decomposition_loss, local_loss, sampled_sum, segment_ends
from rlhf_kit.credit.spans import spread_spans
from rlhf_kit.rollout import Span

NAN = float("nan")


def mask(*rows: str) -> torch.Tensor:
    return torch.tensor([[letter == "x" for letter in row] for row in rows])


def test_the_loss_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [0.5, -1.0, NAN], [NAN, NAN, NAN]])
    present, scores = mask("xxx", "xx.", "..."), torch.tensor([5.0, 1.0, 7.0])
    assert sampled_sum(rewards, present).tolist() == [6.0, -0.5, 0.0]
    assert decomposition_loss(rewards, present, scores).tolist() == [1.0, 2.25, 0.0]
    # Of three segments two are drawn, and 3/2 * (1 + 3) = 6; of two segments one, and 2 * -1 = -2.
    sampled = mask("x.x", ".x.", "...")
    assert sampled_sum(rewards, present, sampled).tolist() == [6.0, -2.0, 0.0]
    assert decomposition_loss(rewards, present, scores, sampled).tolist() == [1.0, 9.0, 0.0]


def test_what_is_drawn_of_segments_that_are_not_there_counts_for_nothing() -> None:
    rewards = torch.tensor([[1.0, 9.0, 3.0]])
    assert sampled_sum(rewards, mask("x.x"), mask("xx.")).tolist() == [2.0]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_over_all_samples_of_k_segments_the_estimate_is_the_whole_sum(count: int) -> None:
    """Row 0 has five segments, row 1 four of them (with its own K where `count` is larger)."""
    rewards = torch.tensor([[0.3, -1.2, 2.0, 0.7, 0.1], [1.5, NAN, -0.4, 0.8, 3.0]])
    present, scores = mask("xxxxx", "x.xxx"), torch.tensor([0.4, -2.0])
    for row in range(2):
        places = present[row].nonzero().flatten().tolist()
        subsets = [list(subset) for subset in combinations(places, min(count, len(places)))]
        sampled = torch.zeros(len(subsets), 5, dtype=torch.bool)
        for number, subset in enumerate(subsets):
            sampled[number, subset] = True
        many = rewards[row].expand(len(subsets), -1), present[row].expand(len(subsets), -1)
        whole = rewards[row][present[row]].sum()
        estimates = sampled_sum(*many, sampled)
        torch.testing.assert_close(estimates.mean(), whole)
        # The loss is that of the whole sum and, on top, the variance of the estimate.
        losses = decomposition_loss(*many, scores[row].expand(len(subsets)), sampled)
        torch.testing.assert_close(losses.mean(), (whole - scores[row]) ** 2 + estimates.var(unbiased=False))
        assert (estimates.var(unbiased=False) > 0.01) == (count < len(places))


def test_the_local_loss_is_a_mean_over_the_segments_with_a_signal() -> None:
    rewards = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, NAN], [1.0, 1.0, 1.0], [NAN, NAN, NAN]])
    local = torch.tensor([[0.0, 2.0, 1.0], [NAN, 5.0, 4.0], [NAN, NAN, NAN], [1.0, 1.0, 1.0]])
    losses = local_loss(rewards, local, mask("xxx", "xx.", "xxx", "..."))
    assert losses.tolist() == pytest.approx([5 / 3, 9.0, 0.0, 0.0])


def test_gradients_are_finite_where_something_is_missing() -> None:
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    present, local = mask("x.", ".."), torch.tensor([[NAN, 1.0], [1.0, 1.0]])
    scores = torch.tensor([0.0, 1.0])
    (decomposition_loss(rewards, present, scores) + local_loss(rewards, local, present)).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [[2.0, 0.0], [0.0, 0.0]]


OFFSETS = [[(0, 2), (2, 4), (4, 5), (5, 7), (7, 7)], [(0, 0), (0, 0), (0, 0), (0, 0), (0, 0)]]
SEGMENTS = [[(0, 1), (1, 3), (4, 5), (5, 7)], []]


def test_a_segment_ends_at_the_last_action_token_that_overlaps_it() -> None:
    everything = torch.ones(2, 5, dtype=torch.bool)
    assert segment_ends(SEGMENTS, OFFSETS, everything).tolist() == [[0, 1, 2, 3], [-1, -1, -1, -1]]
    some = mask("x.x..", "xxxxx")  # of the second segment only the first token is the policy's, of the last none
    assert segment_ends(SEGMENTS, OFFSETS, some).tolist() == [[0, 0, 2, -1], [-1, -1, -1, -1]]
    assert segment_ends([[], []], OFFSETS, everything).shape == (2, 0)


@pytest.mark.parametrize("actions", ["xxxxx", "x.x..", ".xx.x", "....."])
def test_it_is_where_the_reward_of_a_span_lands(actions: str) -> None:
    action_mask = mask(actions, actions)
    ends = segment_ends(SEGMENTS, OFFSETS, action_mask)
    for number, (start, end) in enumerate(SEGMENTS[0]):
        rewards = spread_spans([[Span(start, end, 1.0, "")], []], OFFSETS, action_mask)
        assert rewards[0].nonzero().flatten().tolist() == [place for place in [int(ends[0, number])] if place >= 0]


def test_what_stands_between_two_segments_belongs_to_the_first() -> None:
    assert adjoining([(1, 3), (5, 6), (6, 8)], 10) == [(0, 5), (5, 6), (6, 10)]
    assert adjoining([], 4) == [(0, 4)]
    assert adjoining([], 0) == []
