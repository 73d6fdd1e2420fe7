"""Generated tasks: running sums, and the tasks of the `reasoning-gym` package."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import random
import re
from collections.abc import Mapping
from itertools import accumulate
from typing import Any

Row = dict[str, Any]

# `9**9**9` would be computed for ever, and nothing can stop Python in the middle of one multiplication.
LARGE_EXPONENT = re.compile(r"(\*\*|\^)\s*(?=[\d(])(?!\(?\s*[+-]?\d{1,3}\s*\)?(?!\s*(\*\*|\^|\d|\())) *")
POWER_OF_POWER = re.compile(r"\)\s*(\*\*|\^).*\)\s*(\*\*|\^)", re.DOTALL)


def running_sums(
    size: int, terms: int, modulus: int, seed: int, largest: int | None = None, multiplier: int = 1
) -> list[Row]:
    """`size` different problems in which `terms` numbers are added, one by one, to a first number.

    The first number n_0 is drawn uniformly from [0, modulus), the others from [1, largest] (`modulus - 1` without
    `largest`). Step k of the completion is `s_k = (multiplier * s_{k-1} + n_k) mod modulus` from `s_0 = n_0`; the last
    step is the answer. With multiplier 10 and largest 9 this is long division: the remainder after each digit. A
    multiplier other than 1 also keeps two small errors from cancelling. A row has
    `prompt` ("7 15 3 ="), `completion` ("22 2" for modulus 23), `answer` ("2") and `steps` (["22", "2"]). The same
    seed always gives the same rows, and fewer rows are the first of more. Two seeds draw independently, so they
    share no problem in practice once there are many.

    Raises:
        ValueError: there are fewer than `size` different problems, or `largest` is not below the modulus.
    """
    largest = modulus - 1 if largest is None else largest
    if not 1 <= largest < modulus:
        raise ValueError(f"running_sums adds numbers from 1 to `largest` {largest}: give one from 1 to {modulus - 1}")
    problems_in_all = modulus * largest**terms
    if problems_in_all < size:
        raise ValueError(
            f"running_sums with modulus {modulus}, {terms} terms and largest {largest} has {problems_in_all} different "
            f"problems, and size is {size}: raise `terms` or `modulus`, or lower `size`"
        )
    generator = random.Random(f"running_sums {seed}")
    problems: dict[tuple[int, ...], None] = {}
    while len(problems) < size:
        addends = (generator.randint(1, largest) for _ in range(terms))
        problems[(generator.randrange(modulus), *addends)] = None
    return [_running_sum(numbers, modulus, multiplier) for numbers in problems]


def _running_sum(numbers: tuple[int, ...], modulus: int, multiplier: int) -> Row:
    sums = accumulate(numbers, lambda total, number: (multiplier * total + number) % modulus)
    steps = [str(value) for value in sums][1:]
    prompt = " ".join(str(number) for number in numbers) + " ="
    return {"prompt": prompt, "completion": " ".join(steps), "answer": steps[-1], "steps": steps}


def running_sums_vocabulary(modulus: int) -> list[str]:
    """The words of `running_sums`, for a word-level tokenizer: the numbers below `modulus`, and `=`."""
    return [*(str(number) for number in range(modulus)), "="]


def reasoning_gym(
    task: str, size: int, seed: int, params: Mapping[str, Any], completion_template: str = "{answer}"
) -> list[Row]:
    """`size` rows of a reasoning-gym task: `prompt`, `answer`, and what its scorer needs.

    `completion`, for supervised training, is `completion_template` with the answer in place of `{answer}`;
    tasks whose entries name no answer (any of several is right) have none. Entry i of a reasoning-gym data
    set is drawn with seed + i, so neighbouring seeds would share almost every entry; `seed` is therefore
    hashed, and two seeds share entries only by chance, which in a small task is still likely.

    Raises:
        ValueError: an unknown task, or parameters that the task does not take.
    """
    data = _dataset(task, {**params, "size": size, "seed": _spread(seed)})
    rows = []
    for entry in data:
        row = {"prompt": entry["question"], "answer": entry["answer"]}
        if entry["answer"] is not None:
            row["completion"] = completion_template.replace("{answer}", entry["answer"])
        row["reasoning_gym_task"] = task
        row["reasoning_gym_params"] = json.dumps(dict(params), sort_keys=True)
        row["reasoning_gym_entry"] = json.dumps(_tag(entry))
        rows.append(row)
    return rows


def reasoning_gym_score(answer: str, row: Mapping[str, Any]) -> float:
    """The task's own score of `answer`, in [0, 1], for a row that `reasoning_gym` made."""
    # Several scorers hand the answer to `eval` or to sympy's parser, which evaluates it as Python.
    if "__" in answer or POWER_OF_POWER.search(answer) or LARGE_EXPONENT.search(answer):
        return 0.0
    entry = _untag(json.loads(row["reasoning_gym_entry"]))
    scorer = _scorer(row["reasoning_gym_task"], row["reasoning_gym_params"])
    try:
        score = float(scorer.score_answer(answer, entry))
    except Exception:  # The entry is the library's own, so what its scorer cannot read is the answer: a wrong one.
        return 0.0
    return min(max(score, 0.0), 1.0)


@functools.cache
def _scorer(task: str, params: str) -> Any:
    return _dataset(task, {**json.loads(params), "size": 1})


def _dataset(task: str, params: Mapping[str, Any]) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        close = difflib.get_close_matches(task, DATASETS, n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else f"it has {', '.join(sorted(DATASETS))}"
        raise ValueError(f"reasoning-gym has no task {task!r}: {hint}")
    try:
        return reasoning_gym.create_dataset(task, **params)
    except (TypeError, AssertionError, ValueError) as error:
        given = {name: value for name, value in params.items() if name not in ("size", "seed")}
        raise ValueError(f"reasoning-gym's task {task!r} refuses params {given}: {error}") from error


def _spread(seed: int) -> int:
    # Below 2**31, because some tasks seed numpy, which takes 32 bits, with seed + i.
    return int.from_bytes(hashlib.sha256(f"reasoning_gym {seed}".encode()).digest()[:4]) >> 1


def _tag(value: Any) -> Any:
    """`value` with tuples, and dictionaries whose keys are no strings, marked: JSON would change them."""
    if isinstance(value, tuple):
        return {"__tuple__": [_tag(item) for item in value]}
    if isinstance(value, list):
        return [_tag(item) for item in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _tag(item) for key, item in value.items()}
    if isinstance(value, dict):
        return {"__items__": [[_tag(key), _tag(item)] for key, item in value.items()]}
    return value


def _untag(value: Any) -> Any:
    if isinstance(value, list):
        return [_untag(item) for item in value]
    if isinstance(value, dict):
        if "__tuple__" in value:
            return tuple(_untag(item) for item in value["__tuple__"])
        if "__items__" in value:
            return {_untag(key): _untag(item) for key, item in value["__items__"]}
        return {key: _untag(item) for key, item in value.items()}
    return value
