"""Users who live through the consequences of a dialogue before they give feedback (RLHS, arXiv 2501.08617).

dialogue -> decision -> outcome of the decision -> rating or preference. `RuleUser` is the marketplace's rule-based
customer; `JudgeUser` asks language models, for any dialogue.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from rlhf_kit.data.customer import (
    Experience,
    Mode,
    customer_view,
    experience,
    purchases,
    revelation,
)
from rlhf_kit.data.marketplace import Market
from rlhf_kit.data.messages import completion_messages, dialogue_text, prompt_messages
from rlhf_kit.judges.base import Answer, Judge, Question, lead
from rlhf_kit.judges.prompts import fenced, fill
from rlhf_kit.rewards.simulation import PREFERENCES
from rlhf_kit.rollout import Text

RATINGS = ("1", "2", "3", "4", "5")
NOTHING = "N"  # the letter of buying nothing, beside those of the options
PLACEHOLDERS: Mapping[str, tuple[str, ...]] = {
    "decision": ("dialogue", "decisions"),
    "outcome": ("dialogue", "decision"),
    "rating": ("dialogue", "decision", "outcome"),
    "preference": ("first", "second"),
}


@dataclass(frozen=True)
class Scene:
    """A completion before its user decides.

    Attributes:
        prompt: what the assistant was asked, with everything that it knew.
        completion: what it said.
        decisions: what the user may do then, in words.
        market: where it is a row of the marketplace, whose customer does not see the assistant's prompt.
    """

    prompt: Text
    completion: str
    decisions: tuple[str, ...]
    market: Market | None = None

    @property
    def seen_by_user(self) -> str:
        """The dialogue as the user saw it."""
        return _dialogue(self.prompt if self.market is None else customer_view(self.market), self.completion)

    @property
    def seen_by_assistant(self) -> str:
        """The dialogue with everything that the assistant knew."""
        return _dialogue(self.prompt, self.completion)


@dataclass(frozen=True)
class Lived:
    """A scene after its user's decision.

    Attributes:
        scene: the scene.
        decision: position among the scene's decisions.
        outcome: what the user was shown of its consequences, in words.
        felt: what the rule-based customer felt, in its own units.
    """

    scene: Scene
    decision: int
    outcome: str = ""
    felt: Experience | None = None

    @property
    def bought(self) -> int | None:
        """In the marketplace, the option that was bought; None for nothing."""
        market = self.scene.market
        return self.decision if market is not None and self.decision < len(market.options) else None


def _dialogue(prompt: Text, completion: str) -> str:
    return dialogue_text([*prompt_messages(prompt, None), *completion_messages(completion)])


def market_scene(prompt: Text, completion: str, market: Market) -> Scene:
    """A completion of the marketplace's consultant."""
    return Scene(prompt, completion, tuple(purchases(market)), market)


class User(ABC):
    """Decides, lives through the outcome, and gives feedback. None stands for what could not be judged."""

    @abstractmethod
    def live(self, scenes: Sequence[Scene], mode: Mode) -> Callable[[], list[Lived | None]]:
        """Begin to decide; calling the result gives decisions and outcomes, as far as the mode reveals them."""

    @abstractmethod
    def rate(self, lived: Sequence[Lived]) -> list[float | None]:
        """A rating from 1 to 5 of each."""

    @abstractmethod
    def compare(self, pairs: Sequence[tuple[Lived, Lived]]) -> list[tuple[float, float] | None]:
        """The log-odds that what is shown first is preferred: the first of a pair shown first, and the second."""

    def prefer(self, pairs: Sequence[tuple[Lived, Lived]]) -> list[float | None]:
        """The probability that the first of each pair is preferred, the mean over both orders."""
        return [None if odds is None else (1 + lead(odds[0]) - lead(odds[1])) / 2 for odds in self.compare(pairs)]

    def metrics(self) -> dict[str, float]:
        """What is worth logging since this was asked last."""
        return {}

    def judges(self) -> Mapping[str, Judge]:
        """See `RewardSource.judges`."""
        return {}


class RuleUser(User):
    """The marketplace's rule-based customer, who believes what is claimed (`rlhf_kit.data.customer`).

    Its rating is `3 + 2 s` for a satisfaction s in [-1, 1], and it prefers what satisfied it more.
    """

    def live(self, scenes: Sequence[Scene], mode: Mode) -> Callable[[], list[Lived | None]]:
        def lived(scene: Scene) -> Lived:
            assert scene.market is not None
            felt = experience(scene.market, scene.completion, mode)
            decision = len(scene.market.options) if felt.decision is None else felt.decision
            return Lived(scene, decision, revelation(scene.market, felt.decision, mode), felt)

        return lambda: [lived(scene) for scene in scenes]

    def rate(self, lived: Sequence[Lived]) -> list[float | None]:
        return [3 + 2 * _satisfaction(one) for one in lived]

    def compare(self, pairs: Sequence[tuple[Lived, Lived]]) -> list[tuple[float, float] | None]:
        gaps = [_satisfaction(first) - _satisfaction(second) for first, second in pairs]
        odds = [math.copysign(math.inf, gap) if gap else 0.0 for gap in gaps]
        return [(own, -own) for own in odds]


def _satisfaction(lived: Lived) -> float:
    assert lived.felt is not None
    return lived.felt.satisfaction


class JudgeUser(User):
    """A language model as the user, and a language model or the marketplace's truth as the world.

    Decisions are asked for in both orders of presentation and the probabilities of each averaged; the likeliest is
    taken. So are preferences, with each completion first once: a judge that only looks at the place gives 1/2. A rating
    is the mean of 1 to 5 under the judge's probabilities of these digits.

    Args:
        judge: decides, rates and prefers.
        world: says what comes of a decision; None takes the truth of the marketplace.
        prompts: the templates, by the names of `PLACEHOLDERS`.
    """

    def __init__(self, judge: Judge, world: Judge | None, prompts: Mapping[str, str]) -> None:
        self.judge = judge
        self.world = world
        self._prompts = prompts
        self._bias: list[float] = []

    def live(self, scenes: Sequence[Scene], mode: Mode) -> Callable[[], list[Lived | None]]:
        labels = [decision_labels(scene) for scene in scenes]
        questions = [
            self._decision(scene, names, order)
            for scene, names in zip(scenes, labels, strict=True)
            for order in (1, -1)
        ]
        answers = self.judge.ask(questions)

        def finish() -> list[Lived | None]:
            given = [_probabilities(answer) for answer in answers()]
            decided = [self._decide(*pair) for pair in zip(given[::2], given[1::2], strict=True)]
            open_places = [k for k, decision in enumerate(decided) if decision is not None]
            lived = [Lived(scenes[k], decision) for k in open_places if (decision := decided[k]) is not None]
            outcomes = self._outcomes(lived, mode)
            found: list[Lived | None] = [None] * len(scenes)
            for place, one, outcome in zip(open_places, lived, outcomes, strict=True):
                found[place] = None if outcome is None else Lived(one.scene, one.decision, outcome)
            return found

        return finish

    def rate(self, lived: Sequence[Lived]) -> list[float | None]:
        questions = [
            self._question(
                "rating",
                RATINGS,
                dialogue=fenced(one.scene.seen_by_user, "dialogue"),
                decision=one.scene.decisions[one.decision],
                outcome=_told(one.outcome),
            )
            for one in lived
        ]
        given = [_probabilities(answer) for answer in self.judge.ask(questions)()]
        return [None if p is None else sum(k * share for k, share in enumerate(p, 1)) for p in given]

    def compare(self, pairs: Sequence[tuple[Lived, Lived]]) -> list[tuple[float, float] | None]:
        orders = [order for first, second in pairs for order in ((first, second), (second, first))]
        questions = [
            self._question("preference", PREFERENCES, first=_story(first), second=_story(second))
            for first, second in orders
        ]
        given = [_log_odds(answer) for answer in self.judge.ask(questions)()]
        compared: list[tuple[float, float] | None] = []
        for straight, swapped in zip(given[::2], given[1::2], strict=True):
            if straight is None or swapped is None:
                compared.append(None)
                continue
            self._bias.append(lead(straight) + lead(swapped))
            compared.append((straight, swapped))
        return compared

    def metrics(self) -> dict[str, float]:
        """`position_bias`: how much likelier the judge is to choose what stands first."""
        biases, self._bias = self._bias, []
        return {"position_bias": sum(biases) / len(biases)} if biases else {}

    def judges(self) -> Mapping[str, Judge]:
        own = {} if self.world is None or self.world is self.judge else {"world": self.world}
        return {"judge": self.judge, **own}

    def _decision(self, scene: Scene, labels: Sequence[str], order: int) -> Question:
        lines = [f"{label}: {decision}" for label, decision in zip(labels, scene.decisions, strict=True)]
        return self._question(
            "decision", labels, dialogue=fenced(scene.seen_by_user, "dialogue"), decisions="\n".join(lines[::order])
        )

    def _decide(self, straight: list[float] | None, reverse: list[float] | None) -> int | None:
        """The likelier decision over both orders; choices are in the order of the labels in both."""
        if straight is None or reverse is None:
            return None
        self._bias.append(straight[0] - reverse[0])
        means = [sum(pair) / 2 for pair in zip(straight, reverse, strict=True)]
        return means.index(max(means))

    def _outcomes(self, lived: Sequence[Lived], mode: Mode) -> list[str | None]:
        """What hindsight shows of each: of its decision, or (`oracle`) of every one that it could have taken.

        Where there is no world model, the marketplace's truth.
        """
        if mode == "none":
            return ["" for _ in lived]
        if self.world is None:
            return [revelation(one.scene.market, one.bought, mode) if one.scene.market else None for one in lived]
        asked = [
            (place, k)
            for place, one in enumerate(lived)
            for k in (range(len(one.scene.decisions)) if mode == "oracle" else [one.decision])
        ]
        questions = [
            self._question(
                "outcome",
                (),
                dialogue=fenced(lived[place].scene.seen_by_assistant, "dialogue"),
                decision=lived[place].scene.decisions[k],
            )
            for place, k in asked
        ]
        told: list[list[str] | None] = [[] for _ in lived]
        for (place, k), answer in zip(asked, self.world.ask(questions)(), strict=True):
            so_far = told[place]
            if answer.error is not None or so_far is None:
                told[place] = None
                continue
            missed = "" if k == lived[place].decision else f"Had you chosen to {lived[place].scene.decisions[k]}: "
            so_far.append(missed + answer.text.strip())
        return [None if lines is None else "\n".join(lines) for lines in told]

    def _question(self, prompt: str, choices: Sequence[str], **values: str) -> Question:
        content = fill(self._prompts[prompt], **values)
        return Question([{"role": "user", "content": content}], choices=tuple(choices))


def decision_labels(scene: Scene) -> list[str]:
    """The letters that a decision is answered by: the options' own in the marketplace, else A, B, C and so on."""
    if scene.market is not None:
        return [*scene.market.options, NOTHING]
    return list(ascii_uppercase[: len(scene.decisions)])


def _probabilities(answer: Answer) -> list[float] | None:
    """The probabilities of a question's choices among each other; None where the judge failed."""
    if answer.error is not None or not answer.log_probs or not all(math.isfinite(p) for p in answer.log_probs):
        return None
    highest = max(answer.log_probs)
    weights = [math.exp(value - highest) for value in answer.log_probs]
    return [weight / sum(weights) for weight in weights]


def _log_odds(answer: Answer) -> float | None:
    """The log-odds of the first of two choices; None where the judge failed."""
    return None if _probabilities(answer) is None else answer.log_probs[0] - answer.log_probs[1]


def _told(outcome: str) -> str:
    return fenced(outcome, "outcome") if outcome else "You do not know yet what comes of it."


def _story(lived: Lived) -> str:
    """A dialogue with what followed, as the user knows it."""
    dialogue = fenced(lived.scene.seen_by_user, "dialogue")
    return f"{dialogue}\n\nThen you did this: {lived.scene.decisions[lived.decision]}\n\n{_told(lived.outcome)}"
