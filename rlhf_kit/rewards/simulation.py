"""Configuration of a simulated user, who lives through what comes of a completion before giving feedback."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from rlhf_kit.config import Config, Location
from rlhf_kit.judges.config import JudgeConfig
from rlhf_kit.judges.prompts import read_prompt
from rlhf_kit.problems import Problem
from rlhf_kit.rewards.asking import PROMPTS, prompt_problems
from rlhf_kit.rollout import Text

if TYPE_CHECKING:
    from rlhf_kit.models.in_process import PolicyContext
    from rlhf_kit.rewards.simulated_user import Scene, User

MOST_DECISIONS = 26
PREFERENCES = ("1", "2")


class HindsightPrompts(Config):
    """Files in the place of the kit's own prompts.

    They hold `{{dialogue}}` and `{{decisions}}` (decision), `{{dialogue}}` and `{{decision}}` (outcome), the same and
    `{{outcome}}` (rating), `{{first}}` and `{{second}}` (preference).
    """

    decision: Location | None = None
    outcome: Location | None = None
    rating: Location | None = None
    preference: Location | None = None


class Simulation(Config):
    """Who lives through what comes of a completion, and what they know of it when they are asked.

    `mode` says what the user knows by then: `none` (immediate feedback), `partial` (the outcome of its own decision)
    or `oracle` (that of every decision it could have taken). `judge` is the user: the marketplace's `rule`, or a
    language model. `world` says what comes of a decision: the marketplace's truth (`rule`), the `judge` itself, or
    another model, as in the paper the policy. Users other than the rule's may meet any dialogue: their choices are the
    row's column `options`, or else `decisions`.
    """

    mode: Literal["none", "partial", "oracle"] = "partial"
    judge: Literal["rule"] | JudgeConfig = "rule"
    world: Literal["rule", "judge"] | JudgeConfig = "rule"
    decisions: Annotated[tuple[str, ...], Field(max_length=MOST_DECISIONS)] = ()
    prompts: HindsightPrompts = HindsightPrompts()

    @property
    def user_columns(self) -> tuple[str, ...]:
        """The columns of the data that the user cannot do without: a market's, or what it may do."""
        from rlhf_kit.data.marketplace import Market

        if self.needs_truth:
            return tuple(Market.__dataclass_fields__)
        return () if self.decisions else ("options",)

    @property
    def needs_truth(self) -> bool:
        """Whether it cannot do without the marketplace's truth."""
        return self.judge == "rule" or (self.world == "rule" and self.mode != "none")

    @property
    def feedback_choices(self) -> tuple[str, ...]:
        """The words that feedback is given in."""
        return PREFERENCES

    def simulation_problems(self) -> Iterator[Problem]:
        """What cannot work; paths start where these fields stand."""
        from rlhf_kit.rewards.simulated_user import PLACEHOLDERS

        if self.judge == "rule" and self.world != "rule":
            what = "is asked by nobody: the rule-based customer is shown the marketplace's truth"
            yield Problem("world", what, remedy="write world: rule, or name a judge")
        if len(self.decisions) == 1 or len(set(self.decisions)) < len(self.decisions):
            yield Problem("decisions", "are two different things at least", self.decisions, "name what the user may do")
        for name in ("judge", "world"):
            check = getattr(getattr(self, name), "problems", None)
            if check is not None:
                yield from (problem.under(name) for problem in check())
        for name, path in self.prompts:
            yield from prompt_problems(path, PLACEHOLDERS[name], f"prompts.{name}")

    def files(self) -> Iterator[tuple[str, str, bool]]:
        """What it reads: the field, the file or model (a folder or a hub id), and whether it is a model."""
        for name, path in self.prompts:
            if path is not None:
                yield f"prompts.{name}", path, False
        for name in ("judge", "world"):
            config = getattr(self, name)
            if not isinstance(config, str):
                yield from ((f"{name}.{field}", value, is_model) for field, value, is_model in config.files())

    def user(self, context: PolicyContext) -> User:
        """The simulated user; loads the models of judge and world.

        Raises:
            ValueError: the first token of an answer of a judge in this process does not tell the answers apart.
        """
        from rlhf_kit.rewards.simulated_user import PLACEHOLDERS, JudgeUser, RuleUser

        if self.judge == "rule":
            return RuleUser()
        judge = self.judge.build(context)
        judge.check_choices(("A", "B"))  # how many decisions there are is known by the data alone
        judge.check_choices(self.feedback_choices)
        if self.world == "judge":
            world = judge
        else:
            world = None if self.world == "rule" else self.world.build(context)
        own = dict(self.prompts)
        prompts = {name: read_prompt(own[name], PROMPTS, f"hindsight_{name}.txt") for name in PLACEHOLDERS}
        return JudgeUser(judge, world, prompts)

    def scene(self, prompt: Text, completion: Text, columns: Mapping[str, Any], where: str) -> Scene | None:
        """A completion before its user decides; None where there is nothing to decide, or the truth is not known.

        Args:
            prompt: what the assistant was asked.
            completion: what it said.
            columns: the other columns of the row.
            where: what an error calls the row.

        Raises:
            ValueError: the column `options` holds no list of texts.
        """
        from rlhf_kit.data.marketplace import market_of
        from rlhf_kit.data.messages import completion_text
        from rlhf_kit.rewards.simulated_user import Scene, market_scene

        text = completion_text(completion)
        market = market_of(columns)
        if market is not None:
            return market_scene(prompt, text, market)
        decisions = tuple(_options(columns.get("options"), where) or self.decisions)
        if self.needs_truth or not 2 <= len(decisions) <= MOST_DECISIONS:
            return None
        return Scene(prompt, text, decisions)


def _options(options: object, where: str) -> list[str]:
    if options is None:
        return []
    if not isinstance(options, list | tuple) or not all(isinstance(option, str) for option in options):
        raise ValueError(
            f"what the user may do is read from the column 'options', and {where} holds {options!r} there: give a list "
            "of texts"
        )
    return list(options)
