"""Reads generation_config.json: the sampling parameters that a model sets, with the meaning they have in transformers.

Every key of transformers' `GenerationConfig` is here: honoured (as a parameter with that name in `PARAMETERS`, or in
`read_generation_config`), ignored with a note, or without influence on the text of a single answer.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.safe_io import short_repr
from llm_edge.runtime.sampling.parameter_spec import ParameterSpec, is_integer
from llm_edge.runtime.sampling.params import PARAMETERS

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
DEFAULT_TOP_K = 50  # transformers applies it when it samples and the file sets none

# Honoured keys that are not a single parameter.
COMBINED = ("do_sample", "bad_words_ids", "sequence_bias")
# Keys that are not supported, and the values with which they do nothing.
IGNORED: Mapping[str, tuple[Any, ...]] = {
    "constraints": ([],),
    "diversity_penalty": (0,),
    "dola_layers": (),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "exponential_decay_length_penalty": (),
    "force_words_ids": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "guidance_scale": (1,),
    "max_length": (20,),  # transformers' default, which some versions wrote to every file
    "max_time": (),
    "min_length": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
    "top_h": (),
    "watermarking_config": (),
}
# Keys about caches, outputs, speculative decoding, beams (see `num_beams`) and encoders, and metadata.
IRRELEVANT = {
    "_commit_hash", "_from_model_config", "assistant_confidence_threshold", "assistant_early_exit",
    "assistant_ensemble_weight", "assistant_lookbehind", "cache_config", "cache_implementation", "compile_config",
    "continuous_batching_config", "decoder_start_token_id", "disable_compile", "early_stopping", "is_assistant",
    "length_penalty", "low_memory", "max_cache_len", "max_matching_ngram_size", "num_assistant_tokens",
    "num_assistant_tokens_schedule", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "prefill_chunk_size", "prompt_lookup_num_tokens", "remove_invalid_values", "renormalize_logits",
    "return_dict_in_generate", "speculation_type", "target_lookbehind", "transformers_version", "use_cache", "use_mtp",
}  # fmt: skip
SUPPORTED: Mapping[str, ParameterSpec] = {
    spec.api.generation_config: spec for spec in PARAMETERS.values() if spec.api.generation_config
}
"""The parameters by their key in the file."""


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """What a generation_config.json means for an answer.

    Attributes:
        params: values of the fields of `SamplingParams` that differ from their defaults.
        entries: the honoured entries of the file, with values that transformers accepts.
        invalid: entries with values that cannot be used, as `<key>: <reason>`.
        ignored: entries that are not supported, as `<key>: <reason>`.
    """

    params: Mapping[str, Any]
    entries: Mapping[str, Any]
    invalid: tuple[str, ...]
    ignored: tuple[str, ...]


@dataclass(slots=True)
class _Reader:
    """Collects what a file sets."""

    config: Mapping[str, Any]
    values: dict[str, Any] = field(default_factory=dict)  # fields of `SamplingParams`
    entries: dict[str, Any] = field(default_factory=dict)
    invalid: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def read_parameters(self) -> None:
        for key, spec in SUPPORTED.items():
            value = self.config.get(key)
            if value is None:
                continue
            try:
                checked = spec.checked(_normalized(key, spec, value))
            except ParameterError as error:
                self.invalid.append(f"{key}: {str(error).partition(': ')[2]}")
                continue
            self.values[spec.name] = checked
            self.entries[key] = list(checked) if isinstance(checked, tuple) else checked

    def read_do_sample(self) -> bool:
        value = self.config.get("do_sample")
        if value is None:
            given = [key for key, spec in SUPPORTED.items() if _only_samples(spec) and key in self.entries]
            if any(self.values[SUPPORTED[key].name] != SUPPORTED[key].default for key in given):
                self.ignored.append(f"{', '.join(given)}: without do_sample the most likely token is always taken")
            return False
        if not isinstance(value, bool):
            self.invalid.append(f"do_sample: {short_repr(value)} is not allowed, give true or false")
            return False
        self.entries["do_sample"] = value
        return value

    def read_bad_words(self, end_tokens: Collection[int]) -> None:
        """`bad_words_ids`: lists of token ids; a single end token is allowed all the same."""
        value = self.config.get("bad_words_ids")
        if value is None:
            return
        if not isinstance(value, list) or not all(map(_is_sequence, value)):
            self.invalid.append("bad_words_ids: not a list of lists of token ids")
            return
        banned = [words[0] for words in value if len(words) == 1 and words[0] not in end_tokens]
        self.values["banned_tokens"] = (*self.values.get("banned_tokens", ()), *banned)
        if kept := [words for words in value if len(words) == 1]:
            self.entries["bad_words_ids"] = kept
        if longer := len(value) - len(kept):
            self.ignored.append(f"bad_words_ids: {longer} of {len(value)} entries have several tokens")

    def read_sequence_bias(self) -> None:
        """`sequence_bias`: pairs of a list of token ids and the bias of its last token."""
        value = self.config.get("sequence_bias")
        if value is None:
            return
        if not isinstance(value, list) or not all(map(_is_biased_sequence, value)):
            self.invalid.append("sequence_bias: not a list of pairs of token ids and a number")
            return
        usable = [(words[0], float(bias)) for words, bias in value if len(words) == 1 and abs(bias) <= 100]
        if usable:
            self.values["logit_bias"] = PARAMETERS["logit_bias"].checked(usable)
            self.entries["sequence_bias"] = [[[token], bias] for token, bias in usable]
        if rest := len(value) - len(usable):
            self.ignored.append(f"sequence_bias: {rest} of {len(value)} entries have several tokens or exceed 100")

    def read_others(self, context: int | None) -> None:
        unknown = []
        for key, value in self.config.items():
            if value is None or key in SUPPORTED or key in COMBINED or key in TOKEN_IDS or key in IRRELEVANT:
                continue
            if key not in IGNORED:
                unknown.append(key)
            elif value in IGNORED[key] or (key == "max_length" and self._allows(value, context)):
                continue
            elif key == "max_length":
                self.ignored.append(f"max_length: {short_repr(value)}; max_tokens limits the length of an answer")
            else:
                self.ignored.append(f"{key}: {short_repr(value)} is not supported")
        if unknown:
            more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
            self.ignored.append(f"unknown keys: {', '.join(map(short_repr, unknown[:8]))}{more}")

    def _allows(self, max_length: Any, context: int | None) -> bool:
        """Whether a limit on prompt and answer never takes effect."""
        replaced = "max_new_tokens" in self.entries
        return replaced or (is_integer(max_length) and context is not None and max_length >= context)


def read_generation_config(
    config: Mapping[str, Any], end_tokens: Collection[int] = (), context: int | None = None
) -> GenerationDefaults:
    """Interpret the content of a generation_config.json as transformers' `generate` does.

    Without `do_sample` the most likely token is always taken; with it, `top_k` is 50 unless the file sets it. The
    repetition penalty covers the whole prompt and answer, unless the file sets `repetition_window`, which is ours.

    Args:
        config: the content; values of null count as missing.
        end_tokens: ids that end an answer, which `bad_words_ids` does not ban.
        context: how many tokens the model's context holds; a `max_length` of as many is not worth a note.
    """
    reader = _Reader(config)
    reader.read_parameters()
    sampling = reader.read_do_sample()
    reader.read_bad_words(end_tokens)
    reader.read_sequence_bias()
    reader.read_others(context)
    params = dict(reader.values)
    if sampling:
        params.setdefault("top_k", DEFAULT_TOP_K)
    else:
        params = {name: value for name, value in params.items() if not _only_samples(PARAMETERS[name])}
        params["temperature"] = 0.0
    params = {name: value for name, value in params.items() if value != PARAMETERS[name].default}
    if "repetition_penalty" in params and "repetition_window" not in reader.values:
        params["repetition_window"] = -1
    return GenerationDefaults(params, reader.entries, tuple(reader.invalid), tuple(reader.ignored))


def _only_samples(spec: ParameterSpec) -> bool:
    """Whether a parameter has no effect on greedy decoding."""
    return spec.group == "sampling"


def _normalized(key: str, spec: ParameterSpec, value: Any) -> Any:
    """A value in the form that the parameter requires: 50.0 as 50, and the other values that mean "off" as ours."""
    if spec.kind == "int" and isinstance(value, float) and value.is_integer():
        value = int(value)
    if key == "top_k" and is_integer(value):
        return max(value, 0)
    return 0 if key in ("epsilon_cutoff", "eta_cutoff") and value == 1 else value


def _is_sequence(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(is_integer(token) and token >= 0 for token in value)


def _is_biased_sequence(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != 2 or not _is_sequence(value[0]):
        return False
    bias = value[1]
    return is_integer(bias) or (isinstance(bias, float) and not math.isnan(bias))
