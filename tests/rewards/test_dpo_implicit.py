"""The implicit reward of a trained model: its log-ratio on the sampled ids, where and per what it is asked for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from rlhf_kit.models.adapters import adapter_parameters
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import add_log_prob_head, rollout_outputs
from rlhf_kit.rewards.config import BuildContext
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
def save_adapter(tmp_path: Path) -> Callable[[str, int], str]:
    """Folder of a LoRA adapter on a model, with the random weights of a seed."""

    def save(base: str, seed: int) -> str:
        model = load_model(Pretrained.model_validate({"path": base, "peft": LORA}))
        assert isinstance(model, PeftModel)
        torch.manual_seed(seed)
        for parameter in adapter_parameters(model, "default"):
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(str(tmp_path / f"adapter{seed}"))
        return str(tmp_path / f"adapter{seed}")

    return save


@pytest.fixture
def adapter(save_adapter: Callable[[str, int], str], policy_path: str) -> str:
    """Folder of a LoRA adapter on the policy."""
    return save_adapter(policy_path, 5)


def parameters_of(*models: torch.nn.Module) -> int:
    """How many numbers models hold together, each counted once."""
    return sum({id(p): p.numel() for model in models for p in model.parameters()}.values())


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


def test_two_adapters_on_the_policys_base_share_it(context, save_adapter, policy_path, rollout) -> None:
    trained, reference = save_adapter(policy_path, 1), save_adapter(policy_path, 2)
    built = context(peft=LORA)
    alone = parameters_of(built.policy)
    source = config(path=trained, reference=reference).build(built)
    assert source.needs == frozenset()
    ratio = log_probs(trained, rollout) - log_probs(reference, rollout)
    torch.testing.assert_close(source.score(rollout).tokens, torch.where(rollout.action_mask, ratio, 0.0))
    own = parameters_of(load_model(built.policy_config)) - parameters_of(load_model(Pretrained(path=policy_path)))
    assert parameters_of(built.policy, source._trained.model, source._reference.model) == alone + 2 * own
    assert built.policy.active_adapter == "default"  # as the trainer expects it


@pytest.mark.parametrize("peft", [None, LORA])
@pytest.mark.parametrize("compared_with", ["adapter", "base"])
def test_adapters_on_a_base_of_their_own_load_it_once(
    context, save_model, save_adapter, rollout, peft, compared_with
) -> None:
    base = save_model(8)
    trained, other = save_adapter(base, 1), save_adapter(base, 2)
    reference = other if compared_with == "adapter" else base
    built = context(peft=peft)
    before = parameters_of(built.policy)
    source = config(path=trained, reference=reference).build(built)
    assert source._trained.model is source._reference.model and parameters_of(built.policy) == before
    ratio = log_probs(trained, rollout) - log_probs(reference, rollout)
    assert ratio.abs().max() > 0.1
    torch.testing.assert_close(source.score(rollout).tokens, torch.where(rollout.action_mask, ratio, 0.0))
    backwards = config(path=reference, reference=trained).build(built).score(rollout)
    torch.testing.assert_close(backwards.tokens, torch.where(rollout.action_mask, -ratio, 0.0))


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
    assert not torch.equal(parts.tokens, config(**models, per="segment").build(context()).score(texts).tokens)
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


# --- what is refused ---


@pytest.mark.parametrize(
    ("fields", "path"),
    [
        ({}, "reference"),
        ({"reference": "x"}, "reference"),
        ({"reference": "./x/"}, "reference"),
        ({"path": "x", "reference": "x"}, "reference"),
        ({"path": "a/b", "reference": "a/b"}, "reference"),
        ({"path": "./a/c/../b", "reference": "a/b"}, "reference"),
        ({"path": "a/b", "per": "segment", "segments": {"by": "step", "pattern": "("}}, "segments.pattern"),
        ({"path": "a/b", "segments": {"by": "sentence"}}, "segments"),
        ({"path": "a/b", "per": "completion", "segments": {"by": "sentence"}}, "segments"),
    ],
)
def test_what_cannot_work_is_said_beforehand(fields, path) -> None:
    assert [problem.path for problem in config(**fields).problems(Pretrained(path="x"), [])] == [path]


def test_a_model_whose_record_names_itself_rewards_nothing(save_model) -> None:
    trained = Path(save_model(3))
    (trained / "prm.json").write_text(json.dumps({"beta": 0.1, "reference": str(trained)}))
    (problem,) = config(path=str(trained)).problems(Pretrained(path="x"), [])
    assert str(problem).startswith("reference: is the model itself, and rewards nothing")


def test_an_adapter_may_be_compared_with_its_base_and_a_policy_with_another_model(adapter, policy_path) -> None:
    assert list(config(path=adapter, reference=policy_path).problems(Pretrained(path=policy_path), [])) == []
    assert list(config(reference=policy_path).problems(Pretrained(path=adapter), [])) == []


@pytest.fixture
def save_other(save_model, tmp_path) -> Callable[..., str]:
    """Folder of a tiny model with other words."""

    def save(*words: str) -> str:
        scratch = Scratch(type="scratch", vocabulary=words, hidden_size=16, intermediate_size=32, num_attention_heads=2)
        load_model(scratch).save_pretrained(tmp_path / "other")
        load_tokenizer(scratch).save_pretrained(tmp_path / "other")
        return str(tmp_path / "other")

    return save


def reading(context, policy_path: str) -> BuildContext:
    """A context with the policy's tokenizer, as a stage has it."""
    return replace(context(), tokenizer=load_tokenizer(Pretrained(path=policy_path)))


@pytest.mark.parametrize("place", ["path", "reference"])
@pytest.mark.parametrize("words", [("0", "1", "2", "4", "3", "="), ("0", "1", "2", "3", "4", "=", "5"), ("0", "1")])
def test_a_model_with_another_vocabulary_is_refused(context, save_model, save_other, policy_path, place, words) -> None:
    other = save_other(*words)
    models = {"path": save_model(1), "reference": save_model(2), place: other}
    with pytest.raises(ValueError, match="has another vocabulary than the policy") as error:
        config(**models, name="helper").build(reading(context, policy_path))
    assert all(text in str(error.value) for text in ("helper'", other, policy_path))


def test_adapters_on_a_base_with_another_vocabulary_are_refused(context, save_other, save_adapter, policy_path) -> None:
    trained = save_adapter(save_other("0", "1", "2", "4", "3", "="), 1)  # the adapter has no tokenizer of its own
    with pytest.raises(ValueError, match="token 7 is '4' there and '3' here"):
        config(path=trained).build(reading(context, policy_path))


def test_added_tokens_may_differ_but_must_be_known_to_both(context, save_model, policy_path, rollout) -> None:
    models = {"path": save_model(1), "reference": save_model(2)}
    padded = load_tokenizer(Pretrained(path=models["path"]))
    padded.add_tokens(["<other>"])
    padded.save_pretrained(models["path"])
    source = config(**models).build(reading(context, policy_path))
    assert source.score(rollout).tokens.any()
    built = reading(context, policy_path)
    built.tokenizer.add_tokens(["<mine>"])
    built.policy.resize_token_embeddings(len(built.tokenizer))
    with pytest.raises(ValueError, match=r"knows 10 tokens, and the policy has 11"):
        config(**models).build(built)
