"""Generation in batches gives what each prompt would give alone."""

from __future__ import annotations

import pytest
import torch

from rlhf_kit.models.generation import encode_prompts, eos_token_ids, generate

PROMPTS = ["1 =", "1 2 3 4 =", "0 0 =", "4 ="]
CHAT = "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}={% endif %}"


def greedy_by_hand(model, tokenizer, prompt: str, length: int) -> str:
    """Token by token, the most likely one, until the end token."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(length):
        with torch.no_grad():
            best = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if best == tokenizer.eos_token_id:
            break
        ids.append(best)
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_greedy_completions_are_the_most_likely_tokens(make_model, tokenizer, batch_size) -> None:
    model, done = make_model(seed=2), []
    told = lambda *counts: done.append(counts)  # noqa: E731
    completions = generate(model, tokenizer, PROMPTS, max_new_tokens=6, batch_size=batch_size, on_batch=told)
    assert completions == [greedy_by_hand(model, tokenizer, prompt, 6) for prompt in PROMPTS]
    assert len(set(completions)) > 1
    assert done == [(count, 4) for count in [*range(0, 4, batch_size), 4]]


def test_padding_is_on_the_left_whatever_the_tokenizer_is_set_to(make_model, tokenizer) -> None:
    model = make_model(seed=2)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    tokenizer.padding_side = "right"
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == expected


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_in_the_mode_it_was_in(make_model, tokenizer, training) -> None:
    model, modes = make_model().train(training), []
    model.model.register_forward_hook(lambda module, *_: modes.append(module.training))
    generate(model, tokenizer, PROMPTS, max_new_tokens=2)
    assert set(modes) == {False}
    assert model.training is training


def test_with_a_small_top_p_only_the_likeliest_token_is_sampled(make_model, tokenizer) -> None:
    model = make_model(seed=2)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=6)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=2.0, top_p=1e-6) == expected
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6, temperature=2.0) != expected


def test_sampling_follows_the_tempered_distribution_over_the_whole_vocabulary(make_model, tokenizer) -> None:
    model, temperature, count = make_model(seed=2), 1.5, 4000
    model.generation_config.top_k = 2  # a model's own defaults do not narrow it
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokenizer("1 =")["input_ids"]])).logits[0, -1]
    expected = torch.softmax(logits / temperature, dim=-1)
    torch.manual_seed(0)
    texts = generate(model, tokenizer, ["1 ="] * count, max_new_tokens=1, temperature=temperature, batch_size=count)
    for word in ["0", "1", "2", "3", "4", "="]:
        probability = expected[tokenizer.convert_tokens_to_ids(word)].item()
        share = texts.count(word) / count
        assert abs(share - probability) < 4 * (probability * (1 - probability) / count) ** 0.5 + 1e-9


@pytest.mark.parametrize("side", ["left", "right"])
def test_conversations_are_rendered_with_the_chat_template(make_model, tokenizer, side) -> None:
    tokenizer.chat_template, tokenizer.padding_side = CHAT, side
    messages = [[{"role": "user", "content": "1 2"}], [{"role": "user", "content": "3"}]]
    encoded = encode_prompts(tokenizer, messages)
    words = [tokenizer.convert_ids_to_tokens(row) for row in encoded["input_ids"].tolist()]
    assert words == [["1", "2", "="], ["<pad>", "3", "="]]
    assert encoded["attention_mask"].tolist() == [[1, 1, 1], [0, 1, 1]]
    model = make_model(seed=2)
    assert generate(model, tokenizer, messages, max_new_tokens=4) == generate(
        model, tokenizer, ["1 2 =", "3 ="], max_new_tokens=4
    )


def test_each_prompt_is_rendered_with_its_own_tools(make_model, tokenizer) -> None:
    tokenizer.chat_template = "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}" + CHAT
    messages = [[{"role": "user", "content": str(number)}] for number in range(4)]
    tools = [[{"name": "3"}, {"name": "4"}], None, [], '[{"name": "2"}]']
    encoded = encode_prompts(tokenizer, messages, tools)
    words = [tokenizer.convert_ids_to_tokens(row) for row in encoded["input_ids"].tolist()]
    pad = "<pad>"
    assert words == [["3", "4", "0", "="], [pad, pad, "1", "="], [pad, pad, "2", "="], [pad, "2", "3", "="]]
    model = make_model(seed=2)
    assert generate(model, tokenizer, messages, max_new_tokens=4, batch_size=3, tools=tools) == generate(
        model, tokenizer, ["3 4 0 =", "1 =", "2 =", "2 3 ="], max_new_tokens=4
    )


def test_only_what_a_causal_model_takes_is_passed_on(tokenizer) -> None:
    tokenizer.model_input_names = ["input_ids", "token_type_ids", "attention_mask"]
    assert "token_type_ids" in tokenizer(["1"])
    assert set(encode_prompts(tokenizer, ["1"])) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize(("declared", "expected"), [(None, [2]), (2, [2]), (5, [2, 5]), ([7, 5], [2, 5, 7])])
def test_every_declared_end_token_ends_a_completion(make_model, tokenizer, declared, expected) -> None:
    model = make_model()
    model.generation_config.eos_token_id = declared
    assert tokenizer.eos_token_id == 2
    assert eos_token_ids(model, tokenizer) == expected


def test_generation_stops_at_a_declared_end_token(make_model, tokenizer) -> None:
    model = make_model(seed=2)
    whole = dict(zip(PROMPTS, generate(model, tokenizer, PROMPTS, max_new_tokens=4), strict=True))
    prompt = max(PROMPTS, key=lambda prompt: len(whole[prompt].split()))
    first, *rest = whole[prompt].split()
    assert rest
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(first)]
    assert generate(model, tokenizer, [prompt], max_new_tokens=4) == [first]
