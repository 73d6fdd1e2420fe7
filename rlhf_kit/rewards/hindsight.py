"""Hindsight: consequences of a completion are simulated first, and then its user is asked (RLHS, arXiv 2501.08617).

Feedback that is given at once rewards what looks good. Here a simulated user reads the dialogue, decides, is shown what
comes of the decision (`rlhf_kit.rewards.simulated_user`), and only then rates the completion or prefers another to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from rlhf_kit.config import Config, Location
from rlhf_kit.judges.base import Judge
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.judges.prompts import fill, read_prompt
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.asking import PROMPTS
from rlhf_kit.rewards.config import BuildContext, SourceConfig
from rlhf_kit.rollout import RewardSource, Rollout, Text, TokenRewards

if TYPE_CHECKING:
    from rlhf_kit.rewards.simulated_user import Lived, Scene, User

MOST_DECISIONS = 26


class HindsightPrompts(Config):
    """Files in the place of the source's own prompts.

    They hold `{{dialogue}}` and `{{decisions}}` (decision), `{{dialogue}}` and `{{decision}}` (outcome), the same and
    `{{outcome}}` (rating), `{{first}}` and `{{second}}` (preference).
    """

    decision: Location | None = None
    outcome: Location | None = None
    rating: Location | None = None
    preference: Location | None = None


class HindsightConfig(SourceConfig):
    """Feedback of a simulated user in the light of what came of it, scaled to [-1, 1], on the last action token.

    `mode` says what the user knows by then: `none` (immediate feedback), `partial` (the outcome of its own decision)
    or `oracle` (that of every decision it could have taken). A `rating` from 1 to 5 is scaled to `(rating - 3) / 2`; a
    `preference` is `2 P(preferred) - 1`, the mean over the other completions of the same prompt on this process.
    `judge` is the user: the marketplace's `rule`, or a language model. `world` says what comes of a decision: the
    marketplace's truth (`rule`), the `judge` itself, or another model, as in the paper the policy. Users other than the
    rule's may meet any dialogue: their choices are the row's column `options`, or else `decisions`.
    """

    type: Literal["hindsight"]
    mode: Literal["none", "partial", "oracle"] = "partial"
    feedback: Literal["rating", "preference"] = "rating"
    judge: Literal["rule"] | JudgeConfig = "rule"
    world: Literal["rule", "judge"] | JudgeConfig = "rule"
    decisions: Annotated[tuple[str, ...], Field(max_length=MOST_DECISIONS)] = ()
    prompts: HindsightPrompts = HindsightPrompts()

    @property
    def kind(self) -> Literal["outcome", "process"]:
        return "outcome"

    @property
    def columns(self) -> tuple[str, ...]:
        from rlhf_kit.data.marketplace import Market

        return tuple(Market.__dataclass_fields__) if self.judge == "rule" else ()

    def problems(self, policy: Pretrained | Scratch, rewards: Sequence[SourceConfig]) -> Iterator[Problem]:
        if self.judge == "rule" and self.world != "rule":
            what = "is asked by nobody: the rule-based customer is shown the marketplace's truth"
            yield Problem("world", what, remedy="write world: rule, or name a judge")
        if len(self.decisions) == 1 or len(set(self.decisions)) < len(self.decisions):
            yield Problem("decisions", "are two different things at least", self.decisions, "name what the user may do")
        for name in ("judge", "world"):
            check = getattr(getattr(self, name), "problems", None)
            if check is not None:
                yield from (problem.under(name) for problem in check())
        yield from self._prompt_problems()

    def _prompt_problems(self) -> Iterator[Problem]:
        from rlhf_kit.rewards.simulated_user import PLACEHOLDERS

        for name, path in self.prompts:
            if path is None:
                continue
            try:
                fill(read_prompt(path, PROMPTS, ""), **dict.fromkeys(PLACEHOLDERS[name], ""))
            except (OSError, ValueError) as error:
                yield Problem(f"prompts.{name}", str(error), path)

    def files(self) -> Iterator[tuple[str, str, bool]]:
        for name, path in self.prompts:
            if path is not None:
                yield f"prompts.{name}", path, False
        for name in ("judge", "world"):
            config = getattr(self, name)
            if not isinstance(config, str):
                yield from ((f"{name}.{field}", value, is_model) for field, value, is_model in config.files())

    def build(self, context: BuildContext) -> Hindsight:
        return Hindsight(self, self.user(context))

    def user(self, context: BuildContext) -> User:
        """The simulated user; loads the models of judge and world.

        Raises:
            ValueError: the first token of an answer of a judge in this process does not tell the answers apart.
        """
        from rlhf_kit.rewards.simulated_user import PLACEHOLDERS, RATINGS, JudgeUser, RuleUser

        if self.judge == "rule":
            return RuleUser()
        judge = self.judge.build(context)
        judge.check_choices(("A", "B"))  # how many decisions there are is known by the data alone
        if self.feedback == "rating":
            judge.check_choices(RATINGS)
        if self.world == "judge":
            world = judge
        else:
            world = None if self.world == "rule" else self.world.build(context)
        own = dict(self.prompts)
        prompts = {name: read_prompt(own[name], PROMPTS, f"hindsight_{name}.txt") for name in PLACEHOLDERS}
        return JudgeUser(judge, world, prompts)


class Hindsight(RewardSource):
    """Gives each completion the feedback of a user who has lived through what came of it.

    A row whose user, world or feedback failed is `FAILED`. A row without decisions (neither of the marketplace nor with
    `options`), without a text, or without another completion to be preferred to, is not applicable; so is any other
    than the marketplace's where its rule is the user or the world is needed.
    """

    kind = "outcome"

    def __init__(self, config: HindsightConfig, user: User) -> None:
        self.name = config.source_name
        self._config = config
        self._user = user
        self._begun: tuple[Sequence[Text], Callable[[], dict[int, Lived | None]]] | None = None

    def judges(self) -> Mapping[str, Judge]:
        return self._user.judges()

    def begin(self, rollout: Rollout) -> None:
        """Ask for the decisions, which a server can take while models score."""
        try:
            self._begun = (rollout.completions, self._live(rollout))
        except Exception:  # it is raised again by `score`, where the ranks agree on it
            self._begun = None

    def score(self, rollout: Rollout) -> TokenRewards:
        """The feedback on the last action token."""
        from rlhf_kit.rewards.outcome import outcome_rewards

        begun, self._begun = self._begun, None
        finish = begun[1] if begun is not None and begun[0] is rollout.completions else self._live(rollout)
        lived = finish()
        whole = {row: one for row, one in lived.items() if one is not None}
        preferring = self._config.feedback == "preference"
        scores = self._preferences(rollout, whole) if preferring else self._ratings(whole)
        failed = {row: float("nan") for row, one in lived.items() if one is None}
        values = {**scores, **failed}
        rewards = outcome_rewards([values.get(row) for row in range(len(rollout))], rollout)
        return replace(rewards, metrics=self._metrics(whole, scores))

    def _live(self, rollout: Rollout) -> Callable[[], dict[int, Lived | None]]:
        """Begin to let the users of the rows that have any decide; gives what they have lived through."""
        scenes = {row: scene for row in range(len(rollout)) if (scene := self._scene(rollout, row)) is not None}
        finish = self._user.live(list(scenes.values()), self._config.mode)
        return lambda: dict(zip(scenes, finish(), strict=True))

    def _scene(self, rollout: Rollout, row: int) -> Scene | None:
        from rlhf_kit.data.marketplace import market_of
        from rlhf_kit.data.messages import completion_text
        from rlhf_kit.rewards.simulated_user import Scene, market_scene

        completion = completion_text(rollout.completions[row])
        columns = {name: values[row] for name, values in rollout.columns.items()}
        market = market_of(columns)
        if market is not None:
            return market_scene(rollout.prompts[row], completion, market)
        decisions = tuple(self._options(columns.get("options"), row) or self._config.decisions)
        needs_truth = self._config.judge == "rule" or (self._config.world == "rule" and self._config.mode != "none")
        if needs_truth or not 2 <= len(decisions) <= MOST_DECISIONS:
            return None
        return Scene(rollout.prompts[row], completion, decisions)

    def _options(self, options: object, row: int) -> list[str]:
        if options is None:
            return []
        if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
            raise ValueError(
                f"'{self.name}' reads what the user may do from the column 'options', and row {row + 1} of the rollout "
                f"holds {options!r} there: give a list of texts"
            )
        return list(options)

    def _ratings(self, lived: dict[int, Lived]) -> dict[int, float]:
        ratings = self._user.rate(list(lived.values()))
        return {
            row: float("nan") if rating is None else (rating - 3) / 2
            for row, rating in zip(lived, ratings, strict=True)
        }

    def _preferences(self, rollout: Rollout, lived: dict[int, Lived]) -> dict[int, float]:
        """`2 P - 1`, P the mean probability of being preferred to the other completions of the prompt.

        A comparison that failed is left out; a row is `FAILED` only if all of its own did.
        """
        pairs = [
            (one, other)
            for _, group in groupby(lived, key=lambda row: rollout.prompts[row])
            for rows in [list(group)]
            for place, one in enumerate(rows)
            for other in rows[place + 1 :]
        ]
        given = self._user.prefer([(lived[one], lived[other]) for one, other in pairs])
        shares: dict[int, list[float | None]] = {}
        for (one, other), share in zip(pairs, given, strict=True):
            shares.setdefault(one, []).append(share)
            shares.setdefault(other, []).append(None if share is None else 1 - share)
        found = {row: [share for share in all_of if share is not None] for row, all_of in shares.items()}
        return {row: 2 * fmean(known) - 1 if known else float("nan") for row, known in found.items()}

    def _metrics(self, lived: dict[int, Lived], scores: dict[int, float]) -> dict[str, float]:
        """What the user feels when asked, and in the marketplace what is true of it; so that both can be plotted."""
        from rlhf_kit.data.customer import claims, true_utility

        given = [score for score in scores.values() if math.isfinite(score)]
        metrics = dict(self._user.metrics())
        felt = [one.felt for one in lived.values() if one.felt is not None]
        if felt:
            metrics["satisfaction"] = fmean(experience.satisfaction for experience in felt)
            metrics["immediate_satisfaction"] = fmean(experience.immediate for experience in felt)
        elif given and self._config.feedback == "rating":
            metrics["satisfaction"] = fmean(given)
        markets = [(one, one.scene.market) for one in lived.values() if one.scene.market is not None]
        if not markets:
            return metrics
        metrics["true_utility"] = fmean(true_utility(market, one.bought) for one, market in markets)
        metrics["bought"] = fmean(one.bought is not None for one, _ in markets)
        said = [
            claimed != market.has[market.options.index(option)]
            for one, market in markets
            for option, claimed in claims(one.scene.completion, market).items()
        ]
        return metrics | ({"false_claims": fmean(said)} if said else {})
