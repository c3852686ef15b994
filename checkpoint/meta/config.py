"""Settings of a model with Meta's tensor names, from command-line flags and a config file.

Three kinds of files are supported, distinguished by their keys rather than their names:

    config.yaml   optional sections `model:` (dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len,
                  norm_eps, rope_theta), `paths:`, `tokens:` and `generation:`
    params.json   of Meta's releases: dim, n_layers, n_heads, n_kv_heads, vocab_size, norm_eps, rope_theta,
                  use_scaled_rope; also Mistral's hidden_dim and head_dim
    config.json   of a Hugging Face llama: hidden_size, num_attention_heads, …

`config_keys.py` lists the keys that are ignored or rejected.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from llm_edge.checkpoint.meta.config_keys import KEYS, SCALED_ROPE, check_keys
from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, short_repr
from llm_edge.runtime.safe_yaml import read_yaml

T = TypeVar("T")

CONFIG_NAMES = ("config.yaml", "config.yml", "params.json", "config.json")
"""Config files that are searched for beside a checkpoint; the first one found is used."""

_FLAGS: Mapping[str, str] = {  # name of a setting -> its flag
    "n_heads": "--n-heads",
    "n_kv_heads": "--n-kv-heads",
    "rope_theta": "--rope-theta",
    "norm_eps": "--norm-eps",
}
_ORIGINAL = "original_max_position_embeddings"
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@dataclass(frozen=True, slots=True)
class StateDictOptions:
    """Settings that a state dict does not contain. They override the config file; None reads it from there.

    `max_seq_len` does not replace the config file's value, from which rotary scalings derive their defaults;
    `source.open_checkpoint` shortens the context afterwards.
    """

    config: Path | None = None  # None uses the config file beside the checkpoint, if any
    tokenizer: Path | None = None  # folder or file; None uses the config's, or the one beside the checkpoint
    n_heads: int | None = None
    n_kv_heads: int | None = None
    rope_theta: float | None = None  # rotary base
    norm_eps: float | None = None
    max_seq_len: int | None = None  # maximum context length in tokens


@dataclass(frozen=True, slots=True)
class Setting(Generic[T]):
    """A value and the flag or file key that specifies it."""

    value: T
    where: str

    def fail(self, reason: str) -> NoReturn:
        """Raise a `CheckpointError` about this value."""
        raise CheckpointError(f"{self.where} is {short_repr(self.value)}{reason}")


class Settings:
    """Command-line flags and a config file; flags take precedence.

    Attributes:
        path: the config file, or None.
        content: unchecked content of the file; empty without a file.
        paths: section of the tokenizer's paths, or None.
        tokens: section of control tokens, or None.
        generation: section of sampling parameters, or None.
        tokenizer: tokenizer given by a flag, or None.
        rope: Hugging Face config keys that scale the rotary positions; empty without scaling.
    """

    def __init__(self, options: StateDictOptions, path: Path | None) -> None:
        self._options = options
        self.path = path
        self.tokenizer = options.tokenizer
        self.content: Mapping[str, Any] = {} if path is None else _content(path)
        root = ConfigReader(self.content, str(path))
        self.paths, self.tokens, self.generation = map(root.section, ("paths", "tokens", "generation"))
        section = root.section("model")
        self._model = root if section is None else section
        check_keys(self._model, self.content if section is None else self.content["model"])
        self._rope_section = self._find_rope_section()
        self.rope = self._use_scaled_rope() or self._section_scaling()

    @classmethod
    def of(cls, options: StateDictOptions, checkpoint: Path) -> Settings:
        """Combine the options with the config file that they name, or with the one beside the checkpoint.

        Raises:
            CheckpointError: the file is missing or damaged, or has a setting that is not supported.
        """
        path = options.config
        if path is None:
            found = (checkpoint.parent / name for name in CONFIG_NAMES)
            path = next((beside for beside in found if beside.is_file()), None)
        return cls(options, path)

    def integer(self, name: str) -> Setting[int] | None:
        """Return an integer setting of `KEYS`, or None if it is not specified."""
        flag = self._flag(name)
        if flag is not None:
            return flag
        key = self._key(name)
        return None if key is None else Setting(self._model.integer(key), f"{self._model.where}: {key}")

    def number(self, name: str) -> Setting[float] | None:
        """Return a float setting of `KEYS`, or None if it is not specified."""
        flag = self._flag(name)
        if flag is not None:
            return flag
        key, reader = self._key(name), self._model
        if name == "rope_theta" and self._rope_section is not None and name in self._rope_section:
            inner = self._rope_section.number(name)
            if key is not None and reader.number(key) != inner:
                reader.fail(f"rope_theta is {reader.number(key)}, but {inner} in the section of the rotary scaling")
            key, reader = name, self._rope_section
        return None if key is None else Setting(reader.number(key), f"{reader.where}: {key}")

    def context(self) -> Setting[int] | None:
        """Return the context length of the file, else of the flag.

        Rotary scalings derive defaults from the model's context length, so the flag is not used if that would
        change a scaling.
        """
        setting = self.integer("max_seq_len")
        scaling = self.rope.get("rope_scaling")
        if setting is not None:
            return setting
        if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "linear":
            missing = [key for key in ("factor", _ORIGINAL) if key not in {**self.rope, **scaling}]
            if missing:
                self._model.fail(
                    f"neither {missing[0]} of the rotary scaling nor max_seq_len, its default, is set: add one of them"
                )
        length = self._options.max_seq_len
        return None if length is None else Setting(length, "--max-seq-len")

    def tied(self) -> Setting[bool] | None:
        """Return whether the config ties the head to the embedding, or None if it is not specified."""
        key = self._key("tied")
        return None if key is None else Setting(self._model.flag(key), f"{self._model.where}: {key}")

    def fail_missing(self, name: str, checkpoint: Path, reason: str) -> NoReturn:
        """Raise a `CheckpointError` about a required setting that is not specified."""
        also = f" and {self.path} does not set {KEYS[name][0]}" if self.path is not None else ""
        raise CheckpointError(f"{checkpoint}: {reason}{also}: give --config FILE or {_FLAGS[name]} N")

    def _flag(self, name: str) -> Setting[Any] | None:
        value = getattr(self._options, name) if name in _FLAGS else None
        return None if value is None else Setting(value, _FLAGS[name])

    def _key(self, name: str) -> str | None:
        return next((key for key in KEYS[name] if key in self._model), None)

    def _find_rope_section(self) -> ConfigReader | None:
        """Return `rope_parameters` (transformers 5) or `rope_scaling` (transformers 4)."""
        model = self._model
        keys = "use_scaled_rope", "rope_parameters", "rope_scaling"
        present = [key for key in keys if model.value(key) not in (None, False)]
        if len(present) > 1:
            model.fail(f"{' and '.join(present)} are both set: keep one of them")
        section = model.section("rope_parameters") or model.section("rope_scaling")
        if section is not None:
            section.require("partial_rotary_factor", 1)
        return section

    def _use_scaled_rope(self) -> Mapping[str, Any]:
        """Translate Meta's `use_scaled_rope` to llama3 scaling. Factors that are not set are Meta's defaults.

        The small Llama 3.2 models were trained with a factor of 32, which their params.json does not contain.
        """
        model = self._model
        if not model.flag("use_scaled_rope"):
            for key in SCALED_ROPE:
                if key in model:
                    model.fail(f"{key} is set without use_scaled_rope")
            return {}
        scaling = {
            "rope_type": "llama3",
            **_LLAMA3,
            "factor": model.positive("rope_scaling_factor", _LLAMA3["factor"]),
            "high_freq_factor": model.positive("rope_high_freq_factor", _LLAMA3["high_freq_factor"]),
            _ORIGINAL: model.integer(_ORIGINAL, 8192),
        }
        return {"rope_scaling": scaling}

    def _section_scaling(self) -> Mapping[str, Any]:
        """Return the scaling of `rope_parameters` or `rope_scaling`, and the original context length beside it."""
        section = self._rope_section
        if section is None:
            return {}
        content = self._model.value("rope_parameters") or self._model.value("rope_scaling") or {}
        content = {key: value for key, value in content.items() if value is not None}
        untyped = not {"rope_type", "type"} & content.keys()
        if section.has_sections or (untyped and not content.keys() <= {"rope_theta", "partial_rotary_factor"}):
            section.fail(
                "has no rope_type or one entry per layer type: give one section with a rope_type for all layers"
            )
        if untyped or section.text("rope_type", section.text("type", "")) == "default":
            return {}
        original = {_ORIGINAL: self._model.integer(_ORIGINAL)} if _ORIGINAL in self._model else {}
        return {"rope_scaling": {key: value for key, value in content.items() if key != "rope_theta"}, **original}


def _content(path: Path) -> dict[str, Any]:
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path)
    if path.suffix == ".json":
        return read_json(path, MIB, error=CheckpointError)
    raise CheckpointError(f"{path}: not a supported config file: give a .yaml, .yml or .json file")
