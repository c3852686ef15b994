"""What flags and a config file say of a model in Meta's naming. Knows no tensors and no tokenizer.

Three kinds of file are read, and told apart by their keys, not by their names:

    config.yaml   `model:` (dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len, norm_eps, rope_theta),
                  `paths:`, `tokens:` and `generation:`, all of them optional
    params.json   of Meta's own releases: dim, n_layers, n_heads, n_kv_heads, vocab_size, norm_eps, rope_theta,
                  use_scaled_rope; also Mistral's hidden_dim and head_dim
    config.json   of a Hugging Face llama: hidden_size, num_attention_heads and so on

`multiple_of` and `ffn_dim_multiplier` only say how Meta's code computes the width of the feed-forward network, which
the weights show themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NoReturn, TypeVar

from llm_edge.exporter.checkpoint.yaml_file import read_yaml
from llm_edge.exporter.config_reader import ConfigReader
from llm_edge.exporter.show import show
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json

T = TypeVar("T")

BESIDE = ("config.yaml", "config.yml", "params.json", "config.json")
"""Names of config files that are looked for beside a checkpoint, the first one found counts."""

_FLAGS: Mapping[str, str] = {  # name of a setting -> its flag
    "n_heads": "--n-heads",
    "n_kv_heads": "--n-kv-heads",
    "rope_theta": "--rope-theta",
    "norm_eps": "--norm-eps",
    "max_seq_len": "--max-seq-len",
}
_KEYS: Mapping[str, tuple[str, ...]] = {  # name of a setting -> its keys in files
    "dim": ("dim", "hidden_size"),
    "ffn_dim": ("ffn_dim", "hidden_dim", "intermediate_size"),
    "n_layers": ("n_layers", "num_hidden_layers"),
    "n_heads": ("n_heads", "num_attention_heads"),
    "n_kv_heads": ("n_kv_heads", "num_key_value_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_seq_len": ("max_seq_len", "max_position_embeddings"),
    "norm_eps": ("norm_eps", "rms_norm_eps"),
    "rope_theta": ("rope_theta",),
}
# What leaves no trace in the weights and is not computed here.
_REFUSED = ("sliding_window", "moe", "num_experts", "quantization", "attention_bias", "mlp_bias")
_ACTIVATIONS: Mapping[str, str] = {"silu": "silu", "swish": "silu", "swiglu": "silu"}
_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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
        max_seq_len: tokens a context holds at most.
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
        rope_scaling: scaling of the rotary positions as in a Hugging Face config; empty where there is none.
    """

    def __init__(self, options: StateDictOptions, path: Path | None) -> None:
        self._options = options
        self.path = path
        self.tokenizer = options.tokenizer
        self.content: Mapping[str, Any] = {} if path is None else _content(path)
        root = ConfigReader(self.content, str(path))
        self.paths, self.tokens, self.generation = map(root.section, ("paths", "tokens", "generation"))
        self._model = root.section("model") or root
        self._model.refuse(*_REFUSED)
        self._model.only("model_type", "llama")
        self._model.only("partial_rotary_factor", 1)
        for key in ("hidden_act", "activation"):
            self._model.choice(key, _ACTIVATIONS, "silu")
        self.rope_scaling = self._rope_scaling()

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
        """A whole number of `_KEYS`."""
        given = self._flag(name)
        if given is not None:
            return given
        key = self._key(name)
        return None if key is None else Stated(self._model.integer(key), f"{self._model.where}: {key}")

    def number(self, name: str) -> Stated[float] | None:
        """A number of `_KEYS`."""
        given = self._flag(name)
        if given is not None:
            return given
        key, reader = self._key(name), self._model
        if key is None and name == "rope_theta" and "rope_parameters" in reader:
            reader, key = reader.section("rope_parameters") or reader, name
        return None if key is None or key not in reader else Stated(reader.number(key), f"{reader.where}: {key}")

    def tied(self) -> Stated[bool] | None:
        """Whether the head is said to be the embedding; only Hugging Face's files speak of it."""
        key = "tie_word_embeddings"
        return Stated(self._model.flag(key), f"{self._model.where}: {key}") if key in self._model else None

    def needs(self, name: str, checkpoint: Path, why: str) -> NoReturn:
        """Refuse a checkpoint for which nobody states a setting."""
        silent = f" and {self.path} does not state {_KEYS[name][0]}" if self.path is not None else ""
        raise CheckpointError(f"{checkpoint}: {why}{silent}: give --config FILE or {_FLAGS[name]} N")

    def _flag(self, name: str) -> Stated[Any] | None:
        value = getattr(self._options, name, None)
        return None if value is None else Stated(value, _FLAGS[name])

    def _key(self, name: str) -> str | None:
        return next((key for key in _KEYS[name] if key in self._model), None)

    def _rope_scaling(self) -> Mapping[str, Any]:
        """Meta's `use_scaled_rope` is llama3's scaling; a file may state its factors, the others are Meta's defaults.

        Llama 3.2's small models were trained with a factor of 32, which their params.json does not say.
        """
        model = self._model
        if model.flag("use_scaled_rope"):
            return {
                "rope_type": "llama3",
                **_LLAMA3,
                "factor": model.factor("rope_scaling_factor", _LLAMA3["factor"]),
                "high_freq_factor": model.factor("rope_high_freq_factor", _LLAMA3["high_freq_factor"]),
            }
        if model.value("rope_scaling_factor") is not None:
            model.fail("rope_scaling_factor is set without use_scaled_rope")
        section = model.section("rope_parameters") or model.section("rope_scaling")
        if section is None or section.text("rope_type", section.text("type", "default")) == "default":
            return {}
        section.only("partial_rotary_factor", 1)
        found = model.value("rope_parameters") or model.value("rope_scaling")
        return {key: value for key, value in found.items() if key != "rope_theta"}


def _content(path: Path) -> dict[str, Any]:
    if path.suffix in (".yaml", ".yml"):
        return read_yaml(path)
    if path.suffix == ".json":
        return read_json(path, MIB, error=CheckpointError)
    raise CheckpointError(f"{path}: not a config file that is known here: give a .yaml, .yml or .json file")
