"""Segment models reward the right tokens of a policy that has another tokenizer.

The classifiers here are set by hand: a one-layer Llama whose attention and MLP write nothing, so that the logits at a
token depend on that token's id alone, and are known.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

from rlhf_kit.credit.spans import token_offsets
from rlhf_kit.errors import RunError
from rlhf_kit.models.config import Pretrained
from rlhf_kit.models.tokenizers import word_level_tokenizer
from rlhf_kit.rewards.segment_model import SEGMENT_RECORD, SegmentModelConfig
from rlhf_kit.rewards.text import Segments
from rlhf_kit.rollout import Rollout, Status

WORDS = ("the", "film", "was", "good", "bad", "story", "I", "like", "it", "and", ".", ",", "Who", "?")
WIDTH = 32
UNK = 3


def by_hand(head: Mapping[str, Sequence[float]], names: Sequence[str], folder: Path, sequences: bool = False) -> str:
    """A saved classifier with the logits of `head` on each word, and 0 on the others."""
    tokenizer = word_level_tokenizer(WORDS)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=16,
        pad_token_id=0,
        rms_norm_eps=0.0,
        id2label=dict(enumerate(names)),
        label2id={name: k for k, name in enumerate(names)},
    )
    model: Any = LlamaForSequenceClassification(config) if sequences else LlamaForTokenClassification(config)
    with torch.no_grad():
        layer = model.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(len(tokenizer), WIDTH))
        model.score.weight.zero_()
        if model.score.bias is not None:
            model.score.bias.zero_()
        for word, logits in head.items():  # a one-hot vector comes out of the norm as its place times sqrt(width)
            model.score.weight[:, tokenizer.convert_tokens_to_ids(word)] = torch.tensor(logits) / WIDTH**0.5
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def critic(tmp_path: Path) -> Callable[..., str]:
    """Folder of a classifier of `none` and `bad` with logits 0 and 2 on the word "bad", 0 and -2 on "good"."""

    def make(record: Any = None, name: str = "critic", **options: Any) -> str:
        head = options.pop("head", {"bad": (0.0, 2.0), "good": (0.0, -2.0)})
        folder = by_hand(head, options.pop("names", ("none", "bad")), tmp_path / name, **options)
        if record is not None:
            (tmp_path / name / SEGMENT_RECORD).write_text(json.dumps(record))
        return folder

    return make


@pytest.fixture
def policy_tokenizer(talker: Path) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(talker)


@pytest.fixture
def sampled(policy_tokenizer: Any) -> Callable[..., Rollout]:
    """A rollout of texts as the policy's tokenizer writes them, each closed by its end-of-sequence token."""

    def make(*texts: str, prompts: Sequence[Any] | None = None) -> Rollout:
        rows = [policy_tokenizer(text)["input_ids"] + [policy_tokenizer.eos_token_id] for text in texts]
        width = max(map(len, rows))
        mask = torch.tensor([[k < len(row) for k in range(width)] for row in rows])
        pad = policy_tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        return Rollout(
            prompts=list(prompts or [""] * len(texts)),
            completions=list(texts),
            prompt_ids=torch.zeros(len(texts), 1, dtype=torch.long),
            prompt_mask=torch.ones(len(texts), 1, dtype=torch.bool),
            completion_ids=ids,
            completion_mask=mask,
            action_mask=mask,
            texts=list(texts),
            offsets=[token_offsets(policy_tokenizer, row) for row in ids.tolist()],
        )

    return make


def build(path: str, **fields: Any) -> Any:
    config = SegmentModelConfig.model_validate({"type": "segment_model", "path": path, **fields})
    return config.build(SimpleNamespace(device=torch.device("cpu")))  # type: ignore[arg-type]


def rewarded(source: Any, rollout: Rollout) -> list[list[tuple[str, float]]]:
    """For each row the text of each token with a reward, and the reward."""
    tokens = source.score(rollout).tokens
    assert tokens.dtype == torch.float32 and tokens.shape == rollout.action_mask.shape
    return [
        [
            (text[slice(*offsets[k])], round(value, 5))
            for k, value in enumerate(row.tolist())
            if value != 0 and rollout.action_mask[r, k]
        ]
        for r, (text, offsets, row) in enumerate(zip(rollout.texts, rollout.offsets, tokens, strict=True))
    ]


TOKEN = {"segments": {"by": "token"}, "labels": {"bad": -1.0}}
SENTENCE = {"segments": {"by": "sentence"}, "labels": {"bad": -1.0}}


def probability(logit: float) -> float:
    return torch.sigmoid(torch.tensor(logit)).item()


# --- which tokens ---


def test_a_word_of_the_model_is_rewarded_on_the_policys_tokens_of_it(critic, sampled, policy_tokenizer) -> None:
    rollout = sampled("the film was bad.", "bad", "I like it")
    assert [policy_tokenizer.tokenize(text) for text in ("the film was bad.", "bad")] != [
        ["the film was bad."],
        ["bad"],
    ]
    source = build(critic(), output="labels", placement="spread", **TOKEN)
    assert [sum(value for _, value in row) for row in rewarded(source, rollout)] == [-1.0, -1.0, 0]
    for row, text in zip(rewarded(source, rollout), rollout.texts, strict=True):
        assert "".join(part for part, _ in row).strip() == ("bad" if "bad" in text else "")


def test_the_policys_tokenizer_does_not_matter_to_the_sum(critic, sampled) -> None:
    rollout = sampled("the film was bad, and I like it. bad story", "good")
    characters = replace(  # as if every character were a token
        rollout.rows(0, 1),
        completion_ids=torch.zeros(1, 42, dtype=torch.long),
        completion_mask=torch.ones(1, 42, dtype=torch.bool),
        action_mask=torch.ones(1, 42, dtype=torch.bool),
        offsets=[[(k, k + 1) for k in range(42)]],
    )
    for placement in ("end", "spread", "start"):
        source = build(critic(), placement=placement, **TOKEN)
        torch.testing.assert_close(source.score(characters).tokens.sum(), source.score(rollout).tokens[0].sum())
    ends = build(critic(), output="labels", **TOKEN).score(characters).tokens[0]
    text = rollout.texts[0]
    assert len(text) == 42
    assert [text[k - 2 : k + 1] for k in ends.nonzero().flatten().tolist()] == ["bad", "bad"]


def test_a_segment_is_judged_at_its_last_token_and_rewarded_there(critic, sampled) -> None:
    rollout = sampled("I like it bad. it was bad and good", "good.  bad")
    source = build(critic(), output="labels", labels={"none": 1.0, "bad": -1.0}, segments={"by": "sentence"})
    assert rewarded(source, rollout)[0] == [(".", 1.0), (" good", 1.0)]
    assert [value for _, value in rewarded(source, rollout)[1]] == [1.0, -1.0]
    assert all(part.endswith(("bad", ".")) for part, _ in rewarded(source, rollout)[1])


def test_text_that_the_policy_did_not_write_earns_nothing(critic, sampled) -> None:
    rollout = sampled("bad and bad")
    mask = rollout.action_mask.clone()
    mask[0] = torch.tensor([start >= 3 for start, _ in rollout.offsets[0]])
    source = build(critic(), output="labels", per_segment="mean", **TOKEN)
    tokens = source.score(replace(rollout, action_mask=mask)).tokens
    assert torch.all(tokens[~mask] == 0)
    assert tokens.sum().item() == pytest.approx(-1 / 2)  # "and" and the second "bad" are two tokens of the model's


def test_a_completion_without_text_has_no_segments(critic, sampled) -> None:
    rollout = sampled("", "  ", "bad")
    for segments in ("token", "sentence", "completion"):
        result = build(critic(), labels={"bad": -1.0}, segments={"by": segments}).score(rollout)
        assert result.status.tolist() == [Status.OK] * 3
        assert result.tokens[:2].abs().sum() == 0 and result.tokens[2].sum() < 0


# --- which value ---


def test_probabilities_labels_and_logits(critic, sampled) -> None:
    rollout = sampled("bad", "good", "film")
    path = critic()

    def sums(**fields: Any) -> list[float]:
        return build(path, **{**SENTENCE, **fields}).score(rollout).tokens.sum(dim=1).tolist()

    assert sums() == pytest.approx([-probability(2), -probability(-2), -0.5], abs=1e-5)
    assert sums(labels={"none": 0.3, "bad": -0.5})[0] == pytest.approx(0.3 * probability(-2) - 0.5 * probability(2))
    assert sums(output="labels", labels={"none": 0.3, "bad": -0.5})[:2] == pytest.approx([-0.5, 0.3])
    assert sums(output="logits") == pytest.approx([-2.0, 2.0, 0.0], abs=1e-5)


def test_normalisation_is_affine_in_each_segments_value(critic, sampled) -> None:
    rollout = sampled("bad. good")
    norm = {"mean": -1.0, "std": 4.0, "scale": 0.3, "shift": 0.1}
    spans = build(critic(), output="logits", normalization=norm, **SENTENCE).score(rollout).spans[0]
    # The full stop is the first sentence's last token, and its logits are 0.
    assert [span.reward for span in spans] == pytest.approx(
        [0.3 * (0 + 1) / 4 + 0.1, 0.3 * (2 + 1) / 4 + 0.1], abs=1e-5
    )


def test_the_mean_over_segments_takes_the_gain_from_writing_more(critic, sampled) -> None:
    rollout = sampled("good", "good good good")
    fields = {"labels": {"none": 1.0}, "segments": {"by": "token"}, "output": "labels"}
    assert build(critic(), **fields).score(rollout).tokens.sum(dim=1).tolist() == [1.0, 3.0]
    mean = build(critic(), per_segment="mean", **fields).score(rollout).tokens.sum(dim=1)
    assert mean.tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize(("per_segment", "expected"), [("sum", -2.0), ("mean", -2 / 3)])
def test_a_completions_score_is_one_outcome_on_the_last_action_token(critic, sampled, per_segment, expected) -> None:
    rollout = sampled("bad and bad", "good")
    source = build(critic(), level="completion", output="labels", per_segment=per_segment, **TOKEN)
    tokens = source.score(rollout).tokens
    assert source.kind == "outcome" and build(critic(), **TOKEN).kind == "process"
    last = int(rollout.action_mask[0].sum()) - 1
    assert tokens[0, last].item() == pytest.approx(expected)
    assert tokens.count_nonzero() == 1


def test_several_models_add_up(critic, sampled) -> None:
    rollout = sampled("the film was bad, and the story was good")
    first = build(critic(), output="labels", **TOKEN)
    likes = critic(name="likes", head={"good": (0.0, 9.0), "bad": (0.0, 9.0)}, names=("none", "felt"))
    second = build(likes, output="labels", labels={"felt": 0.25}, segments={"by": "token"})
    total = first.score(rollout).tokens + second.score(rollout).tokens
    places = {rollout.texts[0][slice(*rollout.offsets[0][k])].strip(): v for k, v in enumerate(total[0].tolist()) if v}
    assert places == {"bad": pytest.approx(-0.75), "good": pytest.approx(0.25)}


# --- other models ---


def test_a_sequence_classifier_reads_up_to_the_segments_end(critic, sampled) -> None:
    rollout = sampled("it was bad. film", "good")
    head = {".": (0.0, 5.0), "film": (0.0, 3.0), "good": (0.0, -1.0)}
    source = build(critic(head=head, sequences=True), output="logits", labels={"bad": 1.0}, segments={"by": "sentence"})
    assert [[span.reward for span in row] for row in source.score(rollout).spans] == [
        pytest.approx([5.0, 3.0], abs=1e-4),
        pytest.approx([-1.0], abs=1e-4),
    ]


def test_one_label_alone_is_a_score_of_its_own(critic, sampled) -> None:
    path = critic(head={"good": (0.5,), "bad": (-0.5,)}, names=("score",), sequences=True)
    rollout = sampled("good", "bad")
    fields = {"labels": {"score": 1.0}, "segments": {"by": "completion"}}

    def sums(output: str) -> list[float]:
        return build(path, output=output, **fields).score(rollout).tokens.sum(dim=1).tolist()

    assert sums("logits") == pytest.approx([0.5, -0.5], abs=1e-4)
    assert sums("probabilities") == pytest.approx([probability(0.5), probability(-0.5)], abs=1e-4)
    assert sums("labels") == [1.0, 0.0]


def test_it_cuts_and_reads_prompts_as_it_was_trained(critic, sampled) -> None:
    record = {"segments": {"by": "completion"}, "prompt_template": "{prompt} ,"}
    rollout = sampled("it was bad", prompts=[[{"role": "user", "content": "Who ?"}]])
    source = build(critic(record), labels={"bad": -1.0})
    (spans,) = source.score(rollout).spans
    assert [(span.start, span.end) for span in spans] == [(0, 10)]
    read: list[tuple[str, str]] = []
    classify = source._classifier.__class__.__call__

    def listen(self: Any, prompts: Any, texts: Any, *args: Any) -> Any:
        read.extend(zip(prompts, texts, strict=True))
        return classify(self, prompts, texts, *args)

    source._classifier.__class__.__call__ = listen
    try:
        source.score(rollout)
        build(critic(record), labels={"bad": -1.0}, prompt_template="Q {prompt}").score(rollout)
    finally:
        source._classifier.__class__.__call__ = classify
    assert read == [("Who ? ,", "it was bad"), ("Q Who ?", "it was bad")]


def test_rows_are_judged_alike_alone_and_in_a_batch(critic, sampled) -> None:
    rollout = sampled("bad", "the film was bad and good", "", "it was good, and bad")
    together = build(critic(), batch_size=3, **TOKEN).score(rollout).tokens
    alone = [build(critic(), batch_size=1, **TOKEN).score(rollout.rows(k, k + 1)).tokens[0] for k in range(4)]
    torch.testing.assert_close(together, torch.stack(alone))


# --- what goes wrong ---


def test_a_text_longer_than_the_models_positions_has_failed_and_is_warned_of(critic, sampled, caplog) -> None:
    rollout = sampled("bad " * 16 + "bad", "bad " * 15 + "bad", prompts=["", ""])
    for level in ("segment", "completion"):
        source = build(critic(), output="labels", level=level, **TOKEN)
        with caplog.at_level(logging.WARNING):
            result = source.score(rollout)
        assert result.status.tolist() == [Status.FAILED, Status.OK]
        assert result.tokens.sum(dim=1).tolist() == [0.0, -16.0]
        assert "1 of 2 completions are longer, with their prompts, than the 16 tokens" in caplog.text
        caplog.clear()


def test_a_prompt_counts_towards_the_models_positions(critic, sampled) -> None:
    rollout = sampled("bad " * 10, prompts=["the film was good and the story was good"])
    assert build(critic(), **TOKEN).score(rollout).status.tolist() == [Status.OK]
    read = build(critic(), prompt_template="{prompt}", **TOKEN).score(rollout)
    assert read.status.tolist() == [Status.FAILED]


def test_the_log_says_how_much_was_marked(critic, sampled) -> None:
    rollout = sampled("bad bad film", "good")
    assert build(critic(), **TOKEN).score(rollout).metrics == {
        "segments": 2.0,
        "rate/bad": 0.5,
        "completions/bad": 0.5,
    }


@pytest.mark.parametrize(
    ("record", "fields", "path", "message"),
    [
        (None, {"labels": {"bad": 1}}, "segments", "has no segments.json"),
        ({"segments": {"by": "token"}}, {"labels": {"bed": 1}}, "labels.bed", "no such label.*did you mean 'bad'"),
        (None, {**TOKEN, "prompt_template": "Q"}, "prompt_template", "does not say where"),
        (None, {"labels": {"bad": 1}, "segments": {"by": "step", "pattern": "("}}, "segments.pattern", "expression"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_loaded(critic, record, fields, path, message) -> None:
    config = SegmentModelConfig.model_validate({"type": "segment_model", "path": critic(record), **fields})
    (problem,) = config.problems(Pretrained(path="policy"), [config])
    assert problem.path == path
    assert list(config.files()) == [("path", config.path, True)]
    assert re.search(message, str(problem))


@pytest.mark.parametrize(("record", "segments"), [(None, {"by": "token"}), ({"segments": {"by": "token"}}, None)])
def test_a_sequence_classifier_is_not_asked_about_tokens(critic, record, segments) -> None:
    path = critic(record, sequences=True)
    fields = {"type": "segment_model", "path": path, "labels": {"bad": 1.0}, "segments": segments}
    config = SegmentModelConfig.model_validate(fields)
    (problem,) = config.problems(Pretrained(path="policy"), [config])
    assert problem.path == "segments.by" and "classifies sequences, not tokens" in str(problem)
    whole = config.model_copy(update={"segments": Segments(by="sentence")})
    assert list(whole.problems(Pretrained(path="policy"), [whole])) == []


def test_a_language_model_is_no_segment_model(talker) -> None:
    fields = {"type": "segment_model", "path": str(talker), "labels": {"bad": 1.0}, "segments": {"by": "sentence"}}
    config = SegmentModelConfig.model_validate(fields)
    (problem,) = config.problems(Pretrained(path="policy"), [config])
    assert problem.path == "path" and "holds LlamaForCausalLM, and a segment model has" in str(problem)


def test_an_outcome_has_no_placement_and_a_mean(critic) -> None:
    fields = {"type": "segment_model", "path": critic(), "labels": {"bad": 1.0}, "segments": {"by": "token"}}
    config = SegmentModelConfig.model_validate({**fields, "placement": "spread", "per_segment": "mean"})
    assert list(config.problems(Pretrained(path="policy"), [config])) == []
    whole = config.model_copy(update={"level": "completion"})
    (problem,) = whole.problems(Pretrained(path="policy"), [whole])
    assert problem.path == "placement" and "does nothing where whole completions are measured" in str(problem)


def test_what_only_the_model_can_tell_is_an_error_of_the_run(critic, talker, sampled) -> None:
    with pytest.raises(RunError, match="has no label 'bed', only none, bad"):
        build(critic(), labels={"bed": 1.0}, segments={"by": "token"})
    with pytest.raises(RunError, match="set segments"):
        build(critic(), labels={"bad": 1.0})
    with pytest.raises(RunError, match="classifies sequences and has no verdict on tokens"):
        build(critic(sequences=True), labels={"bad": 1.0}, segments={"by": "token"})
    with pytest.raises(RunError, match="holds LlamaForCausalLM, and a segment model has"):
        build(str(talker), **TOKEN)
