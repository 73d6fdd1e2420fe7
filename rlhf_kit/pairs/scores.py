"""From what sources said of completions to one score each: weights, failures, and the penalty on length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf_kit.credit.debias import Debias, length_debias
from rlhf_kit.pairs.builder import Row
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.rollout import Status

LENGTH_PENALTY = "length_penalty"


@dataclass(frozen=True)
class Scores:
    """Completions' scores.

    Attributes:
        totals: the sum of a completion's shares; NaN where there is no score.
        shares: what each source gave to the sum, and with `length_debias` the penalty, by completion.
        debias: the penalty on length.
    """

    totals: list[float]
    shares: list[dict[str, float]]
    debias: Debias


def scores_of(stage: Pairs, completions: Sequence[Row]) -> Scores:
    """The scores of completions with `score.SOURCE` and `status.SOURCE`, `prompt_index`, `length`, `text` and
    `truncated`.

    A share is the weighted sum of a source's token rewards; with `normalize` divided by the standard deviation of these
    sums over all completions. A row that a required source failed on has no score, nor has one that no source judged. A
    row of another task, or one that a source failed on that is not required, gets nothing of it. The penalty on length
    is that of the completions that `select` may take, which those cut off at `max_new_tokens` mostly are not.
    """
    shares = _shares(stage, completions)
    totals = [sum(share.values()) for share in shares]
    if stage.length_debias == "none":
        return Scores(totals, shares, Debias(0.0, 0.0, 0.0))
    lengths = [row["length"] if stage.length_debias == "tokens" else len(row["text"]) for row in completions]
    drops_cut = stage.select is not None and stage.select.truncated == "drop"
    usable = [
        math.nan if drops_cut and row["truncated"] else total for row, total in zip(completions, totals, strict=True)
    ]
    debias = length_debias(usable, lengths, [row["prompt_index"] for row in completions])
    penalties = [-debias.alpha * length for length in lengths]
    totals = [total + penalty for total, penalty in zip(totals, penalties, strict=True)]
    shares = [{**share, LENGTH_PENALTY: penalty} for share, penalty in zip(shares, penalties, strict=True)]
    return Scores(totals, shares, debias)


def _shares(stage: Pairs, completions: Sequence[Row]) -> list[dict[str, float]]:
    shares: list[dict[str, float]] = [{} for _ in completions]
    judged = [False] * len(completions)
    for config in stage.rewards:
        name = config.source_name
        values = torch.tensor([row[f"score.{name}"] for row in completions], dtype=torch.float64)
        known = values[values.isfinite()]
        scale = known.std(correction=0).item() if config.normalize != "none" and len(known) else 1.0
        weight = config.weight_at(0) / (scale or 1.0)
        for place, (row, value) in enumerate(zip(completions, values.tolist(), strict=True)):
            status = row[f"status.{name}"]
            judged[place] |= status == Status.OK
            lost = math.nan if status == Status.FAILED and config.required else 0.0
            shares[place][name] = weight * value if status == Status.OK else lost
    return [
        share if any_judgement else dict.fromkeys(share, math.nan)
        for share, any_judgement in zip(shares, judged, strict=True)
    ]
