"""Adapters on one base: switching changes what is computed, and never what is trained."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel

from rlhf_kit.models.adapters import active_adapter, adapter_parameters, add_adapter_copy
from rlhf_kit.models.config import Lora, Pretrained
from rlhf_kit.models.loading import load_model
from rlhf_kit.models.scorer import add_log_prob_head, rollout_outputs


@pytest.fixture
def model(saved) -> PeftModel:
    """A LoRA model with two adapters that both differ from the base and from each other."""
    torch.manual_seed(0)
    model = load_model(Pretrained(path=saved, peft=Lora(r=2, target_modules=("q_proj", "down_proj", "embed_tokens"))))
    add_log_prob_head(model)
    _disturb(model, "default")
    add_adapter_copy(model, "prm")
    return model


def _disturb(model: PeftModel, name: str) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(model, name):
            parameter.add_(torch.randn_like(parameter))


def scores(model: PeftModel, rollout, name: str | None) -> torch.Tensor:
    with torch.no_grad(), active_adapter(model, name):
        return rollout_outputs(model, rollout)[0]


def flags(model: PeftModel) -> dict[str, bool]:
    return {key: parameter.requires_grad for key, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_fresh_adapter_is_exactly_its_base(saved, rollout, dtype) -> None:
    torch.manual_seed(0)
    model = load_model(Pretrained(path=saved, dtype=dtype, peft=Lora(r=2)))
    base = load_model(Pretrained(path=saved, dtype=dtype))
    for each in (model, base):
        add_log_prob_head(each)
    with torch.no_grad():
        expected = rollout_outputs(base, rollout)[0]
    assert torch.equal(scores(model, rollout, "default"), expected)
    _disturb(model, "default")
    assert not torch.equal(scores(model, rollout, "default"), expected)
    assert torch.equal(scores(model, rollout, None), expected)


def test_a_copied_adapter_is_exactly_the_first_until_it_changes(model, rollout) -> None:
    assert len(adapter_parameters(model, "prm")) == len(adapter_parameters(model, "default")) == 6
    first = scores(model, rollout, "default")
    assert torch.equal(scores(model, rollout, "prm"), first)
    assert not torch.equal(scores(model, rollout, None), first)
    _disturb(model, "prm")
    assert not torch.equal(scores(model, rollout, "prm"), first)
    assert torch.equal(scores(model, rollout, "default"), first)


def test_a_copied_adapter_is_frozen_and_the_first_stays_trainable(model) -> None:
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "prm"))
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "default"))
    trained = sum(flags(model).values())
    assert trained == len(adapter_parameters(model, "default"))


@pytest.mark.parametrize("name", ["default", "prm", None])
@pytest.mark.parametrize("prm_trains", [False, True])
def test_requires_grad_is_the_same_before_during_and_after(model, name, prm_trains) -> None:
    for parameter in adapter_parameters(model, "prm"):
        parameter.requires_grad_(prm_trains)
    before = flags(model)
    with active_adapter(model, name):
        assert flags(model) == before
    assert flags(model) == before
    assert model.active_adapter == "default"


@pytest.mark.parametrize("name", ["prm", None])
def test_everything_is_put_back_after_an_exception(model, rollout, name) -> None:
    before, expected = flags(model), scores(model, rollout, "default")
    with pytest.raises(KeyError), active_adapter(model, name):
        raise KeyError
    assert flags(model) == before
    with torch.no_grad():
        assert torch.equal(rollout_outputs(model, rollout)[0], expected)


def test_an_unknown_adapter_is_an_error_and_changes_nothing(model) -> None:
    before = flags(model)
    with pytest.raises(ValueError, match="critic"), active_adapter(model, "critic"):
        pass
    assert flags(model) == before
    assert model.active_adapter == "default"


@pytest.mark.parametrize("name", ["default", "prm"])
def test_only_the_active_adapter_gets_gradients(model, rollout, name) -> None:
    for parameter in adapter_parameters(model, "prm"):
        parameter.requires_grad_(True)
    with active_adapter(model, name):
        rollout_outputs(model, rollout)[0].sum().backward()
    other = {"default": "prm", "prm": "default"}[name]
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapter_parameters(model, name))
    assert all(parameter.grad is None for parameter in adapter_parameters(model, other))


def test_a_name_that_is_also_a_module_of_the_base_means_the_adapter(model) -> None:
    add_adapter_copy(model, "mlp")
    assert len(adapter_parameters(model, "mlp")) == 6


def test_a_name_that_is_taken_is_an_error(model) -> None:
    with pytest.raises(ValueError, match="default, prm"):
        add_adapter_copy(model, "prm")
    with pytest.raises(ValueError, match="default, prm"):
        add_adapter_copy(model, "other", of="missing")
