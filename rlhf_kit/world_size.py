"""How many processes a run will have, known before they are started."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from rlhf_kit.problems import Problem, RecipeError, did_you_mean, listed

CONFIG_FOLDER = Path("accelerate_configs")


def world_size_of(
    config: str | None, num_processes: int | None = None, environment: Mapping[str, str] = os.environ
) -> int:
    """The world size of a run with an accelerate configuration.

    In this order: `num_processes` as asked for; what the configuration says; `WORLD_SIZE` where there is no
    configuration; otherwise what `launch.sh` starts, one process a GPU or two where there is none.

    Args:
        config: a name in `accelerate_configs/`, or the path of an accelerate YAML.

    Raises:
        RecipeError: there is no such configuration, or it does not say a valid number.
    """
    if config is None:
        return num_processes or int(environment.get("WORLD_SIZE", "1"))
    content = _read(config)
    said = content.get("num_processes")
    if said is not None and (type(said) is not int or said < 1):
        raise RecipeError(config, [Problem("num_processes", "must be a positive integer", said)])
    if content.get("distributed_type") in ("NO", False):
        return num_processes or said or 1
    gpus = 0 if content.get("use_cpu") else _gpus(environment)
    return num_processes or said or gpus or 2


def uses_deepspeed(config: str | None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a run with an accelerate configuration, or one that accelerate has started already, uses DeepSpeed."""
    if config is None:
        return environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    return _read(config).get("distributed_type") == "DEEPSPEED"


def launch_of(environment: Mapping[str, str] = os.environ) -> str:
    """What divides the work of a run that has been started: a checkpoint of one kind means nothing to another."""

    def on(name: str) -> bool:
        return environment.get(name, "false").lower() == "true"

    if on("ACCELERATE_USE_DEEPSPEED"):
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return f"ZeRO-{stage}" if stage else "DeepSpeed"
    if on("ACCELERATE_USE_FSDP"):
        return f"FSDP-{environment.get('FSDP_VERSION', '1')}"
    return "data parallel"


def _read(config: str) -> dict[str, Any]:
    path = _config_path(config)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(path, [Problem("", f"cannot be read: {error}", remedy="see `accelerate config`")]) from None
    if not isinstance(content, dict):
        raise RecipeError(path, [Problem("", "is no accelerate configuration", remedy="see `accelerate config`")])
    return content


def _config_path(config: str) -> Path:
    if config.endswith((".yaml", ".yml")) or "/" in config:
        path = Path(config)
        if path.is_file():
            return path
        raise RecipeError(path, [Problem("", "no such accelerate configuration", remedy="check the path")])
    folders = (CONFIG_FOLDER, Path(__file__).parents[1] / CONFIG_FOLDER)
    names = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
    for folder in folders:
        if (folder / f"{config}.yaml").is_file():
            return folder / f"{config}.yaml"
    remedy = did_you_mean(config, names, f"there are {listed(names)}" if names else "give the path of a YAML file")
    raise RecipeError("--config", [Problem("", "no such accelerate configuration", config, remedy)])


def _gpus(environment: Mapping[str, str]) -> int:
    """GPUs in sight, counted as `launch.sh` does: an empty list and -1 both mean none."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return sum(1 for device in visible.split(",") if device.strip() and not device.startswith("-"))
    if shutil.which("nvidia-smi") is None:
        return 0
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return sum(line.startswith("GPU") for line in listing.splitlines())
