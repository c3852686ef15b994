"""Writes the configuration and tokenizer files of a bundle for transformers, transformers.js and onnxruntime-genai."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_edge.checkpoint.base import AnyCheckpoint
from llm_edge.checkpoint.huggingface.writer import hf_config, write_json, write_tokenizer
from llm_edge.exporter.bundle.other_runtimes import GENAI, TRANSFORMERS_JS, other_runtimes
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.runtime.model_shape import ModelShape

_GENAI_MAX_LENGTH = 4096  # genai may allocate a cache of this many tokens in advance

# Names that transformers.js has for graphs; it does not support others. Without a dtype it looks for model.onnx, which
# only bundles with fp32 have.
_TRANSFORMERS_JS_DTYPES = {
    "model": "fp32",
    "model_fp16": "fp16",
    "model_quantized": "q8",
    "model_int8": "int8",
    "model_q4": "q4",
}


def write_side_files(
    folder: Path, checkpoint: AnyCheckpoint, shape: ModelShape, recipes: tuple[Recipe, ...], style: GraphStyle | None
) -> None:
    """Write all files of a bundle except models and manifest; `style` is None if it has no ONNX graphs."""
    config = hf_config(checkpoint)
    supported = other_runtimes(config["model_type"], shape) if style is not None else []
    if TRANSFORMERS_JS in supported:
        stems = [recipe.stem for recipe in (preferred(recipes), *recipes) if recipe.stem in _TRANSFORMERS_JS_DTYPES]
        config["transformers.js_config"] = {
            **({"dtype": _TRANSFORMERS_JS_DTYPES[stems[0]]} if stems else {}),
            "use_external_data_format": {f"{recipe.stem}.onnx": 1 for recipe in recipes},
        }
    if GENAI in supported:
        genai = _genai_config(checkpoint.generation, shape, preferred(recipes), style is GraphStyle.FUSED)
        write_json(folder / "genai_config.json", genai)
    write_tokenizer(folder, checkpoint.tokenizer, model_input_names=["input_ids", "attention_mask"])
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", checkpoint.generation)


def runtimes(recipe: Recipe, known: Sequence[str]) -> list[str]:
    """Return the other runtimes that run a precision, of those known to run the architecture."""
    named = recipe.stem in _TRANSFORMERS_JS_DTYPES
    return [name for name in known if named or name != TRANSFORMERS_JS]


def preferred(recipes: tuple[Recipe, ...]) -> Recipe:
    """Return the precision for runtimes that load a single graph: int8 if the bundle has it, else the first."""
    return next((recipe for recipe in recipes if recipe.name == "int8"), recipes[0])


def _genai_config(
    generation: Mapping[str, Any], shape: ModelShape, recipe: Recipe, share_buffer: bool
) -> dict[str, Any]:
    """Return the configuration of onnxruntime-genai, which rejects unknown keys."""
    assert shape.uniform_cache is not None
    heads, head_size = shape.uniform_cache
    eos = generation.get("eos_token_id", [])
    first_eos = eos[0] if isinstance(eos, list) and eos else eos
    pad = generation.get("pad_token_id", first_eos if first_eos != [] else 0)
    return {
        "model": {
            "bos_token_id": generation.get("bos_token_id", pad),
            "context_length": shape.max_position_embeddings,
            "decoder": {
                "session_options": {
                    "log_id": "onnxruntime-genai",
                    "log_severity_level": 3,
                    "provider_options": [],
                },
                "filename": f"onnx/{recipe.stem}.onnx",
                "head_size": head_size,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_hidden_layers": shape.num_hidden_layers,
                "num_key_value_heads": heads,
            },
            "eos_token_id": eos if eos != [] else pad,
            "pad_token_id": pad,
            "type": "decoder",
            "vocab_size": shape.vocab_size,
        },
        "search": {
            "do_sample": bool(generation.get("do_sample", False)),
            "early_stopping": True,
            "max_length": min(shape.max_position_embeddings, _GENAI_MAX_LENGTH),
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": share_buffer,
            "repetition_penalty": float(generation.get("repetition_penalty", 1.0)),
            "temperature": float(generation.get("temperature", 1.0)),
            "top_k": int(generation.get("top_k", 50)),
            "top_p": float(generation.get("top_p", 1.0)),
        },
    }
