"""A step of the kit's offline objectives against TRL's DPO step: same model, rows, lengths and seed, in one run.

The trainers take their steps in turn, so that whatever else the machine does hits all of them alike; ratios are
medians over rounds. All prompts have one length and all completions another. Every step sees as many completions:
objectives on single completions get twice the rows. The arms:

- `trl dpo`: TRL's DPOTrainer, on the kit's ids.
- `nca`, `c3po`, `ce`: log-ratios to a reference, as DPO has them (target: at most 1.05x TRL's DPO).
- `orpo`, `i_orpo`, `cut`: no reference, so that a forward pass is saved (target: below 1).
- `pmpo`, `cringe`, `pairwise_cringe`: need the whole next-token distribution, `pmpo` the reference's as well.

    python benchmarks/preference_step.py                              # the quickstart's model
    python benchmarks/preference_step.py --model PATH --lora          # e.g. SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import parsed, parser, print_table, quieten, report, save_scratch_policy, spread
from datasets import Dataset
from step_time import Arm
from transformers import Trainer

from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.loading import load_tokenizer
from rlhf_kit.trainers.config import Preference
from rlhf_kit.trainers.offline import offline_trainer
from rlhf_kit.trainers.preference import StageRows
from rlhf_kit.trainers.setup import StageRun

TRL = "trl dpo"
OBJECTIVES: dict[str, dict[str, Any]] = {
    TRL: {"type": "dpo"},
    "nca": {"type": "nca"},
    "c3po": {"type": "c3po"},
    "ce": {"type": "ce"},
    "orpo": {"type": "orpo"},
    "i_orpo": {"type": "i_orpo"},
    "cut": {"type": "cut"},
    "pmpo": {"type": "pmpo"},
    "cringe": {"type": "cringe"},
    "pairwise_cringe": {"type": "pairwise_cringe"},
}
TARGETS = dict.fromkeys(("nca", "c3po", "ce"), "<= 1.05") | dict.fromkeys(("orpo", "i_orpo", "cut"), "< 1")
SINGLE = ("ce", "pmpo", "cringe")  # one completion a row
DEFAULTS = {
    "tiny": {"pairs": 64, "prompt": 14, "length": 14, "steps": 40, "warmup": 3},
    "path": {"pairs": 2, "prompt": 48, "length": 48, "steps": 4, "warmup": 1},
}


class Turn(Arm):
    """A trainer whose step is measured as a whole."""

    def _watch_parts(self) -> None:
        pass


def write_rows(path: Path, tokenizer: Any, count: int, prompt: int, length: int) -> None:
    """Rows with the columns of every objective, of random words; completions are given as ids of one length."""
    generator = random.Random(0)
    special = set(tokenizer.all_special_ids)
    words = [word for word, number in tokenizer.get_vocab().items() if number not in special and word.isascii()]
    usable = [word for word in words[:5000] if len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1]

    def text(size: int) -> str:
        return " ".join(generator.choice(usable) for _ in range(size))

    def ids() -> list[int]:
        return [tokenizer.convert_tokens_to_ids(generator.choice(usable)) for _ in range(length)]

    rows = []
    for number in range(count):
        completions = {"chosen": ids(), "rejected": ids(), "completion": ids()}
        prompts = {name: text(prompt) for name in ("prompt", "corrupted_prompt", "judged_prompt")}
        texts = {name: tokenizer.decode(value) for name, value in completions.items()}
        given = {f"{name}_ids": value for name, value in completions.items()}
        rows.append({**prompts, **texts, **given, "label": number % 2 == 0, "scope": 0})
    Dataset.from_list(rows).to_parquet(str(path))


def build(name: str, model: dict[str, Any], data: Path, folder: Path, options: argparse.Namespace) -> Trainer:
    """The trainer of an arm."""
    args = {
        "per_device_train_batch_size": options.pairs * (2 if name in SINGLE else 1),
        "max_steps": options.steps + options.warmup,
        "learning_rate": 1e-6,
        "gradient_checkpointing": False,
        "logging_steps": 10_000,
    }
    stage = Preference.model_validate(
        {
            "type": "preference",
            "model": model,
            "objective": OBJECTIVES[name],
            "data": {"type": "parquet", "path": str(data)},
            "trainer": {"args": args},
        }
    )
    run, tokenizer = StageRun(folder / name), load_tokenizer(stage.model)
    encode = StageRows(stage, run, tokenizer).encoded
    return offline_trainer(stage, stage.objective, run, tokenizer, encode, None)[0]


def measure(options: argparse.Namespace, model: dict[str, Any], folder: Path) -> dict[str, list[float]]:
    """Seconds of each arm's steps, round by round."""
    quieten()
    data = folder / "rows.parquet"
    tokenizer = load_tokenizer(Pretrained.model_validate(model))
    write_rows(data, tokenizer, 4 * options.pairs, options.prompt, options.length)
    arms = [Turn(name, build(name, model, data, folder, options)) for name in options.arms]
    for _ in range(options.warmup):
        for arm in arms:
            arm.step()
    rounds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for _ in range(options.steps):
        for arm in arms:
            rounds[arm.name].append(arm.step()["step"])
    for arm in arms:
        arm.finish()
    return rounds


def show(rounds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """A table of medians, and of medians of the ratio within a round."""
    rows = []
    for name, seconds in rounds.items():
        found = spread(seconds)
        ratios = [own / theirs for own, theirs in zip(seconds, rounds[TRL], strict=True)]
        rows.append(
            {
                "arm": name,
                "step, s (range)": f"{found['median']:.3g} ({found['min']:.3g} to {found['max']:.3g})",
                "x TRL's DPO": statistics.median(ratios),
                "target": TARGETS.get(name, ""),
            }
        )
    print_table("Step of an offline objective (medians)", rows)
    return rows


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    options = parser(__doc__)
    options.add_argument("--model", default="tiny", help="'tiny' (the quickstart's, from scratch) or a path")
    options.add_argument("--lora", action="store_true", help="train LoRA adapters")
    options.add_argument("--arms", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    sizes = {
        "pairs": "pairs of a step",
        "prompt": "words of a prompt",
        "length": "tokens of a completion",
        "steps": "rounds that are measured",
        "warmup": "rounds before them",
    }
    found = parsed(options, sizes, DEFAULTS, arguments)
    found.arms = [TRL, *(name for name in found.arms if name != TRL)]
    return found


def main() -> None:
    """Measure, print, write."""
    options = options_of()
    with tempfile.TemporaryDirectory() as temporary, report(options) as results:
        folder = Path(temporary)
        path = save_scratch_policy(folder / "policy") if options.model == "tiny" else options.model
        peft = {"type": "lora", "r": 16, "alpha": 32} if options.lora else None
        results["rounds"] = measure(options, {"path": str(path), "peft": peft}, folder)
        results["arms"] = show(results["rounds"])


if __name__ == "__main__":
    main()
