"""Removes tokens that a model has no embedding for, as of a tokenizer to which tokens were added without resizing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from llm_edge.checkpoint.base import Checkpoint, ConfigT, TokenizerAssets, WeightsT
from llm_edge.runtime.errors import CheckpointError

_MIN_LIMIT, _LIMIT_FRACTION = 64, 0.01  # of the vocabulary; a larger difference is another model's tokenizer
_ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")


def fit_to_embedding(checkpoint: Checkpoint[ConfigT, WeightsT]) -> Checkpoint[ConfigT, WeightsT]:
    """Return the checkpoint without tokens and token ids beyond its embedding, and with a note about them.

    transformers loads such a model and fails when one of the tokens occurs in a text. Without them, the text of such
    a token is encoded as other tokens.

    Raises:
        CheckpointError: so many tokens are beyond the embedding that the tokenizer is of another model, or one of them
            is added to every text.
    """
    size: int = checkpoint.config.vocab_size  # type: ignore[attr-defined]
    assets, notes = checkpoint.tokenizer, []
    try:
        content = json.loads(assets.tokenizer_json)
        removed = _remove_tokens(content, size)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # reported where it is loaded
        return checkpoint
    if removed:
        _check_tokens(content, removed, size)
        assets = _without_tokens(assets, content, set(removed.values()))
        shown = ", ".join(ascii(text)[1:-1][:60] for text in list(removed.values())[:3])
        more = f" and {len(removed) - 3} more" if len(removed) > 3 else ""
        notes.append(f"tokens without an embedding (it has {size} rows) are left out: {shown}{more}")
    generation = dict(checkpoint.generation)
    for key in _ID_KEYS:
        ids = generation.get(key, [])
        listed = ids if isinstance(ids, list) else [ids]
        kept = [token for token in listed if token < size]
        if len(kept) < len(listed):
            notes.append(f"{key} {', '.join(str(it) for it in listed if it >= size)} has no embedding and is left out")
            del generation[key]
            generation.update({key: kept[0] if len(kept) == 1 else kept} if kept else {})
    if not notes:
        return checkpoint
    bos, pad = assets.bos_token_id, assets.pad_token_id
    assets = dataclasses.replace(
        assets,
        bos_token_id=bos if bos is not None and bos < size else None,
        eos_token_ids=tuple(token for token in assets.eos_token_ids if token < size),
        pad_token_id=pad if pad is not None and pad < size else None,
    )
    return dataclasses.replace(checkpoint, tokenizer=assets, generation=generation, notes=(*checkpoint.notes, *notes))


def _remove_tokens(content: dict[str, Any], size: int) -> dict[int, str]:
    """Remove the tokens from `size` on from the content of a `tokenizer.json`; return their texts by id."""
    removed = {token["id"]: token["content"] for token in content["added_tokens"] if token["id"] >= size}
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < size]
    model = content["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):  # Unigram: [token, score], in the order of ids
        removed |= {size + number: token for number, (token, _) in enumerate(vocabulary[size:])}
        model["vocab"], vocabulary = vocabulary[:size], {}
    beyond = {token: number for token, number in vocabulary.items() if number >= size}
    if beyond:
        removed |= {number: token for token, number in beyond.items()}
        model["vocab"] = {token: number for token, number in vocabulary.items() if number < size}
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not _uses(merge, beyond)]
    if not all(isinstance(text, str) for text in removed.values()):
        raise TypeError
    return dict(sorted(removed.items()))


def _uses(merge: str | list[str], tokens: Mapping[str, int]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in tokens or right in tokens or left + right in tokens


def _check_tokens(content: Mapping[str, Any], removed: Mapping[int, str], size: int) -> None:
    if len(removed) > max(_MIN_LIMIT, size * _LIMIT_FRACTION):
        raise CheckpointError(
            f"the tokenizer has a token {max(removed)}, but the model's vocabulary has {size} tokens: "
            "use the tokenizer that belongs to the weights"
        )
    added = json.dumps(content.get("post_processor"))
    for text in removed.values():
        if json.dumps(text) in added:
            raise CheckpointError(
                f"the tokenizer adds {text!a} to every text, but the model's vocabulary has only {size} tokens: "
                "use the tokenizer that belongs to the weights"
            )


def _without_tokens(assets: TokenizerAssets, content: dict[str, Any], texts: set[str]) -> TokenizerAssets:
    """Return the files of a tokenizer with a changed `tokenizer.json`, without references to these tokens."""
    padding = content.get("padding")
    if isinstance(padding, dict) and str(padding.get("pad_token")) in texts:
        content["padding"] = None

    def keep(value: Any) -> bool:
        text = value.get("content") if isinstance(value, dict) else value
        return not (isinstance(text, str) and text in texts)

    config = {key: value for key, value in assets.tokenizer_config.items() if keep(value)}
    for key, value in config.items():
        if isinstance(value, list):
            config[key] = [item for item in value if keep(item)]
        elif key == "added_tokens_decoder" and isinstance(value, dict):
            config[key] = {number: token for number, token in value.items() if keep(token)}
    return dataclasses.replace(
        assets,
        tokenizer_json=json.dumps(content, ensure_ascii=False),
        tokenizer_config=config,
        special_tokens_map={key: value for key, value in assets.special_tokens_map.items() if keep(value)},
    )
