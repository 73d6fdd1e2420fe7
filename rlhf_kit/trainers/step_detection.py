"""How well a PRM that never saw a step label finds the first wrong step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_kit.credit import sum_by_step
from rlhf_kit.credit.spans import step_ids, token_offsets
from rlhf_kit.data.messages import prompt_messages
from rlhf_kit.data.outcomes import collate_outcomes, encode_row
from rlhf_kit.evals.steps import Solution, baseline_scores, first_error_report, load_processbench
from rlhf_kit.rollout import Text
from rlhf_kit.trainers.config import Reward


def detect_first_errors(
    stage: Reward, trainer: Any, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> dict[str, Any]:
    """ProcessBench's first-error F1 and the step AUC of the PRM, beside chance and baselines without a model.

    The score of a step is the sum of its token rewards, `q[e_k] - q[e_{k-1}]` (arXiv 2412.01981, Eq. 4). Writes the
    scores to `step_scores.jsonl`.
    """
    assert stage.step_evaluation is not None
    config = stage.step_evaluation
    solutions = load_processbench(config.path, config.limit)
    scores = step_scores(stage, trainer, tokenizer, solutions)
    with (folder / "step_scores.jsonl").open("w") as file:
        for solution, row in zip(solutions, scores, strict=True):
            file.write(json.dumps({"problem": solution.problem, "label": solution.label, "scores": row}) + "\n")
    candidates = {"prm": scores, **baseline_scores(solutions)}
    reports = {
        name: first_error_report(solutions, rows, config.threshold_fraction) for name, rows in candidates.items()
    }
    return {name: {**asdict(report), "f1": report.result.f1} for name, report in reports.items()}


@torch.no_grad()
def step_scores(
    stage: Reward, trainer: Any, tokenizer: PreTrainedTokenizerBase, solutions: Sequence[Solution]
) -> list[list[float]]:
    """Summed token reward of every step of every solution, by the model that the trainer holds."""
    assert stage.step_evaluation is not None
    separator = stage.step_evaluation.separator
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    scores = []
    for solution in solutions:
        text = separator.join(solution.steps)
        row = encode_row(tokenizer, _prompt(stage, solution.problem), text)
        batch = trainer._prepare_inputs(collate_outcomes([row], tokenizer.pad_token_id))
        rewards = trainer.token_rewards(model, batch)
        scores.append(_sum_steps(rewards, row["completion_ids"], solution, separator, tokenizer))
    return scores


def _sum_steps(
    rewards: Tensor,
    completion_ids: list[int],
    solution: Solution,
    separator: str,
    tokenizer: PreTrainedTokenizerBase,
) -> list[float]:
    offsets = token_offsets(tokenizer, completion_ids)
    decoded = tokenizer.decode(completion_ids, skip_special_tokens=True)
    ends, end = [0], 0
    for step in solution.steps:
        end += len(step) + len(separator)
        ends.append(min(end, len(decoded)))
    segments = list(zip(ends, ends[1:], strict=False))
    if ends[-1] < len(decoded):
        segments.append((ends[-1], len(decoded)))
    mask = torch.ones_like(rewards, dtype=torch.bool)
    ids = step_ids([offsets], [segments], mask)
    return sum_by_step(rewards, ids, len(segments))[0, : len(solution.steps)].tolist()


def _prompt(stage: Reward, problem: str) -> Text:
    data = stage.data
    text = data.prompt_template.replace("{prompt}", problem) if data.prompt_template else problem
    return prompt_messages(text, data.system) if data.chat else text
