"""Offsets by the tokens' pieces are those that decoding them step by step gives, and the fallback stays correct."""

from itertools import groupby

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from rlhf_kit.credit.pieces import piece_offsets
from rlhf_kit.credit.spans import token_offsets

NO_RESET = [HealthCheck.function_scoped_fixture]  # the tokenizers stay the same from example to example


class Decoding:
    """A tokenizer of which only decoding is known, so that its offsets come from moving windows."""

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


def with_byte_fallback(tokenizer, ids):
    """Text and offsets by definition: a run of bytes is its characters, or one replacement for each of its bytes."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    shown = [k for k, token in enumerate(tokens) if token not in special]
    text, places = "", {}
    for is_bytes, run in groupby(shown, key=lambda k: tokens[k].startswith("<0x")):
        run = list(run)
        if not is_bytes:
            for k in run:
                places[k] = (len(text), len(text) + len(tokens[k]))
                text += tokens[k].replace("▁", " ")
            continue
        data = bytes(int(tokens[k][3:5], 16) for k in run)
        try:
            owners = [i for i, character in enumerate(data.decode()) for _ in character.encode()]
            written = data.decode()
        except UnicodeDecodeError:
            owners, written = list(range(len(run))), "\ufffd" * len(run)
        places |= {k: (len(text) + i, len(text) + i + 1) for k, i in zip(run, owners, strict=True)}
        text += written
    strip = text.startswith(" ")
    stripped = {k: (max(start - strip, 0), end - strip) for k, (start, end) in places.items()}
    return text[strip:], [stripped.get(k, (0, 0)) for k in range(len(ids))]


def with_text(offsets):
    return {k: place for k, place in enumerate(offsets) if place[0] < place[1]}


@settings(max_examples=150)
@given(data=st.data())
def test_byte_fallback_by_its_definition(tokenizers, some_ids, data):
    """Any ids: bytes that make characters and bytes that make none, between pieces and special tokens."""
    tokenizer = tokenizers["byte_fallback"]
    few = tokenizer.convert_tokens_to_ids(["<0x41>", "<0xC3>", "<0xA9>", "<0xF0>", "▁", "e", "<eos>"])
    ids = data.draw(some_ids(tokenizer) | st.lists(st.sampled_from(few), max_size=12))
    text, expected = with_byte_fallback(tokenizer, ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert with_text(token_offsets(tokenizer, ids)) == with_text(expected)


@pytest.mark.parametrize("name", ["unigram", "word_piece"])
@pytest.mark.parametrize("skip_special_tokens", [True, False])
@given(data=st.data())
def test_pieces_and_windows_agree(tokenizers, some_ids, name, skip_special_tokens, data):
    tokenizer = tokenizers[name]
    ids = data.draw(some_ids(tokenizer))
    by_windows = token_offsets(Decoding(tokenizer), ids, skip_special_tokens)
    assert token_offsets(tokenizer, ids, skip_special_tokens) == by_windows


@pytest.mark.parametrize("name", ["byte_level", "unigram", "word_piece", "byte_fallback"])
@given(data=st.data())
def test_texts_need_no_windows(tokenizers, texts, name, data):
    tokenizer = tokenizers[name]
    ids = tokenizer.encode(data.draw(texts), add_special_tokens=False)
    assert piece_offsets(tokenizer, ids, tokenizer.decode(ids, skip_special_tokens=True)) is not None


@pytest.mark.parametrize("name", ["byte_level", "unigram", "word_piece", "clean_up", "byte_fallback"])
@given(data=st.data())
def test_with_windows_every_character_belongs_to_a_token(tokenizers, some_ids, name, data):
    tokenizer = tokenizers[name]
    ids = data.draw(some_ids(tokenizer))
    text = tokenizer.decode(ids, skip_special_tokens=True)
    offsets = token_offsets(Decoding(tokenizer), ids)
    assert len(offsets) == len(ids)
    assert {c for start, end in offsets for c in range(start, end)} == set(range(len(text)))


def test_a_byte_that_stands_first(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    ids = tokenizer.convert_tokens_to_ids(["<0xC3>", "<0xA9>", "▁the"])
    assert piece_offsets(tokenizer, ids, "é the") == [(0, 1), (0, 1), (1, 5)]


def test_a_word_piece_that_begins_within_a_word(tokenizers):
    """At the beginning its mark is text; behind another token it is none."""
    tokenizer = tokenizers["word_piece"]
    part = next(token for token in tokenizer.get_vocab() if token.startswith("##") and len(token) == 3)
    ids = tokenizer.convert_tokens_to_ids([part, part])
    assert tokenizer.decode(ids) == f"{part}{part[2]}"
    assert piece_offsets(tokenizer, ids, tokenizer.decode(ids)) == [(0, 3), (3, 4)]


@pytest.mark.parametrize(
    ("decoder", "tokens", "text", "expected"),
    [
        (decoders.BPEDecoder(), ["the</w>", "do", "g</w>"], "the dog", [(0, 3), (3, 6), (6, 7)]),
        (decoders.CTC(), ["d", "d", "o", "<pad>", "o"], "doo", [(0, 1), (1, 1), (1, 2), (2, 2), (2, 3)]),
    ],
)
def test_decoders_that_look_at_neighbours_are_left_to_windows(decoder, tokens, text, expected):
    """The end of a word is a space unless it is the last; what repeats at once is written once."""
    vocabulary = {token: k for k, token in enumerate(dict.fromkeys([*tokens, "a"]))}
    backend = Tokenizer(models.WordLevel(vocabulary, "a"))
    backend.decoder = decoder
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = [vocabulary[token] for token in tokens]
    assert tokenizer.decode(ids) == text
    assert piece_offsets(tokenizer, ids, text) is None
    assert token_offsets(tokenizer, ids) == expected


def test_no_tokenizer_but_a_decoding_one_and_no_text_but_the_pieces(tokenizers):
    tokenizer = tokenizers["clean_up"]
    ids = tokenizer.encode("the dog, does", add_special_tokens=False)
    assert piece_offsets(Decoding(tokenizer), ids, tokenizer.decode(ids)) is None
    assert piece_offsets(tokenizer, ids, "the dog, does") is None
    assert piece_offsets(tokenizer, ids, "the dog , does") is not None
