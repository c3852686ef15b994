"""Calibration of models that only transformers knows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from general_models import save, shorten_validation
from torch import Tensor

from llm_edge.exporter.export import export
from llm_edge.exporter.general import export as export_module
from llm_edge.exporter.general.calibrate import calibrate_general
from llm_edge.exporter.general.checkpoint import read_general_folder
from llm_edge.exporter.general.functions import UnsupportedModelError
from llm_edge.exporter.general.lockstep import LayerwiseModel
from llm_edge.exporter.general.recipes import GENERAL_RECIPES
from llm_edge.exporter.options import ExportOptions
from llm_edge.exporter.quantization.blocks import BlockLayout, quantize_blocks
from llm_edge.exporter.quantization.experts import quantize_experts
from llm_edge.exporter.texts import Window
from llm_edge.model.experts import ExpertsInputs, Gate

WINDOWS = [Window(tuple((seed + 7 * number * number) % 331 for number in range(200))) for seed in range(4)]


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3_moe", tmp_path_factory.mktemp("calibration") / "model")


def test_rounded_weights_err_less_than_those_rounded_to_nearest(qwen3_moe: Path, tmp_path: Path) -> None:
    checkpoint = read_general_folder(qwen3_moe)
    int4 = GENERAL_RECIPES["int4"]
    done: list[float] = []
    found = calibrate_general(checkpoint, [int4], WINDOWS, tmp_path / "store", lambda part, _: done.append(part))
    assert done == [0, 0.25, 0.5, 0.75]
    calibrated = found["int4"]
    names = [f"layers.{number}.self_attn.{each}_proj" for number in range(4) for each in "qkvo"]
    names += [f"layers.{number}.mlp.experts.{each}_proj" for number in range(4) for each in ("gate_up", "down")]
    assert calibrated.formats.keys() == set(names)
    for number in range(4):
        name = f"layers.{number}.self_attn.q_proj"
        weight = checkpoint.weights[f"model.{name}.weight"].float()
        inputs = _inputs(checkpoint, f"model.layers.{number}.input_layernorm")
        nearest = quantize_blocks(weight, BlockLayout(4, 64, symmetric=False))
        errors = [
            (inputs @ (quantized.dequantized(64) - weight).T).square().sum()
            for quantized in (calibrated.store.load(name, calibrated.formats[name].format), nearest)
        ]
        assert errors[0] < 0.9 * errors[1]


def _inputs(checkpoint: object, path: str) -> Tensor:
    """Outputs of a norm of transformers' model on the windows."""
    from general_models import make_model

    model, found = make_model("qwen3_moe"), []
    model.get_submodule(path).register_forward_hook(lambda *called: found.append(called[2][0]))
    with torch.inference_mode():
        for window in WINDOWS:
            model(input_ids=torch.tensor([window.tokens]))
    return torch.cat(found)


def test_experts_are_rounded_for_the_tokens_routed_to_them() -> None:
    random = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x = random(600, 6) @ random(6, 64) + 0.1 * random(600, 64)
    chosen = torch.stack([torch.arange(600) % 2, torch.full((600,), 2)], 1)  # nothing for the last of four
    weights = random(600, 2).abs()
    gate = Gate("silu", True, False, 1.0, 0.0, 0.0)
    inputs = ExpertsInputs(x, chosen, weights, random(4, 96, 64), None, random(4, 64, 48), None, False, *gate)
    layout = BlockLayout(4, 16, symmetric=False)
    with ThreadPoolExecutor(1) as threads:
        (found,) = quantize_experts(inputs, [layout], threads)
        (nearest,) = quantize_experts(inputs._replace(chosen=torch.full((600, 2), -1)), [layout], threads)
    rows = torch.stack([torch.arange(48), torch.arange(48, 96)], 1).flatten()  # gate and up alternate
    for expert in range(4):
        part = slice(expert * 96, expert * 96 + 96)
        wanted = inputs.gate_up[expert][rows]
        taken, _ = torch.where(chosen == expert)
        errors = [
            (x[taken] @ (each[0].dequantized(64)[part] - wanted).T).square().sum().item() for each in (found, nearest)
        ]
        down = [each[1].dequantized(48)[expert * 64 : expert * 64 + 64] for each in (found, nearest)]
        if len(taken):
            assert errors[0] < 0.7 * errors[1]
        assert torch.equal(*down) == (len(taken) == 0)


def test_calls_advance_together_and_end_when_they_are_stopped(qwen3_moe: Path) -> None:
    checkpoint = read_general_folder(qwen3_moe)
    layerwise = LayerwiseModel(checkpoint, with_head=True)
    tokens, ended = torch.tensor([[1, 2, 3]]), []

    def call(times: int) -> None:
        for _ in range(times):
            layerwise.model(input_ids=tokens, use_cache=False)
        ended.append(times)

    def run_all(times: int) -> None:
        for _, _, run in layerwise.run([partial(call, times)]):
            run()

    for number, (path, _, run) in enumerate(layerwise.run([partial(call, 1)] * 3)):
        assert path == f"model.layers.{number}"
        assert ended == []
        run()
    assert ended == [1] * 3
    layerwise = LayerwiseModel(checkpoint, with_head=True)
    with pytest.raises(UnsupportedModelError, match="several times"):
        run_all(2)
    assert ended == [1] * 3


def test_a_model_that_repeats_layers_is_rounded_to_nearest(
    qwen3_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeModel

    forward = Qwen3MoeModel.forward

    def twice(self: Qwen3MoeModel, **given: object) -> object:
        if not given["use_cache"]:
            forward(self, **given)
        return forward(self, **given)

    monkeypatch.setattr(Qwen3MoeModel, "forward", twice)
    shorten_validation(monkeypatch, 40)
    monkeypatch.setattr(export_module, "load_calibration", lambda *_: WINDOWS)
    report = export(str(qwen3_moe), ExportOptions(output=tmp_path / "bundle", precision="int4"))
    assert any("rounded to nearest" in note for note in report.notes)
    stored = report.precisions[0].stored.formats["layers.0.self_attn.q_proj"]
    assert str(stored.format) == "int4 blocks of 64, zero points"
    assert sorted(path.name for path in (tmp_path / "bundle").iterdir() if "calib" in path.name) == []
