"""Classifiers of segments: token or sequence classification models with a tokenizer of their own."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from jaxtyping import Float32
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rlhf_kit.errors import RunError
from rlhf_kit.models.config import SEQUENCE_HEAD, TOKEN_HEAD, Lora, Pretrained
from rlhf_kit.models.loading import holds_adapter, load_model, lora_config
from rlhf_kit.models.zero3 import load_undivided
from rlhf_kit.rollout import CharRange


@dataclass(frozen=True)
class Encoded:
    """A text as a classifier reads it, behind its prompt.

    Attributes:
        inputs: what the model is given, without padding, each a list of one value a token.
        tokens: positions in it of the text's tokens.
        offsets: their character ranges in the text, by the classifier's own tokenizer.
    """

    inputs: dict[str, list[int]]
    tokens: list[int]
    offsets: list[CharRange]

    def __len__(self) -> int:
        return len(self.inputs["input_ids"])

    def last_token(self, segment: CharRange) -> int | None:
        """Position of the last token that overlaps a segment; None where the tokenizer dropped all of it."""
        for k in range(bisect_left(self._starts, segment[1]) - 1, -1, -1):
            start, end = self.offsets[k]
            if start < end:  # one without text may stand anywhere
                return self.tokens[k] if segment[0] < end else None
        return None

    @property
    def parts(self) -> list[tuple[CharRange, int]]:
        """The text's tokens that have any of it: their character ranges and their positions."""
        return [(part, k) for part, k in zip(self.offsets, self.tokens, strict=True) if part[0] < part[1]]

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.offsets]


def encode(tokenizer: PreTrainedTokenizerBase, prompt: str, text: str) -> Encoded:
    """A text behind its prompt (none if it is empty), as the tokenizer joins the two."""
    texts = (prompt, text) if prompt else (text,)
    encoded: Any = cast(Any, tokenizer)(*texts, return_offsets_mapping=True)
    part = len(texts) - 1
    offsets = encoded.pop("offset_mapping")
    tokens = [place for place, sequence in enumerate(encoded.sequence_ids(0)) if sequence == part]
    inputs = {name: list(values) for name, values in encoded.items()}
    return Encoded(inputs, tokens, [(int(offsets[place][0]), int(offsets[place][1])) for place in tokens])


def pad(rows: Sequence[dict[str, list[int]]], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    """The inputs of several texts, right-padded: a causal model then needs no position ids."""
    fill = {"input_ids": tokenizer.pad_token_id or 0, "labels": -100}
    return {
        name: nn.utils.rnn.pad_sequence(
            [torch.tensor(row[name]) for row in rows], batch_first=True, padding_value=fill.get(name, 0)
        )
        for name in rows[0]
    }


class Classifier:
    """Scores the segments of texts, many at once.

    A token classification model reads a text once, and a segment's logits are those at its last token. A sequence
    classification model reads the text up to the segment's end.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        batch_size: int = 32,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        check_tokenizer(tokenizer)
        self.model = model
        self.tokenizer = tokenizer
        self.longest = longest_input(model, tokenizer)
        self._batch_size = batch_size
        self._autocast = autocast
        config: Any = cast(Any, model).config
        self.classes = [str(config.id2label[k]) for k in range(config.num_labels)]
        # By this the model finds where a padded text ends.
        config.get_text_config().pad_token_id = tokenizer.pad_token_id or 0
        self.reads_sequences = any(str(name).endswith(SEQUENCE_HEAD) for name in config.architectures or ())
        self.multi_label = config.problem_type == "multi_label_classification" or config.num_labels == 1

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        texts: Sequence[str],
        segments: Sequence[Sequence[CharRange] | None],
        on_batch: Callable[[int, int], object] = lambda done, total: None,
    ) -> list[tuple[list[CharRange], Float32[Tensor, "S K"]] | None]:
        """For each text its segments and their logits; None where it is longer than the model can read.

        `segments: None` are the classifier's own tokens. A segment of which the tokenizer leaves nothing is left out.
        """
        rows = list(zip(prompts, texts, segments, strict=True))
        if self.reads_sequences:
            return self._sequences(rows, on_batch)
        encoded = [encode(self.tokenizer, prompt, text) for prompt, text, _ in rows]
        read = [bool(row.tokens) and len(row) <= self.longest for row in encoded]
        logits = self._logits([row.inputs for row, readable in zip(encoded, read, strict=True) if readable], on_batch)
        found = iter(logits)
        nothing = torch.zeros(0, len(self.classes))
        return [
            _at_last_tokens(row, parts, next(found)) if readable else (None if row.tokens else ([], nothing))
            for row, (_, _, parts), readable in zip(encoded, rows, read, strict=True)
        ]

    def _sequences(
        self, rows: Sequence[tuple[str, str, Sequence[CharRange] | None]], on_batch: Callable[[int, int], object]
    ) -> list[tuple[list[CharRange], Tensor] | None]:
        inputs, ranges = [], []
        for prompt, text, parts in rows:
            if parts is None:
                raise ValueError("a sequence classification model has no verdict on tokens: cut the text into segments")
            encoded = [encode(self.tokenizer, prompt, text[:end]) for _, end in parts]
            readable = all(len(part) <= self.longest for part in encoded)
            inputs += [part.inputs for part in encoded] if readable else []
            ranges.append(list(parts) if readable else None)
        logits = iter(self._logits(inputs, on_batch))
        width = len(self.classes)
        results: list[tuple[list[CharRange], Tensor] | None] = []
        for parts in ranges:
            found = [next(logits) for _ in parts or ()]
            stacked = torch.stack(found) if found else torch.zeros(0, width)
            results.append(None if parts is None else (parts, stacked))
        return results

    def _logits(self, inputs: Sequence[dict[str, list[int]]], on_batch: Callable[[int, int], object]) -> list[Tensor]:
        """The model's logits of each input, float32 on the CPU: texts of like lengths are read together."""
        found: dict[int, Tensor] = {}
        places = sorted(range(len(inputs)), key=lambda place: len(inputs[place]["input_ids"]), reverse=True)
        device = next(self.model.parameters()).device
        for start in range(0, len(places), self._batch_size):
            on_batch(start, len(places))
            batch = places[start : start + self._batch_size]
            rows = [inputs[place] for place in batch]
            with self._autocast():
                padded = {name: value.to(device) for name, value in pad(rows, self.tokenizer).items()}
                logits = self.model(**padded).logits.float().cpu()
            for k, place in enumerate(batch):
                found[place] = logits[k]
        on_batch(len(places), len(places))
        return [found[place] for place in range(len(inputs))]

    def probabilities(self, logits: Float32[Tensor, "S K"]) -> Float32[Tensor, "S K"]:
        """Softmax over the classes; a sigmoid of each where several can hold, or where there is only one."""
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=-1)


def _at_last_tokens(
    row: Encoded, segments: Sequence[CharRange] | None, logits: Float32[Tensor, "T K"]
) -> tuple[list[CharRange], Float32[Tensor, "S K"]]:
    if segments is None:
        pairs = row.parts
    else:
        ends = [(segment, row.last_token(segment)) for segment in segments]
        pairs = [(segment, token) for segment, token in ends if token is not None]
    return [segment for segment, _ in pairs], logits[[token for _, token in pairs]]


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot say which characters its tokens are.

    Raises:
        RunError: it is none of the fast ones.
    """
    if not tokenizer.is_fast:
        raise RunError(
            f"the tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} does not know the characters of its "
            "tokens: a segment model needs a fast tokenizer (tokenizer.json)"
        )


def longest_input(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that a model can read: its positions, or what its tokenizer allows.

    Models of RoBERTa's kind count positions from behind that of padding, which leaves them fewer than they have.
    """
    config: Any = cast(Any, model).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions:
        tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
        padding = [place for table in tables if (place := getattr(table, "padding_idx", None)) is not None]
        positions -= max(padding, default=-1) + 1
    limits = (positions, tokenizer.model_max_length)
    return min(limit for limit in limits if limit)


# --- loading ---


def load_classifier(path: str, dtype: str, device: torch.device) -> PreTrainedModel:
    """A frozen trained classifier, whole on every process: token classification, unless it is a sequence classifier.

    Raises:
        RunError: it has no classification head.
    """
    architectures = AutoConfig.from_pretrained(path).architectures or []
    names = [str(name) for name in architectures]
    if not any(name.endswith((TOKEN_HEAD, SEQUENCE_HEAD)) for name in names):
        raise RunError(
            f"{path} holds {', '.join(names) or 'no known model'}, and a segment model has a token or sequence "
            "classification head: train one with a stage of type segment"
        )
    sequences = any(name.endswith(SEQUENCE_HEAD) for name in names)
    cls = AutoModelForSequenceClassification if sequences else AutoModelForTokenClassification
    kind: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    model = load_undivided(lambda: cast(PreTrainedModel, cls.from_pretrained(path, dtype=kind)))
    model.requires_grad_(False)
    return cast(Any, model).eval().to(device)


def load_token_classifier(
    config: Pretrained, classes: Sequence[str], layers: int | None = None
) -> PreTrainedModel | PeftModel:
    """A model with a new token classification head on the weights of `config`, a LoRA adapter around it if it says so.

    With `layers`, the body keeps that many, the first. The head of a model that has one for the same classes is kept.
    """
    names: dict[str, Any] = {
        "id2label": dict(enumerate(classes)),
        "label2id": {name: k for k, name in enumerate(classes)},
    }
    if holds_adapter(config.path):  # a merged language model, whose body gets the head
        merged: Any = load_model(config.model_copy(update={"peft": None}))
        names |= _fewer(merged.config, layers)
        for name, value in names.items():
            setattr(merged.config, name, value)
        model: Any = AutoModelForTokenClassification.from_config(merged.config, dtype=merged.dtype)
        model.base_model.load_state_dict(merged.base_model.state_dict(), strict=layers is None)
    else:
        if layers is not None:
            names |= _fewer(AutoConfig.from_pretrained(config.path, trust_remote_code=config.trust_remote_code), layers)
        model = AutoModelForTokenClassification.from_pretrained(
            config.path,
            dtype=config.dtype if config.dtype == "auto" else getattr(torch, config.dtype),
            trust_remote_code=config.trust_remote_code,
            **({"revision": config.revision} if config.revision else {}),
            **({"attn_implementation": config.attn_implementation} if config.attn_implementation else {}),
            **names,
        )
    return get_peft_model(model, _lora(config.peft, model)) if config.peft is not None else model


def _fewer(config: Any, layers: int | None) -> dict[str, int]:
    """What makes a body of the first `layers` layers.

    Raises:
        RunError: it has fewer.
    """
    if layers is None:
        return {}
    have = config.num_hidden_layers
    if layers > have:
        raise RunError(f"layers: the model has {have}, not {layers}; write at most {have}")
    return {"num_hidden_layers": layers}


def _lora(lora: Lora, model: Any) -> LoraConfig:
    """LoRA on the body; the head is trained whole."""
    adapter = lora_config(lora)
    adapter.task_type = "TOKEN_CLS"
    if adapter.target_modules == "all-linear":
        adapter.exclude_modules = [name for name, _ in model.named_children() if name != model.base_model_prefix]
    return adapter
