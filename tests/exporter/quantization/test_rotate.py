"""Rotation: orthogonal Hadamard matrices, and models that compute the same with rotated weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import families
import pytest
import torch
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.quantization.hadamard import hadamard_matrix, rotation
from llm_edge.exporter.quantization.rotate import RotatedWeights, rotated_config, rotates_residual
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder

BOUND = 1e-3
HADAMARD = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 64, 80, 96, 128, 144, 576, 896, 960, 1024, 1152, 1536)
OTHERS = (3, 5, 6, 14, 15, 34, 52, 63, 100, 172, 226)  # no Hadamard matrix exists, or none is constructed here


# ---- matrices


@pytest.mark.parametrize("size", [*HADAMARD, *OTHERS])
def test_rotations_are_orthogonal(size: int) -> None:
    matrix = rotation(size).matrix()
    assert matrix.shape == (size, size)
    assert (matrix @ matrix.T - torch.eye(size)).abs().max() < 1e-5
    x = torch.randn(7, size, generator=torch.Generator().manual_seed(0))
    assert (rotation(size).apply(x) - x @ matrix).abs().max() < 1e-5


@pytest.mark.parametrize("size", HADAMARD)
def test_all_entries_have_the_same_magnitude_if_a_hadamard_matrix_exists(size: int) -> None:
    assert (rotation(size).matrix().abs() - size**-0.5).abs().max() < 1e-6


def test_a_rotation_is_deterministic_and_supports_any_leading_axes_and_type() -> None:
    x = torch.randn(2, 3, 36, generator=torch.Generator().manual_seed(1))
    turned = rotation(36).apply(x)
    assert torch.equal(turned, rotation(36).apply(x))
    assert turned.shape == x.shape
    halves = rotation(36).apply(x.half())
    assert halves.dtype == torch.float32
    assert (halves - turned).abs().max() < 1e-2


@pytest.mark.parametrize("size", [1, 12, 24, 96])
def test_columns_are_rotated_like_rows(size: int) -> None:
    found = rotation(size)
    columns = torch.randn(size, 7, dtype=torch.float64)
    torch.testing.assert_close(found.apply_to_columns(columns), found.apply(columns.T).T)


def test_many_rows_are_rotated_like_few() -> None:
    x = torch.randn(2500, 12, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rotation(12).apply(x)[2000:], rotation(12).apply(x[2000:]))


@pytest.mark.parametrize(
    ("width", "limit", "size"),
    [(1536, 64, 64), (1536, 128, 128), (576, 64, 64), (136, 64, 8), (200, 64, 40), (77, 64, 1), (48, 64, 48)],
)
def test_the_largest_hadamard_size_that_divides_a_width_is_found(width: int, limit: int, size: int) -> None:
    block = hadamard_matrix(width, limit)
    assert block.shape == (size, size)
    assert (block @ block.T - torch.eye(size)).abs().max() < 1e-6
    assert (block.abs() - size**-0.5).abs().max() < 1e-6


# ---- models


def checkpoint(name: str, folder: Path) -> Checkpoint:
    """A family's random model, with norm weights between a quarter and four."""
    made = families.model(name)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight_name, weight in made.named_parameters():
            if weight_name.endswith("weight") and weight.ndim == 1:
                shift = 1.0 if name.startswith(("gemma", "nemotron")) else 0.0  # whose weights are 1 + w
                weight.copy_(4 ** (2 * torch.rand(weight.shape, generator=generator) - 1) - shift)
    return read_folder(families.save(made, folder))


@torch.inference_mode()
def logits(config: ModelConfig, weights: Mapping[str, Tensor]) -> Tensor:
    """Logits [41, V] of 40 tokens in a single step and of one more token."""
    decoder = Decoder(config).eval()
    decoder.load_weights(weights)
    ids = torch.randint(0, config.vocab_size, (1, 41), generator=torch.Generator().manual_seed(3))
    first, past = decoder(ids[:, :40], torch.ones(1, 40, dtype=torch.int64), decoder.empty_past())
    last, _ = decoder(ids[:, 40:], torch.ones(1, 41, dtype=torch.int64), past)
    return torch.cat([first[0], last[0]])


@pytest.mark.parametrize("name", families.CASES)
def test_a_rotated_model_computes_the_same(name: str, tmp_path: Path) -> None:
    found = checkpoint(name, tmp_path)
    turned = RotatedWeights(found.config, found.weights)
    config = rotated_config(found.config)
    wanted = logits(found.config, found.weights)
    assert wanted.std() > 0.5  # otherwise the bound would be meaningless
    assert (logits(config, turned) - wanted).abs().max() < BOUND

    assert config.head_mix == (rotates_residual(found.config) and found.config.tie_word_embeddings)
    assert set(turned) == {parameter for parameter, _ in named(config)}
    for parameter, shape in named(config):
        assert turned[parameter].shape == shape
    for role in ("attention.qkv", "attention.output"):  # values and their consumers are rotated in every model
        assert changed(found.weights, turned, f"layers.0.{role}.weight")
    for place in ("embed_tokens.weight", "layers.1.mlp.down.weight"):
        assert changed(found.weights, turned, place) == rotates_residual(found.config)
    if rotates_residual(found.config):
        assert torch.equal(turned["layers.0.mlp_norm.weight"], torch.ones(config.hidden_size))
        assert torch.equal(turned["norm.weight"], torch.ones(config.hidden_size))


def named(config: ModelConfig) -> list[tuple[str, torch.Size]]:
    with torch.device("meta"):
        return [(name, parameter.shape) for name, parameter in Decoder(config).named_parameters()]


def changed(before: Mapping[str, Tensor], after: Mapping[str, Tensor], name: str) -> bool:
    return bool((before[name].float() - after[name]).abs().mean() > 0.1 * before[name].float().abs().mean())


def test_the_families_include_both_kinds_of_model(tmp_path: Path) -> None:
    kinds = {}
    for name in ("llama", "olmo2", "gemma3_text", "gpt2", "gpt_neox"):
        kinds[name] = rotates_residual(checkpoint(name, tmp_path / name).config)
    assert kinds == {"llama": True, "olmo2": False, "gemma3_text": False, "gpt2": False, "gpt_neox": False}


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_parallel_blocks_and_learned_positions_with_rms_norms(parallel: bool, tied: bool, tmp_path: Path) -> None:
    """No family combines these; the rotation depends only on the config."""
    found = checkpoint("llama with biases, tied", tmp_path)
    config = dataclasses.replace(
        found.config, parallel_blocks=parallel, learned_positions=True, tie_word_embeddings=tied
    )
    generator = torch.Generator().manual_seed(7)
    extra = {"embed_positions.weight": torch.randn(256, 64, generator=generator)}
    if not tied:
        extra["lm_head.weight"] = torch.randn(config.vocab_size, 64, generator=generator)
    weights = {**{name: found.weights[name] for name in found.weights}, **extra}
    wanted = logits(config, weights)
    assert wanted.std() > 0.5
    assert (logits(rotated_config(config), RotatedWeights(config, weights)) - wanted).abs().max() < BOUND


def test_names_are_listed_without_loading_weights(tmp_path: Path) -> None:
    class Unread(dict[str, torch.Tensor]):
        def __getitem__(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

    made = checkpoint(next(iter(families.CASES)), tmp_path)
    turned = RotatedWeights(made.config, Unread(dict.fromkeys(made.weights, torch.zeros(1))))
    assert "layers.0.attention.qkv.weight" in turned
    assert "layers.0.attention.qkv.bias" not in turned


def test_rotation_shrinks_outliers(tmp_path: Path) -> None:
    """An outlier channel of the residual stream, of a norm or of the values is spread over all channels."""
    found = checkpoint(next(iter(families.CASES)), tmp_path)
    weights = {name: found.weights[name].float() for name in found.weights}
    weights["embed_tokens.weight"][:, 7] *= 60
    weights["layers.0.attention_norm.weight"][7] = 60
    values = found.config.query_size + found.config.key_value_size
    weights["layers.0.attention.qkv.weight"][values + 3] *= 60
    turned = RotatedWeights(found.config, weights)

    tokens = torch.arange(3, 300)[None]  # 2 is padding, whose row is zero
    assert peak(weights["embed_tokens.weight"][tokens]) > 7
    assert peak(turned.rows("embed_tokens.weight")(tokens)) < 3
    assert torch.equal(turned.rows("embed_tokens.weight")(tokens), turned["embed_tokens.weight"][tokens])
    folded = weights["layers.0.attention.qkv.weight"] * weights["layers.0.attention_norm.weight"]
    assert peak(folded) > 6
    assert peak(turned["layers.0.attention.qkv.weight"]) < 4
    rows = weights["layers.0.attention.qkv.weight"].T
    assert peak(rows[:, values:]) > 5
    assert peak(turned["layers.0.attention.qkv.weight"].T[:, values:]) < 4


def peak(x: Tensor) -> float:
    """The ratio of the maximum to the root mean square of each row, averaged."""
    return (x.abs().amax(-1) / x.square().mean(-1).sqrt()).mean().item()


@pytest.mark.parametrize("name", ["llama", "llama with biases, tied"])
def test_half_precision_weights_become_float32(name: str, tmp_path: Path) -> None:
    found = checkpoint(name, tmp_path)
    halves = {key: found.weights[key].bfloat16() for key in found.weights}
    turned = RotatedWeights(found.config, halves)
    assert {turned[key].dtype for key in turned} == {torch.float32}
