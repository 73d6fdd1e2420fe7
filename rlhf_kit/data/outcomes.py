"""Outcome-labelled completions as token ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_kit.data.load import Origins
from rlhf_kit.data.messages import completion_messages, completion_text
from rlhf_kit.errors import RunError
from rlhf_kit.models.generation import chat_text
from rlhf_kit.rollout import Text

logger = logging.getLogger(__name__)
OutcomeRows = Mapping[str, Tensor]
Encoded = TypeVar("Encoded")


def encode_outcomes(
    data: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, origins: Origins | None = None
) -> Dataset:
    """Rows of `prompt_ids`, `completion_ids` (closed by an end-of-sequence token), `length` and a float `label`.

    `length` is the number of tokens, which transformers' `train_sampling_strategy: group_by_length` reads.

    Raises:
        RunError: a row cannot be encoded; the message names it as `origins` does.
    """

    encoder = RowEncoder(tokenizer)

    def encode(row: Mapping[str, Any]) -> dict[str, Any]:
        ids = encoder(row["prompt"], row["completion"], row.get("completion_ids"), row.get("tools"))
        return {**ids, "length": sum(map(len, ids.values())), "label": float(row["label"])}

    return Dataset.from_list(list(encoder.each_row(data, origins, encode)))


class RowEncoder:
    """`encode_row` for the rows of one data set, with a count of the sampled ids that were not this tokenizer's.

    Attributes:
        sampled: completions that came with ids.
        foreign: those of them whose text was encoded instead.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.sampled = 0
        self.foreign = 0

    def __call__(
        self, prompt: Text, completion: Text, sampled: Sequence[int] | None = None, tools: Any = None
    ) -> dict[str, list[int]]:
        ids = encode_row(self._tokenizer, prompt, completion, sampled, tools)
        if sampled is not None:
            self.sampled += 1
            self.foreign += ids["completion_ids"] != list(sampled)
        return ids

    def each_row(
        self,
        data: Iterable[Mapping[str, Any]],
        origins: Origins | None,
        encode: Callable[[Mapping[str, Any]], Encoded],
    ) -> Iterator[Encoded]:
        """`each_row`, and at its end a warning if ids were foreign."""
        yield from each_row(data, origins, encode)
        self.warn("data" if origins is None else origins.source)

    def warn(self, source: str) -> None:
        """Say how many of the sampled ids were foreign, if some were."""
        if self.foreign:
            logger.warning(
                "%s: the sampled ids of %d of %d completions do not spell their text in this model's tokenizer "
                "(another model's sampled them, or the text was edited): the text was encoded instead",
                source,
                self.foreign,
                self.sampled,
            )


def each_row(
    data: Iterable[Mapping[str, Any]], origins: Origins | None, encode: Callable[[Mapping[str, Any]], Encoded]
) -> Iterator[Encoded]:
    """What `encode` makes of each row.

    Raises:
        RunError: of a row it raised; the message names that as `origins` does.
    """
    for number, row in enumerate(data):
        try:
            yield encode(row)
        except (TypeError, ValueError) as error:
            name = f"data, row {number + 1}" if origins is None else origins.name(number)
            raise RunError(f"{name}: {error}") from error


def encode_row(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    sampled: Sequence[int] | None = None,
    tools: Any = None,
) -> dict[str, list[int]]:
    """Ids of a prompt as generation sees it, and of its completion as if it had been sampled behind it.

    The two are encoded apart, so that the completion starts on a token of its own; it ends with the token that ends
    a turn in the chat template, or else the end-of-sequence token. `sampled` ids that spell the completion (`says`)
    stay as they are: the text may have other tokens, and a completion that was cut off has no end. `tools` are those of
    the row, for the chat template: a list, or its JSON.

    Raises:
        ValueError: the chat template renders the prompt differently once an answer follows.
    """
    prompt_text, text = render_row(tokenizer, prompt, completion, tools)
    if isinstance(prompt, str):
        prompt_ids = _ids(tokenizer, prompt_text)
    else:
        prompt_ids = _ids(tokenizer, prompt_text, add_special_tokens=False)
    if sampled is not None and says(tokenizer, sampled, completion):
        return {"prompt_ids": prompt_ids, "completion_ids": list(sampled)}
    return {"prompt_ids": prompt_ids, "completion_ids": _closed(_ids(tokenizer, text, False), tokenizer)}


def says(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], completion: Text) -> bool:
    """Whether ids are tokens of this tokenizer that spell a completion, its special tokens apart."""
    known = len(ids) > 0 and min(ids) >= 0 and max(ids) < len(tokenizer)
    return known and tokenizer.decode(list(ids), skip_special_tokens=True) == completion_text(completion)


def check_aligned(encoded: Mapping[str, Any], roles: Mapping[str, tuple[str, str]]) -> None:
    """Say that a completion has other tokens behind one prompt than behind another, of which losses compare each.

    `encoded` has `<role>.completion_ids`; `roles` are an objective's prompt and completion by role.

    Raises:
        ValueError: one has.
    """
    first: dict[str, tuple[str, Any]] = {}
    for role, (prompt, completion) in roles.items():
        ids = encoded[f"{role}.completion_ids"]
        before, expected = first.setdefault(completion, (prompt, ids))
        if ids != expected:
            raise ValueError(
                f"{completion!r} has other tokens behind {prompt!r} ({len(ids)}) than behind {before!r} "
                f"({len(expected)}): the chat template writes it differently; set model.chat_template to one that does "
                "not, or give text"
            )


def render_row(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, tools: Any = None
) -> tuple[str, str]:
    """The text of a prompt and what follows it: the completion, in the form that the chat template gives it.

    The template is told of `tools`, which text does not have.
    """
    if isinstance(prompt, str):
        return prompt, completion_text(completion)
    messages = [*prompt, *completion_messages(completion)]
    before = chat_text(tokenizer, prompt, tools, add_generation_prompt=True)
    full = chat_text(tokenizer, messages, tools, add_generation_prompt=False)
    if not full.startswith(before):
        raise ValueError(
            f"the chat template renders a prompt differently once an answer follows: {before[-80:]!r} does not open "
            f"{full[-160:]!r}; set model.chat_template to one that does not"
        )
    # What a template writes behind the end of a turn (a line break, as a rule) was never sampled.
    return before, full[len(before) :].rstrip()


def collate_outcomes(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> dict[str, Tensor]:
    """Left-padded prompts (B, P), right-padded completions (B, T), their masks, labels and offsets (B,)."""
    prompts = [torch.tensor(row["prompt_ids"], dtype=torch.long) for row in rows]
    completions = [torch.tensor(row["completion_ids"], dtype=torch.long) for row in rows]
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


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = True) -> list[int]:
    return cast(list[int], tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])


def _closed(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with the end-of-sequence token behind them, unless a token that ends a turn is there already."""
    last = tokenizer.added_tokens_decoder.get(ids[-1]) if ids and ids[-1] != tokenizer.unk_token_id else None
    return ids if last is not None and last.special else [*ids, cast(int, tokenizer.eos_token_id)]
