"""Character ranges of tokens that stand for pieces of the text, wherever they stand: of most tokenizers, and fast.

A byte-level token (GPT-2, Llama 3, Qwen) is some bytes. A token of SentencePiece BPE, Unigram or WordPiece is what its
decoder adds for it behind another one; with byte fallback it may be a byte. The text is all pieces joined, so that each
token's characters follow from its piece, without decoding it among its neighbours as `spans.token_offsets` does else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import accumulate, groupby
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders

from rlhf_kit.credit.byte_level import bytes_of
from rlhf_kit.rollout import CharRange

_ANCHOR = "a"  # what stands before a token to see what a decoder adds for it
_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_REPLACEMENT = "\ufffd".encode()


def piece_offsets(
    tokenizer: Any, ids: Sequence[int], text: str, skip_special_tokens: bool = True
) -> list[CharRange] | None:
    """Character range of each token within `text`, which `ids` decode to; None if the tokens' pieces do not make it.

    A token's range holds the characters of which it has a byte; a token without bytes has an empty range where it
    stands. Bytes that are no character come out as replacement characters: of byte-level tokens as many as Unicode says
    (section 3.9), with byte fallback one for each byte of the run.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer) or backend.decoder is None:
        return None
    added = backend.get_added_tokens_decoder() if skip_special_tokens else {}
    silent = {number for number, token in added.items() if token.special}
    tokens = [None if number in silent else backend.id_to_token(number) for number in ids]
    if isinstance(backend.decoder, decoders.ByteLevel):
        pieces = [bytes_of(token) for token in tokens]
    else:
        pieces = _pieces(_table(backend.decoder), tokens)
    data = b"".join(pieces)
    if data.decode(errors="replace") != text:  # a clean-up of the text, or a decoder that looks at neighbours
        return None
    # owners[i]: the character that byte i belongs to; the last entry stands for the end.
    owners = np.append(np.cumsum(_character_starts(data)) - 1, len(text))
    places = np.fromiter(accumulate(map(len, pieces), initial=0), dtype=np.int64, count=len(pieces) + 1)
    starts = owners[places[:-1]]
    ends = np.where(np.diff(places) > 0, owners[places[1:] - 1] + 1, starts)
    return list(zip(starts.tolist(), ends.tolist(), strict=True))


class _Table(dict[str, bytes]):
    """What a decoder writes for a token behind another one; `raw` are the tokens that it reads as bytes."""

    def __init__(self, decoder: Any) -> None:
        super().__init__()
        self._decoder = decoder
        self.raw: set[str] = set()

    def __missing__(self, token: str) -> bytes:
        before, both = self._decoder.decode([_ANCHOR]), self._decoder.decode([_ANCHOR, token])
        byte = _BYTE.fullmatch(token)
        if byte is not None and both != before + token:
            self.raw.add(token)
            self[token] = bytes([int(byte[1], 16)])
        else:
            self[token] = both.removeprefix(before).encode()
        return self[token]

    def first(self, token: str) -> bytes:
        """What it writes for the first token: a space may be missing."""
        piece = self[token]
        return piece if token in self.raw else self._decoder.decode([token]).encode()


def _table(decoder: Any) -> _Table:
    return _TABLES.setdefault(decoder.__getstate__(), _Table(decoder))


_TABLES: dict[bytes, _Table] = {}  # by a decoder's configuration


def _pieces(table: _Table, tokens: Sequence[str | None]) -> list[bytes]:
    """The piece of each token; None is one that is not decoded."""
    pieces = [b"" if token is None else table[token] for token in tokens]
    shown = [k for k, token in enumerate(tokens) if token is not None]
    if shown:
        pieces[shown[0]] = table.first(tokens[shown[0]] or "")
    if table.raw:
        for raw, run in groupby(shown, key=lambda k: tokens[k] in table.raw):
            places = list(run) if raw else []
            if not _is_text(b"".join(pieces[k] for k in places)):
                for k in places:
                    pieces[k] = _REPLACEMENT
    return pieces


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


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
