"""Likelihoods of continuations are those of one full forward each, without a cache or padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from rlhf_kit.models.likelihood import log_likelihoods

torch.set_num_threads(1)

CONTEXTS = [
    "the film was good",
    "I like it. " * 12,
    "<|user|>Is it good?<|end|><|assistant|>The story was bad, but the film was good.<|end|><|user|>",
    "no",
]
CONTINUATIONS = [
    ["Thank you!", "That is bad.", "Yes", " good film and a good story, I like it"],
    ["no"],
    ["the film", "A", "Yes yes Yes", "No, no, no, no!", "I like it. Thank you! " * 3],
    [],
]


def one_by_one(model: Any, context: list[int], continuation: list[int]) -> float:
    """`sum_t log p(f_t | x, f_<t)` by a forward over `x f`, position by position."""
    with torch.no_grad():
        logits = model(torch.tensor([context + continuation])).logits[0].double()
    total = 0.0
    for place, token in enumerate(continuation):
        scores = logits[len(context) + place - 1]
        total += (scores[token] - scores.exp().sum().log()).item()
    return total


def mistral(vocabulary: int) -> MistralForCausalLM:
    """A model whose window is shorter than the contexts."""
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MistralConfig(
        vocab_size=vocabulary, num_key_value_heads=1, sliding_window=8, initializer_range=0.3, **sizes
    )
    return MistralForCausalLM(config)


def bloom(vocabulary: int) -> BloomForCausalLM:
    """A model that takes no positions."""
    return BloomForCausalLM(BloomConfig(vocab_size=vocabulary, hidden_size=16, n_layer=2, n_head=2))


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("kind", ["llama", "mistral", "bloom"])
def test_likelihoods_are_those_of_a_plain_forward_each(talker: Path, kind: str, batch_size: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(talker)
    torch.manual_seed(1)
    if kind == "llama":
        model = AutoModelForCausalLM.from_pretrained(talker)
    else:
        model = {"mistral": mistral, "bloom": bloom}[kind](len(tokenizer)).eval()
    contexts = [tokenizer(text)["input_ids"] for text in CONTEXTS]
    continuations = [[tokenizer(text)["input_ids"] for text in texts] for texts in CONTINUATIONS]
    assert {len(text) for text in continuations[0]} != {len(continuations[0][0])}
    found = log_likelihoods(model, contexts, continuations, batch_size)
    for context, texts, likelihoods in zip(contexts, continuations, found, strict=True):
        assert [likelihood.tokens for likelihood in likelihoods] == [len(text) for text in texts]
        for text, likelihood in zip(texts, likelihoods, strict=True):
            expected = one_by_one(model, context, text)
            assert likelihood.sum == pytest.approx(expected, abs=2e-4)
            assert likelihood.mean == pytest.approx(expected / len(text), abs=2e-4)


def test_what_a_model_is_sure_of_is_likely() -> None:
    """A model that says the next number: the shift is by one, and no other."""

    class Counting(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask, use_cache, past_key_values=None, logits_to_keep=0):
            logits = torch.nn.functional.one_hot((input_ids + 1) % 10, 10).float() * 50
            cache = past_key_values or type("Cache", (), {"batch_select_indices": lambda self, rows: None})()
            return type("Output", (), {"logits": logits[:, -logits_to_keep:], "past_key_values": cache})()

    ((counted, other),) = log_likelihoods(Counting(), [[1, 2, 3]], [[[4, 5, 6], [4, 5, 5]]])
    assert counted.sum == pytest.approx(0.0, abs=1e-6)
    assert other.sum == pytest.approx(-50.0)


def test_a_context_is_read_once(talker: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(talker)
    lengths = []
    model.register_forward_pre_hook(lambda m, a, k: lengths.append(k["input_ids"].shape), with_kwargs=True)
    log_likelihoods(model, [[5] * 50], [[[6, 7, 8]] * 10], batch_size=4)
    assert lengths == [(1, 50), (4, 2), (4, 2), (2, 2)]


def test_nothing_has_no_likelihood(talker: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(talker)
    with pytest.raises(ValueError, match="a continuation has no token"):
        log_likelihoods(model, [[1]], [[[2], []]])
    with pytest.raises(ValueError, match="a context has no token"):
        log_likelihoods(model, [[]], [[[2]]])
