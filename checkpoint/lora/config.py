"""Reads the `adapter_config.json` of a LoRA adapter (peft's LoraConfig).

Keys with an unsupported effect on the merged weights and unknown keys are rejected unless null, false or empty.
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
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out",
    "bias", "modules_to_save", "init_lora_weights",
}  # fmt: skip
# The tensors show which modules are adapted; settings of training and initialization do not affect the merge.
_IGNORED = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying", "eva_config",
    "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_bias",
    "lora_dropout", "lora_ga_config", "megatron_core", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "target_modules", "task_type",
}  # fmt: skip
_REJECTED = {
    "alora_invocation_tokens": "the adapter applies to some tokens only and cannot be merged",
    "arrow_config": "the adapter is selected per token and cannot be merged",
    "layer_replication": "repeating layers of the base model is not supported",
    "target_parameters": "only adapters of whole modules are supported",
    "trainable_token_indices": "adapters of single embedding rows are not supported",
}
# These keep the base model's weights; others (pissa, olora, corda, loftq, …) modify them.
_PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")

_MAX_RANK = 1 << 20
# Regular expressions from the file are untrusted. Without repeated groups and with at most two quantifiers, matching
# takes at most quadratic time in the length of the module path, which is limited.
MAX_MODULE_PATH = 160
_MAX_PATTERNS = 4096
_MAX_PATTERN = 512  # characters
_MAX_QUANTIFIERS = 2
_MAX_QUANTIFIED = 16  # patterns with a quantifier; tools that write one pattern per module write plain names
_QUANTIFIER = re.compile(r"[*+?{]")
_UNBOUNDED = re.compile(r"\)[*+?{]|\(\?(?!:)|\\\d")  # repeated group, lookaround, backreference

_T = TypeVar("_T", int, float)
_Patterns = tuple[tuple[re.Pattern[str], _T], ...]


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """The settings that the merge depends on.

    A pattern matches the end of a module path, starting at a dot or the start; the first matching one is used.
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
        """Return the rank of a module."""
        return _matching(self.rank_pattern, module, self.r)

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of B @ A: alpha / rank, or alpha / sqrt(rank) with rank stabilization."""
        alpha = _matching(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_lora_config(raw: Mapping[str, Any], path: Path) -> LoraConfig:
    """Read the content of `adapter_config.json`.

    Raises:
        CheckpointError: a value is invalid, or a key is not supported.
    """
    if raw.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {_short(raw.get('peft_type'))}; only LORA adapters can be merged")
    for key in sorted(raw.keys() - _READ - _IGNORED):
        if raw[key] not in (None, False, "", [], {}):
            reason = _REJECTED.get(key, "its effect on the weights is unknown")
            raise CheckpointError(f"{path}: {_short(key)} is set: {reason}")
    start = raw.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_INITIALIZATIONS):
        raise CheckpointError(
            f"{path}: init_lora_weights is {_short(start)}, which also changes the base model: save the adapter with "
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
    """Compile a table of patterns, rejecting those that may take long to match."""
    table = raw.get(key) or {}
    if not isinstance(table, dict) or len(table) > _MAX_PATTERNS:
        raise CheckpointError(f"{path}: {key} is not a table of at most {_MAX_PATTERNS} patterns")
    quantifiers = {pattern: len(_QUANTIFIER.findall(pattern)) for pattern in table}
    too_many = sum(map(bool, quantifiers.values())) > _MAX_QUANTIFIED
    compiled = []
    for pattern, value in table.items():
        too_complex = len(pattern) > _MAX_PATTERN or quantifiers[pattern] > (0 if too_many else _MAX_QUANTIFIERS)
        if too_complex or _UNBOUNDED.search(pattern):
            raise CheckpointError(
                f"{path}: {key} has {_short(pattern)}, which may take too long to match: list the modules individually"
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
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e12:  # or NaN
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
