"""The architectures that `llm-export` accepts, and how it exports them."""

from __future__ import annotations

import importlib.metadata
import textwrap
from enum import Enum

GENERAL = (
    *("afmoe", "apertus", "aria_text", "axk1", "axk2", "bailing_hybrid", "bamba", "beam", "biogpt", "bitnet"),
    *("bloom", "codegen", "cohere2_moe", "cohere_compass_text", "ctrl", "cwm", "dbrx", "deepseek_v2"),
    *("deepseek_v3", "deepseek_v32", "diffllama", "doge", "dots1", "dots3_note", "dots3_note_text", "ernie4_5"),
    *("ernie4_5_moe", "exaone_moe", "falcon", "falcon_h1", "falcon_mamba", "flex_olmo", "flint", "fuyu", "gemma3n"),
    *("gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text", "glm4_moe"),
    *("glm4_moe_lite", "glm_moe_dsa", "got_ocr2", "gpt-sw3", "gpt_neox_japanese", "gpt_oss", "gptj"),
    *("granite_swa", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hrm_text"),
    *("hunyuan_v1_dense", "hunyuan_v1_moe", "hy_v3", "hy_v4", "hyperclovax", "internlm3", "iquestcoder"),
    *("jais2", "jamba", "jetmoe", "kimi_linear", "kolibri1", "laguna", "lfm2", "lfm2_moe", "lfm3", "llama4"),
    *("llama4_text", "mamba", "mamba2", "mellum", "mimo_v2_flash", "minicpm3", "minimax", "minimax_m2"),
    *("minimax_m3_vl_text",),
    *("ministral", "mixtral", "modernbert-decoder", "mpt", "nanochat", "nemotron_h", "olmo_hybrid", "olmoe"),
    *("opt", "persimmon", "phi4_multimodal", "phimoe", "qwen2_moe", "qwen3_5", "qwen3_5_moe"),
    *("qwen3_5_moe_text", "qwen3_5_text", "qwen3_moe", "qwen3_next", "recurrent_gemma", "solar_open"),
    *("vaultgemma", "xglm", "youtu", "zamba", "zamba2", "zaya"),
)
"""`model_type` of those whose graphs `make sweep` found equal to transformers' own models."""


class Route(Enum):
    """How an architecture is exported; the value describes it."""

    OWN = "own decoder: every precision, TorchScript, fine-tuning"
    TEXT = "own decoder, the text model alone"
    GENERAL = "through transformers: fp32, int8, int4"


def families() -> dict[str, Route]:
    """Return the route of every `model_type`, sorted; those that packages register included."""
    from llm_edge.checkpoint.huggingface.wrappers import WRAPPERS
    from llm_edge.model.registry import BUILT_IN, ENTRY_POINT_GROUP

    registered = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP).names
    found = dict.fromkeys(GENERAL, Route.GENERAL) | dict.fromkeys(WRAPPERS, Route.TEXT)
    return dict(sorted((found | dict.fromkeys((*registered, *BUILT_IN), Route.OWN)).items()))


def print_families(wanted: bool) -> None:
    """Print the architectures and exit: the callback of `--families`."""
    if not wanted:
        return
    routes = families()
    for route in Route:
        names = [name for name, each in routes.items() if each is route]
        print(f"{route.value} ({len(names)})")
        print(textwrap.fill(", ".join(names), 100, initial_indent="  ", subsequent_indent="  "), end="\n\n")
    print("Other causal language models of transformers are tried, and refused unless they are equal to it.")
    raise SystemExit(0)
