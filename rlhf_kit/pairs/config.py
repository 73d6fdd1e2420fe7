"""Configuration of the `pairs` stage: what is sampled, who scores it, and which pairs are taken."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_kit.config import Config
from rlhf_kit.data.config import PromptConfig
from rlhf_kit.models.config import Pretrained
from rlhf_kit.pairs.builders import BuilderConfig
from rlhf_kit.pairs.sampled import Sampled
from rlhf_kit.pairs.selection import SelectConfig
from rlhf_kit.problems import Problem
from rlhf_kit.rewards import RewardConfig
from rlhf_kit.rewards.config import source_problems

OPTIONAL = {"model": "model: {path: ...}", "rewards": "rewards", "select": "select: {type: best_worst}"}


class Generation(Config):
    """Sampling of `num_generations` completions a prompt, `prompts_at_once` prompts together.

    These are also what a kill can lose. `use_vllm` samples by vLLM, an engine in each process; it takes
    `vllm_gpu_memory_utilization` of the GPU, beside the models that score.
    """

    num_generations: PositiveInt = 8
    max_new_tokens: PositiveInt = 256
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    prompts_at_once: PositiveInt = 16
    use_vllm: bool = False
    vllm_gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.5


class Pairs(Config):
    """Rows to train on, made from prompts by a `builder`; `sampled` ranks completions of the model.

    Completions are ranked by the weighted sum of any reward sources. `length_debias` takes `alpha * length` from a
    score, alpha such that chosen and rejected completions are equally long on average (DICE, arXiv 2406.09760, section
    3.1). `round` is the number of the round in a bootstrap: another one draws other completions. Written are, as
    `format` says, `completions` (all, with their scores), and of what is selected `paired` (TRL's `prompt, chosen,
    rejected`) and `unpaired` (`prompt, completion, label`), or `sft` (`prompt, completion`).
    """

    type: Literal["pairs"]
    builder: BuilderConfig = Sampled(type="sampled")
    model: Pretrained | None = None
    data: PromptConfig
    generation: Generation = Generation()
    rewards: tuple[RewardConfig, ...] = ()
    length_debias: Literal["none", "tokens", "characters"] = "none"
    select: SelectConfig | None = None
    round: PositiveInt = 1
    batch_size: PositiveInt = 16
    format: Literal["parquet", "jsonl"] = "parquet"

    @property
    def outputs(self) -> tuple[str, ...]:
        """What will be written."""
        return self.builder.outputs(self)

    def problems(self) -> Iterator[Problem]:
        """What cannot work, said before anything is loaded; paths start at the stage."""
        if self.model is not None and self.model.peft is not None:
            yield Problem("model.peft", "adds an adapter to train, and nothing trains here", remedy="remove it")
        yield from self._fields()
        yield from self._rewards()
        if self.generation.use_vllm and find_spec("vllm") is None:
            remedy = "pip install vllm, or write false"
            yield Problem("generation.use_vllm", "needs the package vllm, which is not installed", True, remedy)
        if self.generation.use_vllm and self.model is not None and self.model.gguf_file is not None:
            remedy = "give a folder or hub id with safetensors, or write false"
            yield Problem("generation.use_vllm", "does not read model.gguf_file", True, remedy)
        yield from self.builder.problems(self)

    def _fields(self) -> Iterator[Problem]:
        """Fields that the builder cannot do without, and those that nothing would read."""
        builder = self.builder
        given = {
            "model": self.model is not None,
            "rewards": bool(self.rewards),
            "select": self.select is not None,
            "length_debias": self.length_debias != "none",
        }
        for field, there in given.items():
            if field in builder.needs and not there:
                yield Problem(field, f"is what builder {builder.type} needs", remedy=f"add {OPTIONAL[field]}")
            if there and field not in builder.needs | builder.may_use:
                yield Problem(field, f"is never used by builder {builder.type}", remedy="remove it")

    def _rewards(self) -> Iterator[Problem]:
        yield from source_problems(self.rewards, self.model, {})
        for index, source in enumerate(self.rewards):
            path = f"rewards.{index}"
            if source.learning is not None:
                yield Problem(f"{path}.online", "learns in a trainer, and nothing trains here", remedy="remove it")
            if getattr(source, "reference", None) == "ema":
                what = "is an average over training, and nothing trains here"
                yield Problem(f"{path}.reference", what, "ema", "write behaviour or initial")
