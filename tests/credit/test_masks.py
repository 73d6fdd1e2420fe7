import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from rlhf_kit.credit import (
    gae,
    last_action_index,
    masked_mean,
    masked_var,
    place_at_last,
    place_on_actions,
)


def kept(values, mask):
    return [v for v, m in zip(values.flatten().tolist(), mask.flatten().tolist(), strict=True) if m]


@given(data=st.data())
def test_mean_and_variance_are_those_of_the_masked_entries(batches, close, data):
    mask, values = data.draw(batches())
    entries = kept(values, mask)
    close(masked_mean(values, mask), statistics.fmean(entries) if entries else 0)
    close(masked_var(values, mask), statistics.pvariance(entries) if entries else 0, atol=1e-3)
    close(
        masked_var(values, mask, unbiased=True),
        statistics.variance(entries) if len(entries) > 1 else 0,
        atol=1e-3,
    )


@given(data=st.data(), dim=st.sampled_from([0, 1, -1]))
def test_mean_and_variance_along_a_dimension(batches, close, data, dim):
    mask, values = data.draw(batches())
    lines = [kept(v, m) for v, m in zip(values.unbind(1 - dim % 2), mask.unbind(1 - dim % 2), strict=True)]
    close(masked_mean(values, mask, dim), [statistics.fmean(line) if line else 0 for line in lines])
    close(
        masked_var(values, mask, dim),
        [statistics.pvariance(line) if line else 0 for line in lines],
        atol=1e-3,
    )


def test_gradient_of_the_mean_is_finite_beside_poisoned_padding():
    values = torch.tensor([[1.0, torch.nan], [torch.inf, 3.0]], requires_grad=True)
    masked_mean(values, torch.tensor([[True, False], [False, True]])).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.0], [0.0, 0.5]]


@given(data=st.data())
def test_last_action_token(batches, data):
    mask, scores = data.draw(batches())
    scores = scores.float().nan_to_num(5, 6, 7)[:, 0]
    last, placed, spread = (
        last_action_index(mask),
        place_at_last(scores, mask),
        place_on_actions(scores, mask),
    )
    for row in range(len(mask)):
        columns = [t for t in range(mask.shape[1]) if mask[row, t]]
        assert last[row] == (columns[-1] if columns else -1)
        for t in range(mask.shape[1]):
            assert placed[row, t] == (scores[row] if columns and t == columns[-1] else 0)
            assert spread[row, t] == (scores[row] if t in columns else 0)


def test_a_score_of_a_row_without_action_tokens_is_not_read():
    scores, mask = torch.tensor([torch.nan, 2.0]), torch.tensor([[False, False], [True, False]])
    assert place_at_last(scores, mask).tolist() == [[0, 0], [2, 0]]
    assert place_on_actions(scores, mask).tolist() == [[0, 0], [2, 0]]


def test_no_columns():
    mask = torch.zeros(2, 0, dtype=torch.bool)
    assert last_action_index(mask).tolist() == [-1, -1]
    assert place_at_last(torch.ones(2), mask).shape == (2, 0)


def test_wrong_shapes_and_dtypes_are_refused():
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(TypeCheckError):
        gae(torch.zeros(2, 3), torch.zeros(2, 4), mask, 1.0, 1.0)
    with pytest.raises(TypeCheckError):
        masked_mean(torch.zeros(2, 3), mask.int())  # pyright: ignore[reportArgumentType]
