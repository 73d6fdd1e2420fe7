"""Return decomposition: rewards of segments, learnt online so that their sum predicts the completion's score."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, cast

from pydantic import PositiveFloat, PositiveInt

from rlhf_kit.config import Config
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.config import BuildContext, Learning, SourceConfig, SourceName
from rlhf_kit.rewards.text import Judged, Segments, TextSource, TextSourceConfig
from rlhf_kit.rollout import CharRange, Rollout, Span

if TYPE_CHECKING:
    from torch import Tensor, nn

    from rlhf_kit.models.critic import ValueHead


class LocalSignal(Config):
    """Shapes the decomposition: what the source named `source` gave to a segment, before its weight, is a target too.

    Write that source before this one; with `weight: 0` there it shapes without rewarding anything itself.
    """

    source: SourceName
    weight: PositiveFloat = 1.0


class DecomposedConfig(TextSourceConfig):
    """Segment rewards whose sum predicts the outcome (GELI, arXiv 2403.11330).

    Learns by `((L / K) * sum of K sampled rewards - outcome)^2`, K being `sampled` (all of the L segments without it),
    plus `local.weight` times the mean squared distance from the local signal. The rewards are a linear function of the
    last hidden state at each segment's end, in a model that starts as the policy; with `body: frozen` the function
    alone learns. Departure: the paper fits recorded sessions once; here the scores are the outcomes of each rollout.
    """

    type: Literal["decomposed"]
    segments: Segments
    sampled: PositiveInt | None = None
    local: LocalSignal | None = None
    body: Literal["trained", "frozen"] = "trained"
    online: Learning = Learning(learning_rate=1e-5)

    @property
    def learning(self) -> Learning:
        return self.online

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        yield from (problem.under("segments") for problem in self.segments.problems())
        if self.segments.by == "completion":
            remedy = "write turn, step, sentence, subsentence or token"
            yield Problem("segments.by", "leaves one segment, and nothing to decompose", "completion", remedy)
        if isinstance(policy, Scratch):
            remedy = "train it by an sft stage first, and write model.path: ${stages.sft.model}"
            yield Problem("", "a decomposed reward needs a policy with weights to start from", remedy=remedy)
        if not any(source.labels_outcomes for source in rewards):
            remedy = "add a verifier, or a function with bounded: true, to rewards"
            yield Problem("online", "its rewards are learnt from outcomes, and no source gives them", remedy=remedy)
        yield from self._local_problems(rewards)

    def _local_problems(self, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        if self.local is None:
            return
        names = [source.source_name for source in rewards]
        own = names.index(self.source_name) if self.source_name in names else len(names)
        found = names.index(self.local.source) if self.local.source in names else None
        if found is None or found == own:
            others = ", ".join(names[:own] + names[own + 1 :]) or "none"
            yield Problem("local.source", "is no other source", self.local.source, f"name one of: {others}")
        elif rewards[found].kind == "outcome":
            what = "judges whole completions, and a local signal judges their segments"
            yield Problem("local.source", what, self.local.source, "name a process source")
        elif found > own:
            remedy = f"write rewards.{found} before {self.source_name}"
            yield Problem("local.source", "has not scored when this one learns", self.local.source, remedy)

    def build(self, context: BuildContext) -> Decomposed:
        """The source; its rewards are 0 until it has learnt."""
        from rlhf_kit.models.critic import ValueHead

        body = _body(self, context)
        width = cast(Any, body.module).config.get_text_config().hidden_size
        return Decomposed(self, body, ValueHead(width).to(context.device).requires_grad_(False))


class Body:
    """A transformer that reads completions: `module`, run by calling `model`, whose weights are `activate`'s.

    Args:
        module: gives the hidden states.
        model: what is called: `module` itself, or the model that it is a part of.
        parameters: what it may train.
        activate: context in which `model` has the right adapter.
        options: further arguments of `model`.
    """

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        activate: Callable[[], AbstractContextManager[None]] = nullcontext,
        **options: Any,
    ) -> None:
        self.module = module
        self.parameters = list(parameters)
        self._model = model
        self._activate = activate
        self._options = options

    def __call__(self, rollout: Rollout) -> Tensor:
        """The last hidden state (B, T, H) of every completion token, itself read."""
        import torch

        input_ids = torch.cat([rollout.prompt_ids, rollout.completion_ids], dim=1)
        attention_mask = torch.cat([rollout.prompt_mask, rollout.completion_mask], dim=1).long()
        found: list[Tensor] = []
        hook = self.module.register_forward_hook(lambda _module, _args, output: found.append(output.last_hidden_state))
        try:
            with self._activate():
                self._model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **self._options)
        finally:
            hook.remove()
        return found[0][:, rollout.prompt_ids.shape[1] :]


class Decomposed(TextSource):
    """Rewards segments by a learnt function of what was read up to their ends.

    A completion without segments is the empty sum: it earns 0, and teaches nothing.
    """

    def __init__(self, config: DecomposedConfig, body: Body, head: ValueHead) -> None:
        super().__init__(config)
        self.reads_rewards = config.local is not None
        self.config = config
        self.body = body
        self.head = head

    def judge(self, rollout: Rollout) -> Judged:
        """One span a segment that the policy wrote."""
        import torch

        segments = self._segments(rollout)
        with torch.no_grad():
            rewards, present = self._rewards(rollout, segments)
        rows = [
            [
                Span(start, end, reward, self.name)
                for (start, end), reward, there in zip(parts, values, written, strict=False)
                if there
            ]
            for parts, values, written in zip(segments, rewards.tolist(), present.tolist(), strict=True)
        ]
        return Judged(rows, {"segments": sum(map(len, rows)) / len(rows)})

    def loss(self, rollout: Rollout, outcomes: Tensor) -> Tensor:
        """Squared error of a row's summed rewards against its outcome, and of each against the local signal, (B,)."""
        from rlhf_kit.credit.decomposition import decomposition_loss, local_loss

        segments = self._segments(rollout)
        rewards, present = self._rewards(rollout, segments)
        sampled = None if self.config.sampled is None else sample_segments(rollout, present, self.config.sampled)
        losses = decomposition_loss(rewards, present, outcomes, sampled)
        if self.config.local is None:
            return losses
        local = segment_sums(rollout.rewards[self.config.local.source], rollout, segments)
        return losses + self.config.local.weight * local_loss(rewards, local, present)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [*self.body.parameters, *self.head.parameters()]

    def _segments(self, rollout: Rollout) -> list[list[CharRange]]:
        return [self.config.segments.ranges(rollout, row) for row in range(len(rollout))]

    def _rewards(self, rollout: Rollout, segments: Sequence[Sequence[CharRange]]) -> tuple[Tensor, Tensor]:
        """Rewards (B, S) of the segments, 0 where there is none, and which there are."""
        import torch

        from rlhf_kit.credit.decomposition import segment_ends

        ends = segment_ends(segments, rollout.offsets, rollout.action_mask)
        parts = []
        for start in range(0, len(rollout), rollout.micro_batch_size):
            hidden = self.body(rollout.rows(start, start + rollout.micro_batch_size))
            places = ends[start : start + len(hidden)].clamp(min=0)[:, :, None].expand(-1, -1, hidden.shape[-1])
            parts.append(self.head(hidden.gather(1, places)))
        return torch.where(ends >= 0, torch.cat(parts), 0.0), ends >= 0


def sample_segments(rollout: Rollout, present: Tensor, count: int) -> Tensor:
    """`count` of the segments (B, S) of each row, or all where it has fewer, drawn without replacement.

    The draw follows from the step and the row's tokens alone: it is the same on any number of processes, and in a run
    that was stopped and resumed.
    """
    import torch

    chosen = torch.zeros_like(present)
    for row, there in enumerate(present):
        places = there.nonzero().flatten().tolist()
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row]].tolist()
        completion = rollout.completion_ids[row][rollout.completion_mask[row]].tolist()
        draw = random.Random(f"{rollout.step} {prompt} {completion}")
        chosen[row, draw.sample(places, min(count, len(places)))] = True
    return chosen


def segment_sums(tokens: Tensor, rollout: Rollout, segments: Sequence[Sequence[CharRange]]) -> Tensor:
    """Sum of token rewards (B, T) over each segment and what follows it, (B, S); a row that holds NaN has only NaN."""
    from rlhf_kit.credit import sum_by_step
    from rlhf_kit.credit.decomposition import adjoining
    from rlhf_kit.credit.spans import step_ids

    lengths = [max((end for _, end in offsets), default=0) for offsets in rollout.offsets]
    covers = [adjoining(parts, length) for parts, length in zip(segments, lengths, strict=True)]
    count = max(map(len, segments), default=0)
    sums = sum_by_step(tokens, step_ids(rollout.offsets, covers, rollout.action_mask), max(count, 1))[:, :count]
    return sums.masked_fill(tokens.isnan().any(dim=1, keepdim=True), float("nan"))


def _body(config: DecomposedConfig, context: BuildContext) -> Body:
    """The policy's base with an adapter of its own (none where it is frozen), or else a model of its own."""
    from peft import PeftModel
    from trl.trainer.utils import disable_dropout_in_model

    from rlhf_kit.models.adapters import active_adapter, adapter_parameters, add_adapter_copy
    from rlhf_kit.models.loading import load_copy

    policy, trained = context.policy, config.body == "trained"
    if isinstance(policy, PeftModel):
        name = config.source_name if trained else None
        if name is not None:
            add_adapter_copy(policy, name)
        parameters = adapter_parameters(policy, name) if name is not None else []
        module = cast(Any, policy.get_base_model()).base_model
        return Body(module, policy, parameters, partial(active_adapter, policy, name), logits_to_keep=1)
    if not isinstance(context.policy_config, Pretrained):
        raise ValueError("a decomposed reward starts from the policy's weights; train it by an sft stage first")
    changes = {"dtype": "float32"} if trained else {}  # small steps are lost in narrower weights
    module = cast(Any, load_copy(context.policy_config.model_copy(update=changes))).base_model.to(context.device)
    disable_dropout_in_model(module)
    return Body(module, module, list(module.parameters()) if trained else [])
