"""The bytes that the tokens of byte-level tokenizers (GPT-2, Llama 3, Qwen) stand for."""

from __future__ import annotations

from functools import lru_cache


@lru_cache(maxsize=2**18)
def bytes_of(token: str | None) -> bytes:
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
