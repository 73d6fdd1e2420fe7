"""Batched generation outside a trainer: sampled training data and greedy evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_kit.rollout import Text


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    batch_size: int = 64,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[str]:
    """One completion a prompt, decoded without special tokens: greedy, or sampled at `temperature`.

    Prompts are text or messages (rendered with the tokenizer's chat template). `on_batch` is told how many rows
    are done.
    """
    was_training = model.training
    model.eval()
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": 1.0, "top_k": 0}
    completions: list[str] = []
    for start in range(0, len(prompts), batch_size):
        inputs = encode_prompts(tokenizer, prompts[start : start + batch_size]).to(model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=eos_token_ids(model, tokenizer),
            disable_compile=True,
            **sampling,
        )
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        completions.extend(tokenizer.batch_decode(new_ids, skip_special_tokens=True))
        on_batch(len(completions))
    model.train(was_training)
    return completions


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those the model declares."""
    declared = model.generation_config.eos_token_id
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    return sorted({*ids, tokenizer.eos_token_id})


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text]):
    """Left-padded `input_ids` and `attention_mask` of text or conversational prompts."""
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts), padding=True, return_tensors="pt")
    return tokenizer.apply_chat_template(
        [list(prompt) for prompt in prompts],
        add_generation_prompt=True,
        tokenize=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
