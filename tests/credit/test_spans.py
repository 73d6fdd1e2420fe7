import re
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_kit.credit.spans import segment, spans_on_actions, spread_spans, step_ids, token_offsets
from rlhf_kit.rollout import Span

NAMES = ["byte_level", "unigram", "word_piece", "clean_up", "byte_fallback", "smollm2"]


@pytest.fixture
def pick(tokenizers):
    """A tokenizer by name; skips where the package of a real one is missing."""

    def tokenizer(name):
        if name not in tokenizers:
            pytest.skip(f"the package of {name} is not installed")
        return tokenizers[name]

    return tokenizer


@pytest.fixture(params=NAMES)
def tokenizer(request, pick):
    return pick(request.param)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


NO_RESET = [HealthCheck.function_scoped_fixture]  # the tokenizers stay the same from example to example


@pytest.mark.parametrize("name", ["unigram", "word_piece"])
@given(data=st.data())
def test_a_token_is_what_it_adds_to_the_text(tokenizers, some_ids, name, data):
    """Where decoding only ever appends, the range is from one prefix's length to the next one's."""
    tokenizer = tokenizers[name]
    ids = data.draw(some_ids(tokenizer))
    lengths = [len(tokenizer.decode(ids[:k], skip_special_tokens=True)) for k in range(len(ids) + 1)]
    assert token_offsets(tokenizer, ids) == list(pairwise(lengths))


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@settings(suppress_health_check=NO_RESET)
@given(data=st.data())
def test_every_character_belongs_to_a_token(tokenizer, some_ids, skip_special_tokens, data):
    ids = data.draw(some_ids(tokenizer))
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    offsets = token_offsets(tokenizer, ids, skip_special_tokens)
    assert len(offsets) == len(ids)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert {c for start, end in offsets for c in range(start, end)} == set(range(len(text)))
    with_text = [(start, end) for start, end in offsets if start < end]
    assert with_text == sorted(with_text)


def by_pieces(tokenizer, ids):
    """Characters of each token of a text that was encoded with byte fallback: its piece, or one of its bytes."""
    special, places, position, held = set(tokenizer.all_special_tokens), [], 0, []
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in special:
            places.append(set())
        elif token.startswith("<0x"):
            held.append(int(token[3:5], 16))
            places.append({position})
            if bytes(held).decode(errors="ignore"):
                held, position = [], position + 1
        else:
            places.append(set(range(position, position + len(token))))
            position += len(token)
    return [{c - 1 for c in place} - {-1} for place in places]  # the first space is stripped


def by_prefixes(tokenizer, ids):
    """Characters that each token adds to the text."""
    lengths = [len(tokenizer.decode(ids[:k], skip_special_tokens=True)) for k in range(len(ids) + 1)]
    return [set(range(start, end)) for start, end in pairwise(lengths)]


@pytest.mark.parametrize("name", ["byte_level", "smollm2", "unigram", "word_piece", "byte_fallback"])
@pytest.mark.parametrize("placement", ["end", "spread", "start"])
@settings(suppress_health_check=NO_RESET)
@given(data=st.data())
def test_a_spans_tokens_are_those_that_overlap_it(pick, texts, by_bytes, name, placement, data):
    """Texts with end-of-sequence tokens in between; which characters a token has is worked out without decoding it."""
    tokenizer = pick(name)
    ids = encode(tokenizer, data.draw(texts))
    for place in data.draw(st.lists(st.integers(0, len(ids)), max_size=2)):
        ids.insert(place, tokenizer.eos_token_id)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if not text:
        return
    if name in ("byte_level", "smollm2"):
        characters = [set(range(*place)) for place in by_bytes(tokenizer, ids)[1]]
    else:
        characters = (by_pieces if name == "byte_fallback" else by_prefixes)(tokenizer, ids)
    start, end = sorted(data.draw(st.tuples(st.integers(0, len(text)), st.integers(0, len(text)))))
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    rewards = spread_spans([[Span(start, end, 1.0, "judge")]], [token_offsets(tokenizer, ids)], mask, placement)
    inside = [t for t, own in enumerate(characters) if own & set(range(start, end))]
    expected = {"end": inside[-1:], "start": inside[:1], "spread": inside}[placement]
    assert rewards.nonzero()[:, 1].tolist() == expected
    assert rewards.sum().item() == pytest.approx(float(start < end), abs=1e-5)


def test_an_end_of_sequence_token_in_the_middle_takes_no_reward(tokenizer):
    """Two words with the token between them: a span over both, and over the second, end on the second's last token."""
    first, second = encode(tokenizer, "the"), encode(tokenizer, "dog")
    ids = [*first, tokenizer.eos_token_id, *second, tokenizer.eos_token_id]
    text = tokenizer.decode(ids, skip_special_tokens=True)
    place = text.index("dog")
    spans = [Span(0, len(text), 1.0, "judge"), Span(place, len(text), 2.0, "judge"), Span(0, 3, 4.0, "judge")]
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    rewards = spread_spans([spans], [token_offsets(tokenizer, ids)], mask)[0].tolist()
    assert {k: reward for k, reward in enumerate(rewards) if reward} == {len(first) - 1: 4.0, len(ids) - 2: 3.0}


def test_characters_that_straddle_tokens(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    ids = [*encode(tokenizer, "the 🦊é"), tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["▁the", "▁", "<0xF0>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the 🦊é"
    assert token_offsets(tokenizer, ids)[:6] == [(0, 3), (3, 4), *[(4, 5)] * 4]
    assert set(token_offsets(tokenizer, ids)[6:-1]) == {(5, 6)}
    assert token_offsets(tokenizer, ids)[-1] == (6, 6)


def test_special_tokens_in_the_middle_of_a_character(tokenizers):
    tokenizer = tokenizers["byte_level"]
    emoji = tokenizer.convert_tokens_to_ids(["ð", "Ł"]), tokenizer.convert_tokens_to_ids(["İ", "ī"])
    (a,), pad = encode(tokenizer, "a"), tokenizer.pad_token_id
    ids = [a, *emoji[0], pad, *emoji[1], a]
    expected = [(0, 1), (1, 2), (1, 2), (1, 1), (1, 2), (1, 2), (2, 3)]
    assert len(tokenizer.decode(ids, skip_special_tokens=True)) == 3
    assert token_offsets(tokenizer, ids) == expected


def test_spaces_that_clean_up_removes(tokenizers):
    tokenizer = tokenizers["clean_up"]
    ids = encode(tokenizer, "the dog, does it?")
    text = tokenizer.decode(ids)
    assert text == "the dog, does it?"
    offsets = token_offsets(tokenizer, ids)
    comma = tokenizer.convert_ids_to_tokens(ids).index(",")
    assert offsets[comma] == (7, 8)
    assert offsets[-1] == (16, 17)


def test_a_token_whose_space_clean_up_removes_is_empty(byte_level_tokenizer):
    tokenizer = byte_level_tokenizer(
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )
    ids = [tokenizer.vocab[token] for token in ["a", "Ġ", ".", "Ġ", "b"]]
    assert tokenizer.decode(ids) == "a. b"
    assert token_offsets(tokenizer, ids) == [(0, 1), (1, 1), (1, 2), (2, 3), (3, 4)]


def test_long_completions_decode_each_token_a_bounded_number_of_times(tokenizer, corpus):
    class Counting:
        decoded = 0

        def decode(self, token_ids, skip_special_tokens=False):
            self.decoded += len(token_ids)
            return tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    ids = encode(tokenizer, "\n".join(corpus * 6))
    assert len(ids) > 500
    offsets = token_offsets(counting, ids)
    assert counting.decoded < 30 * len(ids)
    text = tokenizer.decode(ids)
    assert {c for start, end in offsets for c in range(start, end)} == set(range(len(text)))


class Wrapping:
    """A decoder that breaks the line after every 20 tokens, which a window of fewer never shows."""

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(chr(97 + i) + "\n" * (k % 20 == 19) for k, i in enumerate(token_ids))


class Capitalising:
    """A decoder that begins with a capital: a window begins otherwise than what it is cut from."""

    def decode(self, token_ids, skip_special_tokens=False):
        return "".join(chr(97 + i) for i in token_ids).capitalize()


def test_decoders_that_windows_do_not_suit():
    ids = [i % 26 for i in range(50)]
    lines = [(i + i // 20, i + 1 + (i + 1) // 20) for i in range(50)]
    assert token_offsets(Wrapping(), ids) == lines
    assert token_offsets(Capitalising(), ids) == [(i, i + 1) for i in range(50)]


def test_no_tokens(tokenizers):
    assert token_offsets(tokenizers["byte_level"], []) == []


@st.composite
def spans_and_offsets(draw):
    """Offsets of adjoining, overlapping (shared character) and empty tokens; spans within; an action mask."""
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        offsets, position = [], 0
        for size, shared in draw(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=6)):
            start = max(position - 1, 0) if shared and size else position
            offsets.append((start, start + size))
            position = max(position, start + size)
        bounds = st.tuples(st.integers(0, position), st.integers(0, position)).map(sorted)
        drawn = draw(st.lists(st.tuples(bounds, st.integers(-8, 8)), max_size=4))
        rows.append((offsets, [Span(start, end, reward / 4, "judge") for (start, end), reward in drawn]))
    width = max(len(offsets) for offsets, _ in rows) + draw(st.integers(0, 2))
    cells = st.lists(st.booleans(), min_size=width, max_size=width)
    mask = torch.tensor([draw(cells) for _ in rows])
    return [offsets for offsets, _ in rows], [spans for _, spans in rows], mask


@settings(max_examples=150)
@given(case=spans_and_offsets(), placement=st.sampled_from(["end", "start", "spread", "each"]))
def test_rewards_land_on_exactly_the_action_tokens_that_a_span_overlaps(close, case, placement):
    offsets, spans, mask = case
    expected = torch.zeros(mask.shape)
    for i, row in enumerate(spans):
        for span in row:
            characters = set(range(span.start, span.end))
            tokens = [t for t, token in enumerate(offsets[i]) if mask[i, t] and characters & set(range(*token))]
            chosen = {"end": tokens[-1:], "start": tokens[:1]}.get(placement, tokens)
            for t in chosen:
                expected[i, t] += span.reward if placement == "each" else span.reward / len(chosen)
    close(spread_spans(spans, offsets, mask, placement), expected, atol=1e-6)


@pytest.mark.parametrize("placement", ["end", "start", "spread"])
@given(data=st.data())
def test_total_reward_does_not_depend_on_the_tokenizer(tokenizers, corpus, placement, data):
    """Words of many languages, emoji and combining marks among them, which every tokenizer gives back as they were."""
    words = sorted({word for line in corpus for word in line.split() if not re.search(r"[.,:;?!=+。、–']", word)})
    text = " ".join(data.draw(st.lists(st.sampled_from(words), min_size=1, max_size=6)))
    bounds = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 9))
    drawn = data.draw(st.lists(st.tuples(bounds, st.integers(-8, 8)), min_size=1, max_size=5))
    spans = [Span(start, min(start + size, len(text)), reward / 4, "judge") for (start, size), reward in drawn]
    faithful = 0
    for name, tokenizer in tokenizers.items():
        ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
        if tokenizer.decode(ids, skip_special_tokens=True) != text:
            continue
        faithful += 1
        mask = torch.ones(1, len(ids), dtype=torch.bool)
        rewards = spread_spans([spans], [token_offsets(tokenizer, ids)], mask, placement)
        assert rewards.sum().item() == pytest.approx(sum(span.reward for span in spans), abs=1e-5), name
        assert rewards[0, -1] == 0  # the end-of-sequence token has no characters
    assert faithful >= len(tokenizers) - 1


@pytest.mark.parametrize(("start", "end"), [(-1, 2), (0, 6), (3, 2), (6, 6)])
def test_a_span_outside_the_completion_is_named(start, end):
    mask = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=rf"start={start}, end={end}.*5 characters"):
        spread_spans([[Span(start, end, 1.0, "judge")]], [[(0, 3), (3, 5), (5, 5)]], mask)


def test_errors_of_shape_and_placement():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"'middle'.*end, spread, start"):
        spread_spans([[]], [[(0, 1)]], mask, "middle")
    with pytest.raises(ValueError, match="up to 3 tokens"):
        spread_spans([[]], [[(0, 1), (1, 2), (2, 3)]], mask)
    with pytest.raises(ValueError, match="2 completions"):
        spread_spans([[], []], [[(0, 1)]], mask)
    with pytest.raises(ValueError, match="cover"):
        step_ids([[(0, 1), (1, 4)]], [[(0, 2)]], mask)
    with pytest.raises(ValueError, match="cover"):
        step_ids([[(0, 1), (1, 4)]], [[(0, 2), (3, 4)]], mask)


def parts(text, pattern):
    return [text[start:end] for start, end in segment(text, pattern)]


def test_segments_end_behind_the_separator():
    assert parts("a\nbc\n\nd", r"\n") == ["a\n", "bc\n", "\n", "d"]
    assert parts("a\nbc\n\n", r"\n+") == ["a\n", "bc\n\n"]
    assert parts("One. Two! Three", r"[.!]\s*") == ["One. ", "Two! ", "Three"]
    assert parts("One.Two", r"(?<=\.)") == ["One.", "Two"]
    assert parts("none", r"\n") == ["none"]
    assert parts("", r"\n") == []


@given(text=st.text("ab\n ", max_size=20), pattern=st.sampled_from([r"\n", r"\n*", r"(?<=a)", r"b+|$"]))
def test_segments_cover_the_text(text, pattern):
    pieces = parts(text, pattern)
    assert "".join(pieces) == text
    assert all(pieces)


def test_a_token_belongs_to_the_step_of_its_last_character():
    """Text "ab\\ncd" in steps "ab\\n" and "cd": the token "\\nc" ends in the second; -1 on a tool's token."""
    offsets = [(0, 1), (1, 1), (1, 2), (2, 4), (4, 5), (5, 5)]
    mask = torch.tensor([[True, True, False, True, True, True, False]])
    assert step_ids([offsets], [[(0, 3), (3, 5)]], mask).tolist() == [[0, 0, -1, 1, 1, 1, -1]]


def test_steps_of_completions_without_text():
    mask = torch.tensor([[True, False], [False, False]])
    assert step_ids([[(0, 0)], []], [[], []], mask).tolist() == [[0, -1], [-1, -1]]


@given(text=st.text("ab\n 🎉é", max_size=30))
def test_steps_of_a_real_completion(tokenizers, text):
    tokenizer = tokenizers["byte_level"]
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    ids = [*encoded["input_ids"], tokenizer.eos_token_id]
    segments = segment(text, r"\n")
    steps = step_ids([token_offsets(tokenizer, ids)], [segments], torch.ones(1, len(ids), dtype=torch.bool))
    for (_, end), step in zip(encoded["offset_mapping"], steps[0, :-1].tolist(), strict=True):
        assert segments[step][0] < end <= segments[step][1]
    assert steps[0, -1] == max(len(segments) - 1, 0)


def test_spans_that_no_action_token_overlaps_are_left_out():
    offsets = [[(0, 2), (2, 5), (5, 5), (4, 6)], [(0, 3), (3, 3)]]
    mask = torch.tensor([[True, False, True, False], [True, True, False, False]])
    spans = [
        [Span(0, 1, 1.0, "a"), Span(2, 6, 2.0, "b"), Span(1, 4, 3.0, "c"), Span(1, 1, 4.0, "d")],
        [Span(2, 3, 5.0, "e"), Span(3, 3, 6.0, "f")],
    ]
    kept = spans_on_actions(spans, offsets, mask)
    assert [[span.source for span in row] for row in kept] == [["a", "c"], ["e"]]


@given(case=spans_and_offsets())
def test_spans_on_actions_are_those_that_reward_a_token(case):
    offsets, spans, mask = case
    kept = spans_on_actions(spans, offsets, mask)
    for i, row in enumerate(spans):
        alone = [spread_spans([[replace(span, reward=1.0)]], [offsets[i]], mask[i : i + 1]).any() for span in row]
        assert kept[i] == [span for span, rewards in zip(row, alone, strict=True) if rewards]
