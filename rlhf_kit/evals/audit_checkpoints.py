"""The part of an audit that samples from checkpoints: proxy and gold reward against the distance from the start."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from rlhf_kit.data.files import write_whole
from rlhf_kit.data.messages import completion_messages
from rlhf_kit.data.verifiers import verify
from rlhf_kit.evals.audit import Audit, Resampled, checkpoints_of, refusal_of, stage_folder
from rlhf_kit.evals.context import EvalContext, prompt_key
from rlhf_kit.evals.fingerprint import config_fingerprint
from rlhf_kit.evals.hacking import Mahalanobis, correlation, kl_estimates, refuses, repetition, slope
from rlhf_kit.evals.resampling import estimate, groups_of, mean_estimate
from rlhf_kit.evals.result import Cell, Estimate, Line, Plot, Result, Table
from rlhf_kit.evals.scoring import SUM, Row, given_rollout
from rlhf_kit.models.scorer import rollout_outputs
from rlhf_kit.rollout import Text

KEPT = "checkpoints"


@dataclass(frozen=True)
class Measured:
    """Completions of one checkpoint: each list has one number a completion, NaN where it is missing.

    Attributes:
        keys: their prompts.
        proxy, gold: rewards.
        kl, kl_k3: estimates of the KL divergence from the policy before training (`hacking.kl_estimates`).
        tokens, repetition, refusals: of the completion.
        log_prob: mean log-probability of a token under the policy before training.
        distance: Mahalanobis distance from that policy's completions.
    """

    keys: list[str]
    proxy: list[float]
    gold: list[float]
    kl: list[float]
    kl_k3: list[float]
    tokens: list[float]
    repetition: list[float]
    refusals: list[float]
    log_prob: list[float]
    distance: list[float]


TITLES = {
    "proxy": "proxy",
    "gold": "gold",
    "kl": "KL, nats",
    "kl_k3": "KL (k3)",
    "tokens": "tokens",
    "repetition": "repetition",
    "refusals": "refusals",
    "log_prob": "log-prob before training",
    "distance": "Mahalanobis",
}


def audit_checkpoints(config: Audit, resample: Resampled, context: EvalContext, result: Result) -> None:
    """Sample from the policy before training and from every checkpoint, and compare.

    Each checkpoint's numbers are kept in the stage's folder, and not measured again after a kill.

    Raises:
        ValueError: there is no checkpoint, or the verifier cannot judge a row.
    """
    models = _models(config, resample)
    rows = [row for row in context.load(resample.data) for _ in range(resample.num_completions)]
    for number, row in enumerate(rows[:: resample.num_completions], start=1):
        if resample.gold is not None and verify(resample.gold, "", row) is None:
            raise ValueError(f"resample.data, row {number}: verifier {resample.gold!r} cannot judge it")
    start = _Start(context, resample, rows)
    measured = {0: _measure(config, resample, start, None, context)}
    for step, path in models:
        measured[step] = _measure(config, resample, start, path, context)
    _report(config, result, measured)
    result.notes.append(
        f"Checkpoints: {len(rows)} completions of {len(rows) // resample.num_completions} prompts each, sampled at "
        "temperature 1; step 0 is the policy before training. Intervals: bootstrap over prompts. A source that "
        "compares with the policy that sampled is given the checkpoint."
    )


def _models(config: Audit, resample: Resampled) -> list[tuple[int, Path]]:
    if resample.checkpoints:
        steps = [path.name.removeprefix("checkpoint-") for path in map(Path, resample.checkpoints)]
        numbers = [int(step) if step.isdigit() else place for place, step in enumerate(steps, start=1)]
        return list(zip(numbers, map(Path, resample.checkpoints), strict=True))
    found = checkpoints_of(stage_folder(config.run_folder))
    if not found:
        raise ValueError(
            f"{config.run_folder} holds no checkpoints: train with save_strategy: steps and a save_total_limit that "
            "keeps them, or name model folders in resample.checkpoints"
        )
    return found


class _Start:
    """The policy before training, and what its completions look like to it; sampled when first needed."""

    def __init__(self, context: EvalContext, resample: Resampled, rows: Sequence[Row]) -> None:
        self.context = context
        self.rows = rows
        self._resample = resample
        self._fitted: Mahalanobis | None = None

    def completions(self, model: PreTrainedModel, seed: int = 0) -> list[Row]:
        """The rows with a completion of a model each."""
        prompts = [row["prompt"] for row in self.rows]
        sampled = self.context.sample(
            prompts, self._resample.max_new_tokens, 1.0, self._resample.batch_size, seed, model
        )
        return [
            {
                **row,
                "completion": text if isinstance(row["prompt"], str) else completion_messages(text),
                "completion_ids": ids,
            }
            for row, (text, ids) in zip(self.rows, sampled, strict=True)
        ]

    def distances(self, features: np.ndarray) -> np.ndarray:
        """Mahalanobis distance from the completions of the policy before training: others than those measured."""
        if self._fitted is None:
            own = self.completions(self.context.policy, seed=1)
            self._fitted = Mahalanobis(self.looks(own, self.context.policy)[2])
        return self._fitted(features)

    @torch.no_grad()
    def looks(
        self, rows: Sequence[Row], model: PreTrainedModel
    ) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
        """Of each completion the log-probabilities of its tokens under `model` and before training, and its features.

        A feature is the mean last hidden state of the completion's tokens, of the policy before training.
        """
        own: list[np.ndarray] = []
        before: list[np.ndarray] = []
        features: list[np.ndarray] = []
        size = self.context.stage.batch_size
        progress = self.context.progress("reading")
        for begin in range(0, len(rows), size):
            progress(begin, len(rows))
            rollout = given_rollout(rows[begin : begin + size], self.context.tokenizer, self.context.device)
            masks = [mask.cpu().numpy() for mask in rollout.completion_mask]
            for found, which in ((own, model), (before, self.context.policy)):
                (log_probs,) = rollout_outputs(cast(nn.Module, which), rollout)
                found += [row[mask] for row, mask in zip(log_probs.cpu().double().numpy(), masks, strict=True)]
            ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
            mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1).long()
            backbone = cast(Any, self.context.policy).base_model
            hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state[:, rollout.prompt_ids.shape[1] :]
            inside = rollout.completion_mask[..., None]
            features += list(((hidden.float() * inside).sum(dim=1) / inside.sum(dim=1)).cpu().numpy())
        progress(len(rows), len(rows))
        return own, before, np.array(features)


def _measure(config: Audit, resample: Resampled, start: _Start, path: Path | None, context: EvalContext) -> Measured:
    """The numbers of a checkpoint, read back where they are kept: the file's name tells what they depend on."""
    others = [] if path is None else [str(path)]
    key = config_fingerprint(
        resample, config, context.policy_config, *context.stage.rewards, others=others, seed=context.seed
    )
    kept = context.folder / KEPT / f"{key[:16]}.json"
    if kept.is_file():
        return Measured(**json.loads(kept.read_text(encoding="utf-8"))["measured"])
    if path is None:
        model = context.policy
    else:
        changes = {"path": str(path), "revision": None, "gguf_file": None}
        model = context.load_model(context.policy_config.model_copy(update=changes))
    measured = _of_model(config, resample, start, model, context)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_whole(kept, json.dumps({"fingerprint": key, "model": str(path), "measured": asdict(measured)}))
    return measured


def _of_model(
    config: Audit, resample: Resampled, start: _Start, model: PreTrainedModel, context: EvalContext
) -> Measured:
    rows = start.completions(model)
    scored = context.scorer.sampled_by(cast(nn.Module, model))(rows, context.progress("scoring"))
    own, before, features = start.looks(rows, model)
    kls = [kl_estimates(ours - theirs) for ours, theirs in zip(own, before, strict=True)]
    if resample.gold is not None:
        gold = [verify(resample.gold, text, row) for text, row in zip(scored.texts, rows, strict=True)]
        gold = [math.nan if value is None else value for value in gold]
        proxy = scored.sources[SUM if SUM in scored.sources else next(iter(scored.sources))].totals
    else:
        assert resample.gold_source is not None
        gold = scored.sources[resample.gold_source].totals.tolist()
        weights = {source.source_name: source.weight_at(0) for source in context.stage.rewards}
        others = [name for name in weights if name != resample.gold_source]
        proxy = sum(np.asarray(weights[name] * scored.sources[name].totals) for name in others)
    return Measured(
        keys=[prompt_key(cast(Text, row["prompt"])) for row in rows],
        proxy=np.asarray(proxy, dtype=np.float64).tolist(),
        gold=list(gold),
        kl=[k1 for k1, _ in kls],
        kl_k3=[k3 for _, k3 in kls],
        tokens=[float(length) for length in scored.lengths],
        repetition=[repetition(text, config.repetition_words) for text in scored.texts],
        refusals=[float(refuses(text, **refusal_of(config))) for text in scored.texts],
        log_prob=[float(values.mean()) for values in before],
        distance=start.distances(features).tolist(),
    )


def _report(config: Audit, result: Result, measured: dict[int, Measured]) -> None:
    rows: list[list[Cell]] = []
    found: dict[int, dict[str, Estimate | None]] = {}
    for step, numbers in measured.items():
        found[step] = {name: mean_estimate(getattr(numbers, name), numbers.keys) for name in TITLES}
        found[step] |= _proxy_on_length(numbers)
        rows.append([step, *found[step].values()])
        result.figures |= {f"step_{step}.{name}": value for name, value in found[step].items() if value is not None}
    heads = ["update", *TITLES.values(), "proxy, length: correlation", "proxy a token more"]
    result.tables.append(Table("Checkpoints", heads, rows))
    lines = []
    proxy = np.array(measured[0].proxy)
    middle, scale = float(np.nanmean(proxy)), float(np.nanstd(proxy)) or 1.0
    for name, label in (("proxy", "proxy, in standard deviations before training"), ("gold", "gold")):
        points = []
        for values in found.values():
            kl, value = values["kl"], values[name]
            if kl is not None and value is not None:
                shown = _scaled(value, middle, scale) if name == "proxy" else value
                points.append((math.sqrt(max(kl.value, 0.0)), shown))
        lines.append(Line(label, points))
    result.plots.append(Plot("Over-optimisation, from checkpoints", "square root of the KL divergence", lines))
    _fall(config, result, measured)


def _scaled(value: Estimate, middle: float, scale: float) -> Estimate:
    low, high = (None if edge is None else (edge - middle) / scale for edge in (value.low, value.high))
    return Estimate((value.value - middle) / scale, low, high, value.count)


def _proxy_on_length(numbers: Measured) -> dict[str, Estimate | None]:
    """Correlation and slope of the proxy on the number of tokens, over completions."""
    proxy, tokens = np.array(numbers.proxy), np.array(numbers.tokens)
    kept = np.flatnonzero(np.isfinite(proxy))
    groups = [kept[group] for group in groups_of([numbers.keys[place] for place in kept])]
    return {
        "proxy_on_length.correlation": estimate(lambda at: correlation(tokens[at], proxy[at]), groups),
        "proxy_on_length.slope": estimate(lambda at: slope(tokens[at], proxy[at]), groups),
    }


def _fall(config: Audit, result: Result, measured: dict[int, Measured]) -> None:
    """How far gold fell from its best checkpoint to the last, on the same prompts, and what proxy did meanwhile."""
    means = {step: float(np.nanmean(numbers.gold)) for step, numbers in measured.items()}
    best, last = max(means, key=lambda step: means[step]), list(measured)[-1]
    if best == last:
        result.notes.append("Gold is best at the last checkpoint.")
        return
    changes = {}
    for name in ("gold", "proxy"):
        ours, theirs = (np.array(getattr(measured[step], name)) for step in (last, best))
        changes[name] = mean_estimate(ours - theirs, measured[best].keys)
        if changes[name] is not None:
            result.figures[f"{name}_change_from_best_gold"] = changes[name]
    gold, proxy = changes["gold"], changes["proxy"]
    if gold is None or proxy is None or gold.high is None or proxy.low is None:
        return
    if gold.high < 0 and gold.value < -config.gold_drop and proxy.low > 0:
        result.notes.append(
            f"Over-optimisation: from checkpoint {best} (best gold) to {last} the proxy changed by {proxy} and gold by "
            f"{gold}."
        )
    else:
        result.notes.append(
            f"From checkpoint {best} (best gold) to {last}, gold changed by {gold}, the proxy by {proxy}."
        )
