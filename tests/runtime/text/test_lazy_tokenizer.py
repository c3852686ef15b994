"""Tokenizers loaded in parts: they encode and decode as the whole ones do, and their tables are cached."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.text import lazy_tokenizer, table_cache
from llm_edge.runtime.text.lazy_tokenizer import LazyTokenizer, table_of
from llm_edge.runtime.text.table_cache import cache_folder, cached_tokenizer, make_table
from llm_edge.runtime.text.tokenizer import Tokenizer
from llm_edge.runtime.text.vocabulary_table import VocabularyTable, packed

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dogs of the foxes jump over 1234567890 lazy quick dogs.",
    "def main():\n    print('hello world')\n\n    return [x ** 2 for x in range(100)]\n",
    "Äpfel, señor, 你好世界, naïve café 🙂🙂 — “quotes” … ﬁne",
]
SPECIALS = ["<unk>", "<s>", "</s>", "<|im_end|>"]
NAMED = {"bos_token": "<s>"}


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2's."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback() -> tokenizers.Tokenizer:
    """As Gemma's: a text is one word, and characters without a token become bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps)
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*SPECIALS, *bytes_])
    tokenizer.train_from_iterator(CORPUS[:2], trainer)
    spec = json.loads(tokenizer.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in SPECIALS]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def words() -> tokenizers.Tokenizer:
    """Unknown characters, added tokens that are no special ones, and whole words that skip the merges."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", ignore_merges=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIALS))
    tokenizer.add_tokens(["<think>", "lazy dog"])
    return tokenizer


@pytest.fixture(scope="module", params=[byte_level, byte_fallback, words])
def whole(request: pytest.FixtureRequest) -> tokenizers.Tokenizer:
    build: Callable[[], tokenizers.Tokenizer] = request.param
    tokenizer = build()
    bos = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return tokenizer


def lazy(whole: tokenizers.Tokenizer, texts: int = 10**9) -> LazyTokenizer:
    """Without the whole; `texts` is the number of characters that it encodes in parts."""

    def load() -> tokenizers.Tokenizer:
        raise AssertionError("the whole was loaded")

    data = table_of(whole)
    assert data is not None
    tokenizer = LazyTokenizer(VocabularyTable(data), load)
    tokenizer._left = texts
    return tokenizer


def random_texts(count: int) -> list[str]:
    rng = random.Random(1)
    parts = [*SPECIALS, "<think>", "lazy dog", " ", "  ", "\n", "\0", "▁", "Ġ", "é", "🙂", "\u0301", "xyz", "<0x41>"]
    text = "".join(CORPUS)
    found = ["", " ", *CORPUS]
    while len(found) < count:
        start = rng.randrange(len(text))
        found.append("".join(rng.choices([*parts, text[start : start + 15], text[start]], k=rng.randrange(8))))
    return found


def test_texts_are_encoded_as_by_the_whole(whole: tokenizers.Tokenizer) -> None:
    tokenizer = lazy(whole)
    for text in random_texts(400):
        for special in (False, True):
            expected = whole.encode(text, add_special_tokens=special).ids
            assert tokenizer.encode(text, add_special_tokens=special).ids == expected, text


def test_ids_are_decoded_as_by_the_whole(whole: tokenizers.Tokenizer) -> None:
    tokenizer, rng = lazy(whole), random.Random(2)
    size = whole.get_vocab_size()
    assert tokenizer.get_vocab_size() == size
    for _ in range(400):
        ids = [rng.randrange(size + 3) for _ in range(rng.randrange(9))]
        for skip in (False, True):
            assert tokenizer.decode(ids, skip) == whole.decode(ids, skip_special_tokens=skip), ids
    with pytest.raises(OverflowError):
        tokenizer.decode([-1])


def test_tokens_have_the_ids_of_the_whole(whole: tokenizers.Tokenizer) -> None:
    tokenizer = lazy(whole)
    for number in range(whole.get_vocab_size() + 3):
        text = whole.id_to_token(number)
        assert tokenizer.id_to_token(number) == text
        if text is not None:
            assert tokenizer.token_to_id(text) == whole.token_to_id(text)
    assert tokenizer.token_to_id("no such token") is None
    added = tokenizer.get_added_tokens_decoder()
    assert {number: token.content for number, token in added.items()} == {
        number: token.content for number, token in whole.get_added_tokens_decoder().items()
    }


def test_many_texts_load_the_whole() -> None:
    whole = byte_level()
    tokenizer = lazy(whole, texts=10)
    assert tokenizer.encode("brown fox").ids == whole.encode("brown fox").ids
    with pytest.raises(AssertionError, match="the whole was loaded"):
        tokenizer.encode("brown fox")


def test_models_with_other_options_have_no_table() -> None:
    whole = tokenizers.Tokenizer(models.BPE(continuing_subword_prefix="##"))
    assert table_of(whole) is None


@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: b"x" + data, lambda data: b"", bytes.upper])
def test_a_damaged_table_is_rejected(change: Callable[[bytes], bytes]) -> None:
    data = packed({"a": 0, "b": 1, "ab": 2}, [("a", "b")], "info")
    assert VocabularyTable(data).part(["xab"], ()) == ({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    with pytest.raises(ValueError, match="damaged"):
        VocabularyTable(change(data))


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tokenizer.json that counts as large, with an empty cache; no process makes a table."""
    monkeypatch.setattr(lazy_tokenizer, "_MIN_TOKENS", 0)
    monkeypatch.setattr(table_cache, "_make_table_later", lambda *_: None)
    monkeypatch.setenv("LLM_EDGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "tokenizer.json"
    byte_level().save(str(path))
    return path


def key_of(path: Path) -> str:
    return table_cache._key(path.read_bytes(), NAMED, 500)


def test_a_table_in_the_cache_replaces_the_whole(file: Path) -> None:
    whole = cached_tokenizer(file, NAMED, 500)
    assert isinstance(whole, tokenizers.Tokenizer)
    make_table(file, key_of(file), NAMED, 500)
    found = cached_tokenizer(file, NAMED, 500)
    assert isinstance(found, LazyTokenizer)
    assert [found.encode(text).ids for text in CORPUS] == [whole.encode(text).ids for text in CORPUS]
    assert found.to_str() == whole.to_str()
    assert isinstance(cached_tokenizer(file, {}, 500), tokenizers.Tokenizer)  # other special tokens


def test_a_tokenizer_from_the_cache_serves_conversations(file: Path) -> None:
    config = {"bos_token": "<s>"}
    template = "{% for m in messages %}<s>{{ m.content }}<|im_end|>{% endfor %}"
    messages = [{"role": "user", "content": "The <s> fox<|im_end|>"}, {"role": "assistant", "content": "jumps"}]
    make_table(file, key_of(file), NAMED, 500)
    found = Tokenizer.from_files(file, config, template, vocab_size=500, cached=True)
    whole = Tokenizer.from_files(file, config, template, vocab_size=500)
    assert isinstance(found._backend, LazyTokenizer)
    assert found.encode_chat(messages) == whole.encode_chat(messages)
    assert found.encode("a <s> b") == whole.encode("a <s> b")
    assert found.vocab_size == whole.vocab_size
    assert found.bos_token_id == whole.bos_token_id


def test_a_damaged_table_in_the_cache_is_ignored(file: Path) -> None:
    make_table(file, key_of(file), NAMED, 500)
    folder = cache_folder()
    assert folder is not None
    (folder / key_of(file)).write_bytes(b"damaged")
    assert isinstance(cached_tokenizer(file, NAMED, 500), tokenizers.Tokenizer)


def test_a_file_that_changes_after_loading_is_not_read_again(file: Path) -> None:
    make_table(file, key_of(file), NAMED, 500)
    found = cached_tokenizer(file, NAMED, 500)
    file.write_text(file.read_text() + "\n")
    with pytest.raises(BundleError, match="modified since"):
        found.to_str()
    assert isinstance(cached_tokenizer(file, NAMED, 500), tokenizers.Tokenizer)


def test_the_cache_keeps_the_tables_used_last(file: Path) -> None:
    folder = cache_folder()
    assert folder is not None
    folder.mkdir(parents=True)
    for number in range(12):
        (folder / str(number)).write_bytes(b"")
        os.utime(folder / str(number), (number, number))
    make_table(file, key_of(file), NAMED, 500)
    assert sorted(each.name for each in folder.iterdir()) == sorted([key_of(file), *map(str, range(5, 12))])


def test_an_empty_variable_turns_the_cache_off(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_EDGE_CACHE", "")
    assert cache_folder() is None
    make_table(file, key_of(file), NAMED, 500)
    assert isinstance(cached_tokenizer(file, NAMED, 500), tokenizers.Tokenizer)
