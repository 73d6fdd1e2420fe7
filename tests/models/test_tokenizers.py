import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rlhf_kit.data.tasks import running_sums, running_sums_vocabulary
from rlhf_kit.models.tokenizers import word_level_tokenizer

WORDS = running_sums_vocabulary(23)
TOKENIZER = word_level_tokenizer(WORDS)


@pytest.fixture(scope="module", params=["made", "saved"])
def tokenizer(request, tmp_path_factory):
    if request.param == "made":
        return TOKENIZER
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@given(st.lists(st.sampled_from(WORDS), min_size=1, max_size=30))
def test_decoding_undoes_encoding(words):
    ids = TOKENIZER(" ".join(words))["input_ids"]
    assert len(ids) == len(words)
    assert TOKENIZER.decode(ids) == " ".join(words)


def test_every_word_and_special_token_has_one_id(tokenizer):
    assert len(tokenizer) == len(WORDS) + 4
    assert [tokenizer.decode([number]) for number in range(4)] == ["<pad>", "<bos>", "<eos>", "<unk>"]
    special = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert special == (0, 1, 2, 3)
    assert [tokenizer.decode([number]) for number in range(4, len(tokenizer))] == WORDS


def test_encoding_adds_nothing(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("7 15 =")["input_ids"]) == ["7", "15", "="]


def test_a_prompt_and_its_completion_join_with_and_without_a_space(tokenizer):
    for row in running_sums(20, 4, 23, seed=0):
        apart = tokenizer(row["prompt"])["input_ids"] + tokenizer(row["completion"])["input_ids"]
        assert tokenizer(row["prompt"] + row["completion"])["input_ids"] == apart
        assert tokenizer(row["prompt"] + " " + row["completion"])["input_ids"] == apart


def test_unknown_words_are_marked_and_special_ones_read(tokenizer):
    assert tokenizer.convert_ids_to_tokens(tokenizer("7 99 8<eos>")["input_ids"]) == [
        "7",
        "<unk>",
        "8",
        "<eos>",
    ]
    assert tokenizer.decode([*tokenizer("7 8")["input_ids"], 2, 0], skip_special_tokens=True) == "7 8"


def test_batches_are_padded_on_the_left(tokenizer):
    batch = tokenizer(["7 8 9", "7"], padding=True)
    assert batch["input_ids"][1][:2] == [0, 0]
    assert batch["attention_mask"] == [[1, 1, 1], [0, 0, 1]]


def test_the_maximum_length_is_kept(tokenizer, tmp_path):
    assert tokenizer.model_max_length == 256
    word_level_tokenizer(WORDS, model_max_length=64).save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).model_max_length == 64


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        (["a", "b", "a"], "has 'a' twice"),
        (["<eos>"], "'<eos>' twice, or as one of <pad>"),
        (["3.5"], "'3.5', which would be cut"),
        (["two words"], "'two words', which would be cut"),
        ([""], "'', which would be cut"),
    ],
)
def test_vocabularies_that_could_not_be_read_back_are_refused(vocabulary, message):
    with pytest.raises(ValueError, match=message):
        word_level_tokenizer(vocabulary)
