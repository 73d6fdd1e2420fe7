"""Follow-up likelihoods are differences of mean log-probabilities of the user's next turn, computed one by one here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_kit.models.config import Lora, Pretrained
from rlhf_kit.models.loading import load_model, load_tokenizer
from rlhf_kit.rewards import RewardConfig
from rlhf_kit.rewards.config import BuildContext
from rlhf_kit.rewards.follow_up import FollowUpConfig, context_ids, read_follow_ups, turn_ids
from rlhf_kit.rollout import Rollout, Status, Text

torch.set_num_threads(1)
POLICY = Pretrained(path="policy")
SETS = {
    "thanks": {"positive": ["Thank you!", "good"], "negative": ["bad", "no, no", "I like it. no!"]},
    "story": {"positive": ["the story was good"], "negative": ["the story was bad"]},
}
PROMPTS: list[Text] = [
    "Is it good?",
    [{"role": "system", "content": "A B"}, {"role": "user", "content": "Is it?"}],
    "And?",
]
COMPLETIONS: list[Text] = ["Yes, the film was good.", [{"role": "assistant", "content": "No"}], ""]
CONTEXTS = [
    "<|user|>Is it good?<|end|><|assistant|>Yes, the film was good.<|end|><|user|>",
    "<|system|>A B<|end|><|user|>Is it?<|end|><|assistant|>No<|end|><|user|>",
    "<|user|>And?<|end|><|assistant|><|end|><|user|>",
]
EMPTY = [
    "<|user|>Is it good?<|end|><|assistant|><|end|><|user|>",
    "<|system|>A B<|end|><|user|>Is it?<|end|><|assistant|><|end|><|user|>",
    "<|user|>And?<|end|><|assistant|><|end|><|user|>",
]


def config(**fields: Any) -> FollowUpConfig:
    return TypeAdapter(RewardConfig).validate_python({"type": "follow_up", **fields})


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("sets") / "sets.json"
    path.write_text(json.dumps(SETS))
    return str(path)


@pytest.fixture
def context(talker: Path) -> BuildContext:
    config = Pretrained(path=str(talker))
    return BuildContext(load_model(config), config, 1.0, torch.device("cpu"), tokenizer=load_tokenizer(config))


@pytest.fixture
def rollout() -> Rollout:
    mask, prompt = torch.ones(3, 2).bool(), torch.zeros(3, 1).long()
    columns = {"next": ["Thank you!", {"role": "user", "content": "bad film"}, None]}
    return Rollout(PROMPTS, COMPLETIONS, prompt, prompt.bool(), mask.long(), mask, mask, columns=columns)


@pytest.fixture
def mean_lp(talker: Path) -> Any:
    """The mean log-probability of a text's tokens behind a context, by a plain forward over both."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(talker), AutoTokenizer.from_pretrained(talker)

    def mean(before: str, text: str) -> float:
        start, end = (tokenizer(part)["input_ids"] for part in (before, text))
        with torch.no_grad():
            log_probs = model(torch.tensor([start + end])).logits[0].log_softmax(1)
        return fmean(log_probs[len(start) + place - 1, token].item() for place, token in enumerate(end))

    return mean


def test_the_reward_is_the_mean_over_aspects_of_the_difference(
    context: BuildContext, rollout: Rollout, sets: str, mean_lp: Any
) -> None:
    rewards = config(follow_ups=sets, batch_size=2).build(context).score(rollout)
    by_aspect = {
        aspect: [
            fmean(mean_lp(before, text) for text in own["positive"])
            - fmean(mean_lp(before, text) for text in own["negative"])
            for before in CONTEXTS
        ]
        for aspect, own in SETS.items()
    }
    expected = [fmean(values) for values in zip(*by_aspect.values(), strict=True)]
    assert rewards.tokens[:, 0].tolist() == [0, 0, 0]
    assert rewards.tokens[:, 1].tolist() == pytest.approx(expected, abs=1e-4)
    assert rewards.metrics == pytest.approx({name: fmean(values) for name, values in by_aspect.items()}, abs=1e-4)
    one = config(follow_ups=sets, aspects=["story"]).build(context).score(rollout)
    assert one.tokens[:, 1].tolist() == pytest.approx(by_aspect["story"], abs=1e-4)


def test_swapping_the_signs_of_the_sets_turns_the_reward_round(
    context: BuildContext, rollout: Rollout, sets: str, tmp_path: Path
) -> None:
    swapped = {name: {"positive": s["negative"], "negative": s["positive"]} for name, s in SETS.items()}
    (tmp_path / "swapped.json").write_text(json.dumps(swapped))
    there = config(follow_ups=sets).build(context).score(rollout).tokens
    back = config(follow_ups=str(tmp_path / "swapped.json")).build(context).score(rollout).tokens
    torch.testing.assert_close(there, -back, atol=1e-5, rtol=0)
    assert there.abs().max() > 0.01


def test_the_real_next_turn_counts_against_the_same_prompt_without_an_answer(
    context: BuildContext, rollout: Rollout, mean_lp: Any
) -> None:
    rewards = config(column="next").build(context).score(rollout)
    turns = ["Thank you!", "bad film"]
    rows = zip(CONTEXTS, EMPTY, turns, strict=False)
    expected = [mean_lp(after, turn) - mean_lp(before, turn) for after, before, turn in rows]
    assert rewards.tokens[:2, 1].tolist() == pytest.approx(expected, abs=1e-4)
    assert rewards.status.tolist() == [Status.OK, Status.OK, Status.NOT_APPLICABLE]
    with pytest.raises(ValueError, match="no column 'reply' with the user's next turn \\(it has: next\\)"):
        config(column="reply").build(context).score(rollout)


def test_a_conversation_that_does_not_fit_is_missing(context: BuildContext, rollout: Rollout, sets: str) -> None:
    long = replace(rollout, prompts=[PROMPTS[0], "Is it good? " * 300, PROMPTS[2]])
    whole = config(follow_ups=sets).build(context).score(rollout)
    rewards = config(follow_ups=sets).build(context).score(long)
    assert rewards.status.tolist() == [Status.OK, Status.FAILED, Status.OK]
    torch.testing.assert_close(rewards.tokens[::2], whole.tokens[::2], atol=1e-5, rtol=0)
    assert rewards.tokens[1].tolist() == [0, 0]


@pytest.mark.parametrize("frozen", [True, False])
def test_the_policy_reads_with_its_initial_weights_unless_it_is_not_frozen(
    talker: Path, rollout: Rollout, sets: str, frozen: bool
) -> None:
    model = Pretrained(path=str(talker), peft=Lora(r=2))
    policy: Any = load_model(model)
    where = BuildContext(policy, model, 1.0, torch.device("cpu"), tokenizer=load_tokenizer(model))
    source = config(follow_ups=sets, frozen=frozen).build(where)
    own = config(follow_ups=sets, model={"path": str(talker)}).build(where)
    before = source.score(rollout).tokens
    torch.testing.assert_close(before, own.score(rollout).tokens, atol=1e-5, rtol=0)
    policy.train()
    policy.gradient_checkpointing_enable()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.2)
    after = source.score(rollout).tokens
    assert torch.allclose(before, after, atol=1e-5) == frozen
    assert policy.training


def test_a_context_ends_where_the_next_turn_begins(talker: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker)
    for prompt, completion, text in zip(PROMPTS, COMPLETIONS, CONTEXTS, strict=True):
        assert tokenizer.decode(context_ids(tokenizer, prompt, completion)) == text
    assert tokenizer.decode(turn_ids(tokenizer, "Yes")) == "Yes"
    tokenizer.chat_template = None
    text = tokenizer.decode(context_ids(tokenizer, PROMPTS[0], COMPLETIONS[0]))
    assert text == "User: Is it good?\n\nAssistant: Yes, the film was good.\n\nUser:"
    assert tokenizer.decode(turn_ids(tokenizer, "Yes")) == " Yes"


def test_a_completion_cannot_spell_the_users_thanks(talker: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker)
    ids = context_ids(tokenizer, "And?", "No<|end|><|user|>Thank you!")
    special = [tokenizer.decode([token]) for token in ids if token in tokenizer.added_tokens_decoder]
    assert special == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>", "<|user|>"]
    tokenizer.chat_template = None
    text = tokenizer.decode(context_ids(tokenizer, "And?", "No\n\nUser: Thank you!\n\nAssistant: Yes"))
    assert text == "User: And?\n\nAssistant: No\n\n> User: Thank you!\n\n> Assistant: Yes\n\nUser:"


def test_the_kits_follow_ups_are_six_aspects_of_ten_against_ten() -> None:
    found = read_follow_ups(None)
    assert len(found) == 6
    texts = [text for own in found.values() for text in (*own.positive, *own.negative)]
    assert len(set(texts)) == len(texts) == 120
    assert all(len(own.positive) == len(own.negative) == 10 for own in found.values())


def test_what_cannot_work_is_said_before_anything_is_loaded(sets: str, tmp_path: Path) -> None:
    assert list(config().problems(POLICY, [])) == []
    (problem,) = config(aspects=["helpfull", "clear"]).problems(POLICY, [])
    assert problem.path == "aspects" and "did you mean 'helpful'" in problem.remedy
    paths = [problem.path for problem in config(column="c", follow_ups=sets).problems(POLICY, [])]
    assert paths == ["column"]
    (problem,) = config(frozen=False, model={"path": "m"}).problems(POLICY, [])
    assert problem.path == "frozen"
    (tmp_path / "broken.json").write_text('{"a": {"positive": []}}')
    (problem,) = config(follow_ups=str(tmp_path / "broken.json")).problems(POLICY, [])
    assert problem.path == "follow_ups"
    assert [path for path, _, _ in config(follow_ups=sets, model={"path": "m"}).files()] == ["follow_ups", "model.path"]
