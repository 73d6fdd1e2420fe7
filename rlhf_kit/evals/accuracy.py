"""Held-out accuracy by greedy decoding."""

from __future__ import annotations

from collections.abc import Callable

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_kit.data.verifiers import verify
from rlhf_kit.evals.config import Evaluation
from rlhf_kit.models.generation import generate


def greedy_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    evaluation: Evaluation,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """The verifier's score of one greedy completion for each of this rank's prompts (every `world_size`-th).

    All ranks generate the same number of batches, so that a sharded model does not wait for one that is done.
    """
    share = -(-len(dataset) // world_size)
    indices = [(rank + k * world_size) % len(dataset) for k in range(share)]
    rows = [dataset[index] for index in indices]
    completions = generate(
        model,
        tokenizer,
        [row["prompt"] for row in rows],
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        on_batch=on_batch,
    )
    own = [rank + k * world_size < len(dataset) for k in range(share)]
    scores = [verify(evaluation.verifier, text, row) for text, row in zip(completions, rows, strict=True)]
    return [score or 0.0 for score, mine in zip(scores, own, strict=True) if mine]
