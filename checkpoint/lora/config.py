"""The `adapter_config.json` of a LoRA adapter, key by key. Knows no tensors.

Keys and their meaning are those of peft's LoraConfig. A key that changes the merged weights in a way not computed here
is refused by its name, and so is one that is not known, unless it says that nothing is asked (null, false, empty).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llm_edge.runtime.errors import CheckpointError

_READ = {
    "peft_type",
    "r",
    "lora_alpha",
    "use_rslora",
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "fan_in_fan_out",
    "bias",
    "modules_to_save",
    "init_lora_weights",
}
# Which modules are adapted is told by the tensors; how they were trained or first filled leaves no trace in the merge.
_WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
_REFUSED = {
    "alora_invocation_tokens": "the adapter acts on some tokens only and cannot be merged",
    "arrow_config": "the adapter is chosen anew for each token and cannot be merged",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "only adapters of whole modules are read",
    "trainable_token_indices": "single rows of an embedding are not read",
}
# These leave the base model's weights as they are; others (pissa, olora, corda, loftq, …) take something out of them.
_PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

_MAX_RANK = 1 << 20
# Patterns come from the file. Without a repeated group, and with two quantifiers at most, one takes a quadratic number
# of steps at worst, which the short paths they are tried on keep small.
MAX_MODULE_PATH = 160
_MAX_PATTERNS = 4096
_MAX_PATTERN = 512  # characters
_MAX_QUANTIFIERS = 2
_MAX_QUANTIFIED = 16  # patterns with a quantifier; whatever writes one pattern a module writes plain names
_QUANTIFIER = re.compile(r"[*+?{]")
_UNBOUNDED = re.compile(r"\)[*+?{]|\(\?(?!:)|\\\d")  # a repeated group, a look-around, a reference to a group

_T = TypeVar("_T", int, float)
_Patterns = tuple[tuple[re.Pattern[str], _T], ...]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """What of an adapter's config the merge needs.

    The patterns stand for the end of a module path, from a dot or the start on; the first that matches counts.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    fan_in_fan_out: bool
    rank_pattern: _Patterns[int]
    alpha_pattern: _Patterns[float]
    modules_to_save: tuple[str, ...]

    def rank(self, module: str) -> int:
        """The rank of the module at this path."""
        return _matching(self.rank_pattern, module, self.r)

    def scaling(self, module: str, rank: int) -> float:
        """The factor of B @ A: alpha / rank, with rank stabilization alpha / sqrt(rank)."""
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora_config(raw: Mapping[str, Any], path: Path) -> LoraConfig:
    """Read the content of `adapter_config.json`; `path` is for messages.

    Raises:
        CheckpointError: a value is not of its kind, or a key asks for what is not computed here.
    """
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {_short(raw.get('peft_type'))}; only LORA adapters can be merged")
    for key in sorted(raw.keys() - _READ - _WITHOUT_EFFECT):
        if raw[key] not in (None, False, "", [], {}):
            reason = _REFUSED.get(key, "what it does to the weights is not known here")
            raise CheckpointError(f"{path}: {_short(key)} is set: {reason}")
    start = raw.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_INITIALIZATIONS):
        raise CheckpointError(
            f"{path}: init_lora_weights is {_short(start)}, which changes the base model too: save the adapter with "
            "peft's path_initial_model_for_weight_conversion, or merge it with peft"
        )
    if raw.get("bias", "none") not in ("none", "all", "lora_only"):
        raise CheckpointError(f"{path}: bias is {_short(raw['bias'])}, not none, all or lora_only")
    saved = raw.get("modules_to_save") or []
    if not isinstance(saved, list) or not all(isinstance(module, str) for module in saved):
        raise CheckpointError(f"{path}: modules_to_save is {_short(saved)}, not a list of names")
    return LoraConfig(
        r=_rank(raw.get("r", 8), "r", path),
        lora_alpha=_number(raw.get("lora_alpha", 8), "lora_alpha", path),
        use_rslora=_flag(raw, "use_rslora", path),
        use_dora=_flag(raw, "use_dora", path),
        fan_in_fan_out=_flag(raw, "fan_in_fan_out", path),
        rank_pattern=_patterns(raw, "rank_pattern", _rank, path),
        alpha_pattern=_patterns(raw, "alpha_pattern", _number, path),
        modules_to_save=tuple(saved),
    )


def _matching(patterns: _Patterns[_T], module: str, otherwise: _T) -> _T:
    starts = [0, *(dot.end() for dot in re.finditer(r"\.", module))]
    for pattern, value in patterns:
        if any(pattern.match(module, start) for start in starts):
            return value
    return otherwise


def _patterns(raw: Mapping[str, Any], key: str, read: Callable[[Any, str, Path], _T], path: Path) -> _Patterns[_T]:
    """A table of patterns, each of which can be matched in little time whatever the text."""
    table = raw.get(key) or {}
    if not isinstance(table, dict) or len(table) > _MAX_PATTERNS:
        raise CheckpointError(f"{path}: {key} is not a table of at most {_MAX_PATTERNS} patterns")
    quantifiers = {pattern: len(_QUANTIFIER.findall(pattern)) for pattern in table}
    too_many = sum(map(bool, quantifiers.values())) > _MAX_QUANTIFIED
    compiled = []
    for pattern, value in table.items():
        much = len(pattern) > _MAX_PATTERN or quantifiers[pattern] > (0 if too_many else _MAX_QUANTIFIERS)
        if much or _UNBOUNDED.search(pattern):
            raise CheckpointError(
                f"{path}: {key} has {_short(pattern)}, which may take forever to match: name the modules one by one"
            )
        try:
            with warnings.catch_warnings(action="error"):
                compiled.append((re.compile(rf"({pattern})$"), read(value, f"{key} of {pattern}", path)))
        except (re.error, OverflowError, RecursionError, Warning) as error:
            raise CheckpointError(f"{path}: {key} has {_short(pattern)}, not a regular expression: {error}") from error
    return tuple(compiled)


def _rank(value: Any, key: str, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= _MAX_RANK:
        raise CheckpointError(f"{path}: {_short(key)} is {_short(value)}, not a rank")
    return value


def _number(value: Any, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:  # NaN is not
        raise CheckpointError(f"{path}: {_short(key)} is {_short(value)}, not a number")
    return float(value)


def _flag(raw: Mapping[str, Any], key: str, path: Path) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"{path}: {key} is {_short(value)}, not true or false")
    return bool(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
