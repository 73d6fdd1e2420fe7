"""`manifest.json`: what made a run, so that it can be made again."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_kit.config import files_named, files_read
from rlhf_kit.data.files import fingerprint, write_whole
from rlhf_kit.redact import redact
from rlhf_kit.runs.config import Recipe
from rlhf_kit.trainers.config import Bootstrap

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
    prints = {field: fingerprint(Path(path)) for field, path in files_read(recipe.stages[name])}
    parents = [other for other in recipe.stages if _reads(recipe, name, other)]
    return {"parents": parents, "inputs": {field: value for field, value in prints.items() if value}}


def is_outdated(recipe: Recipe, name: str) -> bool:
    """Whether a stage has read what a bootstrap before it, or a stage behind that, has made anew since."""
    recorded = read_manifest(recipe.run_folder).get("stages", {}).get(name, {}).get("inputs", {})
    outputs = {output for other in behind_bootstrap(recipe) if other != name for output in recipe.outputs(other)}
    read = ((field, Path(path)) for field, path in files_read(recipe.stages[name]) if Path(path) in outputs)
    return any(fingerprint(path) not in (None, recorded.get(field)) for field, path in read if field in recorded)


def behind_bootstrap(recipe: Recipe) -> list[str]:
    """The bootstraps of a recipe, and the stages that read what these, or such stages, make."""
    found: list[str] = []
    for name, stage in recipe.stages.items():
        if isinstance(stage, Bootstrap) or any(_reads(recipe, name, other) for other in found):
            found.append(name)
    return found


def _reads(recipe: Recipe, name: str, other: str) -> bool:
    """Whether a stage names an output of another."""
    outputs = recipe.outputs(other) if other != name else ()
    return any(Path(path) in outputs for _, path in files_named(recipe.stages[name]))


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
