"""Reads the tokenizer of a Hugging Face folder: vocabulary, special tokens and chat templates."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.checkpoint.huggingface.tokenizer_conversion import convert_tokenizer
from llm_edge.checkpoint.text.converted import ConvertedTokenizer
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, read_text, short_repr
from llm_edge.runtime.text.tokenizer_check import check_tokenizer

_TOKENIZER_KEYS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
    "bos_token", "clean_up_tokenization_spaces", "eos_token", "extra_special_tokens", "legacy", "model_input_names",
    "model_max_length", "pad_token", "padding_side", "unk_token",
)  # fmt: skip
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_ADDED_TOKEN = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_MAX_TEMPLATES = 64
_TEMPLATE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}")
_USED_TEMPLATES = ("default", "tool_use")


def read_tokenizer(
    folder: Path, generation: Mapping[str, Any], converted: ConvertedTokenizer | None = None
) -> TokenizerAssets:
    """Read the tokenizer of a folder as transformers does; `converted` is what `convert_tokenizer` returned for it.

    `special_tokens_map.json` and `added_tokens.json` count if `tokenizer_config.json` has no `added_tokens_decoder`.
    Template files replace the templates in `tokenizer_config.json`. A vocabulary of another kind than `tokenizer.json`
    is converted with transformers.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    path = folder / "tokenizer.json"
    raw = _optional_json(folder / "tokenizer_config.json")
    if converted is None and path.exists():
        converted = ConvertedTokenizer(read_text(path, 256 * MIB, error=CheckpointError))
    converted = converted or convert_tokenizer(folder, raw)
    tokenizer_json = converted.tokenizer_json
    check_tokenizer(tokenizer_json, path, error=CheckpointError)
    raw = {**converted.config, **raw}
    if "added_tokens_decoder" not in raw:
        raw = {**raw, **_optional_json(folder / "special_tokens_map.json")}
    tokenizer_json, unknown = _with_added_tokens(tokenizer_json, raw, folder)
    templates = _chat_templates(folder, raw)
    config = {key: raw[key] for key in _TOKENIZER_KEYS if key in raw and key not in unknown}
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 requires a mapping under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    eos = generation.get("eos_token_id", list(converted.eos_token_ids) or None)
    return TokenizerAssets(
        tokenizer_json=tokenizer_json,
        tokenizer_config=config,
        special_tokens_map={key: config[key] for key in _SPECIAL_TOKENS if config.get(key) is not None},
        chat_template=templates.get("default"),
        bos_token_id=generation.get("bos_token_id"),
        eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        pad_token_id=generation.get("pad_token_id"),
        named_templates={name: text for name, text in templates.items() if name != "default"},
        notes=(
            *(
                f"{key}: the token {short_repr(text)} is not in the vocabulary: ignored"
                for key, text in unknown.items()
            ),
            *(
                f"chat template {name!r}: kept for transformers, but llm-edge uses only default and tool_use"
                for name in templates
                if name not in _USED_TEMPLATES
            ),
        ),
    )


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path, error=CheckpointError) if path.exists() else {}


# ---- chat templates


def _chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Return the chat templates by name."""
    files = {"default": folder / "chat_template.jinja"}
    files |= {
        path.name.removesuffix(".jinja"): path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))
    }
    found: dict[str, Any] = {
        name: read_text(path, MIB, error=CheckpointError) for name, path in files.items() if path.exists()
    }
    where = folder / "tokenizer_config.json"
    if not found:
        template = config.get("chat_template")
        if isinstance(template, list):
            if not all(isinstance(entry, dict) for entry in template):
                raise CheckpointError(f"{where}: chat_template is not a list of named templates")
            found = {str(entry.get("name")): entry.get("template") for entry in template}
        elif template is not None:
            found = {"default": template}
    if len(found) > _MAX_TEMPLATES:
        raise CheckpointError(f"{folder}: {len(found)} chat templates; the limit is {_MAX_TEMPLATES}")
    for name, template in found.items():
        if not _TEMPLATE_NAME.fullmatch(name):
            raise CheckpointError(
                f"{folder}: the chat template name {short_repr(name)} is not letters, digits, - and _"
            )
        if not isinstance(template, str):
            raise CheckpointError(f"{where}: chat_template is not a string")
    return found


# ---- added tokens


def _with_added_tokens(tokenizer_json: str, config: Mapping[str, Any], folder: Path) -> tuple[str, dict[str, str]]:
    """Add what other files than tokenizer.json add; also return the named tokens that no file has an id for."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception:  # noqa: BLE001 (the library raises only this; the export reports it with a better message)
        return tokenizer_json, {}
    known = {token.content: token for token in tokenizer.get_added_tokens_decoder().values()}
    named = _named_tokens(config)
    missing = [token for token in _listed_tokens(config, named, folder) if token.content not in known]
    tokenizer.add_tokens(missing)
    unknown = {}
    for key, text in named.items():
        if tokenizer.token_to_id(text) is None:
            unknown[key] = text
        elif text not in known or not known[text].special:
            token = tokenizers.AddedToken(text, special=True)
            tokenizer.add_special_tokens([token])
            missing.append(token)
    return tokenizer.to_str() if missing else tokenizer_json, unknown


def _named_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the special tokens that a config names by their key (`bos_token`, ...); their text is not empty."""
    named = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and isinstance(text, str) and text:
            named[key] = text
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    values = extra.values() if isinstance(extra, Mapping) else extra if isinstance(extra, list) else ()
    for number, value in enumerate(values):
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str) and text:
            named[f"extra_special_tokens[{number}]"] = text
    return named


def _listed_tokens(config: Mapping[str, Any], named: Mapping[str, str], folder: Path) -> list[tokenizers.AddedToken]:
    """Return the tokens that `added_tokens_decoder` or `added_tokens.json` list, in ascending order of their ids."""
    listed: dict[int, tokenizers.AddedToken] = {}
    if "added_tokens_decoder" in config:
        entries, where = config["added_tokens_decoder"], folder / "tokenizer_config.json"
        entries = entries.items() if isinstance(entries, Mapping) else ()
        pairs = [
            (index, token.get("content") if isinstance(token, Mapping) else None, token) for index, token in entries
        ]
    else:
        where = folder / "added_tokens.json"
        special = set(named.values())
        pairs = [
            (index, text, {"content": text, "special": text in special, "normalized": text not in special})
            for text, index in _optional_json(where).items()
        ]
    for index, text, token in pairs:
        if not isinstance(text, str) or not text or not re.fullmatch(r"\d{1,9}", str(index)):
            raise CheckpointError(f"{where}: the added token {short_repr(index)} has no text or no valid id")
        fields = {key: token[key] for key in _ADDED_TOKEN[1:] if isinstance(token.get(key), bool)}
        listed[int(index)] = tokenizers.AddedToken(text, **fields)
    return [token for _, token in sorted(listed.items(), key=lambda item: item[0])]
