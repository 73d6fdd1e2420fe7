"""Completions as an offline objective sees them: log-probabilities and what else it needs, in one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad


@dataclass(frozen=True)
class Sequences:
    """Left-padded prompts (B, P) and right-padded completions (B, T)."""

    prompt_ids: Int[Tensor, "B P"]
    prompt_mask: Bool[Tensor, "B P"]
    completion_ids: Int[Tensor, "B T"]
    completion_mask: Bool[Tensor, "B T"]

    @property
    def ids(self) -> Int[Tensor, "B L"]:
        """Prompts and completions."""
        return torch.cat([self.prompt_ids, self.completion_ids], dim=1)

    @property
    def mask(self) -> Bool[Tensor, "B L"]:
        """Tokens that are no padding."""
        return torch.cat([self.prompt_mask, self.completion_mask], dim=1)

    @property
    def prompt_width(self) -> int:
        """P."""
        return self.prompt_ids.shape[1]


def joined(parts: Sequence[Sequences], pad_token_id: int) -> Sequences:
    """The rows of several batches under each other, padded to one width."""
    prompts = max(part.prompt_ids.shape[1] for part in parts)
    completions = max(part.completion_ids.shape[1] for part in parts)

    def left(tensor: Tensor, value: int) -> Tensor:
        return pad(tensor, (prompts - tensor.shape[1], 0), value=value)

    def right(tensor: Tensor, value: int) -> Tensor:
        return pad(tensor, (0, completions - tensor.shape[1]), value=value)

    return Sequences(
        torch.cat([left(part.prompt_ids, pad_token_id) for part in parts]),
        torch.cat([left(part.prompt_mask, 0) for part in parts]),
        torch.cat([right(part.completion_ids, pad_token_id) for part in parts]),
        torch.cat([right(part.completion_mask, 0) for part in parts]),
    )


def token_log_probs(model: nn.Module, sequences: Sequences, with_prompt: bool = False) -> Float[Tensor, "B L"]:
    """`log p(id_t | id_<t)` of every token in float32, 0 on padding, and on prompts unless `with_prompt`.

    The model carries the head of `add_log_prob_head`: there is no tensor of all logits. The first token of a row has
    no probability: 0.
    """
    labels = sequences.ids.masked_fill(~sequences.mask, -100)
    if not with_prompt:
        labels[:, : sequences.prompt_width] = -100
    output = model(input_ids=sequences.ids, attention_mask=sequences.mask.long(), labels=labels, fused_lm_head=True)
    width = labels.shape[1]
    log_probs = output.log_probs.float()
    return _without_first(pad(log_probs, (width - log_probs.shape[1], 0)), sequences)


def distributions(model: nn.Module, sequences: Sequences) -> Float[Tensor, "B T V"]:
    """`log p(. | id_<t)` at every completion token, in float32: a tensor of all logits, for what cannot do without."""
    logits = model(input_ids=sequences.ids, attention_mask=sequences.mask.long()).logits
    return logits[:, sequences.prompt_width - 1 : -1].float().log_softmax(dim=-1)


def chosen_tokens(log_p: Float[Tensor, "B T V"], sequences: Sequences) -> Float[Tensor, "B T"]:
    """Log-probabilities of the completions' tokens, 0 on padding."""
    taken = log_p.gather(2, sequences.completion_ids[:, :, None]).squeeze(2)
    return torch.where(sequences.completion_mask, taken, 0.0)


def kl_from(reference: Float[Tensor, "B T V"], log_p: Float[Tensor, "B T V"], mask: Bool[Tensor, "B T"]) -> Tensor:
    """`KL(ref || pi)` (B, T) of each token's distribution, 0 on padding."""
    kl = (reference.exp() * (reference - log_p)).sum(dim=2)
    return torch.where(mask, kl, 0.0)


def contrast_tokens(log_p: Float[Tensor, "B T V"], sequences: Sequences, among: int) -> Float[Tensor, "B T"]:
    """Log-probability (B, T) of a token drawn from the `among` likeliest other than the completion's own.

    Drawn with the model's probabilities, by torch's random generator; 0 on padding.
    """
    own = torch.zeros_like(log_p, dtype=torch.bool).scatter(2, sequences.completion_ids[:, :, None], True)
    top, _ = log_p.masked_fill(own, -torch.inf).topk(min(among, log_p.shape[2] - 1), dim=2)
    drawn = torch.distributions.Categorical(logits=top.detach()).sample()
    return torch.where(sequences.completion_mask, top.gather(2, drawn[:, :, None]).squeeze(2), 0.0)


def _without_first(log_probs: Float[Tensor, "B L"], sequences: Sequences) -> Float[Tensor, "B L"]:
    before = pad(sequences.mask[:, :-1], (1, 0), value=False)
    return torch.where(sequences.mask & before, log_probs, 0.0)
