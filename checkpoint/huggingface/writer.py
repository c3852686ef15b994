"""Writes the configuration and tokenizer files of a Hugging Face folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.base import AnyCheckpoint, TokenizerAssets
from llm_edge.runtime.bundle import TEMPLATE_FOLDER

_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def hf_config(checkpoint: AnyCheckpoint) -> dict[str, Any]:
    """Return `config.json` for transformers; unknown token ids are null, so that no default applies."""
    return {
        **checkpoint.hf_config,
        **{key: checkpoint.generation.get(key) for key in _ID_KEYS},
        "max_position_embeddings": checkpoint.config.max_position_embeddings,
    }


def write_tokenizer(folder: Path, tokenizer: TokenizerAssets, **config: Any) -> None:
    """Write the files of a tokenizer; `config` are further keys of `tokenizer_config.json`."""
    tokenizer_config = {**tokenizer.tokenizer_config, **config}
    if tokenizer.chat_template is not None:
        tokenizer_config["chat_template"] = tokenizer.chat_template
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    for name, template in tokenizer.named_templates.items():
        (folder / TEMPLATE_FOLDER).mkdir(exist_ok=True)
        (folder / TEMPLATE_FOLDER / f"{name}.jinja").write_text(template, encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.tokenizer_json, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_json(folder / "special_tokens_map.json", tokenizer.special_tokens_map)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write indented UTF-8 JSON with a trailing newline."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
