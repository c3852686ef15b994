"""Refinement lowers the error of a layer on a text it was not trained on, and keeps nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.exporter.parallel import worker_threads
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks, quantize_blocks
from llm_edge.exporter.quantization.refine import LayerSamples, refine_layer
from llm_edge.runtime.errors import ParameterError

WIDTH = 64


class Layer(nn.Module):
    """Two projections with a nonlinearity between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = (nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.down(torch.relu(self.up(x)))
        return output


def samples(layer: Layer, seed: int, count: int = 24) -> LayerSamples:
    torch.manual_seed(seed)
    scales = torch.logspace(-1, 1, WIDTH)
    inputs = [torch.randn(1, 32, WIDTH) * scales for _ in range(count)]
    with torch.no_grad():
        return LayerSamples(inputs, [layer(x) for x in inputs])


def blocks_of(layer: Layer) -> dict[str, QuantizedBlocks]:
    layout = BlockLayout(4, 32, symmetric=False)
    return {name: quantize_blocks(module.weight.detach(), layout) for name, module in layer.named_children()}


def refined(layer: Layer, text: LayerSamples, probes: LayerSamples) -> dict[str, QuantizedBlocks]:
    modules = {"up": layer.up, "down": layer.down}
    with worker_threads() as threads:
        return refine_layer(layer, modules, blocks_of(Layer()), text, probes, threads)


def error(blocks: dict[str, QuantizedBlocks], held_out: LayerSamples) -> float:
    layer = Layer()
    for name, module in layer.named_children():
        module.weight = nn.Parameter(blocks[name].dequantized(WIDTH), requires_grad=False)
    pairs = zip(held_out.inputs, held_out.outputs, strict=True)
    return sum((layer(x) - expected).square().mean().item() for x, expected in pairs)


def test_the_error_on_another_text_falls() -> None:
    layer, held_out = Layer(), samples(Layer(), 3)
    before = blocks_of(layer)
    after = refined(layer, samples(layer, 1), samples(layer, 2))
    assert error(after, held_out) < 0.95 * error(before, held_out)
    for name, blocks in after.items():
        assert np.array_equal(blocks.scales, before[name].scales)
        assert np.array_equal(blocks.zeros(), before[name].zeros())
        assert blocks.levels().max() <= 15
        assert not np.array_equal(blocks.levels(), before[name].levels())


def test_modules_hold_the_refined_weights_afterwards() -> None:
    layer = Layer()
    text, probes = samples(layer, 1), samples(layer, 2)
    for name, blocks in refined(layer, text, probes).items():
        assert torch.equal(layer.get_submodule(name).weight, blocks.dequantized(WIDTH))


def test_a_change_that_does_not_help_on_the_probes_is_not_kept() -> None:
    layer, before = Layer(), blocks_of(Layer())
    text, probes = samples(layer, 1), samples(layer, 2)
    rounded = Layer()
    for name, module in rounded.named_children():
        module.weight = nn.Parameter(before[name].dequantized(WIDTH), requires_grad=False)
    perfect = LayerSamples(probes.inputs, [rounded(x) for x in probes.inputs])
    assert refined(layer, text, perfect) == {}
    assert torch.equal(layer.up.weight, before["up"].dequantized(WIDTH))


def test_the_number_of_cores_does_not_change_the_integers() -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            layer = Layer()
            text, probes = samples(layer, 1, 6), samples(layer, 2, 4)
            found.append([blocks.data for blocks in refined(layer, text, probes).values()])
    finally:
        torch.set_num_threads(threads)
    assert all(np.array_equal(*pair) for pair in zip(*found, strict=True))


def test_an_export_with_refined_weights_is_more_faithful(tiny_checkpoint: Path, tmp_path: Path) -> None:
    divergences = []
    for refine in (False, True):
        out = tmp_path / str(refine)
        export(str(tiny_checkpoint), ExportOptions(out, precision="int4", refine=refine))
        divergences.append(json.loads((out / "manifest.json").read_text())["precisions"]["int4"]["quality"]["kl_mean"])
    assert divergences[1] < divergences[0]


def test_precisions_without_4_bit_weights_cannot_be_refined(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match="--refine applies to 4-bit weights: add int4"):
        export(str(tiny_checkpoint), ExportOptions(tmp_path / "out", precision="int8", refine=True))
    assert not (tmp_path / "out").exists()
