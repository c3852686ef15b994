"""`token_text`: a single token as text."""

from __future__ import annotations

from llm_edge.runtime.text.tokenizer import Tokenizer


def token_text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; its spelling in the vocabulary if it is part of a character."""
    once = tokenizer.decode([token], skip_special=False)
    text = tokenizer.decode([token, token], skip_special=False)[len(once) :]  # decoders may trim the first token
    if text and "\ufffd" not in text:
        return text
    return tokenizer.token_text(token) or f"<{token}>"
