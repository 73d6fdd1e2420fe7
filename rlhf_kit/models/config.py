"""Configuration of the models that a stage loads or makes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from rlhf_kit.config import Config, Location, TextOrFile


class Lora(Config):
    """A LoRA adapter on a frozen base model (arXiv 2106.09685)."""

    type: Literal["lora"] = "lora"
    r: PositiveInt = 16
    alpha: PositiveInt = 32
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: str | tuple[str, ...] = "all-linear"


class Pretrained(Config):
    """A causal language model by hub id or folder; a folder with a LoRA adapter loads its base as well."""

    type: Literal["pretrained"] = "pretrained"
    path: Location
    tokenizer: Location | None = None
    chat_template: TextOrFile | None = None
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attn_implementation: str | None = None
    revision: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    peft: Lora | None = None


RUNNING_SUMS_MODULUS = 23
SEQUENCE_HEAD = "ForSequenceClassification"  # how the classes of these models are named
TOKEN_HEAD = "ForTokenClassification"


class Scratch(Config):
    """A small Llama with random weights and a word-level tokenizer.

    The vocabulary `running_sums` is the numbers below 23 and `=`. That of `tool_arithmetic` is the words of its
    conversations; its tokenizer also has a chat template that writes tool calls, and the template that reads them. That
    of `marketplace` is the words of its style `words`.
    """

    type: Literal["scratch"]
    vocabulary: tuple[str, ...] | Literal["running_sums", "tool_arithmetic", "marketplace"]
    hidden_size: PositiveInt = 128
    intermediate_size: PositiveInt = 256
    num_hidden_layers: PositiveInt = 2
    num_attention_heads: PositiveInt = 4
    max_position_embeddings: PositiveInt = 256
    config: dict[str, Any] = Field(default_factory=dict)
    peft: None = None
    dtype: Literal["float32"] = "float32"


def _pretrained_by_default(value: Any) -> Any:
    return {"type": "pretrained", **value} if isinstance(value, dict) and "type" not in value else value


def same_model(one: str, other: str) -> bool:
    """Whether two locations are one folder, however it is written, or one hub id."""
    return one == other or Path(one).resolve() == Path(other).resolve()


ModelConfig = Annotated[Pretrained | Scratch, Field(discriminator="type"), BeforeValidator(_pretrained_by_default)]
