"""A generated task for a policy with a calculator, and the words of conversations about it.

A problem is a chain of additions and subtractions, worked out from the left. A solution asks the calculator for one
operation a turn and then says the result:

    user 12 + 7 - 5 =
    assistant call calculator a 12 operation + b 7 <eos>    tool 19
    assistant call calculator a 19 operation - b 5 <eos>    tool 14
    assistant 14 <eos>
"""

from __future__ import annotations

import random
from typing import Any

from rlhf_kit.data.tools import calculator

Row = dict[str, Any]
Message = dict[str, Any]

LARGEST_NUMBER = 99  # of the vocabulary
ROLES = ("user", "assistant", "tool")
CALL = ("call", "calculator", "a", "operation", "b")
OPERATORS = ("+", "-", "*", "/")
ERROR = "error"

# An answer that is an error is one word: a word-level tokenizer has none for what it says. A policy of a few thousand
# weights is not told what its tools are. The name, keys and values of a call are written as they come, as TRL asks.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}assistant {% generation %}"
    "{% if message['content'] %}{{ message['content'] + ' ' }}{% endif %}"
    "{% for call in message['tool_calls'] or [] %}call {{ call['function']['name'] }} "
    "{% for key, value in call['function']['arguments'].items() %}{{ key ~ ' ' ~ value ~ ' ' }}{% endfor %}{% endfor %}"
    "{{ eos_token }}{% endgeneration %} "
    "{% elif message['role'] == 'tool' and message['content'].startswith(\"{'error'\") %}tool " + ERROR + " "
    "{% else %}{{ message['role'] ~ ' ' ~ message['content'] ~ ' ' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)

# How transformers reads such a message back (`PreTrainedTokenizerBase.parse_response`).
RESPONSE_TEMPLATE: dict[str, Any] = {
    "defaults": {"role": "assistant"},
    "start_anchor": "assistant",
    "fields": {
        "tool_calls": {
            "open_pattern": r"call (?P<name>\w+)",
            "close": "<eos>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {"tag_pattern": r"(?P<key>\w+) (?P<value>\S+)"},
            "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
        },
        "content": {"close": "<eos>", "content": "text"},
    },
}


def tool_arithmetic(size: int, terms: int, largest: int, seed: int) -> list[Row]:
    """`size` different problems with `terms` numbers from 1 to `largest` behind the first, added or subtracted.

    No intermediate result is below 0 or above 99. A row has `prompt` (one message of the user), `completion` (the
    messages of a solution, the tool's among them), `answer` and `steps` (the results of the calls, as text). The same
    seed always gives the same rows, and fewer rows are the first of more.

    Raises:
        ValueError: there are hardly `size` different problems.
    """
    problems_in_all = largest ** (terms + 1)  # and as many times as the signs can be chosen
    if problems_in_all < size:
        raise ValueError(
            f"tool_arithmetic with {terms} terms and largest {largest} has few more than {problems_in_all} different "
            f"problems, and size is {size}: raise `terms` or `largest`, or lower `size`"
        )
    generator = random.Random(f"tool_arithmetic {seed}")
    problems: dict[tuple[Any, ...], list[int]] = {}
    while len(problems) < size:
        problem, results = _draw(generator, terms, largest)
        problems.setdefault(problem, results)
    return [_row(problem, results) for problem, results in problems.items()]


def _draw(generator: random.Random, terms: int, largest: int) -> tuple[tuple[Any, ...], list[int]]:
    """A problem as its numbers and signs in order, and the result of each operation."""
    total = generator.randint(1, largest)
    problem: list[Any] = [total]
    results = []
    for _ in range(terms):
        number = generator.randint(1, largest)
        signs = [sign for sign in ("+", "-") if 0 <= calculator(total, sign, number) <= LARGEST_NUMBER]
        sign = generator.choice(signs)
        total = calculator(total, sign, number)
        problem += [sign, number]
        results.append(total)
    return tuple(problem), results


def _row(problem: tuple[Any, ...], results: list[int]) -> Row:
    total, *rest = problem
    completion: list[Message] = []
    for sign, number, result in zip(rest[::2], rest[1::2], results, strict=True):
        arguments = {"a": total, "operation": sign, "b": number}
        call = {"type": "function", "function": {"name": "calculator", "arguments": arguments}}
        completion.append({"role": "assistant", "content": "", "tool_calls": [call]})
        completion.append({"role": "tool", "name": "calculator", "content": str(result)})
        total = result
    completion.append({"role": "assistant", "content": str(total)})
    text = " ".join(str(part) for part in problem) + " ="
    return {
        "prompt": [{"role": "user", "content": text}],
        "completion": completion,
        "answer": str(total),
        "steps": [str(result) for result in results],
    }


def tool_arithmetic_vocabulary() -> list[str]:
    """The words of such conversations, for a word-level tokenizer."""
    numbers = (str(number) for number in range(LARGEST_NUMBER + 1))
    return [*ROLES, *CALL, ERROR, *OPERATORS, "=", *numbers]
