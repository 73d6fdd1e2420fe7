"""Held-out accuracy by greedy decoding."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf_kit.data.verifiers import verify
from rlhf_kit.evals.config import Evaluation
from rlhf_kit.models.generation import generate


def refuse_unjudgeable(rows: Sequence[Mapping[str, Any]], evaluation: Evaluation) -> None:
    """Stop before anything is generated for a row that would be missing from the accuracy.

    Raises:
        ValueError: the verifier cannot judge a row, whatever its completion.
    """
    for number, row in enumerate(rows, start=1):
        if verify(evaluation.verifier, "", row) is None:
            raise ValueError(
                f"verifier {evaluation.verifier!r} cannot judge row {number} of the held-out data, which has the "
                f"columns {', '.join(row)} and answer {row.get('answer')!r}: choose another verifier, or leave the row "
                "out"
            )


def greedy_scores(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    evaluation: Evaluation,
    rank: int = 0,
    world_size: int = 1,
    on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> list[float]:
    """The verifier's score of one greedy completion for each of this rank's prompts (every `world_size`-th).

    All ranks generate the same number of batches, so that a sharded model does not wait for one that is done.
    `on_batch` is told how many rows all ranks have done, of how many, as if the others were as far as this one.

    Raises:
        ValueError: the verifier cannot judge a row, whatever its completion; the same on every rank.
    """
    rows = [cast(Mapping[str, Any], row) for row in dataset]
    refuse_unjudgeable(rows, evaluation)
    share = -(-len(rows) // world_size)
    places = [rank + k * world_size for k in range(share)]
    shown = [rows[place % len(rows)] for place in places]
    completions = generate(
        model,
        tokenizer,
        [row["prompt"] for row in shown],
        max_new_tokens=evaluation.max_new_tokens,
        batch_size=evaluation.batch_size,
        on_batch=lambda done, share: on_batch(len(rows) * done // share, len(rows)),
    )
    judged = zip(places, completions, shown, strict=True)
    scores = [verify(evaluation.verifier, text, row) for place, text, row in judged if place < len(rows)]
    return [score for score in scores if score is not None]
