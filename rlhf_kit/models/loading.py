"""Loading of policies, process reward models and their tokenizers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_kit.models.config import RUNNING_SUMS_MODULUS, Lora, Pretrained, Scratch
from rlhf_kit.models.tokenizers import word_level_tokenizer
from rlhf_kit.models.zero3 import load_undivided


def load_tokenizer(config: Pretrained | Scratch) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, left-padding and with a pad token (its end-of-sequence token if it has none)."""
    if isinstance(config, Scratch):
        return _scratch_tokenizer(config)
    tokenizer = AutoTokenizer.from_pretrained(
        config.tokenizer or config.path,
        padding_side="left",
        trust_remote_code=config.trust_remote_code,
        **_revision(config),
        **({"gguf_file": config.gguf_file} if config.gguf_file and not config.tokenizer else {}),
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if config.chat_template is not None:
        given = config.chat_template
        tokenizer.chat_template = Path(given).read_text() if os.path.isfile(given) else given
    return tokenizer


def load_model(config: Pretrained | Scratch, peft: Lora | None = None) -> PreTrainedModel | PeftModel:
    """A causal language model in the configured precision.

    With `peft` (or `config.peft`) the model is wrapped with a fresh LoRA adapter. A folder that holds a LoRA adapter
    gives its base model with the adapter merged in, so that a new adapter, a reference and a PRM can share it.
    """
    if isinstance(config, Scratch):
        return _scratch_model(config)
    model = _pretrained(config)
    lora = peft or config.peft
    return get_peft_model(model, lora_config(lora)) if lora is not None else model


def load_copy(config: Pretrained | Scratch) -> PreTrainedModel:
    """A frozen whole model outside the policy's engine, the same on every process."""
    model = load_undivided(lambda: cast(PreTrainedModel, load_model(config.model_copy(update={"peft": None}))))
    return model.requires_grad_(False).eval()


def save_whole(config: Pretrained, folder: Path) -> None:
    """Write a model and its tokenizer into a folder that is enough to load it: an adapter is merged into its base."""
    cast(Any, load_copy(config)).save_pretrained(folder)
    load_tokenizer(config).save_pretrained(folder)


def lora_config(lora: Lora) -> LoraConfig:
    """PEFT's configuration of a LoRA adapter for causal language modelling."""
    modules = lora.target_modules if isinstance(lora.target_modules, str) else list(lora.target_modules)
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=modules,
        task_type="CAUSAL_LM",
    )


def scratch_vocabulary(config: Scratch) -> tuple[str, ...]:
    """The words of a model made from scratch."""
    if config.vocabulary == "running_sums":
        from rlhf_kit.data.tasks import running_sums_vocabulary

        return tuple(running_sums_vocabulary(RUNNING_SUMS_MODULUS))
    if config.vocabulary == "tool_arithmetic":
        from rlhf_kit.data.tool_tasks import tool_arithmetic_vocabulary

        return tuple(tool_arithmetic_vocabulary())
    if config.vocabulary == "marketplace":
        from rlhf_kit.data.marketplace import marketplace_vocabulary

        return tuple(marketplace_vocabulary())
    return config.vocabulary


def _scratch_tokenizer(config: Scratch) -> PreTrainedTokenizerBase:
    tokenizer: Any = word_level_tokenizer(scratch_vocabulary(config))
    if config.vocabulary == "tool_arithmetic":
        from rlhf_kit.data.tool_tasks import CHAT_TEMPLATE, RESPONSE_TEMPLATE

        tokenizer.chat_template = CHAT_TEMPLATE
        tokenizer.response_template = RESPONSE_TEMPLATE
    return tokenizer


def _pretrained(config: Pretrained) -> PreTrainedModel:
    kwargs: dict[str, Any] = {"trust_remote_code": config.trust_remote_code, **_revision(config)}
    kwargs["dtype"] = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if config.attn_implementation is not None:
        kwargs["attn_implementation"] = config.attn_implementation
    if config.gguf_file is not None:
        from transformers import GgufConfig

        # Without dequantisation the weights could not be saved again.
        kwargs.update(gguf_file=config.gguf_file, quantization_config=GgufConfig(dequantize=True))
    if holds_adapter(config.path):
        adapter = PeftConfig.from_pretrained(config.path)
        base = config.model_copy(update={"path": adapter.base_model_name_or_path, "revision": adapter.revision})
        model: Any = PeftModel.from_pretrained(_pretrained(base), config.path).merge_and_unload()
        model.requires_grad_(True)  # the base of an adapter is frozen, and nothing is left of the adapter
        # A further adapter on this model must not be taken for one on the base alone.
        model.name_or_path = model.config._name_or_path = config.path
        return model
    return AutoModelForCausalLM.from_pretrained(config.path, **kwargs)


def holds_adapter(path: str | Path) -> bool:
    """Whether a folder holds a LoRA adapter rather than a whole model."""
    return (Path(path) / "adapter_config.json").is_file()


def _scratch_model(config: Scratch) -> PreTrainedModel:
    tokenizer = load_tokenizer(config)
    llama = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        bos_token_id=cast(int, tokenizer.bos_token_id),
        eos_token_id=cast(int, tokenizer.eos_token_id),
        pad_token_id=cast(int, tokenizer.pad_token_id),
        **config.config,
    )
    return LlamaForCausalLM(llama)


def _revision(config: Pretrained) -> dict[str, str]:
    return {"revision": config.revision} if config.revision else {}
