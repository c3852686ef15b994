"""Failures of the tokenizers library are errors of one line, its panics included, and long prompts are not encoded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers

from llm_edge.runtime import Model
from llm_edge.runtime.errors import BundleError, ContextLengthError, InputError, LlmEdgeError
from llm_edge.runtime.text import tokenizer_library
from llm_edge.runtime.text.tokenizer import TextStream, Tokenizer

BACKTRACKING = "a" * 60 + "!"


class PanicException(BaseException):
    """What Rust's panics are in Python: no Exception."""


def with_pattern() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "!": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    return backend


def with_decoder() -> tokenizers.Tokenizer:
    backend = tiny.tokenizer()
    backend.decoder = decoders.Sequence(
        [
            decoders.ByteLevel(),
            decoders.Replace(Regex(r"[\s\S]"), BACKTRACKING),
            decoders.Replace(Regex(r"(a+)+$"), "b"),
        ]
    )
    return backend


UNENCODABLE: dict[str, tuple[Callable[[], tokenizers.Tokenizer], str]] = {
    "a word level without its unknown token": (lambda: tokenizers.Tokenizer(models.WordLevel({"a": 0})), "b"),
    "word pieces without their unknown token": (lambda: tokenizers.Tokenizer(models.WordPiece({"a": 0})), "b"),
    "a pattern that backtracks too often": (with_pattern, BACKTRACKING),
}


def check_line(error: LlmEdgeError, start: str) -> None:
    assert re.fullmatch(rf"{start}: [^\n]+: [^\n]+", str(error))


@pytest.mark.parametrize("case", UNENCODABLE)
def test_a_text_that_cannot_be_encoded_is_rejected(case: str) -> None:
    make, text = UNENCODABLE[case]
    with pytest.raises(InputError) as failed:
        Tokenizer(make(), {}, None).encode(text)
    check_line(failed.value, "the tokenizer cannot encode this text")


def test_a_panic_of_the_decoder_is_an_error() -> None:
    tokenizer = Tokenizer(with_decoder(), {}, None)
    with pytest.raises(BundleError) as failed:
        tokenizer.decode([300, 301])
    check_line(failed.value, "tokenizer.json cannot decode these tokens")
    stream = TextStream(tokenizer)
    with pytest.raises(BundleError):
        stream.push(300)


class Broken:
    """A tokenizer whose calls raise."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def encode(self, *_: Any, **__: Any) -> Any:
        raise self.error

    decode = encode


@pytest.mark.parametrize("error", [Exception("a\nb"), PanicException("a\nb"), RuntimeError(), OSError(5, "a")])
def test_any_failure_of_the_library_is_an_error_of_one_line(error: BaseException) -> None:
    broken: Any = Broken(error)
    with pytest.raises(InputError) as failed:
        tokenizer_library.encode(broken, "a")
    assert "\n" not in str(failed.value)
    with pytest.raises(BundleError) as failed:
        tokenizer_library.decode(broken, [1], skip_special=True)
    assert "\n" not in str(failed.value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_interrupts_and_lack_of_memory_are_passed_on(error: type[BaseException]) -> None:
    broken: Any = Broken(error())
    with pytest.raises(error):
        tokenizer_library.encode(broken, "a")
    with pytest.raises(error):
        tokenizer_library.decode(broken, [1], skip_special=True)


def test_a_prompt_longer_than_any_context_of_tokens_is_rejected_before_it_is_encoded(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)
    text, message_text = " " * 10_500_000 + "x", " " * 2_000_000 + "x"  # templates are limited to a few MB

    def encode(*_: object) -> list[int]:
        raise AssertionError("encoded")

    monkeypatch.setattr(tokenizer_library, "encode", encode)
    message = r"^the prompt has at least \d+ tokens, but the model's context holds 1024: shorten the prompt$"
    asked: list[Callable[[], object]] = [
        lambda: model.generate(text),
        lambda: model.chat([{"role": "user", "content": message_text}]),
        lambda: model.chat([{"role": "user", "content": "<|im_end|>" + message_text}]),
        lambda: model.score(text),
    ]
    for ask in asked:
        with pytest.raises(ContextLengthError, match=message) as refused:
            ask()
        assert refused.value.prompt_tokens > refused.value.limit


def test_a_long_text_that_fits_is_encoded(tiny_bundle: Path) -> None:
    model = Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)
    longest = max(model.tokenizer.token_text(token) or "" for token in range(3, 320))
    assert model.tokenizer.encode(longest * 4000)  # the tokenizer itself has no limit
    with pytest.raises(ContextLengthError, match=r"^the prompt has \d+ tokens"):
        model.generate("x" * 1100)
