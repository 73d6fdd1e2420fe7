"""Advantage estimators against the exact policy gradient of a toy problem.

The policy is a table of logits per prefix over three tokens, the first of which ends the sequence. All
sequences (and all groups of sequences) are enumerated, so expectations are exact and nothing is sampled.
"""

import itertools

import pytest
import torch

from rlhf_kit.credit import (
    gae,
    group_centred,
    min_form_returns,
    place_at_last,
    place_on_actions,
    prime_advantages,
    reinforce_returns,
    rloo,
    spread_to_tokens,
    steps_present,
    sum_by_step,
)

EOS, VOCABULARY, LENGTH = 0, 3, 3
# Action tokens stand in these columns; column 1 is a tool's text and the last column is padding.
COLUMNS, WIDTH = [0, 2, 3], 5


class Toy:
    """Every sequence of a tabular policy, its probability, and a random reward for each prefix and token."""

    def __init__(self, ragged, seed=0):
        generator = torch.Generator().manual_seed(seed)
        prefixes = [p for n in range(LENGTH) for p in itertools.product(range(VOCABULARY), repeat=n)]
        if ragged:
            prefixes = [p for p in prefixes if EOS not in p]
        self.index = {prefix: i for i, prefix in enumerate(prefixes)}
        ended = [(*p, EOS) for p in prefixes] if ragged else []
        full = [(*p, a) for p in prefixes if len(p) == LENGTH - 1 for a in range(VOCABULARY)]
        self.sequences = sorted({*ended, *full})
        shape = (len(prefixes), VOCABULARY)
        self.logits = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        self.reward = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.outcome = torch.randn(len(self.sequences), generator=generator, dtype=torch.float64)

        rows = len(self.sequences)
        self.mask = torch.zeros(rows, WIDTH, dtype=torch.bool)
        self.prefix, self.token = torch.zeros(2, rows, WIDTH, dtype=torch.int64)
        for row, sequence in enumerate(self.sequences):
            for t, action in enumerate(sequence):
                self.mask[row, COLUMNS[t]] = True
                self.prefix[row, COLUMNS[t]] = self.index[sequence[:t]]
                self.token[row, COLUMNS[t]] = action
        self.rewards = self.on_tokens(self.reward)
        self.lengths = self.mask.sum(1).double()
        self.returns = self.rewards.nan_to_num(0).sum(1)

    def on_tokens(self, table):
        """(rows, WIDTH) values of the tokens from a table of (prefix, token), NaN outside the mask."""
        return torch.where(self.mask, table[self.prefix, self.token], torch.nan)

    @property
    def logprobs(self):
        picked = self.logits.log_softmax(1)[self.prefix, self.token]
        return torch.where(self.mask, picked, 0.0)

    @property
    def probability(self):
        return self.logprobs.sum(1).exp()

    def gradient(self, objective):
        return torch.autograd.grad(objective, self.logits)[0]

    def values(self):
        """Expected reward-to-go of each prefix."""
        policy, values = self.logits.detach().softmax(1), torch.zeros(len(self.index), dtype=torch.float64)
        for prefix, i in sorted(self.index.items(), key=lambda item: -len(item[0])):
            for action in range(VOCABULARY):
                after = self.index.get((*prefix, action))
                to_go = self.reward[i, action] + (values[after] if after is not None else 0)
                values[i] += policy[i, action] * to_go
        return torch.where(self.mask, values[self.prefix], torch.nan)

    def expected(self, advantages, probability=None):
        """Expectation of `sum_t A_t grad log pi_t` over all sequences."""
        probability = self.probability.detach() if probability is None else probability
        return self.gradient((probability[:, None] * advantages.double() * self.logprobs).sum())

    def expected_over_groups(self, estimator, size):
        """Expectation of the mean over a group of each row's `sum_t A_t grad log pi_t`, over all groups."""
        rows = torch.tensor(list(itertools.product(range(len(self.sequences)), repeat=size)))
        weights = self.probability.detach()[rows].prod(1).repeat_interleave(size) / size
        rows = rows.flatten()
        surrogate = (estimator(rows).double() * self.logprobs[rows]).sum(1)
        return self.gradient((weights * surrogate).sum())


@pytest.fixture(params=[True, False], ids=["ragged", "one length"])
def toy(request):
    return Toy(ragged=request.param)


@pytest.fixture
def ragged():
    return Toy(ragged=True)


def same(actual, expected):
    assert expected.abs().max() > 0.02, "a gradient of 0 would show nothing"
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


def differ(actual, expected):
    assert (actual - expected).abs().max() > 0.02


def test_probabilities_sum_to_one(toy):
    assert toy.probability.sum().item() == pytest.approx(1)
    assert len(toy.sequences) == (15 if toy.lengths.min() == 1 else 27)


def test_reinforce_returns(toy):
    truth = toy.gradient((toy.probability * toy.returns).sum())
    same(toy.expected(reinforce_returns(toy.rewards, toy.mask, gamma=1.0)), truth)


def test_discounted_reinforce_leaves_out_the_discount_of_the_state(toy):
    """With the factor gamma^t it is the gradient of the discounted objective, without it is another."""
    discount = torch.zeros(WIDTH, dtype=torch.float64)
    discount[COLUMNS] = 0.5 ** torch.arange(LENGTH, dtype=torch.float64)
    truth = toy.gradient((toy.probability * (discount * toy.rewards.nan_to_num(0)).sum(1)).sum())
    advantages = reinforce_returns(toy.rewards, toy.mask, gamma=0.5)
    same(toy.expected(discount * advantages), truth)
    differ(toy.expected(advantages), truth)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_gae_with_true_values(toy, lam):
    truth = toy.gradient((toy.probability * toy.returns).sum())
    advantages, _ = gae(toy.rewards, toy.values(), toy.mask, gamma=1.0, lam=lam)
    same(toy.expected(advantages), truth)


def test_gae_with_wrong_values_is_unbiased_for_lambda_one_alone(toy):
    truth = toy.gradient((toy.probability * toy.returns).sum())
    wrong = torch.randn(len(toy.index), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = torch.where(toy.mask, wrong[toy.prefix], torch.nan)
    same(toy.expected(gae(toy.rewards, values, toy.mask, gamma=1.0, lam=1.0)[0]), truth)
    differ(toy.expected(gae(toy.rewards, values, toy.mask, gamma=1.0, lam=0.0)[0]), truth)


def test_gae_bootstraps_a_row_that_was_cut_off(ragged):
    """Cut after two tokens, with the value of what would have followed as bootstrap: nothing is lost."""
    toy = ragged
    truth = toy.gradient((toy.probability * toy.returns).sum())
    cut = toy.mask.clone()
    cut[:, COLUMNS[2]] = False
    behind = torch.where(toy.lengths == 3, toy.values()[:, COLUMNS[2]], 0.0)
    advantages, _ = gae(toy.rewards, toy.values(), cut, gamma=1.0, lam=1.0, bootstrap=behind)
    early = [i for prefix, i in toy.index.items() if len(prefix) < 2]
    same(toy.expected(advantages)[early], truth[early])
    without, _ = gae(toy.rewards, toy.values(), cut, gamma=1.0, lam=1.0)
    differ(toy.expected(without)[early], truth[early])


@pytest.mark.parametrize("size", [2, 3])
def test_rloo(toy, size):
    truth = toy.gradient((toy.probability * toy.returns).sum())

    def estimator(rows):
        return place_on_actions(rloo(toy.returns[rows], size), toy.mask[rows])

    same(toy.expected_over_groups(estimator, size), truth)


def test_rloo_with_a_failed_row_is_unbiased_over_the_others(ragged):
    truth = ragged.gradient((ragged.probability * ragged.returns).sum())

    def estimator(rows):
        valid = torch.tensor([True, False, True]).repeat(len(rows) // 3)
        scores = torch.where(valid, ragged.returns[rows], torch.nan)
        return place_on_actions(rloo(scores, 3, valid), ragged.mask[rows])

    same(ragged.expected_over_groups(estimator, 3), truth * 2 / 3)


@pytest.mark.parametrize("size", [2, 3])
def test_group_centred_is_too_small_by_a_known_factor(toy, size):
    """A row's own score is in its baseline: (K - 1) / K times the gradient."""
    truth = toy.gradient((toy.probability * toy.returns).sum())

    def estimator(rows):
        return place_on_actions(group_centred(toy.returns[rows], size), toy.mask[rows])

    same(toy.expected_over_groups(estimator, size), truth * (size - 1) / size)


def prime(toy, size, horizon):
    def estimator(rows):
        return prime_advantages(toy.rewards[rows], toy.outcome[rows], toy.mask[rows], size, None, horizon=horizon)

    return toy.expected_over_groups(estimator, size)


@pytest.mark.parametrize("size", [2, 3])
def test_prime_is_unbiased_for_sequences_of_one_length(size):
    toy = Toy(ragged=False)
    truth = toy.gradient((toy.probability * (toy.returns + toy.outcome)).sum())
    same(prime(toy, size, "return_to_go"), truth)


@pytest.mark.parametrize("size", [2, 3])
def test_prime_charges_the_mean_token_reward_for_each_token(ragged, size):
    """Eq. 5 takes its baseline off once per token to come, so a longer sequence pays more often."""
    toy = ragged
    mean_reward = (toy.probability * toy.returns / toy.lengths).sum().detach()
    objective = toy.returns + toy.outcome - mean_reward * toy.lengths
    same(prime(toy, size, "return_to_go"), toy.gradient((toy.probability * objective).sum()))
    differ(prime(toy, size, "return_to_go"), toy.gradient((toy.probability * (toy.returns + toy.outcome)).sum()))


def visits(toy):
    """How often each prefix is visited, as a constant."""
    share = torch.where(toy.mask, toy.probability.detach()[:, None], 0.0)
    return torch.zeros(len(toy.index), dtype=torch.float64).index_add(0, toy.prefix.flatten(), share.flatten())


def test_prime_immediate_holds_the_visited_states_fixed(toy):
    """The gradient of sum_s d(s) E_pi[r(s, a)] at fixed visits d, plus that of the outcomes."""
    immediate = (visits(toy)[:, None] * toy.logits.softmax(1) * toy.reward).sum()
    outcome = (toy.probability * toy.outcome).sum()
    same(prime(toy, 2, "immediate"), toy.gradient(immediate + outcome))
    differ(prime(toy, 2, "immediate"), toy.gradient((toy.probability * (toy.returns + toy.outcome)).sum()))


def test_prime_immediate_with_log_ratios_descends_the_divergence_in_each_state(ragged):
    """For r = log phi - log pi it is the gradient of -sum_s d(s) KL(pi || phi); return-to-go has another."""
    toy = ragged
    log_phi = torch.randn_like(toy.logits.detach(), generator=torch.Generator().manual_seed(2)).log_softmax(1)
    log_pi = toy.logits.log_softmax(1)
    toy.outcome.zero_()
    toy.rewards = toy.on_tokens((log_phi - log_pi).detach())
    divergence = (log_pi.exp() * (log_pi - log_phi)).sum(1)
    same(prime(toy, 2, "immediate"), toy.gradient(-(visits(toy) * divergence).sum()))
    differ(prime(toy, 2, "immediate"), prime(toy, 2, "return_to_go"))


def test_prime_immediate_does_not_credit_what_an_action_leads_to():
    """The last token is rewarded for what the first one was: only return-to-go teaches the first."""
    toy = Toy(ragged=False)
    toy.outcome.zero_()
    toy.rewards = place_at_last((toy.token[:, 0] == 1).double(), toy.mask)
    first = toy.index[()]
    truth = toy.gradient(toy.probability[toy.token[:, 0] == 1].sum())
    same(prime(toy, 2, "return_to_go"), truth)
    assert truth[first].abs().max() > 0.1
    torch.testing.assert_close(prime(toy, 2, "immediate"), torch.zeros_like(toy.logits), atol=1e-6, rtol=0)


def least_to_come(toy):
    """E[least reward from here on | prefix, action] for every prefix and action, by enumeration."""
    policy, index = toy.logits.detach().softmax(1), toy.index

    def futures(prefix, action):
        """Every continuation as (probability, least reward)."""
        reward = toy.reward[index[prefix], action].item()
        after = (*prefix, action)
        if after not in index:
            return [(1.0, reward)]
        return [
            (policy[index[after], following].item() * chance, min(reward, least))
            for following in range(VOCABULARY)
            for chance, least in futures(after, following)
        ]

    table = torch.zeros_like(toy.reward)
    for prefix, i in index.items():
        for action in range(VOCABULARY):
            table[i, action] = sum(chance * least for chance, least in futures(prefix, action))
    return table


def test_min_form_raises_the_least_reward_still_to_come_from_each_state(toy):
    """The gradient of sum_s d(s) E_pi[min of the rewards from s on] at fixed visits d and fixed later policy.

    At the first token that is the gradient of the objective, the expected least reward; later ones are also credited
    where an earlier step was worse already, which no later step can mend.
    """
    toy.reward *= 2
    toy.rewards = toy.on_tokens(toy.reward)
    step_ids = torch.full_like(toy.token, -1)
    step_ids[:, COLUMNS] = torch.arange(LENGTH).expand(len(toy.sequences), LENGTH)
    step_ids[~toy.mask] = -1
    step_mask = steps_present(step_ids, LENGTH)
    returns = min_form_returns(sum_by_step(toy.rewards, step_ids, LENGTH), step_mask)
    found = toy.expected(spread_to_tokens(returns, step_ids))
    same(found, toy.gradient((visits(toy)[:, None] * toy.logits.softmax(1) * least_to_come(toy)).sum()))

    least = torch.where(toy.mask, toy.rewards, torch.inf).min(dim=1).values
    objective = toy.gradient((toy.probability * least).sum())
    first = toy.index[()]
    same(found[first], objective[first])
    differ(found, objective)
