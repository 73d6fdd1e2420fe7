"""How well a PRM that never saw a step label finds the first wrong step."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_kit.credit import sum_by_step
from rlhf_kit.data.files import local_file
from rlhf_kit.data.messages import content_text, prompt_messages
from rlhf_kit.data.outcomes import encode_row, render_row
from rlhf_kit.errors import RunError
from rlhf_kit.evals.steps import Solution, baseline_scores, first_error_report, load_processbench
from rlhf_kit.rollout import Text
from rlhf_kit.trainers.config import Reward

TokenScorer = Callable[[Sequence[Mapping[str, Any]]], Tensor]


def detect_first_errors(
    stage: Reward,
    token_rewards: TokenScorer,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path | None,
    on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> dict[str, Any]:
    """ProcessBench's first-error F1 and the step AUC of the PRM, beside chance and baselines without a model.

    The score of a step is the sum of its token rewards, `q[e_k] - q[e_{k-1}]` (arXiv 2412.01981, Eq. 4);
    `token_rewards` gives those (1, T) of one row of `encode_row`. Writes the scores to `step_scores.jsonl`.
    """
    assert stage.step_evaluation is not None
    config = stage.step_evaluation
    solutions = load_processbench(local_file(config.path), config.limit)
    scores = step_scores(stage, token_rewards, tokenizer, solutions, on_batch)
    if folder is not None:
        with (folder / "step_scores.jsonl").open("w", encoding="utf-8") as file:
            for solution, row in zip(solutions, scores, strict=True):
                file.write(json.dumps({"problem": solution.problem, "label": solution.label, "scores": row}) + "\n")
    candidates = {"prm": scores, **baseline_scores(solutions)}
    reports = {
        name: first_error_report(solutions, rows, config.threshold_fraction) for name, rows in candidates.items()
    }
    return {name: {**asdict(report), "f1": report.result.f1} for name, report in reports.items()}


def without_evaluated_problems(stage: Reward, data: Dataset) -> Dataset:
    """The rows of `data` whose prompt is no problem of `step_evaluation`, so that none is both learnt and judged.

    Raises:
        RunError: no row is left.
    """
    if stage.step_evaluation is None:
        return data
    problems = load_processbench(local_file(stage.step_evaluation.path), stage.step_evaluation.limit)
    judged = {_words(_prompt(stage, solution.problem)) for solution in problems}
    kept = [number for number, prompt in enumerate(data["prompt"]) if _words(prompt) not in judged]
    if not kept:
        raise RunError(
            f"all {len(data)} training rows are of problems that step_evaluation judges, and such rows are left out: "
            "train on other problems, or judge fewer (step_evaluation.limit)"
        )
    return data.select(kept)


def _words(prompt: Text) -> str:
    """A prompt as one text, to compare by."""
    text = prompt if isinstance(prompt, str) else "\n".join(content_text(message) for message in prompt)
    return " ".join(text.split())


def step_scores(
    stage: Reward,
    token_rewards: TokenScorer,
    tokenizer: PreTrainedTokenizerBase,
    solutions: Sequence[Solution],
    on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> list[list[float]]:
    """Summed token reward of every step of every solution; a separator belongs to the step that it ends.

    `on_batch` is told how many solutions are scored, of how many.
    """
    assert stage.step_evaluation is not None
    separator = stage.step_evaluation.separator
    scores: list[list[float]] = []
    for solution in solutions:
        on_batch(len(scores), len(solutions))
        prompt, completion = _prompt(stage, solution.problem), separator.join(solution.steps)
        row = encode_row(tokenizer, prompt, completion)
        _, rendered = render_row(tokenizer, prompt, completion)
        steps = _step_of_tokens(tokenizer, rendered, completion, [*solution.steps], separator)
        rewards = token_rewards([row])[:, : len(steps)]
        sums = sum_by_step(rewards, torch.tensor([steps], device=rewards.device), len(solution.steps))
        scores.append(sums[0].tolist())
    on_batch(len(scores), len(solutions))
    return scores


def _step_of_tokens(
    tokenizer: PreTrainedTokenizerBase, rendered: str, completion: str, steps: list[str], separator: str
) -> list[int]:
    """The step that holds the last character of each token of `rendered`; -1 for what the chat template adds."""
    stripped = completion.strip()  # as many chat templates do
    found_at = rendered.find(stripped)
    if found_at < 0:
        raise ValueError(f"the chat template changes an answer, so its steps cannot be found: {rendered[:160]!r}")
    start = found_at - (len(completion) - len(completion.lstrip()))
    ends = list(accumulate((len(step) + len(separator) for step in steps), initial=start))
    ends[-1] = found_at + len(stripped)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    offsets = cast(list[tuple[int, int]], encoded["offset_mapping"])
    last = torch.tensor([end - 1 for _, end in offsets])
    found = torch.bucketize(last, torch.tensor(ends), right=True) - 1
    return torch.where(found < len(steps), found, -1).tolist()


def _prompt(stage: Reward, problem: str) -> Text:
    data = stage.data
    text = data.prompt_template.replace("{prompt}", problem) if data.prompt_template else problem
    return prompt_messages(text, data.system) if data.chat else text
