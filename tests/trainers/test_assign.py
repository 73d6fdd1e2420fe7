"""Advantages of a hand-made batch, and what every estimator has in common."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from rlhf_kit.credit import gae, group_centred, place_on_actions, prime_advantages
from rlhf_kit.trainers.assign import Episode, WeightedRewards, assign_credit
from rlhf_kit.trainers.config import Credit

# Two groups of three completions; a token that is not the policy's in the second row; none at all in the last.
MASK = torch.tensor(
    [
        [1, 1, 1, 1],
        [1, 0, 1, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 1, 1, 1],
        [0, 0, 0, 0],
    ]
).bool()
GROUP = 3
ALL = torch.ones(6, dtype=torch.bool)
STEPS = torch.where(MASK, torch.tensor([0, 0, 1, 2]), -1)
PLAIN = {"whiten": False}
ESTIMATORS = ["gae", "rloo", "group", "reinforce", "prime", "min_form"]


def rewards(*rows):
    return torch.tensor(rows, dtype=torch.float32)


def last_tokens(scores):
    """An outcome's rewards: each score on its row's last action token."""
    tokens = torch.zeros(MASK.shape)
    for row, score in enumerate(scores):
        actions = MASK[row].nonzero().flatten()
        if len(actions):
            tokens[row, actions[-1]] = score
    return tokens


def outcome(scores, name="outcome", **fields):
    return WeightedRewards(name, "outcome", last_tokens(scores), **fields)


def process(seed=0, name="process", **fields):
    tokens = torch.randn(MASK.shape, generator=torch.Generator().manual_seed(seed))
    return WeightedRewards(name, "process", torch.where(MASK, tokens, 0.0), **fields)


def episode(valid=ALL, seed=1, **fields):
    generator = torch.Generator().manual_seed(seed)
    values, bootstrap = torch.randn(MASK.shape, generator=generator), torch.randn(6, generator=generator)
    return Episode(**{"mask": MASK, "valid": valid, "group_size": GROUP, "values": values, "bootstrap": bootstrap,
                      "step_ids": STEPS, **fields})  # fmt: skip


def credit(estimator, **fields):
    return Credit(estimator=estimator, **{**PLAIN, **fields})


def assert_rows(actual, expected):
    """`expected` gives each row's advantage on its action tokens."""
    torch.testing.assert_close(actual, torch.where(MASK, torch.tensor(expected)[:, None], 0.0), rtol=1e-5, atol=1e-5)


# -- the estimators ----------------------------------------------------------------------------------------------------

SCORES = [1.0, 4.0, 1.0, 0.0, 2.0, 7.0]


def test_rloo_takes_off_the_mean_of_the_others() -> None:
    result = assign_credit(credit("rloo"), [outcome(SCORES)], episode())
    # The last row has no action token, so no reward either: it is a 0 in its group's mean until it is invalid.
    assert_rows(result.advantages, [-1.5, 3.0, -1.5, -1.0, 2.0, 0.0])
    result = assign_credit(credit("rloo"), [outcome(SCORES)], episode(MASK.any(dim=1)))
    assert_rows(result.advantages, [-1.5, 3.0, -1.5, -2.0, 2.0, 0.0])
    assert result.returns is None


def test_group_takes_off_the_mean_of_all() -> None:
    result = assign_credit(credit("group"), [outcome(SCORES)], episode(MASK.any(dim=1)))
    assert_rows(result.advantages, [-1.0, 2.0, -1.0, -1.0, 1.0, 0.0])


@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_scaled_group_credit_is_that_of_grpo(scale) -> None:
    valid = torch.tensor([True, True, False, True, True, True])
    sources = [outcome(SCORES), process()]
    scores = torch.stack([torch.where(MASK, source.tokens, 0.0).sum(dim=1) for source in sources]).sum(dim=0)
    expected = place_on_actions(group_centred(scores, GROUP, scale, valid), MASK & valid[:, None])
    result = assign_credit(credit("group", scale=scale), sources, episode(valid))
    torch.testing.assert_close(result.advantages, expected, rtol=1e-5, atol=1e-6)


def test_reinforce_takes_off_the_mean_return_of_all_tokens() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    source = WeightedRewards("process", "process", rewards([1, 2, 4], [0, 8, 0]))
    of_two = Episode(mask, torch.ones(2, dtype=torch.bool), 1)
    result = assign_credit(credit("reinforce", gamma=0.5), [source], of_two)
    # returns 1 + 1 + 1, 2 + 2, 4 and 4, 8: their mean is 23/5
    expected = rewards([3 - 4.6, 4 - 4.6, 4 - 4.6], [4 - 4.6, 8 - 4.6, 0])
    torch.testing.assert_close(result.advantages, expected)
    immediate = assign_credit(credit("reinforce", horizon="immediate"), [source], of_two)
    torch.testing.assert_close(immediate.advantages, rewards([1 - 3, 2 - 3, 4 - 3], [0 - 3, 8 - 3, 0]))
    # The horizon is that of process rewards: an outcome is always credited to the whole completion.
    at_end = WeightedRewards("outcome", "outcome", rewards([0, 0, 4], [0, 9, 0]))
    result = assign_credit(credit("reinforce", horizon="immediate"), [at_end], of_two)
    torch.testing.assert_close(result.advantages, rewards([4 - 6, 4 - 6, 4 - 6], [9 - 6, 9 - 6, 0]))


@pytest.mark.parametrize("lam", [1.0, 0.9])
@pytest.mark.parametrize("bootstraps", [True, False])
def test_gae_is_that_of_the_summed_rewards(lam, bootstraps) -> None:
    sources = [outcome(SCORES), process(0), process(5, "other")]
    of_all = episode() if bootstraps else episode(bootstrap=None)
    summed = torch.stack([source.tokens for source in sources]).sum(dim=0)
    advantages, returns = gae(summed, of_all.values, MASK, 0.97, lam, of_all.bootstrap)
    result = assign_credit(credit("gae", gamma=0.97, lam=lam), sources, of_all)
    torch.testing.assert_close(result.advantages, advantages, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.returns, returns, rtol=1e-5, atol=1e-5)


def test_the_critics_targets_are_neither_whitened_nor_scaled() -> None:
    sources = [outcome(SCORES), process()]
    plain = assign_credit(credit("gae"), sources, episode())
    changed = assign_credit(credit("gae", whiten=True, scale="batch"), sources, episode())
    assert torch.equal(plain.returns, changed.returns)
    assert not torch.allclose(plain.advantages, changed.advantages)


@pytest.mark.parametrize("horizon", ["return_to_go", "immediate"])
def test_prime_is_equation_5_before_whitening(horizon) -> None:
    valid = MASK.any(dim=1)
    expected = prime_advantages(process().tokens, torch.tensor(SCORES), MASK, GROUP, valid, horizon)
    result = assign_credit(credit("prime", horizon=horizon), [outcome(SCORES), process()], episode(valid))
    torch.testing.assert_close(result.advantages, expected)


def test_min_form_credits_a_step_with_the_least_reward_to_come() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]).bool()
    steps = torch.tensor([[0, 0, 1, 2], [0, 1, 1, -1]])
    source = WeightedRewards("process", "process", rewards([1, 2, -1, 5], [0, 1, 1, 9]))
    of_two = Episode(mask, torch.ones(2, dtype=torch.bool), 1, step_ids=steps)
    # step rewards 3, -1, 5 and 0, 2; the least of those to come -1, -1, 5 and 0, 2; by token -1 -1 -1 5 and 0 2 2
    expected = rewards([-1, -1, -1, 5], [0, 2, 2, 0]) - 6 / 7
    result = assign_credit(credit("min_form"), [source], of_two)
    torch.testing.assert_close(result.advantages, torch.where(mask, expected, 0.0))


# -- shares ------------------------------------------------------------------------------------------------------------


def test_shares_are_the_sizes_of_the_sources_contributions() -> None:
    # contributions by token: rows of 4, 2, 2 and 3, 4, 0 tokens
    one = outcome(SCORES, "one")  # -1.5, 3, -1.5 and -2, 2: 6 + 6 + 3 + 6 + 8 = 29
    two = outcome([0, 0, 3, 0, 0, 0], "two")  # -1.5, -1.5, 3: 6 + 3 + 6 = 15
    result = assign_credit(credit("rloo"), [one, two], episode(MASK.any(dim=1)))
    assert result.shares == pytest.approx({"one": 29 / 44, "two": 15 / 44})
    assert_rows(result.advantages, [-3.0, 1.5, 1.5, -2.0, 2.0, 0.0])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("scale", ["none", "batch"])  # one factor for all, which a share does not show
def test_shares_are_those_of_the_final_advantage(estimator, whitened, scale) -> None:
    sources = {"outcome": outcome(SCORES), "process": process(0), "other": process(5, "other")}
    result = assign_credit(credit(estimator, whiten=whitened, scale=scale), [*sources.values()], episode())
    without_critic = replace(episode(), values=torch.zeros_like(episode().values), bootstrap=None)
    parts = {name: assign_credit(credit(estimator), [s], without_critic).advantages for name, s in sources.items()}
    if estimator == "gae":
        parts["critic"] = assign_credit(credit("gae"), [outcome([0.0] * 6)], episode()).advantages
    unscaled = assign_credit(credit(estimator), [*sources.values()], episode()).advantages
    torch.testing.assert_close(torch.stack([*parts.values()]).sum(dim=0), unscaled)
    sizes = {}
    for name, part in parts.items():
        live = part[MASK]
        sizes[name] = (live - live.mean() if whitened else live).abs().sum().item()
    assert result.shares == pytest.approx({name: size / sum(sizes.values()) for name, size in sizes.items()})


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_without_rewards_every_sources_share_is_0(estimator) -> None:
    result = assign_credit(credit(estimator), [outcome([0.0] * 6)], episode())
    assert result.shares == ({"outcome": 0.0, "critic": 1.0} if estimator == "gae" else {"outcome": 0.0})


# -- rows and tokens that do not count ---------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale", ["none", "group", "batch"])
def test_whitened_advantages_have_mean_0_and_variance_1(estimator, scale) -> None:
    valid = torch.tensor([True, True, True, True, False, True])
    sources = [outcome(SCORES), process()]
    result = assign_credit(credit(estimator, whiten=True, scale=scale), sources, episode(valid))
    live = result.advantages[MASK & valid[:, None]]
    assert live.mean().item() == pytest.approx(0, abs=1e-5)
    assert live.var(correction=0).item() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fields", [PLAIN, {"whiten": True}, {"scale": "group"}, {"scale": "batch"}], ids=str)
def test_what_an_invalid_row_holds_is_never_read(estimator, fields) -> None:
    valid = torch.tensor([True, False, True, True, True, True])
    sources, of_all = [outcome(SCORES), process()], episode(valid)
    result = assign_credit(credit(estimator, **fields), sources, of_all)
    spoilt_rows = (~valid)[:, None].expand_as(MASK)
    for poison in (torch.nan, torch.inf, 1e30):
        spoilt = [replace(s, tokens=s.tokens.masked_fill(spoilt_rows, poison)) for s in sources]
        values = of_all.values.masked_fill(spoilt_rows, poison)
        again = assign_credit(credit(estimator, **fields), spoilt, replace(of_all, values=values))
        assert torch.equal(result.advantages, again.advantages)
        assert result.shares == again.shares
        assert result.returns is None or torch.equal(result.returns, again.returns)
    assert not result.advantages[1].any()
    assert not result.advantages[~MASK].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("fields", [PLAIN, {"whiten": True}, {"scale": "group"}, {"scale": "batch"}], ids=str)
def test_a_batch_with_invalid_groups_is_the_batch_without_them(estimator, fields) -> None:
    sources, of_all = [outcome(SCORES), process()], episode(torch.tensor([True] * 3 + [False] * 3))
    result = assign_credit(credit(estimator, **fields), sources, of_all)
    kept = slice(0, 3)
    alone = Episode(MASK[kept], ALL[kept], GROUP, of_all.values[kept], of_all.bootstrap[kept], STEPS[kept])
    without = assign_credit(
        credit(estimator, **fields), [replace(source, tokens=source.tokens[kept]) for source in sources], alone
    )
    torch.testing.assert_close(result.advantages[kept], without.advantages)
    assert not result.advantages[3:].any()
    assert result.shares == pytest.approx(without.shares)
    if estimator == "gae":
        torch.testing.assert_close(result.returns[kept], without.returns)
        assert not result.returns[3:].any()


# -- rows that a source did not judge ----------------------------------------------------------------------------------


def test_a_row_that_a_source_did_not_judge_is_in_none_of_its_baselines() -> None:
    missing = torch.tensor([True, False, True, True, True, False])
    judge = outcome([1.0, 0.0, 3.0, 2.0, 4.0, 0.0], "judge", present=missing)
    result = assign_credit(credit("rloo"), [judge], episode(MASK.any(dim=1)))
    assert_rows(result.advantages, [-2.0, 0.0, 2.0, -2.0, 2.0, 0.0])
    # Another source's credit of that row is what it would be alone.
    both = assign_credit(credit("rloo"), [judge, outcome(SCORES)], episode(MASK.any(dim=1)))
    assert_rows(both.advantages, [-3.5, 3.0, 0.5, -4.0, 4.0, 0.0])


@pytest.mark.parametrize("estimator", ["rloo", "group", "reinforce", "prime", "min_form"])
def test_sources_of_different_rows_do_not_touch(estimator) -> None:
    """A mixture of two tasks, each with a source of its own, is both tasks' credit side by side."""
    first = torch.tensor([True] * 3 + [False] * 3)
    sources = [process(0, "one", present=first), process(5, "two", present=~first)]
    mixed = assign_credit(credit(estimator), sources, episode())
    one = assign_credit(credit(estimator), [replace(sources[0], present=None)], episode(first))
    two = assign_credit(credit(estimator), [replace(sources[1], present=None)], episode(~first))
    torch.testing.assert_close(mixed.advantages, one.advantages + two.advantages)
