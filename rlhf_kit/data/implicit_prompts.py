"""Pairs whose prompt stands inside both completions, and dialogues written as one text (HH-RLHF, arXiv 2204.05862)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf_kit.data.messages import content_text, is_messages
from rlhf_kit.rollout import CharRange, Message, Text

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def split_pair(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """The prompt that two completions share, and what is left of each.

    Of conversations it is the longest common beginning that leaves both a message. Of dialogues that open with
    `\\n\\nHuman:` it ends with the last `\\n\\nAssistant:` that both have in common, so that answers which begin alike
    keep their beginning. Of other texts it ends with the last white space of the common beginning.

    Raises:
        ValueError: they have nothing in common, or one is text and the other messages.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _split_texts(chosen, rejected)
    if not is_messages(chosen) or not is_messages(rejected):
        raise ValueError("'chosen' and 'rejected' must be two texts or two lists of messages to share a prompt")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        raise ValueError("there is no 'prompt', and 'chosen' and 'rejected' begin with different messages")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _split_texts(chosen: str, rejected: str) -> tuple[str, str, str]:
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(chosen), len(rejected)))
    common = chosen[:shared]
    if common.startswith(HUMAN) and ASSISTANT in common:
        end = common.rindex(ASSISTANT) + len(ASSISTANT)
    else:
        end = max((place + 1 for place, character in enumerate(common) if character.isspace()), default=0)
    if not common[:end].strip():
        raise ValueError("there is no 'prompt', and 'chosen' and 'rejected' do not begin alike")
    return chosen[:end], chosen[end:], rejected[end:]


def dialogue_messages(text: str) -> list[Message] | None:
    """The turns of a prompt `\\n\\nHuman: ...\\n\\nAssistant:`, less the empty one at its end, or None."""
    if not text.startswith(HUMAN) or not text.rstrip().endswith(ASSISTANT.strip()):
        return None
    return _turns(text)[:-1]


def last_said(text: str) -> CharRange:
    """Where a prompt's last human turn stands in it, without its mark and white space; all of it if it is no dialogue.

    What stands behind that turn, such as the closing `\\n\\nAssistant:`, is not in it.
    """
    if not text.startswith(HUMAN):
        return 0, len(text)
    start = text.rindex(HUMAN) + len(HUMAN)
    end = text.find(ASSISTANT, start)
    said = text[start : end if end >= 0 else len(text)]
    start += len(said) - len(said.lstrip())
    return start, start + len(said.strip())


def answer_messages(text: str) -> list[Message]:
    """What stands behind such a prompt: the assistant's answer, and the turns behind it, where there are any."""
    return _turns(ASSISTANT + text)


def _turns(text: str) -> list[Message]:
    pieces = _TURN.split(text)[1:]
    return [
        {"role": _ROLES[speaker], "content": said.strip()}
        for speaker, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]


def opening(prompt: Text) -> str:
    """The first thing that a prompt's user says, by which dialogues with one beginning are kept together."""
    if not isinstance(prompt, str):
        users: Sequence[Any] = [message for message in prompt if message.get("role") == "user"]
        return content_text(users[0]) if users else ""
    return prompt.split(ASSISTANT)[0].removeprefix(HUMAN).strip() if prompt.startswith(HUMAN) else prompt


def turns_said(prompt: Text) -> tuple[tuple[str, str], ...]:
    """Who says what in a prompt: alike for one prompt in all its forms.

    Those are text, a dialogue in one text, and messages, whatever keys these have beside. What the system says counts
    only where nobody else speaks.
    """
    if isinstance(prompt, str):
        prompt = dialogue_messages(prompt) or [{"role": "user", "content": prompt}]
    messages: Sequence[Any] = prompt
    said = [message for message in messages if message["role"] not in ("system", "developer")]
    return tuple((message["role"], content_text(message).strip()) for message in said or messages)
