"""Reads tokenizer.json and tokenizer_config.json into a tokenizer of the `tokenizers` library."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from llm_edge.runtime.errors import BundleError, one_line
from llm_edge.runtime.text import tokenizer_library as library
from llm_edge.runtime.text.tokenizer_check import check_lengths, check_tokenizer

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PREFIXED = re.compile(r'"continuing_subword_prefix"\s*:\s*"[^"]')


def load_checked(text: str, where: Path, named: Mapping[str, str], vocab_size: int | None) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json, with the `named` tokens as special ones; see `Tokenizer.from_files`."""
    check_tokenizer(text, where, vocab_size)
    backend = load_spec(text, where)
    backend.no_truncation()
    backend.no_padding()
    check_lengths(named.values(), lambda reason: BundleError(f"{where}: unusable tokenizer: {reason}"))
    known = {t.content for t in backend.get_added_tokens_decoder().values() if t.special}
    for name, token in named.items():
        if backend.token_to_id(token) is not None:
            if token not in known:
                backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])
        elif name in ("bos_token", "eos_token"):
            raise BundleError(f"{where}: no token {token!r}, which tokenizer_config.json names as {name}")
    return backend


def load_spec(text: str, name: object) -> tokenizers.Tokenizer:
    """The tokenizer in a tokenizer.json; raises BundleError, whose message begins with `name`."""
    try:
        if _PREFIXED.search(text):  # the library aborts the process if such merges do not match
            model = json.loads(text)["model"]
            prefix, pairs = model["continuing_subword_prefix"], map(_pair, model.get("merges", ()))
            if not all(second.startswith(prefix) for _, second in pairs):
                raise ValueError("merges without the model's prefix")
    except Exception as e:
        raise BundleError(f"{name}: unusable tokenizer: {one_line(e)[:200]}") from e
    return library.load(text, name)


def _pair(merge: Any) -> list[str]:
    return merge.split(" ") if isinstance(merge, str) else merge


def named_tokens(config: Mapping[str, Any], path: Path) -> dict[str, str]:
    """Texts of the special tokens by role, from the content of tokenizer_config.json."""
    named = {}
    for name in _NAMED:
        token = config.get(name)
        if isinstance(token, Mapping):
            token = token.get("content")
        if token is not None and not (isinstance(token, str) and token):
            raise BundleError(f"{path.with_name('tokenizer_config.json')}: {name} is not the text of a token")
        if token is not None:
            named[name] = token
    return named


def configured_templates(config: Mapping[str, Any]) -> dict[str, str]:
    """Sources of the chat templates in the content of tokenizer_config.json, by name."""
    template = config.get("chat_template")
    if isinstance(template, list):  # the former way of storing several
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        return {name: text for name, text in named.items() if isinstance(name, str) and isinstance(text, str)}
    return {"default": template} if isinstance(template, str) else {}


def with_names(spec: dict[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Rename tokens in the content of a tokenizer.json."""
    model = spec["model"]
    vocab = model["vocab"]
    if isinstance(vocab, dict):
        model["vocab"] = {names.get(text, text): number for text, number in vocab.items()}
    else:  # Unigram: [text, score]
        model["vocab"] = [[names.get(text, text), score] for text, score in vocab]
    if "merges" in model:  # merges with a renamed token would refer to missing ids
        model["merges"] = [[a, b] for a, b in map(_pair, model["merges"]) if not {a, b, a + b} & names.keys()]
    if isinstance(model.get("unk_token"), str):
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    return spec
