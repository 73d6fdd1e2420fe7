"""Verifiers: whether a completion's final answer is right."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any

from rlhf_kit.data.customer import experience
from rlhf_kit.data.marketplace import market_of
from rlhf_kit.data.tasks import reasoning_gym_score

Row = Mapping[str, Any]

MARKER = re.compile(r"####|(?<!\w)(?:A|[Aa]nswer):|\\boxed\s*(?=\{)")
ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ANSWER_WORD = re.compile(r"(?<!\w)answer:", re.IGNORECASE)
NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)")
THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")


def verify(name: str, completion: str, row: Row) -> float | None:
    """Score in [0, 1] of a completion's text by the verifier `name`.

    None where `row` lacks what the verifier needs, as a row of another task does.

    Raises:
        ValueError: an unknown verifier.
    """
    if name not in VERIFIERS:
        raise ValueError(f"no verifier is called {name!r}: choose one of {', '.join(VERIFIERS)}")
    return VERIFIERS[name](completion, row)


def exact(completion: str, row: Row) -> float | None:
    """1 if the final answer equals the row's `answer`, both normalised; numbers compare as numbers.

    Where the completion marks no answer, its last words are taken, as many as the right answer has.
    """
    gold = _gold(row)
    if gold is None:
        return None
    answer = marked_answer(completion)
    if answer is None:
        words = completion.split()
        answer = " ".join(words[max(len(words) - len(gold.split()), 0) :])
    return float(same_answer(answer, gold))


def math(completion: str, row: Row) -> float | None:
    """1 if the answer that math-verify finds in the completion is mathematically equal to the row's `answer`.

    math-verify limits its time by a signal, which only the main thread can take; elsewhere it has no limit.
    None also where it cannot read the row's `answer`.
    """
    import math_verify

    gold = _gold(row)
    if gold is None:
        return None
    seconds: Any = 5 if threading.current_thread() is threading.main_thread() else None
    # Bare LaTeX is only recognised inside delimiters.
    source = gold if "$" in gold else rf"\boxed{{{gold}}}"
    expected = math_verify.parse(source, parsing_timeout=seconds)
    if not expected:
        return None
    found = math_verify.parse(completion, parsing_timeout=seconds)
    return float(math_verify.verify(expected, found, timeout_seconds=seconds))


def reasoning_gym(completion: str, row: Row) -> float | None:
    """The task's own score of what stands in the last `<answer>` tag, else behind the last `answer:`.

    Where the completion marks no answer, its last lines are taken, as many as the entry's own answer has.
    """
    if row.get("reasoning_gym_entry") is None:
        return None
    tags = ANSWER_TAG.findall(completion)
    if tags:
        return reasoning_gym_score(tags[-1].strip(), row)
    words = list(ANSWER_WORD.finditer(completion))
    if words:
        return reasoning_gym_score(completion[words[-1].end() :].strip(), row)
    lines = completion.strip().splitlines()
    expected_lines = len((row.get("answer") or "").strip().splitlines()) or len(lines)
    return reasoning_gym_score("\n".join(lines[-expected_lines:]).strip(), row)


def marketplace(completion: str, row: Row) -> float | None:
    """`(1 + U) / 2`, with U in [-1, 1] the true utility of what the rule-based customer buys on the completion's word.

    Buying nothing is worth 1/2.
    """
    market = market_of(row)
    return None if market is None else (1 + experience(market, completion, "none").utility) / 2


def marked_answer(text: str) -> str | None:
    r"""The line behind the last `####`, `A:`, `answer:` or `Answer:`, or the inside of `\boxed{}`.

    None where there is no such marker.
    """
    markers = list(MARKER.finditer(text))
    if not markers:
        return None
    rest = text[markers[-1].end() :]
    if markers[-1].group().startswith("\\boxed"):
        return _braced(rest)
    lines = rest.strip().splitlines()
    return lines[0].strip() if lines else ""


def same_answer(answer: str, gold: str) -> bool:
    """Whether two answers are equal after normalisation, as numbers where both are."""
    answer, gold = _normalise(answer), _normalise(gold)
    if NUMBER.fullmatch(answer) and NUMBER.fullmatch(gold):
        return Decimal(answer) == Decimal(gold)
    return answer == gold


def _gold(row: Row) -> str | None:
    """The row's `answer`, reduced to what stands behind its marker if it is a whole solution."""
    answer = row.get("answer")
    if answer is None:
        return None
    marked = marked_answer(str(answer))
    return str(answer).strip() if marked is None else marked


def _normalise(answer: str) -> str:
    answer = answer.replace("\\$", "").replace("$", "").strip().removesuffix(".").strip()
    return THOUSANDS.sub("", answer)


def _braced(text: str) -> str:
    """The inside of the braces that `text` opens with; all of it where they never close."""
    depth = 0
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[1:position].strip()
    return text[1:].strip()


VERIFIERS: Mapping[str, Callable[[str, Row], float | None]] = {
    "exact": exact,
    "math": math,
    "reasoning_gym": reasoning_gym,
    "marketplace": marketplace,
}
