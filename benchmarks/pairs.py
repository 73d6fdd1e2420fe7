"""Prompts per minute of `pairs` against the plain way: a loop that calls `generate` once a completion.

Both sample `--k` completions of each prompt at temperature 1 with the same model and the same token limit, judge them
by the same source, and take the best against the worst. `pairs` is the whole stage: loading the model, sampling in
chunks, scoring, keeping every chunk, choosing, writing. The loop's model is loaded before its clock starts. Completions
end where the model ends them, so that the two do not have exactly the same tokens; both are printed. They take turns.

    python benchmarks/pairs.py
    python benchmarks/pairs.py --model SMOLLM2 --prompts 32 --max-new-tokens 64
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any, cast

from common import QUICKSTART_PROMPTS, parser, print_table, quieten, report, save_scratch_policy, seconds, spread
from torch import nn
from transformers import set_seed

from rlhf_kit.data.load import load_data
from rlhf_kit.evals.scoring import GivenScorer
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.models.loading import load_copy, load_tokenizer
from rlhf_kit.pairs.config import Pairs
from rlhf_kit.pairs.files import read_rows
from rlhf_kit.pairs.stage import run_pairs
from rlhf_kit.rewards.config import BuildContext

TARGET = 3.0


def stage_of(model: Path, data: dict[str, Any], arguments: argparse.Namespace) -> Pairs:
    """The stage; its source is cheap, so that what is compared is sampling."""
    generation = {
        "num_generations": arguments.k,
        "max_new_tokens": arguments.max_new_tokens,
        "prompts_at_once": arguments.prompts_at_once,
    }
    source = {"type": "lexical", "measure": {"type": "length", "target": arguments.max_new_tokens // 2}}
    select = {"type": "best_worst", "truncated": "keep"}
    return Pairs.model_validate(
        {
            "type": "pairs",
            "model": {"path": str(model)},
            "data": data,
            "generation": generation,
            "rewards": [source],
            "select": select,
        }
    )


def questions(folder: Path, count: int) -> dict[str, Any]:
    """Prompts for a model of language, as messages."""
    rows = [
        {"prompt": f"Explain in a few sentences what {n} plus {n * n % 17} is, and where one needs it."}
        for n in range(count)
    ]
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    return {"type": "jsonl", "path": str(file), "chat": True}


class PlainLoop:
    """`generate` once a completion, then the score of each, and the best and the worst of each prompt."""

    def __init__(self, stage: Pairs) -> None:
        assert stage.model is not None
        self.stage = stage
        self.model = cast(nn.Module, load_copy(stage.model))
        self.tokenizer = load_tokenizer(stage.model)
        device = next(self.model.parameters()).device
        context = BuildContext(cast(Any, self.model), stage.model, 1.0, device, {}, self.tokenizer)
        sources = [config.build(context) for config in stage.rewards]
        self.scorer = GivenScorer(self.model, self.tokenizer, stage.rewards, sources, batch_size=1)
        self.name = stage.rewards[0].source_name
        self.lengths: list[int] = []

    def __call__(self) -> list[tuple[str, str]]:
        """The pairs."""
        set_seed(0)
        generation, pairs = self.stage.generation, []
        for row in load_data(self.stage.data).to_list():
            scored = []
            for _ in range(generation.num_generations):
                (ids,) = generate_ids(
                    self.model,
                    self.tokenizer,
                    [row["prompt"]],
                    max_new_tokens=generation.max_new_tokens,
                    temperature=generation.temperature,
                )
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                found = self.scorer([{**row, "completion": text, "completion_ids": ids}])
                scored.append((float(found.sources[self.name].totals[0]), cast(str, text)))
                self.lengths.append(len(ids))
            pairs.append((max(scored)[1], min(scored)[1]))
        return pairs


def main() -> None:
    """Measure and print."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="a model's folder; without it the quickstart's, untrained")
    options.add_argument("--prompts", type=int, default=64)
    options.add_argument("--k", type=int, default=8)
    options.add_argument("--max-new-tokens", type=int, default=14)
    options.add_argument("--prompts-at-once", type=int, default=16)
    options.add_argument("--repeats", type=int, default=3)
    arguments = options.parse_args()
    quieten()
    with tempfile.TemporaryDirectory() as temporary, report(arguments) as results:
        folder = Path(temporary)
        model = arguments.model or save_scratch_policy(folder / "model")
        sums = {**QUICKSTART_PROMPTS, "size": arguments.prompts}
        stage = stage_of(model, questions(folder, arguments.prompts) if arguments.model else sums, arguments)
        loop = PlainLoop(stage)
        times: dict[str, list[float]] = {"plain loop": [], "pairs": []}
        tokens: list[float] = []
        for number in range(arguments.repeats):
            times["plain loop"].append(seconds(loop))
            run = folder / f"run-{number}"
            times["pairs"].append(seconds(lambda run=run: run_pairs(stage, run, seed=number)))  # noqa: B023
            tokens += [row["length"] for row in read_rows(run / "completions.parquet")]
        ratio = statistics.median(times["plain loop"]) / statistics.median(times["pairs"])
        means = {"plain loop": statistics.fmean(loop.lengths), "pairs": statistics.fmean(tokens)}
        rows = []
        for arm, taken in times.items():
            rate = spread([60 * arguments.prompts / value for value in taken])
            shown = {
                "arm": arm,
                "prompts a minute (range)": f"{rate['median']:.1f} ({rate['min']:.1f} to {rate['max']:.1f})",
                "tokens a completion": means[arm],
                "x plain": ratio if arm == "pairs" else 1.0,
                "target": f">= {TARGET:g}" if arm == "pairs" else "",
            }
            rows.append(shown)
        print_table(f"K = {arguments.k}, at most {arguments.max_new_tokens} tokens", rows)
        results |= {"seconds": times, "ratio": ratio, "tokens": means}


if __name__ == "__main__":
    main()
