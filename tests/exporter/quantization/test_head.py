"""The head in parts: quantized like a whole weight, and measured like the whole vocabulary at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.quantization import head as head_module
from llm_edge.exporter.quantization.blocks import quantize_blocks
from llm_edge.exporter.quantization.formats.base import apply
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.head import measure_head, quantize_rows
from llm_edge.exporter.quantization.hessian import Hessian
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config

LAYOUT = Blocks(4, 32, symmetric=False)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "_ROWS", 100)


@pytest.mark.parametrize("compensated", [False, True])
def test_rows_in_parts_are_quantized_like_a_whole_weight(compensated: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, inputs = torch.randn(331, 64, generator=generator), torch.randn(500, 64, generator=generator)
    hessian = Hessian(inputs.T @ inputs) if compensated else None
    with worker_threads() as threads:
        found = quantize_rows(lambda rows: weight[rows], 331, LAYOUT, hessian, threads)
    whole = quantize_blocks(weight, LAYOUT, hessian)
    assert found.dequantized(64).sub(whole.dequantized(64)).abs().max() < 1e-6
    picked = found.rows(torch.tensor([330, 0, 330]))
    assert torch.equal(picked.dequantized(64), found.dequantized(64)[[330, 0, 330]])


@pytest.mark.parametrize("tied", [True, False])
def test_the_divergence_of_a_head_is_that_of_all_logits(tied: bool, tmp_path: Path) -> None:
    checkpoint = read_folder(tiny.save_checkpoint(tmp_path, tie_word_embeddings=tied))
    weights = RotatedWeights(checkpoint.config, checkpoint.weights)
    decoder = LayerwiseDecoder(rotated_config(checkpoint.config), weights)
    inputs = 3 * torch.randn(40, 64, generator=torch.Generator().manual_seed(2))
    rows = decoder.head_rows()(torch.arange(331))
    candidate = quantize_blocks(rows, LAYOUT)
    reference = Blocks(8, 32, symmetric=True)
    with worker_threads() as threads:
        found = measure_head(decoder, inputs, {LAYOUT: candidate}, reference, threads)
    expected = F.log_softmax(inputs @ rows.T, -1)
    for layout, quantized in ((LAYOUT, candidate), (reference, quantize_blocks(rows, reference))):
        logits = F.log_softmax(apply(quantized, inputs), -1)
        divergence = F.kl_div(logits, expected, log_target=True, reduction="batchmean").item()
        assert found.divergences[layout].mean().item() == pytest.approx(divergence, rel=1e-3, abs=1e-6)  # in float32
    # The gradient is a row of the head less the mean row, so that it tells which token was drawn.
    means = expected.exp() @ rows
    distances = torch.cdist(found.gradients + means, rows)
    assert distances.amin(-1).max() < 1e-3


@pytest.mark.parametrize("softcap", [2.0, None], ids=["softcap", "bias"])
def test_bounded_and_biased_logits_are_measured(softcap: float | None, tmp_path: Path) -> None:
    checkpoint = read_folder(tiny.save_checkpoint(tmp_path))
    bias = torch.randn(331, generator=torch.Generator().manual_seed(4)) * (softcap is None)
    config = dataclasses.replace(checkpoint.config, logit_softcap=softcap, head_bias=softcap is None)
    decoder = LayerwiseDecoder(config, {**checkpoint.weights, "lm_head.bias": bias})

    def log_probabilities(products: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(products + bias if softcap is None else softcap * torch.tanh(products / softcap), -1)

    inputs = (3 * torch.randn(40, 64, generator=torch.Generator().manual_seed(2))).requires_grad_()
    rows = decoder.head_rows()(torch.arange(331))
    candidate = quantize_blocks(rows, LAYOUT)
    with worker_threads() as threads:
        found = measure_head(decoder, inputs.detach(), {LAYOUT: candidate}, Blocks(8, 32, symmetric=True), threads)
    expected = log_probabilities(inputs @ rows.T)
    logits = log_probabilities(apply(candidate, inputs.detach()))
    divergence = F.kl_div(logits, expected, log_target=True, reduction="batchmean").item()
    assert found.divergences[LAYOUT].mean().item() == pytest.approx(divergence, rel=1e-3, abs=1e-6)
    # Each gradient is that of the log-likelihood of one token.
    gradients = torch.stack(
        [torch.autograd.grad(expected[:, token].sum(), inputs, retain_graph=True)[0] for token in range(331)], 1
    )
    distances = (gradients - found.gradients[:, None]).norm(dim=-1)
    assert distances.amin(-1).max() < 1e-3
    assert distances.amax(-1).min() > 0.1


def test_tokens_are_drawn_from_the_distribution_of_the_model(tmp_path: Path) -> None:
    checkpoint = read_folder(tiny.save_checkpoint(tmp_path))
    decoder = LayerwiseDecoder(checkpoint.config, checkpoint.weights)
    one = torch.randn(1, 64, generator=torch.Generator().manual_seed(3))
    inputs = (one * 60).expand(4000, 64)
    rows = decoder.head_rows()(torch.arange(331))
    probabilities = F.softmax(inputs[0] @ rows.T, -1)
    with worker_threads() as threads:
        found = measure_head(decoder, inputs, {}, LAYOUT, threads)
    drawn = torch.cdist(found.gradients + probabilities @ rows, rows).argmin(-1)
    frequencies = np.bincount(drawn.numpy(), minlength=331) / 4000
    assert np.abs(frequencies - probabilities.numpy()).max() < 0.03
    assert probabilities.max() > 0.1
