"""Calls of the tokenizers library whose failures are errors of ours: it raises bare Exceptions, and its panics
derive from BaseException.
"""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers

from llm_edge.runtime.errors import BundleError, InputError, is_library_failure, one_line
from llm_edge.runtime.text.lazy_tokenizer import Backend


def load(text: str, name: object) -> tokenizers.Tokenizer:
    """A tokenizer from the content of a tokenizer.json; raises BundleError, whose message begins with `name`."""
    try:
        return tokenizers.Tokenizer.from_str(text)
    except BaseException as error:
        if not is_library_failure(error) or isinstance(error, MemoryError):
            raise
        raise BundleError(f"{name}: unusable tokenizer: {one_line(error)[:200]}") from error


def encode(tokenizer: Backend, text: str, add_special_tokens: bool = False) -> list[int]:
    """The ids of a text; raises InputError if it cannot be encoded."""
    try:
        ids: list[int] = tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
    except (TypeError, UnicodeEncodeError) as error:  # depending on the version of the library
        raise InputError("the text contains a lone surrogate, which is not a character") from error
    except BaseException as error:
        if not is_library_failure(error) or isinstance(error, MemoryError):
            raise
        why = one_line(error)[:200]
        raise InputError(
            f"the tokenizer cannot encode this text: {why}: shorten it, or use a bundle with another tokenizer"
        ) from error
    return ids


def decode(tokenizer: Backend, ids: Sequence[int], skip_special: bool) -> str:
    """The text of ids, without unknown ones; raises BundleError if they cannot be decoded."""
    try:
        text: str = tokenizer.decode(ids, skip_special_tokens=skip_special)
    except BaseException as error:
        if isinstance(error, MemoryError | TypeError | OverflowError) or not is_library_failure(error):  # wrong ids
            raise
        why = one_line(error)[:200]
        raise BundleError(f"tokenizer.json cannot decode these tokens: {why}: export the bundle again") from error
    return text
