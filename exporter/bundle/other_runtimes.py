"""Which other runtimes run a bundle's graphs, as `make compat-kinds` found."""

from __future__ import annotations

from llm_edge.runtime.model_shape import ModelShape

GENAI, OPTIMUM, TRANSFORMERS_JS = "onnxruntime-genai", "optimum", "transformers.js"

# optimum and transformers.js infer the shape of the cache from the config, by rules for each `model_type`. Experts are
# not listed for transformers.js: in its onnxruntime 1.30 the operator MoE may write its result over its input.
_OPTIMUM = frozenset(
    (
        *("arcee", "biogpt", "cohere", "ctrl", "fuyu", "gemma", "gemma3", "gemma3_text", "glm", "got_ocr2"),
        *("gpt-sw3", "gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_japanese", "gpt_oss", "granite", "helium"),
        *("llama", "mistral", "modernbert-decoder", "nemotron", "opt", "persimmon", "qwen2", "qwen3"),
        *("qwen3_moe", "smollm3", "stablelm"),
    )
)
_TRANSFORMERS_JS = frozenset(
    (
        *("apertus", "arcee", "cohere", "cohere2", "ernie4_5", "gemma", "gemma2", "gemma3", "gemma3_text"),
        *("glm", "got_ocr2", "gpt-sw3", "gpt2", "gpt_neo", "gpt_neox", "granite", "helium", "hrm_text"),
        *("hunyuan_v1_dense", "llama", "ministral", "ministral3", "mistral", "modernbert-decoder", "nanochat"),
        *("olmo", "olmo2", "olmo3", "opt", "phi", "phi3", "qwen2", "qwen3", "smollm3", "solar_open"),
        *("stablelm", "starcoder2", "vaultgemma"),
    )
)


def other_runtimes(model_type: str, shape: ModelShape) -> list[str]:
    """Return the runtimes that run models of an architecture whose cache has this shape."""
    if shape.uniform_cache is None:
        return []
    listed = {OPTIMUM: _OPTIMUM, TRANSFORMERS_JS: _TRANSFORMERS_JS}
    return [GENAI, *(name for name, kinds in listed.items() if model_type in kinds)]
