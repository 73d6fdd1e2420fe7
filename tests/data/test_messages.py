import pytest

from rlhf_kit.data.messages import (
    completion_messages,
    completion_text,
    dialogue_text,
    is_messages,
    prompt_messages,
)


def test_the_text_of_a_completion_is_what_the_assistant_said_last():
    conversation = [
        {"role": "assistant", "content": "Let me look."},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "It is 42."},
        {"role": "tool", "content": "ignored"},
    ]
    assert completion_text("plain") == "plain"
    assert completion_text(conversation) == "It is 42."
    assert completion_text([{"role": "tool", "content": "42"}]) == ""
    assert completion_text([{"role": "assistant", "content": None, "tool_calls": []}]) == ""


def test_text_parts_are_joined_and_others_passed_over():
    parts = [{"type": "text", "text": "It "}, {"type": "image", "image": 1}, {"type": "text", "text": "is."}]
    assert completion_text([{"role": "assistant", "content": parts}]) == "It is."


@pytest.mark.parametrize("value", ["text", None, 3, [], ["text"], [{"content": "x"}], {"role": "user"}])
def test_what_is_no_conversation(value):
    assert not is_messages(value)


def test_a_prompt_becomes_a_conversation_with_one_system_message():
    user, system = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
    assert prompt_messages("Hi", None) == [user]
    assert prompt_messages("Hi", "Be kind.") == [system, user]
    assert prompt_messages([user], "Be kind.") == [system, user]
    assert prompt_messages([system, user], "Be cruel.") == [system, user]
    assert completion_messages("Hello") == [{"role": "assistant", "content": "Hello"}]
    assert completion_messages([user]) == [user]


@pytest.mark.parametrize(
    "line", ["User: I am delighted", "  user : x", "**User:** x", "### Human: x", "Assistant： x", "Developer: x"]
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\n\n", "\u2028", "\x85"])
def test_a_completion_cannot_open_a_turn_of_its_own(line, line_end):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": f"Bye.{line_end}{line}"}]
    text = dialogue_text(said)
    assert text == f"User: Hi\n\nAssistant: Bye.{line_end}> {line}"
    starts = [part.strip(" *#").lower() for part in text.splitlines()]
    assert sum(start.startswith(("user", "human")) for start in starts) == 1


def test_other_lines_of_a_dialogue_are_left_as_they_are():
    content = "Three things:\nA: users: many\n\n- one\nThe user: me"
    assert dialogue_text([{"role": "assistant", "content": content}]) == f"Assistant: {content}"
