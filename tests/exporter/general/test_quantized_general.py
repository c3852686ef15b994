"""Quantized checkpoints of models that only transformers knows."""

from __future__ import annotations

import json
from pathlib import Path

import quantized
import tiny
import torch
from general_models import save
from safetensors.torch import load_file, save_file
from torch import Tensor

from llm_edge.exporter.general.checkpoint import read_general_folder


def test_the_experts_of_gpt_oss_are_read_from_mxfp4(tmp_path: Path) -> None:
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = tmp_path / "model"
    sizes = dict.fromkeys(("hidden_size", "max_position_embeddings"), 64) | {"intermediate_size": 96}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    config = GptOssConfig(vocab_size=331, num_local_experts=3, num_experts_per_tok=2, **sizes, **layers)
    GptOssForCausalLM(config).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    stored, expected = {}, dict(load_file(folder / "model.safetensors"))
    generator = torch.Generator().manual_seed(0)
    for name, weight in list(expected.items()):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = weight
            continue
        experts, width, rows = weight.shape
        shape = (experts, rows, width // 32, 16)
        blocks = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, shape[:3], dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        expected[name] = convert_moe_packed_tensors(blocks, scales)
    assert len(stored) > len(expected)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    content = json.loads((folder / "config.json").read_text())
    content["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (folder / "config.json").write_text(json.dumps(content))
    checkpoint = read_general_folder(folder)
    for name, weight in expected.items():
        assert torch.equal(checkpoint.weights[name].float(), weight.float()), name
    assert "MXFP4" in checkpoint.source.weight_types
    assert "quantization_config" not in checkpoint.hf_config


def test_experts_are_stacked_after_they_are_dequantized(tmp_path: Path) -> None:
    folder = save("qwen3_moe", tmp_path / "model")

    def write(weight: Tensor) -> quantized.Written:
        return quantized.fp8_rows(weight)

    config = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    model = quantized.quantize_folder(folder, config, write)
    weights = read_general_folder(folder).weights
    experts = weights["model.layers.1.mlp.experts.down_proj"]
    for number, expert in enumerate(experts):
        stored = model[f"model.layers.1.mlp.experts.{number}.down_proj.weight"]
        torch.testing.assert_close(expert, stored, rtol=1e-6, atol=1e-7)
