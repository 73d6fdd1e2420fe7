"""A word-level tokenizer, for small models on tasks with a fixed vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNK)


def word_level_tokenizer(vocabulary: Sequence[str], model_max_length: int = 256) -> PreTrainedTokenizerFast:
    """A tokenizer with one id for each of `<pad>`, `<bos>`, `<eos>`, `<unk>` and the words of `vocabulary`.

    Text is cut at whitespace and where letters or digits meet punctuation, so that a prompt that ends in `=`
    and a completion that starts with `7` have the same ids with and without a space between them. Decoding
    joins words with single spaces, which undoes the encoding of words that were separated so. Encoding adds
    no special token.

    Raises:
        ValueError: a word occurs twice, is a special token, or would itself be cut.
    """
    cutter = Whitespace()
    seen: set[str] = set(SPECIAL_TOKENS)
    for word in vocabulary:
        if word in seen:
            raise ValueError(f"the vocabulary has {word!r} twice, or as one of {', '.join(SPECIAL_TOKENS)}")
        if [piece for piece, _ in cutter.pre_tokenize_str(word)] != [word]:
            raise ValueError(
                f"the vocabulary has {word!r}, which would be cut: a word is either letters, digits and "
                "underscores or punctuation"
            )
        seen.add(word)
    ids = {word: number for number, word in enumerate((*SPECIAL_TOKENS, *vocabulary))}
    backend = Tokenizer(WordLevel(ids, unk_token=UNK))
    backend.pre_tokenizer = cutter
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )


def first_difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> int | None:
    """The lowest id that stands for other text in one tokenizer than in the other; None where there is none.

    Added tokens are left out: fine-tuning gives reserved ids a name, and adds one for padding.
    """
    added = one.added_tokens_decoder.keys() | other.added_tokens_decoder.keys()
    mine, yours = ({(number, token) for token, number in of.get_vocab().items()} for of in (one, other))
    return min((number for number, _ in mine ^ yours if number not in added), default=None)
