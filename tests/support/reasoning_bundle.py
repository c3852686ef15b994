"""Bundles of reasoning models: copies of a small one with other tokens, template and manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_edge.runtime.bundle import MANIFEST, manifest_entry


def bundle_with(
    tiny: Path,
    folder: Path,
    added: Mapping[int, str],
    *,
    special: bool,
    template: str | None = None,
    post_processor: Mapping[str, Any] | None = None,
    **manifest: Any,
) -> Path:
    """A copy of a bundle; `added` are further tokens of its tokenizer, by id; `post_processor` replaces its own."""
    shutil.copytree(tiny, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    like = tokenizer["added_tokens"][0]
    for number, text in added.items():
        tokenizer["added_tokens"].append(like | {"id": number, "content": text, "special": special})
    if post_processor is not None:
        tokenizer["post_processor"] = post_processor
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    content["files"] = {name: manifest_entry(folder / name) for name in content["files"]}
    (folder / MANIFEST).write_text(json.dumps(content | manifest), encoding="utf-8")
    return folder
