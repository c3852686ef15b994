"""`token_text` and `token_bytes`: a single token as text and as bytes."""

from __future__ import annotations

import functools
import re

from llm_edge.runtime.text.tokenizer import Tokenizer

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # a byte in the vocabularies of SentencePiece


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; its spelling in the vocabulary if it is part of a character."""
    text = _whole_text(tokenizer, token)
    return text if text is not None else tokenizer.token_text(token) or f"<{token}>"


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """The bytes of a token, which may be part of a character."""
    text = _whole_text(tokenizer, token)
    if text is not None:
        return text.encode("utf-8", "replace")
    spelling = tokenizer.token_text(token) or ""
    if fallback := _FALLBACK.fullmatch(spelling):
        return bytes.fromhex(fallback[1])
    known = _byte_of_char()
    if all(char in known for char in spelling):
        return bytes(known[char] for char in spelling)
    return spelling.encode("utf-8", "replace")


def _whole_text(tokenizer: Tokenizer, token: int) -> str | None:
    """The text of a token; None if it has none by itself."""
    once = tokenizer.decode([token], skip_special=False)
    text = tokenizer.decode([token, token], skip_special=False)[len(once) :]  # decoders may trim the first token
    return text if text and "\ufffd" not in text else None


@functools.cache
def _byte_of_char() -> dict[str, int]:
    """The byte for each character of byte-level vocabularies.

    Printable characters of Latin-1 stand for themselves, and the other bytes, in order, for U+0100 and what follows.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
