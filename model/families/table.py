"""The families that come with llm-edge, by `model_type`."""

from __future__ import annotations

from collections.abc import Mapping

from llm_edge.model.families import gemma3 as gemma
from llm_edge.model.families import gpt, llama
from llm_edge.model.registry import Family

FAMILIES: Mapping[str, Family] = {
    "gemma3_text": gemma.GEMMA3,
    "gpt2": gpt.GPT2,
    "gpt_neo": gpt.GPT_NEO,
    "gpt_neox": gpt.GPT_NEOX,
    "granite": llama.GRANITE,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "olmo2": llama.OLMO2,
    "phi3": llama.PHI3,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "smollm3": llama.SMOLLM3,
}
