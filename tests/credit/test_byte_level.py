"""Byte-level ids have the characters that their bytes make, and those that decoding them step by step gives."""

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rlhf_kit.credit.pieces import piece_offsets
from rlhf_kit.credit.spans import token_offsets

# Bytes of which characters, and broken characters, are made.
BYTES = [0x61, 0x80, 0x9F, 0xA9, 0xBD, 0xBF, 0xC3, 0xE2, 0xED, 0xEF, 0xF0, 0xF4, 0xFF]


class Decoding:
    """A tokenizer of which only decoding is known."""

    def __init__(self, tokenizer):
        self.decode = tokenizer.decode


@pytest.fixture(scope="module")
def byte_ids(tokenizers, byte_names):
    """Strategy of ids of single bytes, with an end-of-sequence token now and then."""
    tokenizer = tokenizers["byte_level"]
    ids = tokenizer.convert_tokens_to_ids([byte_names[byte] for byte in BYTES])
    return st.lists(st.sampled_from([*ids, tokenizer.eos_token_id]), max_size=30)


@pytest.fixture(scope="module", params=["byte_level", "smollm2"])
def tokenizer(request, tokenizers):
    if request.param not in tokenizers:
        pytest.skip(f"the package of {request.param} is not installed")
    return tokenizers[request.param]


def check(tokenizer, ids, by_bytes):
    """Offsets by the bytes, as they come, and by decoding alone, against their definition."""
    text, expected = by_bytes(tokenizer, ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    fast, slow = token_offsets(tokenizer, ids), token_offsets(Decoding(tokenizer), ids)
    assert fast == piece_offsets(tokenizer, ids, text)
    for token, ours, theirs, definition in zip(ids, fast, slow, expected, strict=True):
        if definition[0] < definition[1]:
            assert ours == theirs == definition, token
        else:
            assert ours[0] == ours[1] and theirs[0] == theirs[1], token


@settings(max_examples=100)
@given(data=st.data())
def test_offsets_are_those_of_the_bytes(tokenizer, some_ids, by_bytes, data):
    """Any ids, whole characters or not, with special tokens in between."""
    check(tokenizer, data.draw(some_ids(tokenizer)), by_bytes)


@settings(max_examples=150)
@given(data=st.data())
def test_offsets_of_broken_characters(tokenizers, byte_ids, by_bytes, data):
    check(tokenizers["byte_level"], data.draw(byte_ids), by_bytes)


@given(data=st.data())
def test_offsets_are_those_of_the_encoder(tokenizer, texts, data):
    text = data.draw(texts)
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    assume(tokenizer.decode(encoded["input_ids"]) == text)  # SmolLM2's vocabulary lacks some bytes
    assert piece_offsets(tokenizer, encoded["input_ids"], text) == encoded["offset_mapping"]


def test_special_tokens_that_are_not_skipped_have_their_text(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [*tokenizer.encode("a"), tokenizer.eos_token_id, *tokenizer.encode("b")]
    assert piece_offsets(tokenizer, ids, "a<eos>b", skip_special_tokens=False) == [(0, 1), (1, 6), (6, 7)]
    assert piece_offsets(tokenizer, ids, "ab") == [(0, 1), (1, 1), (1, 2)]


def test_a_token_that_was_added_with_letters_of_its_own(byte_level_tokenizer):
    """Such a token stands for itself, though the alphabet of bytes has some of its letters."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens(["Größe→", "日本"])
    ids = tokenizer.encode("xGröße→日本y")
    text = tokenizer.decode(ids)
    assert piece_offsets(tokenizer, ids, text) == token_offsets(Decoding(tokenizer), ids)
    assert text == "xGröße→日本y"


def test_an_id_that_no_token_has_leaves_no_text(tokenizers):
    tokenizer = tokenizers["byte_level"]
    (a,), unknown = tokenizer.encode("a"), len(tokenizer) + 7
    assert tokenizer.decode([a, unknown, a]) == "aa"
    assert piece_offsets(tokenizer, [a, unknown, a], "aa") == [(0, 1), (1, 1), (1, 2)]


def test_a_text_that_was_cleaned_up_is_not_that_of_the_bytes(tokenizers):
    tokenizer = tokenizers["byte_level"]
    assert piece_offsets(tokenizer, tokenizer.encode("a ."), "a.") is None


def test_no_ids(tokenizers):
    assert piece_offsets(tokenizers["byte_level"], [], "") == []
