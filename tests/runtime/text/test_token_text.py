"""Single tokens as bytes, for byte-level vocabularies and those with a byte fallback."""

from __future__ import annotations

from pathlib import Path

import tiny
import tokenizers
from tokenizers import decoders, models

from llm_edge.runtime.text.token_text import token_bytes, token_text
from llm_edge.runtime.text.tokenizer import Tokenizer


def read(backend: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    backend.save(str(folder / "tokenizer.json"))
    return Tokenizer.from_files(folder / "tokenizer.json", {}, None)


def test_bytes_of_byte_level_tokens_add_up_to_the_text(tmp_path: Path) -> None:
    tokenizer = read(tiny.tokenizer(), tmp_path)
    for code in [*range(0x250), 0x4F60, 0xFFFD, 0x1F642]:
        text = f"a{chr(code)} b"
        assert b"".join(token_bytes(tokenizer, token) for token in tokenizer.encode(text)) == text.encode()


def test_bytes_of_fallback_tokens_are_those_they_name(tmp_path: Path) -> None:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"▁": 256, "a": 257, "é": 258}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = read(backend, tmp_path)
    assert [token_bytes(tokenizer, token) for token in (0xF0, 0x41, 256, 257, 258)] == [
        b"\xf0",
        b"A",
        b" ",
        b"a",
        "é".encode(),
    ]
    assert token_text(tokenizer, 0xF0) == "<0xF0>"
