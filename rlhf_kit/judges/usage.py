"""What a judge has cost, and what it still may."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Mapping

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt

from rlhf_kit.config import Config

COUNTED = ("calls", "cached", "failed", "retried", "prompt_tokens", "completion_tokens", "cost", "waited")
BUDGETED = ("calls", "prompt_tokens", "completion_tokens", "cost")
_MILLION = 1e6


class Budget(Config):
    """What a judge may use up in all: requests, tokens (read and written) and money, in the currency of the prices.

    It is that of one reward source. Every process has an equal share, the first what is left over of `calls` and
    `tokens`; a run that goes on counts from its checkpoint. What the cache answers costs nothing. Tokens and money are
    known when an answer is there, so that they end up to `concurrency` answers above. Tokens are those that the server
    says; where it says none, or what cannot be, they are estimated on the safe side, which is warned of once: a token
    for four bytes of a question, and `max_tokens` for its answer. A request without a reply counts as a call alone.
    """

    calls: PositiveInt | None = None
    tokens: PositiveInt | None = None
    cost: PositiveFloat | None = None
    prompt_price: NonNegativeFloat = 0.0  # per million tokens
    completion_price: NonNegativeFloat = 0.0

    def share(self, name: str, rank: int, processes: int) -> float:
        """What one of several processes may use up of `calls`, `tokens` or `cost`; the shares add up to the whole."""
        limit = getattr(self, name)
        if limit is None:
            return math.inf
        if isinstance(limit, int):
            return limit // processes + (limit % processes if rank == 0 else 0)
        return limit / processes

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """What so many tokens cost."""
        return (prompt_tokens * self.prompt_price + completion_tokens * self.completion_price) / _MILLION


class Usage:
    """Counts of one judge, in total and since they were last taken; used from several threads."""

    def __init__(self, budget: Budget, rank: int = 0, processes: int = 1) -> None:
        self._budget = budget
        self._processes = processes
        self._shares = {name: budget.share(name, rank, processes) for name in ("calls", "tokens", "cost")}
        self._lock = threading.Lock()
        self._total: Counter[str] = Counter()
        self._recent: Counter[str] = Counter()

    def add(self, **amounts: float) -> None:
        """Count amounts of `COUNTED`."""
        with self._lock:
            self._add(amounts)

    def add_tokens(self, prompt: int, completion: int) -> None:
        """Count the tokens of a request, and what they cost."""
        self.add(prompt_tokens=prompt, completion_tokens=completion, cost=self._budget.price(prompt, completion))

    def begin_call(self) -> str | None:
        """Count one request more, or say which part of the budget is used up."""
        total = self._total
        with self._lock:
            used = {
                "calls": total["calls"],
                "tokens": total["prompt_tokens"] + total["completion_tokens"],
                "cost": total["cost"],
            }
            for name, amount in used.items():
                share = self._shares[name]
                if amount >= share:
                    limit = getattr(self._budget, name)
                    mine = f", of which this process has {share:g}," if self._processes > 1 else ""
                    return (
                        f"the judge's budget.{name} of {limit:g}{mine} is used up (so far {amount:g}): raise it, "
                        "or ask less"
                    )
            self._add({"calls": 1})
            return None

    def total(self) -> dict[str, float]:
        """What counts against the budget, in all."""
        with self._lock:
            return {name: float(self._total[name]) for name in BUDGETED}

    def resume(self, used: Mapping[str, float]) -> None:
        """Count what was used before."""
        with self._lock:
            self._total.update({name: used.get(name, 0.0) for name in BUDGETED})  # pyright: ignore[reportCallIssue, reportArgumentType]

    def take(self) -> dict[str, float]:
        """Everything in `COUNTED` since this was called last."""
        with self._lock:
            recent, self._recent = self._recent, Counter()
        return {name: float(recent[name]) for name in COUNTED}

    def _add(self, amounts: dict[str, float]) -> None:
        for name, amount in amounts.items():
            self._total[name] += amount  # pyright: ignore[reportArgumentType]
            self._recent[name] += amount  # pyright: ignore[reportArgumentType]
