"""What a recipe's rewards say of completions that are sampled afresh, before training and after.

A reward that is logged while a policy trains is that of another batch of prompts at every update, and of a policy that
moves. Here every model completes the same prompts, `--samples` times each, as the recipe's `ppo` stage samples
(temperature, longest completion, precision), and the stage's reward sources score the completions: the sum over the
tokens, before `normalize` and `weight`. Prompts are those of the stage's `eval_data` or, without it, of its `data`,
which the policy was trained on. The first arm, `start`, is the model that the stage starts from; it is also the policy
that sources ask, frozen or not. Intervals are bootstrapped over prompts, those of the differences over prompts in
pairs. A completion that a source failed to judge is left out of its mean; the share of them is in the table.

    python benchmarks/fresh_completions.py recipes/flr/oasst.yaml --models after=runs/follow-up-oasst/ppo/model

The arguments behind the recipe are overrides, as for training; other prompts and sources than those of the training:

    ... RECIPE 'stages.ppo.rewards=[{type: lexical, measure: {type: sentiment}}]' stages.ppo.data.path=FILE --models ...
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from common import parser, print_table, quieten, report
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.grpo_config import GRPOConfig

from rlhf_kit.data.load import load_data
from rlhf_kit.data.messages import is_messages
from rlhf_kit.evals.steps import Interval, bootstrap_interval
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.generation import encode_prompts, generate_ids
from rlhf_kit.models.loading import load_copy, load_tokenizer
from rlhf_kit.models.stopping import generate_until
from rlhf_kit.recipe import load_recipe
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rollout import Rollout, Status
from rlhf_kit.trainers.config import Ppo
from rlhf_kit.trainers.rollouts import Ranks, build_rollout, decoded
from rlhf_kit.trainers.run_ppo import ppo_args
from rlhf_kit.trainers.scoring import Scoring
from rlhf_kit.trainers.setup import StageRun

Values = dict[str, np.ndarray]  # by measure, (prompts, samples); NaN where a source failed


def ppo_stage_of(recipe: Path, overrides: Sequence[str], name: str | None) -> Ppo:
    """The recipe's `ppo` stage, or the one of that name.

    Raises:
        SystemExit: there is none, or it cannot be sampled and scored outside its trainer.
    """
    stages = load_recipe(recipe, overrides).stages
    found = {key: stage for key, stage in stages.items() if isinstance(stage, Ppo) and name in (None, key)}
    if len(found) != 1:
        raise SystemExit(f"{recipe}: one ppo stage is measured, and --stage {name} leaves {sorted(found) or 'none'}")
    (stage,) = found.values()
    if stage.tools:
        raise SystemExit("tools are not called here: the completions would not be those of the trained policy")
    return stage


def chosen(rewards: Sequence[SourceConfig], names: Sequence[str] | None) -> list[SourceConfig]:
    """The sources that score, of all those of the recipe.

    Raises:
        SystemExit: a name is none of theirs, or a source learns from rollouts.
    """
    known = [source.source_name for source in rewards]
    if unknown := set(names or ()) - set(known):
        raise SystemExit(f"--sources: the recipe has no {sorted(unknown)}; it has {known}")
    kept = [source for source in rewards if names is None or source.source_name in names]
    if learning := [source.source_name for source in kept if source.learning is not None]:
        raise SystemExit(f"{learning} learn while the policy trains: leave them out with --sources")
    return kept


class Measuring:
    """Samples from models and scores, all with the same settings and sources."""

    def __init__(self, stage: Ppo, args: GRPOConfig, sources: Sequence[SourceConfig], options: argparse.Namespace):
        self.stage, self.args, self.options = stage, args, options
        self.accelerator = Accelerator(mixed_precision="bf16" if args.bf16 else "fp16" if args.fp16 else "no")
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(stage.model)
        self.start = self._on_device(stage.model)
        device = self.accelerator.device
        context = BuildContext(self.start, stage.model, args.temperature, device, {}, self.tokenizer)
        built = [source.build(context) for source in sources]
        if needy := [source.name for source in built if source.needs]:
            raise SystemExit(f"{needy} read log-probabilities of the trainer's models: leave them out with --sources")
        self.scoring = Scoring(sources, built, None, Ranks(self.accelerator))

    def model(self, folder: Path) -> PreTrainedModel:
        """A trained policy, its adapter merged."""
        return self._on_device(Pretrained(path=str(folder), dtype=getattr(self.stage.model, "dtype", "float32")))

    def _on_device(self, config: Any) -> PreTrainedModel:
        return cast(Any, load_copy(config)).to(self.accelerator.device)

    def sampled(self, model: PreTrainedModel, rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
        """One completion a row."""
        policy: Any = model
        plain = policy.generate
        if self.stage.stop_strings:
            policy.generate = partial(generate_until, plain, self.tokenizer, self.stage.stop_strings)
        torch.manual_seed(self.options.seed)
        with self.accelerator.autocast():
            ids = generate_ids(
                model,
                self.tokenizer,
                [row["prompt"] for row in rows],
                max_new_tokens=cast(int, self.args.max_completion_length),
                temperature=self.args.temperature,
                batch_size=self.options.batch_size,
            )
        policy.generate = plain
        return ids

    @torch.no_grad()
    def scored(self, rows: Sequence[Mapping[str, Any]], ids: Sequence[list[int]]) -> tuple[Values, list[str]]:
        """What every source gives to each completion, how many words it has, and its text."""
        rollout = self._rollout(rows, ids)
        self.scoring.begin(rollout)
        with self.accelerator.autocast():
            scores = self.scoring.score_outcomes(rollout)
            self.scoring.learn_and_score(rollout, scores)
        values = {}
        for name, rewards in scores.rewards.items():
            sums = torch.where(rewards.status == Status.OK, rewards.tokens.sum(dim=1), torch.nan)
            values[name] = sums.double().cpu().numpy()
        values["words"] = np.array([float(len(text.split())) for text in rollout.texts])
        return {name: own.reshape(-1, self.options.samples) for name, own in values.items()}, list(rollout.texts)

    def _rollout(self, rows: Sequence[Mapping[str, Any]], ids: Sequence[list[int]]) -> Rollout:
        """The completions as the trainer would hand them to the sources."""
        prompts = [row["prompt"] for row in rows]
        texts = self.tokenizer.batch_decode(list(ids), skip_special_tokens=True)
        completions = [
            text if not is_messages(prompt) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        encoded = encode_prompts(self.tokenizer, prompts)
        width = max(1, *map(len, ids))
        padding = self.tokenizer.pad_token_id
        batch = {
            "prompt_ids": encoded["input_ids"],
            "prompt_mask": encoded["attention_mask"],
            "completion_ids": torch.tensor([[*row, *[padding] * (width - len(row))] for row in ids]),
            "completion_mask": torch.tensor([[place < len(row) for place in range(width)] for row in ids]),
        }
        rollout = build_rollout(
            {name: tensor.to(self.accelerator.device) for name, tensor in batch.items()},
            [dict(row) for row in rows],
            prompts,
            completions,
            temperature=self.args.temperature,
            group_size=self.options.samples,
            micro_batch_size=self.args.per_device_train_batch_size,
            step=0,
        )
        return decoded(self.tokenizer, rollout)


def mean_with_interval(values: np.ndarray, base: np.ndarray | None = None) -> tuple[float, Interval | None]:
    """The mean over prompts and samples, or that less the mean of `base`, and its 95 % interval over prompts."""

    def mean(rows: np.ndarray) -> float | None:
        own = [part[rows][~np.isnan(part[rows])] for part in (values, base) if part is not None]
        if not all(map(len, own)):
            return None
        return float(own[0].mean() - (own[1].mean() if len(own) > 1 else 0.0))

    value = mean(np.arange(len(values)))
    return (float("nan") if value is None else value), bootstrap_interval(mean, len(values))


def table(measured: Mapping[str, Values]) -> list[dict[str, Any]]:
    """A row a measure and arm, with the difference from the first arm."""
    first, rows = next(iter(measured.values())), []
    for name in first:
        for arm, values in measured.items():
            mean, interval = mean_with_interval(values[name])
            row = {"measure": name, "arm": arm, "mean": f"{mean:.3f}", "95 %": _shown(interval)}
            if values is not first:
                difference, interval = mean_with_interval(values[name], first[name])
                row |= {"less the first": f"{difference:+.3f}", "95 % of it": _shown(interval, "+")}
            rows.append({**row, "failed": f"{np.isnan(values[name]).mean():.1%}"})
    head = ("measure", "arm", "mean", "95 %", "less the first", "95 % of it", "failed")
    return [{key: row.get(key, "") for key in head} for row in rows]


def _shown(interval: Interval | None, sign: str = "") -> str:
    return "" if interval is None else f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"


def main(options: argparse.Namespace) -> None:
    quieten()
    arms = dict(given.split("=", 1) if "=" in given else (given, given) for given in options.models)
    if missing := [folder for folder in arms.values() if not Path(folder).is_dir()]:
        raise SystemExit(f"--models: there is no folder {missing}")
    stage = ppo_stage_of(options.recipe, options.overrides, options.stage)
    sources = chosen(stage.rewards, options.sources)
    data = load_data(stage.eval_data or stage.data).to_list()[: options.limit]
    rows = [row for row in data for _ in range(options.samples)]
    with tempfile.TemporaryDirectory() as folder:
        measuring = Measuring(stage, ppo_args(stage, StageRun(Path(folder))), sources, options)
    with report(options) as results:
        measured, results["completions"] = {}, {}
        for arm, path in {"start": None, **arms}.items():
            model = measuring.start if path is None else measuring.model(Path(path))
            ids = measuring.sampled(model, rows)
            measured[arm], texts = measuring.scored(rows, ids)
            results["completions"][arm] = texts
            print(f"{arm}: {len(texts)} completions of {len(data)} prompts, {len(set(texts))} different", flush=True)
            for row, text in list(zip(rows, texts, strict=True))[:: options.samples][:3]:
                print(f"  {str(row['prompt'])[-80:]!r} | {' '.join(text.split())!r}")
        results["values"] = {arm: {k: v.tolist() for k, v in values.items()} for arm, values in measured.items()}
        results["measures"] = table(measured)
        print_table("Completions sampled afresh", results["measures"])


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("recipe", type=Path)
    options.add_argument("overrides", nargs="*", help="overrides of the recipe")
    options.add_argument("--models", nargs="*", default=[], help="trained policies, NAME=FOLDER each")
    options.add_argument("--stage", help="the ppo stage, if the recipe has several")
    options.add_argument("--sources", nargs="+", help="names of the sources that score; all, if it is not given")
    options.add_argument("--samples", type=int, default=4, help="completions of each prompt")
    options.add_argument("--limit", type=int, help="only the first prompts")
    options.add_argument("--batch-size", type=int, default=60)
    options.add_argument("--seed", type=int, default=1)
    main(options.parse_args())
