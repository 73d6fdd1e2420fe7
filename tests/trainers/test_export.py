"""What is written loads without the kit, and nothing of the kit's own is in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from rlhf_kit.models.adapters import active_adapter, adapter_parameters, add_adapter_copy
from rlhf_kit.models.config import Lora, Pretrained
from rlhf_kit.models.critic import ValueHead, add_critic
from rlhf_kit.models.joint import add_joint_prm
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.models.scorer import add_log_prob_head
from rlhf_kit.trainers.export import without_kit_modules, write_model, write_prm_record
from rlhf_kit.trainers.trl_vllm import leave_out_kit_modules

REWARDS = [{"type": "verifier", "verifier": "exact"}]
IDS = torch.tensor([[4, 5, 9, 6]])


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def lora_model(path: str, seed: int = 0) -> PeftModel:
    """A LoRA model whose adapter changes what it computes."""
    model = load_model(Pretrained(path=path, peft=Lora(r=2)))
    assert isinstance(model, PeftModel)
    disturb(model, "default", seed)
    return model


def disturb(model: PeftModel, name: str, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name):
            parameter.add_(torch.randn_like(parameter))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_critic_and_prm_are_left_out(policy_path: str, tmp_path: Path, dtype: str) -> None:
    config = Pretrained(path=policy_path, dtype=dtype)
    model, prm = load_model(config), load_model(config)
    add_log_prob_head(model)
    add_critic(model, ValueHead(16))
    add_joint_prm(model, prm)
    assert {name.split(".")[0] for name in model.state_dict()} == {"model", "lm_head", "critic", "prm"}
    write_model(model, tmp_path, load_tokenizer(config))
    assert {name.split(".")[0] for name in load_file(tmp_path / "model.safetensors")} == {"model", "lm_head"}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert loaded.dtype == getattr(torch, dtype)
    assert torch.equal(logits(loaded), logits(model))
    assert AutoTokenizer.from_pretrained(tmp_path)("1 =")["input_ids"] == [5, 9]


def test_only_the_kits_own_modules_are_taken_out_of_a_state() -> None:
    kit = {"critic.linear.weight", "prm.model.norm.weight", "base_model.model.critic.linear.bias"}
    policy = {"model.layers.0.critic.weight", "lm_head.weight", "prm_head.weight", "base_model.model.model.prm.weight"}
    state = {name: torch.zeros(1) for name in kit | policy}
    assert set(without_kit_modules(state)) == policy


def test_a_lora_policy_is_written_as_its_adapter(policy_path: str, tmp_path: Path) -> None:
    model = lora_model(policy_path)
    add_critic(model.get_base_model(), ValueHead(16))
    write_model(model, tmp_path, load_tokenizer(Pretrained(path=policy_path)))
    assert all("lora_" in name for name in load_file(tmp_path / "adapter_model.safetensors"))
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_one_adapter_of_several_loads_on_its_own(policy_path: str, tmp_path: Path) -> None:
    model = lora_model(policy_path)
    add_adapter_copy(model, "helper")
    disturb(model, "helper", seed=1)
    write_model(model, tmp_path / "policy", None)
    write_model(model, tmp_path / "prm", None, adapter="helper")
    with active_adapter(model, "helper"):
        expected = logits(model)
    assert not torch.equal(expected, logits(model))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "prm")), expected)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")), logits(model))
    assert not (tmp_path / "prm" / "helper").exists() and not (tmp_path / "policy" / "helper").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_on_a_merged_one_is_written_as_a_whole_model(policy_path: str, tmp_path: Path, dtype: str) -> None:
    """Neither transformers nor PEFT could load the second adapter with the first below it."""
    tokenizer = load_tokenizer(Pretrained(path=policy_path))
    write_model(lora_model(policy_path), tmp_path / "first", tokenizer)
    second = load_model(Pretrained(path=str(tmp_path / "first"), peft=Lora(r=2), dtype=dtype))
    disturb(second, "default", seed=1)
    write_model(second, tmp_path / "second", tokenizer)
    assert not (tmp_path / "second" / "adapter_config.json").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
    assert loaded.dtype == getattr(torch, dtype)
    tolerance = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    torch.testing.assert_close(logits(loaded).float(), logits(second).float(), atol=tolerance, rtol=tolerance)


def test_a_given_state_is_what_is_written(policy_path: str, tmp_path: Path) -> None:
    """As when the weights are gathered from several processes."""
    model = load_model(Pretrained(path=policy_path))
    state = {name: torch.full_like(tensor, 0.25) for name, tensor in model.state_dict().items()}
    write_model(model, tmp_path, None, state={**state, "critic.linear.weight": torch.ones(1)})
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == state.keys()
    assert all((tensor == 0.25).all() for tensor in written.values())


def test_the_record_of_a_prm(tmp_path: Path) -> None:
    write_prm_record(tmp_path, 0.3, "runs/x/sft/model")
    assert json.loads((tmp_path / "prm.json").read_text()) == {"beta": 0.3, "reference": "runs/x/sft/model"}


class RecordingVllm:
    """Stands where vLLM's engine is, at the end of TRL's path to it, and keeps the names of what it is sent."""

    def __init__(self) -> None:
        self.llm_engine = self.model_executor = self.driver_worker = self.model_runner = self.model = self
        self.sent: list[str] = []

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        self.sent += [name for name, _ in weights]

    def reset_prefix_cache(self) -> None:
        pass


def connected(trainer: Any) -> Any:
    """TRL's path from a trainer to vLLM, without vLLM, whose construction needs it."""
    generation: Any = object.__new__(VLLMGeneration)
    generation.model, generation.accelerator, generation.llm = trainer.model, trainer.accelerator, RecordingVllm()
    generation.mode, generation.enable_sleep_mode = "colocate", False
    generation._dist = DistributedBackend(trainer.accelerator)
    leave_out_kit_modules(generation)
    return generation


@pytest.mark.parametrize("peft", [None, {"type": "lora", "r": 2}], ids=["whole", "lora"])
def test_vllm_is_sent_the_policy_alone(peft: Any, build: Any, policy_path: str) -> None:
    trainer = build(
        rewards=[
            {"type": "verifier", "verifier": "exact"},
            {"type": "implicit_prm", "online": {"order": "with_policy"}},
        ],
        credit={"estimator": "gae"},
        model={"peft": peft},
    )
    generation = connected(trainer)
    generation.sync_weights()
    policy = AutoModelForCausalLM.from_pretrained(policy_path)
    assert sorted(generation.llm.sent) == sorted(name for name, _ in policy.named_parameters())


def test_the_shared_base_does_not_drift_while_adapters_are_merged_for_vllm(build: Any) -> None:
    trainer = build(
        credit={"estimator": "rloo"}, model={"peft": {"type": "lora", "r": 2}, "dtype": "bfloat16"}, rewards=REWARDS
    )
    generation = connected(trainer)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if "lora_" not in n}
    for seed in range(5):
        disturb(trainer.model, "default", seed)
        generation.sync_weights()
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if "lora_" not in n)
