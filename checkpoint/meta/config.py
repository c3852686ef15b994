"""What flags and a config file say of a model in Meta's naming. Knows no tensors and no tokenizer.

Three kinds of file are read, and told apart by their keys, not by their names:

    config.yaml   `model:` (dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len, norm_eps, rope_theta),
                  `paths:`, `tokens:` and `generation:`, all of them optional
    params.json   of Meta's own releases: dim, n_layers, n_heads, n_kv_heads, vocab_size, norm_eps, rope_theta,
                  use_scaled_rope; also Mistral's hidden_dim and head_dim
    config.json   of a Hugging Face llama: hidden_size, num_attention_heads and so on

`multiple_of` and `ffn_dim_multiplier` only say how Meta's code computes the width of the feed-forward network, which
the weights show themselves. What else a file may say, and what is refused, is in `meta_keys.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from llm_edge.checkpoint.meta.config_keys import KEYS, SCALED_ROPE, check_keys
from llm_edge.checkpoint.meta.yaml_file import read_yaml
from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json
from llm_edge.runtime.show import show

T = TypeVar("T")

BESIDE = ("config.yaml", "config.yml", "params.json", "config.json")
"""Names of config files that are looked for beside a checkpoint, the first one found counts."""

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
    """What a state dict cannot say by itself. What is None is looked for in the config file; a value given wins.

    Attributes:
        config: the config file (`--config`); None takes the one beside the checkpoint, if there is one.
        tokenizer: a tokenizer's folder or file (`--tokenizer`); None takes the config's, or the one beside the
            checkpoint.
        n_heads: H, query heads.
        n_kv_heads: K, key/value heads.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of the norms.
        max_seq_len: tokens a context holds at most. No part of the model's own config where the file states one:
            scalings of the rotary positions derive from that; `source.open_checkpoint` shortens it afterwards.
    """

    config: Path | None = None
    tokenizer: Path | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    rope_theta: float | None = None
    norm_eps: float | None = None
    max_seq_len: int | None = None


@dataclass(frozen=True, slots=True)
class Stated(Generic[T]):
    """A value, and who states it: a flag, or a key of a file."""

    value: T
    where: str

    def fail(self, reason: str) -> NoReturn:
        """Refuse the value."""
        raise CheckpointError(f"{self.where} is {show(self.value)}{reason}")


class Settings:
    """Flags over a config file.

    Attributes:
        path: the config file; None where there is none.
        content: of the file, unchecked; empty where there is none.
        paths: its section of the tokenizer's paths, or None.
        tokens: its section of control tokens, or None.
        generation: its section of sampling, or None.
        tokenizer: the tokenizer the user gives, or None.
        rope: keys of a Hugging Face config that scale the rotary positions; empty where nothing does.
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
        self.rope = self._scaled_rope() or self._sections_rope()

    @classmethod
    def of(cls, options: StateDictOptions, checkpoint: Path) -> Settings:
        """The options over the config file they name, or else over the one beside the checkpoint.

        Raises:
            CheckpointError: the file is missing or damaged, or asks for what is not supported.
        """
        path = options.config
        if path is None:
            found = (checkpoint.parent / name for name in BESIDE)
            path = next((beside for beside in found if beside.is_file()), None)
        return cls(options, path)

    def integer(self, name: str) -> Stated[int] | None:
        """A whole number of `KEYS`."""
        given = self._flag(name)
        if given is not None:
            return given
        key = self._key(name)
        return None if key is None else Stated(self._model.integer(key), f"{self._model.where}: {key}")

    def number(self, name: str) -> Stated[float] | None:
        """A number of `KEYS`."""
        given = self._flag(name)
        if given is not None:
            return given
        key, reader = self._key(name), self._model
        if name == "rope_theta" and self._rope_section is not None and name in self._rope_section:
            inner = self._rope_section.number(name)
            if key is not None and reader.number(key) != inner:
                reader.fail(f"rope_theta is {reader.number(key)}, but {inner} in the section of its scaling")
            key, reader = name, self._rope_section
        return None if key is None else Stated(reader.number(key), f"{reader.where}: {key}")

    def context(self) -> Stated[int] | None:
        """Tokens a context of the model holds: what the file states, else what the flag does.

        Scalings of the rotary positions derive from it what they leave out, so a flag that shortens the context must
        not come in between; nor is it taken for the model's own where a scaling would derive from it.
        """
        stated = self.integer("max_seq_len")
        scaling = self.rope.get("rope_scaling")
        if stated is not None:
            return stated
        if scaling is not None and scaling.get("rope_type", scaling.get("type")) != "linear":
            missing = [key for key in ("factor", _ORIGINAL) if key not in {**self.rope, **scaling}]
            if missing:
                self._model.fail(
                    f"neither {missing[0]} of the rotary scaling nor max_seq_len, which it derives from, is stated: "
                    "add one of them"
                )
        length = self._options.max_seq_len
        return None if length is None else Stated(length, "--max-seq-len")

    def tied(self) -> Stated[bool] | None:
        """Whether the head is said to be the embedding."""
        key = self._key("tied")
        return None if key is None else Stated(self._model.flag(key), f"{self._model.where}: {key}")

    def needs(self, name: str, checkpoint: Path, why: str) -> NoReturn:
        """Refuse a checkpoint for which nobody states a setting."""
        silent = f" and {self.path} does not state {KEYS[name][0]}" if self.path is not None else ""
        raise CheckpointError(f"{checkpoint}: {why}{silent}: give --config FILE or {_FLAGS[name]} N")

    def _flag(self, name: str) -> Stated[Any] | None:
        value = getattr(self._options, name) if name in _FLAGS else None
        return None if value is None else Stated(value, _FLAGS[name])

    def _key(self, name: str) -> str | None:
        return next((key for key in KEYS[name] if key in self._model), None)

    def _find_rope_section(self) -> ConfigReader | None:
        """`rope_parameters` as transformers 5 writes them, or `rope_scaling` as 4 did."""
        model = self._model
        keys = "use_scaled_rope", "rope_parameters", "rope_scaling"
        given = [key for key in keys if model.value(key) not in (None, False)]
        if len(given) > 1:
            model.fail(f"{' and '.join(given)} are given together: keep one of them")
        section = model.section("rope_parameters") or model.section("rope_scaling")
        if section is not None:
            section.require("partial_rotary_factor", 1)
        return section

    def _scaled_rope(self) -> Mapping[str, Any]:
        """Meta's `use_scaled_rope` is llama3's scaling; a file may state its factors, the others are Meta's defaults.

        Llama 3.2's small models were trained with a factor of 32, which their params.json does not say.
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

    def _sections_rope(self) -> Mapping[str, Any]:
        """The scaling of `rope_parameters` or `rope_scaling`, and the context of pre-training beside it."""
        section = self._rope_section
        if section is None:
            return {}
        content = self._model.value("rope_parameters") or self._model.value("rope_scaling") or {}
        content = {key: value for key, value in content.items() if value is not None}
        untyped = not {"rope_type", "type"} & content.keys()
        if section.has_sections or (untyped and not content.keys() <= {"rope_theta", "partial_rotary_factor"}):
            section.fail(
                "no rope_type, or nested by type of layer: give one section for all layers, with its rope_type"
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
    raise CheckpointError(f"{path}: not a config file that is known here: give a .yaml, .yml or .json file")
