"""Bundles of small random models with states, in fp32: what `llm-export` writes for a llama, with another graph."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import torch

from llm_edge.exporter.general.decoder import general_decoder
from llm_edge.exporter.general.trace import trace_general
from llm_edge.exporter.graph.lower import apply_recipe
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.recipes import RECIPES
from llm_edge.runtime.bundle import MANIFEST, manifest_entry

_SHAPE: Mapping[str, Any] = {
    "vocab_size": 331,  # as of the tokenizer's bundle
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
_DELTA_NET = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
KINDS: Mapping[str, Mapping[str, Any]] = {
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"],
        "shared_intermediate_size": 64,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        **_MAMBA,
    },
    "qwen3_5_text": {"layer_types": ["linear_attention", "full_attention"], **_DELTA_NET},
    "falcon_h1": {"mamba_d_ssm": 128, **_MAMBA},
}
"""Settings by model type: short convolutions, Mamba 2 with experts, a gated delta net, and Mamba 2 beside attention."""


def state_bundle(kind: str, tiny_bundle: Path, folder: Path) -> Path:
    """Write the bundle of a random model of a kind, with the tokenizer of another bundle."""
    shutil.copytree(tiny_bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    entry = manifest["precisions"]["fp32"]
    manifest["precisions"] = {"fp32": entry}
    caches = _write_graph(kind, folder / entry["model"])
    manifest["model"] = {
        "vocab_size": _SHAPE["vocab_size"],
        "num_hidden_layers": _SHAPE["num_hidden_layers"],
        "max_position_embeddings": _SHAPE["max_position_embeddings"],
        "caches": caches,
    }
    write_manifest(folder, manifest)
    return folder


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write a bundle's manifest, with the sizes and checksums that its files have now."""
    files = {name: manifest_entry(folder / name) for name in manifest["files"]}
    (folder / MANIFEST).write_text(json.dumps({**manifest, "files": files}), encoding="utf-8")


def _write_graph(kind: str, path: Path) -> list[dict[str, Any]]:
    """Write the graph and weights of a random model; returns the manifest's description of its caches."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**_SHAPE, **KINDS[kind])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():  # so that every layer matters
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.std() < 0.05:
                parameter.mul_(6)
    decoder = general_decoder(model)
    graph = trace_general(decoder)
    weights = {
        decoder.public_name(name): value.detach()
        for name, value in (*decoder.named_parameters(), *decoder.named_buffers())
    }
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    apply_recipe(graph, SimpleNamespace(tie_word_embeddings=tied), weights, RECIPES["fp32"], GraphStyle.FUSED)  # type: ignore[arg-type]
    data = path.with_name(f"{path.name}_data")
    data.unlink()
    ir.save(graph, path, external_data=data.name, size_threshold_bytes=1024)
    return [asdict(tensor) for layer in decoder.caches for tensor in layer]
