import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_kit.credit import group_centred, prime_advantages, prime_process_advantages, rloo


@st.composite
def grouped_scores(draw):
    """Scores of whole groups, some invalid and then NaN or infinite."""
    size, groups = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    rows = draw(
        st.lists(
            st.tuples(st.floats(-10, 10, width=32), st.booleans()),
            min_size=size * groups,
            max_size=size * groups,
        )
    )
    valid = torch.tensor([ok for _, ok in rows])
    poison = torch.tensor([torch.nan, torch.inf]).repeat(len(rows))[: len(rows)]
    scores = torch.where(valid, torch.tensor([score for score, _ in rows]), poison)
    return scores.to(draw(st.sampled_from([torch.float32, torch.bfloat16]))), size, valid


def members(i, size, valid):
    """Valid rows of row i's group."""
    return [j for j in range(i // size * size, i // size * size + size) if valid[j]]


@given(case=grouped_scores())
def test_rloo_baseline_is_the_mean_of_the_other_valid_rows(close, case):
    scores, size, valid = case
    expected = []
    for i in range(len(scores)):
        others = [scores[j].item() for j in members(i, size, valid) if j != i]
        expected.append(scores[i].item() - statistics.fmean(others) if valid[i] and others else 0)
    close(rloo(scores, size, valid), expected)


@given(case=grouped_scores(), scale=st.sampled_from(["none", "group", "batch"]))
def test_group_centred(close, case, scale):
    scores, size, valid = case

    def spread(rows):
        return statistics.stdev([scores[j].item() for j in rows]) if len(rows) > 1 else 0.0

    expected = []
    for i in range(len(scores)):
        rows = members(i, size, valid)
        if not valid[i]:
            expected.append(0.0)
            continue
        centred = scores[i].item() - statistics.fmean(scores[j].item() for j in rows)
        everyone = [j for j in range(len(scores)) if valid[j]]
        divisor = {"none": 1.0, "group": spread(rows) + 0.5, "batch": spread(everyone) + 0.5}[scale]
        expected.append(centred / divisor)
    close(group_centred(scores, size, scale, valid, eps=0.5), expected)


def test_group_scale_by_hand():
    """Mean 2 and unbiased standard deviation sqrt(2) in the first group; equal scores in the second."""
    scores = torch.tensor([1.0, 3.0, 5.0, 5.0])
    unit = 1 / (2**0.5 + 1e-4)
    torch.testing.assert_close(group_centred(scores, 2, "group"), torch.tensor([-unit, unit, 0, 0]))
    assert rloo(scores, 2).tolist() == [-2, 2, 0, 0]


@given(
    data=st.data(),
    size=st.integers(1, 4),
    horizon=st.sampled_from(["return_to_go", "immediate"]),
)
def test_prime_is_equation_5(batches, close, data, size, horizon):
    mask, rewards = data.draw(batches(group_size=size))
    rows = len(mask)
    valid = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    outcomes = torch.where(valid, torch.arange(rows) % 3 / 2, torch.nan)
    rewards = torch.where(valid[:, None], rewards, torch.nan)

    def mean_reward(j):
        return statistics.fmean(r for r, m in zip(rewards[j].tolist(), mask[j].tolist(), strict=True) if m)

    process, total = torch.zeros(mask.shape), torch.zeros(mask.shape)
    for i in range(rows):
        others = [j for j in members(i, size, valid) if j != i]
        means = [mean_reward(j) for j in others if mask[j].any()]
        for t in range(mask.shape[1]):
            if not (valid[i] and mask[i, t]):
                continue
            if means:
                for s in range(t, mask.shape[1] if horizon == "return_to_go" else t + 1):
                    if mask[i, s]:
                        process[i, t] += rewards[i, s].item() - statistics.fmean(means)
            total[i, t] = process[i, t]
            if others:
                total[i, t] += outcomes[i].item() - statistics.fmean(outcomes[j].item() for j in others)
    close(prime_process_advantages(rewards, mask, size, valid, horizon), process)
    close(prime_advantages(rewards, outcomes, mask, size, valid, horizon), total)


def test_prime_by_hand():
    """Means 2 and 4; the baseline of each token is the other row's mean, not a share of the group's."""
    rewards = torch.tensor([[1.0, 3.0, 9.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    advantages = prime_advantages(rewards, torch.tensor([1.0, 0.0]), mask, group_size=2)
    assert advantages.tolist() == [[(1 - 4) + (3 - 4) + 1, (3 - 4) + 1, 0], [(4 - 2) - 1, 0, 0]]
    advantages = prime_advantages(rewards, torch.tensor([1.0, 0.0]), mask, group_size=2, horizon="immediate")
    assert advantages.tolist() == [[(1 - 4) + 1, (3 - 4) + 1, 0], [(4 - 2) - 1, 0, 0]]


def test_rewards_of_zero_leave_the_outcome_alone():
    mask = torch.tensor([[True, True], [True, False]])
    advantages = prime_advantages(torch.zeros(2, 2), torch.tensor([1.0, 0.0]), mask, group_size=2)
    assert advantages.tolist() == [[1, 1], [-1, 0]]


def test_errors_name_the_value_and_the_choices():
    scores, mask = torch.zeros(3), torch.ones(3, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"3 rows .* groups of 2"):
        rloo(scores, 2)
    with pytest.raises(ValueError, match="groups of 0"):
        group_centred(scores, 0)
    with pytest.raises(ValueError, match=r"'std'.*none, group, batch"):
        group_centred(scores, 3, "std")
    with pytest.raises(ValueError, match=r"'later'.*return_to_go, immediate"):
        prime_advantages(torch.zeros(3, 2), scores, mask, 3, horizon="later")
