"""The validated recipe: named stages in the order in which they run, and where their outputs go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, StringConstraints

from rlhf_kit import yaml12
from rlhf_kit.config import Config
from rlhf_kit.pairs.builder import OUTPUTS as PAIRS_OUTPUTS
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.trainers.config import StageConfig

OUTPUTS = {
    **dict.fromkeys(("sft", "reward", "segment", "preference", "bootstrap"), ("model",)),
    "ppo": ("model", "prm"),
    "eval": (),
    "pairs": PAIRS_OUTPUTS,
}

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9_.-]*$")]
StageName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]+$")]


def file_of(output: str, rows_format: str = "parquet") -> str:
    """What an output is called in its stage's folder: rows have their format's suffix."""
    return f"{output}.{rows_format}" if output in PAIRS_OUTPUTS else output


class Recipe(Config):
    """One stage or a pipeline of stages, and the run folder `<runs_dir>/<name>` that they write.

    A recipe of a `single` stage, written without `stages`, has its outputs in the run folder itself; a stage
    of a pipeline has a folder of its own in it.
    """

    name: Name
    runs_dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    stages: Annotated[dict[StageName, StageConfig], Field(min_length=1)]
    single: bool = False

    @property
    def run_folder(self) -> Path:
        """Where the run is kept."""
        return Path(self.runs_dir) / self.name

    def stage_folder(self, name: str) -> Path:
        """Where the outputs of a stage are kept."""
        return self.run_folder if self.single else self.run_folder / name

    def outputs(self, name: str) -> tuple[Path, ...]:
        """What the stage may leave behind for later stages."""
        stage, folder = self.stages[name], self.stage_folder(name)
        if isinstance(stage, Pairs):
            return tuple(folder / file_of(output, stage.format) for output in stage.outputs)
        return tuple(folder / output for output in OUTPUTS[stage.type])

    def to_yaml(self) -> str:
        """The recipe as a recipe file, every default filled in; it loads back as an equal recipe."""
        content = self.model_dump(mode="json", include={"name", "runs_dir", "seed"})
        stages = {name: stage.model_dump(mode="json") for name, stage in self.stages.items()}
        content |= next(iter(stages.values())) if self.single else {"stages": stages}
        return yaml12.dump(content)

    def write_resolved(self, folder: Path) -> Path:
        """Write `recipe.resolved.yaml` into `folder` and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "recipe.resolved.yaml"
        path.write_text(self.to_yaml(), encoding="utf-8")
        return path
