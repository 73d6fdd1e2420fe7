"""The implicit reward of a trained model: its log-ratio on the sampled ids, where and per what it is asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from rlhf_kit.models.adapters import adapter_parameters
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_model
from rlhf_kit.models.scorer import add_log_prob_head, rollout_outputs
from rlhf_kit.rewards.dpo_implicit import DpoImplicitConfig, new_characters
from rlhf_kit.rollout import Rollout, Status

LORA = {"type": "lora", "r": 2}


def config(**fields) -> DpoImplicitConfig:
    return DpoImplicitConfig.model_validate({"type": "dpo_implicit", **fields})


def log_probs(path: str, rollout: Rollout) -> torch.Tensor:
    model = load_model(Pretrained(path=path))
    add_log_prob_head(model)
    with torch.no_grad():
        return rollout_outputs(model, rollout)[0]


@pytest.fixture
def adapter(policy_path: str, tmp_path: Path) -> str:
    """Folder of a LoRA adapter on the policy, with random weights."""
    model = load_model(Pretrained.model_validate({"path": policy_path, "peft": LORA}))
    assert isinstance(model, PeftModel)
    torch.manual_seed(5)
    for parameter in adapter_parameters(model, "default"):
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(str(tmp_path / "adapter"))
    return str(tmp_path / "adapter")


@pytest.fixture
def texts(rollout: Rollout) -> Rollout:
    """The rollout with texts: a sentence of two tokens, nothing, one token, and two sentences around a tool."""
    rows = ["1. 2", "", "1", "3. 4"]
    offsets = [[(0, 2), (2, 4), (4, 4)], [(0, 0)] * 3, [(0, 1), (1, 1), (1, 1)], [(0, 3), (3, 3), (3, 4)]]
    return replace(rollout, texts=rows, offsets=offsets)


def test_a_model_against_another_is_their_log_ratio(context, save_model, rollout) -> None:
    trained, reference = save_model(1), save_model(2)
    source = config(path=trained, reference=reference, beta=0.5).build(context())
    assert source.kind == "process" and source.needs == frozenset()
    rewards = source.score(rollout)
    ratio = 0.5 * (log_probs(trained, rollout) - log_probs(reference, rollout))
    expected = torch.where(rollout.action_mask, ratio, 0.0)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(rewards.tokens, expected)
    assert rewards.status.tolist() == [Status.OK] * 4


def test_the_policy_as_it_starts_is_taken_where_no_path_is_given(context, save_model, policy_path, rollout) -> None:
    other = save_model(1)
    start = replace(rollout, logprobs={"reference": log_probs(policy_path, rollout)})
    as_model = config(reference=other).build(context())
    as_reference = config(path=other, reference=policy_path).build(context())
    assert as_model.needs == as_reference.needs == {"reference"}
    given = as_model.score(start).tokens
    assert given.any()
    torch.testing.assert_close(given, -as_reference.score(start).tokens)


@pytest.mark.parametrize("peft", [None, LORA])
def test_an_adapter_is_compared_with_its_base_and_shares_the_policys(
    context, adapter, policy_path, rollout, peft
) -> None:
    built = context(peft=peft)
    source = config(path=adapter).build(built)
    start = replace(rollout, logprobs={"reference": log_probs(policy_path, rollout)})
    ratio = log_probs(adapter, rollout) - start.logprobs["reference"]
    assert ratio.abs().max() > 0.1
    torch.testing.assert_close(source.score(start).tokens, torch.where(rollout.action_mask, ratio, 0.0))
    if peft:
        assert source._trained is not None and source._trained.model is built.policy
        assert not any(parameter.requires_grad for parameter in adapter_parameters(built.policy, "dpo_implicit"))


def test_the_record_beside_a_model_says_what_it_was_trained_from(context, save_model, rollout, tmp_path) -> None:
    trained, reference = Path(save_model(3)), save_model(4)
    assert [p.path for p in config(path=str(trained)).problems(Pretrained(path="x"), [])] == ["reference"]
    with pytest.raises(ValueError, match=r"nothing says what .* was trained from; set reference"):
        config(path=str(trained)).build(context())
    (trained / "prm.json").write_text(json.dumps({"beta": 0.1, "reference": reference}))
    assert list(config(path=str(trained)).problems(Pretrained(path="x"), [])) == []
    known = config(path=str(trained)).build(context()).score(rollout).tokens
    assert torch.equal(known, config(path=str(trained), reference=reference).build(context()).score(rollout).tokens)


def test_equal_weights_reward_exactly_nothing(context, save_model, rollout) -> None:
    source = config(path=save_model(6), reference=save_model(6)).build(context())
    assert (source.score(rollout).tokens == 0).all()


def test_a_completion_or_a_segment_has_the_sum_of_its_tokens_at_its_end(context, save_model, texts) -> None:
    models = {"path": save_model(1), "reference": save_model(2)}
    by_token = config(**models).build(context()).score(texts).tokens
    whole = config(**models, per="completion").build(context())
    assert whole.kind == "outcome"
    expected = torch.zeros(4, 3)
    for row, last in enumerate([2, 0, 1, 2]):
        expected[row, last] = by_token[row].sum()
    torch.testing.assert_close(whole.score(texts).tokens, expected)

    parts = config(**models, per="segment", segments={"by": "step", "pattern": r"\. "}).build(context()).score(texts)
    expected = torch.zeros(4, 3)
    expected[0, 0], expected[0, 2] = by_token[0, 0], by_token[0, 1] + by_token[0, 2]
    expected[1, 0], expected[2, 1] = by_token[1, 0], by_token[2].sum()
    expected[3, 0], expected[3, 2] = by_token[3, 0], by_token[3, 2]
    torch.testing.assert_close(parts.tokens, expected)


@pytest.mark.parametrize(("unit", "lengths"), [("tokens", [3, 1, 2, 2]), ("characters", [4, 0, 1, 4])])
def test_length_costs_alpha_a_unit(context, save_model, texts, unit, lengths) -> None:
    models = {"path": save_model(1), "reference": save_model(2)}
    plain = config(**models).build(context()).score(texts).tokens
    costly = config(**models, length_penalty={"alpha": 0.25, "unit": unit}).build(context()).score(texts).tokens
    torch.testing.assert_close((plain - costly).sum(dim=1), 0.25 * torch.tensor(lengths).float())
    assert not costly[~texts.action_mask].any()


def test_a_character_of_several_tokens_is_counted_once(texts) -> None:
    split = replace(texts, offsets=[[(0, 1), (0, 1), (1, 4)], *texts.offsets[1:]])
    assert new_characters(split)[0].tolist() == [1, 0, 3]


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "reference"),
        ({"path": "a/b", "reference": "a/b"}, "reference"),
        ({"path": "a/b", "segments": {"pattern": "("}}, "segments.pattern"),
    ],
)
def test_what_cannot_work_is_said_beforehand(fields, path) -> None:
    assert path in [problem.path for problem in config(**fields).problems(Pretrained(path="x"), [])]
