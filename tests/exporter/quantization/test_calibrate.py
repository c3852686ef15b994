"""Calibration: recipes on awkward shapes, fallbacks to blocks, memory use, and the calibration text."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
import weakref
from collections.abc import Sequence
from pathlib import Path

import families
import numpy as np
import onnxruntime as ort
import original
import pytest
import torch
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.exporter.bundle.onnx_writer import OnnxWriter
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.blocks import QuantizedBlocks
from llm_edge.exporter.quantization.calibrate import CalibratedWeights, calibrate
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.int8_static import Int8Static
from llm_edge.exporter.quantization.goals import MaxBitsPerWeight
from llm_edge.exporter.quantization.int8_static import QuantizedInt8
from llm_edge.exporter.quantization.journal import Journal
from llm_edge.exporter.quantization.recipes import RECIPES, Recipe, mixed, parse_precisions
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config
from llm_edge.exporter.texts import Texts, split_windows
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder

GOALS = [MaxBitsPerWeight(bits) for bits in (8, 9, 10, 12)]
CALIBRATED = parse_precisions("int8,int8-exact,int4,int4-mixed")
SHAPES = {
    "505M family": {"dim": 96, "ffn_dim": 384, "n_heads": 6, "n_kv_heads": 6, "vocab_size": 350},
    "qwen3": {"hidden_size": 144, "intermediate_size": 400, "num_attention_heads": 6, "head_dim": 24},
    "arcee": {"hidden_size": 80, "intermediate_size": 208, "num_attention_heads": 5, "num_key_value_heads": 1},
    "ministral3": {"hidden_size": 80, "intermediate_size": 208, "num_attention_heads": 5, "num_key_value_heads": 1},
    "gemma2": {"hidden_size": 80, "intermediate_size": 208, "num_attention_heads": 5, "num_key_value_heads": 1},
    "phi": {"hidden_size": 96, "intermediate_size": 208, "num_attention_heads": 3, "num_key_value_heads": 1},
    "cohere2": {"hidden_size": 80, "intermediate_size": 208, "num_attention_heads": 5, "num_key_value_heads": 1},
    "olmo": {"hidden_size": 96, "intermediate_size": 208, "num_attention_heads": 6},
    "gemma3_text": {"hidden_size": 80, "intermediate_size": 208, "num_attention_heads": 5, "num_key_value_heads": 1},
}


def text(length: int, seed: int) -> list[int]:
    found: list[int] = np.random.default_rng(seed).integers(3, 330, length).tolist()
    return found


def texts(length: int) -> Texts:
    """For calibration, with probes of a fraction of the length."""
    return Texts(split_windows(text(length, 0), 128), split_windows(text(max(length // 8, 2), 1), 64), [])


def checkpoint(name: str, folder: Path) -> Checkpoint:
    """A random model with peaked attention."""
    if name == "505M family":
        source = original.save_family(folder, seed=3, **SHAPES[name]).path
    else:
        with pytest.MonkeyPatch.context() as patch:
            kind, config = families.CASES[name]
            patch.setitem(families.CASES, name, (kind, {**config, **SHAPES.get(name, {})}))  # type: ignore[arg-type]
            source = families.save(families.model(name), folder)
    return open_checkpoint(str(source), SourceOptions(), lambda _: None)


def rounded(
    config: ModelConfig, weights: RotatedWeights, folder: Path, recipes: Sequence[Recipe], tokens: int = 1024
) -> dict[str, CalibratedWeights]:
    folder.mkdir()
    return calibrate(rotated_config(config), weights, recipes, texts(tokens), Journal(folder), lambda *_: None)


# ---- recipes on awkward shapes


NEAREST = Recipe(
    "nearest",
    "model_nearest",
    projections=Blocks(bits=4, size=64, symmetric=False),
    overrides={"lm_head": Blocks(bits=4, size=32, symmetric=False)},
    embedding=Blocks(bits=4, size=32, symmetric=False),
)
"""4-bit blocks, rounded to nearest and without rotation."""


@torch.inference_mode()
def reference(found: Checkpoint, ids: Tensor) -> Tensor:
    decoder = Decoder(found.config).eval()
    decoder.load_weights(found.weights)
    logits: Tensor = decoder(ids, torch.ones_like(ids), decoder.empty_past(len(ids)))[0]
    return logits


def graph_logits(path: Path, ids: Tensor) -> Tensor:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones_like(ids.numpy())}
    for node in session.get_inputs():
        if node.name.startswith("past"):
            feeds[node.name] = np.zeros((len(ids), node.shape[1], 0, node.shape[3]), dtype=np.float32)
    return torch.from_numpy(session.run(["logits"], feeds)[0])


@pytest.mark.parametrize("name", SHAPES)
def test_calibrated_recipes_support_sizes_that_are_not_powers_of_two(name: str, tmp_path: Path) -> None:
    found = checkpoint(name, tmp_path / "source")
    recipes = (*CALIBRATED, NEAREST)
    out = tmp_path / "out"
    out.mkdir()
    writer = OnnxWriter(GraphStyle.FUSED)
    stored = writer.write(out, found, recipes, texts(1536), lambda *_: None)
    assert list(stored) == [recipe.name for recipe in recipes]
    assert all(stored[recipe.name].formats["layers.0.mlp.down"].error for recipe in CALIBRATED)
    assert {path.name for path in out.iterdir()} == {f"{it.stem}.onnx{end}" for it in recipes for end in ("", "_data")}
    ids = torch.tensor([text(120, 1), text(120, 2)])
    wanted = reference(found, ids)
    assert wanted.std() > 0.5
    errors = {
        recipe.name: ((graph_logits(out / f"{recipe.stem}.onnx", ids) - wanted).norm() / wanted.norm()).item()
        for recipe in recipes
    }
    assert errors["int8"] < 0.08
    assert errors["int8-exact"] <= errors["int8"]
    assert errors["int4-mixed"] <= errors["int4"] < errors["nearest"]  # models so small have room for 8 bits in int4


# ---- choice of formats


def test_a_projection_with_outliers_in_its_inputs_gets_blocks(tmp_path: Path) -> None:
    """A norm makes one channel far larger than the others, which alone matter: one 8-bit scale cannot cover both."""
    found = checkpoint("gpt2", tmp_path / "source")  # LayerNorm: the residual stream is not rotated
    weights = {name: found.weights[name].float().clone() for name in found.weights}
    weights["layers.1.mlp_norm.weight"][5] *= 3000
    weights["layers.1.mlp.up.weight"][:, 5] /= 1e6
    made = rounded(found.config, RotatedWeights(found.config, weights), tmp_path / "rounded", CALIBRATED)
    formats = made["int8"].formats
    assert {name for name in formats if name.startswith("layers.")} == {
        f"layers.{number}.{name}"
        for number in range(found.config.num_hidden_layers)
        for name in ("attention.qkv", "attention.output", "mlp.up", "mlp.down")
    }
    assert formats["layers.1.mlp.up"].format != Int8Static()
    assert formats["layers.0.mlp.up"].format == Int8Static()


def test_larger_precisions_have_less_divergence(tmp_path: Path) -> None:
    found = checkpoint("smollm3", tmp_path / "source")
    weights = RotatedWeights(found.config, found.weights)
    sizes = [Recipe("mine", "model_mine", choices=mixed(goal).choices, goal=goal) for goal in GOALS]
    recipes = [dataclasses.replace(recipe, name=str(number)) for number, recipe in enumerate(sizes)]
    made = rounded(found.config, weights, tmp_path / "rounded", recipes)
    totals = [sum(choice.divergence for choice in made[recipe.name].formats.values()) for recipe in recipes]
    assert totals == sorted(totals, reverse=True)
    assert totals[-1] < totals[0] / 5


# ---- memory and reproducibility


class TrackedWeights(RotatedWeights):
    """Weights that track which of the returned tensors are still alive."""

    def __init__(self, found: Checkpoint) -> None:
        super().__init__(found.config, found.weights)
        self.held: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self.names: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        weight = super().__getitem__(name).clone()
        self.held[len(self.names)] = weight
        self.names.append(name)
        layer = layer_of(name)
        others = {self.names[index] for index in self.held if layer_of(self.names[index]) != layer}
        assert len(others) <= 1, (name, others)  # the tensor rounded last
        return weight


def layer_of(name: str) -> int:
    found = re.match(r"layers\.(\d+)\.", name)
    return int(found[1]) if found else -1


def test_weights_are_loaded_layer_by_layer_and_calibration_is_reproducible(tmp_path: Path) -> None:
    found = checkpoint("smollm3", tmp_path / "source")
    watched = TrackedWeights(found)
    made = rounded(found.config, watched, tmp_path / "first", CALIBRATED)
    layers = [layer for layer in map(layer_of, watched.names) if layer >= 0]
    assert [layer for layer, _ in itertools.groupby(layers)] == [0, 1, 2, 1, 0]  # forward, then backward
    again = rounded(found.config, RotatedWeights(found.config, found.weights), tmp_path / "second", CALIBRATED)
    assert {name: rounding.formats for name, rounding in made.items()} == {
        name: rounding.formats for name, rounding in again.items()
    }
    assert sums(tmp_path / "first") == sums(tmp_path / "second") != {}


def sums(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_rounded_weights_are_read_back_from_disk(tmp_path: Path) -> None:
    found = checkpoint("llama", tmp_path / "source")
    weights = RotatedWeights(found.config, found.weights)
    made = rounded(found.config, weights, tmp_path / "rounded", CALIBRATED, tokens=300)
    for rounding in made.values():
        assert len(rounding.caches) == found.config.num_hidden_layers
        for cache in rounding.caches:
            assert cache.key.shape == cache.value.shape == (2, 32)
            assert (cache.key > 0).all()
        for module, choice in rounding.formats.items():
            weight = weights[f"{module}.weight"]
            loaded = rounding.load(module)
            assert isinstance(loaded, QuantizedBlocks | QuantizedInt8)
            assert len(loaded.data) == len(weight)
            assert 0 < choice.divergence < 1
            assert choice.error is None if module in ("lm_head", "embed_tokens") else 0 < choice.error < 0.1
            if isinstance(choice.format, Blocks):
                assert loaded.dequantized(weight.shape[1]).shape == weight.shape  # type: ignore[union-attr]


@pytest.mark.parametrize("tokens", [2, 40, 300])
def test_a_text_shorter_than_a_window_is_accepted(tokens: int, tmp_path: Path) -> None:
    found = checkpoint("gpt_neo", tmp_path / "source")
    weights = RotatedWeights(found.config, found.weights)
    made = rounded(found.config, weights, tmp_path / "rounded", (RECIPES["int8"],), tokens)
    assert all(np.isfinite(choice.divergence) for choice in made["int8"].formats.values())


def test_the_number_of_cores_does_not_change_the_result(tmp_path: Path) -> None:
    found = checkpoint("llama", tmp_path / "source")
    weights = RotatedWeights(found.config, found.weights)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            rounded(found.config, weights, tmp_path / str(count), CALIBRATED)
    finally:
        torch.set_num_threads(threads)
    assert sums(tmp_path / "1") == sums(tmp_path / "3") != {}
