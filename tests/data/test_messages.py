import pytest

from rlhf_kit.data.messages import completion_messages, completion_text, is_messages, prompt_messages


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
