import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.credit import min_form_returns, spread_to_tokens, steps_present, sum_by_step


@given(data=st.data(), num_steps=st.integers(1, 4))
def test_rewards_are_summed_by_step_and_spread_again(batches, close, data, num_steps):
    mask, rewards = data.draw(batches())
    rows, columns = mask.shape
    drawn = data.draw(st.lists(st.integers(0, num_steps - 1), min_size=rows * columns, max_size=rows * columns))
    step_ids = torch.where(mask, torch.tensor(drawn).view(rows, columns), -1)
    sums, present = torch.zeros(rows, num_steps), torch.zeros(rows, num_steps, dtype=torch.bool)
    spread = torch.zeros(rows, columns)
    for i in range(rows):
        for k in range(num_steps):
            tokens = [t for t in range(columns) if step_ids[i, t] == k]
            sums[i, k] = sum(rewards[i, t].item() for t in tokens)
            present[i, k] = bool(tokens)
            for t in tokens:
                spread[i, t] = 10 * i + k + 1
    close(sum_by_step(rewards, step_ids, num_steps), sums)
    assert steps_present(step_ids, num_steps).equal(present)
    values = torch.tensor([[10 * i + k + 1.0 for k in range(num_steps)] for i in range(rows)])
    close(spread_to_tokens(torch.where(present, values, torch.nan), step_ids), spread)


@given(data=st.data())
def test_min_form_return_is_the_least_reward_still_to_come(batches, close, data):
    mask, rewards = data.draw(batches())
    expected = torch.zeros(mask.shape)
    for i, row in enumerate(mask.tolist()):
        steps = [k for k, m in enumerate(row) if m]
        for k in steps:
            expected[i, k] = min(rewards[i, j].item() for j in steps if j >= k)
    close(min_form_returns(rewards, mask), expected)


def test_min_form_by_hand():
    rewards = torch.tensor([[0.9, 0.2, 0.8, 0.5, torch.nan]])
    mask = torch.tensor([[True, True, True, True, False]])
    torch.testing.assert_close(min_form_returns(rewards, mask), torch.tensor([[0.2, 0.2, 0.5, 0.5, 0.0]]))


def test_steps_that_do_not_fit():
    step_ids = torch.tensor([[0, 2, -1]])
    with pytest.raises(ValueError, match="2 do not fit 2 steps"):
        sum_by_step(torch.zeros(1, 3), step_ids, 2)
    with pytest.raises(ValueError, match="2 do not fit 2 steps"):
        spread_to_tokens(torch.zeros(1, 2), step_ids)
    with pytest.raises(ValueError, match="-2"):
        spread_to_tokens(torch.zeros(1, 2), step_ids - 1)


def test_rows_without_steps():
    step_ids = torch.full((2, 3), -1)
    assert sum_by_step(torch.full((2, 3), torch.nan), step_ids, 0).shape == (2, 0)
    assert spread_to_tokens(torch.zeros(2, 0), step_ids).equal(torch.zeros(2, 3))
