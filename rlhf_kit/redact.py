"""Keep secrets out of whatever is shown: reports, manifests, a tracker's configuration."""

from __future__ import annotations

import re

REDACTED = "<redacted>"  # in brackets it would be a list in YAML

# Names of secrets, and no more: `pad_token` and `max_new_tokens` are ordinary settings.
_NAME = (
    r"(?:[\w.-]*(?:api|access|auth|bearer|hub|hf|private|secret|wandb)[_-]?(?:token|key)|hf[_-]?hub[_-]?token"
    r"|[\w.-]*(?:password|passwd|secret|credentials?)|(?:proxy-)?authorization)"
)
_NAMED = re.compile(
    rf"(?i)(?P<name>(?<![\w.-]){_NAME}(?P<json>\\?[\"'])?[ \t]*[:=][ \t]*)"
    r"(?:(?P<quote>\\?[\"'])(?P<quoted>[^\n]*?)(?P=quote)"
    r"|(?P<bare>(?:(?:basic|bearer)[ \t]+)?(?:(?!,[\s\"'])[^\s{}\[\]\"'\\])+))"
)
_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{16,}|\bsk-[A-Za-z0-9_-]{16,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}"
    r"|\bwandb_v\d_\w{16,}|\bAKIA[A-Z0-9]{16}\b|(?<=://)[^\s/:@]+:[^\s/@]+(?=@)"
    r"|(?i:(?<=bearer ))[A-Za-z0-9._~+/=-]{16,}|(?:(?<=[?&]key=)|(?<=[?&]token=)|(?<=[?&]sig=))[^\s&#\"']+"
)
_EMPTY = {"", "null", "none", "~", "true", "false"}


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return re.fullmatch(_NAME, name, re.IGNORECASE) is not None


def redact(text: str) -> str:
    """`text` without the values of names of secrets (`hub_token: ...`) and without keys of well-known forms.

    JSON stays JSON, and YAML stays YAML.
    """

    def named(match: re.Match[str]) -> str:
        value = match["quoted"] if match["quote"] else match["bare"]
        if value.lower() in _EMPTY:
            return match[0]
        quote = match["quote"] or match["json"] or ""  # a number of a JSON object becomes text: it stays JSON
        return f"{match['name']}{quote}{REDACTED}{quote}"

    return _VALUE.sub(REDACTED, _NAMED.sub(named, text))
