"""Writing of models that load anywhere: the kit's own modules are left out."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from huggingface_hub import HfApi
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer

from rlhf_kit.models.adapters import ADAPTER_FOLDER
from rlhf_kit.models.config import ModelConfig, Pretrained
from rlhf_kit.models.loading import holds_adapter, load_model
from rlhf_kit.models.zero3 import whole
from rlhf_kit.rewards.implicit_prm import PRM_RECORD, ImplicitPrm, ImplicitPrmConfig, read_prm_record

if TYPE_CHECKING:
    from rlhf_kit.trainers.ppo import PpoTrainer

KIT_MODULES = re.compile(r"^(base_model\.model\.)?(critic|prm)\.")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


def without_kit_modules(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without the critic and a PRM that trains with the policy."""
    return {name: tensor for name, tensor in state.items() if not KIT_MODULES.match(name)}


def export_model(trainer: Trainer, folder: Path) -> None:
    """Write the policy: `AutoModelForCausalLM.from_pretrained` loads it; a LoRA policy is written as its adapter.

    With `push_to_hub` it is uploaded as well, with the token that `HF_TOKEN` or a login gives.
    """
    accelerator = trainer.accelerator
    state = cast(dict[str, Tensor], accelerator.get_state_dict(trainer.model_wrapped))
    if accelerator.is_main_process:
        model = cast(nn.Module, accelerator.unwrap_model(trainer.model))
        write_model(model, folder, trainer.processing_class, state)
        upload(trainer, folder)
    accelerator.wait_for_everyone()


def upload(trainer: Trainer, folder: Path) -> None:
    """With `push_to_hub`, upload what is in `folder`, with the token that `HF_TOKEN` or a login gives."""
    if trainer.args.push_to_hub:
        message = f"{trainer.state.global_step} updates"
        HfApi().upload_folder(repo_id=str(trainer.hub_model_id), folder_path=folder, commit_message=message)


def write_model(
    model: nn.Module, folder: Path, tokenizer: Any, state: dict[str, Tensor] | None = None, adapter: str = "default"
) -> None:
    """Write a model (of a PEFT model: one adapter) and its tokenizer.

    An adapter whose base model is itself a base with an adapter merged in is written as a whole model, for nothing
    but the kit could put the two adapters together.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kept = without_kit_modules(state if state is not None else dict(model.state_dict()))
    if isinstance(model, PeftModel):
        _write_adapter(model, folder, kept, adapter)
    else:
        cast(Any, model).save_pretrained(folder, state_dict=kept)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.save_pretrained(folder)


def _write_adapter(model: PeftModel, folder: Path, state: dict[str, Tensor], adapter: str) -> None:
    model.save_pretrained(str(folder), state_dict=state, selected_adapters=[adapter])
    if adapter != "default":  # PEFT gives any other adapter a folder of its own
        for name in ADAPTER_FILES:
            (folder / adapter / name).replace(folder / name)
        shutil.rmtree(folder / adapter)
    if holds_adapter(str(model.peft_config[adapter].base_model_name_or_path)):
        dtype = str(model.dtype).removeprefix("torch.")
        merged = load_model(Pretrained.model_validate({"path": str(folder), "dtype": dtype}))
        (folder / ADAPTER_FOLDER).mkdir(exist_ok=True)  # for who has the base already (`adapter_on`)
        for name in ADAPTER_FILES:
            (folder / name).replace(folder / ADAPTER_FOLDER / name)
        merged.save_pretrained(str(folder))


def write_prm_record(folder: Path, beta: float, reference: str) -> None:
    """What a PRM's log-probabilities are compared with, beside its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PRM_RECORD).write_text(json.dumps({"beta": beta, "reference": reference}, indent=2), encoding="utf-8")


def reference_of(config: ImplicitPrmConfig, policy: ModelConfig) -> str:
    """The model that a PRM's log-probabilities are compared with: its own reference, else the policy's start."""
    record = read_prm_record(config.path) if config.path is not None else None
    return record["reference"] if record is not None else getattr(policy, "path", "")


def export_sources(trainer: PpoTrainer, folder: Path) -> None:
    """Write what online PRMs have learnt, each as a model or adapter that loads on its own."""
    for config, source in zip(trainer.scoring.configs, trainer.scoring.sources, strict=True):
        if not (isinstance(source, ImplicitPrm) and source.trainable_parameters()):
            continue
        target = folder / "prm" if config.source_name == config.type else folder / "prm" / config.source_name
        with whole(source.trainable_parameters()):
            if trainer.accelerator.is_main_process:
                adapter = config.source_name if isinstance(source.scorer.model, PeftModel) else "default"
                write_model(source.scorer.model, target, trainer.processing_class, adapter=adapter)
                write_prm_record(target, source.config.beta, reference_of(source.config, trainer.config.model))
