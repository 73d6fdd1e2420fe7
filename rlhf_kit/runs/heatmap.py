"""Per-token credit of sampled completions as HTML: colour = advantage, hover = reward by source, line = judged span.

Completions are untrusted text: all that comes from a sample is escaped, and nothing here needs a script.
A sample is a line of a samples file: `prompt`, `completion`, `tokens`, and as many `advantages`, `rewards` by
source, `values`, `kl`, `action_mask`, `offsets`, besides `outcome`, `step_truth` and `spans`: for each source the
`[start, end, reward]` of what it judged, in characters of `completion`.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from rlhf_kit.runs.formatting import format_number

# Blue and orange stay apart in every common form of colour blindness; black and white text both read on them.
POSITIVE = "0,114,178"
NEGATIVE = "213,94,0"
STRONGEST = 0.72
MAX_TOKENS = 2000
SHORT = 80  # completions up to this many tokens stand side by side
MAX_SPANS = 6  # of one token that are told
CONTINUED = "<i>·</i>"
DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

JudgedSpan = tuple[str, int, int, float | None]  # source, start, end, reward
STYLE = f"<style>\n{(Path(__file__).parent / 'heatmap.css').read_text(encoding='utf-8')}</style>\n"


def heatmap_html(sample: Mapping[str, Any], scale: float | None = None) -> str:
    """A self-contained fragment that shows one completion; `scale` is the advantage of full colour."""
    scale = advantage_scale([sample]) if scale is None else scale
    return STYLE + _legend(scale, [sample]) + _card(sample, scale)


def heatmap_page(samples: Sequence[Mapping[str, Any]]) -> str:
    """A self-contained fragment that shows the samples of one step on one scale, for `wandb.Html`."""
    return STYLE + heatmap_cards(samples)


def heatmap_cards(samples: Sequence[Mapping[str, Any]]) -> str:
    """Legend and cards of one step's samples, for a page that has `STYLE` already."""
    scale = advantage_scale(samples)
    short = all(len(sample.get("tokens") or ()) <= SHORT for sample in samples)
    cards = "".join(_card(sample, scale) for sample in samples)
    return f'{_legend(scale, samples)}<div class="{"hm-short" if short else "hm-long"}">{cards}</div>\n'


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


def _legend(scale: float, samples: Sequence[Mapping[str, Any]]) -> str:
    limit = format_number(scale, digits=3)
    judged = '<span><u class="hm-up">span with a reward</u> <u class="hm-down">with a penalty</u></span>'
    return (
        f'<div class="hm-legend"><span>advantage</span><span>≤ −{limit}</span><span class="hm-bar"></span>'
        f"<span>≥ +{limit}</span>{judged if any(_spans(sample) for sample in samples) else ''}</div>\n"
    )


def _card(sample: Mapping[str, Any], scale: float) -> str:
    tokens = sample.get("tokens") or []
    places, spans = _places(sample), _spans(sample)
    marks, holding = _step_marks(sample, places), _holding(spans)
    shown, read = "", 0
    for index, (start, end) in enumerate(places[:MAX_TOKENS]):
        over = [spans[k] for k in sorted({k for character in range(start, end) for k in holding.get(character, ())})]
        net = {c: sum(spans[k][3] or 0.0 for k in holding[c]) for c in range(start, end) if c in holding}
        text = _underlined(str(tokens[index]), start, net, min(max(read - start, 0), end - start))
        read = max(read, end)
        shown += _token(sample, index, scale, text, over) + _mark(marks.get(index))
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
        total = _total([reward for reward in rewards or [] if reward is not None])
        parts.append(f"<span>{_clean(source)} <b>{format_number(total)}</b></span>")
    actions = sum(_is_action(sample, index) for index in range(len(sample.get("tokens") or [])))
    parts.append(f"<span><b>{actions}</b> tokens</span>")
    return f'<div class="hm-head">{"".join(parts)}</div>'


def _total(rewards: Sequence[float]) -> float:
    """Their sum; 0 where nothing but the rounding of float32 is left of it."""
    total = math.fsum(rewards)
    return 0.0 if abs(total) < 1e-6 * math.fsum(map(abs, rewards)) else total


def _prompt(sample: Mapping[str, Any]) -> str:
    prompt = sample.get("prompt")
    if not prompt:
        return ""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False, indent=1)
    preview = " ".join(text.split())[:160]
    summary = f"<summary>prompt <span>· {_clean(preview)}</span></summary>"
    return f"<details>{summary}<pre>{_clean(text)}</pre></details>"


def _token(sample: Mapping[str, Any], index: int, scale: float, shown: str, spans: Sequence[JudgedSpan]) -> str:
    if not _is_action(sample, index):
        return f'<span class="hm-other" data-tip="not chosen by the policy">{shown}</span>'
    background = colour(_at(sample.get("advantages"), index), scale)
    return f'<span style="background:{background}" data-tip="{_tip(sample, index, spans)}">{shown}</span>'


def _mark(right: bool | None) -> str:
    return "" if right is None else "<b>✓</b>" if right else '<b class="hm-x">✗</b>'


def _shown(text: str) -> str:
    return _clean(text).replace("\n", "<i>↵</i>\n")


def _underlined(text: str, start: int, net: Mapping[int, float], known: int) -> str:
    """A token's text, its judged characters underlined by the sign of their spans' rewards; it begins at `start`.

    Its first `known` characters stand in the token before it already. Where there are no others a dot shows that the
    token has a part of the last of them.
    """
    parts = []
    signs = [None if start + k not in net else (net[start + k] > 0) - (net[start + k] < 0) for k in range(len(text))]
    dots = 0 < known == len(text)
    places = [known - 1] if dots else range(known, len(text))
    for sign, run in groupby(places, key=lambda place: signs[place]):
        part = CONTINUED if dots else _shown("".join(text[place] for place in run))
        kind = {1: ' class="hm-up"', -1: ' class="hm-down"', 0: ""}
        parts.append(part if sign is None else f"<u{kind[sign]}>{part}</u>")
    return "".join(parts)


def _tip(sample: Mapping[str, Any], index: int, spans: Sequence[JudgedSpan]) -> str:
    sources = sample.get("rewards") or {}
    rows = [("advantage", _at(sample.get("advantages"), index))]
    rows += [(f"reward {source}", _at(rewards, index)) for source, rewards in sources.items()]
    rows += [
        (name, _at(sample.get(key), index)) for name, key in (("value", "values"), ("KL", "kl")) if sample.get(key)
    ]
    rows += [(f"span {source}", reward) for source, _, _, reward in spans[:MAX_SPANS]]
    width = max(len(name) for name, _ in rows)
    lines = [f"token {index + 1} of {len(sample['tokens'])}"]
    lines += [f"{name:<{width}}  {format_number(number, signed=True)}" for name, number in rows]
    lines += [f"and {len(spans) - MAX_SPANS} more spans"] if len(spans) > MAX_SPANS else []
    return _clean("\n".join(lines)).replace("\n", "&#10;")


def _spans(sample: Mapping[str, Any]) -> list[JudgedSpan]:
    """Source, start, end and reward of all spans of a completion, in the order of their starts."""
    spans = [(name, *span) for name, found in (sample.get("spans") or {}).items() for span in found]
    return sorted(spans, key=lambda span: (span[1], span[2]))


def _holding(spans: Sequence[JudgedSpan]) -> dict[int, list[int]]:
    """For each judged character the numbers of the spans that hold it."""
    holding: dict[int, list[int]] = {}
    for k, (_, start, end, _) in enumerate(spans):
        for character in range(start, end):
            holding.setdefault(character, []).append(k)
    return holding


def _places(sample: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Characters of the completion that each token has; none where it is no part of the text, as special tokens.

    They are its `offsets`, or else what fits: a character may belong to two tokens.
    """
    if len(sample.get("offsets") or ()) == len(sample.get("tokens") or ()):
        return [(int(start), int(end)) for start, end in sample.get("offsets") or ()]
    text = str(sample.get("completion") or "")
    places, position = [], 0
    for token in sample.get("tokens") or []:
        length = len(str(token))
        start = next((at for at in (position, position - 1) if at >= 0 and text.startswith(str(token), at)), None)
        places.append((position, position) if start is None else (start, start + length))
        position = places[-1][1]
    return places


def _step_marks(sample: Mapping[str, Any], places: Sequence[tuple[int, int]]) -> dict[int, bool]:
    """By index of the last token of each step with a known truth: whether that step is right."""
    truth = sample.get("step_truth") or []
    separator = sample.get("step_separator") or " "
    text = str(sample.get("completion") or "")
    marks, start, steps = {}, 0, iter(truth)
    for piece in text.split(separator):
        if piece.strip():
            stop = start + len(piece.rstrip())
            right = next(steps, None)
            last = next((index for index, (_, end) in enumerate(places) if end >= stop), None)
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
    """Escaped text without control characters, which browsers and terminals may act upon, and what turns text round."""
    visible = "".join("\N{REPLACEMENT CHARACTER}" if _is_control(character) else character for character in str(text))
    return escape(visible, quote=True)


def _is_control(character: str) -> bool:
    if unicodedata.category(character) in ("Cc", "Cs"):
        return character not in "\n\t"
    return character in DIRECTIONS
