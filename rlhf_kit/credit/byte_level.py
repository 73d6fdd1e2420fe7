"""Character ranges of tokens that stand for bytes, which is what byte-level tokenizers (GPT-2, Llama 3, Qwen) have.

Their text is the bytes of all tokens, decoded at once: each token's characters follow from its bytes, without decoding
it among its neighbours as `spans.token_offsets` does for other tokenizers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

from rlhf_kit.rollout import CharRange


def byte_level_offsets(
    tokenizer: Any, ids: Sequence[int], text: str, skip_special_tokens: bool = True
) -> list[CharRange] | None:
    """Character range of each token within `text`, which `ids` decode to; None if the tokens' bytes do not make it.

    A token's range holds the characters of which it has a byte; a token without bytes has an empty range where it
    stands. Bytes that are no character come out as replacement characters, as many as Unicode says (section 3.9).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or not isinstance(backend.decoder, decoders.ByteLevel):
        return None
    added = backend.get_added_tokens_decoder() if skip_special_tokens else {}
    silent = {number for number, token in added.items() if token.special}
    pieces = [b"" if number in silent else _bytes_of(backend.id_to_token(number)) for number in ids]
    data = b"".join(pieces)
    if data.decode(errors="replace") != text:  # a clean-up of the text
        return None
    # owners[i]: the character that byte i belongs to; the last entry stands for the end.
    owners = np.append(np.cumsum(_character_starts(data)) - 1, len(text))
    places = np.fromiter(accumulate(map(len, pieces), initial=0), dtype=np.int64, count=len(pieces) + 1)
    starts = owners[places[:-1]]
    ends = np.where(np.diff(places) > 0, owners[places[1:] - 1] + 1, starts)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


def _character_starts(data: bytes) -> np.ndarray:
    """For each byte whether a character of `data.decode(errors="replace")` begins with it."""
    starts = (np.frombuffer(data, dtype=np.uint8) & 0xC0) != 0x80  # all but continuation bytes
    starts[list(_broken(data))] = True
    return starts


def _broken(data: bytes) -> Iterator[int]:
    """Where the bytes begin that come out as a replacement character; those that follow one are continuation bytes."""
    position = 0
    while position < len(data):
        try:
            data[position:].decode()
            return
        except UnicodeDecodeError as error:
            yield position + error.start
            position += error.end


@lru_cache(maxsize=2**18)
def _bytes_of(token: str | None) -> bytes:
    """The bytes that a token of the vocabulary stands for; a token with other characters stands for itself."""
    if token is None:
        return b""
    alphabet = _alphabet()
    known = [alphabet[character] for character in token if character in alphabet]
    return bytes(known) if len(known) == len(token) else token.encode()


@lru_cache(maxsize=1)
def _alphabet() -> dict[str, int]:
    """The printable character by which byte-level vocabularies write each byte (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
