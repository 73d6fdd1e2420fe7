"""`manifest.json`: what made a run, so that it can be made again."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_kit.runs.config import Recipe
from rlhf_kit.runs.redact import redact

MANIFEST_FILE = "manifest.json"
PACKAGES = (
    "rlhf-kit", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "wandb", "vllm"
)  # fmt: skip


def write_manifest(folder: Path, **fields: Any) -> None:
    """Merge `fields` into the run's manifest, replacing the file in one step."""
    path = folder / MANIFEST_FILE
    content = {**read_manifest(folder), **fields}
    partial = path.with_suffix(".partial")
    partial.write_text(redact(json.dumps(content, indent=2, default=str)), encoding="utf-8")
    os.replace(partial, path)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The run's manifest; empty if there is none."""
    path = folder / MANIFEST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe_run(recipe: Recipe) -> dict[str, Any]:
    """Versions, commit, command and fingerprints of data and models."""
    return {
        "name": recipe.name,
        "created": time.time(),
        "command": redact(" ".join(sys.argv)),
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "world_size": int(os.environ.get("WORLD_SIZE", "1")),
        "data": {name: _data_fingerprints(stage.model_dump()) for name, stage in recipe.stages.items()},
    }


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
    """The commit of the working directory, with `+` behind it where files have changed."""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], capture_output=True, text=True, check=True).stdout.strip()


def _data_fingerprints(stage: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every local file that the stage reads, and the description of what it makes or fetches."""
    prints = {}
    for key in ("data", "eval_data", "model"):
        config = stage.get(key)
        if not config:
            continue
        path = Path(str(config.get("path", "")))
        if path.is_file():
            prints[key] = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
        elif (weights := path / "model.safetensors").is_file():
            prints[key] = "sha256:" + hashlib.sha256(weights.read_bytes()).hexdigest()
        else:
            prints[key] = "config:" + hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return prints
