"""From characters of a completion to the tokens that the policy sampled.

Offsets are character ranges `[start, end)` in the decoded completion, computed from the sampled ids: text
that is tokenised again may come out as other tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from rlhf_kit.credit.pieces import piece_offsets
from rlhf_kit.rollout import CharRange, Span

_PLACEMENTS = ("end", "spread", "start", "each")
# Tokens decoded before the one looked at, so that it is decoded as it is inside a text: decoders strip the
# first token's space, and join bytes to characters. The window grows to twice as many before it moves on.
_CONTEXT = 8
_REPLACEMENT = "\ufffd"


@runtime_checkable
class Decoder(Protocol):
    """What is asked of a tokenizer."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> Any: ...


def token_offsets(tokenizer: Decoder, ids: Sequence[int], skip_special_tokens: bool = True) -> list[CharRange]:
    """Character range of each token within `tokenizer.decode(ids, skip_special_tokens=...)`.

    A token's range is what decoding one token more adds to the text. Every character is in the range of some
    token; a character whose bytes lie in several tokens is in the range of each. Tokens that leave no text
    (special tokens, a space that the decoder strips) have an empty range where they stand. They follow from the
    tokens' pieces (`piece_offsets`) where these make the text, else from decoding a moving window.
    """
    ids = list(ids)
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    known = piece_offsets(tokenizer, ids, text, skip_special_tokens)
    if known is not None:
        return known
    offsets, settled = _scan(tokenizer, ids, text, skip_special_tokens, context=_CONTEXT)
    if settled != len(text):  # windows do not suit this decoder: decode every prefix from the start
        offsets, _ = _scan(tokenizer, ids, text, skip_special_tokens, context=len(ids))
    return offsets


def _scan(
    tokenizer: Decoder, ids: list[int], text: str, skip_special_tokens: bool, context: int
) -> tuple[list[CharRange], int]:
    """Offsets by decoding a moving window of ids, and how many characters of `text` they account for.

    The window `ids[first:k + 1]` decodes to `current`, whose first character is `text[base]`. Its characters
    that agree with `text` are settled. What follows them is pending: the replacement character for an
    incomplete one, or text that the tokenizer's clean-up rewrites once the next token is there.
    """

    def decode(part: list[int]) -> str:
        return tokenizer.decode(part, skip_special_tokens=skip_special_tokens)

    offsets: list[CharRange] = []
    first = base = settled = 0
    previous = ""
    for k, token in enumerate(ids):
        current = decode(ids[first : k + 1])
        agreed = _agreement(current, text, base)
        start, settled = settled, max(settled, base + agreed)
        pending = current[agreed:]
        end = min(settled + bool(pending.strip()), len(text))
        if current == previous or previous.endswith(_REPLACEMENT):
            alone = decode([token])
            if current == previous and not alone:
                end = start
            elif _continues_character(alone, previous, current):
                start = min(start, max(base + len(previous) - 1, 0))
        offsets.append((start, max(start, end)))
        previous = current
        if k + 1 - first >= 2 * context and not pending:
            # Move on only to where the shorter window reads the same; else this one goes on growing.
            shorter = decode(ids[k + 1 - context : k + 1])
            if shorter and text.endswith(shorter, 0, settled):
                first, base, previous = k + 1 - context, settled - len(shorter), shorter
    return offsets, settled


def _agreement(current: str, text: str, base: int) -> int:
    """How many characters of `current` agree with `text[base:]`."""
    if text.startswith(current, base):
        return len(current)
    pairs = enumerate(zip(current, text[base : base + len(current)], strict=False))
    return next((i for i, (ours, theirs) in pairs if ours != theirs), len(text) - base)


def _continues_character(alone: str, previous: str, current: str) -> bool:
    """Whether a token's first bytes belong to the replacement character at the end of `previous`.

    Only undecidable bytes come out as replacement characters, so such a token begins with one when decoded
    alone, and adds fewer characters to the text than it has alone.
    """
    return (
        previous.endswith(_REPLACEMENT) and alone.startswith(_REPLACEMENT) and len(alone) > len(current) - len(previous)
    )


def spread_spans(
    spans: Sequence[Sequence[Span]],
    offsets: Sequence[Sequence[CharRange]],
    action_mask: Bool[Tensor, "B T"],
    placement: str = "end",
) -> Float32[Tensor, "B T"]:
    """Token rewards from each completion's spans, given its tokens' `offsets`.

    A span's reward goes to the last (`end`) or first (`start`) action token that overlaps it, or in equal
    parts to all of them (`spread`); rewards that meet on a token add up. So a completion's total reward is
    that of its spans, however it is tokenised. With `each` every one of these tokens gets the reward whole, and
    the total grows with their number. A span of no characters, or of none that the policy wrote, rewards nothing.

    Raises:
        ValueError: if `placement` is unknown, a span does not lie within its completion, or the rows do not
        match.
    """
    if placement not in _PLACEMENTS:
        raise ValueError(f"placement {placement!r} is unknown; choose one of {', '.join(_PLACEMENTS)}")
    ranges = _as_tensor(offsets, action_mask)
    if len(spans) != len(offsets):
        raise ValueError(f"spans of {len(spans)} completions do not match offsets of {len(offsets)}")
    rewards = torch.zeros(action_mask.shape, device=action_mask.device)
    for row, row_spans in enumerate(spans):
        length = _length(offsets[row])
        for span in row_spans:
            if not 0 <= span.start <= span.end <= length:
                raise ValueError(f"{span} does not lie within its completion of {length} characters (row {row})")
        if row_spans:
            rewards[row] = _row_rewards(row_spans, ranges[row], action_mask[row], placement)
    return rewards


def _row_rewards(
    spans: Sequence[Span], ranges: Int64[Tensor, "T 2"], mask: Bool[Tensor, "T"], placement: str
) -> Float32[Tensor, "T"]:
    bounds = torch.tensor([(span.start, span.end) for span in spans], device=mask.device)
    start, end = torch.maximum(bounds[:, :1], ranges[:, 0]), torch.minimum(bounds[:, 1:], ranges[:, 1])
    rewards = torch.tensor([span.reward for span in spans], dtype=torch.float32, device=mask.device)
    overlaps = (start < end) & mask
    if placement == "end":
        overlaps &= overlaps.flip(1).cumsum(dim=1).flip(1) == 1
    elif placement == "start":
        overlaps &= overlaps.cumsum(dim=1) == 1
    shares = rewards if placement == "each" else rewards / overlaps.sum(dim=1).clamp(min=1)
    return torch.where(overlaps, shares[:, None], 0.0).sum(dim=0)


def spans_on_actions(
    spans: Sequence[Sequence[Span]],
    offsets: Sequence[Sequence[CharRange]],
    action_mask: Bool[Tensor, "B T"],
) -> list[list[Span]]:
    """The spans that overlap an action token: those that `spread_spans` gives to some token."""
    kept = []
    for row_spans, row_offsets, actions in zip(spans, offsets, action_mask.tolist(), strict=True):
        written = bytearray(_length(row_offsets))  # 1 where the policy chose a token that has the character
        for (start, end), action in zip(row_offsets, actions, strict=False):
            if action:
                written[start:end] = b"\x01" * (end - start)
        kept.append([span for span in row_spans if written.find(1, span.start, span.end) >= 0])
    return kept


def segment(text: str, pattern: str) -> list[CharRange]:
    """Character ranges of the steps of `text`, which end where the regular expression `pattern` has matched.

    A separator belongs to the step that it ends; what follows the last one is the last step. The ranges
    adjoin and cover the text, and none is empty.
    """
    ends = [match.end() for match in re.finditer(pattern, text)] + [len(text)]
    return [(start, end) for start, end in zip([0, *ends], ends, strict=False) if start < end]


def step_ids(
    offsets: Sequence[Sequence[CharRange]],
    segments: Sequence[Sequence[CharRange]],
    action_mask: Bool[Tensor, "B T"],
) -> Int64[Tensor, "B T"]:
    """Number of the step (of `segments`, see `segment`) that each action token belongs to; -1 elsewhere.

    A token belongs to the step that holds its last character. One without text belongs to the step before it,
    so an end-of-sequence token to the last step; a completion without text is one step, 0.

    Raises:
        ValueError: if segments do not cover their completion one behind the other, or the rows do not match.
    """
    ranges = _as_tensor(offsets, action_mask)
    if len(segments) != len(offsets):
        raise ValueError(f"segments of {len(segments)} completions do not match offsets of {len(offsets)}")
    ids = torch.full(action_mask.shape, -1, dtype=torch.int64, device=action_mask.device)
    for row, steps in enumerate(segments):
        length = _length(offsets[row])
        ends = [end for _, end in steps]
        if [start for start, _ in steps] != [0, *ends][: len(steps)] or [0, *ends][-1] != length:
            raise ValueError(f"segments {list(steps)} do not cover the {length} characters of row {row} in order")
        last_characters = (ranges[row][:, 1] - 1).clamp(min=0).contiguous()
        boundaries = torch.tensor(ends, dtype=torch.int64, device=ids.device)
        ids[row] = torch.bucketize(last_characters, boundaries, right=True)
    return torch.where(action_mask, ids, -1)


def _as_tensor(offsets: Sequence[Sequence[CharRange]], action_mask: Bool[Tensor, "B T"]) -> Int64[Tensor, "B T 2"]:
    """`offsets` padded with empty ranges behind the text to the shape of `action_mask`."""
    rows, width = action_mask.shape
    longest = max(map(len, offsets), default=0)
    if len(offsets) != rows or longest > width:
        raise ValueError(
            f"offsets of {len(offsets)} completions of up to {longest} tokens do not match the action mask "
            f"of shape {tuple(action_mask.shape)}; compute them from the ids that the mask is for"
        )
    padded = [[*row, *[(_length(row), _length(row))] * (width - len(row))] for row in offsets]
    return torch.tensor(padded, dtype=torch.int64, device=action_mask.device).view(rows, width, 2)


def _length(offsets: Sequence[CharRange]) -> int:
    """Characters of the completion that `offsets` cover."""
    return max((end for _, end in offsets), default=0)
