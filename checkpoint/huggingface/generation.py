"""Reads the generation config of a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import read_json, short_repr
from llm_edge.runtime.sampling.generation_config import COMBINED, IGNORED, SUPPORTED, TOKEN_IDS, read_generation_config


def read_generation(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the entries of `generation_config.json` that apply, and a note on each that does not.

    Without the file, the same keys of `config.json` count, as in transformers. Token ids that the file lacks are taken
    from `config.json`, because an answer without an end token would never end.
    """
    path = folder / "generation_config.json"
    name = path.name
    if path.exists():
        content: Mapping[str, Any] = read_json(path, error=CheckpointError)
    else:
        known = {*SUPPORTED, *COMBINED, *IGNORED}
        content, name = {key: value for key, value in config.items() if key in known}, "config.json"
    ids: dict[str, Any] = {}
    for key in TOKEN_IDS:
        value = content.get(key)
        value = config.get(key) if value is None else value
        found = _token_ids(value, allow_list=key == "eos_token_id")
        if found is None:
            raise CheckpointError(f"{folder}: {key} is {short_repr(value)}, not a token id")
        if found:
            ids[key] = found[0] if len(found) == 1 else found
    ends = ids.get("eos_token_id", [])
    context = config.get("max_position_embeddings")
    defaults = read_generation_config(
        content, ends if isinstance(ends, list) else [ends], context if isinstance(context, int) else None
    )
    notes = [f"{name}: {reason}: this entry is left out" for reason in defaults.invalid]
    notes += [f"{name}: ignored: {reason}" for reason in defaults.ignored]
    return {**defaults.entries, **ids}, tuple(notes)


def _token_ids(value: Any, *, allow_list: bool) -> list[int] | None:
    """Return the ids in a config's value, or None if it is invalid. Null and negative ids mean "none"."""
    ids = value if isinstance(value, list) and allow_list else [value]
    if not all(token is None or (isinstance(token, int) and not isinstance(token, bool)) for token in ids):
        return None
    if any(token is not None and token.bit_length() > 63 for token in ids):
        return None
    return [token for token in ids if token is not None and token >= 0]
