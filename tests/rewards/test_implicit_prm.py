"""The implicit PRM's rewards are the log-ratio of two models: exactly 0 at first, and what it has learnt after."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from rlhf_kit.credit.implicit import log_odds
from rlhf_kit.models.adapters import active_adapter, adapter_parameters
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import add_log_prob_head, rollout_outputs
from rlhf_kit.models.tokenizers import word_level_tokenizer
from rlhf_kit.rewards.implicit_prm import ImplicitPrmConfig
from rlhf_kit.rollout import Status

LORA = {"type": "lora", "r": 2}


def config(**fields) -> ImplicitPrmConfig:
    return ImplicitPrmConfig.model_validate({"type": "implicit_prm", "beta": 0.5, "online": {}, **fields})


def scored_by(model, rollout, name: str = "behaviour"):
    """The rollout with the log-probabilities of `model`."""
    with torch.no_grad():
        (log_probs,) = rollout_outputs(model, rollout)
    return replace(rollout, logprobs={**rollout.logprobs, name: log_probs})


def of_folder(path: str, rollout, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of a model on disk."""
    model = load_model(Pretrained(path=path))
    add_log_prob_head(model, temperature)
    with torch.no_grad():
        return rollout_outputs(model, rollout)[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("peft", [None, LORA])
def test_every_reward_is_exactly_0_at_initialisation(context, rollout, dtype, peft) -> None:
    built = context(dtype=dtype, peft=peft, temperature=0.7)
    source = config().build(built)
    rewards = source.score(scored_by(built.policy, rollout))
    assert (rewards.tokens == 0).all()
    assert rewards.tokens.dtype == torch.float32
    assert rewards.status.tolist() == [Status.OK] * 4


def test_a_prm_of_its_own_rewards_the_log_ratio_at_the_temperature(context, save_model, rollout) -> None:
    other = save_model(1)
    built = context(temperature=0.7)
    source = config(path=other, online=None).build(built)
    behaviour = scored_by(built.policy, rollout)
    ratio = of_folder(other, rollout, 0.7) - behaviour.logprobs["behaviour"]
    expected = torch.where(rollout.action_mask, 0.5 * ratio, 0.0)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(source.score(behaviour).tokens, expected)
    assert source.trainable_parameters() == []


def test_a_prm_with_another_vocabulary_is_refused(context, save_model, policy_path) -> None:
    other, own = save_model(1), load_tokenizer(Pretrained(path=policy_path))
    word_level_tokenizer(("0", "1", "2", "4", "3", "=")).save_pretrained(other)
    with pytest.raises(ValueError, match=rf"'implicit_prm': {other} has another vocabulary than the policy"):
        config(path=other).build(replace(context(), tokenizer=own))


@pytest.mark.parametrize(("reference", "key"), [("initial", "reference"), ("behaviour", "behaviour"), ("ema", "ema")])
def test_it_asks_for_its_references_log_probs(context, save_model, rollout, reference, key) -> None:
    source = config(path=save_model(1), reference=reference).build(context())
    assert source.needs == {key}
    present = replace(rollout, logprobs={key: torch.full((4, 3), -1.0)})
    assert torch.equal(source.reference_log_probs(present), torch.full((4, 3), -1.0))


# --- what is trained ---


def test_with_lora_it_is_a_second_adapter_on_the_policys_base(context, rollout) -> None:
    built = context(peft=LORA)
    source = config(name="helper").build(built)
    assert isinstance(built.policy, PeftModel)
    assert source.scorer.model is built.policy
    own = source.trainable_parameters()
    assert [id(p) for p in own] == [id(p) for p in adapter_parameters(built.policy, "helper")]
    with torch.no_grad():
        for parameter in own:
            parameter.add_(torch.randn_like(parameter))
    behaviour = scored_by(built.policy, rollout)
    assert torch.equal(behaviour.logprobs["behaviour"], of_folder(built.policy_config.path, rollout))
    assert source.score(behaviour).tokens.abs().sum() > 0
    with torch.no_grad(), active_adapter(built.policy, "helper"):
        (expected,) = rollout_outputs(built.policy, rollout)
    assert torch.equal(source.scorer(rollout).detach(), expected)


def test_without_lora_it_is_a_model_of_its_own(context) -> None:
    built = context()
    source = config().build(built)
    policy = {id(parameter) for parameter in built.policy.parameters()}
    own = source.trainable_parameters()
    assert len(own) == len(policy)
    assert not policy & {id(parameter) for parameter in own}
    assert not any(parameter.requires_grad for parameter in own)  # whoever steps it turns them on
    assert config(online=None).build(context()).trainable_parameters() == []


def test_a_path_of_its_own_takes_the_policys_precision_but_not_its_file(context, save_model, policy_path) -> None:
    policy = Pretrained(path=policy_path, gguf_file="policy.gguf", dtype="bfloat16")
    source = config(path=save_model(1)).build(replace(context(), policy_config=policy))
    assert source.scorer.model.dtype == torch.bfloat16


@pytest.mark.parametrize("peft", [None, LORA])
def test_the_loss_learns_from_outcomes(context, rollout, peft) -> None:
    built = context(peft=peft)
    source = config(offset="none").build(built)
    behaviour = scored_by(built.policy, rollout)
    outcomes = torch.tensor([1.0, 0.0, 1.0, 0.0])
    parameters = source.trainable_parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=0.03)
    losses = [source.loss(behaviour, outcomes)]
    assert losses[0].tolist() == pytest.approx([math.log(2)] * 4)  # R is 0
    for _ in range(15):
        losses[-1].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(source.loss(behaviour, outcomes))
    assert losses[-1].sum() < 0.5 * losses[0].sum()
    scores = source.score(behaviour).tokens.sum(dim=1)
    assert min(scores[0], scores[2]) > max(scores[1], scores[3])
    # The policy is as it was: by the base model, for its adapter still adds 0.
    assert torch.equal(scored_by(built.policy, rollout).logprobs["behaviour"], behaviour.logprobs["behaviour"])


# --- the offset ---


def offsets(context, rollout, kind: str, outcomes: list[float], observed: list[list[float]] = ()) -> list[float]:
    source = config(offset=kind).build(context())
    for batch in observed:
        source.observe(torch.tensor(batch))
    return source.offsets(rollout, torch.tensor(outcomes)).tolist()


def test_no_offset(context, rollout) -> None:
    assert offsets(context, rollout, "none", [1.0, 1.0, 1.0, 0.0]) == [0.0] * 4


def test_the_running_offset_is_the_log_odds_of_the_decayed_success_rate(context, rollout) -> None:
    labels = [1.0, 0.0, 0.0, 0.0]
    assert offsets(context, rollout, "running", labels) == pytest.approx([math.log(1 / 3)] * 4)
    assert offsets(context, rollout, "running", labels, [[1.0, 0.0]]) == pytest.approx([0.0] * 4, abs=1e-6)
    rate = 0.9 * 0.5 + 0.1 * 0.25
    found = offsets(context, rollout, "running", labels, [[1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert found == pytest.approx([math.log(rate / (1 - rate))] * 4, rel=1e-5)


def test_the_prompts_offset_is_the_log_odds_of_its_peers(context, rollout) -> None:
    with_peers = replace(rollout, peer_outcomes=torch.tensor([0.0, 1.0, 0.25, 0.5]))
    expected = log_odds(torch.tensor([0.0, 1.0, 0.25, 0.5])).tolist()
    assert offsets(context, with_peers, "prompt", [1.0, 0.0, 1.0, 0.0]) == expected
    with pytest.raises(ValueError, match="peer_outcomes"):
        offsets(context, rollout, "prompt", [1.0, 0.0, 1.0, 0.0])


def test_the_loss_uses_the_offset(context, rollout) -> None:
    built = context()
    source = config(offset="running").build(built)
    behaviour = scored_by(built.policy, rollout)
    source.observe(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    loss = source.loss(behaviour, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    expected = [-math.log(0.25), -math.log(0.75)] * 2
    assert loss.tolist() == pytest.approx(expected, rel=1e-5)


def test_what_is_no_weight_is_saved_and_loaded(context, tmp_path: Path) -> None:
    source, fresh = config().build(context()), config().build(context())
    source.observe(torch.tensor([1.0, 0.0, 0.0, 0.0]))
    source.save(tmp_path)
    fresh.load(tmp_path)
    assert fresh.running_rate == source.running_rate == 0.25
    config().build(context()).save(tmp_path)
    fresh.load(tmp_path)
    assert fresh.running_rate is None


# --- the reference of a trained PRM ---


@pytest.fixture
def prm(save_model):
    """Folder of a PRM, as a `reward` stage writes it, with the reference that it was trained against."""

    def make(reference: str) -> str:
        folder = save_model(1)
        (Path(folder) / "prm.json").write_text(json.dumps({"beta": 0.5, "reference": reference}))
        return folder

    return make


def test_a_trained_prm_is_compared_with_the_reference_that_it_was_trained_against(
    context, prm, save_model, rollout
) -> None:
    reference = save_model(2)
    path = prm(reference)
    source = config(path=path, online=None, reference="initial").build(context())
    assert source.needs == frozenset()
    ratio = of_folder(path, rollout) - of_folder(reference, rollout)
    torch.testing.assert_close(source.score(rollout).tokens, torch.where(rollout.action_mask, 0.5 * ratio, 0.0))


def test_a_reference_that_is_the_policys_is_not_loaded_again(context, prm, policy_path) -> None:
    source = config(path=prm(policy_path), online=None, reference="initial").build(context())
    assert source.needs == {"reference"}


def test_the_recorded_reference_is_for_initial_alone(context, prm, save_model) -> None:
    source = config(path=prm(save_model(2)), reference="behaviour").build(context())
    assert source.needs == {"behaviour"}
