"""Writing of models that load anywhere: the kit's own modules are left out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

KIT_MODULES = re.compile(r"^(base_model\.model\.)?(critic|prm)\.")


def without_kit_modules(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the critic and a PRM that trains with the policy."""
    return {name: tensor for name, tensor in state.items() if not KIT_MODULES.match(name)}


def export_model(trainer: Trainer, folder: Path) -> None:
    """Write the policy: `AutoModelForCausalLM.from_pretrained` loads it; a LoRA policy is written as its adapter."""
    accelerator = trainer.accelerator
    state = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        write_model(accelerator.unwrap_model(trainer.model), folder, trainer.processing_class, state)
    accelerator.wait_for_everyone()


def write_model(
    model: nn.Module, folder: Path, tokenizer: Any, state: dict[str, Tensor] | None = None, adapter: str = "default"
) -> None:
    """Write a model (of a PEFT model: one adapter) and its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = without_kit_modules(state if state is not None else dict(model.state_dict()))
    options: dict[str, Any] = {"selected_adapters": [adapter]} if isinstance(model, PeftModel) else {}
    model.save_pretrained(folder, state_dict=kept, **options)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.save_pretrained(folder)


def write_prm_record(folder: Path, beta: float, reference: str) -> None:
    """What a PRM's log-probabilities are compared with, beside its weights."""
    (folder / "prm.json").write_text(json.dumps({"beta": beta, "reference": reference}, indent=2))
