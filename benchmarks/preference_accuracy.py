"""Whether segment models, trained on the errors of one answer, prefer what people preferred of two.

    python benchmarks/preference_accuracy.py RUN_FOLDER DATA [--skip 400] [--questions 100]

RUN_FOLDER is that of recipes/fine_grained/qa_feedback.yaml, DATA the same dev_feedback.json. The reward of an answer is
the weighted sum of its segments' rewards, with the settings of Fine-Grained Human Feedback (arXiv 2306.01693): +-0.3
for each sub-sentence that is relevant or not, +-0.5 for each sentence that is right or wrong, and 0.3 times what the
completeness model says. It is compared with the human preference on pairs of held-out questions, beside the length of
the answer. A tie counts one half. Intervals are bootstrapped over questions.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from transformers import AutoTokenizer

from rlhf_kit.credit.spans import token_offsets
from rlhf_kit.data.config import QaFeedback
from rlhf_kit.data.load import load_data
from rlhf_kit.rewards.segment_model import SegmentModelConfig
from rlhf_kit.rollout import Rollout, Status

SOURCES: dict[str, dict[str, Any]] = {
    "relevance": {"labels": {"none": 0.3, "irrelevant": -0.3}},
    "factuality": {"labels": {"none": 0.5, "wrong": -0.5}},
    "completeness": {"labels": {"none": 0.3}},
}
PASSAGES = {"relevance": 0, "factuality": 4, "completeness": 4}  # as the recipe trains them
RESAMPLES = 2000


def pairs(path: str, skip: int, questions: int, passages: int) -> list[dict[str, str]]:
    """Preference pairs of the held-out questions, in the recipe's order."""
    config = {"type": "qa_feedback", "path": path, "paired": True, "passages": passages}
    return load_data(
        QaFeedback.model_validate({**config, "shuffle_seed": 0, "skip": skip, "limit": questions})
    ).to_list()


def rollout(prompts: Sequence[str], texts: Sequence[str], tokenizer: Any) -> Rollout:
    """Texts as if the policy had written them."""
    rows = [tokenizer(text)["input_ids"] for text in texts]
    width = max(map(len, rows))
    offsets = [token_offsets(tokenizer, row) for row in rows]
    mask = torch.tensor([[k < len(row) for k in range(width)] for row in rows])
    return Rollout(
        prompts=prompts,
        completions=texts,
        prompt_ids=torch.zeros(len(rows), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(rows), 1, dtype=torch.bool),
        completion_ids=torch.zeros(len(rows), width, dtype=torch.long),
        completion_mask=mask,
        action_mask=mask,
        texts=texts,
        offsets=[row + [(row[-1][1], row[-1][1])] * (width - len(row)) for row in offsets],
    )


def scores(
    folder: Path, name: str, rows: Sequence[Mapping[str, str]], output: str, dtype: str
) -> dict[tuple[str, str], tuple[float, int]]:
    """The summed reward of each answer, and how many segments it has, by question and text."""
    path = str(folder / name / "model")
    source = {"type": "segment_model", "path": path, **SOURCES[name], "output": output, "dtype": dtype}
    built = SegmentModelConfig.model_validate(source).build(cast(Any, SimpleNamespace(device=torch.device("cpu"))))
    answers = list(dict.fromkeys((row["prompt"], row[side]) for row in rows for side in ("chosen", "rejected")))
    tokenizer = AutoTokenizer.from_pretrained(path)
    judged = built.judge(rollout([prompt for prompt, _ in answers], [text for _, text in answers], tokenizer))
    found: dict[tuple[str, str], tuple[float, int]] = {}
    for (prompt, text), spans in zip(answers, judged.rows, strict=True):
        assert not isinstance(spans, Status), "an answer is longer than the model's positions"
        question = prompt.rpartition("\n\n")[2]
        found[question, text] = sum(span.reward for span in spans), len(spans)
    return found


def accuracy(rows: Sequence[Mapping[str, str]], value: Mapping[tuple[str, str], float]) -> dict[str, float]:
    """Share of the pairs whose better answer has the larger value, with a 95 % interval over questions."""
    right: dict[str, list[float]] = {}
    for row in rows:
        difference = value[row["prompt"], row["chosen"]] - value[row["prompt"], row["rejected"]]
        right.setdefault(row["prompt"], []).append(0.5 if difference == 0 else float(difference > 0))
    chance = random.Random(0)
    groups = list(right.values())

    def mean(chosen: Sequence[Sequence[float]]) -> float:
        return sum(map(sum, chosen)) / sum(map(len, chosen))

    resampled = sorted(mean(chance.choices(groups, k=len(groups))) for _ in range(RESAMPLES))
    low, high = resampled[RESAMPLES // 40], resampled[-RESAMPLES // 40]
    return {"accuracy": mean(groups), "low": low, "high": high, "pairs": len(rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("data")
    parser.add_argument("--skip", type=int, default=400)
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--output", choices=("labels", "probabilities"), default="labels")
    parser.add_argument("--dtype", default="bfloat16")
    given = parser.parse_args()
    rows = pairs(given.data, given.skip, given.questions, passages=0)
    by_source = {
        name: scores(
            *(given.folder, name, pairs(given.data, given.skip, given.questions, PASSAGES[name])),
            *(given.output, given.dtype),
        )
        for name in SOURCES
    }
    answers = list(by_source["relevance"])
    sums = {name: {answer: found[answer][0] for answer in answers} for name, found in by_source.items()}
    means = {
        name: {answer: found[answer][0] / max(found[answer][1], 1) for answer in answers}
        for name, found in by_source.items()
    }
    values = {
        **sums,
        "sum of the three": {answer: sum(value[answer] for value in sums.values()) for answer in answers},
        "sum of the three, each a mean over its segments": {
            answer: sum(value[answer] for value in means.values()) for answer in answers
        },
        "longer": {answer: len(answer[1]) for answer in answers},
        "shorter": {answer: -len(answer[1]) for answer in answers},
    }
    for name, value in values.items():
        print(json.dumps({"score": name, **{key: round(x, 4) for key, x in accuracy(rows, value).items()}}), flush=True)


if __name__ == "__main__":
    main()
