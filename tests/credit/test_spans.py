import codecs
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_kit.credit.spans import segment, spread_spans, step_ids, token_offsets
from rlhf_kit.rollout import Span

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It doesn't stop, does it?",
    "Größe und Übermaß: der Fluß fließt; ça va, déjà vu, naïve façade.",
    "Быстрая коричневая лиса прыгает через ленивую собаку.",
    "敏捷的棕色狐狸跳过了懒狗。今日は良い天気ですね。",
    "e\u0301 cafe\u0301 o\u0308 – combining marks, हिन्दी पाठ, ไทย",
    "emoji 👩‍👩‍👧 🎉🎉 👍🏽 and  two  spaces\nnew lines\n\ttabs",
    "12 + 30 = 42\nso the answer is 42.",
]
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def byte_level(**options):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # Few merges, so that many characters straddle tokens.
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", **options)


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def word_piece(clean_up=False):
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=clean_up,
    )


def byte_fallback():
    """As SentencePiece models with byte fallback: a few words, letters, and 256 byte tokens."""
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehilnorstw.,é"]
    merges = [("▁", "t"), ("▁t", "h"), ("▁th", "e"), ("l", "o"), ("▁", "▁")]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "byte_level": byte_level(),
        "unigram": unigram(),
        "word_piece": word_piece(),
        "clean_up": word_piece(clean_up=True),
        "byte_fallback": byte_fallback(),
    }


NAMES = ["byte_level", "unigram", "word_piece", "clean_up", "byte_fallback"]
texts = st.lists(st.sampled_from(CORPUS), min_size=1, max_size=3).map("\n".join) | st.text(max_size=20)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def random_ids(tokenizer, max_size=40):
    return st.lists(st.integers(0, len(tokenizer) - 1), max_size=max_size)


def byte_alphabet():
    """The printable character by which byte-level tokenizers write each byte (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def offsets_by_bytes(tokenizer, ids):
    """Offsets from each token's bytes and the bytes of each character of the text."""
    alphabet, broken = byte_alphabet(), {}

    def note(error):
        broken[error.start] = error.end
        return "\ufffd", error.end

    codecs.register_error("note", note)
    pieces = [
        b"" if token in SPECIAL else bytes(alphabet[c] for c in token) for token in tokenizer.convert_ids_to_tokens(ids)
    ]
    text = b"".join(pieces).decode(errors="note")
    owner, position = [], 0  # of each byte, its character
    for i, character in enumerate(text):
        length = broken[position] - position if position in broken else len(character.encode())
        owner += [i] * length
        position += length
    offsets, position = [], 0
    for piece in pieces:
        characters = owner[position : position + len(piece)]
        after = owner[position - 1] + 1 if position else 0
        offsets.append((characters[0], characters[-1] + 1) if characters else (after, after))
        position += len(piece)
    return text, offsets


def drawn_offsets_by_bytes(tokenizer, ids):
    text, expected = offsets_by_bytes(tokenizer, ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    actual = token_offsets(tokenizer, ids)
    for token, ours, theirs in zip(ids, actual, expected, strict=True):
        assert (ours == theirs) if theirs[0] < theirs[1] else (ours[0] == ours[1]), token


@settings(max_examples=150)
@given(data=st.data())
def test_byte_level_offsets_are_those_of_the_bytes(tokenizers, data):
    """Any ids, whole characters or not, with special tokens in between."""
    drawn_offsets_by_bytes(tokenizers["byte_level"], data.draw(random_ids(tokenizers["byte_level"])))


@settings(max_examples=150)
@given(data=st.data())
def test_byte_level_offsets_of_broken_characters(tokenizers, data):
    """Single bytes of which characters, and broken characters, are made."""
    tokenizer = tokenizers["byte_level"]
    names = {byte: name for name, byte in byte_alphabet().items()}
    some = [0x61, 0x80, 0x9F, 0xA9, 0xBD, 0xBF, 0xC3, 0xE2, 0xED, 0xEF, 0xF0, 0xF4, 0xFF]
    ids = tokenizer.convert_tokens_to_ids([names[byte] for byte in some]) + [0]
    drawn_offsets_by_bytes(tokenizer, data.draw(st.lists(st.sampled_from(ids), max_size=30)))


@given(text=texts)
def test_byte_level_offsets_are_those_of_the_encoder(tokenizers, text):
    tokenizer = tokenizers["byte_level"]
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    assert tokenizer.decode(encoded["input_ids"]) == text
    assert token_offsets(tokenizer, encoded["input_ids"]) == encoded["offset_mapping"]


@pytest.mark.parametrize("name", ["unigram", "word_piece"])
@given(data=st.data())
def test_a_token_is_what_it_adds_to_the_text(tokenizers, name, data):
    """Where decoding only ever appends, the range is from one prefix's length to the next one's."""
    tokenizer = tokenizers[name]
    ids = data.draw(random_ids(tokenizer) | texts.map(lambda text: encode(tokenizer, text)))
    lengths = [len(tokenizer.decode(ids[:k], skip_special_tokens=True)) for k in range(len(ids) + 1)]
    assert token_offsets(tokenizer, ids) == list(pairwise(lengths))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(data=st.data())
def test_every_character_belongs_to_a_token(tokenizers, name, skip_special_tokens, data):
    tokenizer = tokenizers[name]
    ids = data.draw(random_ids(tokenizer) | texts.map(lambda text: encode(tokenizer, text)))
    text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
    offsets = token_offsets(tokenizer, ids, skip_special_tokens)
    assert len(offsets) == len(ids)
    assert all(0 <= start <= end <= len(text) for start, end in offsets)
    assert {c for start, end in offsets for c in range(start, end)} == set(range(len(text)))
    with_text = [(start, end) for start, end in offsets if start < end]
    assert with_text == sorted(with_text)


def test_characters_that_straddle_tokens(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    ids = [*encode(tokenizer, "the 🎉é"), tokenizer.eos_token_id]
    assert tokenizer.convert_ids_to_tokens(ids)[:3] == ["▁the", "▁", "<0xF0>"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "the 🎉é"
    assert token_offsets(tokenizer, ids) == [(0, 3), (3, 4), *[(4, 5)] * 4, (5, 6), (6, 6)]


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


def test_a_token_whose_space_clean_up_removes_is_empty():
    tokenizer = byte_level(
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )
    ids = [tokenizer.vocab[token] for token in ["a", "Ġ", ".", "Ġ", "b"]]
    assert tokenizer.decode(ids) == "a. b"
    assert token_offsets(tokenizer, ids) == [(0, 1), (1, 1), (1, 2), (2, 3), (3, 4)]


@pytest.mark.parametrize("name", NAMES)
def test_long_completions_decode_each_token_a_bounded_number_of_times(tokenizers, name):
    class Counting:
        decoded = 0

        def decode(self, token_ids, skip_special_tokens=False):
            self.decoded += len(token_ids)
            return tokenizers[name].decode(token_ids, skip_special_tokens=skip_special_tokens)

    counting = Counting()
    ids = encode(tokenizers[name], "\n".join(CORPUS * 4))
    assert len(ids) > 500
    offsets = token_offsets(counting, ids)
    assert counting.decoded < 30 * len(ids)
    text = tokenizers[name].decode(ids)
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
@given(case=spans_and_offsets(), placement=st.sampled_from(["end", "start", "spread"]))
def test_rewards_land_on_exactly_the_action_tokens_that_a_span_overlaps(close, case, placement):
    offsets, spans, mask = case
    expected = torch.zeros(mask.shape)
    for i, row in enumerate(spans):
        for span in row:
            characters = set(range(span.start, span.end))
            tokens = [t for t, token in enumerate(offsets[i]) if mask[i, t] and characters & set(range(*token))]
            chosen = {"end": tokens[-1:], "start": tokens[:1], "spread": tokens}[placement]
            for t in chosen:
                expected[i, t] += span.reward / len(chosen)
    close(spread_spans(spans, offsets, mask, placement), expected, atol=1e-6)


@pytest.mark.parametrize("placement", ["end", "start", "spread"])
@given(data=st.data())
def test_total_reward_does_not_depend_on_the_tokenizer(tokenizers, placement, data):
    text = "the cat is on the road, so is the dog."
    bounds = st.tuples(st.integers(0, len(text) - 1), st.integers(1, 9))
    drawn = data.draw(st.lists(st.tuples(bounds, st.integers(-8, 8)), min_size=1, max_size=5))
    spans = [Span(start, min(start + size, len(text)), reward / 4, "judge") for (start, size), reward in drawn]
    for name in ["byte_level", "unigram", "clean_up", "byte_fallback"]:
        tokenizer = tokenizers[name]
        ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text, name
        mask = torch.ones(1, len(ids), dtype=torch.bool)
        rewards = spread_spans([spans], [token_offsets(tokenizer, ids)], mask, placement)
        assert rewards.sum().item() == pytest.approx(sum(span.reward for span in spans), abs=1e-5), name
        assert rewards[0, -1] == 0  # the end-of-sequence token has no characters


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
    ids = [*encode(tokenizer, text), tokenizer.eos_token_id]
    segments = segment(text, r"\n")
    steps = step_ids([token_offsets(tokenizer, ids)], [segments], torch.ones(1, len(ids), dtype=torch.bool))
    consumed = b""
    for token, step in zip(ids[:-1], steps[0, :-1].tolist(), strict=True):
        consumed += bytes(byte_alphabet()[c] for c in tokenizer.convert_ids_to_tokens(token))
        whole = len(consumed.decode(errors="ignore"))
        last = whole if len(consumed) > len(text[:whole].encode()) else whole - 1
        assert segments[step][0] <= last < segments[step][1]
    assert steps[0, -1] == max(len(segments) - 1, 0)
