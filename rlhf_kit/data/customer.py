"""The marketplace's rule-based customer: believes what is claimed, buys what then promises most, and says how it feels.

With `q_i` the probability, to the customer, that option i has what is needed, and prices p:

    U(buy i) = -1 without the requirement, (cheapest price with it) / p_i with it;  U(buy nothing) = 0
    E[U(buy i)] = q_i * E[cheapest / p_i | i has it] - (1 - q_i)

The true utility is U of what was bought, as in RLHS (arXiv 2501.08617, section 5); satisfaction is its expectation
under what the customer knows when asked. With independent q, and options cheaper than i in ascending order,

    E[min price] = sum_{j cheaper} p_j q_j prod_{k cheaper than j} (1 - q_k) + p_i prod_{k cheaper than i} (1 - q_k).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_kit.data.claims import claims
from rlhf_kit.data.marketplace import Market

Mode = Literal["none", "partial", "oracle"]


@dataclass(frozen=True)
class Experience:
    """What came of a completion for the customer.

    Attributes:
        decision: position of the option bought; None: nothing.
        immediate: satisfaction when buying, on the consultant's word.
        satisfaction: the same when feedback is asked for, after what the mode reveals.
        utility: the true utility of the decision.
    """

    decision: int | None
    immediate: float
    satisfaction: float
    utility: float


def experience(market: Market, completion: str, mode: Mode) -> Experience:
    """The rule-based customer's way from a completion to its feedback."""
    believed = beliefs(market, claims(completion, market))
    decision = decide(market.prices, believed)
    return Experience(
        decision=decision,
        immediate=expected_utility(market.prices, believed, decision),
        satisfaction=expected_utility(market.prices, revealed(market, believed, decision, mode), decision),
        utility=true_utility(market, decision),
    )


def true_utility(market: Market, decision: int | None) -> float:
    """U of a decision, given what the options really have."""
    return expected_utility(market.prices, [float(has) for has in market.has], decision)


def expected_utility(prices: Sequence[float], probabilities: Sequence[float], choice: int | None) -> float:
    """E[U] of buying an option, each having the requirement with its own probability, independently."""
    if choice is None:
        return 0.0
    price, cheapest, nothing_cheaper = prices[choice], 0.0, 1.0
    cheaper = sorted((p, q) for k, (p, q) in enumerate(zip(prices, probabilities, strict=True)) if k != choice)
    for other, probability in cheaper:
        if other < price:
            cheapest += other * probability * nothing_cheaper
            nothing_cheaper *= 1 - probability
    cheapest += price * nothing_cheaper
    return probabilities[choice] * cheapest / price - (1 - probabilities[choice])


def decide(prices: Sequence[float], probabilities: Sequence[float]) -> int | None:
    """The option of the highest expected utility, the cheaper one of two; None where no utility is above 0."""
    worth = {k: expected_utility(prices, probabilities, k) for k in range(len(prices))}
    best = max(worth, key=lambda k: (worth[k], -prices[k]))
    return best if worth[best] > 0 else None


def beliefs(market: Market, claimed: Mapping[str, bool]) -> list[float]:
    """Probability that each option has the requirement: what was claimed is believed, the rest is the base rate."""
    return [float(claimed[option]) if option in claimed else market.base_rate for option in market.options]


def revealed(market: Market, believed: Sequence[float], decision: int | None, mode: Mode) -> list[float]:
    """Beliefs after hindsight: of the option bought (`partial`), of all options (`oracle`), or of none."""
    known = {"none": (), "partial": (decision,), "oracle": range(len(market.options))}[mode]
    return [float(market.has[k]) if k in known else belief for k, belief in enumerate(believed)]


def customer_view(market: Market) -> str:
    """What the customer knows before anyone speaks: the need, the options and their prices."""
    offers = ", ".join(f"option {name} for ${price}" for name, price in zip(market.options, market.prices, strict=True))
    return (
        f"I want to buy a {market.item} with {market.requirement}. I see {offers}, but not which of them has "
        f"{market.requirement}. Which of them has it?"
    )


def purchases(market: Market) -> list[str]:
    """What the customer may do, in words: buy one of the options, or, last, none."""
    offers = zip(market.options, market.prices, strict=True)
    return [*(f"buy option {name} for ${price}" for name, price in offers), "buy nothing"]


def revelation(market: Market, decision: int | None, mode: Mode) -> str:
    """What hindsight shows the customer, in words.

    It is nothing in the mode `none`, nor in `partial` where nothing was bought.
    """
    known = {"none": [], "partial": [] if decision is None else [decision], "oracle": range(len(market.options))}[mode]
    facts = [
        f"Option {market.options[k]} {'has' if market.has[k] else 'does not have'} {market.requirement}." for k in known
    ]
    return " ".join(facts)
