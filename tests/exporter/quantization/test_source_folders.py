"""The recipe `source` keeps the groups of GPTQ, AWQ and packed integers."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import quantized
import tiny
import torch
from test_quantized_folders import CASES, read
from test_source_recipe import (
    LLAMA,
    TOKENS,
    exact_logits_of,
    export_source,
    graph_of,
    halves,
    logits_of,
    numbers_of,
    save_folder,
)

from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.model.block_weights import BlockKind
from llm_edge.model.decoder import Decoder
from llm_edge.runtime import Bundle

KEPT: dict[str, BlockKind] = {
    "gptq": BlockKind(4, 32, offsets=False, zeros=True),
    "gptq, symmetric, of 8 bits": BlockKind(8, 32, offsets=False),
    "gptq of 3 bits": BlockKind(4, 32, offsets=False, zeros=True),
    "gptq with one group per row": BlockKind(4, 128, offsets=False, zeros=True),  # groups of 256 and 512, divided
    "awq": BlockKind(4, 32, offsets=False, zeros=True),
}


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.shorten_texts(monkeypatch, 200)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original")
    save_folder(folder, {**LLAMA, "tie_word_embeddings": True})
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "model")


@torch.inference_mode()
def reference(folder: Path, embedding: np.ndarray) -> np.ndarray:
    """Logits of the dequantized weights with an embedding, which is also the head."""
    checkpoint = read(folder)
    decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights({**checkpoint.weights, "embed_tokens.weight": torch.from_numpy(embedding)})
    mask = torch.ones(1, len(TOKENS), dtype=torch.int64)
    logits: np.ndarray = decoder(torch.tensor([TOKENS]), mask, decoder.empty_past())[0][0].numpy()
    return logits


def stored_weight(bundle: Path, name: str, kind: BlockKind) -> np.ndarray:
    """A weight [N, K] as MatMulNBits defines it from the tensors of a fused graph."""
    tensors = numbers_of(graph_of(bundle))
    parts = []
    for stem in [name] if f"{name}.data" in tensors else [f"{name}_0", f"{name}_1"]:
        data, scales = tensors[f"{stem}.data"], tensors[f"{stem}.scales"]
        levels = (halves(data) if kind.bits == 4 else data).reshape(*scales.shape, -1).astype(np.float32)
        zeros = np.full(scales.shape, 2.0 ** (kind.bits - 1), np.float32)
        if kind.zeros:
            packed = tensors[f"{stem}.zero_points"]
            zeros = (halves(packed).reshape(len(packed), -1) if kind.bits == 4 else packed)[:, : scales.shape[1]]
        parts.append(((levels - zeros[..., None]) * scales[..., None]).reshape(len(scales), -1))
    return np.concatenate(parts)


@pytest.mark.parametrize("name", KEPT)
def test_groups_are_kept(name: str, folder: Path) -> None:
    config, write, _ = CASES[name]
    quantized.quantize_folder(folder, config, write)
    weights = read(folder).weights
    bundles = {style: export_source(folder, style) for style in GraphStyle}
    for weight in ("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down"):
        full_name = f"layers.1.{weight}.weight"
        assert weights.block_kind(full_name) == KEPT[name]
        stored = stored_weight(bundles[GraphStyle.FUSED], full_name, KEPT[name])
        np.testing.assert_array_equal(stored, weights[full_name].numpy(), err_msg=weight)
    exact = {style: exact_logits_of(bundle, TOKENS) for style, bundle in bundles.items()}
    np.testing.assert_allclose(exact[GraphStyle.FUSED], exact[GraphStyle.PORTABLE], atol=2e-4, rtol=0)
    # The source's embedding is not quantized: it is rounded to 8 bits.
    embedding = stored_weight(bundles[GraphStyle.FUSED], "embed_tokens.weight", BlockKind(8, 32, offsets=False))
    expected = reference(folder, embedding)
    for style, bundle in bundles.items():
        np.testing.assert_allclose(exact[style], expected, atol=2e-4, rtol=0)
        bound = 5e-3 if style is GraphStyle.FUSED else 0.1
        assert np.abs(logits_of(bundle, style, TOKENS) - expected).mean() < bound * expected.std()


@pytest.mark.parametrize("name", ["gptq with act-order", "gptq with a smaller last group", "fp8 blocks"])
def test_other_layouts_are_not_kept(name: str, folder: Path) -> None:
    config, write, _ = CASES[name]
    quantized.quantize_folder(folder, config, write)
    assert read(folder).weights.block_kind("layers.0.mlp.down.weight") is None


def test_weights_that_a_family_multiplies_are_not_kept(tmp_path: Path) -> None:
    """Granite's factors are folded into weights; those of queries, keys and values are not."""
    case = {**LLAMA, "model_type": "granite", "residual_multiplier": 0.5, "tie_word_embeddings": True}
    save_folder(tmp_path, {key: value for key, value in case.items() if key != "head_dim"})
    config, write, _ = CASES["gptq"]
    quantized.quantize_folder(tmp_path, config, write)
    weights = read(tmp_path).weights
    assert weights.block_kind("layers.0.attention.qkv.weight") == KEPT["gptq"]
    assert weights.block_kind("layers.0.mlp.down.weight") is None


def test_a_quantized_folder_keeps_its_numbers_by_default(
    folder: Path, tmp_path: Path, llm_export: Callable[..., tuple[int, str, str]]
) -> None:
    config, write, _ = CASES["gptq"]
    quantized.quantize_folder(folder, config, write)
    code, out, _ = llm_export(folder, "-o", tmp_path / "bundle")
    assert code == 0, out
    assert list(Bundle.open(tmp_path / "bundle").precisions) == ["source"]
    assert "GPTQ 4 bits" in out
    code, out, _ = llm_export(folder, "-o", tmp_path / "rounded", "--precision", "int8", "--no-validate")
    assert code == 0
    assert "The source is quantized already (GPTQ 4 bits)" in out
