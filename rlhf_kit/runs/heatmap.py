"""Per-token credit of sampled completions as HTML: colour = advantage, hover = reward by source.

Completions are untrusted text: all that comes from a sample is escaped, and nothing here needs a script.
A sample is a line of a samples file: `prompt`, `completion`, `tokens`, and as many `advantages`, `rewards` by
source, `values`, `kl`, `action_mask`, besides `outcome` and `step_truth`.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rlhf_kit.runs.formatting import format_number

# Blue and orange stay apart in every common form of colour blindness; black and white text both read on them.
POSITIVE = "0,114,178"
NEGATIVE = "213,94,0"
STRONGEST = 0.72
MAX_TOKENS = 2000
SHORT = 80  # completions up to this many tokens stand side by side

STYLE = f"<style>\n{(Path(__file__).parent / 'heatmap.css').read_text(encoding='utf-8')}</style>\n"


def heatmap_html(sample: Mapping[str, Any], scale: float | None = None) -> str:
    """A self-contained fragment that shows one completion; `scale` is the advantage of full colour."""
    scale = advantage_scale([sample]) if scale is None else scale
    return STYLE + _legend(scale) + _card(sample, scale)


def heatmap_page(samples: Sequence[Mapping[str, Any]]) -> str:
    """A self-contained fragment that shows the samples of one step on one scale, for `wandb.Html`."""
    return STYLE + heatmap_cards(samples)


def heatmap_cards(samples: Sequence[Mapping[str, Any]]) -> str:
    """Legend and cards of one step's samples, for a page that has `STYLE` already."""
    scale = advantage_scale(samples)
    short = all(len(sample.get("tokens") or ()) <= SHORT for sample in samples)
    cards = "".join(_card(sample, scale) for sample in samples)
    return f'{_legend(scale)}<div class="{"hm-short" if short else "hm-long"}">{cards}</div>\n'


def advantage_scale(samples: Sequence[Mapping[str, Any]]) -> float:
    """The 95th percentile of |advantage| over the action tokens: one outlier does not bleach the others."""
    sizes = sorted(
        abs(advantage)
        for sample in samples
        for index in range(len(sample.get("tokens") or []))
        if _is_action(sample, index) and (advantage := _at(sample.get("advantages"), index))
    )
    return sizes[min(len(sizes) - 1, int(0.95 * len(sizes)))] if sizes else 1.0


def colour(advantage: float | None, scale: float) -> str:
    """CSS colour of an advantage: blue above 0, orange below, nothing at 0, full from `scale` on."""
    if not advantage:
        return "transparent"
    alpha = STRONGEST * min(1.0, abs(advantage) / scale) if scale else STRONGEST
    return f"rgba({POSITIVE if advantage > 0 else NEGATIVE},{alpha:.2f})"


def _legend(scale: float) -> str:
    limit = format_number(scale, digits=3)
    return (
        f'<div class="hm-legend"><span>advantage</span><span>≤ −{limit}</span><span class="hm-bar"></span>'
        f"<span>≥ +{limit}</span></div>\n"
    )


def _card(sample: Mapping[str, Any], scale: float) -> str:
    tokens = sample.get("tokens") or []
    marks = _step_marks(sample)
    shown = "".join(_token(sample, index, scale, marks.get(index)) for index in range(min(len(tokens), MAX_TOKENS)))
    if len(tokens) > MAX_TOKENS:
        shown += f"<i> … {len(tokens) - MAX_TOKENS} more tokens</i>"
    if not tokens:
        shown = "<i>empty completion</i>"
    kind = "hm-text hm-steps" if marks else "hm-text"
    return f'<article class="hm">{_head(sample)}{_prompt(sample)}<div class="{kind}">{shown}</div></article>\n'


def _head(sample: Mapping[str, Any]) -> str:
    parts = []
    outcome = sample.get("outcome")
    if outcome is not None and float(outcome) in (0.0, 1.0):
        parts.append('<span class="hm-right">right</span>' if outcome else '<span class="hm-wrong">wrong</span>')
    elif outcome is not None:
        parts.append(f"<span>outcome <b>{format_number(outcome)}</b></span>")
    for source, rewards in (sample.get("rewards") or {}).items():
        total = sum(reward for reward in rewards or [] if reward is not None)
        parts.append(f"<span>{_clean(source)} <b>{format_number(total)}</b></span>")
    actions = sum(_is_action(sample, index) for index in range(len(sample.get("tokens") or [])))
    parts.append(f"<span><b>{actions}</b> tokens</span>")
    return f'<div class="hm-head">{"".join(parts)}</div>'


def _prompt(sample: Mapping[str, Any]) -> str:
    prompt = sample.get("prompt")
    if not prompt:
        return ""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, indent=1)
    preview = " ".join(text.split())[:160]
    summary = f"<summary>prompt <span>· {_clean(preview)}</span></summary>"
    return f"<details>{summary}<pre>{_clean(text)}</pre></details>"


def _token(sample: Mapping[str, Any], index: int, scale: float, right: bool | None) -> str:
    text = str(sample["tokens"][index])
    shown = _clean(text).replace("\n", "<i>↵</i>\n")
    mark = "" if right is None else "<b>✓</b>" if right else '<b class="hm-x">✗</b>'
    if not _is_action(sample, index):
        return f'<span class="hm-other" data-tip="not chosen by the policy">{shown}</span>{mark}'
    background = colour(_at(sample.get("advantages"), index), scale)
    return f'<span style="background:{background}" data-tip="{_tip(sample, index)}">{shown}</span>{mark}'


def _tip(sample: Mapping[str, Any], index: int) -> str:
    sources = sample.get("rewards") or {}
    rows = [("advantage", _at(sample.get("advantages"), index))]
    rows += [(f"reward {source}", _at(rewards, index)) for source, rewards in sources.items()]
    rows += [
        (name, _at(sample.get(key), index)) for name, key in (("value", "values"), ("KL", "kl")) if sample.get(key)
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"token {index + 1} of {len(sample['tokens'])}"]
    lines += [f"{name:<{width}}  {format_number(number, signed=True)}" for name, number in rows]
    return _clean("\n".join(lines)).replace("\n", "&#10;")


def _step_marks(sample: Mapping[str, Any]) -> dict[int, bool]:
    """By index of the last token of each step with a known truth: whether that step is right."""
    truth = sample.get("step_truth") or []
    separator = sample.get("step_separator") or " "
    text = str(sample.get("completion") or "")
    ends, position = [], 0
    for token in sample.get("tokens") or []:
        if text.startswith(str(token), position):  # special tokens are not in the text
            position += len(str(token))
        ends.append(position)
    marks, start, steps = {}, 0, iter(truth)
    for piece in text.split(separator):
        if piece.strip():
            stop = start + len(piece.rstrip())
            right = next(steps, None)
            last = next((index for index, end in enumerate(ends) if end >= stop), None)
            if right is not None and last is not None:
                marks[last] = bool(right)
        start += len(piece) + len(separator)
    return marks


def _is_action(sample: Mapping[str, Any], index: int) -> bool:
    mask = sample.get("action_mask")
    return mask is None or bool(_at(mask, index))


def _at(values: Sequence[Any] | None, index: int) -> Any:
    return values[index] if values is not None and index < len(values) else None


def _clean(text: object) -> str:
    """Escaped text without control characters, which browsers and terminals may act upon."""
    visible = "".join(
        "\N{REPLACEMENT CHARACTER}" if unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t" else char
        for char in str(text)
    )
    return escape(visible, quote=True)
