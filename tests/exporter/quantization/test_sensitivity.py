"""The estimated divergences, against the divergence of models in which a weight is replaced."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.quantization.blocks import quantize_blocks
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.journal import Journal
from llm_edge.exporter.quantization.kinds import Means
from llm_edge.exporter.quantization.observe import Observer
from llm_edge.exporter.quantization.sensitivity import Q8_0, SensitivityPass, probe_inputs
from llm_edge.exporter.quantization.store import QuantizedStore
from llm_edge.exporter.texts import Window
from llm_edge.model.config import ModelConfig

INT4 = Blocks(4, 32, symmetric=False)
MODULES = ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")


@torch.inference_mode()
def log_probabilities(config: ModelConfig, weights: Mapping[str, Tensor], windows: list[list[int]]) -> Tensor:
    decoder = LayerwiseDecoder(config, weights)
    return torch.cat([F.log_softmax(decoder.logits(state), -1) for state in decoder.run(windows)])


def estimate(
    config: ModelConfig, weights: Mapping[str, Tensor], windows: list[list[int]], folder: Path
) -> dict[tuple[str, object], Means]:
    """Round all weights to the nearest level, and estimate their divergences; half of the windows are code."""
    tied = config.tie_word_embeddings
    texts = [Window(tuple(window), "code" if number < 8 else "chat") for number, window in enumerate(windows)]
    store = QuantizedStore(folder / "weights")
    for module in modules_of(config):
        weight = weights[weight_name(module, tied=tied)]
        store.add(module, INT4, (weight.shape[0], weight.shape[1]), quantize_blocks(weight, INT4))
    decoder, journal = LayerwiseDecoder(config, weights), Journal(folder)
    with worker_threads() as threads:
        observer = Observer(decoder, windows, threads)
        for number, _ in enumerate(decoder.layers()):
            journal.save(probe_inputs(number), observer.states, always=True)
            observer.run(number)
        journal.save(probe_inputs(config.num_hidden_layers), observer.states, always=True)
        return dict(SensitivityPass(decoder, texts, store, threads, journal).measure(lambda _: None))


def modules_of(config: ModelConfig) -> list[str]:
    outside = ["lm_head"] if config.tie_word_embeddings else ["lm_head", "embed_tokens"]
    return [f"layers.{layer}.{name}" for layer in range(config.num_hidden_layers) for name in MODULES] + outside


def weight_name(module: str, *, tied: bool) -> str:
    return "embed_tokens.weight" if tied and module == "lm_head" else f"{module}.weight"


def random_windows() -> list[list[int]]:
    rng = torch.Generator().manual_seed(4)
    return [torch.randint(331, (64,), generator=rng).tolist() for _ in range(16)]


@pytest.mark.parametrize("tied", [True, False])
def test_estimates_agree_with_models_in_which_a_weight_is_quantized(tied: bool, tmp_path: Path) -> None:
    checkpoint = read_folder(tiny.save_checkpoint(tmp_path / "model", tie_word_embeddings=tied))
    config, windows = checkpoint.config, random_windows()
    weights = {name: 1.5 * checkpoint.weights[name].float() for name in checkpoint.weights}
    estimated = estimate(config, weights, windows, tmp_path)
    expected = log_probabilities(config, weights, windows)
    outside = modules_of(config)[2 * len(MODULES) :]
    for module in (f"layers.1.{MODULES[2]}", f"layers.0.{MODULES[3]}", f"layers.1.{MODULES[1]}", *outside):
        name = weight_name(module, tied=tied)
        replaced = weights | {name: quantize_blocks(weights[name], INT4).dequantized(weights[name].shape[1])}
        found = log_probabilities(config, replaced, windows)
        measured = F.kl_div(found, expected, log_target=True, reduction="batchmean").item()
        assert estimated[module, INT4].whole == pytest.approx(measured, rel=0.6), module
        assert 0 < estimated[module, Q8_0].whole < estimated[module, INT4].whole / 20
        assert sum(estimated[module, INT4].kinds) / 2 == pytest.approx(estimated[module, INT4].whole)


@pytest.mark.parametrize("factor", [1e20, 1e30, 1e36])
def test_gradients_that_overflow_give_finite_estimates(factor: float, tmp_path: Path) -> None:
    checkpoint = read_folder(tiny.save_checkpoint(tmp_path / "model", tie_word_embeddings=False))
    weights = {name: checkpoint.weights[name].float() for name in checkpoint.weights}
    weights["lm_head.weight"] = factor * weights["lm_head.weight"]
    estimated = estimate(checkpoint.config, weights, random_windows(), tmp_path)
    assert len(estimated) == 2 * len(modules_of(checkpoint.config))
    assert all(math.isfinite(number) and number >= 0 for means in estimated.values() for number in means.to_list())
