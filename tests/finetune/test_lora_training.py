"""LoRA: its initial state, its gradients, and its files as peft reads them (checks 13, 14 and 16)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import families
import original
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from training_data import decoder_of, samples, saved

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.lora.adapter import open_adapter
from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.finetune.fused import fuse
from llm_edge.finetune.lora import add_lora, lora_layers
from llm_edge.finetune.loss import batch_loss
from llm_edge.finetune.packing import Batch
from llm_edge.finetune.saving import lora_rows, save_adapter, save_model
from llm_edge.model.decoder import Decoder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # in peft

IDS = torch.randint(3, 320, (1, 40), generator=torch.Generator().manual_seed(0))


def logits(decoder: Decoder) -> Tensor:
    with torch.no_grad():
        return decoder(IDS, torch.ones_like(IDS), decoder.empty_past())[0]


def adapted(checkpoint: Checkpoint, *, trained: bool = True) -> Decoder:
    """A decoder with adapters; `trained` ones have random B, as after training."""
    decoder = decoder_of(checkpoint)
    add_lora(decoder, lora_rows(checkpoint), rank=4, alpha=6.0, seed=1)
    if trained:
        torch.manual_seed(2)
        for _, module in lora_layers(decoder):
            for part in module.lora_b:
                torch.nn.init.normal_(part, std=0.02)
    return decoder


def transformers_logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-4 * expected.std())


def test_13_the_first_logits_are_bit_equal_to_those_of_the_base(tmp_path: Path) -> None:
    checkpoint = saved("llama", tmp_path)[1]
    assert torch.equal(logits(adapted(checkpoint, trained=False)), logits(decoder_of(checkpoint)))


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "olmo", "phi", "cohere2", "gemma2"])
def test_13_merging_keeps_the_logits(name: str, tmp_path: Path) -> None:
    folder, checkpoint = saved(name, tmp_path / "base")
    decoder = adapted(checkpoint)
    save_model(tmp_path / "merged", decoder, checkpoint, StateDictOptions(), folder)
    merged = decoder_of(read_folder(tmp_path / "merged"))
    assert not close(logits(merged), logits(decoder_of(checkpoint)))
    assert close(logits(merged), logits(decoder))


@pytest.mark.parametrize(
    "name",
    ["llama", "phi3", "gpt2", "gpt_neox", "granite", "gemma3_text", "glm", "helium", "cohere2", "phi", "gpt_bigcode"],
)
def test_14_peft_opens_the_adapter_with_the_same_logits(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = families.model(name)
    families.save(base, tmp_path / "base")
    checkpoint = read_folder(tmp_path / "base")
    decoder = adapted(checkpoint)
    save_adapter(tmp_path / "adapter", decoder, checkpoint, str(tmp_path / "base"))

    merged = decoder_of(read_folder(tmp_path / "base", open_adapter(tmp_path / "adapter")))
    assert close(logits(merged), logits(decoder))
    assert not close(transformers_logits(base), logits(decoder))
    assert close(transformers_logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(decoder))


def test_14_the_adapter_of_a_model_with_metas_row_order_fits_its_hugging_face_form(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_edge.finetune.saving import _family_table
    from llm_edge.model.weights import restore_sources

    family = original.save_family(tmp_path / "family")
    checkpoint = open_checkpoint(str(family.path), SourceOptions(), lambda _: None)
    decoder = adapted(checkpoint)
    save_adapter(tmp_path / "adapter", decoder, checkpoint, "base")

    model = LlamaForCausalLM(LlamaConfig(**checkpoint.hf_config)).eval()
    state: dict[str, Tensor] = {}
    for name in checkpoint.weights:
        sources = _family_table(checkpoint)[1].sources(name)
        state |= restore_sources(checkpoint.config, name, sources, checkpoint.weights[name])
    model.load_state_dict(state)
    assert close(transformers_logits(model), logits(decoder_of(checkpoint)))
    assert close(transformers_logits(PeftModel.from_pretrained(model, tmp_path / "adapter")), logits(decoder))


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gemma2"])
def test_gradients_of_the_adapter_are_those_of_peft(name: str, tmp_path: Path) -> None:
    from peft import PeftModel

    base = families.model(name)
    families.save(base, tmp_path / "base")
    checkpoint = read_folder(tmp_path / "base")
    decoder = adapted(checkpoint)
    save_adapter(tmp_path / "adapter", decoder, checkpoint, "base")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True)
    fuse(decoder)
    (sample,) = samples(1, shortest=40)
    batch_loss(decoder, Batch.of([sample])).backward()
    ids = torch.tensor([sample.ids])
    labels = torch.tensor(
        [[token if trained else -100 for token, trained in zip(sample.ids, sample.trained, strict=True)]]
    )
    (model(input_ids=ids, labels=labels).loss * sample.targets).backward()
    theirs = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    for layer, names in (
        ("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
        ("mlp.gate_up", ("mlp.gate_proj", "mlp.up_proj")),
        ("mlp.down", ("mlp.down_proj",)),
    ):
        module = dict(lora_layers(decoder))[f"layers.1.{layer}"]
        for part, own in enumerate(names):
            path = f"base_model.model.model.layers.1.{own}"
            for ours, kind in ((module.lora_a.grad.chunk(len(names))[part], "A"), (module.lora_b[part].grad, "B")):
                expected = theirs[f"{path}.lora_{kind}.default.weight"]
                assert (ours - expected).norm() <= 1e-5 * expected.norm()


def test_16_weights_that_were_not_trained_survive_to_the_bit(tmp_path: Path) -> None:
    model = families.model("gemma3_text").to(torch.bfloat16)
    folder = families.save(model, tmp_path / "base")
    checkpoint = read_folder(folder)
    save_model(tmp_path / "saved", adapted(checkpoint), checkpoint, StateDictOptions(), folder)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "saved" / "model.safetensors")
    assert before.keys() == after.keys()
    untrained = [name for name in before if "norm" in name or "embed" in name]
    assert len(untrained) > 10
    assert all(torch.equal(before[name], after[name]) for name in untrained)
    again = decoder_of(read_folder(tmp_path / "saved"))
    for name in ("norm.weight", "embed_tokens.weight"):
        assert torch.equal(again.get_parameter(name), checkpoint.weights[name].float())


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_16_metas_names_and_rows_survive_to_the_bit(suffix: str, tmp_path: Path) -> None:
    family = original.save_family(tmp_path / "family", suffix=suffix)
    checkpoint = open_checkpoint(str(tmp_path / "family"), SourceOptions(), lambda _: None)
    decoder = adapted(checkpoint)
    with torch.no_grad():
        decoder.get_submodule("layers.1.attention.qkv").lora_b[0].zero_()
    save_model(tmp_path / "saved", decoder, checkpoint, StateDictOptions(), tmp_path / "family")
    again = open_checkpoint(str(tmp_path / "saved"), SourceOptions(), lambda _: None)
    assert close(logits(decoder_of(again)), logits(decoder))
    assert again.tokenizer == checkpoint.tokenizer
    assert (again.generation, again.reasoning, again.guards) == (
        checkpoint.generation,
        checkpoint.reasoning,
        checkpoint.guards,
    )
    state = family.model.state_dict()
    for name in ("tok_embeddings.weight", "norm.weight", "layers.1.attention.wq.weight"):
        assert torch.equal(again.weights.load_source(name), state[name])


def test_transformers_loads_the_saved_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, checkpoint = saved("qwen3", tmp_path / "base")
    decoder = adapted(checkpoint)
    save_model(tmp_path / "saved", decoder, checkpoint, StateDictOptions(), folder)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert close(transformers_logits(model), logits(decoder))
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == checkpoint.tokenizer.chat_template
    assert math.isfinite(float(logits(decoder).sum()))
