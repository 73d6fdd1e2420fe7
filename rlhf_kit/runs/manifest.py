"""`manifest.json`: what made a run, so that it can be made again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_kit.data.files import fingerprint, write_whole
from rlhf_kit.redact import redact
from rlhf_kit.runs.config import Recipe

MANIFEST_FILE = "manifest.json"
PACKAGES = (
    "rlhf-kit", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "deepspeed", "wandb", "vllm"
)  # fmt: skip


def write_manifest(folder: Path, **fields: Any) -> None:
    """Merge `fields` into the run's manifest, replacing the file in one step."""
    path = folder / MANIFEST_FILE
    content = {**read_manifest(folder), **fields}
    write_whole(path, redact(json.dumps(content, indent=2, default=str)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The run's manifest; empty if there is none."""
    path = folder / MANIFEST_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def describe_run(recipe: Recipe) -> dict[str, Any]:
    """Versions, commit, command, and where the run was started."""
    return {
        "name": recipe.name,
        "created": time.time(),
        "command": " ".join(sys.argv),
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": _git_commit(),
        "platform": platform.platform(),
    }


def describe_stage(recipe: Recipe, name: str) -> dict[str, Any]:
    """The earlier stages that a stage builds on, and the SHA-256 of every local file and model that it reads."""
    paths = dict(_paths(recipe.stages[name].model_dump()))
    parents = [
        other
        for other in recipe.stages
        if other != name and any(Path(path) in recipe.outputs(other) for path in paths.values())
    ]
    prints = {field: fingerprint(Path(path)) for field, path in paths.items()}
    return {"parents": parents, "inputs": {field: value for field, value in prints.items() if value}}


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


def _paths(config: Any, field: str = "") -> Iterator[tuple[str, str]]:
    """Every file and model that a stage's configuration names, by field (`data.path`, `rewards.1.path`)."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            inner = f"{field}.{key}" if field else str(key)
            if key in ("path", "model") and isinstance(value, str):
                yield inner, value
            else:
                yield from _paths(value, inner)
    elif isinstance(config, list | tuple):
        for index, value in enumerate(config):
            yield from _paths(value, f"{field}.{index}")
