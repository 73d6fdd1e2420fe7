"""Outcome-labelled completions as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_kit.rollout import Text

OutcomeRows = Mapping[str, Tensor]


def encode_outcomes(data: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Rows of `prompt_ids`, `completion_ids` (closed by the end-of-sequence token) and a float `label`."""
    rows = [{**encode_row(tokenizer, row["prompt"], row["completion"]), "label": float(row["label"])} for row in data]
    return Dataset.from_list(rows)


def encode_row(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> dict[str, list[int]]:
    """Ids of a prompt as generation sees it, and of its completion behind it.

    Text is encoded in two parts, so that the completion starts on a token of its own, as a sampled one does.
    """
    if isinstance(prompt, str):
        text = completion if isinstance(completion, str) else str(completion[-1]["content"])
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids = [*ids, tokenizer.eos_token_id]
        return {"prompt_ids": tokenizer(prompt)["input_ids"], "completion_ids": ids}
    prompt_ids = _template(tokenizer, prompt, add_generation_prompt=True)
    messages = [
        *prompt,
        *([{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion),
    ]
    full = _template(tokenizer, messages, add_generation_prompt=False)
    if full[: len(prompt_ids)] != prompt_ids:
        raise ValueError("the chat template renders a prompt differently once an answer follows; use another template")
    return {"prompt_ids": prompt_ids, "completion_ids": full[len(prompt_ids) :]}


def collate_outcomes(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Left-padded prompts (B, P), right-padded completions (B, T), their masks, labels and offsets (B,)."""
    prompts = [torch.tensor(row["prompt_ids"]) for row in rows]
    completions = [torch.tensor(row["completion_ids"]) for row in rows]
    batch = {
        "prompt_ids": _pad(prompts, pad_token_id, "left"),
        "prompt_mask": _pad([torch.ones_like(ids, dtype=torch.bool) for ids in prompts], False, "left"),
        "completion_ids": _pad(completions, pad_token_id, "right"),
        "completion_mask": _pad([torch.ones_like(ids, dtype=torch.bool) for ids in completions], False, "right"),
    }
    for name in ("label", "offset"):
        if name in rows[0]:
            batch[name] = torch.tensor([float(row[name]) for row in rows])
    return batch


def _pad(rows: list[Tensor], value: int | bool, side: str) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value, padding_side=side)


def _template(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], add_generation_prompt: bool) -> list[int]:
    rendered = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
    )
    return list(rendered["input_ids"])
