"""Prompts and completions in their two forms: plain text, and lists of messages."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

from rlhf_kit.rollout import Message, Text

# A line that a reader of dialogues takes for the beginning of a turn, also in Markdown: "User:", "**Human** :".
_BREAK = r"[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]"
_TURN = re.compile(
    rf"(?P<break>{_BREAK})(?P<label>(?:(?!{_BREAK})[\s*_#>\-])*"
    r"(?:user|human|assistant|ai|system|developer|tool|function|customer|consultant)[\s*_]*[:\uff1a])",
    re.IGNORECASE,
)


def is_messages(value: object) -> bool:
    """Whether `value` is a conversation: a non-empty list of mappings that each name their `role`."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and len(value) > 0
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)
    )


def without_nulls(value: Any) -> Any:
    """Messages, tool calls or tools without the keys whose value is null, at every depth.

    In a table all rows have the same keys: those that a row did not have are null. A null in a list stays.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def with_own_keys(message: Message) -> Message:
    """A message without the keys whose value is null, at every depth; its `content` stays, null where there is none.

    Templates ask whether the content is null, and TRL reads it of every message.
    """
    kept = without_nulls(message)
    return cast("Message", kept if "content" in kept else {**kept, "content": None})


def content_text(message: Message) -> str:
    """The text of one message; of a message in parts, its text parts joined; "" where there is none."""
    content: Any = message.get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    return "".join(part.get("text") or "" for part in content if part.get("type", "text") == "text")


def completion_text(completion: Text) -> str:
    """What the policy said: the text itself, or the content of the last assistant message ("" if none)."""
    if isinstance(completion, str):
        return completion
    for message in reversed(completion):
        if message.get("role") == "assistant":
            return content_text(message)
    return ""


def prompt_text(prompt: Text) -> str:
    """What a model with a format of its own reads of a prompt: the text, or the messages' contents, apart by a line."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(text for message in prompt if (text := content_text(message)))


def dialogue_text(text: Text) -> str:
    """Text as it is; messages as the paragraphs `Role: content`.

    A line of a content that would begin a turn of its own is quoted: `> User: ...`.
    """
    if isinstance(text, str):
        return text
    return "\n\n".join(f"{str(message['role']).capitalize()}: {_one_turn(content_text(message))}" for message in text)


def _one_turn(content: str) -> str:
    return _TURN.sub(r"\g<break>> \g<label>", content)


def prompt_messages(prompt: Text, system: str | None) -> list[Message]:
    """`prompt` as messages, opened by `system` unless the conversation already has a system message."""
    messages: list[Message] = (
        [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(cast("Sequence[Message]", prompt))
    )
    if system is not None and messages[0].get("role") != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages


def completion_like(prompt: Text, completion: Text) -> Text:
    """The completion in the form that its prompt has: text, or messages."""
    return completion_text(completion) if isinstance(prompt, str) else completion_messages(completion)


def completion_messages(completion: Text) -> list[Message]:
    """`completion` as messages: text becomes one assistant message."""
    return [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
