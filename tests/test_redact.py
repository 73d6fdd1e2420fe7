"""Secrets are taken out of what is shown; ordinary settings stay."""

from __future__ import annotations

import json

import pytest

from rlhf_kit.redact import REDACTED, redact


@pytest.mark.parametrize(
    "text",
    [
        "hub_token: {}",
        "    api_key: '{}'",
        "train recipe.yaml trainer.args.hub_token={}",
        "HF_TOKEN={}",
        "WANDB_API_KEY={}",
        '{{"password": "{}"}}',
        "postgres://user:{}@host/db",
        "Authorization: Bearer {}",
        "Authorization: {}",
        '{{"headers": {{"authorization": "Basic {}"}}}}',
        "sent with bearer {}",
        "base_url: http://host/v1?api_key={}&x=1",
        "GET http://host/v1?x=1&key={}#top",
    ],
)
def test_a_named_secret_is_redacted(text: str) -> None:
    shown = redact(text.format("s3cretValue0123456789"))
    assert "s3cret" not in shown
    assert REDACTED in shown


@pytest.mark.parametrize("key", ["hf_" + "a1B2" * 8, "sk-proj-" + "a1B2" * 8, "ghp_" + "a1B2" * 9, "AKIA" + "ABCD" * 4])
def test_a_key_of_known_form_is_redacted_under_any_name(key: str) -> None:
    assert redact(f"note: see {key}, please") == f"note: see {REDACTED}, please"


@pytest.mark.parametrize(
    "text",
    [
        "pad_token: <|pad|>",
        "max_new_tokens: 256",
        "hub_token: null",
        "path: HuggingFaceTB/SmolLM2-135M-Instruct",
        "commit: 4be1c0d2a9f04be1c0d2a9f04be1c0d2a9f04be1",
        "push_to_hub: false",
        "eos_token_id: 2",
        "key: answer",
        "https://host/search?keyword=film&tokens=3",
    ],
)
def test_ordinary_settings_stay(text: str) -> None:
    assert redact(text) == text


@pytest.mark.parametrize(
    "content",
    [
        {"api_key": "tops3cret", "next": 1},
        {"command": "train a.yaml hub_token=tops3cret"},
        {"command": 'train --api_key="tops3cret, and more" b'},
        {"command": "train 'hub_token: tops3cret'"},
        {"secret": 5050, "note": "tops3cret is a word"},
        {"password": "two words of tops3cret", "credentials": {"user": "me"}, "hub_token": None},
    ],
)
@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")])
@pytest.mark.parametrize("indent", [None, 2])
def test_json_stays_json(content: dict, separators: tuple[str, str], indent: int | None) -> None:
    shown = redact(json.dumps(content, separators=separators, indent=indent))
    assert json.loads(shown).keys() == content.keys()
    assert REDACTED in shown
    assert "5050" not in shown
    assert "note" in content or "tops3cret" not in shown


def test_a_recipe_in_flow_style_keeps_its_other_settings() -> None:
    shown = redact("args: {hub_token: tops3cret, max_steps: 3}  # comment")
    assert shown == f"args: {{hub_token: {REDACTED}, max_steps: 3}}  # comment"
