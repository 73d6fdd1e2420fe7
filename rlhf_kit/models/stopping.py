"""Stop strings: generation ends with the token that completes one in the decoded completion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

CONTEXT = 8


def ends_with_stop_string(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_strings: Sequence[str]) -> bool:
    """Whether the last token of a completion completes a stop string; more text of that token may stand behind it."""
    if not (ids and stop_strings):
        return False
    # A token is at least one byte; a few more tokens, for some decoders change the first.
    tail = list(ids[-(max(len(stop.encode()) for stop in stop_strings) + CONTEXT) :])
    text, before = tokenizer.decode(tail), tokenizer.decode(tail[:-1])
    return any(stop in text and stop not in before for stop in stop_strings)


class StopAt(StoppingCriteria):
    """Ends the rows whose completion ends with a stop string.

    transformers' own criterion reads the prompt too, and cannot be built for every tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop_strings: Sequence[str], prompt_length: int) -> None:
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        completions = input_ids[:, self._prompt_length :].tolist()
        ended = [ends_with_stop_string(self._tokenizer, ids, self._stop_strings) for ids in completions]
        return torch.tensor(ended, device=input_ids.device)


def generate_until(
    generate: Callable[..., Tensor],
    tokenizer: PreTrainedTokenizerBase,
    stop_strings: Sequence[str],
    *,
    input_ids: Tensor,
    **options: Any,
) -> Tensor:
    """A model's `generate` that ends rows at a stop string."""
    criteria = StoppingCriteriaList([StopAt(tokenizer, stop_strings, input_ids.shape[1])])
    return generate(input_ids=input_ids, stopping_criteria=criteria, **options)
