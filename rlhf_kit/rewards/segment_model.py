"""Segment reward models: a trained classifier with a tokenizer of its own rewards the parts of a completion."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from rlhf_kit.config import Config, Location
from rlhf_kit.models.config import SEQUENCE_HEAD, TOKEN_HEAD, Pretrained, Scratch
from rlhf_kit.problems import Problem, did_you_mean, listed
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rewards.text import Judged, Segments, TextSource, TextSourceConfig
from rlhf_kit.rollout import Rollout, Span, Status, TokenRewards

if TYPE_CHECKING:
    from torch import Tensor

    from rlhf_kit.models.classifiers import Classifier

logger = logging.getLogger(__name__)

SEGMENT_RECORD = "segments.json"


class Normalization(Config):
    """`scale * (x - mean) / std + shift` of each segment's value x."""

    mean: float = 0.0
    std: PositiveFloat = 1.0
    scale: float = 1.0
    shift: float = 0.0

    def __call__(self, value: float) -> float:
        return self.scale * (value - self.mean) / self.std + self.shift


class SegmentModelConfig(TextSourceConfig):
    """Fine-grained rewards of one segment model; several are several sources (arXiv 2306.01693, section 2).

    A segment's value is `sum_l labels[l] * p_l`, p the model's probabilities (`output`: or its `labels`, 1 for those it
    gives and 0 for the others, or its `logits`), then normalised; it lies on the policy's tokens that overlap the
    segment, by `placement`. `segments` and `prompt_template` are those that the model was trained with, as its
    `segments.json` says, unless they are set; `by: token` are the model's own tokens. With `level: completion` the
    segments' rewards are summed (`per_segment: mean`: averaged) into one outcome on the last action token. A completion
    that the model is too short for has failed.
    """

    type: Literal["segment_model"]
    path: Location
    labels: Annotated[dict[str, float], Field(min_length=1)]
    output: Literal["probabilities", "labels", "logits"] = "probabilities"
    segments: Segments | None = None
    prompt_template: str | None = None
    normalization: Normalization = Normalization()
    level: Literal["segment", "completion"] = "segment"
    batch_size: PositiveInt = 32
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome" if self.level == "completion" else "process"

    def files(self) -> Iterator[tuple[str, str, bool]]:
        yield "path", self.path, True

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        if self.segments is not None:
            yield from (problem.under("segments") for problem in self.segments.problems())
        if self.prompt_template is not None and "{prompt}" not in self.prompt_template:
            remedy = "write {prompt} where it goes, or remove it"
            yield Problem("prompt_template", "does not say where the {prompt} goes", self.prompt_template, remedy)
        if self.level == "completion":
            yield from self.unused_problems("level: completion", "placement")
        folder = Path(self.path)
        if not (folder / "config.json").is_file():
            return  # of an earlier stage, or on the hub
        model = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        names = [str(name) for name in model.get("architectures") or ()]
        if names and not any(name.endswith((TOKEN_HEAD, SEQUENCE_HEAD)) for name in names):
            what = f"holds {listed(names)}, and a segment model has a token or sequence classification head"
            yield Problem("path", what, self.path, "train one with a stage of type segment")
            return
        if self.segments is None and not (folder / SEGMENT_RECORD).is_file():
            remedy = "write how it cuts, as in segments: {by: sentence}"
            yield Problem("segments", f"{self.path} has no {SEGMENT_RECORD} that says it", remedy=remedy)
        reads_sequences = any(name.endswith(SEQUENCE_HEAD) for name in names)
        if reads_sequences and self._cut_in(folder) == "token":
            remedy = "set segments, as in segments: {by: sentence}"
            yield Problem("segments.by", f"{self.path} classifies sequences, not tokens", "token", remedy)
        known = model.get("id2label") or {}
        for label in self.labels if known else ():
            if label not in known.values():
                remedy = did_you_mean(label, known.values(), f"it has {listed(known.values())}")
                yield Problem(f"labels.{label}", f"{self.path} has no such label", remedy=remedy)

    def _cut_in(self, folder: Path) -> str | None:
        """How texts are cut, as far as it is said here or beside the model."""
        if self.segments is not None:
            return self.segments.by
        if not (folder / SEGMENT_RECORD).is_file():
            return None
        return json.loads((folder / SEGMENT_RECORD).read_text(encoding="utf-8")).get("segments", {}).get("by")

    def build(self, context: BuildContext) -> SegmentModel:
        """The source, with its model on the policy's device."""
        from transformers import AutoTokenizer

        from rlhf_kit.models.classifiers import Classifier, load_classifier

        model = load_classifier(self.path, self.dtype, context.device)
        tokenizer = AutoTokenizer.from_pretrained(self.path)
        return SegmentModel(self, Classifier(model, tokenizer, self.batch_size), read_segment_record(self.path))


class SegmentModel(TextSource):
    """Rewards the segments of a completion by what a classifier says of each.

    Raises:
        RunError: the model has not the labels that are rewarded, nothing says how to cut, or it cannot judge tokens.
    """

    def __init__(
        self, config: SegmentModelConfig, classifier: Classifier, record: dict[str, Any] | None = None
    ) -> None:
        from rlhf_kit.errors import RunError

        super().__init__(config)
        self.kind = config.kind
        self._config = config
        self._classifier = classifier
        recorded = record or {}
        if config.segments is None and "segments" not in recorded:
            raise RunError(f"source '{self.name}': {config.path} has no {SEGMENT_RECORD}; set segments")
        self._segments = config.segments or Segments.model_validate(recorded["segments"])
        self._template = config.prompt_template or recorded.get("prompt_template")
        unknown = [label for label in config.labels if label not in classifier.classes]
        if unknown:
            raise RunError(
                f"source '{self.name}': {config.path} has no label {unknown[0]!r}, only {listed(classifier.classes)}"
            )
        if self._segments.by == "token" and classifier.reads_sequences:
            raise RunError(
                f"source '{self.name}': {config.path} classifies sequences and has no verdict on tokens; set "
                "segments, as in segments: {by: sentence}"
            )

    def judge(self, rollout: Rollout) -> Judged:
        """A span for every segment, with its normalised value."""
        from rlhf_kit.data.messages import prompt_text

        count = len(rollout)
        template = self._template
        prompts = [template.replace("{prompt}", prompt_text(p)) if template and p else "" for p in rollout.prompts]
        own = self._segments.by == "token"
        segments = [None if own else self._segments.ranges(rollout, row) for row in range(count)]
        found = self._classifier(prompts, list(rollout.texts), segments)
        too_long = found.count(None)
        if too_long:
            logger.warning(
                "source '%s': %d of %d completions are longer, with their prompts, than the %d tokens that its model "
                "reads, and count as failed",
                *(self.name, too_long, count, self._classifier.longest),
            )
        rows: list[Sequence[Span] | Status] = []
        for verdict in found:
            if verdict is None:
                rows.append(Status.FAILED)
                continue
            values = self._values(verdict[1])
            pairs = zip(verdict[0], values, strict=True)
            rows.append([Span(start, end, self._config.normalization(x), self.name) for (start, end), x in pairs])
        return Judged(rows, self._metrics([verdict[1] for verdict in found if verdict is not None]))

    def score(self, rollout: Rollout) -> TokenRewards:
        """The segments' rewards on their tokens, or their sum or mean on the last action token."""
        if self._config.level == "segment":
            return super().score(rollout)
        from dataclasses import replace

        from rlhf_kit.credit.spans import spans_on_actions
        from rlhf_kit.rewards.outcome import outcome_rewards

        judged = self.judge(rollout)
        spans = [[] if isinstance(row, Status) else list(row) for row in judged.rows]
        kept = spans_on_actions(spans, rollout.offsets, rollout.action_mask)
        sums = [sum(span.reward for span in row) for row in kept]
        if self._per_segment == "mean":
            sums = [total / max(len(row), 1) for total, row in zip(sums, kept, strict=True)]
        pairs = zip(judged.rows, sums, strict=True)
        scores = [float("nan") if isinstance(row, Status) else total for row, total in pairs]
        return replace(outcome_rewards(scores, rollout), metrics=judged.metrics)

    def _values(self, logits: Tensor) -> list[float]:
        """`sum_l labels[l] * p_l` of each segment."""
        import torch

        weights = torch.tensor([self._config.labels.get(name, 0.0) for name in self._classifier.classes])
        if self._config.output == "logits":
            return (logits @ weights).tolist()
        if self._config.output == "labels":
            return (self._given(logits).float() @ weights).tolist()
        return (self._classifier.probabilities(logits) @ weights).tolist()

    def _given(self, logits: Tensor) -> Tensor:
        """Which labels each segment gets, (S, K): the likeliest, or all above one half where several can hold."""
        import torch

        if self._classifier.multi_label:
            return logits > 0
        return torch.nn.functional.one_hot(logits.argmax(dim=-1), logits.shape[-1]).bool()

    def _metrics(self, logits: Sequence[Tensor]) -> dict[str, float]:
        """Segments a completion, and the share of segments and of completions that get each rewarded label."""
        if not logits:
            return {}
        given = [self._given(row) for row in logits]
        total = sum(len(row) for row in given)
        metrics = {"segments": total / len(given)}
        for place, name in enumerate(self._classifier.classes):
            if name in self._config.labels:
                marked = [int(row[:, place].sum()) for row in given]
                metrics[f"rate/{name}"] = sum(marked) / max(total, 1)
                metrics[f"completions/{name}"] = sum(count > 0 for count in marked) / len(given)
        return metrics


def read_segment_record(path: str) -> dict[str, Any] | None:
    """What a `segment` stage wrote beside its model, in a folder or on the hub: how to cut, and the prompt's form."""
    from transformers.utils.hub import cached_file

    found = cached_file(path, SEGMENT_RECORD, _raise_exceptions_for_missing_entries=False)
    return json.loads(Path(found).read_text(encoding="utf-8")) if found is not None else None
