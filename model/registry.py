"""`find_family`: looks up a `model_type` among the built-in families and those of installed packages."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
from collections.abc import Iterable, Mapping

from llm_edge.model.family import Family
from llm_edge.runtime.errors import CheckpointError, UnknownFamilyError

BUILT_IN: Mapping[str, str] = {  # model_type -> module in `families/` that defines `FAMILY`
    "arcee": "arcee",
    "cohere": "cohere",
    "cohere2": "cohere2",
    "exaone4": "exaone4",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "glm": "glm",
    "glm4": "glm4",
    "gpt2": "gpt2",
    "gpt_bigcode": "gpt_bigcode",
    "gpt_neo": "gpt_neo",
    "gpt_neox": "gpt_neox",
    "granite": "granite",
    "helium": "helium",
    "llama": "llama",
    "ministral3": "ministral3",
    "mistral": "mistral",
    "nemotron": "nemotron",
    "olmo": "olmo",
    "olmo2": "olmo2",
    "olmo3": "olmo3",
    "phi": "phi",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "seed_oss": "seed_oss",
    "smollm3": "smollm3",
    "stablelm": "stablelm",
    "starcoder2": "starcoder2",
}
ENTRY_POINT_GROUP = "llm_edge.families"


def find_family(model_type: str, where: str = "config.json") -> Family:
    """Return the family of a `model_type`: a built-in one, or one registered by an installed package.

    `model_type` comes from an untrusted file, so it is only compared with known names, never imported. Packages cannot
    replace built-in families. docs/families.md describes how a package registers a family. Messages name the config's
    path, `where`.

    Raises:
        CheckpointError: there is no such family, or the package that registers it is broken.
    """
    if model_type in BUILT_IN:
        family: Family = importlib.import_module(f"llm_edge.model.families.{BUILT_IN[model_type]}").FAMILY
        return family
    entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    found = {entry.value: entry for entry in entry_points if entry.name == model_type}
    if not found:
        raise unknown_family(model_type, where, {*BUILT_IN, *entry_points.names})
    if len(found) > 1:
        names = " and ".join(sorted(found))
        raise CheckpointError(f"{where}: family {model_type!r} is registered by {names}: uninstall all but one of them")
    ((value, entry),) = found.items()
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise CheckpointError(
            f"{where}: family {model_type!r}: {value} cannot be imported ({reason[:300]}): fix or update its package"
        ) from error
    if not isinstance(loaded, Family):
        raise CheckpointError(
            f"{where}: family {model_type!r}: {value} is a {type(loaded).__name__}, not a Family: fix its package"
        )
    return loaded


def unknown_family(model_type: str, where: str, known: Iterable[str]) -> UnknownFamilyError:
    """Return the error for a `model_type` that is none of the `known` ones; it names those that are spelled alike."""
    alike = difflib.get_close_matches(model_type[:80], sorted(known), n=2, cutoff=0.75)
    hint = f" (similar: {', '.join(alike)})" if alike else ""
    return UnknownFamilyError(
        f"{where}: model_type {model_type[:80]!r} is not supported{hint}; llm-export --families lists what is"
    )
