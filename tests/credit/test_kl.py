import math

import pytest
import torch

from rlhf_kit.credit import AdaptiveKl, kl_penalty


def test_definitions(close):
    d = [-3.0, -0.5, 0.0, 1e-3, 2.0]
    logprobs, ref = torch.full((1, 5), -1.0), torch.tensor([[-1 - x for x in d]])
    close(kl_penalty(logprobs, ref, "k1"), d, atol=1e-6)
    close(kl_penalty(logprobs, ref, "k2"), [x * x / 2 for x in d], atol=1e-6)
    close(kl_penalty(logprobs, ref, "k3"), [math.exp(-x) - 1 + x for x in d], atol=1e-6)


def test_bfloat16_is_subtracted_in_float32():
    logprobs, ref = torch.tensor([[-7.0]]).bfloat16(), torch.tensor([[-0.01]]).bfloat16()
    assert kl_penalty(logprobs, ref, "k1").item() == pytest.approx(logprobs.item() - ref.item(), rel=1e-7)


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_expectation_under_the_policy_is_the_divergence(estimator):
    policy, ref = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.1, 0.3, 0.6])
    divergence = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), ref.tolist(), strict=True))
    expected = (policy * kl_penalty(policy.log(), ref.log(), estimator)).sum().item()
    assert expected == pytest.approx(divergence, rel=1e-5)


def test_k2_has_the_gradient_of_the_divergence_when_it_is_a_loss():
    """On-policy, the gradient of E[k2] at fixed samples is that of KL(policy || ref); that of k1 is 0."""
    logits = torch.tensor([0.3, -1.0, 0.5], requires_grad=True)
    ref = torch.tensor([0.1, 0.3, 0.6]).log()
    logprobs = logits.log_softmax(0)
    (truth,) = torch.autograd.grad((logprobs.exp() * (logprobs - ref)).sum(), logits, retain_graph=True)
    for estimator, gradient in {"k1": torch.zeros(3), "k2": truth}.items():
        loss = (logprobs.exp().detach() * kl_penalty(logprobs, ref, estimator)).sum()
        (actual,) = torch.autograd.grad(loss, logits, retain_graph=True)
        torch.testing.assert_close(actual, gradient, atol=1e-6, rtol=1e-5)


def test_unknown_estimator():
    with pytest.raises(ValueError, match=r"'k4'.*k1, k2, k3"):
        kl_penalty(torch.zeros(1, 1), torch.zeros(1, 1), "k4")


def test_adaptive_coefficient_by_hand():
    kl = AdaptiveKl(coefficient=0.5, target=6.0, horizon=1000)
    assert kl.update(6.6, 100) == pytest.approx(0.5 * (1 + 0.1 * 0.1))
    assert kl.update(60.0, 100) == pytest.approx(0.505 * (1 + 0.2 * 0.1))
    assert kl.update(0.0, 500) == pytest.approx(0.5151 * (1 - 0.2 * 0.5))
    assert kl.update(6.0, 1000) == kl.coefficient == pytest.approx(0.46359)


def test_adaptive_coefficient_finds_the_target():
    """A policy whose divergence falls as 1 / coefficient is brought to the target."""
    kl = AdaptiveKl(coefficient=0.01, target=5.0, horizon=200)
    for _ in range(300):
        kl.update(1.0 / kl.coefficient, 64)
    assert 1.0 / kl.coefficient == pytest.approx(5.0, rel=1e-3)


def test_adaptive_coefficient_refuses_what_would_spoil_it():
    kl = AdaptiveKl(coefficient=0.5, target=6.0, horizon=10)
    with pytest.raises(ValueError, match="nan"):
        kl.update(math.nan, 1)
    with pytest.raises(ValueError, match="horizon"):
        kl.update(0.0, 50)
    assert kl.coefficient == 0.5
    with pytest.raises(ValueError, match="target"):
        AdaptiveKl(coefficient=0.5, target=0.0, horizon=10)
