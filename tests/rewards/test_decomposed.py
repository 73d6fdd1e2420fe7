"""Segment rewards learnt from the scores of whole completions: what they recover, and whose weights learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch
from peft import PeftModel

from rlhf_kit.models.adapters import adapter_parameters
from rlhf_kit.models.config import Pretrained, Scratch
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rewards.decomposed import Decomposed, DecomposedConfig, sample_segments, segment_sums
from rlhf_kit.rewards.function import FunctionConfig
from rlhf_kit.rewards.turns import TurnsConfig
from rlhf_kit.rewards.verifier import VerifierConfig
from rlhf_kit.rollout import Rollout, Status
from rlhf_kit.trainers.rollouts import decoded

LORA = {"type": "lora", "r": 2}
WORDS = tuple("abcdefgh")
STEPS = {"by": "step", "pattern": " "}
LENGTH = 6


def config(**fields: Any) -> DecomposedConfig:
    return DecomposedConfig.model_validate({"type": "decomposed", "segments": STEPS, **fields})


@pytest.fixture(scope="module")
def words_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a one-layer model over eight words."""
    made = Scratch(
        type="scratch",
        vocabulary=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        config={"initializer_range": 0.3},
    )
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("words"))
    load_model(made).save_pretrained(folder)
    load_tokenizer(made).save_pretrained(folder)
    return folder


@pytest.fixture
def words(words_path: str) -> Callable[..., BuildContext]:
    """What a source is built with, for that model; keyword arguments configure the policy."""

    def make(**model: Any) -> BuildContext:
        policy = Pretrained.model_validate({"path": words_path, **model})
        return BuildContext(load_model(policy), policy, 1.0, torch.device("cpu"), {}, load_tokenizer(policy))

    return make


def completions(context: BuildContext, texts: list[str], **fields: Any) -> Rollout:
    """A rollout of these words, each row ended by an end-of-sequence token."""
    tokenizer: Any = context.tokenizer
    ids = [[*tokenizer.convert_tokens_to_ids(text.split()), tokenizer.eos_token_id] for text in texts]
    width = max(map(len, ids))
    mask = torch.tensor([[place < len(row) for place in range(width)] for row in ids])
    padded = torch.tensor([[*row, *[tokenizer.pad_token_id] * (width - len(row))] for row in ids])
    rollout = Rollout(
        prompts=["a"] * len(texts),
        completions=texts,
        prompt_ids=padded[:, :1].clone().fill_(tokenizer.convert_tokens_to_ids("a")),
        prompt_mask=torch.ones(len(texts), 1, dtype=torch.bool),
        completion_ids=padded,
        completion_mask=mask,
        action_mask=mask,
        micro_batch_size=len(texts),
        **fields,
    )
    return decoded(tokenizer, rollout)


def valued(context: BuildContext, rows: int, seed: int) -> tuple[Rollout, torch.Tensor]:
    """Completions of random words, and the value (rows, words) of each word; the values are the same for any seed."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(WORDS), (rows, LENGTH), generator=generator)
    values = torch.tensor([0.3, -1.0, 0.9, -0.4, 0.7, -0.7, 1.0, -0.1])[picks]
    return completions(context, [" ".join(WORDS[pick] for pick in row) for row in picks.tolist()]), values


def fit(source: Decomposed, rollout: Rollout, scores: torch.Tensor, updates: int, rate: float = 1e-2) -> list[float]:
    """Train the source as the trainer does; gives the losses."""
    parameters = source.trainable_parameters()
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    losses = []
    for step in range(updates):
        loss = source.loss(replace(rollout, step=step), scores).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def correlation(source: Decomposed, context: BuildContext) -> float:
    """Of learnt and true values of words, on completions that it has not seen."""
    rollout, values = valued(context, 64, seed=1)
    learnt = source.score(rollout).tokens[:, :LENGTH]
    return torch.corrcoef(torch.stack([learnt.flatten(), values.flatten()]))[0, 1].item()


# --- what it recovers ---


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
def test_the_values_of_segments_are_recovered_from_their_sums(words, peft) -> None:
    context = words(peft=peft)
    source = config().build(context)
    rollout, values = valued(context, 64, seed=0)
    losses = fit(source, rollout, values.sum(dim=1), updates=80, rate=2e-2 if peft else 1e-2)
    assert losses[-1] < 0.05 * losses[0]
    assert correlation(source, context) > 0.9


def test_sampled_segments_recover_less_for_they_prefer_rewards_that_are_alike(words) -> None:
    context, spreads = words(), []
    rollout, values = valued(context, 64, seed=0)
    for sampled in (None, 3):
        source = config(sampled=sampled).build(context)
        fit(source, rollout, values.sum(dim=1), updates=80)
        assert correlation(source, context) > 0.4
        spreads.append(source.score(rollout).tokens[:, :LENGTH].std(dim=1).mean())
    assert spreads[1] < 0.8 * spreads[0]


def test_a_local_signal_says_how_a_sum_is_divided(words) -> None:
    """All completions have the same score, which alone would give every segment the same reward."""
    context = words()
    rollout, values = valued(context, 64, seed=0)
    local = torch.nn.functional.pad(values, (0, 1))
    local[1::2] = torch.nan  # the other source judged every second row
    given = replace(rollout, rewards={"judge": local})
    scores = torch.full((64,), 0.5)
    alone, shaped = config().build(context), config(local={"source": "judge", "weight": 2.0}).build(context)
    fit(alone, given, scores, updates=30)
    losses = fit(shaped, given, scores, updates=60)
    assert correlation(shaped, context) > 0.6 > correlation(alone, context)
    assert all(loss > 0 for loss in losses)


def test_the_local_signal_is_what_a_source_gave_to_a_segment_and_what_follows_it(words) -> None:
    rollout = completions(words(), ["a b c", "d", ""])
    segments = [config().segments.ranges(rollout, row) for row in range(3)]
    tokens = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]])
    assert segment_sums(tokens, rollout, segments).tolist() == [[1.0, 2.0, 12.0], [3.0, 0.0, 0.0], [5.0, 0.0, 0.0]]
    tokens[0, 1] = torch.nan
    assert segment_sums(tokens, rollout, segments)[0].isnan().all()
    assert segment_sums(tokens, rollout, segments)[1].tolist() == [3.0, 0.0, 0.0]


def test_the_loss_adds_both_targets(words) -> None:
    """Before anything is learnt every reward is 0."""
    context = words()
    rollout = completions(context, ["a b c", "d", ""])
    scores = torch.tensor([0.5, 1.0, 1.0])
    plain = config().build(context)
    assert plain.loss(rollout, scores).tolist() == pytest.approx([0.25, 1.0, 0.0])
    given = {"judge": torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 0.0, 0.0], [5.0, 0.0, 0.0, 0.0]])}
    shaped = config(local={"source": "judge", "weight": 0.5}).build(context)
    expected = [0.25 + 0.5 * (1 + 4 + 144) / 3, 1.0 + 0.5 * 9, 0.0]
    assert shaped.loss(replace(rollout, rewards=given), scores).tolist() == pytest.approx(expected)


# --- what it gives ---


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
def test_every_reward_is_0_before_it_has_learnt(words, peft) -> None:
    context = words(peft=peft)
    rewards = config().build(context).score(completions(context, ["a b c", "d", ""]))
    assert (rewards.tokens == 0).all()
    assert rewards.tokens.dtype == torch.float32
    assert rewards.status.tolist() == [Status.OK] * 3


def learnt(context: BuildContext, **fields: Any) -> Decomposed:
    """A source with a head that is not 0."""
    source = config(**fields).build(context)
    with torch.no_grad():
        source.head.linear.weight.normal_(generator=torch.Generator().manual_seed(0))
        source.head.linear.bias.fill_(0.5)
    return source


def test_a_segments_reward_lies_on_its_last_token(words) -> None:
    context = words()
    rollout = completions(context, ["a b c d", "e f", ""])
    rewards = learnt(context, segments={"by": "step", "pattern": "(?<=b) |(?<=d) "}).score(rollout)
    assert [[bool(reward) for reward in row] for row in rewards.tokens.tolist()] == [
        [False, True, False, True, False],
        [False, True, False, False, False],
        [False, False, False, False, False],
    ]
    assert [[(span.start, span.end) for span in row] for row in rewards.spans] == [[(0, 3), (4, 7)], [(0, 3)], []]
    assert [[span.reward for span in row] for row in rewards.spans] == [
        [rewards.tokens[0, 1].item(), rewards.tokens[0, 3].item()],
        [rewards.tokens[1, 1].item()],
        [],
    ]
    assert rewards.metrics == {"segments": 1.0}


def test_it_reads_the_completion_up_to_the_segments_end_and_no_further(words) -> None:
    context = words()
    source = learnt(context)
    first = source.score(completions(context, ["a b c d"])).tokens[0]
    second = source.score(completions(context, ["a b d d"])).tokens[0]
    torch.testing.assert_close(first[:2], second[:2])
    assert (first[2:4] - second[2:4]).abs().min() > 1e-3


def test_what_the_policy_did_not_write_is_no_segment(words) -> None:
    context = words()
    rollout = completions(context, ["a b c"])
    rollout = replace(rollout, action_mask=torch.tensor([[True, False, True, True]]))
    source = learnt(context)
    rewards = source.score(rollout)
    assert rewards.tokens[0, 1] == 0
    assert rewards.metrics == {"segments": 2.0}
    total = rewards.tokens.sum()
    assert source.loss(rollout, torch.tensor([1.0])).item() == pytest.approx(((total - 1) ** 2).item(), rel=1e-5)


def test_rows_are_read_in_micro_batches(words) -> None:
    context = words()
    rollout, source = completions(context, ["a b c", "d", "e f", "g h a"]), learnt(context)
    whole = source.score(rollout).tokens
    torch.testing.assert_close(source.score(replace(rollout, micro_batch_size=3)).tokens, whole)
    assert whole.any(dim=1).all()


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
def test_a_rollout_without_any_segment_has_a_loss_that_moves_nothing(words, peft) -> None:
    context = words(peft=peft)
    source = learnt(context)
    rollout = completions(context, ["", ""])
    for parameter in source.trainable_parameters():
        parameter.requires_grad_(True)
    loss = source.loss(rollout, torch.tensor([1.0, 0.0]))
    assert loss.tolist() == [0.0, 0.0]
    loss.sum().backward()
    assert not any(p.grad is not None and p.grad.any() for p in source.trainable_parameters())
    assert (source.score(rollout).tokens == 0).all()


# --- which segments are drawn ---


def test_every_choice_of_segments_is_equally_likely(words) -> None:
    rollout = completions(words(), ["a b c d"])
    present = torch.tensor([[True, True, False, True, True]])
    drawn = Counter(
        tuple(sample_segments(replace(rollout, step=step), present, 2)[0].nonzero().flatten().tolist())
        for step in range(1200)
    )
    assert set(drawn) == set(combinations((0, 1, 3, 4), 2))
    assert all(abs(count - 200) < 60 for count in drawn.values())  # a standard deviation is 13


def test_the_draw_follows_from_the_row_and_the_step(words) -> None:
    rollout = completions(words(), ["a b c d e f g h", "h g f e d c b a"])
    present = torch.ones(2, 8, dtype=torch.bool)
    drawn = sample_segments(rollout, present, 4)
    assert drawn.sum(dim=1).tolist() == [4, 4]
    assert torch.equal(sample_segments(rollout.rows(1, 2), present[1:], 4)[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(sample_segments(replace(rollout, step=1), present, 4), drawn)
    assert torch.equal(sample_segments(rollout, present, 9), present)


# --- whose weights learn ---


@pytest.mark.parametrize("peft", [None, LORA], ids=["whole", "lora"])
@pytest.mark.parametrize("body", ["trained", "frozen"])
def test_the_loss_reaches_the_sources_parameters_alone(words, peft, body) -> None:
    context = words(peft=peft)
    source = learnt(context, body=body)
    own, policy = source.trainable_parameters(), context.policy
    assert not any(parameter.requires_grad for parameter in own)  # whoever steps it turns them on
    rollout, values = valued(context, 8, seed=0)
    with torch.no_grad():
        before = policy(input_ids=rollout.completion_ids).logits
    for parameter in policy.parameters():
        parameter.requires_grad_(True)  # as if the policy itself were being trained
    for parameter in own:
        parameter.requires_grad_(True)
    source.loss(rollout, values.sum(dim=1)).sum().backward()
    mine = {id(parameter) for parameter in own}
    base = {id(p) for n, p in policy.named_parameters() if "lora_" not in n and "default" not in n}
    touched = [n for n, p in policy.named_parameters() if id(p) not in mine and p.grad is not None]
    if peft is None:
        assert touched == []
    else:  # the base is frozen by whoever trains adapters; the policy's own adapter has no part in this
        assert all(id(dict(policy.named_parameters())[name]) in base for name in touched)
        adapter = adapter_parameters(policy, "decomposed") if body == "trained" else []
        assert mine == {id(parameter) for parameter in (*adapter, *source.head.parameters())}
    moved = [parameter for parameter in own if parameter.grad is not None and parameter.grad.any()]
    assert (len(moved) > 2) == (body == "trained")
    with torch.no_grad():
        for parameter in own:
            parameter.add_(0.1)
        assert torch.equal(policy(input_ids=rollout.completion_ids).logits, before)


def test_without_lora_its_body_is_a_copy_of_the_policy_in_full_precision(words) -> None:
    context = words(dtype="bfloat16")
    trained, frozen = config().build(context), config(body="frozen").build(context)
    assert {parameter.dtype for parameter in trained.trainable_parameters()} == {torch.float32}
    assert [tuple(p.shape) for p in frozen.trainable_parameters()] == [(1, 16), (1,)]
    assert next(frozen.body.module.parameters()).dtype == torch.bfloat16
    rollout = completions(context, ["a b c", "d"])
    frozen.head.linear.weight.data.fill_(0.1)
    assert frozen.score(rollout).tokens.dtype == torch.float32


def test_with_lora_it_reads_the_policys_base_with_its_own_adapter(words) -> None:
    context = words(peft=LORA)
    policy = context.policy
    assert isinstance(policy, PeftModel)
    source, frozen = learnt(context), learnt(context, name="other", body="frozen")
    rollout = completions(context, ["a b c", "d"])
    assert torch.equal(source.score(rollout).tokens, frozen.score(rollout).tokens)
    before = frozen.score(rollout).tokens
    with torch.no_grad():
        for parameter in adapter_parameters(policy, "decomposed"):
            parameter.add_(0.3)
        for parameter in adapter_parameters(policy, "default"):
            parameter.add_(0.3)
    assert torch.equal(frozen.score(rollout).tokens, before)
    assert (source.score(rollout).tokens - before).abs().max() > 1e-3
    assert policy.active_adapter == "default"


# --- what a recipe may say ---


POLICY = Pretrained(path="policy")
VERIFIER = VerifierConfig.model_validate({"type": "verifier", "verifier": "exact"})
TURNS = TurnsConfig(type="turns")
UNBOUNDED = FunctionConfig.model_validate({"type": "function", "function": "length"})


def problems(source: DecomposedConfig, before: tuple = (VERIFIER,), after: tuple = (), policy: Any = POLICY) -> list:
    return [(p.path, p.message) for p in source.problems(policy, [*before, source, *after])]


def test_a_sound_recipe_has_no_problems() -> None:
    assert problems(config()) == []
    assert problems(config(local={"source": "turns"}), (VERIFIER, TURNS)) == []


@pytest.mark.parametrize(
    ("fields", "sources", "path"),
    [
        ({}, {"before": (UNBOUNDED,)}, "online"),
        ({"segments": {"by": "completion"}}, {}, "segments.by"),
        ({"segments": {"by": "turn", "pattern": "x"}}, {}, "segments.pattern"),
        ({"local": {"source": "turns"}}, {}, "local.source"),
        ({"local": {"source": "decomposed"}}, {}, "local.source"),
        ({"local": {"source": "verifier"}}, {}, "local.source"),
        ({"local": {"source": "turns"}}, {"after": (TURNS,)}, "local.source"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(fields, sources, path) -> None:
    assert [found for found, _ in problems(config(**fields), **sources)] == [path]


def test_a_policy_without_weights_to_start_from_is_refused(words_path) -> None:
    scratch = Scratch(type="scratch", vocabulary=WORDS)
    assert [path for path, _ in problems(config(), policy=scratch)] == [""]
