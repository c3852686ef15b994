"""Text models of checkpoints that also read images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.huggingface.wrappers import WRAPPERS, text_config
from llm_edge.exporter.texts import split_windows
from llm_edge.exporter.validation.independent import compare_with_transformers
from llm_edge.exporter.validation.reference import record_reference
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import CheckpointError

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_VISION = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 64,
    "deepstack_visual_indexes": [0],
    "num_position_embeddings": 16,
}
_MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
_MROPE_2 = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
_QWEN2_VISION = {"depth": 1, "hidden_size": 64, "embed_dim": 64, "out_hidden_size": 64, "num_heads": 2}
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any]]] = {
    "aya_vision": (
        "aya_vision",
        "cohere2",
        {},
        {"vision_config": {**_VISION, "model_type": "siglip_vision_model"}, "tie_word_embeddings": True},
    ),
    "cohere2_vision": (
        "cohere2_vision",
        "cohere2",
        {},
        {"vision_config": {**_VISION, "model_type": "siglip_vision_model"}, "tie_word_embeddings": True},
    ),
    "gemma3": ("gemma3", "gemma3_text", {}, {"vision_config": _VISION, "mm_tokens_per_image": 4}),
    "mistral3": ("mistral3", "mistral", {}, {"vision_config": {**_VISION, "model_type": "pixtral"}}),
    "mistral3 with ministral3": ("mistral3", "ministral3", {}, {"vision_config": {**_VISION, "model_type": "pixtral"}}),
    "llava": ("llava", "llama", {}, {"vision_config": {**_VISION, "model_type": "clip_vision_model"}}),
    "llava_next": ("llava_next", "mistral", {}, {"vision_config": {**_VISION, "model_type": "clip_vision_model"}}),
    "internvl": (
        "internvl",
        "qwen2",
        {},
        {"vision_config": {**_VISION, "image_size": [28, 28], "patch_size": [14, 14]}},
    ),
    "qwen2_vl": ("qwen2_vl", "qwen2", {"rope_parameters": _MROPE_2}, {"vision_config": _QWEN2_VISION}),
    "qwen2_5_vl": ("qwen2_5_vl", "qwen2", {"rope_parameters": _MROPE_2}, {"vision_config": _QWEN2_VISION}),
    "qwen3_vl": ("qwen3_vl", "qwen3", {"rope_parameters": _MROPE}, {"vision_config": _QWEN_VISION}),
}
"""By name: the wrapper's type, the family of its text model, changes to the family's case, and keys of the wrapper."""


def model(name: str, **changes: Any) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

    wrapper, kind, text_changes, outer = CASES[name]
    text = {**next(config for case, config in families.CASES.values() if case == kind), **text_changes}
    text["model_type"] = f"{wrapper}_text" if wrapper.startswith("qwen") else kind
    torch.manual_seed(0)
    config = CONFIG_MAPPING[wrapper](text_config=text, **{**outer, **changes})
    created = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for weight_name, weight in created.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                weight.mul_(5 if "embed" in weight_name else 8)
    return created


@torch.inference_mode()
def our_logits(checkpoint: Checkpoint, ids: torch.Tensor) -> torch.Tensor:
    decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights(checkpoint.weights)
    logits: torch.Tensor = decoder(ids, torch.ones_like(ids), decoder.empty_past())[0]
    return logits


@pytest.mark.parametrize("name", CASES)
def test_the_text_part_agrees_with_the_whole_model(name: str, tmp_path: Path) -> None:
    theirs = model(name)
    checkpoint = read_folder(families.save(theirs, tmp_path))
    wrapper, kind, *_ = CASES[name]
    assert checkpoint.hf_config["model_type"] == kind
    assert checkpoint.notes[0] == f"{wrapper} is exported as a text model: its image part is left out"
    ids = torch.randint(0, 250, (1, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = theirs(input_ids=ids).logits
    assert expected.std() > 0.5
    assert (our_logits(checkpoint, ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["gemma3", "qwen3_vl"])
def test_the_text_part_is_compared_with_transformers(name: str, tmp_path: Path) -> None:
    checkpoint = read_folder(families.save(model(name), tmp_path / "model"))
    windows = split_windows([(7 * i + i * i) % 300 + 3 for i in range(200)], 200)
    recorded = record_reference(checkpoint.config, checkpoint.weights, windows, tmp_path / "logits")
    found = compare_with_transformers(checkpoint, recorded)
    assert found.reason is None
    assert found.difference is not None
    assert found.difference.max < 1e-3


def test_every_wrapper_has_a_case() -> None:
    assert {case[0] for case in CASES.values()} == WRAPPERS.keys()


def test_names_of_older_checkpoints_are_found(tmp_path: Path) -> None:
    """transformers 4 saved `language_model.model.layers…` and `language_model.lm_head.weight`."""
    from safetensors.torch import load_file, save_file

    theirs = model("llava")
    families.save(theirs, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if any(name.startswith("model.language_model.") for name in tensors):
        tensors = {
            name.replace("model.language_model.", "language_model.model.")
            .replace("model.vision_tower.", "vision_tower.")
            .replace("model.multi_modal_projector.", "multi_modal_projector."): tensor
            for name, tensor in tensors.items()
        }
        tensors["language_model.lm_head.weight"] = tensors.pop("lm_head.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = theirs(input_ids=ids).logits
    assert (our_logits(read_folder(tmp_path), ids) - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_a_flat_config_as_published_is_read(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    theirs = model(name)
    families.save(theirs, tmp_path)
    path = tmp_path / "config.json"
    whole = json.loads(path.read_text())
    text = whole.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]}}
    path.write_text(json.dumps({**text, **whole}))
    tensors = load_file(tmp_path / "model.safetensors")
    tensors = {
        key.replace("model.language_model.", "model.").replace("model.visual.", "visual."): tensor
        for key, tensor in tensors.items()
    }
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = theirs(input_ids=ids).logits
    assert (our_logits(read_folder(tmp_path), ids) - expected).abs().max() < 1e-4


def test_sizes_that_published_configs_omit_are_those_of_transformers() -> None:
    from transformers import CONFIG_MAPPING

    for wrapper, kind in (("gemma3", "gemma3_text"), ("llava", "llama"), ("llava_next", "mistral")):
        found, *_ = text_config({"model_type": wrapper, "text_config": {"model_type": kind}}, "config.json")
        defaults = CONFIG_MAPPING[kind]()
        for key in ("vocab_size", "num_attention_heads"):
            assert found[key] == getattr(defaults, key)
        for key in found.keys() - {"model_type", "tie_word_embeddings"}:
            assert found[key] == getattr(defaults, key), key


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_config": None}, "text_config is None, not an object"),
        (
            {"text_config": {"model_type": "mamba"}},
            "text_config: model_type 'mamba' is not supported within llava; supported: cohere, cohere2, gemma3_text, ",
        ),
        ({"text_config": {}}, "text_config: model_type None is not supported within llava"),
        ({"text_config": {"model_type": "granite"}}, "model_type 'granite' is not supported within llava"),
        ({"quantization_config": {"quant_method": "hqq"}}, "weights quantized by 'hqq' are not supported"),
        ({"model_type": "mllama"}, "model_type 'mllama' is not supported"),
        ({"model_type": "mllama"}, "; its text model is 'llama'"),
    ],
)
def test_configs_without_a_known_text_model_are_rejected(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    content = {"model_type": "llava", "text_config": {"model_type": "llama"}, **changes}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError) as refusal:
        read_folder(tmp_path)
    assert words in str(refusal.value)
