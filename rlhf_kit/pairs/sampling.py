"""Completions of a batch of prompts, by transformers or by vLLM."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.generation import encode_prompts, generate_ids
from rlhf_kit.models.loading import holds_adapter, save_whole
from rlhf_kit.pairs.config import Generation
from rlhf_kit.rollout import Text


def sample_with_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Text], generation: Generation
) -> list[list[int]]:
    """The ids of one completion for each prompt, all in one batch."""
    return generate_ids(
        model,
        tokenizer,
        prompts,
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        batch_size=len(prompts),
        synced_gpus=False,
    )


@contextmanager
def whole_weights(model: Pretrained) -> Iterator[Pretrained]:
    """A model as vLLM can load it: an adapter is merged into its base, in a folder that is there for as long."""
    if not holds_adapter(model.path):
        yield model
        return
    with TemporaryDirectory() as folder:
        save_whole(model, Path(folder))
        yield model.model_copy(update={"path": folder, "tokenizer": None, "revision": None})


class VllmSampler:
    """The same by a vLLM engine of this process's own; every completion has a seed drawn from Python's generator.

    Args:
        model: what is loaded, by vLLM itself; a folder with an adapter as `whole_weights`.
        tokenizer: encodes the prompts, as elsewhere in the kit.
        ends: the ids that end a completion.
        generation: the stage's.
    """

    def __init__(
        self, model: Pretrained, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], generation: Generation
    ) -> None:
        import vllm  # pyright: ignore[reportMissingImports]

        self._vllm: Any = vllm
        self._tokenizer = tokenizer
        self._ends = list(ends)
        self._generation = generation
        with whole_weights(model) as whole:
            self._engine = vllm.LLM(
                model=whole.path,
                tokenizer=whole.tokenizer or whole.path,
                revision=whole.revision,
                dtype=whole.dtype,
                trust_remote_code=whole.trust_remote_code,
                gpu_memory_utilization=generation.vllm_gpu_memory_utilization,
            )

    def __call__(self, prompts: Sequence[Text]) -> list[list[int]]:
        """The ids of one completion for each prompt."""
        encoded = encode_prompts(self._tokenizer, prompts)
        rows = zip(encoded["input_ids"], encoded["attention_mask"].bool(), strict=True)
        asked = [{"prompt_token_ids": ids[mask].tolist()} for ids, mask in rows]
        params = [
            self._vllm.SamplingParams(
                max_tokens=self._generation.max_new_tokens,
                temperature=self._generation.temperature,
                top_p=self._generation.top_p,
                stop_token_ids=self._ends,
                seed=random.randrange(2**31),
            )
            for _ in asked
        ]
        answers = self._engine.generate(asked, params, use_tqdm=False)
        return [list(cast(Any, answer).outputs[0].token_ids) for answer in answers]
