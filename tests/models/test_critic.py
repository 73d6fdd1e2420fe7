"""The critic values the state before each token, inside the policy's forward, and costs nothing elsewhere."""

from __future__ import annotations

import pytest
import torch
from trl.trainer.utils import FusedCausalLMOutput

from rlhf_kit.models.critic import ActorCriticOutput, CriticModel, ValueHead, add_critic, values_of_completion
from rlhf_kit.models.scorer import add_log_prob_head, rollout_outputs


def disturbed(head: ValueHead) -> ValueHead:
    torch.manual_seed(3)
    torch.nn.init.normal_(head.linear.weight)
    torch.nn.init.normal_(head.linear.bias)
    return head


@pytest.fixture
def policy(make_model):
    """A policy with a value head whose weights are not 0."""
    model = make_model()
    add_log_prob_head(model)
    add_critic(model, disturbed(ValueHead(16)))
    return model


def test_a_new_head_gives_0_everywhere(make_model, rollout) -> None:
    model = make_model()
    add_log_prob_head(model)
    add_critic(model, ValueHead(16))
    _, values = rollout_outputs(model, rollout, ("log_probs", "state_values"), with_values=True)
    assert values.shape == (3, 9) and (values == 0).all()


def test_the_value_of_a_token_reads_the_state_before_it(policy, rollout) -> None:
    with torch.no_grad():
        _, state_values = rollout_outputs(policy, rollout, ("log_probs", "state_values"), with_values=True)
        values = values_of_completion(state_values, 5)
        for row in range(3):
            prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]]
            completion = rollout.completion_ids[row][rollout.completion_mask[row]]
            for t in range(len(completion)):
                seen = torch.cat([prompt, completion[:t]])  # not yet token t
                hidden = policy.model(input_ids=seen[None]).last_hidden_state[0, -1]
                expected = policy.critic.linear(hidden).squeeze()
                torch.testing.assert_close(values[row, t], expected, atol=1e-5, rtol=1e-5)


def test_the_critic_leaves_log_probs_as_they_are(make_model, policy, rollout) -> None:
    plain = make_model()
    add_log_prob_head(plain)
    with torch.no_grad():
        expected = rollout_outputs(plain, rollout)[0]
        with_values = rollout_outputs(policy, rollout, ("log_probs", "state_values"), with_values=True)[0]
        assert torch.equal(with_values, expected)
        assert torch.equal(rollout_outputs(policy, rollout)[0], expected)


def test_the_critic_runs_only_when_asked(policy, rollout) -> None:
    calls = []
    policy.critic.register_forward_hook(lambda *_: calls.append(1))
    ids = torch.tensor([[4, 5, 6]])
    policy.generate(input_ids=ids, max_new_tokens=2, do_sample=False)
    output = policy(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True)
    assert calls == [] and type(output) is FusedCausalLMOutput
    output = policy(
        input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids, fused_lm_head=True, with_values=True
    )
    assert calls == [1] and isinstance(output, ActorCriticOutput)
    assert not policy.model._forward_hooks


def test_the_head_computes_in_float32_under_autocast() -> None:
    head = disturbed(ValueHead(16))
    hidden = torch.randn(2, 3, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        values = head(hidden)
    assert values.dtype == torch.float32
    assert torch.equal(values, (hidden @ head.linear.weight.T + head.linear.bias).squeeze(-1))


def test_value_gradients_reach_the_head_and_the_policy(policy, rollout) -> None:
    _, values = rollout_outputs(policy, rollout, ("log_probs", "state_values"), with_values=True)
    values_of_completion(values, 5).sum().backward()
    assert policy.critic.linear.weight.grad.abs().sum() > 0
    assert policy.model.embed_tokens.weight.grad.abs().sum() > 0
    assert policy.lm_head.weight.grad is None


def test_a_critic_model_is_a_transformer_of_its_own(make_model, saved, rollout) -> None:
    model = make_model(seed=5)
    add_log_prob_head(model)
    critic = CriticModel(saved, torch.float32)
    disturbed(critic.head)
    add_critic(model, critic)
    _, values = rollout_outputs(model, rollout, ("log_probs", "state_values"), with_values=True)
    row = torch.cat([rollout.prompt_ids[2], rollout.completion_ids[2, :1]])
    hidden = make_model(seed=0).model(input_ids=row[None]).last_hidden_state
    torch.testing.assert_close(values[2, :5], critic.head(hidden)[0], atol=1e-5, rtol=1e-5)
    values.sum().backward()
    assert critic.backbone.embed_tokens.weight.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad is None
