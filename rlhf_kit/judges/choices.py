"""Log-probabilities of the words that an answer may begin with, from the likeliest tokens that a server shows."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rlhf_kit.judges.local import surface_forms

_LEAST_PROBABILITY = 1e-9
_ROUNDING = 1e-2  # what 16-bit logits may lie above a log-probability of 0


def choice_log_probs(top: Sequence[tuple[str, float]], choices: Sequence[str]) -> list[float]:
    """For each choice the log-probability that the answer's first token begins one of its surface forms.

    `log sum_t p(t)` over the distinct tokens `t` among `top` that are a surface form of the choice ("Yes", " yes",
    "YES", ...). Where no whole form is among them, over those that begin one, and begin no other choice: tokenizers
    may cut a word. Where there are none either, the choice is less likely than each token shown and than all that
    are not shown together: the smaller of the two stands for it.

    Raises:
        ValueError: none of the choices is among `top`, or a value there is no log-probability: not a number, or above 0
            by more than rounding.
    """
    tokens = {token: _log_probability(token, value) for token, value in top}
    forms = [frozenset(surface_forms(choice.strip())) for choice in choices]
    wholes = [[t for t in tokens if t in own] for own in forms]
    begun = [{t for t in tokens if t.strip() and any(form.startswith(t) for form in own)} for own in forms]
    log_probs: list[float | None] = []
    for place, whole in enumerate(wholes):
        others = set().union(*(begun[other] for other in range(len(forms)) if other != place))
        chosen = whole or sorted(begun[place] - others)
        log_probs.append(_log_sum_exp([tokens[token] for token in chosen]) if chosen else None)
    if all(value is None or value == -math.inf for value in log_probs):
        shown = ", ".join(repr(token) for token in list(tokens)[:5])
        raise ValueError(
            f"none of the choices {', '.join(map(repr, choices))} is among the {len(tokens)} likeliest first tokens "
            f"({shown}, ...): let the prompt ask for one of these words and nothing else"
        )
    unseen = max(1.0 - math.exp(_log_sum_exp(list(tokens.values()))), _LEAST_PROBABILITY)
    bound = min(min(tokens.values()), math.log(unseen))
    return [bound if value is None else value for value in log_probs]


def _log_probability(token: str, value: float) -> float:
    if not value <= _ROUNDING:  # which NaN is not either
        raise ValueError(f"what the server calls log-probabilities are none: that of {token!r} is {value:g}")
    return min(value, 0.0)


def _log_sum_exp(values: Sequence[float]) -> float:
    largest = max(values)
    if largest == -math.inf:
        return largest
    return largest + math.log(sum(math.exp(value - largest) for value in values))
