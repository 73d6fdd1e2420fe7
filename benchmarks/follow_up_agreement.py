"""Does the follow-up reward agree with people? Ranked replies of OpenAssistant's conversations, pair by pair.

Each pair of replies to one message, of which people ranked one higher, is a question: does the reward rank it higher
too? Beside the reward (all aspects, and each alone) stand length alone and coins. Intervals are bootstrapped over
conversation trees, for pairs of one tree are not independent. The pairs are also split by whether people preferred the
longer or the shorter reply: what only likes length wins the first and loses the second.

    python benchmarks/follow_up_agreement.py --data en_100_tree.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

The trees are https://github.com/LAION-AI/Open-Assistant/blob/main/model/model_eval/manual/data/en_100_tree.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from common import parser, print_table, report, seconds

from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.in_process import own_model
from rlhf_kit.rewards.follow_up import FollowUp, FollowUpConfig, context_ids
from rlhf_kit.rollout import Message

BOOTSTRAPS = 2000
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Reply:
    """A reply that people ranked (0 is best) among those to the same message."""

    tree: int
    group: str
    rank: int
    prompt: list[Message]
    text: str
    scores: dict[str, float] = field(default_factory=dict)


def ranked_replies(path: Path, first_turns: bool) -> list[Reply]:
    """The replies of every group in which at least two are ranked; with `first_turns` those to the opening messages."""
    found: list[Reply] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        for message, history in walk(json.loads(line)["prompt"], []):
            if message["role"] != "prompter" or (first_turns and history):
                continue
            ranked = [reply for reply in message["replies"] if reply.get("rank") is not None]
            if len(ranked) < 2:
                continue
            prompt = [as_message(one) for one in (*history, message)]
            found += [Reply(number, message["message_id"], r["rank"], prompt, r["text"]) for r in ranked]
    return found


def walk(message: dict[str, Any], history: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Every message of a tree, with those before it."""
    yield message, history
    for reply in message["replies"]:
        yield from walk(reply, [*history, message])


def as_message(message: dict[str, Any]) -> Message:
    """A message of the data as a chat template reads it."""
    return {"role": {"prompter": "user", "assistant": "assistant"}[message["role"]], "content": message["text"]}


def score(replies: Sequence[Reply], source: FollowUp, chosen: Sequence[str]) -> list[Reply]:
    """The replies that fit the model, with every score; one of them is the mean of the `chosen` aspects."""
    for place, reply in enumerate(replies):
        (aspects,) = source.differences([(reply.prompt, reply.text)])
        if aspects is not None:
            some = {"+".join(chosen): fmean(aspects[name] for name in chosen)} if chosen else {}
            reply.scores.update({"follow-ups": fmean(aspects.values()), **some, **aspects, "length": len(reply.text)})
        if place % 20 == 0:
            print(f"{place} of {len(replies)} replies", flush=True)
    return [reply for reply in replies if reply.scores]


def pairs_of(replies: Sequence[Reply]) -> list[tuple[Reply, Reply]]:
    """Pairs of replies to the same message, the one that people ranked higher first."""
    groups: dict[str, list[Reply]] = {}
    for reply in replies:
        groups.setdefault(reply.group, []).append(reply)
    ordered = (sorted(group, key=lambda reply: reply.rank) for group in groups.values())
    return [pair for group in ordered for pair in combinations(group, 2) if pair[0].rank < pair[1].rank]


def agreement(pairs: Sequence[tuple[Reply, Reply]], name: str) -> float:
    """The share of pairs that a score orders as people did; a tie is half of one."""
    verdicts = [(better.scores[name], worse.scores[name]) for better, worse in pairs]
    return fmean((one > other) + 0.5 * (one == other) for one, other in verdicts)


def interval(
    pairs: Sequence[tuple[Reply, Reply]], value: Callable[[Sequence[tuple[Reply, Reply]]], float]
) -> tuple[float, float]:
    """The middle 95 % of a value over bootstrapped trees."""
    trees: dict[int, list[tuple[Reply, Reply]]] = {}
    for pair in pairs:
        trees.setdefault(pair[0].tree, []).append(pair)
    own, drawn = list(trees.values()), random.Random(1)
    values = sorted(
        value([pair for tree in drawn.choices(own, k=len(own)) for pair in tree]) for _ in range(BOOTSTRAPS)
    )
    return values[int(0.025 * BOOTSTRAPS)], values[int(0.975 * BOOTSTRAPS) - 1]


def balanced(pairs: Sequence[tuple[Reply, Reply]], name: str) -> float:
    """The mean of the agreements where the longer and where the shorter reply was preferred: 1/2 for length alone."""
    sides = [[p for p in pairs if (len(p[0].text) > len(p[1].text)) == longer] for longer in (True, False)]
    return fmean(agreement(side, name) if side else 0.5 for side in sides)


def coins(pairs: Sequence[tuple[Reply, Reply]]) -> tuple[float, float]:
    """The middle 95 % of the agreement of scores that are drawn at random."""
    drawn = random.Random(2)
    values = []
    for _ in range(BOOTSTRAPS):
        coin = {id(reply): drawn.random() for pair in pairs for reply in pair}
        values.append(fmean(coin[id(better)] > coin[id(worse)] for better, worse in pairs))
    values.sort()
    return values[int(0.025 * BOOTSTRAPS)], values[int(0.975 * BOOTSTRAPS) - 1]


def table(pairs: Sequence[tuple[Reply, Reply]]) -> list[dict[str, Any]]:
    """Agreement of every score, and on the pairs whose longer or shorter reply was preferred."""
    longer = [pair for pair in pairs if len(pair[0].text) > len(pair[1].text)]
    shorter = [pair for pair in pairs if len(pair[0].text) < len(pair[1].text)]
    rows = []
    for name in pairs[0][0].scores:
        of_both = [interval(pairs, lambda drawn, of=of, name=name: of(drawn, name)) for of in (agreement, balanced)]
        shown = [f"{low:.3f} to {high:.3f}" for low, high in of_both]
        rows.append(
            {
                "score": name,
                "agreement": agreement(pairs, name),
                "95 %": shown[0],
                f"longer preferred ({len(longer)})": agreement(longer, name),
                f"shorter preferred ({len(shorter)})": agreement(shorter, name),
                "mean of these two": balanced(pairs, name),
                "95 % of it": shown[1],
            }
        )
    return rows


def main(options: argparse.Namespace) -> None:
    torch.set_grad_enabled(False)
    config = FollowUpConfig(type="follow_up", batch_size=options.batch_size)
    model = own_model(Pretrained(path=options.model, dtype=options.dtype), DEVICE)
    source = FollowUp(config, model)
    found = ranked_replies(options.data, options.first_turns)
    lengths = [len(context_ids(model.tokenizer, reply.prompt, reply.text)) for reply in found]
    replies = [reply for reply, length in zip(found, lengths, strict=True) if length <= options.max_tokens]
    with report(options) as results:
        scored: list[Reply] = []
        results["seconds"] = seconds(lambda: scored.extend(score(replies, source, options.aspects)))
        pairs = pairs_of(scored)
        trees = len({better.tree for better, _ in pairs})
        print(f"{len(scored)} of {len(found)} replies, {len(pairs)} pairs of {trees} trees, {results['seconds']:.0f} s")
        results |= {"replies": len(scored), "found": len(found), "pairs": len(pairs), "trees": trees}
        results["agreement"] = table(pairs)
        print_table("Agreement with human ranks", results["agreement"])
        low, high = interval(pairs, lambda drawn: agreement(drawn, "follow-ups") - agreement(drawn, "length"))
        results["follow-ups minus length"] = [low, high]
        print(f"\nfollow-ups minus length: {low:+.3f} to {high:+.3f}")
        results["coins"] = coins(pairs)
        print("a coin: 0.5, 95 % of coins {:.3f} to {:.3f}".format(*results["coins"]))
        results["scores"] = [{"group": r.group, "tree": r.tree, "rank": r.rank, **r.scores} for r in scored]


if __name__ == "__main__":
    options = parser(__doc__)
    options.add_argument("--data", type=Path, required=True, help="OpenAssistant trees, one a line")
    options.add_argument("--model", required=True, help="folder or hub id of the model that reads")
    options.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options.add_argument("--max-tokens", type=int, default=512, help="leave longer conversations out")
    options.add_argument("--first-turns", action="store_true", help="only replies to the opening messages")
    options.add_argument("--aspects", nargs="*", default=[], help="the mean of these is a score as well")
    options.add_argument("--batch-size", type=int, default=32)
    main(options.parse_args())
