"""Batched generation outside a trainer: sampled training data and greedy evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_kit.rollout import Text


def generate(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], **options: Any
) -> list[str]:
    """`generate_ids`, decoded without special tokens."""
    return tokenizer.batch_decode(generate_ids(model, tokenizer, prompts, **options), skip_special_tokens=True)


@torch.no_grad()
def generate_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Text],
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_p: float = 1.0,
    batch_size: int = 64,
    tools: Sequence[Any] | None = None,
    synced_gpus: bool | None = None,
    on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[int]]:
    """The tokens of one completion a prompt, greedy or sampled at `temperature`, up to the one that ends it.

    Prompts are text or messages (rendered with the tokenizer's chat template, which is told of each prompt's `tools`).
    `synced_gpus` is transformers': None
    lets the processes of ZeRO-3 wait for each other at every token, False is for a model that each has whole.
    With `top_p` only the likeliest tokens are sampled that have that much of the probability together.
    `on_batch` is told how many rows are done, of how many, at the start and after each batch.
    """
    policy = cast(Any, model)  # transformers adds `generate` to the classes that it instantiates
    was_training = model.training
    model.eval()
    sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature is not None:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    ends = eos_token_ids(model, tokenizer)
    completions: list[list[int]] = []
    on_batch(0, len(prompts))
    for start in range(0, len(prompts), batch_size):
        stop = start + batch_size
        inputs = encode_prompts(tokenizer, prompts[start:stop], None if tools is None else tools[start:stop])
        output = policy.generate(
            **{name: tensor.to(policy.device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=ends,
            disable_compile=True,
            synced_gpus=synced_gpus,
            **sampling,
        )
        new_ids = output[:, inputs["input_ids"].shape[1] :]
        completions.extend(_through_end(ids, ends) for ids in new_ids.tolist())
        on_batch(len(completions), len(prompts))
    model.train(was_training)
    return completions


def chat_text(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], tools: Any, add_generation_prompt: bool
) -> str:
    """Messages as the chat template writes them, which is told of `tools`: a list, or its JSON."""
    known = json.loads(tools) if isinstance(tools, str) else tools
    rendered = tokenizer.apply_chat_template(
        cast(Any, list(messages)),
        tools=known or None,  # Llama's templates write of tools where the list is empty
        add_generation_prompt=add_generation_prompt,
        tokenize=False,
    )
    return cast(str, rendered)


def _through_end(ids: list[int], ends: Sequence[int]) -> list[int]:
    """`ids` without the padding behind the first token that ends a completion."""
    length = next((position + 1 for position, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]


def eos_token_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token that ends a completion: the tokenizer's and those the model declares."""
    declared = cast(Any, model).generation_config.eos_token_id
    ids = [declared] if isinstance(declared, int) else list(declared or [])
    return sorted({*ids, cast(int, tokenizer.eos_token_id)} - {None})


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], tools: Sequence[Any] | None = None
) -> dict[str, Tensor]:
    """Left-padded `input_ids` and `attention_mask` of text or conversational prompts, each with its `tools`, if any."""
    encoded: Any
    if isinstance(prompts[0], str):
        encoded = tokenizer(cast(Any, list(prompts)))
    elif tools is None:
        conversations = cast(Any, [list(prompt) for prompt in prompts])
        encoded = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, tokenize=True, return_dict=True
        )
    else:
        told = zip(prompts, tools, strict=True)
        texts = [chat_text(tokenizer, prompt, known, add_generation_prompt=True) for prompt, known in told]
        encoded = tokenizer(texts, add_special_tokens=False)
    encoded = tokenizer.pad(dict(encoded), padding=True, padding_side="left", return_tensors="pt")
    # Some tokenizers add fields, such as token types, that no causal model takes.
    fields = cast(dict[str, Tensor], encoded)
    return {name: fields[name] for name in ("input_ids", "attention_mask")}
