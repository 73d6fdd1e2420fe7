"""Tools that a policy may call while it generates: plain functions, as TRL's `tools` takes them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

OPERATIONS: Mapping[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.floordiv,
}
MOST_DIGITS = 30  # of an operand: what a model writes must not keep the calculator busy
INTEGER = re.compile(rf"\s*[+-]?[0-9]{{1,{MOST_DIGITS}}}\s*")


def calculator(a: int, operation: str, b: int) -> int:
    """Compute `a operation b` for two integers.

    Args:
        a: The first number.
        operation: What to do with the two. (choices: ["+", "-", "*", "/"])
        b: The second number.

    Returns:
        The result.
    """
    # TRL hands this docstring to the model as the tool's description, so what follows is for readers alone. What is
    # raised here is the tool's answer to the policy: TRL writes {'error': ...} into the tool's message.
    if operation not in OPERATIONS:
        raise ValueError(f"operation {operation!r} is none of {' '.join(OPERATIONS)}")
    first, second = _integer("a", a), _integer("b", b)
    if operation == "/" and (second == 0 or first % second):
        raise ValueError(f"{first} / {second} is no integer")
    return OPERATIONS[operation](first, second)


def _integer(name: str, value: Any) -> int:
    """An argument as the model wrote it: a number, or the text of one."""
    if not INTEGER.fullmatch(str(value)):
        raise ValueError(f"{name} is no integer of at most {MOST_DIGITS} digits")
    return int(value)


TOOLS: Mapping[str, Callable[..., Any]] = {"calculator": calculator}
