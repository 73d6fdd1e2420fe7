import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.credit import gae, reinforce_returns

discounts = st.sampled_from([0.0, 0.5, 0.95, 1.0])


def actions(mask_row):
    return [t for t, m in enumerate(mask_row.tolist()) if m]


@given(data=st.data(), gamma=discounts, lam=discounts, bootstrapped=st.booleans())
def test_gae_is_the_discounted_sum_of_temporal_differences(batches, close, data, gamma, lam, bootstrapped):
    mask, rewards, values = data.draw(batches(channels=2))
    behind = torch.arange(1.0, 1 + len(mask)) if bootstrapped else None
    advantages, returns = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for i, row in enumerate(mask):
        steps = actions(row)
        v = [values[i, t].item() for t in steps] + [behind[i].item() if behind is not None else 0.0]
        delta = [rewards[i, t].item() + gamma * v[k + 1] - v[k] for k, t in enumerate(steps)]
        for k, t in enumerate(steps):
            advantages[i, t] = sum((gamma * lam) ** (j - k) * delta[j] for j in range(k, len(steps)))
            returns[i, t] = advantages[i, t] + v[k]
    actual = gae(rewards, values, mask, gamma, lam, behind)
    close(actual[0], advantages)
    close(actual[1], returns)


def test_gae_of_a_row_by_hand():
    """Two actions with a tool's token between them: delta = [1 + 0.5*4 - 2, 3 - 4] = [1, -1]."""
    rewards, values = torch.tensor([[1.0, 9.0, 3.0, 9.0]]), torch.tensor([[2.0, 9.0, 4.0, 9.0]])
    mask = torch.tensor([[True, False, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.75, 0, -1, 0]]
    assert returns.tolist() == [[2.75, 0, 3, 0]]
    advantages, _ = gae(rewards, values, mask, gamma=0.5, lam=0.5, bootstrap=torch.tensor([8.0]))
    assert advantages.tolist() == [[1.75, 0, 3, 0]]


@given(data=st.data(), gamma=discounts)
def test_reinforce_returns_are_the_discounted_reward_to_go(batches, close, data, gamma):
    mask, rewards = data.draw(batches())
    expected = torch.zeros(mask.shape)
    for i, row in enumerate(mask):
        steps = actions(row)
        for k, t in enumerate(steps):
            expected[i, t] = sum(gamma ** (j - k) * rewards[i, steps[j]].item() for j in range(k, len(steps)))
    close(reinforce_returns(rewards, mask, gamma), expected)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_empty_batches(shape):
    mask, zeros = torch.zeros(shape, dtype=torch.bool), torch.zeros(shape)
    assert reinforce_returns(zeros, mask, 1.0).shape == shape
    assert gae(zeros, zeros, mask, 1.0, 1.0)[0].shape == shape
