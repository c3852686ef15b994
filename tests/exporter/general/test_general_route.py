"""Exports of models that only transformers knows, compared with transformers' own model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from general_check import GREEDY, compare_export, run_quantized
from general_models import make_config, make_model, save, shorten_validation
from safetensors.torch import load_file, save_file

from llm_edge.exporter.export import export
from llm_edge.exporter.general.architecture import architecture_of
from llm_edge.exporter.general.checkpoint import read_general_folder
from llm_edge.exporter.general.decoder import AttentionMode
from llm_edge.exporter.general.recipes import GENERAL_RECIPES
from llm_edge.exporter.general.reference import record_general_reference
from llm_edge.exporter.general.writer import GeneralWriter
from llm_edge.exporter.options import ExportOptions, FileFormat, GraphChoice
from llm_edge.exporter.quantization.recipes import RECIPES
from llm_edge.exporter.texts import Window
from llm_edge.exporter.validation.compare import score
from llm_edge.exporter.validation.graph_parts import PartwiseGraph
from llm_edge.exporter.validation.windows import Run
from llm_edge.runtime import Model
from llm_edge.runtime.errors import (
    CheckpointError,
    ParameterError,
    UnknownFamilyError,
    UnsupportedSettingError,
)
from llm_edge.runtime.sampling.params import SamplingParams

BOUND = 1e-4  # of the difference of logits


@pytest.mark.parametrize(
    ("kind", "operators"),
    [
        ("gpt_oss", {"GroupQueryAttention", "MoE"}),  # sinks, windows, biases and a gate of its own
        ("deepseek_v3", {"Attention", "TensorScatter", "MoE"}),  # caches latents
        ("gemma4_text", {"GroupQueryAttention"}),  # layers share caches; heads of two sizes
        ("qwen3_5_text", {"GroupQueryAttention", "LinearAttention", "CausalConvWithState"}),  # the delta rule
        ("granitemoehybrid", {"GroupQueryAttention", "LinearAttention", "CausalConvWithState", "MoE"}),  # Mamba 2
        ("phimoe", {"GroupQueryAttention", "MoE"}),  # tells its window by the mask alone
        ("zaya", {"GroupQueryAttention", "MoE"}),  # convolves queries and keys
        ("deepseek_v32", {"TensorScatter", "MoE"}),  # selects the tokens to attend to
        ("bloom", {"TensorScatter"}),  # attention of its own
        ("falcon", {"TensorScatter"}),  # constants in the code, and queries, keys and values in one matrix
    ],
)
def test_the_graph_computes_what_transformers_computes(tmp_path: Path, kind: str, operators: set[str]) -> None:
    found = compare_export(save(kind, tmp_path / "source"), tmp_path / "target")
    assert found.operators.keys() - {"nodes"} == operators
    assert found.worst < BOUND
    assert found.greedy == GREEDY


def test_parts_of_unequal_size_are_not_taken_for_halves_of_a_quantized_projection(tmp_path: Path) -> None:
    run_quantized(save("mamba", tmp_path / "source"), tmp_path / "target")


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "gelu"}])  # one operator, and all experts for all tokens
def test_a_deep_model_with_many_experts_passes_the_runtimes_check(tmp_path: Path, changes: dict[str, str]) -> None:
    source = save("qwen3_moe", tmp_path, num_hidden_layers=8, num_experts=32, **changes)
    GeneralWriter().write(tmp_path, read_general_folder(source), (RECIPES["fp32"],), lambda *_: None)


@pytest.fixture(scope="module")
def qwen3_moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save("qwen3_moe", tmp_path_factory.mktemp("general") / "qwen3-moe")


def test_a_bundle_is_validated_against_transformers_and_answers(qwen3_moe: Path, tmp_path: Path) -> None:
    report = export(str(qwen3_moe), ExportOptions(output=tmp_path / "bundle"))
    assert [each.recipe.name for each in report.precisions] == ["fp32", "int8", "int4"]
    assert report.validation is not None
    assert report.validation.parities["fp32"].worst.max < BOUND
    check = report.validation.independent
    assert check.difference is not None
    assert check.layers == report.layers
    assert 0 < check.difference.max < BOUND
    qualities = report.validation.qualities
    assert qualities["fp32"].top1 == 1
    assert 1e-6 < qualities["int8"].kl_mean < qualities["int4"].kl_mean < 0.5
    sizes = [each.size for each in report.precisions]
    assert sizes == sorted(sizes, reverse=True)
    stored = report.precisions[1].stored.formats
    assert {str(stored[f"layers.0.{name}"].format) for name in ("mlp.experts.gate_up_proj", "self_attn.q_proj")} == {
        "int8 blocks of 32"
    }
    assert str(stored["layers.0.mlp.gate"].format) == "fp32"
    model = Model.load(tmp_path / "bundle", "fp32", threads=1)
    tokens = [5, 9, 17, 4]
    generation = model.generate(tokens, SamplingParams(temperature=0, max_tokens=12))
    found = [chunk.token for chunk in generation if chunk.token is not None]
    assert len(found) == 12  # no end token among them
    sequence = torch.tensor([tokens])
    with torch.inference_mode():
        reference = make_model("qwen3_moe")
        for _ in range(12):
            sequence = torch.cat([sequence, reference(input_ids=sequence).logits[:, -1:].argmax(-1)], dim=1)
    assert found == sequence[0, len(tokens) :].tolist()


def test_the_graph_is_proven_also_if_the_bundle_has_only_rounded_ones(qwen3_moe: Path, tmp_path: Path) -> None:
    report = export(str(qwen3_moe), ExportOptions(output=tmp_path / "bundle", precision="int8"))
    assert report.validation is not None
    assert report.validation.auxiliary_parities["fp32"].worst.max < BOUND
    assert sorted(path.name for path in (tmp_path / "bundle" / "onnx").iterdir()) == [
        "model_quantized.onnx",
        "model_quantized.onnx_data",
    ]


def test_a_reference_that_is_loaded_layer_by_layer_computes_the_same(qwen3_moe: Path, tmp_path: Path) -> None:
    checkpoint = read_general_folder(qwen3_moe)
    windows = [Window(tuple(range(3, 3 + length))) for length in (40, 40, 40, 7)]
    whole, parts = (
        record_general_reference(checkpoint, windows, tmp_path / str(limit), lambda *_: None, max_bytes=limit)[0]
        for limit in (1 << 40, 0)
    )
    assert torch.allclose(whole.logits(0, 127), parts.logits(0, 127), atol=1e-5)
    assert torch.equal(whole.top, parts.top)


@pytest.mark.parametrize("kind", ["deepseek_v3", "qwen3_5_text"])  # a cache that is written in place; states
def test_a_graph_in_parts_computes_the_same(tmp_path: Path, kind: str) -> None:
    checkpoint = read_general_folder(save(kind, tmp_path / "model"))
    windows = [Window(tuple(range(3, 3 + length))) for length in (60, 9)]
    expected, _ = record_general_reference(checkpoint, windows, tmp_path / "logits", lambda *_: None)
    graph = PartwiseGraph(GeneralWriter().unquantized(checkpoint), checkpoint.config.shape, part_bytes=1)
    assert len(graph) > 20
    assert score(expected, graph)[0].within_bounds


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_quantized_graph_in_parts_computes_the_same(qwen3_moe: Path, tmp_path: Path, name: str) -> None:
    checkpoint, writer, recipe = read_general_folder(qwen3_moe), GeneralWriter(), GENERAL_RECIPES[name]
    writer.write(tmp_path, checkpoint, (recipe,), lambda *_: None)
    shape, tokens = checkpoint.config.shape, tuple(range(3, 40))
    file = tmp_path / writer.file_name(recipe)
    graph = PartwiseGraph(ir.load(file), shape, part_bytes=1, file=file)
    assert len(graph) > 10
    chunks = list(graph([Run((tokens[:30], tokens[30:]), 0)]))
    session = writer.open(tmp_path, shape, recipe)
    for chunk, found in zip((tokens[:30], tokens[30:]), chunks, strict=True):
        expected = session.step(chunk, num_logits=0)
        assert np.abs(found.numpy() - expected).max() < 1e-3 * np.abs(expected).max()


def test_weights_are_read_one_at_a_time_and_experts_are_stacked(qwen3_moe: Path) -> None:
    stored = load_file(qwen3_moe / "model.safetensors")
    assert any(".experts.3.gate_proj.weight" in name for name in stored)  # one by one, as published
    weights = read_general_folder(qwen3_moe).weights
    expected = make_model("qwen3_moe").state_dict()
    assert set(weights) == set(expected)
    for name in weights:
        assert torch.equal(weights[name], expected[name]), name


def test_a_window_longer_than_the_text_is_proven_on_a_longer_text(tmp_path: Path) -> None:
    folder = save("phimoe", tmp_path / "model", sliding_window=600)
    report = export(str(folder), ExportOptions(output=tmp_path / "bundle"))
    assert report.validation is not None
    beyond = report.validation.parities["fp32"].beyond_windows
    assert beyond is not None
    assert beyond.max < BOUND


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_tensors_that_do_not_fit_the_config_are_named(qwen3_moe: Path, tmp_path: Path, change: str) -> None:
    folder = save("qwen3_moe", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.gate.weight"
    if change == "missing":
        del tensors[name]
    elif change == "shape":
        tensors[name] = tensors[name][:, :5].contiguous()
    else:
        name = "model.layers.1.self_attn.extra.weight"
        tensors[name] = torch.zeros(3)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        export(str(folder), ExportOptions(output=tmp_path / "bundle"))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "int4-mixed"}, "--precision int4-mixed"),
        ({"graph": GraphChoice.PORTABLE}, "--graph portable"),
        ({"file_format": FileFormat.TORCHSCRIPT}, "--format torchscript"),
        ({"validate": False}, "--no-validate"),
    ],
)
def test_options_that_do_not_apply_are_refused(qwen3_moe: Path, tmp_path: Path, options: dict, named: str) -> None:
    with pytest.raises(ParameterError, match=named):
        export(str(qwen3_moe), ExportOptions(output=tmp_path / "bundle", **options))
    assert list(tmp_path.iterdir()) == []


def test_no_code_of_the_folder_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save("qwen3_moe", tmp_path / "model")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'witness')!r}, 'w').close()", encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    monkeypatch.chdir(folder)
    export(".", ExportOptions(output=tmp_path / "bundle"))
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("kind", ["vit", "no_such_model", "../etc"])
def test_other_architectures_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=kind.split("/")[-1]):
        export(str(tmp_path), ExportOptions(output=tmp_path / "bundle"))


def test_without_transformers_the_error_says_what_to_install(
    qwen3_moe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(UnknownFamilyError, match=r"llm-edge\[general\]"):
        export(str(qwen3_moe), ExportOptions(output=tmp_path / "bundle"))


@pytest.mark.parametrize(
    ("kind", "setting"), [("olmo", {"clip_qkv": 2.0}), ("gpt2", {"scale_attn_by_inverse_layer_idx": True})]
)
def test_a_setting_that_our_decoder_lacks_is_exported_through_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, setting: dict
) -> None:
    shorten_validation(monkeypatch, 60)
    folder = save(kind, tmp_path / "model", **setting)
    report = export(str(folder), ExportOptions(output=tmp_path / "bundle", precision="fp32"))
    assert report.validation is not None
    assert report.validation.parities["fp32"].worst.max < BOUND
    assert f"{next(iter(setting))} is set, which is not supported" in report.notes[0]


def test_a_setting_that_neither_route_supports_is_refused_with_both_reasons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    folder = save("llama", tmp_path / "model", rope_parameters=rope)
    refusal = "'dynamic' is not supported.*; nor is it exported through transformers: .*'llama' is not supported"
    with pytest.raises(UnsupportedSettingError, match=refusal):
        export(str(folder), ExportOptions(output=tmp_path / "bundle"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "transformers" else object())
    with pytest.raises(UnsupportedSettingError, match=r"'dynamic' is not supported.*llm-edge\[general\]"):
        export(str(folder), ExportOptions(output=tmp_path / "bundle"))


def test_layers_that_share_a_cache_keep_it_once() -> None:
    config = make_config("gemma4_text")
    architecture = architecture_of(config.to_dict(), "config.json")
    assert len(architecture.shape.caches) == 2 * (config.num_hidden_layers - config.num_kv_shared_layers)
    assert architecture.decoder.mode is AttentionMode.OPERATOR
