"""The critic values the state before each token, inside the policy's forward, and costs nothing elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel
from trl.trainer.utils import FusedCausalLMOutput

from rlhf_kit.models.config import Lora, Pretrained
from rlhf_kit.models.critic import ActorCriticOutput, CriticModel, ValueHead, add_critic, values_of_completion
from rlhf_kit.models.loading import load_model
from rlhf_kit.models.scorer import add_log_prob_head, rollout_outputs
from rlhf_kit.trainers.config import Critic
from rlhf_kit.trainers.ppo_parts import build_critic


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
    critic = CriticModel(Pretrained(path=saved))
    disturbed(critic.head)
    add_critic(model, critic)
    _, values = rollout_outputs(model, rollout, ("log_probs", "state_values"), with_values=True)
    row = torch.cat([rollout.prompt_ids[2], rollout.completion_ids[2, :1]])
    hidden = make_model(seed=0).model(input_ids=row[None]).last_hidden_state
    torch.testing.assert_close(values[2, :5], critic.head(hidden)[0], atol=1e-5, rtol=1e-5)
    values.sum().backward()
    assert critic.backbone.embed_tokens.weight.grad.abs().sum() > 0
    assert model.model.embed_tokens.weight.grad is None


@pytest.fixture
def adapted(saved, tmp_path: Path) -> str:
    """Folder of a LoRA adapter that changes what the tiny model computes."""
    model = load_model(Pretrained(path=saved, peft=Lora(r=2)))
    assert isinstance(model, PeftModel)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(str(tmp_path / "adapted"))
    return str(tmp_path / "adapted")


def policy_of(config: Pretrained) -> PreTrainedModel:
    model = load_model(config)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize("named", [True, False], ids=["the critic's", "the policy's"])
def test_a_critic_starts_from_a_folder_with_an_adapter(saved, adapted, rollout, named: bool) -> None:
    policy = policy_of(Pretrained(path=saved if named else adapted))
    critic = build_critic(Critic(type="model", path=adapted if named else None), policy)
    assert isinstance(critic, CriticModel)
    ids = rollout.prompt_ids[2][None]
    expected = load_model(Pretrained(path=adapted)).model(input_ids=ids).last_hidden_state
    base = load_model(Pretrained(path=saved)).model(input_ids=ids).last_hidden_state
    hidden = critic.backbone(input_ids=ids).last_hidden_state
    torch.testing.assert_close(hidden, expected)
    assert not torch.allclose(hidden, base, atol=1e-3)
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert not any("lora" in name or "lm_head" in name for name, _ in critic.named_parameters())


def test_a_critic_loads_as_its_policy_did(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr("rlhf_kit.models.critic.load_model", lambda config: asked.append(config) or load_model(config))
    policy = policy_of(Pretrained(path=saved, dtype="bfloat16"))
    own = {"dtype": "auto", "trust_remote_code": True, "attn_implementation": "eager", "peft": Lora(r=2)}
    settings = Pretrained(path=saved, revision="v1", **own)
    build_critic(Critic(type="model"), policy, settings)
    expected = settings.model_copy(update={"dtype": "bfloat16", "peft": None})
    assert asked.pop() == expected
    other = settings.model_copy(update={"path": "some/policy"})
    build_critic(Critic(type="model", path=saved), policy, other)
    assert asked.pop() == expected.model_copy(update={"revision": None})
    critic = build_critic(Critic(type="model"), policy)
    assert isinstance(critic, CriticModel) and critic.backbone.dtype == torch.bfloat16
