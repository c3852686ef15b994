"""Reads the tokenizer and the generation config of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.base import TokenizerAssets
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, read_text, short_repr
from llm_edge.runtime.text.tokenizer_check import check_tokenizer

_TOKENIZER_KEYS = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "added_tokens_decoder", "additional_special_tokens",
    "bos_token", "clean_up_tokenization_spaces", "eos_token", "extra_special_tokens", "legacy", "model_input_names",
    "model_max_length", "pad_token", "padding_side", "unk_token",
)  # fmt: skip
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_GENERATION_KEYS = (
    "bos_token_id", "do_sample", "eos_token_id", "max_length", "max_new_tokens", "min_p", "pad_token_id",
    "repetition_penalty", "temperature", "top_k", "top_p",
)  # fmt: skip
_GENERATION_NUMBERS = {"max_length", "max_new_tokens", "min_p", "repetition_penalty", "temperature", "top_k", "top_p"}


def read_generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the supported keys of `generation_config.json`; missing token ids are taken from `config.json`."""
    path = folder / "generation_config.json"
    raw = read_json(path, error=CheckpointError) if path.exists() else {}
    generation = {key: raw[key] for key in _GENERATION_KEYS if raw.get(key) is not None}
    for key in _GENERATION_NUMBERS & generation.keys():
        number = generation[key]
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e12:  # or NaN
            raise CheckpointError(f"{path}: {key} is {number!r}, not a number")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = generation.pop(key, None)
        value = config.get(key) if value is None else value
        ids = _token_ids(value, allow_list=key == "eos_token_id")
        if ids is None:
            raise CheckpointError(f"{folder}: {key} is {short_repr(value)}, not a token id")
        if ids:
            generation[key] = ids[0] if len(ids) == 1 else ids
    return generation


def _token_ids(value: Any, *, allow_list: bool) -> list[int] | None:
    """Return the ids in a config's value, or None if it is invalid. Null and negative ids mean "none"."""
    ids = value if isinstance(value, list) and allow_list else [value]
    if not all(token is None or (isinstance(token, int) and not isinstance(token, bool)) for token in ids):
        return None
    if any(token is not None and token.bit_length() > 63 for token in ids):
        return None
    return [token for token in ids if token is not None and token >= 0]


def read_tokenizer(folder: Path, generation: Mapping[str, Any]) -> TokenizerAssets:
    """Read `tokenizer.json`, `tokenizer_config.json` and the chat template of a folder."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: save one with transformers "
            "(AutoTokenizer.from_pretrained(…).save_pretrained(…))"
        )
    tokenizer_json = read_text(path, 256 * MIB, error=CheckpointError)
    check_tokenizer(tokenizer_json, path, error=CheckpointError)
    config_path = folder / "tokenizer_config.json"
    raw = read_json(config_path, error=CheckpointError) if config_path.exists() else {}
    template_path = folder / "chat_template.jinja"
    template = raw.get("chat_template")
    if template_path.exists():
        template = read_text(template_path, MIB, error=CheckpointError)
    elif isinstance(template, list):  # several named templates
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{config_path}: chat_template is not a string")

    config = {key: raw[key] for key in _TOKENIZER_KEYS if key in raw}
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 requires a mapping under this name
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    eos = generation.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return TokenizerAssets(
        tokenizer_json=tokenizer_json,
        tokenizer_config=config,
        special_tokens_map={key: raw[key] for key in _SPECIAL_TOKENS if raw.get(key) is not None},
        chat_template=template,
        bos_token_id=generation.get("bos_token_id"),
        eos_token_ids=eos_ids,
        pad_token_id=generation.get("pad_token_id"),
    )
