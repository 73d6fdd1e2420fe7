"""How likely a model finds continuations of a context: long contexts, read once, with many short continuations."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

Ids = Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """`sum_t log p(f_t | x, f_<t)` of a continuation `f` of a context `x`, and how many tokens it has."""

    sum: float
    tokens: int

    @property
    def mean(self) -> float:
        """The log-probability of a token, on average."""
        return self.sum / self.tokens


@torch.no_grad()
def log_likelihoods(
    model: nn.Module, contexts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], batch_size: int = 32
) -> list[list[Likelihood]]:
    """The likelihood of each context's continuations, given the context.

    The token that follows position t is read from the logits at t: a continuation's first token from those of the
    context's last. Each context is read once, and its keys and values serve all of its continuations. Contexts are
    padded on the left and continuations on the right, at most `batch_size` of either at a time, by similar length.

    Raises:
        ValueError: a context or a continuation has no token.
    """
    for kind, texts in (("context", contexts), ("continuation", [text for own in continuations for text in own])):
        if not all(len(text) for text in texts):
            raise ValueError(f"a {kind} has no token, and nothing can be said of its likelihood")
    found: list[list[Likelihood]] = [[] for _ in contexts]
    for group in _groups(contexts, continuations, batch_size):
        ids, mask = _padded([contexts[place] for place in group], "left", _device(model))
        output = _forward(model, ids, mask, logits_to_keep=1)
        next_log_probs = output.logits[:, -1].float().log_softmax(dim=-1)
        pairs = [(row, index) for row, place in enumerate(group) for index in range(len(continuations[place]))]
        pairs.sort(key=lambda pair: -len(continuations[group[pair[0]]][pair[1]]))
        sums: dict[tuple[int, int], float] = {}
        for start in range(0, len(pairs), batch_size):
            chunk = pairs[start : start + batch_size]
            texts = [continuations[group[row]][index] for row, index in chunk]
            rows = torch.tensor([row for row, _ in chunk], device=ids.device)
            totals = _sums(model, output.past_key_values, mask[rows], rows, next_log_probs[rows], texts)
            sums.update(zip(chunk, totals.tolist(), strict=True))
        for row, place in enumerate(group):
            own = enumerate(continuations[place])
            found[place] = [Likelihood(sums[row, index], len(text)) for index, text in own]
    return found


def _groups(contexts: Sequence[Ids], continuations: Sequence[Sequence[Ids]], batch_size: int) -> Iterator[list[int]]:
    """Contexts of similar length that are read together, so many that their continuations make one batch."""
    order = [place for place in range(len(contexts)) if continuations[place]]
    order.sort(key=lambda place: -len(contexts[place]))
    most = max((len(continuations[place]) for place in order), default=1)
    size = max(1, batch_size // most)
    for start in range(0, len(order), size):
        yield order[start : start + size]


def _sums(
    model: nn.Module,
    cache: Any,
    context_mask: Bool[Tensor, "R C"],
    rows: Int[Tensor, "R"],
    first: Float[Tensor, "R V"],
    continuations: Sequence[Ids],
) -> Float[Tensor, "R"]:
    """Summed log-probabilities of continuations, the i-th of the context in row `rows[i]` of `cache`."""
    ids, mask = _padded(continuations, "right", rows.device)
    log_probs = first.gather(1, ids[:, :1])
    if ids.shape[1] > 1:
        own = copy.deepcopy(cache)  # the model appends to it
        own.batch_select_indices(rows)
        seen = torch.cat([context_mask, mask[:, :-1]], dim=1)
        logits = _forward(model, ids[:, :-1], seen, past_key_values=own).logits
        later = logits.float().log_softmax(dim=-1).gather(2, ids[:, 1:, None]).squeeze(2)
        log_probs = torch.cat([log_probs, later], dim=1)
    return torch.where(mask, log_probs, 0.0).sum(dim=1)


def _forward(model: nn.Module, ids: Int[Tensor, "R L"], mask: Bool[Tensor, "R S"], **options: Any) -> Any:
    """The model's output for the last L of S positions; positions count from each row's first token."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        positions = mask.long().cumsum(dim=1).sub(1).clamp(min=0)
        options["position_ids"] = positions[:, -ids.shape[1] :]
    return model(input_ids=ids, attention_mask=mask.long(), use_cache=True, **options)


def _padded(rows: Sequence[Ids], side: str, device: torch.device) -> tuple[Int[Tensor, "R L"], Bool[Tensor, "R L"]]:
    """Token ids with any token as padding, and which of them are there."""
    tensors = [torch.tensor(row) for row in rows]
    ids = pad_sequence(tensors, batch_first=True, padding_side=side)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.bool) for row in rows], batch_first=True, padding_side=side)
    return ids.to(device), mask.to(device)


def _device(model: nn.Module) -> torch.device:
    return cast(torch.device, cast(Any, model).device)
