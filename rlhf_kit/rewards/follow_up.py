"""Follow-up likelihood: whether a user would rather go on with thanks or with a complaint."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, PositiveInt, StringConstraints, TypeAdapter, ValidationError

from rlhf_kit.config import Config, Location
from rlhf_kit.data.messages import completion_messages, content_text, dialogue_text, prompt_messages
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.problems import Problem, did_you_mean, listed
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rollout import RewardSource, Rollout, Text, TokenRewards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlhf_kit.models.in_process import InProcess
    from rlhf_kit.models.likelihood import Likelihood

logger = logging.getLogger(__name__)
FOLLOW_UPS = "follow_ups.json"
Utterance = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]
_MARK = "the user's next turn stands here 5d0f71"


class FollowUps(Config):
    """What a user might say next, after a good completion and after a bad one."""

    positive: Annotated[tuple[Utterance, ...], Field(min_length=1)]
    negative: Annotated[tuple[Utterance, ...], Field(min_length=1)]


class FollowUpConfig(SourceConfig):
    """`mean lp(f+ | x, y) - mean lp(f- | x, y)` over follow-up utterances f of a user (FLR, arXiv 2409.13948).

    lp is the log-probability of a token of f, on average, as the user's next turn after prompt and completion; the
    reward is the mean of that difference over the `aspects` (by default all) of the file `follow_ups` (by default the
    kit's). With `column` f is instead what the user of the data really said next: `lp(f | x, y) - lp(f | x, "")`, so
    that completions are rewarded after which it is to be expected. Whether it was praise or a complaint is not asked.
    `model` reads the conversations: one of its own, or the policy, whose initial weights are taken unless `frozen` is
    false.
    """

    type: Literal["follow_up"]
    model: Pretrained | None = None
    frozen: bool = True
    aspects: tuple[str, ...] | None = None
    follow_ups: Location | None = None
    column: str | None = None
    batch_size: PositiveInt = 32

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome"

    @property
    def columns(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        if self.model is not None and not self.frozen:
            yield Problem("frozen", "is about the policy, and another model reads", False, "remove frozen or model")
        if self.model is not None and self.model.peft is not None:
            yield Problem("model.peft", "is for models that are trained", remedy="remove it")
        if self.column is not None and (self.aspects is not None or self.follow_ups is not None):
            yield Problem("column", "takes the place of aspects and follow_ups", self.column, "remove one or the other")
        try:
            known = read_follow_ups(self.follow_ups)
        except (OSError, ValueError) as error:
            yield Problem("follow_ups", str(error), self.follow_ups)
            return
        for aspect in self.aspects or ():
            if aspect not in known:
                remedy = did_you_mean(aspect, known, f"there are {listed(known)}")
                yield Problem("aspects", "has an aspect that the file of follow-ups lacks", aspect, remedy)
        if self.aspects == ():
            yield Problem("aspects", "is empty, and nothing would be rewarded", remedy="remove it to take all")

    def files(self) -> Iterator[tuple[str, str, bool]]:
        if self.follow_ups is not None:
            yield "follow_ups", self.follow_ups, False
        if self.model is not None:
            yield "model.path", self.model.path, True

    def build(self, context: BuildContext) -> FollowUp:
        """The source; loads its model.

        Raises:
            ValueError: it is to read with the live policy, and ZeRO-3 divides that among the processes.
        """
        from rlhf_kit.models.in_process import own_model, policy_model

        model = policy_model(context, self.frozen) if self.model is None else own_model(self.model, context.device)
        return FollowUp(self, model)


class FollowUp(RewardSource):
    """Rewards a completion, on its last action token, by what the model expects its user to say next.

    A row whose conversation does not fit the model's positions is `FAILED`; one without a value in `column` is not
    applicable.
    """

    kind = "outcome"

    def __init__(self, config: FollowUpConfig, model: InProcess) -> None:
        self.name = config.source_name
        self._config = config
        self.model = model
        sets = read_follow_ups(config.follow_ups)
        self._sets = {aspect: sets[aspect] for aspect in config.aspects or sets}

    def score(self, rollout: Rollout) -> TokenRewards:
        """The difference of likelihoods of each completion.

        Raises:
            ValueError: the data has no such column.
        """
        from rlhf_kit.rewards.outcome import outcome_rewards

        if self._config.column is not None:
            return outcome_rewards(self._surprise(rollout, self._config.column), rollout)
        by_aspect = self.differences(list(zip(rollout.prompts, rollout.completions, strict=True)))
        scores = [math.nan if row is None else fmean(row.values()) for row in by_aspect]
        judged = [row for row in by_aspect if row is not None]
        metrics = {aspect: fmean(row[aspect] for row in judged) for aspect in self._sets} if judged else {}
        return replace(outcome_rewards(scores, rollout), metrics=metrics)

    def differences(self, dialogues: Sequence[tuple[Text, Text]]) -> list[dict[str, float] | None]:
        """For each prompt and completion `mean lp(f+) - mean lp(f-)` of every aspect; None where it does not fit."""
        texts = [text for sets in self._sets.values() for text in (*sets.positive, *sets.negative)]
        found: list[dict[str, float] | None] = []
        for likelihoods in self._likelihoods(dialogues, [texts] * len(dialogues)):
            if likelihoods is None:
                found.append(None)
                continue
            lp = dict(zip(texts, (likelihood.mean for likelihood in likelihoods), strict=True))
            found.append(
                {
                    aspect: fmean(lp[text] for text in sets.positive) - fmean(lp[text] for text in sets.negative)
                    for aspect, sets in self._sets.items()
                }
            )
        return found

    def _surprise(self, rollout: Rollout, column: str) -> list[float | None]:
        """`lp(f | x, y) - lp(f | x, "")` of each row's real next turn f."""
        if column not in rollout.columns:
            have = ", ".join(rollout.columns) or "none"
            raise ValueError(f"the data has no column {column!r} with the user's next turn (it has: {have})")
        turns = [_turn_text(value) for value in rollout.columns[column]]
        rows = [row for row, turn in enumerate(turns) if turn]
        real = [(rollout.prompts[row], rollout.completions[row]) for row in rows]
        empty = [
            (prompt, "" if isinstance(completion, str) else [{"role": "assistant", "content": ""}])
            for prompt, completion in real
        ]
        likelihoods = self._likelihoods([*real, *empty], [[turns[row]] for row in (*rows, *rows)])
        scores: list[float | None] = [None] * len(rollout)
        for place, row in enumerate(rows):
            after, before = likelihoods[place], likelihoods[place + len(rows)]
            scores[row] = math.nan if after is None or before is None else after[0].mean - before[0].mean
        return scores

    def _likelihoods(
        self, dialogues: Sequence[tuple[Text, Text]], turns: Sequence[Sequence[str]]
    ) -> list[list[Likelihood] | None]:
        """The likelihoods of each dialogue's possible next turns; None where one does not fit the model."""
        from rlhf_kit.models.likelihood import log_likelihoods

        tokenizer = self.model.tokenizer
        contexts = [context_ids(tokenizer, prompt, completion) for prompt, completion in dialogues]
        known: dict[str, list[int]] = {}
        for texts in turns:
            known |= {text: turn_ids(tokenizer, text) for text in texts if text not in known}
        continuations = [[known[text] for text in texts] for texts in turns]
        room = self.model.positions or math.inf
        fits = [row for row, context in enumerate(contexts) if len(context) + max(map(len, continuations[row])) <= room]
        if len(fits) < len(contexts):
            logger.warning(
                "follow-ups: %d of %d conversations do not fit the %s positions of the model",
                len(contexts) - len(fits),
                len(contexts),
                room,
            )
        with self.model.ready() as model:
            found = log_likelihoods(
                model, [contexts[row] for row in fits], [continuations[row] for row in fits], self._config.batch_size
            )
        by_row = dict(zip(fits, found, strict=True))
        return [by_row.get(row) for row in range(len(contexts))]


def context_ids(tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text) -> list[int]:
    """The conversation up to where the user's next turn begins.

    It is rendered by the chat template with a next turn that is cut off again; without a template as paragraphs
    `Role: content`.
    """
    from rlhf_kit.models.in_process import literal_messages

    template: Any = tokenizer
    messages = literal_messages(tokenizer, [*prompt_messages(prompt, None), *completion_messages(completion)])
    if template.chat_template is None:
        return list(template(f"{dialogue_text(messages)}\n\nUser:")["input_ids"])
    text = template.apply_chat_template([*messages, {"role": "user", "content": _MARK}], tokenize=False)
    return list(template(text[: text.rindex(_MARK)], add_special_tokens=False)["input_ids"])


def turn_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a user's turn, as it follows `context_ids`."""
    template: Any = tokenizer
    spaced = text if template.chat_template is not None else f" {text}"
    return list(template(spaced, add_special_tokens=False)["input_ids"])


def read_follow_ups(path: str | None) -> dict[str, FollowUps]:
    """The follow-up utterances of every aspect, of a file or of the kit.

    Raises:
        ValueError: the file does not hold `{aspect: {positive: [...], negative: [...]}}`.
    """
    source = files("rlhf_kit.rewards").joinpath(FOLLOW_UPS) if path is None else Path(path)
    try:
        return TypeAdapter(dict[str, FollowUps]).validate_python(json.loads(source.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, ValidationError) as error:
        raise ValueError(f"holds no JSON like {{aspect: {{positive: [...], negative: [...]}}}}: {error}") from error


def _turn_text(value: object) -> str:
    """What the user said: text, or a message's."""
    if isinstance(value, Mapping):
        return content_text(value)
    return value if isinstance(value, str) else ""
