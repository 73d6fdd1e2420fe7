"""What a policy that was trained by a yes/no question has learnt: held-out prompts, before and after.

The judge's own probability of a Yes is what was trained. Beside it stand measures that training did not see: VADER's
compound sentiment (a word list), words, repeated 3-grams, how many completions are different, and how likely the model
before training finds them (the mean log-probability of a token: a policy that leaves the language falls). Intervals of
the differences are bootstrapped over prompts.

    python benchmarks/yes_no_transfer.py --trained runs/yes-no-smollm2/ppo/model
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from statistics import correlation, fmean
from typing import Any

import torch
from common import parser, print_table, report
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf_kit.judges.prompts import read_prompt
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.generation import generate_ids
from rlhf_kit.models.in_process import InProcess, own_model
from rlhf_kit.models.likelihood import log_likelihoods
from rlhf_kit.recipe import load_recipe
from rlhf_kit.rewards.asking import PROMPTS
from rlhf_kit.rewards.yes_no import YesNo, YesNoConfig
from rlhf_kit.rollout import Rollout

BOOTSTRAPS = 2000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def completions(model: InProcess, prompts: Sequence[str], length: int) -> list[list[int]]:
    """One sampled completion a prompt, at temperature 1."""
    torch.manual_seed(0)
    with model.ready() as policy:
        return generate_ids(policy, model.tokenizer, prompts, max_new_tokens=length, temperature=1.0, batch_size=32)


def probabilities(source: YesNo, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
    """The judge's probability of a Yes about each completion."""
    mask = torch.ones(len(texts), 1, dtype=torch.bool)
    rollout = Rollout(prompts, texts, mask.long(), mask, mask.long(), mask, mask, texts=texts)
    rewards = source.score(rollout)
    if rewards.status.any():
        raise RuntimeError("the judge could not answer all questions: see the warnings above")
    return rewards.tokens.sum(dim=1).tolist()


def repetition(text: str, n: int = 3) -> float:
    """The share of a text's n-grams of words that occurred in it before."""
    words = text.casefold().split()
    grams = [tuple(words[place : place + n]) for place in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def measure(before: InProcess, source: YesNo, prompts: Sequence[str], ids: list[list[int]]) -> dict[str, list[float]]:
    """Every measure of each completion."""
    tokenizer: Any = before.tokenizer
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    analyzer = SentimentIntensityAnalyzer()
    with before.ready() as model:
        contexts = [tokenizer(prompt)["input_ids"] for prompt in prompts]
        likelihoods = log_likelihoods(model, contexts, [[own] for own in ids], 32)
    return {
        "P(yes)": probabilities(source, prompts, texts),
        "VADER": [analyzer.polarity_scores(text)["compound"] for text in texts],
        "words": [float(len(text.split())) for text in texts],
        "repeated 3-grams": [repetition(text) for text in texts],
        "log-likelihood before": [found[0].mean for found in likelihoods],
    }


def interval(differences: Sequence[float], samples: int) -> tuple[float, float]:
    """The middle 95 % of the mean over bootstrapped prompts, of which each has `samples` values in a row."""
    drawn = random.Random(0)
    prompts = [fmean(differences[start : start + samples]) for start in range(0, len(differences), samples)]
    means = sorted(fmean(drawn.choices(prompts, k=len(prompts))) for _ in range(BOOTSTRAPS))
    return means[int(0.025 * BOOTSTRAPS)], means[int(0.975 * BOOTSTRAPS) - 1]


def main(options: argparse.Namespace) -> None:
    recipe = load_recipe(options.recipe, options.override)
    stage: Any = recipe.stages["ppo"]
    config = next(source for source in stage.rewards if isinstance(source, YesNoConfig))
    config = config.model_copy(update={"scale": 1.0, "center": 0.0})
    lines = Path(stage.data.path).read_text(encoding="utf-8").splitlines()
    held_out = [json.loads(line)["prompt"] for line in lines][stage.data.limit :]
    prompts = [prompt for prompt in held_out for _ in range(options.samples)]
    before = own_model(stage.model, DEVICE)
    source = YesNo(config, config.judge.judge(before), read_prompt(config.prompt, PROMPTS, "yes_no.txt"))
    length = stage.trainer.args["max_completion_length"]
    with report(options) as results:
        measured, shown = {}, {}
        for name, path in (("before", stage.model.path), ("after", options.trained)):
            model = before if name == "before" else own_model(Pretrained(path=str(path)), DEVICE)
            ids = completions(model, prompts, length)
            measured[name] = measure(before, source, prompts, ids)
            shown[name] = before.tokenizer.batch_decode(ids, skip_special_tokens=True)
        rows = []
        for what, old in measured["before"].items():
            new = measured["after"][what]
            low, high = interval([b - a for a, b in zip(old, new, strict=True)], options.samples)
            difference = f"{low:+.3f} to {high:+.3f}"
            rows.append({"measure": what, "before": fmean(old), "after": fmean(new), "difference, 95 %": difference})
        distinct = {name: len(set(texts)) / len(texts) for name, texts in shown.items()}
        rows.append({"measure": "different completions", **distinct})
        print(f"{len(held_out)} held-out prompts, {options.samples} completions each")
        print_table("Before and after training", rows)
        alike = correlation(measured["before"]["P(yes)"], measured["before"]["VADER"])
        print(f"\ncorrelation of P(yes) with VADER, before training: {alike:.2f}")
        results |= {
            "measures": rows,
            "correlation": alike,
            "values": measured,
            "completions": shown,
            "prompts": prompts,
        }
        for name, texts in shown.items():
            print(f"\n{name}:")
            for prompt, text in list(zip(prompts, texts, strict=True))[:: 3 * options.samples]:
                print(f"  {prompt} | {' '.join(text.split())}")


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--recipe", type=Path, default=Path("recipes/zyn/yes-no-smollm2.yaml"))
    options.add_argument("--trained", type=Path, required=True, help="folder of the trained policy")
    options.add_argument("--samples", type=int, default=4, help="completions of each prompt")
    options.add_argument("override", nargs="*", help="overrides of the recipe, such as stages.ppo.model.path=FOLDER")
    main(options.parse_args())
