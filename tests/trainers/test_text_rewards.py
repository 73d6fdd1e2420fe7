"""Sources that judge text, in a run: their spans' rewards lie on the sampled tokens that hold those characters.

Which tokens hold a character is worked out from prefixes of the sampled ids, and advantages from their definition.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from rlhf_kit.errors import RunError
from rlhf_kit.rewards.config import SourceConfig
from rlhf_kit.rewards.function import FunctionConfig
from rlhf_kit.rewards.lexical import LexicalConfig
from rlhf_kit.rewards.text import Judged, TextSource, TextSourceConfig
from rlhf_kit.rollout import Rollout, Span, Status

PROMPTS = ["I like it.", "Was the film good? Then say yes", "ok", "The story, dear friend: tell me the story 🎉"]
REWARD = 0.5


class MatchesConfig(TextSourceConfig):
    """Rewards every match of a pattern by its number, in rows that are not `broken`."""

    type: Literal["matches"] = "matches"
    pattern: str
    broken_column: str | None = None
    after_outcomes: bool = False

    def build(self, context) -> Matches:
        return Matches(self)


class Matches(TextSource):
    def __init__(self, config: MatchesConfig) -> None:
        super().__init__(config)
        self.config = config
        self.needs_outcomes = config.after_outcomes
        self.begun: list[Rollout] = []

    def begin(self, rollout: Rollout) -> None:
        self.begun.append(rollout)

    def judge(self, rollout: Rollout) -> Judged:
        rows: list[list[Span] | Status] = []
        for row, text in enumerate(rollout.texts):
            places = [match.span() for match in re.finditer(self.config.pattern, text)]
            broken = self.config.broken_column and rollout.columns[self.config.broken_column][row]
            spans = [Span(start, end, REWARD * (k + 1), self.name) for k, (start, end) in enumerate(places)]
            rows.append(Status.FAILED if broken else spans)
        return Judged(rows, {"found": float(sum(len(row) for row in rows if not isinstance(row, Status)))})


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Any]:
    """Prompts of different lengths; every other one is `broken`."""
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": prompt, "broken": k % 2 == 1} for k, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return {"type": "jsonl", "path": str(path)}


@pytest.fixture
def run(build, talker, data):
    """A trainer after one rollout of the small talker; 16 completions of up to 24 tokens, four prompts."""

    def make(*sources: SourceConfig, credit: dict[str, Any] | None = None, **fields: Any) -> Any:
        args = {"per_device_train_batch_size": 16, "max_completion_length": 24, "max_steps": 1, "learning_rate": 1e-3}
        credit = {"estimator": "reinforce", "whiten": False, "gamma": 1.0, **(credit or {})}
        trainer = build(sources=sources, model={"path": str(talker)}, data=data, args=args, credit=credit, **fields)
        trainer.train()
        return trainer

    return make


def owners(tokenizer: Any, ids: list[int], text: str) -> list[int]:
    """For each character, the token that completes it; exact for ASCII, whose bytes are characters."""
    found, tokens = [], iter(range(len(ids)))
    token = next(tokens, -1)
    for c in range(len(text)):
        while tokenizer.decode(ids[: token + 1], skip_special_tokens=True)[: c + 1] != text[: c + 1]:
            token = next(tokens)
        found.append(token)
    return found


def sampled(rollout: Rollout, row: int) -> list[int]:
    return rollout.completion_ids[row][rollout.completion_mask[row]].tolist()


def expected_rewards(trainer: Any, row: int, pattern: str, placement: str, mean: bool = False) -> list[float]:
    """Token rewards of `Matches` worked out anew, and the spans that make them."""
    rollout = trainer.rollouts[0]
    ids = sampled(rollout, row)
    text = trainer.processing_class.decode(ids, skip_special_tokens=True)
    owner = owners(trainer.processing_class, ids, text)
    rewards = [0.0] * len(ids)
    places = [match.span() for match in re.finditer(pattern, text)]
    for k, (start, end) in enumerate(places):
        reward = REWARD * (k + 1) / (len(places) if mean else 1)
        tokens = sorted({owner[c] for c in range(start, end)})
        for token in {"end": tokens[-1:], "start": tokens[:1], "spread": tokens}[placement]:
            rewards[token] += reward / (len(tokens) if placement == "spread" else 1)
    return rewards


@pytest.mark.parametrize(
    ("placement", "per_segment"), [("end", "sum"), ("start", "sum"), ("spread", "sum"), ("end", "mean")]
)
def test_rewards_lie_on_the_tokens_that_a_span_overlaps(run, placement, per_segment) -> None:
    pattern = r"[a-z]{2,}"
    trainer = run(MatchesConfig(pattern=pattern, placement=placement, per_segment=per_segment))
    (rollout,), (samples,), (batch,) = trainer.rollouts, trainer.samples, trainer.batches
    assert len(set(rollout.prompt_mask.sum(dim=1).tolist())) > 1  # ragged, padded on the left
    assert not rollout.prompt_mask[:, 0].all() and rollout.prompt_mask[:, -1].all()
    rewarded = spread = 0
    returns = []
    for row, sample in enumerate(samples):
        expected = expected_rewards(trainer, row, pattern, placement, per_segment == "mean")
        assert sample["rewards"]["matches"] == pytest.approx(expected, abs=1e-6)
        rewarded += sum(map(bool, expected))
        spread += any(end - start > 2 for start, end, _ in sample["spans"]["matches"])
        returns.append([sum(expected[t:]) for t in range(len(expected))])
    baseline = sum(map(sum, returns)) / sum(map(len, returns))  # reinforce: the mean of all tokens' returns
    for row, own in enumerate(returns):
        assert batch["advantages"][row, : len(own)].tolist() == pytest.approx([g - baseline for g in own], abs=1e-5)
    assert rewarded > len(samples) and spread  # or the rollout would show little


def test_texts_and_spans_arrive_in_the_samples(run) -> None:
    trainer = run(MatchesConfig(pattern="[aeiou]"), MatchesConfig(pattern="[A-Z]", name="capitals"))
    (rollout,), (samples,) = trainer.rollouts, trainer.samples
    found = 0
    for row, sample in enumerate(samples):
        text = trainer.processing_class.decode(sampled(rollout, row), skip_special_tokens=True)
        assert sample["completion"] == text
        for name, pattern in (("matches", "[aeiou]"), ("capitals", "[A-Z]")):
            places = [match.span() for match in re.finditer(pattern, text)]
            assert sample["spans"][name] == [[s, e, REWARD * (k + 1)] for k, (s, e) in enumerate(places)]
            found += len(places)
        json.dumps(sample)
    assert found > len(samples)
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    total = sum(len(sample["spans"]["matches"]) for sample in samples)
    assert logged["rewards/matches/found"] == total


def test_rows_that_failed_leave_the_losses(run) -> None:
    trainer = run(MatchesConfig(pattern="[a-z]", broken_column="broken"))
    (rollout,), (samples,), (batch,) = trainer.rollouts, trainer.samples, trainer.batches
    broken = torch.tensor(rollout.columns["broken"])
    assert broken.any() and not broken.all()
    assert not batch["tool_mask"][broken].any()
    assert batch["num_items_in_batch"] == rollout.action_mask[~broken].sum()
    assert (batch["advantages"][broken] == 0).all()
    for row, sample in enumerate(samples):
        assert bool(sample["spans"]["matches"]) <= (not broken[row])
        assert any(sample["rewards"]["matches"]) <= (not broken[row])
    logged = next(entry for entry in trainer.state.log_history if "reward" in entry)
    assert logged["rewards/matches/failed"] == pytest.approx(broken.float().mean().item())


def test_a_source_begins_once_before_the_models_score_or_once_the_outcomes_are_known(run) -> None:
    def half(completions: list[str], **_: Any) -> list[float | None]:
        return [None if k % 3 == 2 else float(k % 3) for k in range(len(completions))]

    outcome = FunctionConfig(type="function", function="half", bounded=True)
    early, late = MatchesConfig(pattern="a"), MatchesConfig(pattern="a", name="late", after_outcomes=True)
    trainer = run(outcome, early, late, functions={"half": half}, credit={"kl": {"coefficient": 0.1}})
    _, first, second = trainer.scoring.sources
    (before,), (after,) = first.begun, second.begun
    assert before.logprobs == {} and before.outcomes is None
    assert set(after.logprobs) == {"behaviour", "reference"}
    labels = [float("nan") if k % 3 == 2 else float(k % 3) for k in range(16)]
    assert after.outcomes.tolist() == pytest.approx(labels, nan_ok=True)
    for begun in (before, after):
        assert list(begun.texts) == [sample["completion"] for sample in trainer.samples[0]]
        assert [len(offsets) for offsets in begun.offsets] == [begun.completion_ids.shape[1]] * len(begun)


@pytest.mark.parametrize(
    "measure", [{"type": "regex", "pattern": "[a-z]{2,}"}, {"type": "repetition", "n": 1, "unit": "tokens"}]
)
def test_a_lexical_source_trains(run, measure) -> None:
    trainer = run(LexicalConfig.model_validate({"type": "lexical", "measure": measure}))
    name = measure["type"]
    totals = [sum(sample["rewards"][name]) for sample in trainer.samples[0]]
    spans = [sum(reward for *_, reward in sample["spans"][name]) for sample in trainer.samples[0]]
    assert totals == pytest.approx(spans, abs=1e-5)
    assert any(totals)


# -- tools -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a policy that has half learnt to call the calculator."""
    from rlhf_kit.data.tool_tasks import tool_arithmetic
    from rlhf_kit.models.config import Scratch
    from rlhf_kit.models.loading import load_model, load_tokenizer

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Scratch.model_validate(
        {"type": "scratch", "vocabulary": "tool_arithmetic", "max_position_embeddings": 64, **shape}
    )
    model, tokenizer = load_model(config), load_tokenizer(config)
    rows = tool_arithmetic(200, terms=2, largest=9, seed=5)
    texts = [tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False) for row in rows]
    ids: Any = tokenizer(texts, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("caller")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("per_segment", ["sum", "mean"])
def test_a_span_on_what_a_tool_said_rewards_nothing(build, caller, per_segment) -> None:
    """Every word is a span of reward 1: the policy's own words earn it, those of the calculator do not."""
    source = LexicalConfig.model_validate(
        {
            "type": "lexical",
            "name": "words",
            "measure": {"type": "regex", "pattern": r"\S+"},
            "per_segment": per_segment,
        }
    )
    trainer = build(
        sources=[source],
        model={"path": caller},
        data={"type": "tool_arithmetic", "size": 64, "terms": 2, "largest": 9},
        tools=["calculator"],
        args={"per_device_train_batch_size": 32, "max_completion_length": 30, "max_steps": 1},
    )
    trainer.train()
    tools = 0
    for sample in trainer.samples[0]:
        has_text = [not token.startswith("<") and bool(token.strip()) for token in sample["tokens"]]
        own = [a and b for a, b in zip(sample["action_mask"], has_text, strict=True)]
        share = 1.0 if per_segment == "sum" else 1 / max(sum(own), 1)
        assert sample["rewards"]["words"] == pytest.approx([share * word for word in own])
        assert len(sample["spans"]["words"]) == sum(own)
        tools += sum(text and not action for text, action in zip(has_text, sample["action_mask"], strict=True))
    assert tools > 0


# -- too many failures -------------------------------------------------------------------------------------------------


class FaultyConfig(TextSourceConfig):
    """Fails in the given share of the rows of each rollout, in turn."""

    type: Literal["faulty"] = "faulty"
    shares: tuple[float, ...]

    def build(self, context) -> Faulty:
        return Faulty(self)


class Faulty(TextSource):
    def __init__(self, config: FaultyConfig) -> None:
        super().__init__(config)
        self.shares = list(config.shares)

    def judge(self, rollout: Rollout) -> Judged:
        failing = int(self.shares.pop(0) * len(rollout))
        ends = [Span(0, len(text), 1.0, self.name) for text in rollout.texts]
        return Judged([Status.FAILED] * failing + [[end] for end in ends[failing:]])


@pytest.mark.parametrize(
    ("shares", "rate", "ends"),
    [
        ((0.75, 0.75, 0.75, 0.0), 0.5, 3),
        ((0.75, 0.75, 0.25, 0.75, 0.75, 0.75), 0.5, 6),
        ((0.5, 0.5, 0.5, 0.5), 0.5, None),
        ((0.5, 0.5, 0.5), 0.25, 3),
        ((0.75, 0.75, 0.75), 1.0, None),
    ],
)
def test_a_run_stops_when_a_source_fails_too_often_in_three_rollouts_in_a_row(build, shares, rate, ends) -> None:
    trainer = build(sources=[FaultyConfig(shares=shares, max_failure_rate=rate)], args={"max_steps": len(shares)})
    if ends is None:
        trainer.train()
        assert len(trainer.batches) == len(shares)
        return
    with pytest.raises(RunError, match=rf"'faulty' failed in more than {rate:.0%} .* 3 rollouts in a row .*of 8 in"):
        trainer.train()
    assert len(trainer.batches) == ends - 1
    assert len(trainer.scoring.sources[0].shares) == len(shares) - ends
