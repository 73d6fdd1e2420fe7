"""The calculator, the conversations about it, and that a call is read back as it was written."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils import get_json_schema
from trl.chat_template_utils import is_chat_template_prefix_preserving, parse_response, supports_tool_calling

from rlhf_kit.data.config import ToolArithmetic
from rlhf_kit.data.load import load_data
from rlhf_kit.data.tool_tasks import LARGEST_NUMBER, tool_arithmetic, tool_arithmetic_vocabulary
from rlhf_kit.data.tools import TOOLS, calculator
from rlhf_kit.models.config import Scratch
from rlhf_kit.models.loading import load_tokenizer

TOKENIZER: Any = load_tokenizer(Scratch(type="scratch", vocabulary="tool_arithmetic"))


@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9))
def test_the_calculator_computes(a: int, b: int) -> None:
    assert calculator(a, "+", b) == a + b
    assert calculator(a, "-", b) == a - b
    assert calculator(a, "*", b) == a * b
    if b:
        assert calculator(a * b, "/", b) == a


def test_numbers_may_be_text() -> None:
    assert calculator("12", "-", " -3 ") == 15  # pyright: ignore


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((1, "^", 2), "operation '\\^' is none of"),
        ((1, "/", 0), "1 / 0 is no integer"),
        ((7, "/", 2), "7 / 2 is no integer"),
        (("call", "+", 2), "a is no integer"),
        ((1, "+", 2.5), "b is no integer"),
        ((True, "+", 2), "a is no integer"),
        ((None, "+", 2), "a is no integer"),
        (("__import__('os')", "+", 2), "a is no integer"),
        ((10**30, "*", 2), "a is no integer of at most 30 digits"),
        (("9" * 10_000, "*", 2), "a is no integer of at most 30 digits"),
        ((10**10_000, "*", 2), "integer"),
    ],
)
def test_what_it_cannot_compute_is_an_error(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        calculator(*arguments)


def test_every_tool_has_a_schema_for_the_model() -> None:
    for name, tool in TOOLS.items():
        schema = get_json_schema(tool)["function"]
        assert schema["name"] == name and schema["description"]
    assert get_json_schema(calculator)["function"]["parameters"]["required"] == ["a", "operation", "b"]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(5, 49), st.integers())
def test_a_solution_asks_for_one_operation_a_turn(terms: int, largest: int, seed: int) -> None:
    for row in tool_arithmetic(5, terms, largest, seed):
        text = row["prompt"][0]["content"]
        numbers = [int(number) for number in re.findall(r"\d+", text)]
        assert len(numbers) == terms + 1 and all(1 <= number <= largest for number in numbers)
        asked, answers = row["completion"][:-1:2], row["completion"][1::2]
        total = numbers[0]
        for sign, number, call, answer in zip(re.findall(r"[+-]", text), numbers[1:], asked, answers, strict=True):
            arguments = {"a": total, "operation": sign, "b": number}
            assert call["tool_calls"][0]["function"] == {"name": "calculator", "arguments": arguments}
            total += number if sign == "+" else -number
            assert answer == {"role": "tool", "name": "calculator", "content": str(total)}
            assert 0 <= total <= LARGEST_NUMBER
        assert row["completion"][-1] == {"role": "assistant", "content": str(total)}
        assert row["answer"] == str(total) and row["steps"] == [answer["content"] for answer in answers]


def test_problems_depend_on_the_seed_alone_and_differ() -> None:
    rows = tool_arithmetic(50, 2, 20, seed=3)
    assert tool_arithmetic(20, 2, 20, seed=3) == rows[:20]
    assert tool_arithmetic(50, 2, 20, seed=4) != rows
    assert len({row["prompt"][0]["content"] for row in rows}) == 50


def test_more_problems_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match=r"terms and largest 3 has few more than 9 different problems, and size is 99"):
        tool_arithmetic(99, 1, 3, seed=0)
    assert len(tool_arithmetic(9, 1, 3, seed=0)) == 9


def test_trl_can_run_tools_with_the_templates() -> None:
    assert supports_tool_calling(TOKENIZER)
    assert is_chat_template_prefix_preserving(TOKENIZER)


def test_a_conversation_is_written_in_the_words_of_the_vocabulary() -> None:
    (row,) = load_data(ToolArithmetic(type="tool_arithmetic", size=1, seed=5)).to_list()  # as training reads it
    ids = TOKENIZER.apply_chat_template(row["prompt"] + row["completion"], return_dict=False)
    words = set(TOKENIZER.convert_ids_to_tokens(ids))
    assert words <= {*tool_arithmetic_vocabulary(), "<eos>"}
    first, second, said = row["completion"][::2]
    text = f"user {row['prompt'][0]['content']} "
    for call, result in zip((first, second), row["steps"], strict=True):
        a, operation, b = call["tool_calls"][0]["function"]["arguments"].values()
        text += f"assistant call calculator a {a} operation {operation} b {b} <eos> tool {result} "
    assert TOKENIZER.decode(ids) == f"{text}assistant {said['content']} <eos>"


def test_only_what_the_assistant_says_is_learnt() -> None:
    (row,) = tool_arithmetic(1, 2, 20, seed=5)
    encoded = TOKENIZER.apply_chat_template(
        row["prompt"] + row["completion"], return_dict=True, return_assistant_tokens_mask=True
    )
    learnt = [i for i, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m]
    turns = [f"call calculator a {a} operation {o} b {b} <eos>" for a, o, b in _arguments(row)]
    assert TOKENIZER.decode(learnt) == " ".join([*turns, row["answer"], "<eos>"])


def _arguments(row: dict[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(m["tool_calls"][0]["function"]["arguments"].values()) for m in row["completion"][:-1:2]]


def read(text: str) -> dict[str, Any]:
    prompt = [{"role": "user", "content": "1 + 2 ="}]
    prefix = TOKENIZER.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    return parse_response(TOKENIZER, TOKENIZER(text)["input_ids"], prefix=prefix, tools=[calculator])


def test_a_call_is_read_back_as_it_was_written() -> None:
    (row,) = tool_arithmetic(1, 2, 20, seed=5)
    for message in row["completion"][::2]:
        ids = TOKENIZER.apply_chat_template([*row["prompt"], message], return_dict=False)
        text = TOKENIZER.decode(ids).split("assistant ")[1]
        assert read(text) == message


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("3 <eos>", None),
        ("call <eos>", None),
        ("call b <eos>", [("b", {})]),
        ("call calculator a 1 <eos>", [("calculator", {"a": 1})]),
        ("call calculator a 1 operation", [("calculator", {"a": 1})]),  # cut off
        ("call calculator a tool b 2 <eos>", [("calculator", {"a": "tool", "b": 2})]),
    ],
)
def test_what_is_badly_written_is_read_as_far_as_it_goes(text: str, calls: list[tuple[str, Any]] | None) -> None:
    found = read(text).get("tool_calls")
    expected = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in calls or []]
    assert (found or []) == expected


def test_an_error_is_one_word() -> None:
    messages = [{"role": "tool", "name": "calculator", "content": str({"error": "a is no integer"})}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == "tool error "
