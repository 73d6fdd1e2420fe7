"""Whether something that an evaluation reads has changed since it was done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_kit.config import Config
from rlhf_kit.data.files import fingerprint

PATHS = ("path", "model", "tokenizer", "prompt", "reference", "examples", "follow_ups")


def config_fingerprint(*configs: Config | None, others: Iterable[str] = (), seed: int = 0) -> str:
    """SHA-256 of configurations and of the local files and models that they name, and of `others`."""
    contents = [None if config is None else config.model_dump(mode="json") for config in configs]
    named = {*others, *(path for content in contents for path in _paths(content))}
    files = {path: fingerprint(Path(path)) for path in sorted(named) if _is_local(path)}
    return hashlib.sha256(json.dumps([contents, files, seed], sort_keys=True).encode()).hexdigest()


def _is_local(path: str) -> bool:
    return len(path) < 4096 and "\n" not in path and Path(path).exists()


def _paths(content: Any, key: str = "") -> Iterator[str]:
    """Every text in a field that may name a file or model."""
    if isinstance(content, Mapping):
        for name, value in content.items():
            yield from _paths(value, "prompt" if key == "prompts" else str(name))
    elif isinstance(content, list):
        for value in content:
            yield from _paths(value, key)
    elif isinstance(content, str) and key in PATHS:
        yield content
