"""GSM8K's `example_model_solutions.jsonl`: four models' solutions of each test problem, with outcome labels.

Source: Cobbe et al., *Training Verifiers to Solve Math Word Problems* (arXiv 2110.14168).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

Row = dict[str, Any]

GENERATORS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
# The models were trained to call a calculator, "16 - 3 = <<16-3=13>>13"; a reader sees "16 - 3 = 13". A
# solution cut off at the length limit may end inside a call.
ANNOTATION = re.compile(r"<<[^<>]*(?:>>|>?$)")


def gsm8k_rows(problem: Mapping[str, Any], paired: bool, calculator_annotations: bool) -> list[Row]:
    """The rows of one problem.

    Unpaired, one row a solution: `prompt, completion, label, generator`. Paired, one row for every
    combination of a right and a wrong solution, at most four: `prompt, chosen, rejected, chosen_generator,
    rejected_generator`; a problem that all models solved, or none, has none. Each row has the `answer`.

    Raises:
        ValueError: a field is missing.
    """
    missing = [name for name in ("question", "ground_truth", *GENERATORS) if not problem.get(name)]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}, which every problem of example_model_solutions.jsonl has")

    def text(solution: str) -> str:
        return solution if calculator_annotations else ANNOTATION.sub("", solution)

    answer = problem["ground_truth"].rpartition("A:")[2].strip()
    shared = {"prompt": problem["question"], "answer": answer}
    solutions = [
        {
            "completion": text(problem[name]["solution"]),
            "label": problem[name]["is_correct"],
            "generator": name,
        }
        for name in GENERATORS
    ]
    if not paired:
        return [{**shared, **solution} for solution in solutions]
    return [
        {
            **shared,
            "chosen": right["completion"],
            "rejected": wrong["completion"],
            "chosen_generator": right["generator"],
            "rejected_generator": wrong["generator"],
        }
        for right in solutions
        if right["label"]
        for wrong in solutions
        if not wrong["label"]
    ]
