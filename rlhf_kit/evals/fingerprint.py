"""Whether something that an evaluation reads has changed since it was done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from rlhf_kit.config import Config, files_read
from rlhf_kit.data.files import fingerprint


def config_fingerprint(*configs: Config | None, others: Iterable[str] = (), seed: int = 0) -> str:
    """SHA-256 of configurations and of the local files and models that they name, and of `others`."""
    contents = [None if config is None else config.model_dump(mode="json") for config in configs]
    named = {*filter(os.path.exists, others), *(path for config in configs for _, path in files_read(config))}
    files = {path: fingerprint(Path(path)) for path in sorted(named)}
    return hashlib.sha256(json.dumps([contents, files, seed], sort_keys=True).encode()).hexdigest()
